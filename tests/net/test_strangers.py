"""A flood of strangers beside a running job: it ends with the adapter of the undisturbed run, its memory stays flat."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from cloister.channel.limits import SPARE_FILES
from cloister.report.outputs import JoinReport
from tests.integration.test_faults import deployment
from tests.integration.tiny_job import PARTIES, Command, started, write_job, write_model

pytestmark = [pytest.mark.net, pytest.mark.timeout(900)]

MAX_CONNECTIONS, SILENT = 100, 1500
CHANGES: dict[str, dict[str, Any]] = {
    "training": {"steps": 400},
    "enclave": {"max_connections": MAX_CONNECTIONS},
    "checkpoint": {"count": 3},
}
FLAGS = ("--insecure-simulated", "--json", "--progress", "json")
MIB = 1 << 20


@dataclass
class Watched:
    """Resident memory and open files of a process, sampled while it runs."""

    rss: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)


@contextmanager
def watching(pid: int) -> Iterator[Watched]:
    process, watched, stop = psutil.Process(pid), Watched(), threading.Event()

    def sample() -> None:
        while not stop.wait(0.2):
            try:
                rss, files = process.memory_info().rss, process.num_fds()
            except psutil.Error:
                return
            if rss:  # else it has ended, and nobody has asked for its exit code yet
                watched.rss.append(rss)
                watched.files.append(files)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield watched
    finally:
        stop.set()
        thread.join()


def strangers(stack: ExitStack, address: str, connections: int) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.net.strangers", address, str(connections)], stdout=subprocess.PIPE, text=True
    )
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process


def what_they_did(process: subprocess.Popen[str]) -> dict[str, float]:
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    done: dict[str, float] = json.loads(out)
    return done


@dataclass
class Job:
    enclave: Command
    parties: dict[str, Command]
    address: str

    def end(self) -> str:
        """The adapter's hash, which both parties have."""
        for command in (*self.parties.values(), self.enclave):
            assert command.end(400) == 0, command.stdout + command.stderr[-2000:]
        reports = [JoinReport.model_validate_json(command.stdout) for command in self.parties.values()]
        (adapter,) = {report.adapter_sha256 for report in reports}
        return adapter


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def start(stack: ExitStack, folder: Path, model: Path, bother: int = 0) -> tuple[Job, list[subprocess.Popen[str]]]:
    """The job; with `bother`, so many silent connections and all other kinds are there before the parties come."""

    def make(changes: dict[str, dict[str, Any]], **more: Any) -> Path:
        (folder / "job").mkdir(parents=True)
        return write_job(folder / "job", {**changes, "model": {"path": str(model)}}, **more)

    folder.mkdir(exist_ok=True)
    job, keys = deployment(make, folder, CHANGES)
    out = folder / "enclave"
    call = ("enclave", job, "--listen", "127.0.0.1:0", "--out", out)
    enclave = stack.enter_context(started(*call, *FLAGS, folder=folder / "e"))
    enclave.wait_for((out / "address").exists, "address", 400)
    address = json.loads((out / "address").read_text())["address"]
    crowd = [strangers(stack, address, bother)] if bother else []
    parties = {}
    for name in PARTIES:
        call = ("join", job, "--party", name, "--key", keys[name], "--out", folder / name, "--enclave", address)
        parties[name] = stack.enter_context(started(*call, *FLAGS, folder=folder / f"of-{name}"))
    return Job(enclave, parties, address), crowd


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    with ExitStack() as stack:
        job, _ = start(stack, tmp_path_factory.mktemp("quiet"), model)
        return job.end()


def test_strangers_of_every_kind_do_not_stop_a_job(
    tmp_path: Path, model: Path, undisturbed: str, measured: Callable[[str], None]
) -> None:
    """Some from the first moment, among whom parties must find a place; more than there is room for, once it trains."""
    with ExitStack() as stack:
        job, crowd = start(stack, tmp_path / "job", model, bother=MAX_CONNECTIONS // 4)
        watched = stack.enter_context(watching(job.enclave.process.pid))
        job.enclave.wait_for(lambda: any(e["task"] == "training" for e in job.enclave.events()), "training", 400)
        begins, began = len(watched.rss), time.monotonic()
        crowd.append(strangers(stack, job.address, SILENT))
        while job.enclave.process.poll() is None and not any(
            e["task"] == "training" and e["ended"] for e in job.enclave.events()
        ):
            time.sleep(0.5)
        ends, seconds = len(watched.rss), time.monotonic() - began
        done = [what_they_did(each) for each in crowd]
        assert job.end() == undisturbed
    before, flood = watched.rss[:begins], watched.rss[begins:ends]
    halves = flood[: len(flood) // 2], flood[len(flood) // 2 :]
    first, second = (max(half) / MIB for half in halves)
    measured(
        f"{done[1]['silent at once']} silent connections at once to a server that takes {MAX_CONNECTIONS}, "
        f"{seconds:.0f} s: {max(watched.files)} open files; RSS {max(before) / MIB:.0f} MiB before, at most "
        f"{first:.0f} MiB in its first half, {second:.0f} MiB in the second; strangers did {done[1]}"
    )
    assert done[1]["silent at once"] == SILENT
    assert all(one[kind] > 0 for one in done for kind in ("slow", "long frames", "garbage", "silent calls"))
    assert done[0]["long messages"] > 0
    assert max(watched.files) <= MAX_CONNECTIONS + SPARE_FILES
    assert max(watched.rss) - watched.rss[0] < 192 * MIB
    assert second - first < 32  # it does not grow with the time that it lasts
