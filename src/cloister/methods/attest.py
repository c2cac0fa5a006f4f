"""What `cloister attest` does with evidence in files: verify, show, collect, fetch endorsements.

`verify` is for people: the same verifiers and policy as in a session, every step reported. `show` verifies nothing
and says so. Only `fetch` uses the network; a verifier never does.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cloister.attest.attester import AttesterKind, find_attester
from cloister.attest.checks import Checks
from cloister.attest.claims import Claims
from cloister.attest.collateral import Fetcher, Services, collateral_for
from cloister.attest.evidence import REPORT_DATA_BYTES, Evidence
from cloister.attest.policy import AppraisalPolicy, ReferenceValue
from cloister.attest.unverified import describe
from cloister.attest.vendor_files import MAX_FILE_BYTES, Files, read_envelope, read_vendor
from cloister.attest.verify import inspect
from cloister.errors import UsageError, VerificationError
from cloister.report.attest import (
    AttestCheck,
    AttestCollectReport,
    AttestFetchReport,
    AttestShowReport,
    AttestVerifyReport,
    MeasurementDiff,
    RegisterDiff,
)


@dataclass(frozen=True, kw_only=True)
class Paths:
    """Where the parts of evidence lie; `kind` is the vendor's format, None for our envelope."""

    evidence: Path
    kind: str | None = None
    collateral: Path | None = None
    endorsement: Path | None = None
    event_log: Path | None = None


def verify_evidence(paths: Paths, *, policy: Path, at: float, report_data: bytes | None) -> AttestVerifyReport:
    """Verify evidence at a given time, by the policy given.

    Args:
        at: seconds since 1970. report_data: what it must be bound to; None: the binding is not checked.

    Returns:
        A report, also of a refusal.

    Raises:
        UsageError: a file cannot be read. JobError: the policy cannot.
    """
    appraisal, files, checks = AppraisalPolicy.load(policy), _read_files(paths), Checks()
    kind, claims, code = paths.kind or "", None, None
    try:
        with checks.step("form") as step:
            found = _parse(paths.kind, files)
            kind = found[0].type
            step.reason = f"evidence of type {kind}, {sum(len(e.blob) for e in found)} bytes"
        claims = _merge([inspect(e, appraisal, report_data, at, checks=checks) for e in found], checks)
    except VerificationError as exc:
        code = exc.code
    return AttestVerifyReport(
        accepted=claims is not None,
        type=kind,
        hardware=claims is not None and claims.hardware,
        checks=[AttestCheck(n=c.n, name=c.name, passed=c.passed, reason=c.reason) for c in checks.done],
        claims={} if claims is None else claims.to_dict(),
        error_code=code,
    )


def show_evidence(paths: Paths, *, policy: Path | None) -> AttestShowReport:
    """Say what evidence says about itself, and how far that is from the policy's reference values.

    Raises:
        UsageError: a file cannot be read. JobError: the policy cannot. VerificationError: the evidence is malformed.
    """
    values = () if policy is None else AppraisalPolicy.load(policy).reference_values
    evidence, *more = _parse(paths.kind, _read_files(paths))
    said = describe(evidence)
    return AttestShowReport(
        path=str(paths.evidence),
        type=evidence.type,
        report_data=said.report_data.hex(),
        registers={name: value.hex() for name, value in said.registers.items()},
        details=dict(said.details),
        sizes={name: len(getattr(evidence, name)) for name in ("blob", "collateral", "event_log")},
        devices=[device.type for device in (*evidence.devices, *more)],
        measurements=[_diff(value, evidence.type, said.registers) for value in values],
    )


def collect_evidence(
    out: Path,
    *,
    attester: AttesterKind,
    report_data: bytes | None,
    allow_simulated: bool,
    tpm: str | None = None,
    collateral: Path | None = None,
    gpus: bool = False,
    root: Path = Path("/"),
) -> AttestCollectReport:
    """Write evidence of this machine to a new file, in our envelope.

    Args:
        report_data: at most 64 bytes, filled up with zeros; None draws random ones.

    Raises:
        UsageError: there is nothing to collect from, or the file cannot be written.
    """
    bound = (
        secrets.token_bytes(REPORT_DATA_BYTES) if report_data is None else report_data.ljust(REPORT_DATA_BYTES, b"\0")
    )
    if len(bound) != REPORT_DATA_BYTES:
        raise UsageError(f"report data has at most {REPORT_DATA_BYTES} bytes", where="--report-data")
    found = find_attester(
        attester, allow_simulated=allow_simulated, root=root, tpm=tpm, collateral=collateral, gpus=gpus
    )
    encoded = found.attester.collect(bound).to_bytes()
    write_new(out, encoded)
    return AttestCollectReport(
        path=str(out), type=found.attester.type, attester=found.how, report_data=bound.hex(), bytes=len(encoded)
    )


def fetch_collateral(
    paths: Paths, out: Path, *, embed: bool, cache: Path | None, services: Services | None = None
) -> AttestFetchReport:
    """Ask the vendor's service for the endorsements of evidence and write them to a new file.

    Args:
        embed: write the evidence with the endorsements inside, in our envelope. cache: folder that remembers answers.

    Raises:
        UsageError: there is nothing to fetch for it. TransportError: the service does not answer.
        VerificationError: the evidence is malformed.
    """
    evidence = read_evidence(paths)
    fetcher = Fetcher(services=services or Services(), cache=cache)
    collateral = collateral_for(evidence, fetcher)
    content = replace(evidence, collateral=collateral).to_bytes() if embed else collateral
    write_new(out, content)
    return AttestFetchReport(
        path=str(out), type=evidence.type, embedded=embed, sources=fetcher.sources, bytes=len(content)
    )


def write_new(path: Path, content: bytes) -> None:
    """Write a file that must not exist. Raises: UsageError."""
    try:
        with path.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError as exc:
        raise UsageError("the file exists already", where=str(path), hint="choose another path") from exc
    except OSError as exc:
        raise UsageError(f"cannot write the file: {exc.strerror}", where=str(path)) from exc


def read_evidence(paths: Paths) -> Evidence:
    """The evidence in a file, unverified. Raises: UsageError, VerificationError("evidence-format")."""
    return _parse(paths.kind, _read_files(paths))[0]


def _parse(kind: str | None, files: Files) -> Sequence[Evidence]:
    return (read_envelope(files),) if kind is None else read_vendor(kind, files)


def _read_files(paths: Paths) -> Files:
    return Files(
        evidence=read_file(paths.evidence),
        collateral=read_file(paths.collateral),
        endorsement=read_file(paths.endorsement),
        event_log=read_file(paths.event_log),
    )


def read_file(path: Path | None) -> bytes:
    """A whole file, cut behind the largest size that can be right; empty without a path. Raises: UsageError."""
    if path is None:
        return b""
    try:
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES + 1)
    except OSError as exc:
        raise UsageError(f"cannot read the file: {exc.strerror}", where=str(path)) from exc


def _merge(claims: Sequence[Claims], checks: Checks) -> Claims:
    """The claims of several accelerators in one file: the first one's, with the facts of every device.

    Raises: VerificationError("devices"): one is there twice.
    """
    first = claims[0]
    if len(claims) == 1:
        return first
    with checks.step("devices differ") as step:
        if len({c.tcb["identity"] for c in claims}) != len(claims):
            raise VerificationError("devices", "one GPU attested more than once")
        step.reason = f"{len(claims)} different ones"
    return replace(first, devices=tuple({"type": c.type, **c.tcb} for c in claims))


def _diff(value: ReferenceValue, kind: str, found: Mapping[str, bytes]) -> MeasurementDiff:
    rows = [
        RegisterDiff(
            name=name,
            expected=expected.hex(),
            found=found[name].hex() if name in found else None,
            equal=found.get(name) == expected,
        )
        for name, expected in value.registers.items()
    ]
    matches = value.type == kind and all(row.equal for row in rows)
    return MeasurementDiff(label=value.label, type=value.type, matches=matches, registers=rows)
