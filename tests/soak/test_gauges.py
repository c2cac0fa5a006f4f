"""What counts as a leak, and that a real one is seen."""

from __future__ import annotations

import ctypes
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.soak.gauges import BOUNDS, Samples, adopt_orphans, descendants, files_under, process_gauges, reap, slope

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc")
NAME = "enclave memory"
INNER = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); sys.stdin.read()"


def samples(*values: float, every_s: float = 10.0) -> Samples:
    found = Samples()
    for i, value in enumerate(values):
        found.add(i * every_s, {NAME: value})
    return found


@given(st.lists(st.tuples(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4)), min_size=2, max_size=30))
def test_the_slope_is_that_of_least_squares(points: list[tuple[float, float]]) -> None:
    xs, ys = [i + x / 1e5 for i, (x, _) in enumerate(points)], [y for _, y in points]
    assert slope(xs, ys) == pytest.approx(float(np.polyfit(xs, ys, 1)[0]), rel=1e-6, abs=1e-6)


def test_steady_growth_is_a_leak() -> None:
    hour = 360
    leak = samples(*[500 + 40 * i / hour for i in range(2 * hour)])
    growth = leak.growth()[NAME]
    assert growth.per_hour == pytest.approx(40.0)
    assert growth.in_all == pytest.approx(60.0, rel=0.01)  # a quarter of the time was warm-up
    assert growth.leaks


@pytest.mark.parametrize(
    "values",
    [
        [500.0] * 100,
        [500 + 100 * (1 - math.exp(-i / 5)) for i in range(200)],  # a cache that fills
        [500 + 8 * (i % 7) for i in range(200)],  # a saw
        [500 + i / 20 for i in range(100)],  # 18 MiB per hour, but 4 MiB in all: an hour may show it
    ],
)
def test_what_stops_or_swings_is_none(values: list[float]) -> None:
    assert not samples(*values).growth()[NAME].leaks


def test_too_few_samples_show_nothing() -> None:
    with pytest.raises(ValueError, match="3 samples"):
        samples(1.0, 2.0, 3.0).growth()


def test_gauges_see_what_a_process_holds(tmp_path: Path) -> None:
    before = process_gauges("enclave", os.getpid())
    assert set(before) <= set(BOUNDS)
    held = bytearray(os.urandom(1 << 20)) * 64
    with socket.socket(), socket.socket():
        after = process_gauges("enclave", os.getpid())
    assert 48 < after["enclave memory"] - before["enclave memory"] < 80, len(held)
    assert after["enclave descriptors"] == before["enclave descriptors"] + 2
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").touch()
    assert files_under([tmp_path]) == 3


def test_descendants_are_counted_until_they_are_waited_for() -> None:
    before = descendants(os.getpid())
    command = [sys.executable, "-c", INNER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert descendants(os.getpid()) == before + 2
        os.killpg(child.pid, 9)
    assert descendants(os.getpid()) == before


@pytest.fixture
def adopting() -> Iterator[None]:
    adopt_orphans()
    yield
    ctypes.CDLL(None).prctl(36, 0, 0, 0, 0)


def ends(pid: int) -> None:
    """Return when a process is a zombie."""
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.001)


@pytest.mark.usefixtures("adopting")
def test_what_a_killed_process_leaves_running_is_counted_until_it_ends() -> None:
    before = descendants(os.getpid())
    with subprocess.Popen([sys.executable, "-c", INNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        orphan = int(child.stdout.readline())
        child.kill()
    reap(own=())
    assert descendants(os.getpid()) == before + 1
    os.kill(orphan, 9)
    ends(orphan)
    assert descendants(os.getpid()) == before + 1
    reap(own=())
    assert descendants(os.getpid()) == before


def test_reaping_leaves_exit_codes_to_those_who_wait_for_them() -> None:
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.exit(7)"]) as child:
        ends(child.pid)
        reap(own={child.pid})
        assert child.wait() == 7
