"""Verifying evidence: "is it genuine?" first (a backend's verifier), then "do I accept it?" (the policy).

Guarantees: Claims only for evidence of a type that the policy names, genuine, bound to exactly what the caller
expected, fresh, and with a measurement that the policy lists. Everything else is a VerificationError whose code says
which step refused. Left to the caller: an `expected_report_data` that contains something it drew at random.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hmac import compare_digest
from types import MappingProxyType

from cloister.attest.backends import simulated
from cloister.attest.claims import Claims, Report
from cloister.attest.evidence import REPORT_DATA_BYTES, Evidence
from cloister.attest.policy import SIMULATED, AppraisalPolicy
from cloister.errors import VerificationError

Verifier = Callable[[Evidence, float], Report]
"""Pure: (evidence, now in seconds since 1970) -> Report, or VerificationError. It reads no clock and no file."""

VERIFIERS: Mapping[str, Verifier] = MappingProxyType({SIMULATED: simulated.verify})
"""By type of evidence. A new backend is one entry here."""

MAX_CLOCK_SKEW_S = 60
"""How far ahead of ours an attester's clock may be."""


def verify(
    evidence: Evidence,
    policy: AppraisalPolicy,
    expected_report_data: bytes,
    now: float,
    *,
    allow_simulated: bool = False,
) -> Claims:
    """Return what may be relied on.

    Args:
        evidence: unverified. policy: the relying party's own. now: seconds since 1970, from a clock it trusts.
        expected_report_data: 64 bytes from `attest.binding`.
        allow_simulated: the caller's permission for evidence that proves nothing; the policy must agree.
    Raises: VerificationError with code "type", "simulated", "devices", "binding", "age", "measurement" or one of
        the backend's.
    """
    if len(expected_report_data) != REPORT_DATA_BYTES:
        raise ValueError(f"report data has {REPORT_DATA_BYTES} bytes")
    # (1) The policy names this type; nobody parses what it does not name.
    if evidence.type not in policy.accept or evidence.type not in VERIFIERS:
        hint = f"the policy accepts: {', '.join(policy.accept) or 'nothing'}"
        raise VerificationError("type", f"evidence of type {evidence.type!r} is not accepted", hint=hint)
    # (2) Simulated evidence needs two permissions: the policy's and the caller's.
    if evidence.type == SIMULATED and not (policy.insecure_simulated and allow_simulated):
        hint = "simulated evidence proves nothing; for a test, pass --insecure-simulated"
        raise VerificationError("simulated", "simulated evidence is refused", hint=hint)
    # (3) No verifier for devices exists, so no claim about them can be made.
    if evidence.devices:
        raise VerificationError("devices", "evidence of devices is not accepted by this policy")
    # (4) Genuine: made by an attester of this type, unaltered.
    report = VERIFIERS[evidence.type](evidence, now)
    if report.type != evidence.type:
        raise VerificationError("type", "the report is of another type than its envelope says")
    # (5) Bound to what we expect: this session or these keys.
    if not compare_digest(report.report_data, expected_report_data):
        hint = "it was made for another session, job, role or key: it may have been replayed or relayed"
        raise VerificationError("binding", "the evidence is not bound to this exchange", hint=hint)
    # (6) Fresh, where it is dated.
    _check_age(report, policy, now)
    # (7) Accepted: the measurement is listed.
    label, warnings = _match_measurement(report, policy)
    return Claims(
        type=report.type,
        hardware=report.hardware,
        confidential=report.confidential,
        registers=MappingProxyType({name: value.hex() for name, value in report.registers.items()}),
        measurement_label=label,
        report_data=report.report_data.hex(),
        issued_at=report.issued_at,
        verified_at=int(now),
        policy_sha256=policy.sha256,
        tcb=report.tcb,
        warnings=report.warnings + warnings,
    )


def _check_age(report: Report, policy: AppraisalPolicy, now: float) -> None:
    if report.issued_at is None:
        return
    age_s = now - report.issued_at
    if age_s > policy.max_age_s:
        hint = "compare the clocks of both machines"
        raise VerificationError("age", f"the evidence is {age_s:.0f} s old, allowed are {policy.max_age_s}", hint=hint)
    if age_s < -MAX_CLOCK_SKEW_S:
        hint = "compare the clocks of both machines"
        raise VerificationError("age", f"the evidence is dated {-age_s:.0f} s in the future", hint=hint)


def _match_measurement(report: Report, policy: AppraisalPolicy) -> tuple[str | None, tuple[str, ...]]:
    if policy.any_measurement:
        return None, ("the policy accepts any measurement: which program runs was not checked",)
    for value in policy.reference_values:
        if value.type == report.type and all(report.registers.get(n) == v for n, v in value.registers.items()):
            return value.label, ()
    measured = ", ".join(f"{name} {value.hex()}" for name, value in report.registers.items())
    raise VerificationError(
        "measurement",
        f"the policy lists no such measurement: {measured}",
        hint="the enclave runs another program than the policy names; compare versions before you change the policy",
    )
