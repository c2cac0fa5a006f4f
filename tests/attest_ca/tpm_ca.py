"""A TPM in software, as far as attestation needs one: keys, PCRs, quotes, and the TPM's side of credential activation.

Structures are written here a second time, from "TPM 2.0 Library, Part 2" and "Part 1", so that production does not read
what production wrote. It can also do what a TPM never does: sign forged structures and claim false attributes. Never in
the package; the real protocol peer is swtpm, in tests/tpm.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from cryptography.hazmat.decrepit.ciphers.modes import CFB
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.hashes import SHA256

from cloister.attest.backends.tpm import TYPE, pack
from cloister.attest.evidence import Evidence
from cloister.tpm import templates
from cloister.tpm.commands import Loaded

MAGIC, QUOTE, CERTIFY, CREATION = b"\xffTCG", 0x8018, 0x8017, 0x801A
SHA1, SHA_256, NULL, RSASSA, RSAPSS, ECDSA, P256, RSA, ECC = 0x04, 0x0B, 0x10, 0x14, 0x16, 0x18, 0x03, 0x01, 0x23
RESTRICTED_SIGNING = 0x00050472
"""fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, noDA, restricted, sign."""
FIXED_TPM, FIXED_PARENT, ORIGIN, RESTRICTED, DECRYPT, SIGN = 1 << 1, 1 << 4, 1 << 5, 1 << 16, 1 << 17, 1 << 18
EK_POLICY = bytes.fromhex("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa")

AK = ec.derive_private_key(0xA11CE, ec.SECP256R1())
RSA_AK = rsa.generate_private_key(65537, 2048)
REPORT_DATA = bytes(range(64))


def b2(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data


def ecc_public(
    key: ec.EllipticCurvePrivateKey = AK,
    *,
    attributes: int = RESTRICTED_SIGNING,
    name_alg: int = SHA_256,
    scheme: int = ECDSA,
    curve: int = P256,
    point: tuple[int, int] | None = None,
) -> bytes:
    """TPMT_PUBLIC of a signing key on P-256."""
    numbers = key.public_key().public_numbers()
    x, y = (n.to_bytes(32, "big") for n in point or (numbers.x, numbers.y))
    head = struct.pack(">HHIHHHHHH", ECC, name_alg, attributes, 0, NULL, scheme, SHA_256, curve, NULL)
    return head + b2(x) + b2(y)


def rsa_public(
    key: rsa.RSAPrivateKey = RSA_AK,
    *,
    scheme: int = RSASSA,
    bits: int | None = None,
    exponent: int = 0,
    modulus: bytes | None = None,
) -> bytes:
    """TPMT_PUBLIC of an RSA signing key."""
    size = key.key_size if bits is None else bits
    head = struct.pack(">HHIHHHHHI", RSA, SHA_256, RESTRICTED_SIGNING, 0, NULL, scheme, SHA_256, size, exponent)
    return head + b2(
        key.public_key().public_numbers().n.to_bytes(key.key_size // 8, "big") if modulus is None else modulus
    )


def ek_public(key: rsa.RSAPrivateKey) -> bytes:
    """TPMT_PUBLIC of an endorsement key made from the standard template."""
    head = struct.pack(">HHI", RSA, SHA_256, 0x000300B2) + b2(EK_POLICY)
    return (
        head
        + struct.pack(">HHHHHI", 6, 128, 0x43, NULL, 2048, 0)
        + b2(key.public_key().public_numbers().n.to_bytes(256, "big"))
    )


def name_of(public: bytes) -> bytes:
    return b"\0\x0b" + hashlib.sha256(public).digest()


def select(pcrs: Iterable[int], *, bank: int = SHA_256, size: int = 3) -> bytes:
    """TPML_PCR_SELECTION of one bank."""
    bits = sum(1 << pcr for pcr in pcrs)
    return struct.pack(">IHB", 1, bank, size) + bits.to_bytes(size, "little")


def attest(
    pcrs: Mapping[int, bytes],
    *,
    extra_data: bytes = hashlib.sha256(REPORT_DATA).digest(),
    magic: bytes = MAGIC,
    kind: int = QUOTE,
    selection: bytes | None = None,
    resets: int = 7,
) -> bytes:
    """TPMS_ATTEST of a quote."""
    head = magic + struct.pack(">H", kind) + b2(name_of(b"qualified")) + b2(extra_data)
    clock = struct.pack(">QIIBQ", 123_456, resets, 1, 1, 0x20191023_00163636)
    digest = hashlib.sha256(b"".join(pcrs[n] for n in sorted(pcrs))).digest()
    return head + clock + (select(pcrs) if selection is None else selection) + b2(digest)


def sign(message: bytes, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey = AK, *, pss: bool = False) -> bytes:
    """TPMT_SIGNATURE."""
    if isinstance(key, ec.EllipticCurvePrivateKey):
        r, s = decode_dss_signature(key.sign(message, ec.ECDSA(SHA256())))
        return struct.pack(">HH", ECDSA, SHA_256) + b2(r.to_bytes(32, "big")) + b2(s.to_bytes(32, "big"))
    how: Any = padding.PSS(mgf=padding.MGF1(SHA256()), salt_length=32) if pss else padding.PKCS1v15()
    return struct.pack(">HH", RSAPSS if pss else RSASSA, SHA_256) + b2(key.sign(message, how, SHA256()))


def quote(
    pcrs: Mapping[int, bytes],
    *,
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey = AK,
    public: bytes | None = None,
    pss: bool = False,
    event_log: bytes = b"",
    shown: Mapping[int, bytes] | None = None,
    **changes: Any,
) -> Evidence:
    """Evidence; `shown` are PCR values that are sent instead of those quoted, `changes` those of `attest`."""
    if public is None:
        public = ecc_public(key) if isinstance(key, ec.EllipticCurvePrivateKey) else rsa_public(key)
    message = attest(pcrs, **changes)
    values = pcrs if shown is None else shown
    blob = pack(attest=message, signature=sign(message, key, pss=pss), public=public, pcrs=values)
    return Evidence(type=TYPE, blob=blob, event_log=event_log)


class SoftwareTpm:
    """Has the methods of `cloister.tpm.commands.Tpm` that attestation calls."""

    def __init__(self, *, ak: ec.EllipticCurvePrivateKey = AK, certificate: bytes | None = None) -> None:
        self.ek = rsa.generate_private_key(65537, 2048)
        self.ak = ak
        self.certificate = certificate
        self.pcrs = dict.fromkeys(range(16), bytes(32))
        self.device = SimpleNamespace(address="software")
        self.is_open = False

    def __enter__(self) -> SoftwareTpm:
        self.is_open = True
        return self

    def __exit__(self, *_: object) -> None:
        self.is_open = False

    @contextmanager
    def primary(self, hierarchy: int, template: bytes) -> Iterator[Loaded]:
        assert hierarchy == 0x4000000B
        assert template in (templates.ENDORSEMENT_KEY, templates.attestation_key())
        public = ek_public(self.ek) if template == templates.ENDORSEMENT_KEY else ecc_public(self.ak)
        yield Loaded(handle=0x80000000, public=public, name=name_of(public))

    def endorsement_certificate(self) -> bytes | None:
        return self.certificate

    def pcr_read(self, pcrs: Iterable[int]) -> dict[int, bytes]:
        return {pcr: self.pcrs[pcr] for pcr in pcrs}

    def pcr_extend(self, pcr: int, digest: bytes) -> None:
        self.pcrs[pcr] = hashlib.sha256(self.pcrs[pcr] + digest).digest()

    def quote(self, key: Loaded, extra_data: bytes, pcrs: Iterable[int]) -> tuple[bytes, bytes]:
        message = attest(self.pcr_read(pcrs), extra_data=extra_data)
        return message, sign(message, self.ak)

    def activate_credential(self, key: Loaded, endorsement_key: Loaded, credential: bytes, seed: bytes) -> bytes:
        """Part 1, section 24. Raises: ValueError where a TPM answers TPM_RC_INTEGRITY or TPM_RC_VALUE."""
        oaep = padding.OAEP(mgf=padding.MGF1(SHA256()), algorithm=SHA256(), label=b"IDENTITY\0")
        secret = self.ek.decrypt(seed, oaep)
        size = int.from_bytes(credential[:2], "big")
        tag, encrypted = credential[2 : 2 + size], credential[2 + size :]
        if not hmac.compare_digest(
            tag, hmac.digest(kdfa(secret, "INTEGRITY", b"", 256), encrypted + key.name, "sha256")
        ):
            raise ValueError("integrity")
        decryptor = Cipher(algorithms.AES(kdfa(secret, "STORAGE", key.name, 128)), CFB(bytes(16))).decryptor()
        plain = decryptor.update(encrypted) + decryptor.finalize()
        assert int.from_bytes(plain[:2], "big") == len(plain) - 2
        return plain[2:]


def kdfa(key: bytes, label: str, context: bytes, bits: int) -> bytes:
    """Part 1, section 11.4.10.2, for at most 256 bits: one round."""
    message = struct.pack(">I", 1) + label.encode() + b"\0" + context + struct.pack(">I", bits)
    return hmac.digest(key, message, "sha256")[: bits // 8]
