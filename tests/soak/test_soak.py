"""What the soak's clients do, and what a sample holds."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from tests.crash.deployment import Deployment
from tests.soak.clients import Clients

ROOT = Path(__file__).parents[2]
SAMPLE = """
import os, signal, subprocess, sys, tempfile
from pathlib import Path
from types import SimpleNamespace
from tests.crash.forking import Forked
from tests.soak.__main__ import Soak, main

def orphan(*command):
    inner = f"import os, subprocess as s; print(s.Popen({command}, stdout=2).pid, flush=True); os.kill(os.getpid(), 9)"
    return int(subprocess.run([sys.executable, "-c", inner], stdout=subprocess.PIPE).stdout)

def run(self, seconds):
    leave = lambda: Path(tempfile.mkdtemp(), "file").touch()
    Forked(["--version"], self._folder / "role", leave).wait(60.0)
    running, ended = orphan("sleep", "60"), orphan("true")
    os.waitid(os.P_PID, ended, os.WEXITED | os.WNOWAIT)
    self._sample(SimpleNamespace(processes={"enclave": SimpleNamespace(pid=os.getpid())}), 0.0)
    os.kill(running, signal.SIGKILL)

Soak.run = run
main()
"""


def test_every_action_is_drawn(tmp_path: Path) -> None:
    deployment = Deployment(method="split", folder=tmp_path)
    clients = Clients(deployment, "127.0.0.1:1", str(tmp_path / "socket"), tmp_path, Random(1))  # noqa: S311
    actions = {name for name, _ in inspect.getmembers(Clients, inspect.isfunction) if not name.startswith("_")}
    assert {clients.draw()[1].__name__ for _ in range(300)} == actions - {"draw"}


@pytest.mark.integration
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_sample_holds_what_roles_leave_and_what_killed_ones_leave_running(tmp_path: Path) -> None:
    """A folder with a file; one process that runs, while another one has ended and is gone."""
    call = [sys.executable, "-W", "ignore", "-c", SAMPLE, "--folder", str(tmp_path / "soak")]
    ended = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    assert "Traceback" not in ended.stderr, ended.stderr
    values = json.loads((tmp_path / "soak" / "samples.json").read_text())["values"]
    assert (values["temporary files"], values["processes"]) == ([2], [1])
