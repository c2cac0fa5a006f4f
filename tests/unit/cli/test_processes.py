"""What commands say of several processes in the enclave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest

from cloister.cli import doctor, main
from cloister.methods import plan_processes

JOB = """\
[job]
name = "trial"
[model]
path = "missing"
[training]
steps = 2
[enclave]
processes = 3
[[party]]
name = "a"
public_key = "{key}"
"""


def test_doctor_looks_for_what_processes_meet_by(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_processes().status == "ok"
    up: dict[str, Any] = dict(psutil.net_if_stats())
    monkeypatch.setattr(psutil, "net_if_stats", lambda: {name: s for name, s in up.items() if name != "lo"})
    found = doctor.check_processes()
    assert found.status == "warn"
    assert found.found == "one only; missing: a loopback interface lo that is up"
    assert found.hint


@pytest.mark.parametrize("command", ["run", "enclave"])
def test_more_processes_than_processors_are_warned_of(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan_processes, "usable_cpus", lambda: 2)
    job = tmp_path / "job.toml"
    job.write_text(JOB.format(key="a" * 64))
    assert main([command, str(job), "--out", str(tmp_path / "out")]) == 2  # there is no model
    assert "[enclave] 3 processes with 3 threads on 2 processors" in capsys.readouterr().err
