"""Wrapping small secrets (data keys, a released adapter's key) to a public key: HPKE, RFC 9180, base mode.

Suite: ML-KEM-768 with X25519 (hybrid: safe while either holds), HKDF-SHA256, AES-256-GCM. Base mode does not say who
wrapped: the sender signs the result. `info` must name everything that the secret is for.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)

from cloister.errors import VerificationError

MLKEM_PUBLIC_BYTES = 1184
PUBLIC_BYTES = MLKEM_PUBLIC_BYTES + 32
OVERHEAD_BYTES = 1088 + 32 + 16
"""ML-KEM ciphertext, X25519 share, AES-GCM tag."""

_SUITE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


class HpkeKey:
    """A hybrid private key held in memory only: the one of an enclave instance, or a party's for one release."""

    __slots__ = ("_private", "public")

    public: bytes
    """1216 bytes: ML-KEM-768 encapsulation key, X25519 public key."""

    def __init__(self, mlkem: MLKEM768PrivateKey, x25519: X25519PrivateKey) -> None:
        self._private = MLKEM768X25519PrivateKey(mlkem, x25519)
        self.public = mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()

    @classmethod
    def generate(cls) -> HpkeKey:
        """Draw a fresh key."""
        return cls(MLKEM768PrivateKey.generate(), X25519PrivateKey.generate())

    def unwrap(self, wrapped: bytes, info: bytes) -> bytes:
        """Return what was wrapped to this key under the same `info`.

        Raises: VerificationError("unwrap") if anything differs.
        """
        try:
            return _SUITE.decrypt(wrapped, self._private, info)
        except (InvalidTag, ValueError) as exc:
            hint = "it was wrapped to another key, for another purpose, or altered on the way"
            raise VerificationError("unwrap", "a wrapped secret cannot be opened", hint=hint) from exc

    def __repr__(self) -> str:
        return "HpkeKey(***)"

    def __reduce__(self) -> str:
        raise TypeError("a private key is not to be serialised")


def wrap(public: bytes, plaintext: bytes, info: bytes) -> bytes:
    """Encrypt `plaintext` to a public key; returns OVERHEAD_BYTES more than went in.

    Args:
        public: 1216 bytes, verified by the caller to belong to the intended reader (attested, or signed).
        info: what the secret is for, in an unambiguous encoding (`encoding.join`).
    Raises: VerificationError("public-key") if the key is malformed.
    """
    if len(public) != PUBLIC_BYTES:
        raise VerificationError("public-key", f"an HPKE public key has {PUBLIC_BYTES} bytes, not {len(public)}")
    try:
        key = MLKEM768X25519PublicKey(
            MLKEM768PublicKey.from_public_bytes(public[:MLKEM_PUBLIC_BYTES]),
            X25519PublicKey.from_public_bytes(public[MLKEM_PUBLIC_BYTES:]),
        )
        return _SUITE.encrypt(plaintext, key, info)
    except ValueError as exc:
        raise VerificationError("public-key", "the HPKE public key is malformed") from exc


def unwrap(private: HpkeKey, wrapped: bytes, info: bytes) -> bytes:
    """See `HpkeKey.unwrap`."""
    return private.unwrap(wrapped, info)
