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
from cloister.model.repacked import repack
from cloister.training.first_step import first_step
from cloister.training.loop import PackList, Stepper
from cloister.training.loss import target_nll

_LEAST_RUNS = 3
_ENOUGH_S = 0.7
"""Of one kind of work; what takes longer is run `_LEAST_RUNS` times."""


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


def rehearse(config: Any, job: Job, train: Sequence[Pack], test: Sequence[Pack]) -> Rehearsal:
    """Run the job's work on at most three layers.

    Args:
        config: the model's configuration, of its architecture's class.
        train, test: packs to work on; a step is all of `train`. Neither is empty.
    """
    text = config.get_text_config()
    counts = range(2, min(3, text.num_hidden_layers) + 1)
    former, training, scoring, kept = (list[float]() for _ in range(4))
    for count in counts:
        former.append(_former_s(_few(config, job, count), count - 1, train))
        half = Latter(_few(config, job, count), 1)
        seconds, held = _training_s(half, job, train, text.hidden_size)
        training.append(seconds)
        kept.append(held)
        scoring.append(_scoring_s(half, test, text.hidden_size))
    return Rehearsal(former=_cost(former), training=_cost(training), scoring=_cost(scoring), kept=_cost(kept))


def rehearsal_bytes(config: Any, parameters: int) -> int:
    """Memory that a rehearsal takes, about, for a model of so many parameters: its layers are taken to be alike."""
    text = config.get_text_config()
    outer = 2 * text.vocab_size * text.hidden_size
    return 4 * int(outer + 3 * max(0, parameters - outer) / text.num_hidden_layers)


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
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=DTYPES[job.model.dtype]
        )
    model.requires_grad_(False)
    repack(model, job.enclave.repack)
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
    members = range(len(packs))
    return _seconds(lambda: stepper.step(source, members, 1e-6, where="plan")) / tokens, sum(kept.values()) / len(
        packs[0]
    )


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
    """The median of some runs, after one that does not count."""
    work()
    taken: list[float] = []
    while len(taken) < _LEAST_RUNS or sum(taken) < _ENOUGH_S:
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return median(taken)
