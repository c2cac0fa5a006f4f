"""Writing a sealed bundle: streaming, in memory of two chunks, and all or nothing."""

from __future__ import annotations

import errno
import hashlib
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cloister.crypto.bundle.header import (
    FRAME_BYTES,
    LAST_FLAG,
    TAG_BYTES,
    TRAILER_LABEL,
    BundleHeader,
    UnverifiedHeader,
    chunk_aad,
    chunk_nonce,
    trailer_message,
)
from cloister.crypto.encoding import encode
from cloister.crypto.keys import DataKey, PartyKey
from cloister.errors import CapacityError, DataError

_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


def disk_error(exc: OSError, path: Path, bytes_needed: int) -> CapacityError | DataError:
    """Turn a failed write into an error that says what to do."""
    if exc.errno in _FULL:
        message = f"no space left on the device: up to {bytes_needed} more bytes are needed"
        return CapacityError(message, where=str(path), hint="free some space or choose another folder")
    hint = "see that the folder can be written to, then start again"
    return DataError(f"cannot write: {exc.strerror}", where=str(path), hint=hint)


def write_all(fd: int, data: bytes | bytearray | memoryview) -> None:
    """`os.write` until everything is written. Raises: OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def remove_part(part: Path) -> None:
    """Remove what a failed write has left; where that fails too, the failure of the write is the one to report."""
    with suppress(OSError):
        part.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Make a rename in `path`'s folder durable, where the system can (not on Windows)."""
    if os.name != "posix":
        return
    fd = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class BundleWriter:
    """Context manager that encrypts what is written to it into `path`.

    The file appears under its name only when it is complete and on disk. If the block raises, or the process dies,
    nothing usable is left; the bundle is begun anew with a new key (a key must never encrypt two contents).

    Args:
        key: the party's key; signs header and trailer.
    Raises: CapacityError if the disk is full or the header's max_payload_bytes is exceeded; DataError if the file
        cannot be written.
    """

    def __init__(self, path: Path | str, header: BundleHeader, key: PartyKey) -> None:
        self.path = Path(path)
        self.header = header
        self.data_key = DataKey.generate()
        self.payload_bytes = 0
        self.commitment: bytes | None = None
        """32 bytes, once the bundle is complete."""
        self._key = key
        self._part = self.path.with_name(self.path.name + ".part")
        self._fd = -1
        self._aead = AESGCM(self.data_key.reveal())
        self._header_hash = header.hash
        # A party that knows the data key can make two contents with equal GCM tags, so tags commit to nothing.
        # The commitment must be a collision-resistant hash over the ciphertext.
        self._commitment = hashlib.sha256(self._header_hash)
        self._index = 0
        self._plain = bytearray(header.chunk_bytes)
        self._filled = 0
        self._frame = bytearray(FRAME_BYTES + header.chunk_bytes + TAG_BYTES)

    def __enter__(self) -> BundleWriter:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        try:
            self._fd = os.open(self._part, flags, 0o600)
        except OSError as exc:
            raise disk_error(exc, self._part, self.header.max_file_bytes) from exc
        try:
            self._write(UnverifiedHeader.sign(self.header, self._key).prefix)
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append plaintext of any length. Any contiguous buffer will do; it is not kept."""
        if self._fd < 0:
            raise RuntimeError("the bundle is not open")
        view = memoryview(data).cast("B")
        if self.payload_bytes + len(view) > self.header.max_payload_bytes:
            message = f"more than the {self.header.max_payload_bytes} bytes that the bundle's header allows"
            raise CapacityError(message, where=str(self.path))
        self.payload_bytes += len(view)
        size = self.header.chunk_bytes
        while view:
            # A full buffer is sealed only when more follows: the last chunk carries its flag.
            if self._filled == size:
                self._seal(memoryview(self._plain), last=False)
                self._filled = 0
            if self._filled == 0 and len(view) > size:
                self._seal(view[:size], last=False)
                view = view[size:]
                continue
            take = min(size - self._filled, len(view))
            self._plain[self._filled : self._filled + take] = view[:take]
            self._filled += take
            view = view[take:]

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        if kind is not None:
            self._discard()
            return
        try:
            self._finish()
        except BaseException:
            self._discard()
            raise

    def _finish(self) -> None:
        self._seal(memoryview(self._plain)[: self._filled], last=True)
        self._plain[:] = bytes(len(self._plain))
        commitment = self._commitment.digest()
        signature = self._key.sign(TRAILER_LABEL, trailer_message(self._header_hash, self.payload_bytes, commitment))
        trailer = encode({"payload_bytes": self.payload_bytes, "commitment": commitment, "signature": signature})
        self._write(len(trailer).to_bytes(FRAME_BYTES, "big") + trailer)
        try:
            os.fsync(self._fd)
            os.close(self._fd)
            self._fd = -1
            self._part.replace(self.path)
            sync_folder(self.path)
        except OSError as exc:
            raise disk_error(exc, self.path, self.header.max_file_bytes) from exc
        self.commitment = commitment

    def _seal(self, plain: memoryview, *, last: bool) -> None:
        length = len(plain) + TAG_BYTES
        end = FRAME_BYTES + length
        self._frame[:FRAME_BYTES] = (length | (LAST_FLAG if last else 0)).to_bytes(FRAME_BYTES, "big")
        sealed = memoryview(self._frame)[FRAME_BYTES:end]
        aad = chunk_aad(self._header_hash, self._index, last=last)
        self._aead.encrypt_into(chunk_nonce(self._index), plain, aad, sealed)
        self._commitment.update(hashlib.sha256(sealed).digest())
        self._write(memoryview(self._frame)[:end])
        self._index += 1

    def _write(self, data: bytes | memoryview) -> None:
        try:
            write_all(self._fd, data)
        except OSError as exc:
            written = self._index * (FRAME_BYTES + self.header.chunk_bytes + TAG_BYTES)
            raise disk_error(exc, self.path, max(1, self.header.max_file_bytes - written)) from exc

    def _discard(self) -> None:
        self._plain[:] = bytes(len(self._plain))
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        remove_part(self._part)
