"""Memory of party and enclave does not grow with the size of a bundle."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL_MIB, LARGE_MIB = 256, 2048
SLACK_MIB = 64
"""Resident size wavers with the allocator and the page cache of the process; a copy of the data would be 1792 MiB."""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_gibibytes_stream_in_the_memory_of_a_quarter() -> None:
    bench = ROOT / "benchmarks" / "stream.py"
    command = [sys.executable, bench, "--runs", "1", "--mib", str(SMALL_MIB), str(LARGE_MIB)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    small, large = json.loads(done.stdout)
    for stage in ("seal", "upload", "enclave_verify", "enclave_read"):
        assert large[stage]["rss_growth_mib"] < small[stage]["rss_growth_mib"] + SLACK_MIB, stage
    key = "enclave_server_rss_growth_mib"
    assert large[key] < small[key] + SLACK_MIB
