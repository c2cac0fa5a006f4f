"""What `cloister attest enrol` does: a TPM's attestation key, enrolled on one machine or across two.

Across machines four steps alternate, each with a file: `request` where the TPM is, `challenge` at the verifier,
`answer` where the TPM is, `finish` at the verifier.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from cryptography import x509

from cloister.attest import enrol_files
from cloister.attest.enrol import Enrolment, answer, challenge, enrol, identity
from cloister.errors import UsageError, VerificationError
from cloister.methods.attest import read_file, write_new
from cloister.report.attest import AttestEnrolReport, AttestEnrolStepReport
from cloister.tpm.commands import Tpm

_T = TypeVar("_T")


def enrol_tpm(tpm: str, manufacturers: Sequence[Path]) -> AttestEnrolReport:
    """Activate a credential with this machine's TPM, so that its attestation key may stand in a policy.

    Args:
        tpm: its address. manufacturers: certificates (PEM) of those who may vouch for it; none: nobody does.

    Raises:
        VerificationError: the keys are not those of one TPM. UsageError, TransportError: there is none that answers.
    """
    return _report(enrol(tpm, manufacturers=_certificates(manufacturers)), tpm)


def request(tpm: str, out: Path) -> AttestEnrolStepReport:
    """Write what this machine's TPM says about itself. Raises: UsageError, TransportError: none answers."""
    with Tpm.open(tpm) as opened:
        said = identity(opened)
    write_new(out, enrol_files.encode_request(said))
    return AttestEnrolStepReport(step="request", path=str(out), next="send it to the verifier, for `challenge`")


def make_challenge(file: Path, out: Path, pending: Path, manufacturers: Sequence[Path]) -> AttestEnrolStepReport:
    """Challenge the TPM that a request is from.

    Args:
        pending: what this machine keeps, to compare the answer with.
    Raises: VerificationError: no TPM's keys, or none of the manufacturers vouches for it. UsageError: a file.
    """
    certificates = _certificates(manufacturers)
    said = _decode(file, enrol_files.decode_request)
    made, kept = challenge(said, manufacturers=certificates, now=time.time())
    write_new(pending, enrol_files.encode_pending(kept))
    write_new(out, enrol_files.encode_challenge(made))
    return AttestEnrolStepReport(
        step="challenge", path=str(out), next=f"send it back, for `answer`, and keep {pending} here, for `finish`"
    )


def give_answer(tpm: str, file: Path, out: Path) -> AttestEnrolStepReport:
    """Have this machine's TPM decrypt a challenge.

    Raises: VerificationError: the challenge is malformed. TpmError: it is for another TPM. UsageError, TransportError.
    """
    made = _decode(file, enrol_files.decode_challenge)
    with Tpm.open(tpm) as opened:
        secret = answer(opened, made)
    write_new(out, enrol_files.encode_answer(secret))
    return AttestEnrolStepReport(step="answer", path=str(out), next="send it to the verifier, for `finish`")


def finish(file: Path, pending: Path, out: Path | None) -> AttestEnrolReport:
    """Compare an answer with what this machine kept.

    Args:
        out: a new file for the policy's table, if wanted.
    Raises: VerificationError: the answer is not that of the challenged TPM. UsageError: a file.
    """
    kept = _decode(pending, enrol_files.decode_pending)
    report = _report(kept.check(_decode(file, enrol_files.decode_answer)), None)
    if out is not None:
        write_new(out, report.policy.encode())
    return report


def _report(enrolment: Enrolment, tpm: str | None) -> AttestEnrolReport:
    return AttestEnrolReport(
        attestation_key=enrolment.attestation_key,
        endorsement_key=enrolment.endorsement_key,
        endorsed=enrolment.endorsed,
        tpm=tpm,
        policy=enrolment.to_toml(),
    )


def _certificates(paths: Sequence[Path]) -> list[x509.Certificate]:
    found = []
    for path in paths:
        try:
            found += x509.load_pem_x509_certificates(read_file(path))
        except ValueError as exc:
            raise UsageError("no certificates in PEM form", where=str(path)) from exc
    return found


def _decode(path: Path, decode: Callable[[bytes], _T]) -> _T:
    """One of the files. Raises: UsageError, VerificationError that names it."""
    data = read_file(path)
    try:
        return decode(data)
    except VerificationError as exc:
        exc.where = str(path)
        raise
