"""A small slice job in memory: parties' work over tiny models, and a server that aggregates or leads tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cloister.adapters.add import add_adapter
from cloister.adapters.state import adapter_state
from cloister.data.packing import Pack
from cloister.data.prepare import Part, PartyData
from cloister.data.tokens import RESPONSE, Example, Truncation
from cloister.federation.aggregate import aggregate
from cloister.federation.state import GlobalState
from cloister.job import Job
from cloister.model.cut import Whole
from cloister.silo.work import SiloWork
from tests.unit.data.tiny_packs import random_pack
from tests.unit.model.tiny import VOCABULARY

MAX_TOKENS = 32
LENGTHS = ([9, 14], [20], [5, 6, 11], [8, 8], [17])


def slice_job(parties: tuple[str, ...] = ("north",), **sections: Mapping[str, Any]) -> Job:
    """Five steps of about two packs over two rounds, LoRA on everything."""
    base: dict[str, dict[str, Any]] = {
        "job": {"name": "tiny", "method": "slice", "seed": 3},
        "model": {"path": "tiny"},
        "data": {"validation": 0.1},
        "adapter": {"rank": 4, "alpha": 8.0},
        "training": {"steps": 5, "batch_tokens": 48, "max_tokens": MAX_TOKENS, "learning_rate": 1e-2, "keep": "last"},
        "federation": {"rounds": 2},
    }
    if "kind" in sections.get("adapter", {}):  # another kind has other keys
        base["adapter"] = {}
    merged = {name: {**values, **sections.get(name, {})} for name, values in base.items()}
    merged |= {name: dict(values) for name, values in sections.items() if name not in merged}
    listed = [{"name": name, "public_key": f"{index:064x}"} for index, name in enumerate(parties, 1)]
    return Job.model_validate(merged | {"party": listed})


def party_data(seed: int = 0) -> PartyData:
    """Five packs to train on, two to validate and to test."""
    packs = [random_pack(lengths, VOCABULARY, seed=10 * seed + i) for i, lengths in enumerate(LENGTHS)]
    scored = [random_pack([9, 8], VOCABULARY, seed=100 + 10 * seed + i, first_example=2 * i) for i in range(2)]
    examples = [
        Example(id=f"{seed}-{i}", task="answer", response_bytes=5, response_role=RESPONSE, choice_bytes=())
        for i in range(4)
    ]
    parts = {"train": (packs, []), "validation": (scored, examples), "test": (scored, examples)}
    return PartyData(
        parts={kind: Part(records=len(p), packs=p, examples=e) for kind, (p, e) in parts.items()},
        truncated=Truncation(),
    )


def train_packs(data: PartyData) -> list[Pack]:
    return data.parts["train"].packs


def first_state(whole: Whole, job: Job) -> GlobalState:
    """Changes `whole`: give it a model of its own."""
    adapted = add_adapter(whole, job.adapter, first_layer=0, seed=job.job.seed)
    return GlobalState(round=0, weights=adapter_state(adapted))


def federate(works: Mapping[str, SiloWork], state: GlobalState, job: Job) -> GlobalState:
    """All rounds, without a protocol."""
    while state.round < job.federation.rounds:
        results = {name: work.train(state.round, state.weights, state.moments) for name, work in works.items()}
        updates = [result.as_update(name, state.round, job.federation) for name, result in results.items()]
        state = aggregate(updates, state, job.federation)
    return state


def differing(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that are not equal bit for bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not bool((a[name] == b[name]).all())]
