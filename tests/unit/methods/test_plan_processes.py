"""What `cloister plan` says of several processes in the enclave."""

from __future__ import annotations

from typing import Any

import pytest

from cloister.job import Job
from cloister.methods import plan_processes
from cloister.methods.estimate import ENCLAVE_BYTES, ModelSize, PartCount, enclave_memory
from cloister.methods.plan_processes import TORCHRUN_BYTES, busy_threads, crowding, idleness, team_memory

MODEL = ModelSize(
    layers=4, cut=1, hidden=64, vocabulary=512, former=10**6, latter=3 * 10**6, total=5 * 10**6,
    adapter=1000, whole_adapter=1300, widest=256,
)  # fmt: skip


def job(**enclave: Any) -> Job:
    return Job.model_validate(
        {
            "job": {"name": "trial"},
            "model": {"path": "model"},
            "training": {"steps": 2, "batch_tokens": 512, "max_tokens": 128},
            "party": [{"name": "a"}],
            "enclave": enclave,
        }
    )


@pytest.fixture(autouse=True)
def two_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_processes, "usable_cpus", lambda: 2)


def test_each_process_holds_the_model_and_a_share_of_the_cache() -> None:
    one = team_memory(job(), MODEL, 4.0, 1e6, 3e6, 8 << 20)
    three = team_memory(job(processes=3), MODEL, 4.0, 1e6, 3e6, 9 << 20)
    assert one == enclave_memory(MODEL, 4.0, 1e6, 3e6, 8 << 20)
    assert three == 3 * enclave_memory(MODEL, 4.0, 1e6, 3e6, 3 << 20) + TORCHRUN_BYTES
    assert three > 3 * ENCLAVE_BYTES


def test_parted_layers_are_held_once_by_all_together() -> None:
    whole = team_memory(job(processes=3), MODEL, 4.0, 0.0, 0.0, 0)
    assert whole - team_memory(job(processes=3, sharding="full"), MODEL, 4.0, 0.0, 0.0, 0) == 2 * 4 * MODEL.latter


@pytest.mark.parametrize(
    ("enclave", "threads"), [({}, 2), ({"threads": 5}, 5), ({"processes": 2}, 2), ({"processes": 3, "threads": 2}, 2)]
)
def test_threads_that_count_towards_the_time(enclave: dict[str, int], threads: int) -> None:
    assert busy_threads(job(**enclave).enclave) == threads


def test_more_threads_than_processors_are_warned_of() -> None:
    assert crowding(job(threads=9).enclave) == crowding(job(processes=2).enclave) == []
    [one], [two] = crowding(job(processes=3).enclave), crowding(job(processes=2, threads=2).enclave)
    assert one == "[enclave] 3 processes with 3 threads on 2 processors: slower than fewer"
    assert "2 processes with 4 threads on 2 processors" in two


def test_processes_without_packs_are_warned_of() -> None:
    train = PartCount(records=10, tokens=1000, targets=500, packs=10, groups=10)
    assert idleness(job(processes=5), train) == []
    [warning] = idleness(job(processes=6), train)
    assert warning == "[enclave] 6 processes share about 5 packs in a step; a run will refuse that"
