"""Checking a whole bundle without its data key: whose it is, that it is complete, and that no byte differs."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from cloister.crypto.bundle.header import FRAME_BYTES, TAG_BYTES, BundleHeader, read_header
from cloister.crypto.bundle.scan import HASH_BYTES, BundleScanner
from cloister.errors import DataError, VerificationError

_READ_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class VerifiedBundle:
    """A bundle whose signatures and ciphertext hold. Its plaintext is still what a party chose to send."""

    path: Path
    header: BundleHeader
    commitment: bytes
    """32 bytes; two different bundles never share one."""
    payload_bytes: int
    data_offset: int
    """Where the first chunk's frame begins in the file."""
    leaves: bytes = field(repr=False)
    """SHA-256 of every chunk, 32 bytes each. The reader checks them again: the disk may change under it."""

    @property
    def num_chunks(self) -> int:
        """How many chunks there are, at least 1."""
        return len(self.leaves) // HASH_BYTES

    def chunk_length(self, index: int) -> int:
        """Plaintext bytes of a chunk."""
        size = self.header.chunk_bytes
        return size if index < self.num_chunks - 1 else self.payload_bytes - index * size

    def chunk_offset(self, index: int) -> int:
        """Where a chunk's ciphertext begins in the file."""
        return self.data_offset + index * (FRAME_BYTES + self.header.chunk_bytes + TAG_BYTES) + FRAME_BYTES

    @classmethod
    def from_scan(cls, path: Path, header: BundleHeader, data_offset: int, scanner: BundleScanner) -> VerifiedBundle:
        """Of a finished scan."""
        if not scanner.done:
            raise RuntimeError("the scan is not done")
        return cls(
            path=path,
            header=header,
            commitment=scanner.commitment,
            payload_bytes=scanner.payload_bytes,
            data_offset=data_offset,
            leaves=bytes(scanner.leaves),
        )


def verify_bundle(
    path: Path | str, *, job_id: str, party: str, public_key: bytes, max_bytes: int | None = None
) -> VerifiedBundle:
    """Read the file once, in memory of 1 MiB, and return it as verified.

    Args:
        public_key: the party's Ed25519 key as the job states it, 32 bytes.
        max_bytes: refuse a longer file unread.
    Raises: VerificationError with code "size", "magic", "header", "job", "party", "signature", "frame",
        "truncated", "trailing", "trailer", "commitment"; DataError if the file cannot be read.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _verify(file, path, job_id, party, public_key, max_bytes)
    except OSError as exc:
        raise DataError(f"cannot read the bundle: {exc.strerror}", where=str(path)) from exc
    except VerificationError as exc:
        exc.where = exc.where or str(path)
        raise


def _verify(
    file: BinaryIO, path: Path, job_id: str, party: str, public_key: bytes, max_bytes: int | None
) -> VerifiedBundle:
    # (1) The size, before anything is read.
    size = os.fstat(file.fileno()).st_size
    if max_bytes is not None and size > max_bytes:
        raise VerificationError("size", f"the bundle has {size} bytes, allowed are {max_bytes}")
    # (2) The header: form, job, party, signature.
    unverified = read_header(file)
    header = unverified.verify(job_id=job_id, party=party, public_key=public_key)
    if size > header.max_file_bytes:
        raise VerificationError("size", f"the bundle has {size} bytes, its header allows {header.max_file_bytes}")
    # (3) Chunks and trailer: frames as the header says, every hash, the commitment, its signature.
    scanner = BundleScanner(header, public_key)
    if scan_file(file, scanner):
        raise VerificationError("trailing", "there are bytes after the bundle's end")
    # (4) The end was reached.
    if not scanner.done:
        raise VerificationError("truncated", "the bundle ends before its end", hint="send or copy the file again")
    return VerifiedBundle.from_scan(path, header, len(unverified.prefix), scanner)


def scan_file(file: BinaryIO, scanner: BundleScanner) -> int:
    """Feed the rest of an open file; return how many bytes lie behind the bundle's end, as far as it was read."""
    buffer = memoryview(bytearray(_READ_BYTES))
    while count := file.readinto(buffer):  # type: ignore[attr-defined]  # files opened in binary mode have it
        if excess := scanner.feed(buffer[:count]):
            return excess
    return 0
