"""A rehearsal for `cloister plan`: the job's own passes and training steps on a few layers, timed and weighed.

The layers are of the model's architecture and width, with random weights; the packs are the job's own. What one more
layer costs is the difference between two such models. What remains is there once: the embedding, the last layer (which
is computed for targets only), the head, the optimiser's step.

Legend: T = packed tokens, D = model dimension.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from cloister.adapters.add import add_adapter
from cloister.data.packing import Pack
from cloister.job import Job
from cloister.model import attention
from cloister.model.anatomy import DTYPES
from cloister.model.cut import Former, Latter
from cloister.model.repacked import RepackedLinear, repack
from cloister.training.first_step import first_step
from cloister.training.loop import PackList, Stepper
from cloister.training.loss import target_nll

_LEAST_RUNS = 3
_ENOUGH_S = 0.7
"""Of one kind of work; what takes longer is run `_LEAST_RUNS` times."""
_LONG_S = 3.0
"""What takes longer is run once."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of a token: what it costs once, and in each layer. Seconds or bytes."""

    once: float
    layer: float

    def of(self, layers: int) -> float:
        return self.once + layers * self.layer


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """Costs of a token. Seconds are those of this machine, with the threads that torch has."""

    former: Cost
    """A party's pass."""
    training: Cost
    """Forward, backward and the optimiser's share, in the latter half."""
    scoring: Cost
    """A pass of the latter half over test packs, which have more targets."""
    kept: Cost
    """Bytes that are kept for the backward pass."""
    copied: Cost
    """Bytes of one copy of the weights that are repacked, of the latter half; of the model, not of a token."""


def rehearse(config: Any, job: Job, train: Sequence[Pack], test: Sequence[Pack]) -> Rehearsal:
    """Run the job's work on at most three layers.

    Args:
        config: the model's configuration, of its architecture's class.
        train, test: packs to work on; a step is all of `train`. Neither is empty.
    """
    counts = range(2, min(3, config.get_text_config().num_hidden_layers) + 1)
    with torch.random.fork_rng(devices=[]):
        found = [_with_layers(count, config, job, train, test) for count in counts]
    former, training, scoring, kept, copied = (_cost(values) for values in zip(*found, strict=True))
    return Rehearsal(former=former, training=training, scoring=scoring, kept=kept, copied=copied)


def may_repack(job: Job) -> bool:
    """Whether the job's roles repack weights, as far as its file decides."""
    section = job.enclave
    return section.repack and section.sharding != "full" and section.device in ("auto", "cpu")


def rehearsal_bytes(config: Any, parameters: int, max_tokens: int) -> int:
    """Memory that a rehearsal takes, about, for a model of so many parameters: its layers are taken to be alike."""
    text = config.get_text_config()
    outer = 2 * text.vocab_size * text.hidden_size
    layers = 3 * max(0, parameters - outer) / text.num_hidden_layers
    # Weights are there three times where they are repacked; logits and a layer's activations of one pack.
    return 4 * int(3 * (outer + layers) + max_tokens * (3 * text.vocab_size + 100 * text.hidden_size))


def _with_layers(
    count: int, config: Any, job: Job, train: Sequence[Pack], test: Sequence[Pack]
) -> tuple[float, float, float, float, float]:
    """What `Rehearsal` consists of, in its order, with all layers but one in each half."""
    hidden = config.get_text_config().hidden_size
    former = _former_s(_few(config, job, count), count - 1, train)
    half = Latter(_few(config, job, count), 1)
    copied = sum(4.0 * m.weight.numel() for m in half.model.modules() if isinstance(m, RepackedLinear))
    training, kept = _training_s(half, job, train, hidden)
    return former, training, _scoring_s(half, test, hidden), kept, copied


def _cost(per_token: Sequence[float]) -> Cost:
    """From a model with one layer in work, and where there is one, another with two."""
    layer = max(0.0, per_token[-1] - per_token[0])
    return Cost(once=per_token[0] - layer, layer=layer)


def _few(config: Any, job: Job, count: int) -> PreTrainedModel:
    """The first `count` layers of the architecture, with random weights."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = count
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:count]
    attention.install()
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, dtype=DTYPES[job.model.dtype]
    )
    model.requires_grad_(False)
    repack(model, may_repack(job))
    return model.eval()  # type: ignore[no-any-return,no-untyped-call]


def _former_s(model: PreTrainedModel, cut: int, packs: Sequence[Pack]) -> float:
    former = Former(model, cut)
    seconds = _seconds(lambda: [former(pack.given, pack.layout.position_T, pack.layout) for pack in packs])
    return seconds / sum(map(len, packs))


def _training_s(half: Latter, job: Job, packs: Sequence[Pack], hidden: int) -> tuple[float, float]:
    """Seconds a token, and bytes kept for a token of a pack."""
    source, tokens = PackList(_crossed(packs, hidden, half)), sum(map(len, packs))
    steps = job.training.model_copy(update={"steps": 1, "epochs": None, "batch_tokens": tokens})
    adapted = add_adapter(
        half,
        job.adapter,
        first_layer=1,
        seed=job.job.seed,
        first_step=lambda: first_step(half, source, steps, job.job.seed),
    )
    stepper = Stepper(half, adapted, steps)
    with _kept(half) as kept:
        target_nll(half, source[0])
    seconds = _seconds(lambda: stepper.step(source, range(len(packs)), 1e-6, where="plan"))
    return seconds / tokens, sum(kept.values()) / len(packs[0])


def _scoring_s(half: Latter, packs: Sequence[Pack], hidden: int) -> float:
    crossed = _crossed(packs, hidden, half)
    half.model.eval()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return _seconds(lambda: [target_nll(half, pack) for pack in crossed]) / sum(map(len, packs))


def _crossed(packs: Sequence[Pack], hidden: int, half: Latter) -> list[Pack]:
    """Packs with random activations (T, D)."""
    generator = torch.Generator().manual_seed(0)
    return [p.with_activations(torch.randn(len(p), hidden, generator=generator).to(half.model.dtype)) for p in packs]


@contextmanager
def _kept(half: Latter) -> Iterator[dict[int, int]]:
    """Bytes of each storage that is kept for a backward pass in this block, parameters aside."""
    weights = {p.untyped_storage().data_ptr() for p in half.model.parameters()}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield found


def _seconds(work: Callable[[], object]) -> float:
    """The median of some runs, after one that does not count; of what takes long, that one."""
    began = time.perf_counter()
    work()
    taken = [time.perf_counter() - began]
    if taken[0] > _LONG_S:
        return taken[0]
    taken.clear()
    while len(taken) < _LEAST_RUNS or sum(taken) < _ENOUGH_S:
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return median(taken)
