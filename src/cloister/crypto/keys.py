"""A party's long-lived Ed25519 key, signatures with domain separation, and secret types that do not print.

The public key stands in the job file; everybody compares its `fingerprint` out of band. A signature is always over
(label, message), so that one made for one purpose is never valid for another.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from cloister.crypto.encoding import join
from cloister.errors import UsageError, VerificationError

PUBLIC_KEY_BYTES = 32
SIGNATURE_BYTES = 64
DATA_KEY_BYTES = 32
_MAX_KEY_FILE_BYTES = 16384


class DataKey:
    """A 256-bit AES key of one bundle. Its repr is masked; `reveal` is the only way to the bytes."""

    __slots__ = ("_secret",)

    def __init__(self, secret: bytes) -> None:
        if len(secret) != DATA_KEY_BYTES:
            raise ValueError(f"a data key has {DATA_KEY_BYTES} bytes, not {len(secret)}")
        self._secret = bytes(secret)

    @classmethod
    def generate(cls) -> DataKey:
        """Draw a fresh key from the operating system."""
        return cls(secrets.token_bytes(DATA_KEY_BYTES))

    def reveal(self) -> bytes:
        """The 32 secret bytes, for wrapping or for AES."""
        return self._secret

    def __repr__(self) -> str:
        return "DataKey(***)"

    def __reduce__(self) -> str:
        raise TypeError("a data key is not to be serialised")


class PartyKey:
    """An Ed25519 signing key: a party's identity in a job, or the signing key of an enclave instance."""

    __slots__ = ("_private", "public")

    public: bytes
    """32 bytes."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.public = private.public_key().public_bytes_raw()

    @classmethod
    def generate(cls) -> PartyKey:
        """Draw a fresh key."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path | str) -> PartyKey:
        """Read a PKCS8 PEM file that only its owner may read.

        Raises: UsageError if it is missing, readable by others, or not an unencrypted Ed25519 key.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                pem = file.read(_MAX_KEY_FILE_BYTES)
        except OSError as exc:
            hint = "make one with `cloister keygen`"
            raise UsageError(f"cannot read the party key: {exc.strerror}", where=str(path), hint=hint) from exc
        if os.name == "posix" and mode & 0o077:
            raise UsageError("the party key can be read by others", where=str(path), hint=f"chmod 600 {path}")
        try:
            private = load_pem_private_key(pem, password=None)
        except (ValueError, TypeError) as exc:
            raise UsageError("not an unencrypted PKCS8 PEM key", where=str(path)) from exc
        if not isinstance(private, Ed25519PrivateKey):
            raise UsageError("the party key must be an Ed25519 key", where=str(path))
        return cls(private)

    def save(self, path: Path | str) -> None:
        """Write the key as PKCS8 PEM with mode 0600.

        Raises: UsageError if the file exists (a key is never overwritten) or cannot be written.
        """
        pem = self._private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(pem)
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError as exc:
            hint = "a key is never overwritten; choose another path"
            raise UsageError("the key file exists already", where=str(path), hint=hint) from exc
        except OSError as exc:
            raise UsageError(f"cannot write the key: {exc.strerror}", where=str(path)) from exc

    def sign(self, label: str, message: bytes) -> bytes:
        """Sign (label, message); returns 64 bytes."""
        return self._private.sign(_to_sign(label, message))

    def __repr__(self) -> str:
        return f"PartyKey(public={self.public.hex()}, private=***)"

    def __reduce__(self) -> str:
        raise TypeError("a private key is not to be serialised")


def verify_signature(public: bytes, label: str, message: bytes, signature: bytes, *, where: str = "") -> None:
    """Check an Ed25519 signature over (label, message).

    Raises: VerificationError("signature") if it does not hold, whatever is wrong with key or signature.
    """
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, _to_sign(label, message))
    except (InvalidSignature, ValueError) as exc:
        raise VerificationError("signature", f"the signature of this {label} does not hold", where=where) from exc


def fingerprint(public: bytes) -> str:
    """Short form of a public key to compare out of band: 128 bits of its SHA-256, hex in groups of four."""
    text = hashlib.sha256(b"cloister key fingerprint v1" + public).hexdigest()[:32]
    return " ".join(text[i : i + 4] for i in range(0, 32, 4))


def _to_sign(label: str, message: bytes) -> bytes:
    return join(b"cloister signature v1", label.encode(), message)
