"""Real vendor evidence for tests. It is not ours to ship, so it lies beside the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

EVIDENCE = Path(os.environ.get("CLOISTER_EVIDENCE", Path(__file__).parents[2] / "shared" / "evidence"))

needs_evidence = pytest.mark.skipif(
    not EVIDENCE.is_dir(),
    reason=f"no vendor evidence in {EVIDENCE}: put the samples there, or name their folder in CLOISTER_EVIDENCE",
)


def sample(name: str) -> bytes:
    """A sample's bytes, by its path inside the folder."""
    return (EVIDENCE / name).read_bytes()
