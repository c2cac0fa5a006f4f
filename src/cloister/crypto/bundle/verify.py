"""Checking a whole bundle without its data key: whose it is, that it is complete, and that no byte differs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from hmac import compare_digest
from pathlib import Path
from typing import BinaryIO

from cloister.crypto.bundle.header import (
    FRAME_BYTES,
    LAST_FLAG,
    MAX_TRAILER_BYTES,
    TAG_BYTES,
    TRAILER_LABEL,
    BundleHeader,
    read_exactly,
    read_header,
    trailer_message,
)
from cloister.crypto.encoding import Fields
from cloister.crypto.keys import SIGNATURE_BYTES, verify_signature
from cloister.errors import DataError, ProtocolError, VerificationError

HASH_BYTES = 32


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


def verify_bundle(
    path: Path | str, *, job_id: str, party: str, public_key: bytes, max_bytes: int | None = None
) -> VerifiedBundle:
    """Read the file once, in memory of one chunk, and return it as verified.

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
    # (3) The chunks: frames as the header says, and the hash of each.
    digest = hashlib.sha256(header.hash)
    leaves = bytearray()
    payload_bytes = 0
    for length, leaf in _chunks(file, header):
        payload_bytes += length
        leaves += leaf
        digest.update(leaf)
    if payload_bytes > header.max_payload_bytes:
        raise VerificationError("size", f"the bundle holds {payload_bytes} bytes, more than its header allows")
    # (4) The trailer: form, length, commitment, signature; (5) nothing behind it.
    commitment = _trailer(file, header, payload_bytes, digest.digest(), public_key)
    if file.read(1):
        raise VerificationError("trailing", "there are bytes after the bundle's end")
    return VerifiedBundle(
        path=path,
        header=header,
        commitment=commitment,
        payload_bytes=payload_bytes,
        data_offset=len(unverified.prefix),
        leaves=bytes(leaves),
    )


def parse_frame(word: bytes, header: BundleHeader, *, first: bool) -> tuple[int, bool]:
    """Return (ciphertext length, last) of a chunk's frame word.

    Raises: VerificationError("frame") if the header does not allow such a chunk here.
    """
    value = int.from_bytes(word, "big")
    last = bool(value & LAST_FLAG)
    length = value & (LAST_FLAG - 1)
    full = header.chunk_bytes + TAG_BYTES
    lowest = TAG_BYTES if first else TAG_BYTES + 1
    if not (lowest <= length <= full if last else length == full):
        raise VerificationError("frame", f"the bundle has a chunk of {length} bytes where its header has none")
    return length, last


def _chunks(file: BinaryIO, header: BundleHeader) -> Iterator[tuple[int, bytes]]:
    """Yield (plaintext length, SHA-256 of the ciphertext) of every chunk."""
    buffer = memoryview(bytearray(header.chunk_bytes + TAG_BYTES))
    last = False
    index = 0
    while not last:
        length, last = parse_frame(read_exactly(file, FRAME_BYTES), header, first=index == 0)
        chunk = buffer[:length]
        if file.readinto(chunk) != length:  # type: ignore[attr-defined]  # a BufferedReader has it
            raise VerificationError("truncated", "the bundle ends before its end", hint="send or copy the file again")
        yield length - TAG_BYTES, hashlib.sha256(chunk).digest()
        index += 1


def _trailer(file: BinaryIO, header: BundleHeader, payload_bytes: int, commitment: bytes, public_key: bytes) -> bytes:
    length = int.from_bytes(read_exactly(file, FRAME_BYTES), "big")
    if length > MAX_TRAILER_BYTES:
        raise VerificationError("trailer", f"the bundle's trailer claims {length} bytes")
    try:
        fields = Fields.decode(read_exactly(file, length), max_bytes=MAX_TRAILER_BYTES, what="bundle trailer")
        claimed_bytes = fields.integer("payload_bytes", low=0, high=header.max_payload_bytes)
        claimed = fields.blob("commitment", size=HASH_BYTES)
        signature = fields.blob("signature", size=SIGNATURE_BYTES)
        fields.end()
    except ProtocolError as exc:
        raise VerificationError("trailer", f"the bundle's trailer is malformed: {exc}") from exc
    message = trailer_message(header.hash, claimed_bytes, claimed)
    verify_signature(public_key, TRAILER_LABEL, message, signature, where=header.party)
    if claimed_bytes != payload_bytes or not compare_digest(claimed, commitment):
        hint = "a byte was altered on the way or on disk; send the file again"
        raise VerificationError("commitment", "the bundle's content is not what its party signed", hint=hint)
    return commitment
