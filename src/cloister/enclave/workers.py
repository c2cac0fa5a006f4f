"""The enclave's side of the processes that it starts to train with it: starting, meeting, ending, and why one ended."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cloister import errors
from cloister.attest.isolation import interpreter_flags
from cloister.enclave.compute import Sources, Work
from cloister.enclave.group import LOOPBACK, join, leave
from cloister.enclave.handover import Handover, write_memory
from cloister.enclave.lifeline import MAX_LINE_BYTES
from cloister.enclave.placing import own_device, placing
from cloister.enclave.worker import LOST_EXIT_CODE
from cloister.errors import CloisterError, RunError, VerificationError
from cloister.model.anatomy import pick_device
from cloister.training.checkpoint import Checkpoint
from cloister.training.team import LostProcessError, Team, is_loss

END_TIMEOUT_S = 20.0
"""torchrun notices a lost process within a moment, and ends the others within its own time limit."""
_MEMORY = Path("/dev/shm")  # noqa: S108  # a new folder in it, with a random name, for this user alone
_MAX_LINES = 1000
_POLL_MS = 200
_FOLLOWS = (LOST_EXIT_CODE, -signal.SIGTERM)
"""Exit codes of processes that noticed the end of another one, or that torchrun ended because of it."""
_FOREIGN = ("TORCHELASTIC_", "TORCH_ELASTIC_", "GLOO_")
"""Environment variables that would let torchrun or gloo open a port or use another interface."""


@contextmanager
def spread_out(
    work: Work, model: Path, sources: Sources, resume: Checkpoint | None, *, kind: str, parted: bool
) -> Iterator[Work]:
    """The same work as the first of `[enclave] processes` sees it; the others are started, and end with the block.

    Each computes with the job's threads, or its share of those of this process, and has its share of the cache.

    Args:
        resume: what training goes on from. kind: type of the enclave's evidence. parted: see `placing`.
    Raises: as `team_of`.
    """
    job, count, threads = work.job, work.job.enclave.processes, torch.get_num_threads()
    if count == 1:
        yield work
        return
    device = pick_device(job.enclave.device)
    handover = Handover(
        job=job,
        cut=work.cut,
        model=model,
        device=device,
        parted=parted,
        threads=job.enclave.threads or max(1, threads // count),
        cache_bytes=work.cache_bytes // count,
        folder=Path(),
        checkpoint=resume.to_bytes() if resume else b"",
        sources=sources,
    )
    place = placing(own_device(device, 0), parted=parted)
    torch.set_num_threads(handover.threads)
    try:
        with team_of(handover, kind) as team:
            yield replace(work, team=team, cache_bytes=handover.cache_bytes, place=place)
    finally:
        torch.set_num_threads(threads)


@contextmanager
def team_of(handover: Handover, kind: str) -> Iterator[Team]:
    """The processes of a job as a team; this process is number 0. They are ended when the block is left.

    Args:
        handover: what they are given; its `folder` is replaced. kind: type of the enclave's evidence.

    Raises:
        RunError: a process ended before its work was done; names it. What a process raised, as if it was raised here.
    """
    count = handover.job.enclave.processes
    folder = Path(tempfile.mkdtemp(prefix="cloister-", dir=_MEMORY if _MEMORY.is_dir() else None))
    try:
        device = own_device(handover.device, 0)
        workers = Workers(replace(handover, folder=folder), kind)
        try:
            workers.wait_until_ready()
            yield join(folder, 0, count, device, even=handover.parted)
            leave()
            workers.end(END_TIMEOUT_S)
        except RuntimeError as lost:  # a lost process, noticed in the middle of a pass where layers are parted
            if not is_loss(lost):
                raise
            raise workers.cause(RunError(str(lost), where="[enclave] processes")) from lost
        except LostProcessError as lost:
            raise workers.cause(lost) from lost
        finally:
            leave()
            workers.end()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Workers:
    """torchrun and the processes that it started."""

    def __init__(self, handover: Handover, kind: str) -> None:
        self.count = handover.job.enclave.processes
        self._said: list[dict[str, Any]] = []
        self._news = threading.Condition()
        self._closing = False
        self._memory = write_memory(handover.to_bytes())
        command = [sys.executable, *interpreter_flags(), "-m", "cloister.enclave.torchrun"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
        environment |= LOOPBACK | {"OMP_NUM_THREADS": str(handover.threads), "TORCH_ELASTIC_WORKER_IDENTICAL": "1"}
        reader, writer = os.pipe()
        self.process = subprocess.Popen(  # noqa: S603  # our own interpreter and module
            [*command, str(handover.folder), str(self.count - 1), kind],
            stdin=self._memory,
            stdout=writer,
            env=environment,
            start_new_session=True,  # a Ctrl-C is for the enclave, which then ends them
        )
        os.close(writer)
        self._reader = threading.Thread(target=self._read, args=(reader,), daemon=True)
        self._reader.start()

    def wait_until_ready(self) -> None:
        """Return when all have read their keys, and empty the memory that these came in.

        Raises:
            CloisterError: one ended instead.
        """
        with self._news:
            while len({said["ready"] for said in self._said if "ready" in said}) < self.count - 1:
                if self.process.poll() is not None:
                    break
                self._news.wait(0.1)
        os.ftruncate(self._memory, 0)
        if self.process.poll() is not None:
            raise self.cause()

    def cause(self, seen: CloisterError | None = None) -> CloisterError:
        """Why a process ended, the first reason that is not just another one's end; waits for torchrun to notice.

        Args:
            seen: what this process noticed, which is the reason where no other one is known.
        """
        try:
            self.process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.end()
        # Whatever was said is read once the last process has closed its end of the pipe.
        self._reader.join(END_TIMEOUT_S)
        with self._news:
            said = list(self._said)
        for line in said:
            if "error" in line:
                return _rebuilt(line["rank"], line["error"])
        ended = {1 + int(rank): code for line in said for rank, code in line.get("ended", {}).items()}
        if seen is not None and set(ended.values()) <= set(_FOLLOWS):
            return seen
        return _ending(ended, self.count, self.process.returncode)

    def end(self, wait_s: float = 0.0) -> None:
        """End what still runs after `wait_s` seconds, in which processes that are done end by themselves."""
        if self._memory >= 0:
            os.close(self._memory)
        self._memory = -1
        for seconds, signal_number in ((wait_s, signal.SIGTERM), (END_TIMEOUT_S, signal.SIGKILL)):
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.process.send_signal(signal_number)
        self.process.wait()
        # A process that outlives torchrun, because that was killed, ends when its pipe has no reader.
        self._closing = True
        self._reader.join(END_TIMEOUT_S)

    def _read(self, pipe: int) -> None:
        poll, rest = select.poll(), b""
        poll.register(pipe, select.POLLIN)
        while not self._closing:
            if not poll.poll(_POLL_MS):
                continue
            piece = os.read(pipe, MAX_LINE_BYTES)
            *lines, rest = (rest + piece).split(b"\n")
            with self._news:
                self._said += [json.loads(line) for line in lines]
                self._news.notify_all()
            if not piece or len(rest) > MAX_LINE_BYTES or len(self._said) > _MAX_LINES:
                break
        os.close(pipe)


def _rebuilt(rank: int, error: Mapping[str, str]) -> CloisterError:
    """The error that a process met. A party's fault has the party's place, any other names the process."""
    made: type[CloisterError] = getattr(errors, error["class"], RunError)
    peers = issubclass(made, VerificationError | errors.ProtocolError)
    where = error["where"] if peers else f"enclave process {rank}: {error['where']}".removesuffix(": ")
    texts = {"where": where, "hint": error["hint"]}
    if issubclass(made, VerificationError):
        return made(error["code"], error["message"], **texts)
    return made(error["message"], **texts)


def _ending(ended: Mapping[int, int], count: int, code: int) -> RunError:
    """Of the exit codes, the one that tells most: not those of processes that followed another one, or were ended."""
    causes = [rank for rank in sorted(ended) if ended[rank] not in _FOLLOWS] or sorted(ended)
    if not causes:
        return RunError(f"torchrun ended with exit code {code}", where="[enclave] processes", hint="see the log")
    rank, how = causes[0], ended[causes[0]]
    ending = f"was ended by signal {-how}" if how < 0 else f"ended with exit code {how}"
    hint = "signal 9 is often a lack of memory; see the log" if how == -9 else "see the log"
    return RunError(f"process {rank} of {count} {ending}", where=f"enclave process {rank}", hint=hint)
