"""TPM 2.0 structures that a verifier reads: the public area of an attestation key, a quote and its signature.

Guarantees: a Quote was signed by the key given, over exactly the PCR values given, by a TPM that made the structure
itself (its magic number; only a restricted key cannot be made to sign a forged one). Left to the caller: that the key
belongs to a TPM it trusts (its name must be one that completed credential activation, or a TEE must vouch for it),
and what the extra data, the counters and the PCR values must be.

Source: TCG, "TPM 2.0 Library, Part 2: Structures", revision 1.59; sections are named below. Numbers are big endian.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from hmac import compare_digest
from types import MappingProxyType

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

from cloister.errors import VerificationError

PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey

NUM_PCRS = 24
PCR_BYTES = 32
MAX_STRUCTURE_BYTES = 4096
"""Longer than any of the structures here, with a key of 4096 bits."""

# Table 9 (TPM_ALG_ID), table 10 (TPM_ECC_CURVE), table 19 (TPM_ST), section 10.12.12 (TPMS_ATTEST).
ALG_RSA, ALG_SHA256, ALG_NULL, ALG_RSASSA, ALG_RSAPSS, ALG_ECDSA, ALG_ECC = 0x01, 0x0B, 0x10, 0x14, 0x16, 0x18, 0x23
CURVE_P256 = 0x03
GENERATED = 0xFF544347
ATTEST_QUOTE = 0x8018

# Section 8.3 (TPMA_OBJECT).
_MUST_BE_SET = {
    "fixedTPM": 1 << 1,
    "fixedParent": 1 << 4,
    "sensitiveDataOrigin": 1 << 5,
    "restricted": 1 << 16,
    "sign": 1 << 18,
}
_MUST_BE_CLEAR = {"decrypt": 1 << 17, "x509sign": 1 << 19}
_MIN_RSA_BITS, _MAX_RSA_BITS = 2048, 4096
_DEFAULT_EXPONENT = 65537


@dataclass(frozen=True, kw_only=True)
class AttestationKey:
    """The public area of a key that can only sign what its TPM made. Nothing says yet whose TPM that is."""

    name: bytes
    """nameAlg and SHA-256 of the public area: 34 bytes. It covers every bit of the area."""
    public_key: PublicKey


@dataclass(frozen=True, kw_only=True)
class Quote:
    """A quote whose signature and PCR values were verified."""

    extra_data: bytes
    """What the TPM was asked to sign, at most 64 bytes."""
    pcrs: Mapping[int, bytes]
    """SHA-256 bank, 32 bytes each."""
    clock_ms: int
    """Time that the TPM was powered."""
    reset_count: int
    """Grows with every boot of the machine."""
    restart_count: int
    """Grows with every resume of the machine since its boot."""
    firmware_version: int
    qualified_signer: bytes
    """Qualified name of the key: which hierarchy it hangs from."""


class Cursor:
    """Reads a structure front to back; whatever does not fit is VerificationError("evidence-format")."""

    def __init__(self, data: bytes, what: str) -> None:
        if len(data) > MAX_STRUCTURE_BYTES:
            raise VerificationError("evidence-format", f"{what} has {len(data)} bytes: too long")
        self._data, self._at, self._what = data, 0, what

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        piece = self._data[self._at : self._at + size]
        if len(piece) < size:
            raise VerificationError("evidence-format", f"{self._what} is truncated")
        self._at += size
        return piece

    def number(self, size: int) -> int:
        """An unsigned number of `size` bytes."""
        return int.from_bytes(self.take(size), "big")

    def sized(self, max_size: int) -> bytes:
        """A TPM2B: bytes behind a length of two bytes."""
        size = self.number(2)
        if size > max_size:
            raise VerificationError("evidence-format", f"{self._what} has a field of {size} bytes: too long")
        return self.take(size)

    def end(self) -> None:
        """Refuse bytes that nobody took."""
        if self._at != len(self._data):
            raise VerificationError(
                "evidence-format", f"{self._what} has {len(self._data) - self._at} bytes after its end"
            )


def parse_public(public: bytes) -> AttestationKey:
    """Parse a TPMT_PUBLIC (section 12.2.4), without a length before it, of an attestation key.

    Raises: VerificationError "evidence-format", or "tpm-key" for a key that could sign forged quotes.
    """
    cursor = Cursor(public, "the attestation key's public area")
    algorithm, name_algorithm, attributes = cursor.number(2), cursor.number(2), cursor.number(4)
    if name_algorithm != ALG_SHA256:
        raise VerificationError("tpm-key", "the attestation key's name is not made with SHA-256")
    _check_attributes(attributes)
    cursor.sized(64)  # authPolicy: who may use the key on its machine; nothing to a verifier
    if algorithm == ALG_RSA:
        key: PublicKey = _rsa_key(cursor)
    elif algorithm == ALG_ECC:
        key = _ecc_key(cursor)
    else:
        raise VerificationError("tpm-key", f"attestation keys of algorithm {algorithm:#06x} are not accepted")
    cursor.end()
    name = ALG_SHA256.to_bytes(2, "big") + hashlib.sha256(public).digest()
    return AttestationKey(name=name, public_key=key)


def _check_attributes(attributes: int) -> None:
    """Only a restricted signing key that never leaves its TPM makes its signatures say "a TPM made this"."""
    wrong = [f"{name} is not set" for name, bit in _MUST_BE_SET.items() if not attributes & bit]
    wrong += [f"{name} is set" for name, bit in _MUST_BE_CLEAR.items() if attributes & bit]
    if wrong:
        hint = "an attestation key is a restricted signing key that was made inside its TPM and stays there"
        raise VerificationError("tpm-key", f"the key is not an attestation key: {', '.join(wrong)}", hint=hint)


def _rsa_key(cursor: Cursor) -> rsa.RSAPublicKey:
    """TPMS_RSA_PARMS (section 12.2.3.5) and the modulus."""
    _check_scheme(cursor, (ALG_RSASSA, ALG_RSAPSS))
    bits, exponent = cursor.number(2), cursor.number(4) or _DEFAULT_EXPONENT
    modulus = cursor.sized(_MAX_RSA_BITS // 8)
    if int.from_bytes(modulus, "big").bit_length() != bits:
        raise VerificationError("evidence-format", "the attestation key's modulus is not as long as it says")
    return rsa_public_key(modulus, exponent)


def rsa_public_key(modulus: bytes, exponent: int) -> rsa.RSAPublicKey:
    """Make an RSA key of 2048 to 4096 bits from a big-endian modulus. Raises: VerificationError "tpm-key"."""
    number = int.from_bytes(modulus, "big")
    is_usual = exponent == _DEFAULT_EXPONENT and _MIN_RSA_BITS <= number.bit_length() <= _MAX_RSA_BITS
    if not is_usual or number % 2 == 0:
        raise VerificationError("tpm-key", "the attestation key is an RSA key of unusual length, exponent or modulus")
    return rsa.RSAPublicNumbers(exponent, number).public_key()


def _ecc_key(cursor: Cursor) -> ec.EllipticCurvePublicKey:
    """TPMS_ECC_PARMS (section 12.2.3.6) and the point."""
    _check_scheme(cursor, (ALG_ECDSA,))
    curve, kdf = cursor.number(2), cursor.number(2)
    if curve != CURVE_P256 or kdf != ALG_NULL:
        raise VerificationError("tpm-key", "the attestation key is not on the curve P-256")
    x, y = cursor.sized(32), cursor.sized(32)
    try:
        point = ec.EllipticCurvePublicNumbers(int.from_bytes(x, "big"), int.from_bytes(y, "big"), ec.SECP256R1())
        return point.public_key()
    except ValueError as exc:
        raise VerificationError("tpm-key", "the attestation key's point is not on the curve P-256") from exc


def _check_scheme(cursor: Cursor, schemes: tuple[int, ...]) -> None:
    """No symmetric part, and a signing scheme with SHA-256: what a restricted signing key has to name."""
    symmetric, scheme = cursor.number(2), cursor.number(2)
    if symmetric != ALG_NULL or scheme not in schemes or cursor.number(2) != ALG_SHA256:
        raise VerificationError("tpm-key", "the attestation key does not sign with RSASSA, RSAPSS or ECDSA and SHA-256")


def verify_quote(attest: bytes, signature: bytes, key: PublicKey, pcrs: Mapping[int, bytes]) -> Quote:
    """Verify a quote over the SHA-256 bank.

    Args:
        attest: TPMS_ATTEST, unverified. signature: TPMT_SIGNATURE, unverified. key: one that the caller trusts.
        pcrs: the values that were quoted, by index: exactly those, unverified.
    Raises: VerificationError "evidence-format", "signature", "tpm-quote" (not a quote of this bank) or "pcr".
    """
    # (1) Signed by the key. Nothing is read from the structure before.
    _check_signature(attest, signature, key)
    # (2) Made by a TPM, as a quote.
    cursor = Cursor(attest, "the quote")
    if cursor.number(4) != GENERATED:
        raise VerificationError("tpm-quote", "the signed structure was not made by a TPM")
    if cursor.number(2) != ATTEST_QUOTE:
        raise VerificationError("tpm-quote", "the signed structure is not a quote")
    signer, extra_data = cursor.sized(68), cursor.sized(66)
    clock_ms, resets, restarts = cursor.number(8), cursor.number(4), cursor.number(4)
    cursor.take(1)  # "safe": whether the clock may have gone back at the last power loss; no rule uses the clock
    firmware = cursor.number(8)
    # (3) Over the values given: all of them and no others.
    selected, digest = _read_selection(cursor), cursor.sized(64)
    cursor.end()
    _check_pcrs(selected, digest, pcrs)
    return Quote(
        extra_data=extra_data,
        pcrs=MappingProxyType(dict(sorted(pcrs.items()))),
        clock_ms=clock_ms,
        reset_count=resets,
        restart_count=restarts,
        firmware_version=firmware,
        qualified_signer=signer,
    )


def rsassa_signature(raw: bytes) -> bytes:
    """A TPMT_SIGNATURE around the number of an RSASSA SHA-256 signature, for formats that carry only the number."""
    return b"".join(n.to_bytes(2, "big") for n in (ALG_RSASSA, ALG_SHA256, len(raw))) + raw


def _check_signature(message: bytes, signature: bytes, key: PublicKey) -> None:
    """TPMT_SIGNATURE (section 11.3.4)."""
    cursor = Cursor(signature, "the quote's signature")
    scheme, hash_algorithm = cursor.number(2), cursor.number(2)
    if hash_algorithm != ALG_SHA256:
        raise VerificationError("signature", "the quote is not signed over SHA-256")
    try:
        if isinstance(key, rsa.RSAPublicKey) and scheme in (ALG_RSASSA, ALG_RSAPSS):
            raw = cursor.sized(_MAX_RSA_BITS // 8)
            cursor.end()
            key.verify(raw, message, _padding(scheme), SHA256())
        elif isinstance(key, ec.EllipticCurvePublicKey) and scheme == ALG_ECDSA:
            r, s = (int.from_bytes(cursor.sized(32), "big") for _ in "rs")
            cursor.end()
            key.verify(encode_dss_signature(r, s), message, ec.ECDSA(SHA256()))
        else:
            raise VerificationError("signature", "the quote's signature is of another kind than the attestation key")
    except InvalidSignature as exc:
        raise VerificationError("signature", "the attestation key did not sign this quote") from exc


def _padding(scheme: int) -> padding.PKCS1v15 | padding.PSS:
    if scheme == ALG_RSASSA:
        return padding.PKCS1v15()
    # TPMs choose the salt's length: the hash's, or the most that fits (part 1, annex B.7).
    return padding.PSS(mgf=padding.MGF1(SHA256()), salt_length=padding.PSS.AUTO)


def _read_selection(cursor: Cursor) -> tuple[int, ...]:
    """TPML_PCR_SELECTION (section 10.9.7): one bank, SHA-256. Returns the indices, ascending."""
    if cursor.number(4) != 1 or cursor.number(2) != ALG_SHA256:
        raise VerificationError("tpm-quote", "the quote is not over the SHA-256 bank, or over several banks")
    size = cursor.number(1)
    if size > 4:
        raise VerificationError("evidence-format", "the quote selects among more PCRs than a TPM has")
    bits = int.from_bytes(cursor.take(size), "little")
    return tuple(n for n in range(8 * size) if bits >> n & 1)


def _check_pcrs(selected: tuple[int, ...], digest: bytes, pcrs: Mapping[int, bytes]) -> None:
    if not selected or selected != tuple(sorted(pcrs)) or selected[-1] >= NUM_PCRS:
        hint = "a quote over fewer PCRs says nothing about the others"
        raise VerificationError("pcr", "the quote is not over exactly the PCRs that came with it", hint=hint)
    if any(len(value) != PCR_BYTES for value in pcrs.values()):
        raise VerificationError("evidence-format", f"a PCR of the SHA-256 bank has {PCR_BYTES} bytes")
    if not compare_digest(hashlib.sha256(b"".join(pcrs[n] for n in selected)).digest(), digest):
        raise VerificationError("pcr", "the PCR values are not those that were quoted")
