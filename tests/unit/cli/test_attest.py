"""`cloister attest collect | show | verify`: what stands on stdout, exit codes, and that nothing leaves a traceback."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cloister.attest.backends.simulated import InsecureSimulatedAttester, measure_source
from cloister.attest.evidence import Evidence
from cloister.cli import main
from cloister.report.attest import AttestCollectReport, AttestShowReport, AttestVerifyReport
from cloister.report.outputs import ErrorReport
from tests.evidence import EVIDENCE, needs_evidence

NOW = 1_800_000_000
MEASUREMENT, REPORT_DATA = b"m" * 32, bytes(range(64))
SIMULATED = '[policy]\naccept = ["simulated"]\ninsecure_simulated = true\n'
LISTED = f"""{SIMULATED}
[[measurement]]
label = "tests"
type = "simulated"
registers = {{ source = "{MEASUREMENT.hex()}" }}
"""
ANY = '[policy]\naccept = ["tdx", "sgx", "sev-snp", "nitro", "azure-vtpm", "nvidia-gpu"]\nmeasurements = "any"\n'

Cloister = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cloister(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cloister:
    """Runs in a folder with the evidence of a simulated enclave and policies."""
    monkeypatch.chdir(tmp_path)
    made = InsecureSimulatedAttester(measurement=MEASUREMENT, clock=lambda: float(NOW)).collect(REPORT_DATA)
    (tmp_path / "evidence").write_bytes(made.to_bytes())
    (tmp_path / "listed.toml").write_text(LISTED)
    (tmp_path / "any.toml").write_text(ANY)

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return call


def verify(cloister: Cloister, *more: object, evidence: object = "evidence") -> tuple[int, AttestVerifyReport]:
    """(exit code, report); the report has exactly the documented keys."""
    more = more if "--policy" in more else (*more, "--policy", "listed.toml")
    more = more if "--at" in more else (*more, "--at", NOW)
    code, out, err = cloister("attest", "verify", evidence, "--json", *more)
    assert err == ""
    assert set(json.loads(out)) == {
        "schema_version", "accepted", "type", "hardware", "checks", "claims", "error_code"
    }  # fmt: skip
    report = AttestVerifyReport.model_validate_json(out)
    assert (code == 0) == report.accepted == (report.error_code is None) == bool(report.claims)
    assert [check.n for check in report.checks] == list(range(1, len(report.checks) + 1))
    assert all(check.passed and check.reason for check in report.checks[:-1])
    assert report.checks[-1].passed == report.accepted
    return code, report


def test_accepted(cloister: Cloister) -> None:
    code, report = verify(cloister, "--report-data", REPORT_DATA.hex())
    assert (code, report.type, report.hardware) == (0, "simulated", False)
    assert [check.name for check in report.checks] == ["form", "type", "signature", "binding", "age", "measurement"]
    assert report.claims["measurement_label"] == "tests"
    assert report.claims["registers"] == {"source": MEASUREMENT.hex()}


def test_without_report_data_a_warning_says_what_was_not_checked(cloister: Cloister) -> None:
    _, report = verify(cloister)
    assert "binding" not in [check.name for check in report.checks]
    assert any("whom this evidence speaks for" in warning for warning in report.claims["warnings"])


@pytest.mark.parametrize(
    ("more", "name", "code"),
    [
        (("--report-data", "00" * 64), "binding", "binding"),
        (("--report-data", "00"), "binding", "binding"),
        (("--at", NOW + 301), "age", "age"),
        (("--at", NOW - 61), "age", "age"),
        (("--policy", "any.toml"), "type", "type"),
    ],
)
def test_refused_up_to_the_step_that_failed(cloister: Cloister, more: tuple[object, ...], name: str, code: str) -> None:
    exit_code, report = verify(cloister, *more)
    assert (exit_code, report.error_code, report.checks[-1].name) == (3, code, name)
    assert not report.hardware


def test_at_is_now_by_default(cloister: Cloister, tmp_path: Path) -> None:
    fresh = InsecureSimulatedAttester(measurement=MEASUREMENT, clock=time.time).collect(REPORT_DATA)
    (tmp_path / "fresh").write_bytes(fresh.to_bytes())
    for name, code in (("fresh", 0), ("evidence", 3)):
        assert cloister("attest", "verify", name, "--policy", "listed.toml")[0] == code


def test_people_get_numbered_lines(cloister: Cloister) -> None:
    code, out, err = cloister("attest", "verify", "evidence", "--policy", "listed.toml", "--at", NOW)
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines() if line[:2].strip().isdigit()]
    assert [line[:3] for line in lines] == [
        ["1", "form", "pass"], ["2", "type", "pass"], ["3", "signature", "pass"],
        ["4", "age", "pass"], ["5", "measurement", "pass"],
    ]  # fmt: skip
    assert "hides nothing from the operator" in out
    code, out, _ = cloister("attest", "verify", "evidence", "--policy", "listed.toml", "--at", NOW + 301)
    assert code == 3
    assert "REFUSED in step 4 (age), code age" in out
    assert "measurement" not in out  # it did not come to that


@pytest.mark.parametrize("kind", [None, "tdx", "sgx", "sev-snp", "nitro", "tpm", "azure-vtpm", "nvidia-gpu"])
@pytest.mark.parametrize("content", [b"", b"\x00", b"not evidence", b"{}", b"\xff" * 3000, bytes(5 << 20)])
def test_malformed_evidence_is_refused_with_all_that_is_due(
    cloister: Cloister, tmp_path: Path, kind: str | None, content: bytes
) -> None:
    (tmp_path / "bad").write_bytes(content)
    (tmp_path / "all.toml").write_text(
        '[policy]\nmeasurements = "any"\n'
        'accept = ["tdx", "sgx", "sev-snp", "nitro", "tpm", "azure-vtpm", "nvidia-gpu"]\n'
    )
    more = () if kind is None else ("--type", kind)
    code, report = verify(cloister, *more, "--policy", "all.toml", evidence="bad")
    assert (code, report.accepted) == (3, False)


@pytest.mark.parametrize(
    "arguments",
    [
        ("absent", "--policy", "listed.toml"),
        ("evidence", "--policy", "absent.toml"),
        ("evidence",),
        ("evidence", "--policy", "listed.toml", "--collateral", "absent"),
        ("evidence", "--policy", "listed.toml", "--report-data", "zz"),
        ("evidence", "--policy", "listed.toml", "--at", "nan"),
        ("evidence", "--policy", "listed.toml", "--at", "-1"),
        ("evidence", "--policy", "listed.toml", "--at", "inf"),
        ("evidence", "--policy", "listed.toml", "--type", "unknown"),
        (".", "--policy", "listed.toml"),
    ],
)
def test_a_wrong_call_is_no_verdict(cloister: Cloister, arguments: tuple[str, ...]) -> None:
    code, out, _ = cloister("attest", "verify", *arguments, "--json")
    assert (code, ErrorReport.model_validate_json(out).error.code in ("usage", "job")) == (2, True)


def test_the_policy_beside_the_evidence_is_nobodys(cloister: Cloister, tmp_path: Path) -> None:
    """Only the given file counts, whatever lies in the evidence's folder."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "evidence").rename(tmp_path / "folder" / "evidence")
    (tmp_path / "folder" / "policy.toml").write_text(LISTED)
    code, report = verify(cloister, "--policy", "any.toml", evidence="folder/evidence")
    assert (code, report.error_code) == (3, "type")


@needs_evidence
@pytest.mark.parametrize(
    ("kind", "name", "more", "at"),
    [
        ("tdx", "tdx/tdx_quote", ("--collateral", EVIDENCE / "tdx/tdx_quote_collateral.json"), 1_751_000_000),
        ("tdx", "tdx/tdx_quote_v5_gcp.dat",
         ("--collateral", EVIDENCE / "tdx/tdx_quote_outdated_collateral.json"), 1_772_000_000),
        ("sev-snp", "snp/milan_report.bin", ("--endorsement", EVIDENCE / "snp/milan_vcek.der"), 1_765_000_000),
        ("sev-snp", "snp/aws_vlek_report.bin", ("--endorsement", EVIDENCE / "snp/aws_vlek.der"), 1_750_000_000),
        ("azure-vtpm", "azure/az_snp_vtpm.json", (), 1_765_000_000),
        ("nitro", "nitro/nitro_prod_2025.cbor", (), 1_766_678_700),
        ("nvidia-gpu", "nvidia/hopper_gpu_evidence.json", (), 1_765_000_000),
    ],
)  # fmt: skip
def test_vendors_own_files(cloister: Cloister, kind: str, name: str, more: tuple[object, ...], at: int) -> None:
    call = ("--type", kind, *more, "--policy", "any.toml", "--at", at)
    code, report = verify(cloister, *call, evidence=EVIDENCE / name)
    assert (code, report.type, report.hardware) == (0, kind, True), report.checks[-1].reason
    claims = report.claims
    code, bound = verify(cloister, *call, "--report-data", claims["report_data"], evidence=EVIDENCE / name)
    assert (code, "binding" in [check.name for check in bound.checks]) == (0, True)
    shown = cloister("attest", "show", EVIDENCE / name, "--type", kind, "--json")
    said = AttestShowReport.model_validate_json(shown[1])
    assert (said.registers, said.report_data) == (claims["registers"], claims["report_data"])


@needs_evidence
def test_another_vendors_type_is_refused(cloister: Cloister) -> None:
    for kind in ("sgx", "sev-snp", "nitro", "azure-vtpm"):
        code, report = verify(cloister, "--type", kind, "--policy", "any.toml", evidence=EVIDENCE / "tdx/tdx_quote")
        assert (code, report.type) == (3, kind)


@needs_evidence
def test_one_gpu_counts_once(cloister: Cloister, tmp_path: Path) -> None:
    (entry,) = json.loads((EVIDENCE / "nvidia/hopper_gpu_evidence.json").read_bytes())
    (tmp_path / "two").write_text(json.dumps([entry, entry]))
    call = ("--type", "nvidia-gpu", "--policy", "any.toml", "--at", 1_765_000_000)
    code, report = verify(cloister, *call, evidence="two")
    assert (code, report.error_code, report.checks[-1].name) == (3, "devices", "devices differ")


# show -----------------------------------------------------------------------------------------------------------------


def test_show_says_loudly_that_nothing_is_verified(cloister: Cloister) -> None:
    code, out, _ = cloister("attest", "show", "evidence")
    assert (code, "NOT VERIFIED" in out, MEASUREMENT.hex() in out) == (0, True, True)
    report = AttestShowReport.model_validate_json(cloister("attest", "show", "evidence", "--json")[1])
    assert (report.verified, report.report_data, report.measurements) == (False, REPORT_DATA.hex(), [])


def test_show_compares_every_measurement_register_by_register(cloister: Cloister, tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(
        LISTED
        + f"""
[[measurement]]
label = "next version"
type = "simulated"
registers = {{ source = "{"00" * 32}", other = "11" }}
[[measurement]]
label = "another machine"
type = "tdx"
registers = {{ mr_td = "{"00" * 48}" }}
"""
    )
    code, out, _ = cloister("attest", "show", "evidence", "--policy", "policy.toml", "--json")
    found: dict[str, Any] = {m.label: m for m in AttestShowReport.model_validate_json(out).measurements}
    assert code == 0
    assert {label: m.matches for label, m in found.items()} == {
        "tests": True, "next version": False, "another machine": False
    }  # fmt: skip
    rows = [(r.name, r.expected, r.found, r.equal) for r in found["next version"].registers]
    assert rows == [("source", "00" * 32, MEASUREMENT.hex(), False), ("other", "11", None, False)]
    _, text, _ = cloister("attest", "show", "evidence", "--policy", "policy.toml")
    assert "tests (simulated): matches" in text
    assert "next version (simulated): DIFFERS" in text


def test_show_refuses_what_it_cannot_read(cloister: Cloister, tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"x")
    (tmp_path / "unknown").write_bytes(Evidence(type="abacus", blob=b"x").to_bytes())
    for name, code in (("bad", "evidence-format"), ("unknown", "type")):
        exit_code, out, _ = cloister("attest", "show", name, "--json")
        assert (exit_code, ErrorReport.model_validate_json(out).error.code) == (3, code)


# collect --------------------------------------------------------------------------------------------------------------


def test_collected_evidence_verifies(cloister: Cloister, tmp_path: Path) -> None:
    policy = LISTED.replace(MEASUREMENT.hex(), measure_source().hex())
    (tmp_path / "own.toml").write_text(policy)
    simulated = ("--attester", "simulated", "--insecure-simulated")
    code, out, _ = cloister("attest", "collect", "--out", "new", "--report-data", "00ff", *simulated, "--json")
    report = AttestCollectReport.model_validate_json(out)
    assert (code, report.report_data) == (0, "00ff" + "00" * 62)
    assert "protects nothing" in report.attester
    more = ("--policy", "own.toml", "--report-data", report.report_data, "--at", int(time.time()))
    assert verify(cloister, *more, evidence="new")[0] == 0
    again = cloister("attest", "collect", "--out", "new", *simulated)
    assert (again[0], "exists already" in again[2]) == (2, True)
    assert cloister("attest", "collect", "--out", "other", *simulated)[0] == 0
    assert (
        Evidence.from_bytes((tmp_path / "other").read_bytes()).blob
        != Evidence.from_bytes((tmp_path / "new").read_bytes()).blob
    )  # random report data


def test_collect_never_simulates_unless_told_twice(cloister: Cloister, tmp_path: Path) -> None:
    for arguments in (("--attester", "simulated"), ("--attester", "nitro", "--insecure-simulated")):
        assert cloister("attest", "collect", "--out", "new", *arguments)[0] == 2
    long = cloister("attest", "collect", "--out", "new", "--report-data", "00" * 65, "--attester", "nitro")
    assert (long[0], "at most 64 bytes" in long[2]) == (2, True)
    assert not (tmp_path / "new").exists()


def test_the_group_alone_shows_its_help(cloister: Cloister) -> None:
    code, out, _ = cloister("attest")
    assert (code, "collect" in out, "verify" in out) == (0, True, True)
