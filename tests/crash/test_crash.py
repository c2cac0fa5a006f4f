"""A few trials of the crash matrix, as `make crash` runs them by the hundred."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.crash.points import phase_of

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
