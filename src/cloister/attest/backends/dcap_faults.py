"""What `dcap-qvl` says when it refuses, as our errors in plain words. Whatever it says, the answer is a refusal."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cryptography import x509
from dcap_qvl import QuoteCollateralV3

from cloister.attest.backends.dcap_quote import Quote
from cloister.errors import VerificationError

Stage = Literal["certificates", "signatures", "tcb"]
"""How far the library came: it checks the collateral and the PCK chain, then the signatures, then the TCB."""


@dataclass(frozen=True)
class Refusal:
    """The library refused at this stage; what comes before has passed."""

    stage: Stage
    error: VerificationError


def translate(text: str, tee: str, quote: Quote, collateral: QuoteCollateralV3, now: int) -> Refusal:
    """The refusal that the library's message stands for.

    Args:
        text: of its ValueError. tee: the policy's table, for hints. now: seconds since 1970.
    """
    if "Failed to verify certificate chain" in text:
        return Refusal("certificates", _explain_chain(quote, collateral, now))
    for fragment, stage, make in _FAULTS:
        if found := re.search(fragment, text):
            return Refusal(stage, make(found, tee))
    text = text.removeprefix("Verification failed: ")[:200]
    return Refusal("certificates", VerificationError("collateral", f"quote or collateral cannot be used: {text}"))


def _expired(found: re.Match[str], tee: str) -> VerificationError:
    return VerificationError("expired", "the collateral has expired", hint=_FETCH)


def _early(found: re.Match[str], tee: str) -> VerificationError:
    return VerificationError("expired", "the collateral is dated in the future", hint=_CLOCK)


def _root_revoked(found: re.Match[str], tee: str) -> VerificationError:
    return VerificationError("revoked", "the root certificate itself is revoked")


def _altered(found: re.Match[str], tee: str) -> VerificationError:
    what = {"tcb_info": "TCB information", "qe_identity": "identity of the quoting enclave"}[found[1]]
    return VerificationError("collateral", f"Intel's signature over the {what} does not hold", hint=_FETCH)


def _of_another(found: re.Match[str], tee: str) -> VerificationError:
    return VerificationError("collateral", f"the collateral is not for this {tee} platform", hint=_FETCH)


def _revocation_list(found: re.Match[str], tee: str) -> VerificationError:
    message = "the root's revocation list is malformed, or not signed by the root that we trust"
    return VerificationError("collateral", message, hint=_FETCH)


def _malformed_pck(found: re.Match[str], tee: str) -> VerificationError:
    return VerificationError("chain", "the platform's certificate is malformed")


def _signature(found: re.Match[str], tee: str) -> VerificationError:
    hint = "the quote was altered, or no genuine Intel platform made it"
    return VerificationError("signature", _SIGNATURES.get(found[0], _NOT_INTELS), hint=hint)


def _status(found: re.Match[str], tee: str) -> VerificationError:
    hint = f'update the platform; a policy that takes the risk lists "{found[1]}" in statuses of [{tee}]'
    return VerificationError("tcb", f"the platform's TCB status is {found[1]}, which the policy refuses", hint=hint)


def _no_status(found: re.Match[str], tee: str) -> VerificationError:
    return VerificationError("tcb", _HOPELESS[found[0]], hint=_UPDATE)


def _old_enclave(found: re.Match[str], tee: str) -> VerificationError:
    return VerificationError("tcb", "the quoting enclave is older than every version that Intel lists", hint=_UPDATE)


def _unknown_status(found: re.Match[str], tee: str) -> VerificationError:
    return VerificationError("tcb", f"the TCB status {found[1]} is unknown, so it is refused")


def _evaluation(found: re.Match[str], tee: str) -> VerificationError:
    message = f"the collateral has TCB evaluation number {found[1]}, the policy asks for at least {found[2]}"
    return VerificationError("tcb", message, hint=_FETCH)


def _platform(found: re.Match[str], tee: str) -> VerificationError:
    feature, key = _PLATFORM[found[1]]
    return VerificationError("tcb", f"the platform has {feature}, which the policy refuses", hint=f"{key} in [{tee}]")


_FETCH = "fetch the collateral for this quote anew"
_CLOCK = "compare this machine's clock"
_UPDATE = "update the platform's microcode and firmware; no policy can accept this"
_NOT_INTELS = "the enclave that signed the quote is not Intel's quoting enclave"
_SIGNATURES = {
    "ISV enclave report signature": "the signature over the report does not hold",
    "invalid for qe_report": "the platform's signature over its quoting enclave does not hold",
    "QE report hash mismatch": "the quoting enclave vouches for another attestation key",
}
_HOPELESS = {
    "No matching TCB level": "the platform is older than every level that Intel lists",
    "TCB status is invalid: Revoked": "Intel has revoked the platform's TCB level",
    "TDX module": "the platform's TDX module is not one that Intel lists",
}
_PLATFORM = {
    "Dynamic platform is": ("places to add packages", "dynamic_platform"),
    "Cached keys are": ("root keys cached by Intel's registration service", "cached_keys"),
    "SMT (hyperthreading) is": ("simultaneous multithreading switched on", "smt"),
}
_FAULTS: tuple[tuple[str, Stage, Callable[[re.Match[str], str], VerificationError]], ...] = (
    (r"CertRevoked", "certificates", _root_revoked),
    (r"CrlExpired|expired", "certificates", _expired),
    (r"issue date is in the future", "certificates", _early),
    (r"Signature is invalid for (tcb_info|qe_identity)", "certificates", _altered),
    (r"Unsupported QE Identity|with non-(?:TDX|SGX) TCB info|Fmspc mismatch", "certificates", _of_another),
    (r"Failed to parse root CA CRL", "certificates", _revocation_list),
    (r"Failed to parse PCK certificate", "certificates", _malformed_pck),
    (r"invalid for qe_report|QE report hash mismatch|ISV enclave report signature", "signatures", _signature),
    (r"Unknown QE vendor ID|QE report validation|QE auth data length", "signatures", _signature),
    (r"QE (?:MRSIGNER|ISVPRODID|MISCSELECT|ATTRIBUTES) mismatch", "signatures", _signature),
    (r"QE ISVSVN \d+ is below", "signatures", _old_enclave),
    (r"TCB status (\w+) is not acceptable", "tcb", _status),
    (r"Unrecognized TCB status (\w+)", "tcb", _unknown_status),
    (r"No matching TCB level|TCB status is invalid: Revoked|TDX module", "tcb", _no_status),
    (r"TCB eval data number (\d+) is below minimum (\d+)", "tcb", _evaluation),
    (r"(Dynamic platform is|Cached keys are|SMT \(hyperthreading\) is) not allowed", "tcb", _platform),
)
"""Fragment of the message, stage, error; the first that fits."""


def _explain_chain(quote: Quote, collateral: QuoteCollateralV3, now: int) -> VerificationError:
    """Why a chain did not verify, which the library does not say. Only for people: it is refused in any case.

    No name inside a certificate is read: a stranger wrote it, and the parser trips over some.
    """
    try:
        of_root, of_issuer = (x509.load_der_x509_crl(crl) for crl in (collateral.root_ca_crl, collateral.pck_crl))
        pck, issuer = (x509.load_der_x509_certificate(der) for der in quote.chain[:2])
        pem = collateral.tcb_info_issuer_chain + collateral.qe_identity_issuer_chain
        signers = x509.load_pem_x509_certificates(pem.encode())
        return _explain(
            {"root": of_root, "platforms' issuer": of_issuer},
            [("of the platform", pck, of_issuer), ("of the platform's issuer", issuer, of_root)]
            + [("that signs TCB information", signer, of_root) for signer in signers],
            now,
        )
    # Warnings are errors where Python runs with -W error: cryptography warns of serial numbers that are not positive.
    except (ValueError, x509.InvalidVersion, Warning):
        return VerificationError("chain", "a certificate or revocation list is malformed")


def _explain(
    crls: Mapping[str, x509.CertificateRevocationList],
    certificates: Sequence[tuple[str, x509.Certificate, x509.CertificateRevocationList]],
    now: int,
) -> VerificationError:
    """Args: certificates: what to call it, itself, where it would be revoked."""
    for name, crl in crls.items():
        if crl.next_update_utc is None or crl.next_update_utc.timestamp() <= now:
            return VerificationError("expired", f"the revocation list of the {name} has expired", hint=_FETCH)
    for name, certificate, crl in certificates:
        if certificate.not_valid_after_utc.timestamp() < now or certificate.not_valid_before_utc.timestamp() > now:
            return VerificationError("expired", f"the certificate {name} has expired or is not valid yet", hint=_FETCH)
        if crl.get_revoked_certificate_by_serial_number(certificate.serial_number):
            hint = "its keys are not safe any more; no policy can accept this"
            return VerificationError("revoked", f"the certificate {name} is revoked", hint=hint)
    return VerificationError("chain", "a certificate chain does not lead to the root that we trust")
