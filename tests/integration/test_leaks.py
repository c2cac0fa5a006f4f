"""What a finished run's files tell: nothing to other users, and no tuned parameter to anybody but its recipients."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from tests.integration.conftest import FinishedRun
from tests.integration.search import files_under, holding, weights_of

pytestmark = pytest.mark.integration


def test_other_users_read_nothing(finished_run: FinishedRun) -> None:
    modes = {path: stat.S_IMODE(path.lstat().st_mode) for path in finished_run.out.rglob("*")}
    modes[finished_run.out] = stat.S_IMODE(finished_run.out.stat().st_mode)
    assert len(modes) > 30
    assert {path: oct(mode) for path, mode in modes.items() if mode & 0o077} == {}


def test_the_adapter_is_with_its_recipients_alone(finished_run: FinishedRun) -> None:
    """Released to "north"; the run's owner has north's folder, and what `run` copies from it."""
    out = finished_run.out
    released = [out / "adapter" / "adapter_model.safetensors", out / "parties" / "north" / "adapter"]
    shared = [p for p in Path("/dev/shm").rglob("*") if p.is_file()]  # noqa: S108
    everything = [*files_under(out), *files_under(finished_run.command), *shared]
    others = [p for p in everything if not any(p == r or r in p.parents for r in released)]
    assert any("checkpoint" in str(path) for path in others)  # which hold the same numbers, sealed
    for stretch in weights_of(out / "parties" / "north" / "adapter"):
        assert holding([released[0]], stretch) != []
        assert holding(others, stretch) == []
