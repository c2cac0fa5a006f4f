"""What may go wrong around a job, with real processes: a clear error, the right exit code, nothing lost."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cloister.attest.backends.simulated import measure_source
from cloister.cli.app import main
from cloister.crypto.keys import PartyKey
from cloister.report.model import RunReport
from cloister.report.outputs import JoinReport
from tests.integration.conftest import FinishedRun, MakeJob
from tests.integration.tiny_job import PARTIES, Command, alive, children_of, finish, records, started, write_lines

pytestmark = pytest.mark.integration


def reported(stdout: str, stderr: str) -> dict[str, str]:
    """The error object, which is all that stands on stdout; stderr has no traceback."""
    assert "Traceback" not in stderr
    content = json.loads(stdout)
    assert set(content) == {"error"}
    error: dict[str, str] = content["error"]
    assert set(error) == {"code", "message", "where", "hint"}
    return error


class Here:
    """Runs commands in this process, which has imported everything already."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object) -> tuple[int, dict[str, str]]:
        """(exit code, error) of a command that must fail."""
        code = main([*map(str, arguments), "--json"])
        captured = self._capsys.readouterr()
        assert captured.err == ""
        return code, reported(captured.out, captured.err)


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Here:
    return Here(capsys)


def gone(pids: set[int], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while alive(pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pids)


# Interruptions --------------------------------------------------------------------------------------------------------


def stamps(paths: list[Path]) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in paths}


def test_a_run_that_is_killed_and_interrupted_goes_on(finished_run: FinishedRun, tmp_path: Path) -> None:
    shutil.copytree(finished_run.job.parent / "data", tmp_path / "data")
    text = finished_run.job.read_text().replace('baselines = ["base"]', 'baselines = ["base", "local"]')
    text = text.replace('"model"', json.dumps(str(finished_run.job.parent / "model")))
    (tmp_path / "job.toml").write_text(text)
    out = tmp_path / "out"
    call = ("run", tmp_path / "job.toml", "--out", out, "--json", "--progress", "json")

    with started(*call, folder=tmp_path / "first") as first:
        first.wait_for(lambda: len(children_of(first.process.pid)) == 4, "enclave, two parties and baselines")
        children = children_of(first.process.pid)
        first.process.kill()
        assert gone(children, 10.0), "children outlive a run that was killed"

    bundles = [out / "parties" / p / "bundles" / f"{k}.{e}" for p in PARTIES for k in ("train", "validation", "test")
               for e in ("bundle", "key")]  # fmt: skip
    baselines = [out / "baselines" / f"local-{party}" / "curve.json" for party in PARTIES]
    counts = [out / "parties" / party / "bundles" / "counts.json" for party in PARTIES]
    with started(*call, folder=tmp_path / "second") as second:
        second.wait_for(lambda: all(p.exists() for p in [*counts, *baselines]), "bundles and baselines")
        children = children_of(second.process.pid)
        second.interrupt()
        assert second.end(30.0) == 130
        assert reported(second.stdout, second.stderr)["code"] == "interrupted"
        assert gone(children, 1.0), "children outlive a run that was interrupted"
    assert not (out / "report.json").exists()

    before = stamps([*bundles, *baselines])
    third = finish(*call, folder=tmp_path / "third")
    assert third.process.returncode == 0, third.stdout
    assert stamps([*bundles, *baselines]) == before
    tasks = {event["task"] for event in third.events()}
    assert not {"north: former layers", "south: former layers", "local: local:north", "local: local:south"} & tasks
    report = RunReport.model_validate_json(third.stdout)
    # Other keys, another job id, other processes: the same adapter, to the last bit.
    assert report.job_id != finished_run.report.job_id
    assert report.adapter_sha256 == finished_run.report.adapter_sha256
    assert {row.system for row in report.results} == {"base", "local", "cloister"}


class Dam:
    """A TCP relay that passes on no more than so many bytes to the enclave, then nothing."""

    def __init__(self, target: str, limit: int) -> None:
        host, _, port = target.rpartition(":")
        self._target, self._left, self._lock = (host, int(port)), limit, threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = [self._listener]
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for each in self._sockets:
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
            except OSError:
                return
            self._sockets += [near, far]
            threading.Thread(target=self._relay, args=(near, far, True), daemon=True).start()
            threading.Thread(target=self._relay, args=(far, near, False), daemon=True).start()

    def _relay(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        try:
            while data := source.recv(1 << 16):
                if counted:
                    with self._lock:
                        self._left -= len(data)
                        if self._left < 0:
                            return
                sink.sendall(data)
        except OSError:
            return


def deployment(make_job: MakeJob, tmp_path: Path, changes: dict[str, dict[str, Any]]) -> tuple[Path, dict[str, Path]]:
    """A job as parties on different machines have it: keys and a policy. Returns the job file and the key files."""
    keys = {name: PartyKey.generate() for name in PARTIES}
    for name, key in keys.items():
        key.save(tmp_path / f"{name}.key")
    policy = tmp_path / "policy.toml"
    policy.write_text(
        '[policy]\naccept = ["simulated"]\ninsecure_simulated = true\n[[measurement]]\nlabel = "this"\n'
        f'type = "simulated"\nregisters = {{ source = "{measure_source().hex()}" }}\n'
    )
    changes = {**changes, "enclave": {"policy": str(policy), "attester": "simulated", **changes.get("enclave", {})}}
    job = make_job(changes, keys={name: {"public_key": key.public.hex()} for name, key in keys.items()})
    return job, {name: tmp_path / f"{name}.key" for name in PARTIES}


def test_a_party_killed_while_it_sends_goes_on_at_its_offset(make_job: MakeJob, tmp_path: Path, here: Here) -> None:
    write_lines(tmp_path / "job" / "data" / "north-train.jsonl", records("north", "train", 900))
    job, keys = deployment(make_job, tmp_path, {"training": {"steps": 2}})
    out = tmp_path / "enclave"
    flags = ("--insecure-simulated", "--json", "--progress", "json")

    def join(party: str, address: str, *more: object) -> tuple[object, ...]:
        call = ("join", job, "--party", party, "--key", keys[party], "--out", tmp_path / party)
        return (*call, "--enclave", address, *more)

    listen = ("enclave", job, "--listen", "127.0.0.1:0", "--out", out)
    with started(*listen, *flags, folder=tmp_path / "e") as enclave:
        enclave.wait_for((out / "address").exists, "address")
        address = json.loads((out / "address").read_text())["address"]
        code, error = here(*join("north", address))  # without permission for simulated evidence
        assert (code, error["code"]) == (3, "simulated")
        assert not list((out / "bundles").iterdir())  # nothing was sent
        part = out / "bundles" / "north.train.bundle.part"
        dam = Dam(address, 5 << 19)
        with started(*join("south", address, *flags), folder=tmp_path / "s") as south:
            with started(*join("north", dam.address, *flags), folder=tmp_path / "n1") as first:
                first.wait_for(lambda: part.exists() and part.stat().st_size > 1 << 20, "part of a bundle")
                time.sleep(0.5)  # what was on its way arrives
                assert first.process.poll() is None
                first.process.send_signal(signal.SIGKILL)
                assert first.end() == -signal.SIGKILL
            dam.close()
            offset = part.stat().st_size
            second = finish(*join("north", address, *flags), folder=tmp_path / "n2")
            assert second.process.returncode == 0, second.stdout
            assert south.end() == 0, south.stdout
        assert enclave.end() == 0, enclave.stdout
    sent = JoinReport.model_validate_json(second.stdout).wire.bytes_up
    bundles = list((tmp_path / "north" / "bundles").glob("*.bundle"))
    size = sum(path.stat().st_size for path in bundles)
    assert offset > 1 << 20
    assert size - offset < sent < size - offset + 100_000  # and the messages of the session
    for path in bundles:
        assert (out / "bundles" / f"north.{path.name}").read_bytes() == path.read_bytes()


# Bad input ------------------------------------------------------------------------------------------------------------


def test_a_malformed_record_ends_the_whole_run(make_job: MakeJob, tmp_path: Path) -> None:
    """The error of a party's process is the run's: file, line, field and party."""
    rows = records("south", "train", 10)
    rows[6]["response"] = 7
    path = write_lines(tmp_path / "job" / "data" / "south-train.jsonl", rows)
    job = make_job()
    with started("run", job, "--out", tmp_path / "out", "--json", folder=tmp_path / "r") as command:
        command.wait_for(lambda: len(children_of(command.process.pid)) == 3, "children")
        children = children_of(command.process.pid)
        assert command.end() == 2
        assert gone(children, 1.0)
    error = reported(command.stdout, command.stderr)
    assert error["code"] == "data"
    assert error["where"] == f"south: {path}:7: response"
    assert "not text" in error["message"]


@pytest.mark.parametrize(
    ("content", "where", "message"),
    [
        ("", "", "no records"),
        ("\n\n", "", "no records"),
        ('{"prompt": "a", "response": "b"}\n{"prompt": "a"\n', ":2", "is not JSON"),
        ('{"prompt": "a", "response": "b"}\n["a"]\n', ":2", "not an object"),
        ('{"prompt": "a"}\n', ":1: response", "is missing"),
        ('{"prompt": "", "response": "b"}\n', ":1: prompt", "is empty"),
        ('{"prompt": "a", "response": "b", "choices": ["x"], "answer": 0}\n', ":1: choices", "two or more"),
        ('{"prompt": "a", "response": "b", "choices": ["x", "y"], "answer": 2}\n', ":1: answer", "0-based"),
    ],
)
def test_malformed_and_empty_data(
    make_job: MakeJob, tmp_path: Path, here: Here, content: str, where: str, message: str
) -> None:
    job, keys = deployment(make_job, tmp_path, {})
    path = job.parent / "data" / "south-train.jsonl"
    path.write_text(content)
    call = ("join", job, "--party", "south", "--key", keys["south"], "--out", tmp_path / "out")
    code, error = here(*call, "--enclave", "127.0.0.1:1", "--insecure-simulated")
    assert (code, error["code"]) == (2, "data")
    assert error["where"] == f"{path}{where}"
    assert message in error["message"]


def test_a_missing_data_file(make_job: MakeJob, tmp_path: Path, here: Here) -> None:
    job = make_job()
    (job.parent / "data" / "south-test.jsonl").unlink()
    line = _line(job, "south-test")
    code, error = here("run", job, "--out", tmp_path / "out")
    assert (code, error["code"]) == (2, "job")
    assert error["where"] == f"{job}:{line}: [[party]] test"
    assert "'south'" in error["message"]
    assert "south-test.jsonl" in error["message"]


def test_a_missing_model(make_job: MakeJob, tmp_path: Path, here: Here) -> None:
    job = make_job({"model": {"path": "nowhere"}})
    code, error = here("run", job, "--out", tmp_path / "out")
    assert (code, error["code"]) == (2, "model")
    assert error["where"] == f"{job}:{_line(job, 'path =')}: [model] path"
    assert "nowhere" in error["message"]


def test_a_cut_outside_the_model(make_job: MakeJob, tmp_path: Path, here: Here) -> None:
    job = make_job({"model": {"cut": 4}})
    code, error = here("run", job, "--out", tmp_path / "out")
    assert (code, error["code"]) == (2, "model")
    assert error["where"] == f"{job}:{_line(job, 'cut =')}: [model] cut"
    assert "4 layers" in error["message"]
    assert list((tmp_path / "out").iterdir()) == []


def _line(path: Path, text: str) -> int:
    return next(i for i, line in enumerate(path.read_text().splitlines(), 1) if text in line)


def test_a_party_that_is_not_in_the_job(make_job: MakeJob, tmp_path: Path, here: Here) -> None:
    job, keys = deployment(make_job, tmp_path, {})
    call = ("join", job, "--key", keys["north"], "--out", tmp_path / "out", "--enclave", "127.0.0.1:1")
    code, error = here(*call, "--party", "west")
    assert (code, error["code"]) == (2, "usage")
    assert "'west'" in error["message"]
    assert "north, south" in error["hint"]
    code, error = here(*call, "--party", "south")  # with the key of another party
    assert (code, error["code"], error["where"]) == (2, "usage", "south")
    assert not (tmp_path / "out").exists()


def test_a_policy_that_wants_other_evidence(make_job: MakeJob, tmp_path: Path, here: Here) -> None:
    policy = tmp_path / "tdx.toml"
    policy.write_text('[policy]\naccept = ["tdx"]\n')
    job, _ = deployment(make_job, tmp_path, {"enclave": {"policy": str(policy)}})
    call = ("enclave", job, "--listen", "127.0.0.1:0", "--out", tmp_path / "out")
    code, error = here(*call, "--insecure-simulated")
    assert (code, error["code"]) == (3, "type")
    assert "simulated" in error["message"]
    assert "tdx" in error["hint"]
    code, error = here(*call)  # and without permission there is no simulation at all
    assert (code, error["where"]) == (2, "enclave.attester")


def test_a_port_in_use(make_job: MakeJob, tmp_path: Path, here: Here) -> None:
    job, _ = deployment(make_job, tmp_path, {})
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code, error = here("enclave", job, "--listen", address, "--out", tmp_path / "out", "--insecure-simulated")
    assert (code, error["code"], error["where"]) == (2, "usage", address)
    assert "in use" in error["message"]
    assert "port 0" in error["hint"]


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of so many bytes; the test is skipped where none can be mounted."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("a full disk needs a tmpfs of its own, which only root can mount, on Linux")
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, f"size={size}".encode()) != 0:
        pytest.skip(f"a full disk needs a tmpfs of its own: {os.strerror(ctypes.get_errno())}")
    try:
        yield folder
    finally:
        libc.umount2(bytes(folder), 2)  # MNT_DETACH


def test_a_full_disk(make_job: MakeJob, tmp_path: Path, here: Here) -> None:
    job, keys = deployment(make_job, tmp_path, {})
    with small_disk(tmp_path / "disk", 64 << 10) as disk:
        call = ("join", job, "--party", "north", "--key", keys["north"], "--out", disk)
        code, error = here(*call, "--enclave", "127.0.0.1:1", "--insecure-simulated")
        assert (code, error["code"]) == (1, "capacity")
        assert error["where"] == str(disk / "bundles" / "train.bundle")
        assert "bytes are needed" in error["message"]
        assert {path.suffix for path in disk.rglob("*") if path.is_file()} <= {".key"}  # nothing half-written


def test_ctrl_c_while_waiting_for_parties(make_job: MakeJob, tmp_path: Path) -> None:
    job, _ = deployment(make_job, tmp_path, {})
    out = tmp_path / "out"
    call = ("enclave", job, "--listen", "127.0.0.1:0", "--out", out, "--insecure-simulated", "--json")
    with started(*call, folder=tmp_path / "e") as enclave:
        enclave.wait_for((out / "address").exists, "address")
        enclave.interrupt()
        assert enclave.end(20.0) == 130, enclave.stderr
    assert reported(enclave.stdout, enclave.stderr)["code"] == "interrupted"


def test_the_harness_finds_processes(tmp_path: Path) -> None:
    """Guards the tests above: a child that runs is seen, one that has ended is not."""
    child = Command("--version", folder=tmp_path)
    assert child.process.pid in children_of(os.getpid())
    assert child.end() == 0
    assert gone({child.process.pid}, 0.0)
