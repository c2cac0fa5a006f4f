"""The pads that are planned for a party are those that its work draws, row by row."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cloister.adapters.state import adapter_state
from cloister.data.prepare import PartyData, prepare
from cloister.errors import CapacityError
from cloister.job import Job
from cloister.masking.linear import PadSource, Reply
from cloister.masking.model import MaskedModel, build_masked_model
from cloister.masking.pads import InsecureNoPads, PadKey, StreamId
from cloister.masking.precompute import Precomputation
from cloister.masking.precomputed import ephemeral_pads
from cloister.masking.product import modular_product
from cloister.masking.products import SealedProducts
from cloister.masking.quantise import Direction
from cloister.masking.skeleton import plan_groups
from cloister.masking.weights import GroupPlan, WeightSink
from cloister.model.anatomy import load_tokenizer
from cloister.model.cut import Whole
from cloister.silo import budget
from cloister.silo.budget import party_budget
from cloister.silo.work import SiloWork
from cloister.training.loop import evaluation_steps
from cloister.training.loss import target_nll
from tests.integration.tiny_job import records, write_lines, write_model


class CountingPads(InsecureNoPads):
    """Counts the rows of each stream."""

    def __init__(self, groups: list[GroupPlan]) -> None:
        super().__init__(groups, parts=1)
        self.drawn: Counter[StreamId] = Counter()

    def draw(self, group: str, direction: Direction, rows: int) -> tuple[Tensor, Reply]:
        self.drawn[group, direction] += rows
        return super().draw(group, direction, rows)


class Integers:
    """An accelerator in this process."""

    name = "here"

    def __init__(self) -> None:
        self.held: dict[str, list[Tensor]] = {}

    def begin(self, weights_id: bytes, plans: Sequence[GroupPlan], parts: int) -> bool:
        for plan in plans:
            self.held[plan.name] = [torch.zeros(plan.outputs, plan.inputs, dtype=torch.int8) for _ in range(parts)]
        return False

    def load(self, group: str, part: int, first_row: int, block_MK: Tensor) -> None:
        self.held[group][part][first_row : first_row + len(block_MK)] = block_MK

    def complete(self) -> None:
        pass

    def submit(self, group: str, direction: Direction, z_TK: Tensor) -> Reply:
        turned = [weight.T if direction == "forward" else weight for weight in self.held[group]]
        return lambda: [modular_product(z_TK, weight_KM) for weight_KM in turned]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    write_model(folder / "model")
    return folder


def settings(folder: Path, **changes: dict[str, Any]) -> tuple[Job, PartyData, list[GroupPlan]]:
    """A job of 1.5 epochs in four rounds, three of them validated; `changes` replace keys by section."""
    sections: dict[str, dict[str, Any]] = {
        "job": {"name": "tiny", "method": "slice", "seed": 3},
        "model": {"path": str(folder / "model")},
        "data": {"validation": 0.1},
        "training": {"epochs": 1.5, "batch_tokens": 100, "max_tokens": 48, "evaluations": 3},
        "federation": {"rounds": 4},
        "evaluation": {"baselines": ["base"]},
        "party": [{"name": "north"}],
    }
    content = {**sections, **{name: {**sections.get(name, {}), **values} for name, values in changes.items()}}
    job = Job.model_validate(content)
    files = [
        write_lines(folder / f"{part}.jsonl", records("north", part, n)) for part, n in (("train", 40), ("test", 6))
    ]
    return job, prepare(job, load_tokenizer(folder / "model"), *files), plan_groups(folder / "model")


def masked(
    folder: Path, job: Job, accelerator: Integers, pads: PadSource, sinks: Sequence[WeightSink] = ()
) -> MaskedModel:
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (folder / "model").iterdir()}
    return build_masked_model(
        folder / "model",
        files,
        dtype="float32",
        bits=job.masking.bits,
        rows=job.training.max_tokens,
        sinks=[accelerator, *sinks],
        accelerator=accelerator,
        pads=pads,
    )


def whole_part(model: MaskedModel, job: Job, data: PartyData) -> Mapping[str, Tensor]:
    """All that a party does in a job. Returns: the trained adapter."""
    work = SiloWork(Whole(model.model, all_tokens=True), data, job, "north")
    weights: Mapping[str, Tensor] = adapter_state(work.adapted)
    for number in range(job.federation.rounds):
        weights = work.train(number, dict(weights), {}).weights
    for _ in evaluation_steps(job.federation.rounds, job.training.evaluations if job.data.validation else 0):
        work.validate(weights)
    work.score(weights, lambda tokens: None)
    return weights


def drawn(folder: Path, job: Job, data: PartyData, groups: list[GroupPlan]) -> Counter[StreamId]:
    """What a party's whole part of the job draws."""
    pads = CountingPads(groups)
    whole_part(masked(folder, job, Integers(), pads), job, data)
    return pads.drawn


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"evaluation": {"baselines": []}, "data": {"validation": 0.0}},
        {"adapter": {"target_modules": ["o_proj", "down_proj"], "rank": 2}},
        {"adapter": {"target_modules": ["down_proj"], "rank": 2}},
        {"adapter": {"kind": "ptuning"}},
        {"federation": {"rounds": 2, "aggregation": "ffa"}},
    ],
    ids=["all-linear", "no evaluation", "o and down", "down", "ptuning", "ffa"],
)
def test_exactly_what_is_drawn(folder: Path, changes: dict[str, dict[str, Any]]) -> None:
    job, data, groups = settings(folder, **changes)
    planned = party_budget(job, data, groups, vocabulary=97).rows
    assert {key: rows for key, rows in planned.items() if rows} == dict(drawn(folder, job, data, groups))
    assert planned[groups[0].name, "backward"] == 0


@pytest.mark.parametrize("bits", [8, 16])
def test_precomputed_pads_last_for_the_job_and_change_no_bit(folder: Path, tmp_path: Path, bits: int) -> None:
    job, data, groups = settings(folder, masking={"bits": bits})
    planned = party_budget(job, data, groups, vocabulary=groups[-1].outputs)
    accelerator = Integers()
    with ephemeral_pads(groups, planned.rows, parts=bits // 8, folder=tmp_path) as (computing, pads):
        behind = whole_part(masked(folder, job, accelerator, pads, [computing]), job, data)
        assert set(pads.left().values()) == {0}
        with pytest.raises(CapacityError, match="used up"):
            pads.draw(groups[0].name, "forward", 1)
    without = whole_part(masked(folder, job, Integers(), InsecureNoPads(groups, parts=bits // 8)), job, data)
    assert behind.keys() == without.keys()
    assert all(torch.equal(behind[name], without[name]) for name in without)


def test_exactly_what_is_drawn_where_logits_come_in_chunks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks are computed once more in the backward pass, and each is filled up."""
    job, data, groups = settings(folder)
    vocabulary = groups[-1].outputs
    monkeypatch.setattr(target_nll, "__defaults__", (vocabulary * 10,))
    monkeypatch.setattr(budget, "MAX_LOGITS", vocabulary * 10)
    planned = party_budget(job, data, groups, vocabulary=vocabulary)
    found = drawn(folder, job, data, groups)
    assert found == {key: rows for key, rows in planned.rows.items() if rows}
    head = groups[-1].name
    assert found[head, "forward"] > found[groups[0].name, "forward"]


def test_bytes_and_work_are_those_of_the_streams(folder: Path) -> None:
    job, data, groups = settings(folder)
    planned = party_budget(job, data, groups, vocabulary=groups[-1].outputs)
    by_name = {g.name: g for g in groups}
    products = up = down = 0
    for (name, direction), rows in planned.rows.items():
        group = by_name[name]
        wide, narrow = group.outputs, group.inputs
        products += rows * wide * narrow
        up += 4 * rows * (narrow if direction == "forward" else wide)
        down += 4 * rows * (wide if direction == "forward" else narrow)
    assert (planned.multiply_adds, planned.bytes_up, planned.bytes_down) == (products, up, down)
    assert down < planned.disk_bytes < down * 1.1
    counted: list[int] = []
    products_file = SealedProducts(io.BytesIO(), Path("memory"), key=b"k" * 32, purpose=b"")
    computing = Precomputation(planned.layout, PadKey(), products_file, count=counted.append)
    computing.begin(b"", groups, 1)
    for group in groups:
        computing.load(group.name, 0, 0, torch.zeros(group.outputs, group.inputs, dtype=torch.int8))
    assert sum(counted) == products
