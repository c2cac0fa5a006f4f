"""Verifying evidence: "is it genuine?" first (a backend's verifier), then "do I accept it?" (the policy).

Guarantees: Claims only for evidence of a type that the policy names, genuine, bound to exactly what the caller
expected, fresh, and with a measurement that the policy lists. Everything else is a VerificationError whose code says
which step refused. Left to the caller: an `expected_report_data` that contains something it drew at random.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from cloister.attest.appraisal import Appraisal, Verifier
from cloister.attest.backends import azure_vtpm, dcap, nitro, nvidia_gpu, sev_snp, simulated, tpm
from cloister.attest.binding import device_nonce, is_bound
from cloister.attest.checks import Checks
from cloister.attest.claims import Claims, Report
from cloister.attest.evidence import REPORT_DATA_BYTES, Evidence
from cloister.attest.policy import SIMULATED, AppraisalPolicy
from cloister.attest.roots import TrustRoots, vendor_roots
from cloister.errors import VerificationError

VERIFIERS: Mapping[str, Verifier] = MappingProxyType(
    {
        SIMULATED: simulated.verify,
        "tdx": dcap.verify_tdx,
        "sgx": dcap.verify_sgx,
        sev_snp.TYPE: sev_snp.verify,
        azure_vtpm.TYPE: azure_vtpm.verify,
        nitro.TYPE: nitro.verify,
        tpm.TYPE: tpm.verify,
    }
)
"""By type of evidence of a machine. A new backend is one entry here."""

DEVICE_VERIFIERS: Mapping[str, Verifier] = MappingProxyType({nvidia_gpu.TYPE: nvidia_gpu.verify})
"""By type of evidence of an accelerator, which says nothing without its machine's."""

MAX_CLOCK_SKEW_S = 60
"""How far ahead of ours an attester's clock may be."""


def verify(
    evidence: Evidence,
    policy: AppraisalPolicy,
    expected_report_data: bytes,
    now: float,
    *,
    allow_simulated: bool = False,
    roots: TrustRoots | None = None,
    checks: Checks | None = None,
) -> Claims:
    """Return what may be relied on.

    Args:
        evidence: unverified. policy: the relying party's own. now: seconds since 1970, from a clock it trusts.
        expected_report_data: 64 bytes from `attest.binding`.
        allow_simulated: the caller's permission for evidence that proves nothing; the policy must agree.
        roots: whom to trust instead of the vendors (tests). checks: where to record each step.
    Raises: VerificationError with code "type", "simulated", "devices", "binding", "age", "measurement" or one of
        the backend's.
    """
    if len(expected_report_data) != REPORT_DATA_BYTES:
        raise ValueError(f"report data has {REPORT_DATA_BYTES} bytes")
    appraisal = _begin(policy, now, roots, checks)
    with appraisal.checks.step("type") as step:
        _check_type(evidence, policy, allow_simulated)
        step.reason = f"the policy accepts evidence of type {evidence.type}"
    return _appraise(evidence, VERIFIERS[evidence.type], policy, expected_report_data, appraisal)


def inspect(
    evidence: Evidence,
    policy: AppraisalPolicy,
    expected_report_data: bytes | None,
    now: float,
    *,
    roots: TrustRoots | None = None,
    checks: Checks | None = None,
) -> Claims:
    """Verify evidence that lies on the desk, for people, never to open a session.

    Differs from `verify`: without `expected_report_data` the binding is not checked, report data may have any
    length, evidence of an accelerator alone is accepted; for each of these the claims carry a warning.

    Raises: as `verify`.
    """
    appraisal = _begin(policy, now, roots, checks)
    with appraisal.checks.step("type") as step:
        alone = evidence.type in DEVICE_VERIFIERS
        _check_type(evidence, policy, allow_simulated=True, verifiers=DEVICE_VERIFIERS if alone else VERIFIERS)
        step.reason = f"the policy accepts evidence of type {evidence.type}"
    verifier = DEVICE_VERIFIERS[evidence.type] if alone else VERIFIERS[evidence.type]
    return _appraise(evidence, verifier, policy, expected_report_data, appraisal, alone=alone)


def _begin(policy: AppraisalPolicy, now: float, roots: TrustRoots | None, checks: Checks | None) -> Appraisal:
    return Appraisal(
        rules=policy.rules,
        roots=roots or vendor_roots(),
        now=now,
        any_measurement=policy.any_measurement,
        checks=checks or Checks(),
    )


def _appraise(
    evidence: Evidence,
    verifier: Verifier,
    policy: AppraisalPolicy,
    expected: bytes | None,
    appraisal: Appraisal,
    *,
    alone: bool = False,
) -> Claims:
    """Steps after "the policy names this type", in this order."""
    checks, now = appraisal.checks, appraisal.now
    # (1) Genuine: made by an attester of this type, unaltered, in a state that the rules accept.
    report = verifier(evidence, appraisal)
    if report.type != evidence.type:
        raise VerificationError("type", "the report is of another type than its envelope says")
    notes: list[str] = []
    # (2) Bound to what we expect: this session or these keys.
    if expected is None:
        notes.append("no expected report data was given: whom this evidence speaks for was not checked")
    else:
        with checks.step("binding") as step:
            _check_binding(report, expected)
            step.reason = "the report data are the expected ones"
    # (3) Devices are as many as promised, different, genuine, and bound to this very report.
    if alone:
        notes.append("evidence of an accelerator alone says nothing about the machine that it is in")
        devices: list[Report] = []
    else:
        devices = _verify_devices(evidence, report, policy, appraisal)
        notes += dict.fromkeys(warning for device in devices for warning in device.warnings)
    # (4) Fresh, where it is dated.
    if report.issued_at is not None:
        with checks.step("age") as step:
            _check_age(report.issued_at, policy, now)
            step.reason = f"{max(0, now - report.issued_at):.0f} s old, allowed are {policy.max_age_s}"
    # (5) Accepted: the measurement is listed.
    with checks.step("measurement") as step:
        label = _match_measurement(report, policy)
        step.reason = f"it is {label}" if label else "the policy accepts ANY measurement: which program runs is unknown"
    if label is None:
        notes.append("the policy accepts any measurement: which program runs was not checked")
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
        warnings=report.warnings + tuple(notes),
        devices=tuple(MappingProxyType({"type": d.type, **d.tcb}) for d in devices),
    )


def _check_type(
    evidence: Evidence,
    policy: AppraisalPolicy,
    allow_simulated: bool,
    verifiers: Mapping[str, Verifier] | None = None,
) -> None:
    """Nobody parses what the policy does not name; simulated evidence needs two permissions."""
    if evidence.type not in policy.accept or evidence.type not in (VERIFIERS if verifiers is None else verifiers):
        hint = f"the policy accepts: {', '.join(policy.accept) or 'nothing'}"
        raise VerificationError("type", f"evidence of type {evidence.type!r} is not accepted", hint=hint)
    if evidence.type == SIMULATED and not (policy.insecure_simulated and allow_simulated):
        hint = "simulated evidence proves nothing; for a test, pass --insecure-simulated"
        raise VerificationError("simulated", "simulated evidence is refused", hint=hint)


def _check_binding(report: Report, expected: bytes) -> None:
    # Shorter ones, which only `inspect` lets through, may have been filled up with zeros by the collector.
    filled = expected.ljust(REPORT_DATA_BYTES, b"\0")
    if not (is_bound(report.report_data, expected) or is_bound(report.report_data, filled)):
        hint = "it was made for another session, job, role or key: it may have been replayed or relayed"
        raise VerificationError("binding", "the evidence is not bound to this exchange", hint=hint)


def _verify_devices(evidence: Evidence, machine: Report, policy: AppraisalPolicy, appraisal: Appraisal) -> list[Report]:
    promised = policy.rules.nvidia_gpu.count
    if not evidence.devices and not promised:
        return []
    with appraisal.checks.step("devices") as step:
        if not promised:
            hint = "set count in [nvidia-gpu] of the policy to the number of GPUs that you expect"
            raise VerificationError("devices", "evidence of devices is not accepted by this policy", hint=hint)
        if len(evidence.devices) < promised:
            raise VerificationError("devices", f"{len(evidence.devices)} of {promised} GPUs attested")
        step.reason = f"{len(evidence.devices)} GPUs attested, {promised} are needed"
    reports = [_verify_device(device, machine, policy, appraisal) for device in evidence.devices]
    with appraisal.checks.step("devices differ") as step:
        if len({report.tcb["identity"] for report in reports}) != len(reports):
            raise VerificationError("devices", "one GPU attested more than once")
        step.reason = "every GPU is another one"
    return reports


def _verify_device(device: Evidence, machine: Report, policy: AppraisalPolicy, appraisal: Appraisal) -> Report:
    if device.type not in DEVICE_VERIFIERS:
        raise VerificationError("devices", f"evidence of a device of type {device.type!r} is not accepted")
    report = DEVICE_VERIFIERS[device.type](device, appraisal)
    with appraisal.checks.step(f"{device.type} binding") as step:
        if not is_bound(report.report_data, device_nonce(machine.report_data)):
            hint = "its nonce must derive from the report data of the CPU's evidence"
            raise VerificationError("devices", "a GPU's evidence is not bound to its machine's", hint=hint)
        step.reason = "its nonce derives from the machine's report data"
    if any(value.type == device.type for value in policy.reference_values):
        with appraisal.checks.step(f"{device.type} measurement") as step:
            step.reason = f"it is {_match_measurement(report, policy)}"
    return report


def _check_age(issued_at: int, policy: AppraisalPolicy, now: float) -> None:
    age_s, hint = now - issued_at, "compare the clocks of both machines"
    if age_s > policy.max_age_s:
        raise VerificationError("age", f"the evidence is {age_s:.0f} s old, allowed are {policy.max_age_s}", hint=hint)
    if age_s < -MAX_CLOCK_SKEW_S:
        raise VerificationError("age", f"the evidence is dated {-age_s:.0f} s in the future", hint=hint)


def _match_measurement(report: Report, policy: AppraisalPolicy) -> str | None:
    """The label of the reference value that matches; None where the policy takes any."""
    if policy.any_measurement:
        return None
    for value in policy.reference_values:
        if value.type == report.type and all(report.registers.get(n) == v for n, v in value.registers.items()):
            return value.label
    measured = ", ".join(f"{name} {value.hex()}" for name, value in report.registers.items())
    raise VerificationError(
        "measurement",
        f"the policy lists no such measurement: {measured}",
        hint="the enclave runs another program than the policy names; compare versions before you change the policy",
    )
