"""An enclave of two processes: ends with its own process, and gives the results of one without a key in any file."""

from __future__ import annotations

import base64
import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest

from cloister.report.model import RunReport
from tests.integration.conftest import FinishedRun
from tests.integration.search import files_under, holding, left_in_memory, private_folders
from tests.integration.tiny_job import PARTIES, SECTIONS, alive, finish, started

pytestmark = pytest.mark.integration

STEPS = SECTIONS["training"]["steps"]
TOLERANCE = 1e-4
"""Relative, of losses: sums of the same terms in another order, over eight steps."""


def job_of_two(run: FinishedRun, folder: Path) -> Path:
    """The finished run's job, with its data, for an enclave of two processes."""
    text = run.job.read_text().replace("[enclave]\n", "[enclave]\nprocesses = 2\n")
    text = text.replace('"model"', f'"{run.job.parent}/model"').replace('"data/', f'"{run.job.parent}/data/')
    job = folder / "job.toml"
    job.write_text(text)
    return job


def losses(report: RunReport) -> list[float]:
    return [point.train_loss for point in report.curves["cloister"] if point.train_loss is not None]


def started_by(pid: int) -> dict[str, set[int]]:
    """Processes of an enclave that descend from `pid`, by module."""
    found: dict[str, set[int]] = {"torchrun": set(), "worker": set(), "enclave": set()}
    for process in psutil.Process(pid).children(recursive=True):
        try:
            command = process.cmdline()
        except psutil.Error:  # it has just ended
            continue
        if "enclave" in command:
            found["enclave"].add(process.pid)
        for name in ("torchrun", "worker"):
            if f"cloister.enclave.{name}" in command:
                found[name].add(process.pid)
    return found


@pytest.mark.timeout(900)  # three runs, one of them with torchrun
def test_two_processes_end_with_the_enclave_and_give_the_results_of_one(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    job, out, before = job_of_two(finished_run, tmp_path), tmp_path / "out", private_folders()
    with started("run", job, "--out", out, "--json", folder=tmp_path / "first") as command:
        while not (found := started_by(command.process.pid))["worker"]:
            assert command.process.poll() is None, command.process.returncode
            time.sleep(0.1)
        [enclave] = found["enclave"]
        os.kill(enclave, signal.SIGKILL)
        command.end(240)
    others = found["torchrun"] | found["worker"]
    assert len(others) == 2
    while alive(others):
        time.sleep(0.1)  # the test's own time limit ends this
    assert left_in_memory(before) == set()

    again = finish("run", job, "--out", out, "--json", folder=tmp_path / "second")
    assert again.process.returncode == 0, again.stdout + again.stderr
    report = RunReport.model_validate_json(again.stdout)
    one = finished_run.report
    assert losses(report) == pytest.approx(losses(one), rel=TOLERANCE)
    assert len(losses(one)) == STEPS
    assert [row.bits_per_byte for row in report.results] == pytest.approx(
        [row.bits_per_byte for row in one.results], rel=TOLERANCE
    )
    assert left_in_memory(before) == set()
    assert not list((tmp_path / "second" / "tmp").iterdir())
    for party in PARTIES:
        keys = [path.read_bytes() for path in (out / "parties" / party / "bundles").glob("*.key")]
        assert len(keys) == 3
        foreign = [p for p in files_under(tmp_path) if p.suffix != ".key"]
        for key in keys:
            for form in (key, key.hex().encode(), base64.b64encode(key)[:40]):
                assert holding(foreign, form) == []
    # What torchrun and the processes print goes to the enclave's log; of the run that succeeded there is nothing.
    assert not re.search(r"Traceback", (out / "logs" / "enclave.log").read_text())
