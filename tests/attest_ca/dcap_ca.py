"""A test CA in Intel's place: platforms that issue TDX and SGX quotes, and the collateral to verify them.

Everything has Intel's formats, so it goes through the production verifier with `roots=ca.roots`. Never in the package.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cloister.attest.evidence import Evidence
from cloister.attest.roots import TrustRoots, vendor_roots

NOW = 1_790_000_000
"""When everything here is valid unless a test says otherwise (September 2026), seconds since 1970."""

SGX_EXTENSION = "1.2.840.113741.1.13.1"
FMSPC = bytes.fromhex("00c0ffee0000")
QE_VENDOR = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
QE_MRSIGNER = hashlib.sha256(b"test quoting enclave").digest()
SEPT_VE_DISABLE = (1 << 28).to_bytes(8, "little")
REPORT_DATA = bytes(range(64))
RTMRS = [bytes([0xA0 + i]) * 48 for i in range(4)]

_DAY = 86_400
_QE_PROD_ID = {"tdx": 2, "sgx": 1}
_QE_SVN = 8


class DcapCa:
    """Root, PCK issuer and TCB signer, with one platform."""

    def __init__(self, *, now: int = NOW, common_name: str = "Test SGX Root CA") -> None:
        self.now = now
        self.root_key, self.pck_ca_key, self.tcb_key, self.pck_key = (_new_key() for _ in range(4))
        self.root = self._certify(common_name, self.root_key, None, ca=True)
        self.pck_ca = self._certify("Test SGX PCK Platform CA", self.pck_ca_key, self.root, ca=True)
        self.tcb_signer = self._certify("Test SGX TCB Signing", self.tcb_key, self.root)
        self.pck = self.certify_pck()

    @property
    def roots(self) -> TrustRoots:
        """This CA instead of Intel; the other vendors are the real ones."""
        return dataclasses.replace(vendor_roots(), intel=self.root)

    # Certificates -----------------------------------------------------------------------------------------------------

    def certify_pck(self, *, days: tuple[int, int] = (-365, 365), **platform: Any) -> x509.Certificate:
        """A platform's certificate; `platform` as for `sgx_extension`."""
        extension = x509.UnrecognizedExtension(x509.ObjectIdentifier(SGX_EXTENSION), sgx_extension(**platform))
        return self._certify("Test SGX PCK Certificate", self.pck_key, self.pck_ca, extension=extension, days=days)

    def _certify(
        self,
        name: str,
        key: ec.EllipticCurvePrivateKey,
        issuer: x509.Certificate | None,
        *,
        ca: bool = False,
        extension: x509.ExtensionType | None = None,
        days: tuple[int, int] = (-3650, 3650),
    ) -> x509.Certificate:
        signer = self.root_key if issuer is None or issuer.subject == self.root.subject else self.pck_ca_key
        usage = dict.fromkeys(
            ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only",
             "decipher_only"), False,
        )  # fmt: skip
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(_name(name) if issuer is None else issuer.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(self._time(days[0]))
            .not_valid_after(self._time(days[1]))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(
                x509.KeyUsage(digital_signature=not ca, key_cert_sign=ca, crl_sign=ca, **usage), critical=True
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )
        if extension is not None:
            builder = builder.add_extension(extension, critical=False)
        return builder.sign(signer, hashes.SHA256())

    def crl(self, *, of_root: bool, revoked: Sequence[int] = (), days: tuple[int, int] = (-1, 30)) -> bytes:
        """A CRL of the root or of the PCK issuer, DER."""
        issuer, key = (self.root, self.root_key) if of_root else (self.pck_ca, self.pck_ca_key)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(issuer.subject)
            .last_update(self._time(days[0]))
            .next_update(self._time(days[1]))
            .add_extension(x509.CRLNumber(1), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        )
        for serial in revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(self._time(-2)).build()
            builder = builder.add_revoked_certificate(entry)
        return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)

    def _time(self, days: int) -> datetime:
        return datetime.fromtimestamp(self.now, UTC) + timedelta(days=days)

    def _iso(self, days: int) -> str:
        return self._time(days).strftime("%Y-%m-%dT%H:%M:%SZ")

    # Collateral -------------------------------------------------------------------------------------------------------

    def collateral(
        self,
        tee: str = "tdx",
        *,
        status: str = "UpToDate",
        advisories: Sequence[str] = (),
        qe_status: str = "UpToDate",
        qe_advisories: Sequence[str] = (),
        evaluation: int = 17,
        days: tuple[int, int] = (-1, 29),
        qe_days: tuple[int, int] = (-1, 29),
        min_svn: int = 1,
        fmspc: bytes = FMSPC,
        **replaced: Any,
    ) -> bytes:
        """QuoteCollateralV3 as JSON.

        Args:
            status, advisories: of the only TCB level. qe_status, qe_advisories: of the quoting enclave's.
            days: when TCB info is issued and when it expires, relative to `now`. qe_days: same for the QE identity.
            min_svn: what the level asks of each component. replaced: fields of the collateral itself.
        """
        tcb_info = self._tcb_info(tee, status, advisories, evaluation, days, min_svn, fmspc)
        qe_identity = self._qe_identity(tee, qe_status, qe_advisories, evaluation, qe_days)
        signers = pem(self.tcb_signer, self.root)
        table = {
            "pck_crl_issuer_chain": pem(self.pck_ca, self.root),
            "root_ca_crl": self.crl(of_root=True).hex(),
            "pck_crl": self.crl(of_root=False).hex(),
            "tcb_info_issuer_chain": signers,
            "tcb_info": tcb_info,
            "tcb_info_signature": sign(self.tcb_key, tcb_info.encode()).hex(),
            "qe_identity_issuer_chain": signers,
            "qe_identity": qe_identity,
            "qe_identity_signature": sign(self.tcb_key, qe_identity.encode()).hex(),
        }
        return json.dumps(table | replaced).encode()

    def _tcb_info(
        self,
        tee: str,
        status: str,
        advisories: Sequence[str],
        evaluation: int,
        days: tuple[int, int],
        min_svn: int,
        fmspc: bytes,
    ) -> str:
        components = [{"svn": min_svn}] * 16
        tdx_components = [components[0], {"svn": 0}, *components[2:]]  # the second is the TDX module's version
        tcb: dict[str, Any] = {"sgxtcbcomponents": components, "pcesvn": min_svn}
        module = {"mrsigner": "00" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8}
        info = {
            "id": tee.upper(),
            "version": 3,
            "issueDate": self._iso(days[0]),
            "nextUpdate": self._iso(days[1]),
            "fmspc": fmspc.hex().upper(),
            "pceId": "0000",
            "tcbType": 0,
            "tcbEvaluationDataNumber": evaluation,
            "tcbLevels": [
                {
                    "tcb": tcb | ({"tdxtcbcomponents": tdx_components} if tee == "tdx" else {}),
                    "tcbDate": self._iso(-100),
                    "tcbStatus": status,
                    "advisoryIDs": list(advisories),
                }
            ],
        }
        return json.dumps(info | ({"tdxModule": module, "tdxModuleIdentities": []} if tee == "tdx" else {}))

    def _qe_identity(
        self, tee: str, status: str, advisories: Sequence[str], evaluation: int, days: tuple[int, int]
    ) -> str:
        level = {"tcb": {"isvsvn": _QE_SVN}, "tcbDate": self._iso(-100), "tcbStatus": status}
        return json.dumps(
            {
                "id": "TD_QE" if tee == "tdx" else "QE",
                "version": 2,
                "issueDate": self._iso(days[0]),
                "nextUpdate": self._iso(days[1]),
                "tcbEvaluationDataNumber": evaluation,
                "miscselect": "00000000",
                "miscselectMask": "FFFFFFFF",
                "attributes": "11000000000000000000000000000000",
                "attributesMask": "FBFFFFFFFFFFFFFF0000000000000000",
                "mrsigner": QE_MRSIGNER.hex().upper(),
                "isvprodid": _QE_PROD_ID[tee],
                "tcbLevels": [level | {"advisoryIDs": list(advisories)}],
            }
        )

    # Quotes -----------------------------------------------------------------------------------------------------------

    def tdx_quote(self, *, version: int = 4, body: bytes | None = None, body_type: int = 2, **signing: Any) -> bytes:
        """A TDX quote over `body` (default: `tdx_body()`); version 5 names the body's type."""
        body = tdx_body() if body is None else body
        named = body_type.to_bytes(2, "little") + len(body).to_bytes(4, "little") if version == 5 else b""
        return self._quote("tdx", header("tdx", version) + named + body, **signing)

    def sgx_quote(self, *, body: bytes | None = None, **signing: Any) -> bytes:
        """An SGX quote over `body` (default: `sgx_body()`)."""
        return self._quote("sgx", header("sgx", 3) + (sgx_body() if body is None else body), **signing)

    def _quote(
        self,
        tee: str,
        signed: bytes,
        *,
        pck: x509.Certificate | None = None,
        chain: bytes | None = None,
        qe_svn: int = _QE_SVN,
        qe_mrsigner: bytes = QE_MRSIGNER,
        qe_flags: int = 0x11,
    ) -> bytes:
        """Header and body, signed by an attestation key that the quoting enclave vouches for.

        Args:
            pck: another certificate of the platform's key. chain: what stands in place of the certificates.
            qe_svn, qe_mrsigner, qe_flags: of the quoting enclave.
        """
        key = _new_key()
        public = key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)[1:]
        auth = bytes(range(32))
        qe_report = sgx_body(
            report_data=hashlib.sha256(public + auth).digest() + bytes(32),
            mr_signer=qe_mrsigner,
            flags=qe_flags,
            isv_prod_id=_QE_PROD_ID[tee],
            isv_svn=qe_svn,
        )
        chain = pem(pck or self.pck, self.pck_ca, self.root).encode() + b"\0" if chain is None else chain
        vouched = qe_report + sign(self.pck_key, qe_report) + len(auth).to_bytes(2, "little") + auth
        vouched += typed(5, chain)
        tail = sign(key, signed) + public + (vouched if tee == "sgx" else typed(6, vouched))
        return signed + len(tail).to_bytes(4, "little") + tail

    # Evidence ---------------------------------------------------------------------------------------------------------

    def tdx(self, *, event_log: bytes = b"", collateral: bytes | None = None, **quote: Any) -> Evidence:
        """TDX evidence; `quote` as for `tdx_quote`."""
        collateral = self.collateral("tdx") if collateral is None else collateral
        return Evidence(type="tdx", blob=self.tdx_quote(**quote), collateral=collateral, event_log=event_log)

    def sgx(self, *, collateral: bytes | None = None, **quote: Any) -> Evidence:
        """SGX evidence; `quote` as for `sgx_quote`."""
        collateral = self.collateral("sgx") if collateral is None else collateral
        return Evidence(type="sgx", blob=self.sgx_quote(**quote), collateral=collateral)


@cache
def shared_ca() -> DcapCa:
    """One CA for all tests that change nothing in it."""
    return DcapCa()


def header(tee: str, version: int) -> bytes:
    """A quote's first 48 bytes."""
    tee_type = 0x81 if tee == "tdx" else 0
    head = version.to_bytes(2, "little") + (2).to_bytes(2, "little") + tee_type.to_bytes(4, "little")
    return head + bytes(4) + QE_VENDOR + bytes(20)


def tdx_body(
    *,
    report_data: bytes = REPORT_DATA,
    mr_td: bytes = b"\x11" * 48,
    rtmrs: Sequence[bytes] = RTMRS,
    td_attributes: bytes = SEPT_VE_DISABLE,
    svn: int = 3,
    mr_service_td: bytes | None = None,
) -> bytes:
    """A TD report 1.0; with `mr_service_td` a TD report 1.5."""
    # The second SVN is the version of the TDX module, and picks an identity in the TCB info: 0 is none.
    svns = bytes([svn, 0]) + bytes([svn]) * 14
    body = svns + b"\x51" * 48 + bytes(48) + bytes(8) + td_attributes + bytes.fromhex("e702060000000000")
    body += mr_td + b"\xc0" * 48 + b"\xc1" * 48 + b"\xc2" * 48 + b"".join(rtmrs) + report_data
    return body if mr_service_td is None else body + svns + mr_service_td


def sgx_body(
    *,
    report_data: bytes = REPORT_DATA,
    mr_enclave: bytes = b"\x22" * 32,
    mr_signer: bytes = b"\x33" * 32,
    flags: int = 0x05,
    isv_prod_id: int = 7,
    isv_svn: int = 5,
) -> bytes:
    """An enclave's report, 384 bytes."""
    body = b"\x03" * 16 + bytes(32) + flags.to_bytes(8, "little") + bytes.fromhex("e700000000000000")
    body += mr_enclave + bytes(32) + mr_signer + bytes(96)
    return body + isv_prod_id.to_bytes(2, "little") + isv_svn.to_bytes(2, "little") + bytes(60) + report_data


def sgx_extension(
    *,
    svn: int = 3,
    fmspc: bytes = FMSPC,
    dynamic_platform: bool = True,
    cached_keys: bool = True,
    smt: bool = True,
) -> bytes:
    """The extension of a PCK certificate that describes its platform (Intel, PCK certificate profile), DER."""
    components = [_entry(f"2.{i}", _integer(svn)) for i in range(1, 18)]
    flags = enumerate((dynamic_platform, cached_keys, smt), 1)
    return _sequence(
        _entry("1", _octets(bytes(16))),
        _entry("2", _sequence(*components, _entry("2.18", _octets(bytes([svn]) * 16)))),
        _entry("3", _octets(bytes(2))),
        _entry("4", _octets(fmspc)),
        _entry("5", _tlv(0x0A, b"\x01")),
        _entry("6", _octets(bytes(16))),
        _entry("7", _sequence(*(_entry(f"7.{i}", _tlv(0x01, b"\xff" if flag else b"\0")) for i, flag in flags))),
    )


def sign(key: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
    """ECDSA P-256 with SHA-256 as r || s, 64 bytes."""
    r, s = utils.decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def pem(*certificates: x509.Certificate) -> str:
    """Certificates one after the other."""
    return "".join(c.public_bytes(Encoding.PEM).decode() for c in certificates)


def typed(kind: int, data: bytes) -> bytes:
    """Certification data: type, size, content."""
    return kind.to_bytes(2, "little") + len(data).to_bytes(4, "little") + data


def _new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)])


def _tlv(tag: int, content: bytes) -> bytes:
    size = len(content)
    long_form = size.to_bytes((size.bit_length() + 7) // 8, "big")
    length = bytes([size]) if size < 128 else bytes([0x80 | len(long_form)]) + long_form
    return bytes([tag]) + length + content


def _octets(content: bytes) -> bytes:
    return _tlv(0x04, content)


def _integer(value: int) -> bytes:
    return _tlv(0x02, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def _sequence(*parts: bytes) -> bytes:
    return _tlv(0x30, b"".join(parts))


def _entry(suffix: str, value: bytes) -> bytes:
    arcs = [int(arc) for arc in f"{SGX_EXTENSION}.{suffix}".split(".")]
    encoded = bytes([arcs[0] * 40 + arcs[1]])
    for arc in arcs[2:]:
        septets = [arc & 0x7F]
        while arc := arc >> 7:
            septets.append(0x80 | arc & 0x7F)
        encoded += bytes(reversed(septets))
    return _sequence(_tlv(0x06, encoded), value)
