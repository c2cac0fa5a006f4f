"""A base job of five parties over a tiny model on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from experiments.__main__ import read_job

from cloister.job import Job
from tests.integration.tiny_job import write_job, write_model

PARTIES = ("north", "south", "east", "west", "middle")


@pytest.fixture
def base(tmp_path: Path) -> Job:
    write_model(tmp_path / "model")
    job, layers, cut = read_job(write_job(tmp_path, {"release": {"to": "none"}}, parties=PARTIES), None)
    assert (layers, cut) == (4, 2)
    return job
