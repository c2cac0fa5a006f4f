"""A wheel built from this tree installs into an empty environment and runs the demo there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def _run(*command: str | Path, cwd: Path) -> str:
    # Nothing of this checkout's environment may help: no PYTHONPATH, no virtual environment on PATH.
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "CLOISTER"))}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=kept, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_the_wheel_runs_the_demo_in_an_empty_environment(tmp_path: Path) -> None:
    _run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path / "dist", ROOT, cwd=tmp_path)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    venv.create(tmp_path / "empty", with_pip=True)
    python = tmp_path / "empty" / "bin" / "python"
    _run(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel, cwd=tmp_path)
    out = _run(tmp_path / "empty" / "bin" / "cloister", "demo", "--out", tmp_path / "demo", "--json", cwd=tmp_path)
    report = json.loads(out)
    assert {row["system"] for row in report["results"]} == {"base", "local", "central", "cloister"}
    assert (tmp_path / "demo" / "report.html").is_file()
