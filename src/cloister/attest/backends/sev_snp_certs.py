"""AMD's certificates for the keys that sign SEV-SNP reports: a chip's VCEK, a cloud provider's VLEK, and their roots.

Guarantees: an endorsement that `check_chain`, `check_validity` and `check_revocation` have let pass was issued by the
pinned AMD root for this product line and this kind of key. Nothing but the leaf is taken from the evidence.

Source: AMD, "VCEK Certificate and KDS Interface Specification" (57230), chapter 3.
"""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.utils import CryptographyDeprecationWarning

from cloister.attest.backends.sev_snp_report import Tcb
from cloister.attest.roots import AmdChain, TrustRoots
from cloister.crypto.encoding import Fields, encode
from cloister.errors import ProtocolError, VerificationError

Kind = Literal["vcek", "vlek"]

MAX_CERTIFICATE_BYTES = 8192
MAX_CRL_BYTES = 1 << 16

# AMD's extensions: 1.3.6.1.4.1.3704.1.x. Security patch levels ("SPL") are 3.1 to 3.9; 3.4 to 3.7 are reserved.
_ARC = "1.3.6.1.4.1.3704.1."
_PRODUCT, _CHIP_ID, _PROVIDER = _ARC + "2", _ARC + "4", _ARC + "5"
_SPL = {"bootloader": _ARC + "3.1", "tee": _ARC + "3.2", "snp": _ARC + "3.3", "microcode": _ARC + "3.8"}
_SPL_FMC = _ARC + "3.9"
_SPL_RESERVED = tuple(f"{_ARC}3.{n}" for n in (4, 5, 6, 7))

PRODUCT_LINES = {"Milan": "Milan", "Genoa": "Genoa", "Bergamo": "Genoa", "Siena": "Genoa", "Turin": "Turin"}
"""Product line whose keys sign for a product's name as certificates have it."""

MAX_TABLE_ENTRIES = 32
_ENTRY_BYTES = 24
_TABLE_NAMES = {
    "63da758de6644564adc5f4b93be8accd": "vcek",
    "a8074bc2a25a483eaae639c045a0b8a1": "vlek",
    "92f81bc358114d3d97ffd19f88dc67ea": "crl",
}

_CHIP_ID_BYTES = {"Milan": 64, "Genoa": 64, "Turin": 8}
_INTEGER, _OCTETS, _IA5_STRING = 0x02, 0x04, 0x16
_PARSE_ERRORS = (
    ValueError, TypeError, x509.DuplicateExtension, x509.InvalidVersion, x509.UnsupportedGeneralNameType,
    UnsupportedAlgorithm,
)  # fmt: skip

_filters = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Endorsement:
    """A leaf certificate as its bytes say, and the revocation list that came with it: unverified."""

    kind: Kind
    product: str
    """Product line: "Milan", "Genoa" or "Turin"."""
    chip_id: bytes
    """64 bytes, padded with zeros; empty for a VLEK, which no chip owns."""
    provider: str
    """The cloud provider that a VLEK belongs to; empty for a VCEK."""
    tcb: Tcb
    """For which versions of the firmware the key exists."""
    public_key: ec.EllipticCurvePublicKey
    certificate: x509.Certificate
    serial: int
    issuer: x509.Name
    valid_from: datetime
    valid_until: datetime
    crl: RevocationList | None


@dataclass(frozen=True, kw_only=True)
class RevocationList:
    """A CRL as its bytes say: unverified."""

    issuer: x509.Name
    valid_from: datetime
    valid_until: datetime
    serials: frozenset[int]
    crl: x509.CertificateRevocationList


def pack_collateral(*, leaf: bytes, crl: bytes = b"") -> bytes:
    """Encode `Evidence.collateral` of SEV-SNP: CBOR {leaf, crl}, both DER; `crl` may be empty."""
    return encode({"leaf": leaf, "crl": crl})


def parse_collateral(collateral: bytes) -> Endorsement:
    """Read what `pack_collateral` made; or a bare certificate, DER or PEM, as AMD's key service hands it out.

    Raises: VerificationError "collateral".
    """
    if not collateral:
        hint = "fetch the certificate of the chip (VCEK) or of the cloud provider (VLEK) from AMD's key service"
        raise VerificationError("collateral", "no certificate came with the report", hint=hint)
    if collateral[:1] == b"\x30" or collateral.startswith(b"-----BEGIN CERTIFICATE-----"):
        return parse_endorsement(collateral)
    try:
        fields = Fields.decode(collateral, max_bytes=2 * MAX_CRL_BYTES, max_items=8, what="the collateral")
        leaf = fields.blob("leaf", max_size=MAX_CERTIFICATE_BYTES)
        crl = fields.blob("crl", max_size=MAX_CRL_BYTES)
        fields.end()
    except ProtocolError as exc:
        raise VerificationError("collateral", str(exc)) from exc
    return parse_endorsement(leaf, crl)


def parse_certificate_table(table: bytes) -> dict[str, bytes]:
    """Read the table that a host hands its guests with a report: "vcek", "vlek", "crl" and what else is in it, unread.

    Entries of 24 bytes (GUID, as its text is written; offset and length, little endian) up to one of zeros, then what
    they point to. Source: AMD, "GHCB Standardization" (56421), section 4.1.8.1.

    Raises: VerificationError "collateral".
    """
    found: dict[str, bytes] = {}
    for at in range(0, MAX_TABLE_ENTRIES * _ENTRY_BYTES, _ENTRY_BYTES):
        entry = table[at : at + _ENTRY_BYTES]
        if not any(entry[:16]):
            return found
        start, size = (int.from_bytes(entry[n : n + 4], "little") for n in (16, 20))
        if len(entry) < _ENTRY_BYTES or start + size > len(table):
            raise VerificationError("collateral", "the host's table of certificates is truncated")
        found[_TABLE_NAMES.get(entry[:16].hex(), entry[:16].hex())] = table[start : start + size]
    raise VerificationError("collateral", f"the host's table has more than {MAX_TABLE_ENTRIES} certificates")


def parse_endorsement(leaf: bytes, crl: bytes = b"") -> Endorsement:
    """Read a leaf (DER or PEM) and a revocation list (DER). Raises: VerificationError "collateral"."""
    try:
        certificate, serial = load_certificate(leaf)
        values = _extensions(certificate)
        public_key = certificate.public_key()
        # What the library reads only when asked has to be asked for here, where its errors are expected.
        issuer, start, end = certificate.issuer, certificate.not_valid_before_utc, certificate.not_valid_after_utc
        revocations = _parse_crl(crl) if crl else None
    except _PARSE_ERRORS as exc:
        raise VerificationError("collateral", f"a certificate or revocation list is malformed: {exc}") from exc
    if not isinstance(public_key, ec.EllipticCurvePublicKey) or not isinstance(public_key.curve, ec.SECP384R1):
        raise VerificationError("collateral", "the certificate is not for a key on the curve P-384")
    product = _product(values)
    kind, chip_id, provider = _owner(values, product)
    return Endorsement(
        kind=kind,
        product=product,
        chip_id=chip_id,
        provider=provider,
        tcb=_tcb(values, product),
        public_key=public_key,
        certificate=certificate,
        serial=serial,
        issuer=issuer,
        valid_from=start,
        valid_until=end,
        crl=revocations,
    )


def _parse_crl(data: bytes) -> RevocationList:
    crl = x509.load_der_x509_crl(data)
    if crl.next_update_utc is None:
        raise ValueError("the revocation list does not say until when it holds")
    return RevocationList(
        issuer=crl.issuer,
        valid_from=crl.last_update_utc,
        valid_until=crl.next_update_utc,
        serials=frozenset(entry.serial_number for entry in crl),
        crl=crl,
    )


def load_certificate(data: bytes) -> tuple[x509.Certificate, int]:
    """Load one certificate, DER or PEM, and its serial number, which may be zero: AMD gives all its leaves that one.

    cryptography 50 warns, when it loads and when it is asked, that a later release will refuse them; then this
    function is the one to change. Raises: one of `_PARSE_ERRORS`.
    """
    # The list of filters is one for all threads: without the lock two of them could leave the filter behind.
    with _filters, warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Parsed a serial number which wasn't positive", category=CryptographyDeprecationWarning
        )
        if data[:1] == b"\x30":
            certificates = [x509.load_der_x509_certificate(data)]
        else:
            certificates = x509.load_pem_x509_certificates(data)
        if len(certificates) != 1:
            raise ValueError("one certificate is needed, the leaf")
        return certificates[0], certificates[0].serial_number


def check_chain(endorsement: Endorsement, roots: TrustRoots) -> AmdChain:
    """ARK -> ASK or ASVK -> leaf, each signed with RSA-PSS and SHA-384. Raises: VerificationError "chain"."""
    chain, kind = roots.amd.get((endorsement.product, endorsement.kind)), endorsement.kind.upper()
    if chain is None:
        raise VerificationError("chain", f"no root is pinned for {endorsement.product} and {kind}")
    if endorsement.issuer != chain.intermediate.subject:
        message = f"the {kind} names another issuer than AMD's for this product and kind of key"
        raise VerificationError("chain", message)
    leaf, name = endorsement.certificate, "the root (ARK)"
    try:
        _verify_pss(chain.root, chain.root.signature, chain.root.tbs_certificate_bytes)
        name = "the intermediate"
        _verify_pss(chain.root, chain.intermediate.signature, chain.intermediate.tbs_certificate_bytes)
        name = f"the {kind}"
        _verify_pss(chain.intermediate, leaf.signature, leaf.tbs_certificate_bytes)
        # Once more, as the leaf says itself: what it says outside of its signed part must be true as well.
        leaf.verify_directly_issued_by(chain.intermediate)
    except (InvalidSignature, *_PARSE_ERRORS) as exc:
        raise VerificationError("chain", f"{name} was not signed by its issuer: it is not AMD's") from exc
    return chain


def _verify_pss(issuer: x509.Certificate, signature: bytes, data: bytes) -> None:
    """With parameters of ours, whatever the certificate says. Raises: InvalidSignature."""
    pss = padding.PSS(mgf=padding.MGF1(SHA384()), salt_length=48)
    _rsa_key(issuer).verify(signature, data, pss, SHA384())


def _rsa_key(issuer: x509.Certificate) -> rsa.RSAPublicKey:
    key = issuer.public_key()
    if not isinstance(key, rsa.RSAPublicKey):
        raise InvalidSignature
    return key


def check_validity(endorsement: Endorsement, chain: AmdChain, now: float) -> None:
    """Every certificate is valid at `now`, seconds since 1970. Raises: VerificationError "expired"."""
    times = {
        endorsement.kind.upper(): (endorsement.valid_from, endorsement.valid_until),
        "intermediate": (chain.intermediate.not_valid_before_utc, chain.intermediate.not_valid_after_utc),
        "root (ARK)": (chain.root.not_valid_before_utc, chain.root.not_valid_after_utc),
    }
    for name, (start, end) in times.items():
        _check_time(name, start, end, now)


def _check_time(name: str, start: datetime, end: datetime, now: float) -> None:
    if not start.timestamp() <= now <= end.timestamp():
        hint = "fetch it anew, or compare the clock"
        raise VerificationError("expired", f"the {name} is valid from {start} to {end} only", hint=hint)


def check_revocation(endorsement: Endorsement, crl: RevocationList, chain: AmdChain, now: float) -> None:
    """The list is the root's, of now, and names none of the three certificates.

    Raises: VerificationError "collateral" (not AMD's list), "expired" or "revoked".
    """
    if crl.issuer != chain.root.subject:
        raise VerificationError("collateral", "the revocation list is not one of AMD's root for this product")
    try:
        _verify_pss(chain.root, crl.crl.signature, crl.crl.tbs_certlist_bytes)
    except InvalidSignature as exc:
        raise VerificationError("collateral", "the revocation list was not signed by AMD's root") from exc
    _check_time("revocation list", crl.valid_from, crl.valid_until, now)
    # AMD numbers all leaves 0: an entry 0 would mean every one of them, and is taken at its word.
    for name, certificate in (("root", chain.root), ("intermediate", chain.intermediate)):
        if certificate.serial_number in crl.serials:
            raise VerificationError("revoked", f"AMD has revoked the {name} of this product's certificates")
    if endorsement.serial in crl.serials:
        raise VerificationError("revoked", f"AMD has revoked the {endorsement.kind.upper()}")


def _extensions(certificate: x509.Certificate) -> dict[str, bytes]:
    """AMD's extensions by OID; the other ones mean nothing here."""
    values = {}
    for extension in certificate.extensions:
        if isinstance(extension.value, x509.UnrecognizedExtension):
            values[extension.oid.dotted_string] = extension.value.value
    return values


def _product(values: dict[str, bytes]) -> str:
    name = _text(values, _PRODUCT).split("-")[0]  # "Milan-B0": product and stepping
    if name not in PRODUCT_LINES:
        raise VerificationError("collateral", f"certificates of the product {name!r} are not known here")
    return PRODUCT_LINES[name]


def _owner(values: dict[str, bytes], product: str) -> tuple[Kind, bytes, str]:
    """Kind of key, chip id, provider: a chip's key names the chip, a provider's key names the provider."""
    if (_CHIP_ID in values) == (_PROVIDER in values):
        raise VerificationError("collateral", "the certificate is neither a chip's (VCEK) nor a provider's (VLEK)")
    if _PROVIDER in values:
        return "vlek", b"", _text(values, _PROVIDER)
    # Real ones are the bare bytes; a DER octet string around them is what the specification says.
    chip_id, size = values[_CHIP_ID], _CHIP_ID_BYTES[product]
    if chip_id[:2] == bytes((_OCTETS, size)):
        chip_id = chip_id[2:]
    if len(chip_id) != size:
        raise VerificationError("collateral", f"the certificate's chip id has {len(chip_id)} bytes, not {size}")
    return "vcek", chip_id.ljust(64, b"\0"), ""


def _tcb(values: dict[str, bytes], product: str) -> Tcb:
    parts = {name: _level(values, oid) for name, oid in _SPL.items()}
    if product == "Turin":
        parts["fmc"] = _level(values, _SPL_FMC)
    elif _SPL_FMC in values:
        raise VerificationError("collateral", f"the certificate has a security version that {product} does not have")
    if any(_level(values, oid) for oid in _SPL_RESERVED if oid in values):
        raise VerificationError("collateral", "the certificate has security versions whose meaning is not known here")
    return Tcb(**parts)


def _level(values: dict[str, bytes], oid: str) -> int:
    """A DER INTEGER from 0 to 255, in its shortest form."""
    value = values.get(oid, b"")
    level = int.from_bytes(value[2:], "big")
    expected = level.to_bytes(level.bit_length() // 8 + 1, "big")
    if level > 255 or value != bytes((_INTEGER, len(expected))) + expected:
        raise VerificationError("collateral", f"the certificate's extension {oid} is missing or malformed")
    return level


def _text(values: dict[str, bytes], oid: str) -> str:
    """A DER IA5String of at most 127 bytes."""
    value = values.get(oid, b"")
    text = value[2:]
    if value[:2] != bytes((_IA5_STRING, len(text) & 0x7F)) or len(text) > 0x7F or not text.isascii():
        raise VerificationError("collateral", f"the certificate's extension {oid} is missing or malformed")
    return text.decode("ascii")
