"""Two jobs at once on one machine, and another user of it: nobody sees the other's files, keys, ports or memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration.search import files_under, holding
from tests.integration.tiny_job import SLICE, Command, records, started, write_job, write_lines, write_model

pytestmark = [pytest.mark.net, pytest.mark.timeout(900)]

JOBS: dict[str, dict[str, dict[str, Any]]] = {
    "first": {"training": {"steps": 1000}, "checkpoint": {"count": 2}},
    "second": {**SLICE, "masking": {"pads": "dual"}, "training": {"steps": 12}, "federation": {"rounds": 3}},
}
"""The first still trains when the second's rounds begin."""
SPY = """
import json, os, socket, stat, sys
seen = []
def attempt(what, act):
    try:
        act()
        seen.append(what)
    except OSError:
        pass
for folder in json.loads(sys.argv[1]):
    attempt(f"list {folder}", lambda: os.listdir(folder))
    for place, folders, files in os.walk(folder):
        for name in files:
            attempt(f"read {place}/{name}", lambda: open(f"{place}/{name}", "rb").read(1))
for path in json.loads(sys.argv[2]):
    attempt(f"connect {path}", lambda: socket.socket(socket.AF_UNIX).connect(path))
for pid in json.loads(sys.argv[3]):
    for name in ("mem", "environ", "maps", "fd", "cwd"):
        path = f"/proc/{pid}/{name}"
        attempt(path, lambda: os.listdir(path) if name == "fd" else open(path, "rb").read(1))
print(json.dumps(seen))
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may enter, as no temporary folder of pytest is."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def spy(folders: list[Path], sockets: list[str], pids: list[int]) -> list[str]:
    """What a user without rights can list, read and connect to."""
    python = shutil.which("python3", path="/usr/bin:/bin")
    if os.geteuid() != 0 or shutil.which("setpriv") is None or python is None:
        pytest.skip("acting as another user needs root, setpriv (util-linux) and /usr/bin/python3")
    become = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs"]
    told = [json.dumps(each) for each in ([str(f) for f in folders], sockets, pids)]
    run = subprocess.run([*become, python, "-c", SPY, *told], capture_output=True, text=True, check=True, cwd="/")
    seen: list[str] = json.loads(run.stdout)
    return seen


def family(command: Command) -> list[psutil.Process]:
    process = psutil.Process(command.process.pid)
    return [process, *process.children(recursive=True)]


def listening(command: Command) -> set[tuple[str, int]]:
    found = set()
    for process in family(command):
        listeners = [c.laddr for c in process.net_connections("tcp") if c.status == "LISTEN"]
        found |= {(at.ip.removeprefix("::ffff:"), at.port) for at in listeners}  # gRPC writes IPv4 as IPv6
    return found


def sockets_of(command: Command) -> list[str]:
    return [c.laddr for p in family(command) for c in p.net_connections("unix") if str(c.laddr).startswith("/")]


def open_under(command: Command, folder: Path) -> list[str]:
    return [f.path for p in family(command) for f in p.open_files() if Path(f.path).is_relative_to(folder)]


def test_two_jobs_and_a_stranger(open_folder: Path) -> None:
    model, previous = write_model(open_folder / "model"), os.umask(0o022)
    commands: dict[str, Command] = {}
    try:
        for name, changes in JOBS.items():
            folder = open_folder / name
            row = {"id": "secret", "prompt": f"canary-{name}-prompt", "response": f"canary-{name}-response"}
            write_lines(folder / "data" / "north-train.jsonl", [*records("north", "train", 40), row])
            job = write_job(folder, {**changes, "model": {"path": str(model), **changes.get("model", {})}})
            call = ("run", job, "--out", folder / "out", "--json", "--progress", "json")
            commands[name] = Command(*call, folder=folder / "command")
        for name, command in commands.items():
            out = open_folder / name / "out"
            begun = {"enclave: training", "enclave: rounds"}
            command.wait_for(lambda: any(e["task"] in begun for e in command.events()), "training", 600)  # noqa: B023
            assert (out / "enclave" / "address").exists()
        assert all(command.process.poll() is None for command in commands.values())
        first, second = commands.values()
        ports = listening(first), listening(second)
        assert all(ports)
        assert not ports[0] & ports[1]
        assert {host for host, _ in ports[0] | ports[1]} == {"127.0.0.1"}
        assert open_under(first, open_folder / "second") == []
        assert open_under(second, open_folder / "first") == []
        sockets = sockets_of(second)
        assert sockets  # of the accelerators
        pids = [p.pid for command in commands.values() for p in family(command)]
        outs = [open_folder / name / "out" for name in commands]
        assert spy([*outs, *(Path(s).parent for s in sockets)], sockets, pids) == []
        for command in commands.values():
            assert command.end(600) == 0, command.stdout + command.stderr[-2000:]
    finally:
        os.umask(previous)
        for command in commands.values():
            command.process.kill()
            command.process.wait()
    assert spy(outs, [], []) == []
    for name in JOBS:
        (other,) = set(JOBS) - {name}
        foreign = [*files_under(open_folder / other), *files_under(open_folder / name / "command")]
        assert holding(foreign, f"canary-{name}".encode()) == []
        assert list((open_folder / name / "command" / "tmp").iterdir()) == []


def test_the_spy_sees_what_is_open(open_folder: Path) -> None:
    """Guards the test above."""
    (open_folder / "file").write_text("x")
    with started("--version", folder=open_folder / "command") as command:
        seen = spy([open_folder], [], [])
        assert {f"list {open_folder}", f"read {open_folder}/file"} <= set(seen)
        command.end()
