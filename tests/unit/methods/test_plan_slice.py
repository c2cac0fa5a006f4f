"""The plan of method `slice`: its pads are those that a party computes, its parameters PEFT's, its labels the run's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cloister.adapters.add import add_adapter
from cloister.cli.tables import render
from cloister.data.prepare import prepare
from cloister.errors import DataError, JobError
from cloister.jobfile import LoadedJob, load_job
from cloister.masking.skeleton import plan_groups
from cloister.methods import estimate, plan
from cloister.model.anatomy import load_model, load_tokenizer
from cloister.model.cut import Whole
from cloister.progress import Silent
from cloister.report.plan import PlanReport
from cloister.silo.budget import party_budget
from tests.integration.tiny_job import SECTIONS, records, write_lines, write_model

LOOPBACK = ["127.0.0.1:7001#" + "ab" * 32, "localhost:7002#" + "cd" * 32]
APART = ["10.0.0.1:7001#" + "ab" * 32, "10.0.0.2:7002#" + "cd" * 32]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    write_model(folder / "model")
    for party in ("north", "south"):
        for part, count in (("train", 40), ("test", 6)):
            write_lines(folder / f"data/{party}-{part}.jsonl", records(party, part, count))
    return folder


def planned(folder: Path, **changes: dict[str, Any]) -> tuple[LoadedJob, PlanReport]:
    loaded = job_of(folder, **changes)
    return loaded, plan.plan_job(loaded, progress=Silent())


def job_of(folder: Path, **changes: dict[str, Any]) -> LoadedJob:
    sections = {
        "job": {"name": "tiny", "seed": 1, "method": "slice"},
        "model": {"path": "model", "dtype": "float32"},
        **{name: SECTIONS[name] for name in ("data", "adapter", "training", "evaluation", "release")},
        "federation": {"rounds": 2},
    }
    sections = {name: {**sections.get(name, {}), **changes.get(name, {})} for name in {**sections, **changes}}
    if changes.get("adapter"):
        sections["adapter"] = changes["adapter"]
    lines = []
    for name, values in sections.items():
        lines += [f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in values.items())]
    for party in ("north", "south"):
        lines += ["[[party]]", f'name = "{party}"']
        lines += [f'{part} = "data/{party}-{part}.jsonl"' for part in ("train", "test")]
    (folder / "job.toml").write_text("\n".join(lines))
    return load_job(folder / "job.toml")


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')


def test_pads_are_those_that_each_party_computes(folder: Path) -> None:
    loaded, report = planned(folder)
    groups = plan_groups(folder / "model")
    assert report.masking is not None
    assert [p.party for p in report.masking.parties] == ["north", "south"]
    for own in report.masking.parties:
        files = (loaded.data_file(own.party, part) for part in ("train", "test"))
        data = prepare(loaded.job, load_tokenizer(folder / "model"), *files)
        budget = party_budget(loaded.job, data, groups, vocabulary=groups[-1].outputs)
        assert own.rows == sum(budget.rows.values())
        assert (own.bytes_up, own.bytes_down) == (budget.bytes_up, budget.bytes_down)
        # One round of two more than the job takes.
        assert own.disk_bytes == pytest.approx(1.5 * budget.disk_bytes, rel=0.05)
        assert own.pad_seconds > 0
    assert (report.former_layers, report.steps, report.masking.rounds) == (0, 8, 2)


@pytest.mark.parametrize("adapter", [{"rank": 2}, {"kind": "ptuning"}], ids=["lora", "ptuning"])
def test_trained_parameters_are_those_of_peft(folder: Path, adapter: dict[str, Any]) -> None:
    loaded, report = planned(folder, adapter=adapter)
    whole = Whole(load_model(folder / "model", "float32", "cpu"))
    adapted = add_adapter(whole, loaded.job.adapter, first_layer=0, seed=0)
    assert report.trainable_parameters == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_an_accelerator_holds_one_byte_for_each_frozen_weight_and_part(folder: Path) -> None:
    groups = [(g.inputs, g.outputs) for g in plan_groups(folder / "model")]
    weights = sum(inputs * outputs for inputs, outputs in groups)
    eight, sixteen = (estimate.accelerator_memory(groups, parts, 0, silos=1) for parts in (1, 2))
    assert (eight - estimate.PROCESS_BYTES, sixteen - eight) == (weights, weights)


def test_an_enclave_s_memory_does_not_grow_with_its_layers_frozen_weights() -> None:
    sizes = [
        estimate.ModelSize(
            layers=4,
            cut=0,
            hidden=64,
            vocabulary=1000,
            former=0,
            latter=n,
            total=n,
            adapter=10,
            whole_adapter=10,
            widest=256,
        )
        for n in (10**6, 10**9)
    ]
    small, large = (estimate.silo_memory(size, 10, 128, packs=2) for size in sizes)
    assert small == large
    assert small - estimate.PROCESS_BYTES > 2 * 64 * 1000


@pytest.mark.parametrize(
    ("masking", "labels"),
    [
        ({}, []),
        ({"pads": "dual"}, ["both accelerators"]),
        ({"pads": "dual", "accelerators": LOOPBACK}, ["both accelerators"]),
        ({"pads": "dual", "accelerators": APART}, []),
        ({"pads": "none", "check": False}, ['pads = "none"', "check = false"]),
    ],
    ids=["precomputed", "dual here", "dual on loopback", "dual apart", "none"],
)
def test_what_is_insecure_is_labelled(folder: Path, masking: dict[str, Any], labels: list[str]) -> None:
    _, report = planned(folder, masking=masking)
    assert report.masking is not None
    found = report.masking.insecure
    assert len(found) == len(labels)
    assert all(text.startswith("INSECURE") and label in text for text, label in zip(found, labels, strict=True))
    text = _printed(report)
    assert all(label in text for label in labels)
    assert ("INSECURE" in text) == bool(labels)
    accelerators = [role for role in report.roles if role.role == "accelerator"]
    assert len(accelerators) == (2 if masking.get("pads") == "dual" else 1)
    replies = len(accelerators)
    tokens = sum(p.tokens for p in report.masking.parties)
    down = sum(p.bytes_down for p in report.masking.parties)
    assert report.masking.bytes_per_token["down"] == round(replies * down / tokens)
    stored = [p.disk_bytes for p in report.masking.parties]
    assert all(stored) if masking.get("pads") is None else not any(stored)


def _printed(report: PlanReport) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(render(report, 160))
    return capture.get()


def test_one_accelerator_twice_is_found_before_anything_starts(folder: Path) -> None:
    with pytest.raises(JobError, match="both accelerators are at"):
        planned(folder, masking={"pads": "dual", "accelerators": [LOOPBACK[0], LOOPBACK[0]]})


def test_more_rounds_than_steps_is_found_before_anything_starts(folder: Path) -> None:
    with pytest.raises(DataError, match="cannot be spread over 5 rounds") as error:
        plan.plan_job(_in_epochs(folder), progress=Silent())
    assert error.value.where == "north"


def _in_epochs(folder: Path) -> LoadedJob:
    job_of(folder, federation={"rounds": 5})
    text = (folder / "job.toml").read_text().replace("steps = 8", "epochs = 1").replace("= 128", "= 100000")
    (folder / "job.toml").write_text(text)
    return load_job(folder / "job.toml")
