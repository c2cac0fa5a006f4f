"""Verifying AWS Nitro Enclaves' attestation documents.

Guarantees, against everybody but AWS: a Nitro hypervisor made the document, for an enclave without debugging, with
these PCRs and this user data, at this time. Left to `attest.verify`: binding, age, measurement. Nothing in a document
is unsigned except its envelope, of which one form is accepted.

Source: AWS, "Verifying the root of trust" (aws-nitro-enclaves-nsm-api, docs/attestation_process.md).
"""

from __future__ import annotations

from cryptography import x509

from cloister.attest.appraisal import Appraisal
from cloister.attest.backends import ec_chain, nitro_document
from cloister.attest.backends.nitro_document import PCR_BYTES, Document
from cloister.attest.claims import Report
from cloister.attest.evidence import Evidence
from cloister.errors import VerificationError

TYPE = "nitro"
WARNING = "a Nitro enclave hides its memory from the owner of the machine, not from AWS"

MAX_CLOCK_SKEW_S = 60
"""How far behind AWS's our clock may be; `attest.verify` allows as much for a document's age."""

_IMAGE_PCRS = (0, 1, 2)
"""Enclave image, kernel and boot ramdisk, application: the hypervisor measures them, all zero with debugging."""


def verify(evidence: Evidence, appraisal: Appraisal) -> Report:
    """Is it genuine, and not of an enclave with debugging?

    Args:
        evidence: unverified; `blob` is the COSE_Sign1 document as the NSM gives it; there is nothing else.
    Raises: VerificationError "evidence-format", "chain", "expired", "signature" or "debug".
    """
    checks = appraisal.checks
    # (1) A document in the one accepted form.
    with checks.step("format") as step:
        if evidence.collateral or evidence.event_log:
            raise VerificationError("evidence-format", "a Nitro document has no collateral and no event log")
        document = nitro_document.parse(evidence.blob)
        chain = [ec_chain.load(der) for der in document.certificates]
        step.reason = f"an attestation document of the Nitro module {document.module_id}"
    # (2) AWS certified the key that signed it.
    with checks.step("chain") as step:
        key = ec_chain.check_chain(chain, appraisal.roots.aws)
        step.reason = f"{len(chain)} certificates lead from the signing key to the AWS Nitro Enclaves root"
    # (3) The certificates are valid now, and were when the document was made. Leaves live three hours.
    with checks.step("validity") as step:
        made = document.timestamp_ms / 1000
        ec_chain.check_validity(chain, made, "when the document was made")
        # A leaf may be three seconds old: a clock that is a little behind must not make it one of the future.
        at = max(appraisal.now, min(made, appraisal.now + MAX_CLOCK_SKEW_S))
        ec_chain.check_validity(chain, at, "at the time of this verification")
        step.reason = f"all certificates are valid; the first to expire does at {_first_to_expire(chain)} UTC"
    # (4) The key signed all of it.
    with checks.step("signature") as step:
        ec_chain.check_signature(key, document.signature, document.signed)
        step.reason = "ECDSA P-384 by the enclave's key over the whole document"
    # (5) Nobody can attach a debugger.
    with checks.step("debug") as step:
        _check_debug(document)
        step.reason = "the image is measured (PCR 0 to 2 are not zero): debugging is off"
    return _report(document)


def _first_to_expire(chain: list[x509.Certificate]) -> str:
    return f"{min(certificate.not_valid_after_utc for certificate in chain):%F %T}"


def _check_debug(document: Document) -> None:
    if any(document.pcrs[index] == bytes(PCR_BYTES) for index in _IMAGE_PCRS):
        hint = "start the enclave without --debug-mode; its owner can read the memory of this one"
        raise VerificationError("debug", "the enclave runs in debug mode: PCR 0, 1 or 2 is zero", hint=hint)


def _report(document: Document) -> Report:
    return Report(
        type=TYPE,
        report_data=document.user_data,
        registers={f"pcr{index}": value for index, value in document.pcrs.items()},
        hardware=True,
        confidential=True,
        issued_at=document.timestamp_ms // 1000,
        tcb={"module": document.module_id},
        warnings=(WARNING,),
    )
