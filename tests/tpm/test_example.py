"""The example as its README says: five parties, an enclave measured by a software TPM, the receipt checked after it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.tpm, pytest.mark.integration, pytest.mark.timeout(1800)]
EXAMPLE = Path(__file__).parents[2] / "examples" / "tpm"
BIN = Path(sys.executable).parent


def verify_receipt(out: Path, policy: Path) -> tuple[int, str]:
    command = [str(BIN / "cloister"), "verify", str(out), "--policy", str(policy), "--json"]
    run = subprocess.run(command, capture_output=True, text=True)
    return run.returncode, run.stdout


def test_the_example_runs(tmp_path: Path) -> None:
    out = tmp_path / "run"
    environment = os.environ | {"CLOISTER_BIN": str(BIN)}
    run = subprocess.run([str(EXAMPLE / "run.sh"), str(out)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    policy = EXAMPLE / "policy.toml"
    code, _ = verify_receipt(out, policy)
    attestation = json.loads((out / "report.json").read_text())["attestation"]
    assert (code, attestation["type"], attestation["confidential"]) == (0, "tpm", False)
    # Under a policy with another TPM's key, or another program, the same receipt is worth nothing.
    text = policy.read_text()
    for start, why in (('attestation_keys = ["000b', "is not enrolled"), ('pcr14 = "', "no such measurement")):
        at = text.index(start) + len(start)
        changed = tmp_path / "other.toml"
        changed.write_text(text[:at] + ("0" if text[at] != "0" else "1") + text[at + 1 :])
        code, printed = verify_receipt(out, changed)
        assert code == 3
        assert why in printed
