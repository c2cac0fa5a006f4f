"""Decrypting a verified bundle inside the enclave, chunk by chunk, never to disk."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from hmac import compare_digest
from types import TracebackType

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cloister.crypto.bundle.header import TAG_BYTES, chunk_aad, chunk_nonce
from cloister.crypto.bundle.scan import HASH_BYTES
from cloister.crypto.bundle.verify import VerifiedBundle
from cloister.crypto.keys import DataKey
from cloister.errors import DataError, VerificationError


class SealedReader:
    """Random access to a bundle's plaintext in two chunks of memory; threads may share it and read in turn.

    Each chunk is compared with the hash that `verify_bundle` took before it is decrypted. The tag alone would not
    do: whoever holds the data key (the party) could, together with the disk's owner, swap in another chunk with a
    valid tag after the commitment was signed.
    """

    def __init__(self, bundle: VerifiedBundle, data_key: DataKey) -> None:
        self.bundle = bundle
        self._aead = AESGCM(data_key.reveal())
        self._header_hash = bundle.header.hash
        # One pair for all threads: what each had of its own would outlive it, and nobody could wipe it.
        self._sealed = memoryview(bytearray(bundle.header.chunk_bytes + TAG_BYTES))
        self._plain = memoryview(bytearray(bundle.header.chunk_bytes))
        self._index = -1
        self._lock = threading.Lock()
        try:
            self._file = bundle.path.open("rb", buffering=0)
        except OSError as exc:
            raise DataError(f"cannot read the bundle: {exc.strerror}", where=str(bundle.path)) from exc

    def __enter__(self) -> SealedReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and wipe the plaintext."""
        with self._lock:
            self._file.close()
            self._wipe()

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes of plaintext from `offset`; decrypts only the chunks that cover them.

        Raises: VerificationError with code "chunk" or "tag"; DataError if the file cannot be read; ValueError for
            a range outside the payload.
        """
        out = bytearray(length)
        self.read_into(offset, out)
        return bytes(out)

    def read_into(self, offset: int, out: bytearray | memoryview) -> None:
        """Like `read`, into a writable buffer. After an error its content is not to be used."""
        view = memoryview(out).cast("B")
        if offset < 0 or offset + len(view) > self.bundle.payload_bytes:
            raise ValueError(f"bytes {offset} to {offset + len(view)} are outside the payload")
        size = self.bundle.header.chunk_bytes
        done = 0
        while done < len(view):
            index, start = divmod(offset + done, size)
            with self._lock:
                plain = self._chunk(index)
                take = min(len(plain) - start, len(view) - done)
                view[done : done + take] = plain[start : start + take]
            done += take

    def stream(self) -> Iterator[bytes]:
        """Yield the whole plaintext, one chunk after the other."""
        for index in range(self.bundle.num_chunks):
            with self._lock:
                plain = bytes(self._chunk(index))
            yield plain

    def _chunk(self, index: int) -> memoryview:
        """Plaintext of a chunk, valid until the next call; the lock is the caller's."""
        length = self.bundle.chunk_length(index)
        plain = self._plain[:length]
        if self._index == index:
            return plain
        self._index = -1
        sealed = self._sealed[: length + TAG_BYTES]
        self._pread(sealed, self.bundle.chunk_offset(index))
        leaf = self.bundle.leaves[index * HASH_BYTES : (index + 1) * HASH_BYTES]
        if not compare_digest(hashlib.sha256(sealed).digest(), leaf):
            raise VerificationError(
                "chunk", f"chunk {index} changed on disk after it was verified", where=str(self.bundle.path)
            )
        aad = chunk_aad(self._header_hash, index, last=index == self.bundle.num_chunks - 1)
        try:
            self._aead.decrypt_into(chunk_nonce(index), sealed, aad, plain)
        except InvalidTag as exc:
            self._wipe()  # `decrypt_into` leaves unauthenticated plaintext behind
            hint = "the data key is not this bundle's"
            raise VerificationError(
                "tag", f"chunk {index} cannot be opened", where=str(self.bundle.path), hint=hint
            ) from exc
        self._index = index
        return plain

    def _pread(self, buffer: memoryview, offset: int) -> None:
        try:
            count = self._read_at(buffer, offset)
        except OSError as exc:
            raise DataError(f"cannot read the bundle: {exc.strerror}", where=str(self.bundle.path)) from exc
        if count != len(buffer):
            raise VerificationError("chunk", "the bundle was cut after it was verified", where=str(self.bundle.path))

    def _read_at(self, buffer: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [buffer], offset)
        self._file.seek(offset)  # macOS before 11 and Windows
        return self._file.readinto(buffer) or 0

    def _wipe(self) -> None:
        self._plain[:] = bytes(len(self._plain))
        self._index = -1
