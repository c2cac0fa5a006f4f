"""Certificate chains of keys on P-384 up to one pinned root: what AWS Nitro and NVIDIA have in common.

Guarantees, once both functions have returned: the leaf's key was certified under that root, by certificates that may
issue others, all valid at the given times. Names are compared only between a certificate and its issuer.

Source: RFC 5280, sections 4.2.1.3, 4.2.1.9 and 6.1, without policies and name constraints, which neither vendor uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384

from cloister.attest.backends.sev_snp_certs import load_certificate
from cloister.errors import VerificationError

MAX_CERTIFICATE_BYTES = 4096
MAX_CERTIFICATES = 8
SIGNATURE_BYTES = 96
"""An ECDSA signature on P-384 as r and s, big endian, 48 bytes each."""

PARSE_ERRORS = (
    ValueError, TypeError, x509.DuplicateExtension, x509.InvalidVersion, x509.UnsupportedGeneralNameType,
    UnsupportedAlgorithm,
)  # fmt: skip
"""What loading a certificate, or asking it for its content, may raise."""

_KNOWN_CRITICAL = (x509.BasicConstraints, x509.KeyUsage)


def load(der: bytes) -> x509.Certificate:
    """Read one certificate. Raises: VerificationError "evidence-format"."""
    if len(der) > MAX_CERTIFICATE_BYTES:
        raise VerificationError("evidence-format", f"a certificate is longer than {MAX_CERTIFICATE_BYTES} bytes")
    try:
        # The one function that loads certificates without cryptography's warnings about serial numbers.
        certificate, serial = load_certificate(der if der[:1] == b"\x30" else b"\x30")
        # What the library reads only when asked has to be asked for here, where its errors are expected.
        if serial <= 0 or not certificate.subject or not certificate.issuer or not list(certificate.extensions):
            raise ValueError("it has no positive serial number, no name or no extension")
        return certificate
    except PARSE_ERRORS as exc:
        raise VerificationError("evidence-format", f"a certificate is malformed: {exc}") from exc


def check_chain(chain: Sequence[x509.Certificate], root: x509.Certificate) -> ec.EllipticCurvePublicKey:
    """Return the leaf's key.

    Args:
        chain: leaf first, root last, unverified; the last one must be `root` itself.
    Raises: VerificationError "chain".
    """
    if not 2 <= len(chain) <= MAX_CERTIFICATES or chain[-1] != root:
        raise VerificationError("chain", "the certificates do not end at the vendor's root")
    try:
        for depth, (certificate, issuer) in enumerate(pairwise(chain)):
            _check_may_issue(issuer, depth)
            certificate.verify_directly_issued_by(issuer)
        return _leaf_key(chain[0])
    except (InvalidSignature, *PARSE_ERRORS) as exc:
        detail = str(exc) or "a signature does not hold"
        raise VerificationError("chain", f"a certificate was not issued by the vendor: {detail}") from exc


def check_validity(chain: Sequence[x509.Certificate], at: float, when: str) -> None:
    """Every certificate is valid `at` (seconds since 1970), which is `when` in words. Raises: "expired"."""
    try:
        moment = datetime.fromtimestamp(at, UTC)
        spans = [(c.not_valid_before_utc, c.not_valid_after_utc) for c in chain]
    except (OverflowError, OSError, *PARSE_ERRORS) as exc:
        raise VerificationError("expired", f"a certificate or the time is not a valid date: {exc}") from exc
    for number, (start, end) in enumerate(spans):
        if not start <= moment <= end:
            message = f"certificate {number + 1} is valid from {start:%F %T} to {end:%F %T} UTC, not {when}"
            raise VerificationError("expired", message, hint="collect new evidence; compare the clock")


def check_signature(key: ec.EllipticCurvePublicKey, signature: bytes, message: bytes) -> None:
    """ECDSA on P-384 with SHA-384 over `message`. Raises: VerificationError "signature"."""
    r, s = int.from_bytes(signature[:48], "big"), int.from_bytes(signature[48:], "big")
    try:
        if len(signature) != SIGNATURE_BYTES:
            raise InvalidSignature
        key.verify(encode_dss_signature(r, s), message, ec.ECDSA(SHA384()))
    except InvalidSignature as exc:
        raise VerificationError("signature", "the signature does not hold: the evidence was altered") from exc


def _check_may_issue(certificate: x509.Certificate, certificates_below: int) -> None:
    """Raises: ValueError or another of `PARSE_ERRORS`."""
    _refuse_unknown_critical(certificate)
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound as exc:
        raise ValueError("an issuer's certificate does not say that it may issue") from exc
    if not constraints.ca or not usage.key_cert_sign:
        raise ValueError("an issuer's certificate says that it may not issue")
    if constraints.path_length is not None and certificates_below > constraints.path_length:
        raise ValueError("an issuer's certificate allows no chain of this length")
    _p384(certificate)


def _leaf_key(leaf: x509.Certificate) -> ec.EllipticCurvePublicKey:
    """Raises: ValueError or another of `PARSE_ERRORS`."""
    _refuse_unknown_critical(leaf)
    for extension in leaf.extensions:
        if isinstance(extension.value, x509.BasicConstraints) and extension.value.ca:
            raise ValueError("the signing key's certificate is that of an issuer")
        if isinstance(extension.value, x509.KeyUsage) and not extension.value.digital_signature:
            raise ValueError("the signing key's certificate is not for signatures")
    return _p384(leaf)


def _refuse_unknown_critical(certificate: x509.Certificate) -> None:
    for extension in certificate.extensions:
        if extension.critical and not isinstance(extension.value, _KNOWN_CRITICAL):
            raise ValueError(f"a certificate has a critical extension {extension.oid.dotted_string}")


def _p384(certificate: x509.Certificate) -> ec.EllipticCurvePublicKey:
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ValueError("a certificate is not for a key on the curve P-384")
    return key
