"""One tiny model for the whole session, one complete run of the tiny job, and folders with fresh jobs."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cloister.report.model import RunReport
from tests.integration.search import canary, planted, secrets_of
from tests.integration.tiny_job import PARTIES, finish, records, write_job, write_lines, write_model

MakeJob = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def make_job(tmp_path: Path, tiny_model_folder: Path) -> MakeJob:
    """`make_job(changes, parties=..., keys=...)` writes a job into the test's own folder; returns the job file."""

    def make(changes: dict[str, dict[str, Any]] | None = None, **more: Any) -> Path:
        changes = dict(changes or {})
        changes["model"] = {"path": str(tiny_model_folder), **changes.get("model", {})}
        folder = tmp_path / "job"
        folder.mkdir(exist_ok=True)
        return write_job(folder, changes, **more)

    return make


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A complete `cloister run` of the tiny job: float32 activations, the adapter released to "north"."""

    job: Path
    out: Path
    command: Path
    """Folder with the command's stdout and stderr, and its temporary folder `tmp`."""
    report: RunReport

    @property
    def canaries(self) -> dict[str, str]:
        """What was planted in data of the party "north"."""
        found: dict[str, str] = json.loads((self.job.parent / "canaries.json").read_text())
        return found

    def secrets(self) -> dict[Path, bytes]:
        """Of all parties, by the file that each belongs in."""
        folders = [self.out / "parties" / party for party in PARTIES]
        return {path: secret for f in folders for path, secret in secrets_of(f, f / "party.key").items()}


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """Made by the first worker of a parallel session that asks for it."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder = root / "finished"
    with (root / "finished.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            _run(folder)
    report = RunReport.model_validate_json((folder / "command" / "stdout").read_text())
    return FinishedRun(job=folder / "job.toml", out=folder / "out", command=folder / "command", report=report)


def _run(folder: Path) -> None:
    folder.mkdir()
    canaries = {"train": canary("train"), "test": canary("test")}
    (folder / "canaries.json").write_text(json.dumps(canaries))
    for part, count in (("train", 40), ("test", 6)):
        rows = planted(records("north", part, count), canaries[part])
        write_lines(folder / "data" / f"north-{part}.jsonl", rows)
    write_model(folder / "model")
    job = write_job(folder)
    command = finish("run", job, "--out", folder / "out", "--json", "--progress", "json", folder=folder / "command")
    assert command.process.returncode == 0, command.stdout + command.stderr
