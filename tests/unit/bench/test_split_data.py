"""The work that all systems share: its size, its texts, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cloister.bench.split_data import Budget, job_workload, party_data, train_packs
from cloister.errors import UsageError
from cloister.jobfile import load_job
from cloister.model.anatomy import load_tokenizer
from tests.integration.tiny_job import SLICE, write_job, write_model
from tests.unit.bench.small import BUDGET, SHAPE, small_workload


def test_random_silos_hold_about_what_was_asked_for(tmp_path: Path) -> None:
    workload = small_workload(tmp_path)
    packs = train_packs(party_data(workload.loaded))
    assert workload.epoch_tokens == sum(map(len, packs))
    assert BUDGET.tokens <= workload.epoch_tokens < BUDGET.tokens + 5 * BUDGET.max_tokens
    assert workload.target_share == sum(len(p.target_pos_N) for p in packs) / workload.epoch_tokens
    assert 0.1 < workload.target_share < 0.4
    assert (workload.layers, workload.parameters) == (SHAPE.layers, SHAPE.weights)
    assert len(workload.loaded.job.party) == 5
    rows = [json.loads(line) for line in Path(workload.loaded.job.party[0].train or "").read_text().splitlines()]
    ids = load_tokenizer(tmp_path / "model")(rows[0]["prompt"])["input_ids"]
    assert ids == [int(word[1:]) for word in rows[0]["prompt"].split()]  # a word is a token, its number the token's


def test_the_same_command_makes_the_same_work(tmp_path: Path) -> None:
    texts = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        small_workload(folder)
        texts.append([p.read_bytes() for p in sorted((folder / "data").iterdir())])
    assert texts[0] == texts[1]


def test_a_jobs_records_settings_and_adapter_are_kept(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    loaded = load_job(write_job(tmp_path))
    budget = Budget(tokens=500, epochs=1.5, batch_tokens=100, max_tokens=64)
    (tmp_path / "out").mkdir()
    workload = job_workload(loaded, None, budget, dtype=None, folder=tmp_path / "out")
    job = workload.loaded.job
    assert (job.adapter, job.data.validation, job.training.learning_rate) == (loaded.job.adapter, 0.1, 0.05)
    assert (job.training.epochs, job.training.steps, job.training.batch_tokens) == (1.5, None, 100)
    assert 500 <= workload.epoch_tokens < 700
    for party in loaded.job.party:
        known = {json.loads(line)["id"] for line in loaded.data_file(party.name, "train").read_text().splitlines()}
        taken = [json.loads(r)["id"] for r in workload.loaded.data_file(party.name, "train").read_text().splitlines()]
        assert set(taken) < known


def test_a_job_of_another_method_or_adapter_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    for changes in (SLICE, {"adapter": {"kind": "ptuning", "rank": None, "alpha": None}}):
        loaded = load_job(write_job(tmp_path, changes))
        with pytest.raises(UsageError, match="LoRA") as refused:
            job_workload(loaded, None, Budget(), dtype=None, folder=tmp_path)
        assert "job.toml:" in refused.value.where


def test_a_cut_leaves_layers_on_both_sides(tmp_path: Path) -> None:
    workload = small_workload(tmp_path)
    assert workload.with_cut(2).job.model.cut == 2
    for cut in (0, 3):
        with pytest.raises(UsageError, match="no layer on one side of 3"):
            workload.with_cut(cut)
