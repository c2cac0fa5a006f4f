"""What roles leave behind when they are killed or crash in the middle of their work, and when they then finish."""

from __future__ import annotations

import json
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.integration.search import (
    canary,
    core_dumps,
    files_under,
    holding,
    left_elsewhere,
    left_for_a_while,
    misplaced,
    planted,
    secrets_of,
    text_forms,
    weights_of,
    without,
)
from tests.integration.test_faults import deployment
from tests.integration.tiny_job import PARTIES, Command, records, started, write_job, write_lines, write_model
from tests.unit.test_private import dumps

pytestmark = [pytest.mark.net, pytest.mark.timeout(900)]

FLAGS = ("--insecure-simulated", "--json", "--progress", "json")


@pytest.fixture
def core_dumps_on() -> Iterator[None]:
    """As far as a process does not turn them off itself."""
    before = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_CORE, before)


def start(stack: ExitStack, folder: Path, job: Path, keys: dict[str, Path], attempt: int) -> dict[str, Command]:
    """Enclave and parties."""
    out = folder / "enclave"
    (out / "address").unlink(missing_ok=True)
    call = ("enclave", job, "--listen", "127.0.0.1:0", "--out", out)
    roles = {"enclave": stack.enter_context(started(*call, *FLAGS, folder=folder / f"enclave-{attempt}"))}
    roles["enclave"].wait_for((out / "address").exists, "address", 300)
    address = json.loads((out / "address").read_text())["address"]
    for name in PARTIES:
        call = ("join", job, "--party", name, "--key", keys[name], "--out", folder / name)
        command = started(*call, "--enclave", address, *FLAGS, folder=folder / f"{name}-{attempt}")
        roles[name] = stack.enter_context(command)
    return roles


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGABRT], ids=["killed", "crashed"])
@pytest.mark.usefixtures("core_dumps_on")
def test_nothing_secret_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: signal.Signals) -> None:
    monkeypatch.chdir(tmp_path)  # where roles would leave core dumps
    would_dump, text, since = dumps("", tmp_path), canary("train"), time.time()

    def make(changes: dict[str, dict[str, Any]], **more: Any) -> Path:
        write_lines(tmp_path / "job" / "data" / "north-train.jsonl", planted(records("north", "train", 61), text))
        return write_job(tmp_path / "job", {**changes, "model": {"path": str(write_model(tmp_path / "model"))}}, **more)

    job, keys = deployment(make, tmp_path, {"training": {"steps": 100}, "checkpoint": {"count": 10}})
    with ExitStack() as stack:
        roles = start(stack, tmp_path, job, keys, 1)
        checkpoints = tmp_path / "enclave" / "checkpoints"
        roles["enclave"].wait_for(lambda: checkpoints.is_dir() and any(checkpoints.iterdir()), "checkpoint", 300)
        for role in ("north", "enclave", "south"):
            roles[role].process.send_signal(ending)
            assert roles[role].process.wait(60) == -ending
    _search(tmp_path, keys, text, since)
    with ExitStack() as stack:
        roles = start(stack, tmp_path, job, keys, 2)
        for name in (*PARTIES, "enclave"):
            assert roles[name].end(300) == 0, roles[name].stdout + roles[name].stderr[-2000:]
    found = _search(tmp_path, keys, text, since)
    adapter = tmp_path / "north" / "adapter"
    for stretch in weights_of(adapter):
        assert holding(without(found, adapter), stretch) == []
    if ending == signal.SIGABRT and not would_dump:
        pytest.skip("nothing was left, but this system leaves no core dumps as files, which the test could find")


def _search(folder: Path, keys: dict[str, Path], text: str, since: float) -> list[Path]:
    """Every file but the inputs: no text, no tokens of it, no keys but in their own files, no core dumps; returns them.

    Nothing at all is left in folders for temporary files.
    """
    found = without(files_under(folder), folder / "job", folder / "model") + left_elsewhere(since, besides=folder)
    assert core_dumps(files_under(folder)) == []
    assert left_for_a_while(folder) == []
    assert holding(found, *text_forms(text)) == []
    owned = {p: s for party, key in keys.items() for p, s in secrets_of(folder / party, key).items()}
    assert len(owned) == 4 * len(PARTIES)
    assert misplaced(found, owned) == []
    return found
