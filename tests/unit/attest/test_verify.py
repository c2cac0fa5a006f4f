"""Verification and appraisal: each step refuses with its own code, and nothing else passes."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cloister.attest.verify as module
from cloister.attest.backends.simulated import (
    WARNING,
    InsecureSimulatedAttester,
    measure_folder,
    measure_source,
)
from cloister.attest.binding import instance_report_data, session_report_data
from cloister.attest.claims import Claims, Report
from cloister.attest.evidence import Evidence
from cloister.attest.policy import AppraisalPolicy, ReferenceValue
from cloister.attest.verify import VERIFIERS, inspect, verify
from cloister.errors import VerificationError

NOW = 1_800_000_000
MEASUREMENT = b"m" * 32
REPORT_DATA = session_report_data(role="enclave", job_id="ab" * 32, transcript=b"t" * 64)
POLICY = AppraisalPolicy.insecure_simulated_only(MEASUREMENT)


def collect(*, measurement: bytes = MEASUREMENT, report_data: bytes = REPORT_DATA, now: float = NOW) -> Evidence:
    return InsecureSimulatedAttester(measurement=measurement, clock=lambda: now).collect(report_data)


def code(evidence: Evidence, policy: AppraisalPolicy = POLICY, **changes: Any) -> str:
    arguments: dict[str, Any] = {"expected_report_data": REPORT_DATA, "now": NOW, "allow_simulated": True} | changes
    with pytest.raises(VerificationError) as refused:
        verify(evidence, policy, **arguments)
    return refused.value.code


def test_accepted() -> None:
    claims = verify(collect(), POLICY, REPORT_DATA, NOW, allow_simulated=True)
    assert (claims.type, claims.hardware, claims.confidential) == ("simulated", False, False)
    assert claims.registers == {"source": MEASUREMENT.hex()}
    assert (claims.measurement_label, claims.issued_at, claims.verified_at) == ("simulated", NOW, NOW)
    assert claims.policy_sha256 == POLICY.sha256
    assert claims.report_data == REPORT_DATA.hex()
    assert claims.warnings == (WARNING,)
    assert json.loads(json.dumps(claims.to_dict()))["type"] == "simulated"


def test_any_measurement_warns() -> None:
    policy = AppraisalPolicy.insecure_simulated_only()
    claims = verify(collect(), policy, REPORT_DATA, NOW, allow_simulated=True)
    assert claims.measurement_label is None
    assert any("any measurement" in w for w in claims.warnings)


def test_default_deny() -> None:
    assert code(collect(), AppraisalPolicy()) == "type"
    assert code(collect(), AppraisalPolicy(accept=("tdx",), any_measurement=True)) == "type"
    # A type that is accepted but has no verifier; and an accepted type with an empty list of measurements.
    other = dataclasses.replace(collect(), type="other-tee")
    assert code(other, AppraisalPolicy(accept=("other-tee",), any_measurement=True)) == "type"
    nothing_listed = AppraisalPolicy(accept=("simulated",), insecure_simulated=True)
    assert code(collect(), nothing_listed) == "measurement"


def test_simulated_needs_both_permissions() -> None:
    assert code(collect(), allow_simulated=False) == "simulated"
    with pytest.raises(ValueError, match="insecure_simulated"):
        AppraisalPolicy(accept=("simulated",), any_measurement=True)
    # Even a policy object that got around its own check is refused.
    policy = AppraisalPolicy.insecure_simulated_only()
    object.__setattr__(policy, "insecure_simulated", False)
    assert code(collect(), policy) == "simulated"
    # The default of the permission is no.
    with pytest.raises(VerificationError, match="refused"):
        verify(collect(), POLICY, REPORT_DATA, NOW)


def test_binding() -> None:
    others = [
        session_report_data(role="party", job_id="ab" * 32, transcript=b"t" * 64),
        session_report_data(role="enclave", job_id="cd" * 32, transcript=b"t" * 64),
        session_report_data(role="enclave", job_id="ab" * 32, transcript=b"u" * 64),
        bytes(64),
    ]
    assert {code(collect(report_data=other)) for other in others} == {"binding"}
    with pytest.raises(ValueError, match="64"):
        verify(collect(), POLICY, REPORT_DATA[:32], NOW, allow_simulated=True)


def test_inspected_report_data_may_be_filled_up_with_zeros() -> None:
    """As `cloister attest collect` does with what is shorter than 64 bytes; anything else there is refused."""
    evidence = collect(report_data=b"nonce".ljust(64, b"\0"))
    assert inspect(evidence, POLICY, b"nonce", NOW).report_data == evidence_data(evidence)
    for other in (b"nonc", b"nonce\1", b"", REPORT_DATA):
        with pytest.raises(VerificationError) as refused:
            inspect(evidence, POLICY, other, NOW)
        assert refused.value.code == "binding"


def evidence_data(evidence: Evidence) -> str:
    """What the simulated attester signed, hex."""
    return inspect(evidence, POLICY, None, NOW).report_data


@pytest.mark.parametrize(("age_s", "refused"), [(0, False), (300, False), (301, True), (-60, False), (-61, True)])
def test_age(age_s: int, refused: bool) -> None:
    evidence = collect(now=NOW - age_s)
    if refused:
        assert code(evidence) == "age"
    else:
        assert verify(evidence, POLICY, REPORT_DATA, NOW, allow_simulated=True).issued_at == NOW - age_s


def test_measurement() -> None:
    assert code(collect(measurement=b"x" * 32)) == "measurement"
    # A reference value of another type, or one with a register that the report does not have, does not match.
    for value in (
        ReferenceValue(label="x", type="tdx", registers={"source": MEASUREMENT}),
        ReferenceValue(label="x", type="simulated", registers={"source": MEASUREMENT, "rtmr0": MEASUREMENT}),
    ):
        assert code(collect(), dataclasses.replace(POLICY, reference_values=(value,))) == "measurement"
    with pytest.raises(ValueError, match="at least one register"):
        ReferenceValue(label="x", type="simulated", registers={})


def test_devices_collateral_event_log_are_refused() -> None:
    device = Evidence(type="nvidia-gpu", blob=b"")
    assert code(dataclasses.replace(collect(), devices=(device,))) == "devices"
    assert code(dataclasses.replace(collect(), collateral=b"x")) == "evidence-format"
    assert code(dataclasses.replace(collect(), event_log=b"x")) == "evidence-format"


def test_every_altered_byte_and_cut_of_the_blob() -> None:
    evidence = collect()
    for at in range(len(evidence.blob)):
        altered = evidence.blob[:at] + bytes([evidence.blob[at] ^ 1]) + evidence.blob[at + 1 :]
        assert code(dataclasses.replace(evidence, blob=altered)) in ("evidence-format", "signature")
        assert code(dataclasses.replace(evidence, blob=evidence.blob[:at])) == "evidence-format"


@given(st.binary(max_size=200))
def test_random_blobs(blob: bytes) -> None:
    assert code(Evidence(type="simulated", blob=blob)) in ("evidence-format", "signature")


def test_a_backend_cannot_report_another_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """Type confusion: the report must be of the type that its envelope names and the policy accepts."""

    def confused(evidence: Evidence, now: float) -> Report:
        return Report(
            type="tdx", report_data=REPORT_DATA, registers={"source": MEASUREMENT}, hardware=True, confidential=True
        )

    monkeypatch.setattr(module, "VERIFIERS", MappingProxyType({"simulated": confused}))
    assert code(collect()) == "type"


def test_a_new_backend_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    def genuine(evidence: Evidence, now: float) -> Report:
        return Report(
            type="tdx", report_data=REPORT_DATA, registers={"mr_td": MEASUREMENT}, hardware=True, confidential=True
        )

    monkeypatch.setattr(module, "VERIFIERS", MappingProxyType({**VERIFIERS, "tdx": genuine}))
    value = ReferenceValue(label="v1", type="tdx", registers={"mr_td": MEASUREMENT})
    policy = AppraisalPolicy(accept=("tdx",), reference_values=(value,))
    claims = verify(Evidence(type="tdx", blob=b"q"), policy, REPORT_DATA, NOW)
    assert (claims.hardware, claims.confidential, claims.measurement_label) == (True, True, "v1")
    assert isinstance(claims, Claims)


def test_binding_is_unambiguous() -> None:
    """By the book: SHA-512 over length-prefixed fields; moving a byte between fields changes it."""
    fields = (b"cloister report data v1", b"session", b"enclave", b"ab" * 32, b"t" * 64)
    expected = hashlib.sha512(b"".join(len(f).to_bytes(8, "big") + f for f in fields)).digest()
    assert expected == REPORT_DATA
    base: dict[str, Any] = {
        "job_id": "ab" * 32,
        "instance_id": b"i" * 16,
        "signing_key": b"s" * 32,
        "hpke_key": b"h",
        "nonce": b"n" * 16,
    }
    shifted = base | {"signing_key": b"s" * 31, "hpke_key": b"sh"}
    changed = [base | {k: v * 2} for k, v in base.items()]
    make: Callable[..., bytes] = instance_report_data
    assert len({make(**b) for b in (base, shifted, *changed)}) == 7
    with pytest.raises(ValueError, match="16 bytes"):
        make(**base | {"nonce": b"short"})


def test_measure_source(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a.py").write_text("x")
    (tmp_path / "b" / "c.py").write_text("y")
    first = measure_folder(tmp_path)
    (tmp_path / "notes.txt").write_text("not code")
    assert measure_folder(tmp_path) == first
    (tmp_path / "b" / "c.py").write_text("z")
    changed = measure_folder(tmp_path)
    (tmp_path / "b" / "c.py").rename(tmp_path / "b" / "d.py")
    assert len({first, changed, measure_folder(tmp_path)}) == 3
    assert len(measure_source()) == 32
