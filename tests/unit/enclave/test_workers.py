"""Processes that an enclave starts: what they inherit, what they compute, and how one that ends fails the job."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from cloister.enclave import workers
from cloister.enclave.lifeline import MAX_LINE_BYTES, describe, say
from cloister.enclave.placing import is_parted, own_device
from cloister.enclave.results import Outcome
from cloister.enclave.work import train_and_score
from cloister.enclave.worker import LOST_EXIT_CODE
from cloister.errors import CloisterError, DataError, JobError, ProtocolError, RunError, VerificationError
from cloister.job import EnclaveSection
from cloister.model.anatomy import load_model
from cloister.model.cut import Latter
from cloister.progress import Silent
from tests.integration.search import left_in_memory, private_folders
from tests.unit.enclave.test_work import CUT, job, prepare, resolve
from tests.unit.model.tiny import tiny_model

STEPS = 6
TOLERANCE = 1e-5
"""Relative, of losses: see test_team.py."""


@dataclasses.dataclass
class Played:
    """What came of a job, and its secrets."""

    keys: list[bytes]
    saved: list[bytes] = dataclasses.field(default_factory=list)
    outcome: Outcome | None = None
    error: CloisterError | None = None

    @property
    def declared(self) -> dict[str, Any]:
        assert self.outcome is not None, self.error
        found: dict[str, Any] = json.loads(self.outcome.declared)
        return found

    @property
    def losses(self) -> list[float]:
        return [point["train_loss"] for point in self.declared["curve"]]

    @property
    def scores(self) -> list[float]:
        assert self.outcome is not None
        lines = [line for own in self.outcome.private.values() for text in own.values() for line in text.splitlines()]
        return [json.loads(line)["bits"] for line in lines]


def play(
    folder: Path,
    model: Path,
    *,
    on_step: Callable[[int, list[bytes]], None] = lambda step, keys: None,
    saved: bytes | None = None,
    batch_tokens: int = 40,
    **enclave: Any,
) -> Played:
    """Train and score the tiny job; `on_step(step, data keys)` is called in the enclave's own process."""
    stage, core = prepare(folder)
    declared = job(stage)
    found = Played([key.reveal() for of in core.data_keys().values() for key in of.values()])
    core.restore = lambda: saved  # type: ignore[method-assign]
    core.lineage.add = lambda state, step: found.saved.append(state)  # type: ignore[method-assign, assignment, return-value]
    core.announce = lambda event: on_step(event["step"], found.keys)  # type: ignore[method-assign]
    more = {"steps": STEPS, "batch_tokens": batch_tokens, "evaluations": 0}
    changes = {
        "training": declared.training.model_copy(update=more),
        "enclave": EnclaveSection.model_validate({"device": "cpu", "threads": 1, **enclave}),
        "checkpoint": declared.checkpoint.model_copy(update={"count": 3}),
    }
    resolved = resolve(stage, declared.model_copy(update=changes))
    resolved = dataclasses.replace(resolved, model=dataclasses.replace(resolved.model, folder=model))
    threads = torch.get_num_threads()
    try:
        _, found.outcome = train_and_score(
            core,
            core.intake,  # type: ignore[attr-defined]
            resolved,
            Latter(load_model(model, "float32"), CUT),
            cache_bytes=1 << 20,
            progress=Silent(),
            parted=enclave.get("sharding") == "full",
        )
    except CloisterError as error:
        found.error = error
    assert torch.get_num_threads() == threads
    return found


def workers_of_this() -> list[psutil.Process]:
    """torchrun and the processes that it started; other tests leave multiprocessing's tracker to this process."""
    return [p for p in psutil.Process().children(recursive=True) if "cloister.enclave." in " ".join(p.cmdline())]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Played:
    return play(tmp_path_factory.mktemp("alone"), model)


@dataclasses.dataclass
class Seen:
    """What can be read of the processes from outside while they are at work."""

    commands: list[list[str]] = dataclasses.field(default_factory=list)
    readable: list[bytes] = dataclasses.field(default_factory=list)
    """Command lines, environments, files that are open, anonymous memory."""
    memories: int = 0
    before: set[tuple[str, int]] = dataclasses.field(default_factory=lambda: set(_listening(psutil.Process())))
    """Ports of other tests in this process."""
    listening: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    connected: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    """To which of these a stranger could connect."""
    modes: set[int] = dataclasses.field(default_factory=set)
    """Of the private folder."""

    def look(self, keys: list[bytes]) -> None:
        for process in workers_of_this():
            self.commands.append(process.cmdline())
            proc = Path(f"/proc/{process.pid}")
            self.readable += [(proc / name).read_bytes() for name in ("cmdline", "environ")]
            for descriptor in (proc / "fd").iterdir():
                target = descriptor.resolve()
                self.memories += 1 if str(target).startswith("/memfd:") else 0
                if target.is_file() or str(target).startswith("/memfd:"):
                    self.readable.append(descriptor.read_bytes())
            self._ports(process)
        for folder in private_folders():
            if any(str(folder) in " ".join(command) for command in self.commands):
                self.modes.add(folder.stat().st_mode & 0o777)
                self.readable += [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
        self._ports(psutil.Process())

    def _ports(self, process: psutil.Process) -> None:
        for address in _listening(process):
            if address not in self.before:
                self.listening.append(address)
                try:
                    socket.create_connection(address, timeout=0.5).close()
                except OSError:
                    continue
                self.connected.append(address)


def _listening(process: psutil.Process) -> list[tuple[str, int]]:
    found = process.net_connections("inet")
    return [(c.laddr.ip, c.laddr.port) for c in found if c.status == psutil.CONN_LISTEN]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, model: Path) -> tuple[Played, Seen, set[Path]]:
    """The same job by two processes, looked at after the second step; and private folders that are left."""
    seen, before = Seen(), private_folders()

    def on_step(step: int, keys: list[bytes]) -> None:
        if step == 2:
            seen.look(keys)

    played = play(tmp_path_factory.mktemp("two"), model, on_step=on_step, processes=2)
    return played, seen, left_in_memory(before)


def test_two_processes_give_the_curve_and_the_scores_of_one(alone: Played, two: tuple[Played, Seen, set[Path]]) -> None:
    assert len(alone.losses) == STEPS
    assert two[0].losses == pytest.approx(alone.losses, rel=TOLERANCE)
    assert two[0].scores == pytest.approx(alone.scores, rel=TOLERANCE)
    assert len(alone.scores) > 4


def test_no_key_is_readable_from_outside(two: tuple[Played, Seen, set[Path]]) -> None:
    played, seen, _ = two
    assert [("torchrun" in " ".join(c), "worker" in " ".join(c)) for c in seen.commands] == [
        (True, False),
        (False, True),
    ]
    assert seen.memories >= 1, "torchrun still has the memory that the keys came in"
    assert len(played.keys) == 4
    for key in played.keys:
        for form in (key, key.hex().encode()):
            assert not [content[:80] for content in seen.readable if form in content]


def test_no_port_takes_a_connection(two: tuple[Played, Seen, set[Path]]) -> None:
    """gloo listens on the loopback interface as long as it lives, and answers nobody."""
    _, seen, _ = two
    assert len(seen.listening) == 2
    assert {address for address, _ in seen.listening} == {"127.0.0.1"}
    assert seen.connected == []


def test_the_folder_is_private_and_goes(two: tuple[Played, Seen, set[Path]]) -> None:
    _, seen, left = two
    assert seen.modes == {0o700}
    assert left == set()
    assert workers_of_this() == []


def test_parted_layers_go_on_from_the_checkpoint_of_one_process(alone: Played, tmp_path: Path, model: Path) -> None:
    """FSDP2 on two processes, from the middle of what one began."""
    parted = play(tmp_path, model, saved=alone.saved[0], processes=2, sharding="full")
    assert parted.losses[:2] == alone.losses[:2]
    assert parted.losses == pytest.approx(alone.losses, rel=TOLERANCE)
    assert parted.scores == pytest.approx(alone.scores, rel=TOLERANCE)


def test_one_process_goes_on_from_the_checkpoint_of_two(
    alone: Played, two: tuple[Played, Seen, set[Path]], tmp_path: Path, model: Path
) -> None:
    resumed = play(tmp_path, model, saved=two[0].saved[1])
    assert resumed.losses[:4] == two[0].losses[:4]
    assert resumed.losses == pytest.approx(alone.losses, rel=TOLERANCE)


def test_a_process_that_dies_fails_the_job_and_is_named(tmp_path: Path, model: Path) -> None:
    before = private_folders()

    def kill(step: int, keys: list[bytes]) -> None:
        if step == 2:
            found = [p for p in workers_of_this() if "cloister.enclave.worker" in p.cmdline()]
            assert len(found) == 1
            os.kill(found[0].pid, signal.SIGKILL)

    died = play(tmp_path, model, on_step=kill, processes=2)
    assert isinstance(died.error, RunError)
    assert str(died.error) == "enclave process 1: process 1 of 2 was ended by signal 9"
    assert died.outcome is None
    assert left_in_memory(before) == set()
    assert workers_of_this() == []


def test_more_processes_than_packs_are_refused(tmp_path: Path, model: Path) -> None:
    refused = play(tmp_path, model, processes=3, batch_tokens=40)
    assert isinstance(refused.error, JobError)
    assert str(refused.error) == (
        "[enclave] processes: 3 processes share the packs of a step, but no step has more than 2"
    )


@pytest.mark.parametrize(
    ("ended", "expected"),
    [
        ({1: -15, 2: -9, 3: LOST_EXIT_CODE}, "process 2 of 4 was ended by signal 9"),
        ({1: LOST_EXIT_CODE, 3: 1}, "process 3 of 4 ended with exit code 1"),
        ({1: -15}, "process 1 of 4 was ended by signal 15"),
        ({}, "torchrun ended with exit code 7"),
    ],
)
def test_the_first_cause_is_named(ended: dict[int, int], expected: str) -> None:
    assert workers._ending(ended, 4, 7).message == expected


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (ProtocolError("a pack is malformed", where="train bundle of south"), "train bundle of south"),
        (VerificationError("chunk", "it changed", where="train bundle of south"), "train bundle of south"),
        (DataError("cannot read", where="FILE", hint="look"), "enclave process 1: FILE"),
        (RunError("diverged"), "enclave process 1"),
    ],
)
def test_what_a_process_met_is_raised_as_if_met_here(error: CloisterError, where: str) -> None:
    again = workers._rebuilt(1, describe(error))
    assert type(again) is type(error)
    assert (again.message, again.code, again.where, again.hint) == (error.message, error.code, where, error.hint)


def test_an_error_fits_into_one_piece_of_a_pipe() -> None:
    reader, writer = os.pipe()
    for text in ("a" * 9999, "\U0001f512" * 9999):
        say(writer, {"rank": 63, "error": describe(RunError(text, where=text, hint=text))})
        line = os.read(reader, 1 << 20)
        assert len(line) <= MAX_LINE_BYTES
        assert json.loads(line)["error"]["message"].startswith(text[:90])
    with pytest.raises(ValueError, match="in one piece"):
        say(writer, {"text": "x" * MAX_LINE_BYTES})
    os.close(reader)
    os.close(writer)


def test_a_process_ends_when_nobody_reads_its_pipe(tmp_path: Path) -> None:
    """However the enclave ended: the kernel closes its end of the pipe."""
    folder = tmp_path / "private"
    folder.mkdir()
    code = (
        "import pathlib, sys, time; from cloister.enclave.lifeline import end_with_reader;"
        "end_with_reader(1, pathlib.Path(sys.argv[1])); print('up', flush=True); time.sleep(200)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    assert folder.exists()
    process.stdout.close()
    assert process.wait(100) == 1
    assert not folder.exists()


def test_which_layers_are_parted(monkeypatch: pytest.MonkeyPatch) -> None:
    def parted(**enclave: Any) -> bool:
        kind = enclave.pop("kind", "lora")
        section = EnclaveSection.model_validate(enclave)
        declared: Any = type("", (), {"enclave": section, "adapter": type("", (), {"kind": kind})})
        return is_parted(declared, 1000)

    assert not parted(processes=2)
    assert not parted(processes=2, device="cpu")
    assert parted(processes=2, sharding="full", device="cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1200, 2000))
    assert parted(processes=2, device="cuda")
    assert not parted(processes=1, device="cuda")
    assert not parted(processes=2, device="cuda", sharding="none")
    assert not parted(processes=2, device="cuda", kind="spf")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1300, 2000))
    assert not parted(processes=2, device="cuda")


def test_each_process_has_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert own_device("cpu", 5) == torch.device("cpu")
    assert own_device("cuda", 1) == torch.device("cuda", 1)
    with pytest.raises(JobError, match="process 2 has no CUDA device: this machine has 2"):
        own_device("cuda", 2)
    with pytest.raises(JobError, match="MPS"):
        own_device("mps", 0)


def test_a_process_under_evidence_of_a_tee_must_be_isolated(tmp_path: Path) -> None:
    """It is asked before it reads the keys that it inherits."""
    command = [sys.executable, "-m", "cloister.enclave.worker", str(tmp_path), "tdx"]
    with Path(os.devnull).open() as nothing:
        ended = subprocess.run(
            command, stdin=nothing, capture_output=True, env={**os.environ, "RANK": "0"}, check=False, timeout=200
        )
    said = json.loads(ended.stdout)
    assert (ended.returncode, said["rank"], said["error"]["class"]) == (1, 1, "UsageError")
    assert "not isolated" in said["error"]["message"]
