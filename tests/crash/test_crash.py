"""A few trials of the crash matrix, as `make crash` runs them by the hundred."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cloister.silo.budget import rows_at_start
from tests.crash.matrix import Matrix
from tests.crash.points import phase_of
from tests.crash.trial import what_differs

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="roles are forked, and watched through inotify")
def test_roles_that_are_killed_go_on(tmp_path: Path) -> None:
    """The server's enclave and parties, among others when results are handed out; and the beginning of a run."""
    call = [sys.executable, "-W", "ignore", "-m", "tests.crash", "--trials", "3", "--seed", "0", "--json"]
    call += ["--only", "split", "run folder", "untold", "--folder", str(tmp_path / "trials")]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(call, cwd=ROOT, env=one_thread, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    summary = json.loads(ended.stdout)
    assert {name: summary[name] for name in ("trials", "identical", "resumed", "lost")} == {
        "trials": 9, "identical": 9, "resumed": 0, "lost": 0,
    }  # fmt: skip
    assert {"enclave receipt", "party receipt", "enclave checkpoint"} <= set(summary["points"])
    assert summary["restarts"] >= 3


@pytest.mark.skipif(sys.platform != "linux", reason="roles are forked, and watched through inotify")
def test_a_party_whose_pads_are_used_up_makes_new_ones(tmp_path: Path) -> None:
    """As after rounds that were interrupted more often than there are pads to spare; the adapter is the same."""
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"from {__name__} import scarce; scarce({str(tmp_path)!r})"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout == "no fault, pads made 4 times\n"  # twice by each of two parties


def scarce(folder: str) -> None:
    """In a process without threads, which can fork: a job of method `slice` where each party begins with few pads."""
    with Matrix(Path(folder)) as matrix:
        ground, calls = matrix.ground("slice"), Path(folder) / "calls"

        def few_at_first(job: Any, budget: Any, made: list[bool] = []) -> Mapping[Any, int]:  # noqa: B006  # of a process
            made.append(True)
            with calls.open("a") as file:
                file.write("x")
            return rows_at_start(job, budget) if made[1:] else {s: n // 2 for s, n in budget.rows.items()}

        job = matrix._job(ground, "scarce", times={"cloister.silo.join.rows_at_start": few_at_first})
        fault = job.run().fault or what_differs(job, ground.adapters)
        sys.stdout.write(f"{fault or 'no fault'}, pads made {len(calls.read_text())} times\n")


@pytest.mark.parametrize(
    ("role", "what", "phase"),
    [
        ("enclave", "grows checkpoints/00000001.sealed.part", "checkpoint"),
        ("enclave", "says training", "mid-step"),
        ("enclave", "grows bundles/north.train.bundle.part", "upload"),
        ("north", "named bundles/counts.json", "handshake"),
        ("north", "grows bundles/train.key", "seal"),
        ("north", "named manifest.memory", "checkpoint"),
        ("north", "made adapter/adapter_model.safetensors.part", "release"),
        ("north", "named receipt.json", "receipt"),
    ],
)
def test_phases(role: str, what: str, phase: str) -> None:
    assert phase_of(role, what) == phase
