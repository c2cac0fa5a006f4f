"""Results as people see them: nothing left out, every number with its interval, no protection claimed that was not."""

from __future__ import annotations

import io
from datetime import UTC, datetime

import pytest
from rich.console import Console

from cloister.cli.tables import duration, render, size
from cloister.report.model import Attestation, Output, ResultRow
from cloister.report.outputs import (
    EvaluateReport,
    ExportedFile,
    ExportReport,
    Generated,
    GenerateReport,
    Signer,
    VerifyCheck,
    VerifyReport,
)

HASH = "0" * 64
NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)
SIMULATED = Attestation(
    type="simulated", hardware=False, confidential=False, measurement="source=12", policy_sha256=HASH
)
REAL = SIMULATED.model_copy(update={"type": "tdx", "hardware": True, "confidential": True})


def shown(output: Output) -> str:
    screen = io.StringIO()
    console = Console(file=screen, width=120)
    console.print(render(output, 120))
    return screen.getvalue()


def scored(party: str, task: str, accuracy: float | None) -> ResultRow:
    interval = None if accuracy is None else (accuracy - 0.1, accuracy + 0.1)
    return ResultRow(
        system="cloister", party=party, task=task, examples=1234, bits_per_byte=1.25, bits_per_byte_ci=(1.2, 1.3),
        accuracy=accuracy, accuracy_ci=interval,
    )  # fmt: skip


def test_scores_carry_intervals_and_the_pool_comes_last() -> None:
    rows = [scored("all", "all", None), scored("north", "all", 0.5), scored("[b]", "triage", 0.75)]
    text = shown(EvaluateReport(source="runs/one", job_id=HASH, results=rows, warnings=["few"]))
    lines = [line.split() for line in text.splitlines() if "cloister" in line]
    assert [line[0] for line in lines] == ["[b]", "north", "all"]
    assert lines[1][2:] == ["cloister", "1,234", "1.2500", "[1.2000,", "1.3000]", "0.500", "[0.400,", "0.600]"]
    assert lines[2][-1] == "1.3000]", "an absent accuracy is an empty cell"
    assert "warning: few" in text


@pytest.mark.parametrize(("attestation", "loud"), [(SIMULATED, True), (REAL, False)])
def test_a_simulated_enclave_is_loud_and_a_real_one_is_named(attestation: Attestation, loud: bool) -> None:
    verified = VerifyReport(
        path="runs/one", verdict="verified", policy="p.toml", valid_at=NOON, job_id=HASH, adapter_sha256=HASH,
        attestation=attestation, signers=[Signer(party="north", public_key_fingerprint="ab cd", vouched_at=NOON)],
        checks=[VerifyCheck(n=6, name="evidence", status="ok", detail="[x]")],
    )  # fmt: skip
    answers = [Generated(prompt="p", response="an [answer]", tokens=3, finish="end", seconds=0.5)]
    generated = GenerateReport(job_id=HASH, party="north", attestation=attestation, answers=answers)
    for output in (verified, generated):
        assert ("SIMULATED ENCLAVE: nothing was protected" in shown(output)) is loud
        assert ("attested by tdx" in shown(output)) is not loud
    assert "an [answer]" in shown(generated)
    assert "[x]" in shown(verified)
    assert "valid at 2026-11-21 12:00:00 UTC, vouched for by north" in shown(verified)
    assert "north: key ab cd" in shown(verified)


def test_a_refusal_names_the_steps_that_failed() -> None:
    checks = [
        VerifyCheck(n=5, name="instance", status="failed", detail="no"),
        VerifyCheck(n=6, name="evidence", status="skipped", detail="-"),
    ]
    refused = VerifyReport(
        path="x", verdict="refused", policy="none", valid_at=None, job_id=None, adapter_sha256=None, attestation=None,
        signers=[], checks=checks,
    )  # fmt: skip
    text = shown(refused)
    assert "REFUSED: failed in step 5 (instance)" in text
    assert "evidence)" not in text


def test_exported_files_are_listed_with_sizes_and_hashes() -> None:
    file = ExportedFile(path="adapter_model.safetensors", bytes=3 << 20, sha256="ab" * 32)
    text = shown(ExportReport(job_id=HASH, kind="adapter", path="out", adapter_sha256=HASH, files=[file]))
    assert "adapter_model.safetensors" in text
    assert "3.0 MiB" in text
    assert "ab" * 32 in text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2 << 30, "2.0 GiB"), (5 << 50, "5120.0 TiB")]
)
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "?"), (0.25, "0.2 s"), (119.0, "119.0 s"), (600.0, "10 min"), (9000.0, "2.5 h")]
)
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text
