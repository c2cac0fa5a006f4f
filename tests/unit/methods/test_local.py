"""What `run` makes of a job before any process starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloister.errors import JobError
from cloister.jobfile import load_job
from cloister.methods.local import run_job
from cloister.progress import Silent
from tests.integration.tiny_job import write_job


@pytest.mark.parametrize("attester", ["tpm", "tdx", "sev-snp", "sgx", "nitro", "dstack"])
def test_hardware_needs_a_policy_of_the_users_own(tmp_path: Path, base_folder: Path, attester: str) -> None:
    """One is made up for the simulation only: it could not say which machine or program to accept."""
    job = write_job(tmp_path, {"model": {"path": str(base_folder)}, "enclave": {"attester": attester}})
    with pytest.raises(JobError, match="no appraisal policy") as refused:
        run_job(load_job(job), tmp_path / "out", serve=False, command="", progress=Silent())
    assert "[enclave]" in refused.value.where
    assert not (tmp_path / "out" / "policy.toml").exists()
    assert not (tmp_path / "out" / "logs").exists()
