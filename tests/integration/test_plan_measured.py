"""What `cloister plan` says of bytes and memory against what processes use; times are for `benchmarks/plan.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]


def test_bytes_and_memory_are_planned_within_a_quarter() -> None:
    call = [sys.executable, "benchmarks/plan.py", "--tokens", "1200", "--shape", *SHAPES]
    ended = subprocess.run(call, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert ended.stdout, ended.stderr  # its exit code is of the times as well, which a busy machine puts off
    found = json.loads(ended.stdout)
    assert list(found) == SHAPES
    for shape, of_shape in found.items():
        for name in ("party, MiB", "enclave, MiB", "wire, MB"):
            ratio = of_shape["planned / measured"][name]
            assert 0.75 <= ratio <= 1.25, (shape, name, of_shape)


SHAPES = ["128x4x2000/2", "512x6x8000/4", "768x4x16000/1"]
