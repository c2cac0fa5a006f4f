"""A small test CA on P-384, in the place of vendors that certify with ECDSA. Never in the package."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

Curve = ec.SECP384R1 | ec.SECP256R1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certified:
    """A certificate with its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(Encoding.DER)

    def sign(self, message: bytes) -> bytes:
        """r and s, 48 bytes each, big endian."""
        r, s = utils.decode_dss_signature(self.key.sign(message, ec.ECDSA(SHA384())))
        return r.to_bytes(48, "big") + s.to_bytes(48, "big")


def certify(
    name: str,
    issuer: Certified | None,
    *,
    now: float,
    seconds: tuple[float, float] = (-3600, 3600),
    ca: bool = True,
    path_length: int | None = None,
    constraints: bool = True,
    usage: Mapping[str, bool] | None = None,
    extensions: Mapping[str, bytes] | None = None,
    critical: bool = False,
    curve: Curve | None = None,
) -> Certified:
    """Issue a certificate; without an issuer it signs itself.

    Args:
        seconds: validity around `now`. constraints: whether to add BasicConstraints and KeyUsage.
        usage: bits of KeyUsage to change. extensions: DER by OID. critical: of the latter.
    """
    key = ec.generate_private_key(curve or ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    at = datetime.fromtimestamp(now, UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(at + timedelta(seconds=seconds[0]))
        .not_valid_after(at + timedelta(seconds=seconds[1]))
    )
    if constraints:
        builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=path_length), critical=True)
        builder = builder.add_extension(_usage(ca, usage or {}), critical=True)
    for oid, value in (extensions or {}).items():
        builder = builder.add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value), critical)
    return Certified(certificate=builder.sign(issuer.key if issuer else key, SHA384()), key=key)


def _usage(ca: bool, changes: Mapping[str, bool]) -> x509.KeyUsage:
    bits: dict[str, Any] = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "crl_sign",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    return x509.KeyUsage(**{**bits, "digital_signature": not ca, "key_cert_sign": ca, **changes})
