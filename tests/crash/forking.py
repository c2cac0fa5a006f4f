"""Roles as forks of one process that has imported everything: a role starts in milliseconds, not seconds.

The forking process must have one thread and must not have used gRPC or tokenizers: it only imports them. A role runs
the command's own entry point with the arguments that a shell would give it.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from cloister.channel.client import connect
from cloister.cli.app import main

_MODULES = (
    "cloister.accelerator.server",
    "cloister.enclave.server",
    "cloister.methods.local",
    "cloister.methods.sign",
    "cloister.methods.take_part",
    "cloister.methods.verify",
    "cloister.party.join",
    "cloister.silo.join",
    "peft.tuners.lora",
    "transformers.models.llama.modeling_llama",
)
"""What commands import late, so that they start fast: here it is wanted beforehand."""
_PR_SET_PDEATHSIG = 1

Prepare = Callable[[], None]
"""Called in the child before the command."""


def import_everything() -> None:
    """Once, before the first fork."""
    torch.set_num_threads(1)
    for name in _MODULES:
        importlib.import_module(name)
    get_checkpoint_conversion_mapping("llama")  # a third of what loading a tiny model takes, and the same each time


def set_values(values: Mapping[str, object]) -> Prepare:
    """Other values for constants of modules, by "MODULE.NAME": times to wait that no trial could sit out."""

    def prepare() -> None:
        for path, value in values.items():
            module, _, name = path.rpartition(".")
            if not hasattr(importlib.import_module(module), name):
                raise ValueError(f"there is no {path}")
            setattr(importlib.import_module(module), name, value)

    return prepare


def connect_quickly() -> None:
    """Take an enclave for unreachable after 3 seconds: it is on this machine."""
    connect.__kwdefaults__ = {**(connect.__kwdefaults__ or {}), "timeout_s": 3.0}


class Forked:
    """A command in a child process; what it says goes to FOLDER/stdout and FOLDER/stderr."""

    left: ClassVar[int] = 0
    """Files and folders found in their temporary folders by now, of all that ended by themselves, even if with an
    error. What a killed one leaves is no leak: it could not remove it, and its machine's /tmp outlives it anyway."""

    def __init__(self, arguments: Sequence[object], folder: Path, *prepare: Prepare) -> None:
        self.arguments = [str(a) for a in arguments]
        self.folder = folder
        folder.mkdir(parents=True)
        (folder / "tmp").mkdir()
        self.returncode: int | None = None
        if threading.active_count() != 1:
            raise RuntimeError("the process that forks has started threads")
        self.pid = os.fork()
        if self.pid == 0:
            _run(self.arguments, folder, prepare)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
                if self.returncode >= 0:
                    Forked.left += sum(1 for _ in (self.folder / "tmp").rglob("*"))
        return self.returncode

    def wait(self, timeout_s: float) -> int | None:
        """The exit code, or None if it still runs after the time."""
        deadline = time.monotonic() + timeout_s
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        return self.returncode

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait(10.0)

    def interrupt(self) -> None:
        """As Ctrl-C."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGINT)

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()


def _run(arguments: list[str], folder: Path, prepare: Sequence[Prepare]) -> None:
    """In the child. Never returns."""
    code = 70
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        _redirect(folder)
        os.environ["TMPDIR"] = str(folder / "tmp")
        tempfile.tempdir = None
        for each in prepare:
            each()
        code = main(arguments)
        threading._shutdown()  # type: ignore[attr-defined]  # what the interpreter does at its end: a thread that hangs shows
        atexit._run_exitfuncs()
    except BaseException:  # noqa: BLE001  # nothing may come back into the forking process's code
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _redirect(folder: Path) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    for fd, source in ((0, Path(os.devnull)), (1, folder / "stdout"), (2, folder / "stderr")):
        opened = os.open(source, os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(opened, fd)
        os.close(opened)
    sys.stdin = os.fdopen(0, "r", closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False)


def in_child(work: Callable[[], object], *prepare: Prepare) -> int:
    """Run a function in a fork, so that threads it starts die with it; 1 if it failed, -9 if it was killed, else 0."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            for each in prepare:
                each()
            work()
            code = 0
        except BaseException:  # noqa: BLE001  # as above
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
