"""Training and scoring each system of the study, in one process.

`split` runs here as in a deployment, without processes and seals: former layers, activations in the job's wire format
and back, the enclave's training loop. tests/integration/test_oracle.py holds that a deployment gives the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

from peft import PeftModel

from cloister.adapters.add import add_adapter
from cloister.data.activations import Schema, decode_pack, encode_pack
from cloister.data.packing import Pack
from cloister.data.prepare import Part, PartyData, prepare
from cloister.evaluation.scores import Scores, score
from cloister.federation.aggregate import aggregate
from cloister.federation.state import GlobalState
from cloister.job import (
    AdapterSection,
    FederationSection,
    Job,
    JobSection,
    ModelSection,
    TrainingSection,
    TransportSection,
)
from cloister.jobfile import parse_job, render_job
from cloister.model.anatomy import DTYPES, load_model, load_tokenizer
from cloister.model.cut import Former, Latter, Whole
from cloister.silo.work import SiloWork
from cloister.training.first_step import first_step
from cloister.training.loop import PackList, PackSource, snapshot, train
from experiments.cells import Cell, Outcome
from experiments.integers import integer_half
from experiments.shira import add_shira

Source = Callable[[Sequence[Pack]], PackSource]
Parts = Mapping[str, Part]
"""What is scored, by party."""


def run_cell(cell: Cell, cut: int) -> Outcome:
    """Train what the cell names and score it on every party's examples.

    Args:
        cut: the number of former layers that the job means.

    Raises:
        CloisterError: training diverged, or the job does not fit the model or the data.
    """
    began = time.monotonic()
    data = read_data(cell.job)
    parts = {party: own.parts[cell.judged] for party, own in data.items()}
    if cell.system in ("fedavg", "slice"):
        outcome = _rounds(cell, data, parts)
    elif cell.system == "local":
        outcome = _alone(cell.job, data, parts)
    else:
        outcome = _pooled(cell, cut, data, parts)
    return replace(outcome, seconds=time.monotonic() - began)


def read_data(job: Job) -> dict[str, PartyData]:
    """Every party's records, packed as its own process would. Kept for the next cell: most differ in other sections."""
    same = {
        "job": JobSection(name="data", seed=job.job.seed),
        "model": ModelSection(path=job.model.path),
        "adapter": AdapterSection(),
        "training": TrainingSection(steps=1, max_tokens=job.training.max_tokens),
        "transport": TransportSection(),
        "federation": FederationSection(),
    }
    return _read_data(render_job(job.model_copy(update=same)))


@lru_cache(maxsize=2)
def _read_data(text: str) -> dict[str, PartyData]:
    job = parse_job(text, Path("job.toml")).job
    tokenizer = load_tokenizer(Path(job.model.path))
    return {p.name: prepare(job, tokenizer, Path(p.train or ""), Path(p.test or "")) for p in job.party}


def _pooled(cell: Cell, cut: int, data: Mapping[str, PartyData], parts: Parts) -> Outcome:
    """base, central, latter, split and shira: one training sees all parties' packs."""
    job, folder = cell.job, Path(cell.job.model.path)
    source: Source = PackList
    if cell.system in ("base", "central"):
        half, first_layer = Whole(load_model(folder, job.model.dtype)), 0
    else:
        half, first_layer = Latter(load_model(folder, job.model.dtype), cut), cut
        former = Former(load_model(folder, job.model.dtype), cut)
        source = _crossing(former, job, "float32" if cell.system == "latter" else None)
    if cell.system == "base":
        return Outcome(scores=_score(half, source, parts))
    packs = source([pack for own in data.values() for pack in own.parts["train"].packs])
    if cell.system == "shira":
        adapted = add_shira(half, job.adapter, first_layer=first_layer, seed=job.job.seed)
    else:
        placed_by = partial(first_step, half, packs, job.training, job.job.seed)
        adapted = add_adapter(half, job.adapter, first_layer=first_layer, seed=job.job.seed, first_step=placed_by)
    result = train(half, adapted, packs, job.training, seed=job.job.seed)
    return Outcome(
        scores=_score(half, source, parts),
        steps=result.steps,
        tokens=result.tokens,
        trained_parameters=_trained(adapted),
        train_loss=[point.train_loss for point in result.curve],
    )


def _alone(job: Job, data: Mapping[str, PartyData], parts: Parts) -> Outcome:
    """Each party by itself, on all layers, with the whole budget of tokens; scored on its own examples."""
    found, tokens, trained = dict[str, Scores](), 0, 0
    for party, own in data.items():
        half = Whole(load_model(Path(job.model.path), job.model.dtype))
        adapted = add_adapter(half, job.adapter, first_layer=0, seed=job.job.seed)
        result = train(half, adapted, PackList(own.parts["train"].packs), job.training, seed=job.job.seed)
        found |= _score(half, PackList, {party: parts[party]})
        tokens, trained = tokens + result.tokens, _trained(adapted)
    return Outcome(scores=found, steps=job.training.steps or 0, tokens=tokens, trained_parameters=trained)


def _rounds(cell: Cell, data: Mapping[str, PartyData], parts: Parts) -> Outcome:
    """fedavg and slice: the same rounds, with plain products or with the integers of `slice`."""
    job, folder = cell.job, Path(cell.job.model.path)

    def half() -> Whole:
        return integer_half(folder, job) if cell.system == "slice" else Whole(load_model(folder, job.model.dtype))

    halves = {party: half() for party in data}
    works = {party: SiloWork(halves[party], own, job, party) for party, own in data.items()}
    adapted = next(iter(works.values())).adapted
    state, steps, tokens, losses = GlobalState(round=0, weights=snapshot(adapted)), 0, 0, []
    while state.round < job.federation.rounds:
        results = {party: work.train(state.round, state.weights, state.moments) for party, work in works.items()}
        updates = [result.as_update(party, state.round, job.federation) for party, result in results.items()]
        state = aggregate(updates, state, job.federation)
        tokens += sum(r.tokens for r in results.values())
        steps += max(r.steps for r in results.values())
        losses.append(sum(r.loss * r.tokens for r in results.values()) / sum(r.tokens for r in results.values()))
    scores = dict[str, Scores]()
    for party, work in works.items():
        with work.tuned(state.weights):
            scores |= _score(halves[party], PackList, {party: parts[party]})
    return Outcome(scores=scores, steps=steps, tokens=tokens, trained_parameters=_trained(adapted), train_loss=losses)


def _crossing(former: Former, job: Job, wire: str | None) -> Source:
    return lambda packs: Activations(former, job, wire, packs)


class Activations:
    """Packs as the enclave gets them: through the former layers, and through the wire format of the job.

    Args:
        wire: a format in place of the job's.
    """

    def __init__(self, former: Former, job: Job, wire: str | None, packs: Sequence[Pack]) -> None:
        text = former.config.get_text_config()
        self._former, self._packs, self._dtype = former, packs, DTYPES[job.model.dtype]
        self._schema = Schema(
            activation_dtype=wire or job.transport.activation_dtype,
            hidden=text.hidden_size,
            vocabulary=text.vocab_size,
            max_tokens=job.training.max_tokens,
        )
        self.tokens = [len(pack) for pack in packs]
        self.targets = [len(pack.target_pos_N) for pack in packs]

    def __getitem__(self, index: int, /) -> Pack:
        pack = self._packs[index]
        crossing = pack.with_activations(self._former(pack.given, pack.layout.position_T, pack.layout))
        blob = encode_pack(crossing, self._schema.activation_dtype)
        return decode_pack(blob, self._schema, self._dtype, where="activations")


def _score(half: Whole, source: Source, parts: Parts) -> dict[str, Scores]:
    return {party: score(half, source(part.packs), part.examples, where=party) for party, part in parts.items()}


def _trained(adapted: PeftModel) -> int:
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad)
