"""Sealing state for a later instance of the same program: AES-256-GCM in chunks, under a key used once.

The sealing key lives in an enclave's memory, and as shares with the parties (`sharing`). Every sealed state has a key
of its own, derived from it with a random salt and with all that the state is for. What is sealed can have any
length: chunk i has nonce i, and its associated data say whether it is the last, so that nothing can be cut off.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cloister.crypto.bundle.writer import disk_error, remove_part, sync_folder, write_all
from cloister.crypto.encoding import join
from cloister.crypto.sharing import SECRET_BYTES, combine, split
from cloister.errors import VerificationError

SALT_BYTES = 32
CHUNK_BYTES = 16 << 20
_TAG_BYTES, _NONCE_BYTES = 16, 12


class SealingKey:
    """A 256-bit secret from which sealing keys derive. Its repr is masked, it cannot be serialised."""

    __slots__ = ("_secret",)

    def __init__(self, secret: bytes) -> None:
        if len(secret) != SECRET_BYTES:
            raise ValueError(f"a sealing key has {SECRET_BYTES} bytes, not {len(secret)}")
        self._secret = bytes(secret)

    @classmethod
    def generate(cls) -> SealingKey:
        """Draw a fresh key."""
        return cls(secrets.token_bytes(SECRET_BYTES))

    @classmethod
    def from_shares(cls, shares: list[bytes], *, quorum: int) -> SealingKey:
        """See `sharing.combine`."""
        return cls(combine(shares, quorum=quorum))

    def shares(self, *, quorum: int, count: int) -> list[bytes]:
        """See `sharing.split`."""
        return split(self._secret, quorum=quorum, count=count)

    def seal(self, plain: bytes, *, salt: bytes, purpose: bytes) -> bytes:
        """Encrypt.

        Args:
            salt: 32 random bytes, drawn for this call and stored beside the result.
            purpose: everything that the state is for and that must hold when it is opened.
        """
        aead, bound = self._aead(salt, purpose), hashlib.sha256(purpose).digest()
        last = max(0, len(plain) - 1) // CHUNK_BYTES
        parts = memoryview(plain)
        return b"".join(
            aead.encrypt(_nonce(i), parts[i * CHUNK_BYTES : (i + 1) * CHUNK_BYTES], _associated(bound, i, i == last))
            for i in range(last + 1)
        )

    def open(self, sealed: bytes, *, salt: bytes, purpose: bytes) -> bytes:
        """Decrypt what `seal` made with the same key, salt and purpose.

        Raises:
            VerificationError: "sealed": anything differs.
        """
        aead, bound = self._aead(salt, purpose), hashlib.sha256(purpose).digest()
        size, parts = CHUNK_BYTES + _TAG_BYTES, memoryview(sealed)
        last = max(0, len(sealed) - 1) // size
        try:
            return b"".join(
                aead.decrypt(_nonce(i), parts[i * size : (i + 1) * size], _associated(bound, i, i == last))
                for i in range(last + 1)
            )
        except InvalidTag as exc:
            hint = "it was altered, or sealed by another program, for another job or under another key"
            raise VerificationError("sealed", "sealed state cannot be opened", hint=hint) from exc

    def _aead(self, salt: bytes, purpose: bytes) -> AESGCM:
        info = join(b"cloister sealed state v1", purpose)
        return AESGCM(HKDF(algorithm=SHA256(), length=32, salt=salt, info=info).derive(self._secret))

    def __repr__(self) -> str:
        return "SealingKey(***)"

    def __reduce__(self) -> str:
        raise TypeError("a sealing key is not to be serialised")


def _nonce(index: int) -> bytes:
    return index.to_bytes(_NONCE_BYTES, "big")


def _associated(purpose_sha256: bytes, index: int, last: bool) -> bytes:
    return purpose_sha256 + index.to_bytes(8, "big") + bytes([last])


def write_durably(path: Path, *parts: bytes, mode: int = 0o600) -> None:
    """Put a file in place whole or not at all, and on disk before this returns.

    Args:
        mode: who may read it, less the process's umask.

    Raises:
        CapacityError, DataError: see `disk_error`; what was there before stays.
    """
    part = path.with_name(path.name + ".part")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        fd = os.open(part, flags, mode)
        try:
            for each in parts:
                write_all(fd, each)
            os.fsync(fd)
        finally:
            os.close(fd)
        part.replace(path)
        sync_folder(path)
    except OSError as exc:
        remove_part(part)
        raise disk_error(exc, path, sum(map(len, parts))) from exc
