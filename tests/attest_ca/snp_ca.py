"""A test CA in AMD's place: ARK, ASK, ASVK, VCEKs and VLEKs that sign SEV-SNP reports of versions 2 to 5.

Everything has AMD's formats, so it goes through the production verifier with `roots=ca.roots`. Layouts and extensions
are written here a second time, from the specifications: what production reads is not what production wrote.
Never in the package. Keys are RSA-2048, not 4096, to be quick.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from functools import cache

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from cloister.attest.backends.sev_snp_certs import pack_collateral
from cloister.attest.evidence import Evidence
from cloister.attest.roots import AmdChain, TrustRoots, vendor_roots

NOW = 1_790_000_000
"""When everything here is valid unless a test says otherwise (September 2026), seconds since 1970."""

PSS = padding.PSS(mgf=padding.MGF1(hashes.SHA384()), salt_length=48)
CPUS = {"Milan": (0x19, 0x01), "Genoa": (0x19, 0x11), "Bergamo": (0x19, 0xA0), "Turin": (0x1A, 0x02)}
CHIP_IDS = {"Milan": bytes(range(1, 65)), "Genoa": bytes(range(2, 66)), "Turin": bytes(range(3, 11))}
TCB = {"bootloader": 4, "tee": 1, "snp": 24, "microcode": 0xDB, "fmc": 2}
PROVIDER = "CN=cc.test.example"
REPORT_DATA = bytes(range(64))
POLICY = 0x3001F
"""SMT allowed, the bit that must be one, ABI 0.31."""

_ARC = "1.3.6.1.4.1.3704.1."
_DAY = timedelta(days=1)


def pack_tcb(product: str, tcb: Mapping[str, int] = TCB) -> bytes:
    """TCB_VERSION: Turin has put the FMC first and moved SNP down."""
    if product == "Turin":
        return bytes([tcb["fmc"], tcb["bootloader"], tcb["tee"], tcb["snp"], 0, 0, 0, tcb["microcode"]])
    return bytes([tcb["bootloader"], tcb["tee"], 0, 0, 0, 0, tcb["snp"], tcb["microcode"]])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """A VCEK or VLEK."""

    der: bytes
    key: ec.EllipticCurvePrivateKey

    def sign(self, body: bytes) -> bytes:
        """A whole report from its first 0x2A0 bytes."""
        r, s = utils.decode_dss_signature(self.key.sign(body, ec.ECDSA(hashes.SHA384())))
        return (body + r.to_bytes(72, "little") + s.to_bytes(72, "little")).ljust(0x4A0, b"\0")


class SnpCa:
    """AMD for one product line, with one chip and one cloud provider."""

    def __init__(self, product: str = "Milan", *, now: int = NOW) -> None:
        self.product, self.now = product, now
        self.ark_key, self.ask_key, self.asvk_key = (_rsa_key(n) for n in ("ark", "ask", "asvk"))
        ark_name = f"ARK-{product}"
        self.ark = self._certify_ca(ark_name, ark_name, self.ark_key, serial=0x10000)
        self.ask = self._certify_ca(f"SEV-{product}", ark_name, self.ask_key, serial=0x10001)
        self.asvk = self._certify_ca(f"SEV-VLEK-{product}", ark_name, self.asvk_key, serial=0x10101)
        self.vcek, self.vlek = self.issue("vcek"), self.issue("vlek")

    @property
    def roots(self) -> TrustRoots:
        """The vendors' roots with these in AMD's place for the product line."""
        chains = {
            (self.product, "vcek"): AmdChain(intermediate=self.ask, root=self.ark),
            (self.product, "vlek"): AmdChain(intermediate=self.asvk, root=self.ark),
        }
        return dataclasses.replace(vendor_roots(), amd={**vendor_roots().amd, **chains})

    def issue(
        self,
        kind: str,
        *,
        tcb: Mapping[str, int] = TCB,
        product_name: str | None = None,
        chip_id: bytes | None = None,
        extensions: Mapping[str, bytes | None] | None = None,
        days: tuple[int, int] = (-30, 365),
        by: str | None = None,
        serial: int = 0,
        key: ec.EllipticCurvePrivateKey | None = None,
        hash_algorithm: hashes.SHA256 | None = None,
    ) -> Leaf:
        """Make a leaf. `extensions` adds or (None) removes some, by the OID's last parts; `by`: "ask" or "asvk"."""
        key = key or ec.generate_private_key(ec.SECP384R1())
        by = by or {"vcek": "ask", "vlek": "asvk"}[kind]
        issuer, issuer_key = {"ask": (self.ask, self.ask_key), "asvk": (self.asvk, self.asvk_key)}[by]
        values = self._extensions(kind, tcb, product_name or f"{self.product}-B0", chip_id)
        builder = self._builder(f"SEV-{kind.upper()}", issuer.subject, key.public_key(), days).serial_number(
            serial or 1
        )
        for oid, value in {**values, **(extensions or {})}.items():
            if value is not None:
                extension = x509.UnrecognizedExtension(x509.ObjectIdentifier(_ARC + oid), value)
                builder = builder.add_extension(extension, critical=False)
        certificate = builder.sign(issuer_key, hash_algorithm or hashes.SHA384(), rsa_padding=PSS)
        der = certificate.public_bytes(Encoding.DER)
        return Leaf(der=der if serial else _number_zero(der, certificate.tbs_certificate_bytes, issuer_key), key=key)

    def body(
        self,
        *,
        version: int = 3,
        key: int = 0,
        tcb: Mapping[str, int] = TCB,
        policy: int = POLICY,
        patches: Mapping[int, bytes] | None = None,
    ) -> bytes:
        """The signed part of a report. `patches`: bytes by offset, put over everything else."""
        body = bytearray(0x2A0)
        packed = pack_tcb(self.product, tcb)
        fields = {
            0x00: version.to_bytes(4, "little"), 0x04: (3).to_bytes(4, "little"), 0x08: policy.to_bytes(8, "little"),
            0x10: b"family".ljust(16, b"\0"), 0x20: b"image".ljust(16, b"\0"), 0x34: (1).to_bytes(4, "little"),
            0x38: packed, 0x40: (0x25).to_bytes(8, "little"), 0x48: (key << 2).to_bytes(4, "little"),
            0x50: REPORT_DATA, 0x90: b"\xa1" * 48, 0xC0: b"\xb2" * 32, 0xE0: b"\xc3" * 48, 0x110: b"\xd4" * 48,
            0x140: b"\xe5" * 32, 0x160: b"\xff" * 32, 0x180: packed, 0x1A0: CHIP_IDS[self.product],
            0x1E0: packed, 0x1E8: bytes([29, 55, 1, 0]), 0x1EC: bytes([29, 55, 1, 0]), 0x1F0: packed,
        }  # fmt: skip
        if version >= 3:
            fields[0x188] = bytes(CPUS[self.product]) + b"\x01"
        if version >= 5:
            fields[0x1F8] = (1).to_bytes(8, "little") + (3).to_bytes(8, "little")
        for at, value in [*fields.items(), *(patches or {}).items()]:
            body[at : at + len(value)] = value
        return bytes(body)

    def evidence(self, body: bytes | None = None, leaf: Leaf | None = None, crl: bytes = b"") -> Evidence:
        """Genuine evidence: a VCEK's unless another leaf is given."""
        leaf = leaf or self.vcek
        blob = leaf.sign(self.body() if body is None else body)
        return Evidence(type="sev-snp", blob=blob, collateral=pack_collateral(leaf=leaf.der, crl=crl))

    def crl(
        self,
        revoked: Iterable[int] = (),
        *,
        key: rsa.RSAPrivateKey | None = None,
        issuer: x509.Name | None = None,
        days: tuple[int, int] = (-1, 30),
    ) -> bytes:
        """The ARK's revocation list, DER."""
        start, end = (datetime.fromtimestamp(self.now, UTC) + n * _DAY for n in days)
        builder = x509.CertificateRevocationListBuilder().issuer_name(issuer or self.ark.subject)
        builder = builder.last_update(start).next_update(end)
        for serial in revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(start).build()
            builder = builder.add_revoked_certificate(entry)
        return builder.sign(key or self.ark_key, hashes.SHA384(), rsa_padding=PSS).public_bytes(Encoding.DER)

    def _extensions(
        self, kind: str, tcb: Mapping[str, int], product_name: str, chip_id: bytes | None
    ) -> dict[str, bytes | None]:
        levels = {"3.1": "bootloader", "3.2": "tee", "3.3": "snp", "3.8": "microcode"}
        if self.product == "Turin":
            levels["3.9"] = "fmc"
        values: dict[str, bytes | None] = {oid: der_integer(tcb[name]) for oid, name in levels.items()}
        values |= {f"3.{n}": der_integer(0) for n in (4, 5, 6, 7)}
        values |= {"1": der_integer(0), "2": der_ia5(product_name)}
        if kind == "vlek":
            return values | {"2": der_ia5(product_name.split("-")[0]), "5": der_ia5(PROVIDER)}
        return values | {"4": chip_id or CHIP_IDS[self.product]}

    def _certify_ca(self, name: str, issuer: str, key: rsa.RSAPrivateKey, *, serial: int) -> x509.Certificate:
        builder = self._builder(name, amd_name(issuer), key.public_key(), (-3000, 6000)).serial_number(serial)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        return builder.sign(self.ark_key, hashes.SHA384(), rsa_padding=PSS)

    def _builder(
        self,
        name: str,
        issuer: x509.Name,
        key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey,
        days: tuple[int, int],
    ) -> x509.CertificateBuilder:
        start, end = (datetime.fromtimestamp(self.now, UTC) + n * _DAY for n in days)
        builder = x509.CertificateBuilder().subject_name(amd_name(name)).issuer_name(issuer).public_key(key)
        return builder.not_valid_before(start).not_valid_after(end)


def amd_name(common_name: str) -> x509.Name:
    """A name as AMD writes it."""
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "Engineering"),
            x509.NameAttribute(NameOID.COUNTRY_NAME, "US"),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def der_integer(value: int) -> bytes:
    """DER INTEGER of a small number."""
    return b"\x02\x02\x00" + bytes([value]) if value > 127 else b"\x02\x01" + bytes([value])


def der_ia5(text: str) -> bytes:
    """DER IA5String of at most 127 characters."""
    return b"\x16" + bytes([len(text)]) + text.encode("ascii")


def _number_zero(der: bytes, tbs: bytes, issuer_key: rsa.RSAPrivateKey) -> bytes:
    """The certificate with serial number 0 in place of 1, as AMD's have it; the library makes none."""
    zero = tbs.replace(der_integer(1), der_integer(0), 1)
    return der.replace(tbs, zero)[:-256] + issuer_key.sign(zero, PSS, hashes.SHA384())


@cache
def _rsa_key(name: str) -> rsa.RSAPrivateKey:
    """One per role and process: making them is what takes time. `name` tells them apart."""
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def attacker_key() -> rsa.RSAPrivateKey:
    """An RSA key that is nobody's root."""
    return _rsa_key("attacker")
