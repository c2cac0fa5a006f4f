"""No core dumps, no reading of memory, files for one user alone: each protection alone, in processes of their own."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="prctl and limits of Linux")

STATE = """
import ctypes, json, os, resource
umask = os.umask(0)
print(json.dumps({"umask": umask, "core": resource.getrlimit(resource.RLIMIT_CORE),
                  "dumpable": ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)}), flush=True)
"""
# In the child and not as `preexec_fn`: that makes Python fork, and gRPC, which other tests have started by then,
# aborts a fork whose descriptors are closed before it becomes another program (grpc/grpc issue 43055).
OPEN = """
import os, resource
resource.setrlimit(resource.RLIMIT_CORE, resource.getrlimit(resource.RLIMIT_CORE)[1:] * 2)
os.umask(0o022)
"""
PRIVATE = {"umask": 0o077, "core": [0, 0], "dumpable": 0}


def python(code: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"{OPEN}\n{code}", *arguments],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip


def state_after(code: str, *arguments: str, folder: Path) -> Any:
    run = python(f"{code}\n{STATE}", *arguments, folder=folder)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("files", [True, False])
def test_what_is_set(tmp_path: Path, files: bool) -> None:
    code = f"from cloister.private import keep_private; keep_private(files={files})"
    assert state_after(code, folder=tmp_path) == {**PRIVATE, "umask": 0o077 if files else 0o022}


ENTRY = """
import importlib, sys
app = importlib.import_module("cloister.cli.app")
app.main = lambda: 0
sys.exit = lambda code: None
app.entry()
"""


@pytest.mark.parametrize("command", ["demo", "run", "enclave", "join", "baseline", "accelerator", "pads", "generate"])
def test_every_role_is_private(tmp_path: Path, command: str) -> None:
    assert state_after(ENTRY, command, folder=tmp_path) == PRIVATE


def test_what_is_to_be_handed_on_is_not(tmp_path: Path) -> None:
    assert state_after(ENTRY, "export", folder=tmp_path) == {**PRIVATE, "umask": 0o022}


KEEP = "from cloister.private import keep_private; keep_private(files=True)"
WITHOUT = {
    "nothing": KEEP,
    "limit": f"import psutil; psutil.Process.rlimit = lambda *a: None\n{KEEP}",
    "dumpable": f"{KEEP}\nimport ctypes; ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)",
}


def dumps(code: str, folder: Path) -> bool:
    """Whether a process that runs this code and then crashes leaves a core dump."""
    assert python(f"{code}\nos.abort()", folder=folder).returncode == -signal.SIGABRT
    found = list(folder.glob("core*"))
    for path in found:
        path.unlink()
    return bool(found)


@pytest.mark.parametrize("without", WITHOUT)
def test_a_crash_leaves_no_core_dump(tmp_path: Path, without: str) -> None:
    """Each of the two protections is enough where core dumps are files."""
    if resource.getrlimit(resource.RLIMIT_CORE)[1] == 0 or not dumps("", tmp_path):
        pytest.skip("this system leaves no core dumps as files, which the test could find")
    assert not dumps(WITHOUT[without], tmp_path)
