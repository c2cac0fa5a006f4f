"""What the clock of method split covers, and how roles are told apart and their memory is watched."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from cloister.bench.memory import PeakMemory
from cloister.bench.split_run import Timeline, role_of
from cloister.errors import RunError
from cloister.progress import Event, Silent

_EVENTS = [  # (when, task, ended)
    (4.0, "enclave: hashing the model", False),
    (5.0, "enclave: loading latter layers", False),
    (6.0, "enclave: waiting for parties", False),
    (10.0, "north: hashing the model", False),
    (11.0, "south: hashing the model", False),
    (20.0, "enclave: training", False),
    (50.0, "enclave: training", True),
    (60.0, "enclave: scoring test sets", True),
]


def timeline(events: list[tuple[float, str, bool]]) -> Timeline:
    now = [0.0]
    line = Timeline(Silent(), lambda: now[0])
    for when, task, ended in events:
        now[0] = when
        line.report(Event(task=task, ended=ended))
    return line


def test_the_clock_covers_work_and_not_the_start_of_processes() -> None:
    assert timeline(_EVENTS).spans(["north", "south"]) == [(4.0, 6.0), (10.0, 50.0)]


def test_what_the_enclave_prepares_beside_the_parties_is_not_counted_twice() -> None:
    late = [(15.0, task, ended) if "waiting" in task else (when, task, ended) for when, task, ended in _EVENTS]
    assert timeline(sorted(late)).spans(["north", "south"]) == [(4.0, 10.0), (10.0, 50.0)]


@pytest.mark.parametrize("missing", ["enclave: training", "enclave: waiting for parties", "south: hashing the model"])
def test_a_run_that_does_not_say_when_is_not_timed(missing: str) -> None:
    with pytest.raises(RunError):
        timeline([event for event in _EVENTS if event[1] != missing]).spans(["south"])


def test_roles_are_read_from_command_lines() -> None:
    python = ["/usr/bin/python", "-m", "cloister"]
    assert role_of([*python, "enclave", "job.toml"]) == "enclave"
    assert role_of([*python, "join", "job.toml", "--party", "enclave"]) == "party"
    assert role_of([*python, "bench", "peer"]) is None
    assert role_of(["sleep", "1"]) is None


def test_the_peak_of_the_largest_process_of_a_role_is_kept() -> None:
    code = "import time; held = bytearray(%d << 20); del held; [i * i for i in range(3_000_000)]; time.sleep(1.0)"
    before = time.monotonic()
    with PeakMemory(lambda command: "child" if "-c" in command else None) as peak:
        children = [subprocess.Popen([sys.executable, "-c", code % mib]) for mib in (10, 200)]
        while any(child.poll() is None for child in children):
            time.sleep(0.05)
    assert set(peak.mib) == {"child"}
    assert 200 < peak.mib["child"] < 400
    assert 0.1 < peak.processor_seconds(before, time.monotonic()) < 60.0
    assert peak.processor_seconds(time.monotonic(), time.monotonic()) == 0.0
