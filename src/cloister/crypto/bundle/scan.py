"""Checking a bundle's bytes as they pass by: frames, hashes, trailer; used on files and on uploads alike."""

from __future__ import annotations

import hashlib
from hmac import compare_digest

from cloister.crypto.bundle.header import (
    FRAME_BYTES,
    LAST_FLAG,
    MAX_TRAILER_BYTES,
    TAG_BYTES,
    TRAILER_LABEL,
    BundleHeader,
    trailer_message,
)
from cloister.crypto.encoding import Fields
from cloister.crypto.keys import SIGNATURE_BYTES, verify_signature
from cloister.errors import ProtocolError, VerificationError

HASH_BYTES = 32


class BundleScanner:
    """Takes everything behind a verified header, in pieces of any size; keeps 32 bytes per chunk and no content.

    Args:
        header: verified to be the party's. public_key: the party's Ed25519 key.
    """

    def __init__(self, header: BundleHeader, public_key: bytes) -> None:
        self.done = False
        """Whether the end is reached and everything up to it holds."""
        self.payload_bytes = 0
        self.commitment = b""
        self.leaves = bytearray()
        """SHA-256 of every chunk's ciphertext, 32 bytes each."""
        self._header = header
        self._public_key = public_key
        self._chunk_left = 0
        self._chunk_hash = hashlib.sha256()
        self._last = False
        self._trailer_bytes: int | None = None
        self._word = bytearray()

    def feed(self, data: bytes | memoryview) -> int:
        """Take the next bytes; return how many lie behind the bundle's end.

        Raises: VerificationError with code "frame", "size", "trailer", "signature" or "commitment".
        """
        view = memoryview(data)
        while view and not self.done:
            view = self._chunk(view) if self._chunk_left else self._collect(view)
        return len(view)

    def _chunk(self, view: memoryview) -> memoryview:
        take = min(self._chunk_left, len(view))
        self._chunk_hash.update(view[:take])
        self._chunk_left -= take
        if self._chunk_left == 0:
            self.leaves += self._chunk_hash.digest()
        return view[take:]

    def _collect(self, view: memoryview) -> memoryview:
        """Gather a frame word, the trailer's length or the trailer, then act on it."""
        wanted = FRAME_BYTES if self._trailer_bytes is None else self._trailer_bytes
        take = min(wanted - len(self._word), len(view))
        self._word += view[:take]
        if len(self._word) == wanted:
            word, self._word = bytes(self._word), bytearray()
            if self._trailer_bytes is not None:
                self._trailer(word)
            elif self._last:
                self._trailer_length(word)
            else:
                self._frame(word)
        return view[take:]

    def _frame(self, word: bytes) -> None:
        value = int.from_bytes(word, "big")
        self._last, length = bool(value & LAST_FLAG), value & (LAST_FLAG - 1)
        full = self._header.chunk_bytes + TAG_BYTES
        # Only a bundle without content has an empty chunk, so that a content has one form.
        lowest = TAG_BYTES + 1 if self.leaves else TAG_BYTES
        if not (lowest <= length <= full if self._last else length == full):
            raise VerificationError("frame", f"the bundle has a chunk of {length} bytes where its header has none")
        self.payload_bytes += length - TAG_BYTES
        if self.payload_bytes > self._header.max_payload_bytes:
            raise VerificationError("size", f"the bundle holds more than the {self._header.max_payload_bytes} bytes "
                                    "that its header allows")  # fmt: skip
        self._chunk_left = length
        self._chunk_hash = hashlib.sha256()

    def _trailer_length(self, word: bytes) -> None:
        length = int.from_bytes(word, "big")
        if not 0 < length <= MAX_TRAILER_BYTES:
            raise VerificationError("trailer", f"the bundle's trailer claims {length} bytes")
        self._trailer_bytes = length

    def _trailer(self, data: bytes) -> None:
        try:
            fields = Fields.decode(data, max_bytes=MAX_TRAILER_BYTES, what="bundle trailer")
            payload_bytes = fields.integer("payload_bytes", low=0, high=self._header.max_payload_bytes)
            commitment = fields.blob("commitment", size=HASH_BYTES)
            signature = fields.blob("signature", size=SIGNATURE_BYTES)
            fields.end()
        except ProtocolError as exc:
            raise VerificationError("trailer", f"the bundle's trailer is malformed: {exc}") from exc
        header_hash = self._header.hash
        message = trailer_message(header_hash, payload_bytes, commitment)
        verify_signature(self._public_key, TRAILER_LABEL, message, signature, where=self._header.party)
        found = hashlib.sha256(header_hash + self.leaves).digest()
        if payload_bytes != self.payload_bytes or not compare_digest(commitment, found):
            hint = "a byte was altered on the way or on disk; send the file again"
            raise VerificationError("commitment", "the bundle's content is not what its party signed", hint=hint)
        self.commitment = commitment
        self.done = True
