"""A bundle's signed header and the layout of the file that follows from it."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Literal, get_args

from cloister.crypto.encoding import Fields, encode
from cloister.crypto.keys import SIGNATURE_BYTES, PartyKey, verify_signature
from cloister.errors import ProtocolError, VerificationError

MAGIC = b"CLSTRBN1"
VERSION = 1
HEADER_LABEL = "bundle header"
TRAILER_LABEL = "bundle trailer"
TAG_BYTES = 16
FRAME_BYTES = 4
LAST_FLAG = 1 << 31
MAX_HEADER_BYTES = 1 << 16
MAX_TRAILER_BYTES = 256
MIN_CHUNK_BYTES = 64
MAX_CHUNK_BYTES = 16 << 20
MAX_PAYLOAD_BYTES = 1 << 46
MAX_CHUNKS = 1 << 32

Kind = Literal["train", "validation", "test"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # the same as a party's name in a job file
_JOB_ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class BundleHeader:
    """What a party states about a bundle before sending it. Raises ValueError for values out of bounds."""

    job_id: str
    """64 hex digits."""
    party: str
    kind: Kind
    schema: Mapping[str, Any]
    """How the payload is to be read: activation dtype, hidden size, and so on; canonical CBOR values."""
    counts: Mapping[str, int]
    """How much there is: packs, documents, tokens; each >= 0."""
    chunk_bytes: int = 1 << 20
    max_payload_bytes: int
    """The bundle's plaintext is at most this long; a server limits its disk by it."""
    bundle_id: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    """16 random bytes: tells a bundle that was begun anew from the one before, so that their bytes never mix."""

    def __post_init__(self) -> None:
        if not _JOB_ID.fullmatch(self.job_id):
            raise ValueError("job_id must be 64 lower-case hex digits")
        if not _NAME.fullmatch(self.party):
            raise ValueError("party must be a party's name")
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}")
        if not MIN_CHUNK_BYTES <= self.chunk_bytes <= MAX_CHUNK_BYTES:
            raise ValueError(f"chunk_bytes must be from {MIN_CHUNK_BYTES} to {MAX_CHUNK_BYTES}")
        if not 0 <= self.max_payload_bytes <= min(MAX_PAYLOAD_BYTES, self.chunk_bytes * MAX_CHUNKS):
            raise ValueError(f"max_payload_bytes must be from 0 to {MAX_PAYLOAD_BYTES}")
        if len(self.bundle_id) != 16:
            raise ValueError("bundle_id must have 16 bytes")
        if any(type(n) is not int or not 0 <= n < 2**63 for n in self.counts.values()):
            raise ValueError("counts must be integers from 0")
        object.__setattr__(self, "schema", MappingProxyType(dict(self.schema)))
        object.__setattr__(self, "counts", MappingProxyType(dict(self.counts)))

    def to_bytes(self) -> bytes:
        """Canonical CBOR, at most MAX_HEADER_BYTES."""
        fields: dict[str, Any] = {
            "version": VERSION,
            "job_id": self.job_id,
            "party": self.party,
            "kind": self.kind,
            "schema": dict(self.schema),
            "counts": dict(self.counts),
            "chunk_bytes": self.chunk_bytes,
            "max_payload_bytes": self.max_payload_bytes,
            "bundle_id": self.bundle_id,
        }
        data = encode(fields)
        if len(data) > MAX_HEADER_BYTES:
            raise ValueError(f"the header has {len(data)} bytes, allowed are {MAX_HEADER_BYTES}")
        return data

    @property
    def hash(self) -> bytes:
        """SHA-256 of the encoded header: what the signature, every chunk and the commitment are bound to."""
        return hashlib.sha256(self.to_bytes()).digest()

    @property
    def max_file_bytes(self) -> int:
        """The longest file that this header allows."""
        chunks = max(1, -(-self.max_payload_bytes // self.chunk_bytes))
        return (
            len(MAGIC) + FRAME_BYTES + len(self.to_bytes()) + SIGNATURE_BYTES
            + self.max_payload_bytes + chunks * (FRAME_BYTES + TAG_BYTES)
            + FRAME_BYTES + MAX_TRAILER_BYTES
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class UnverifiedHeader:
    """A well-formed header and its signature as found in a file or message: signed by nobody known yet."""

    header: BundleHeader
    encoded: bytes
    signature: bytes

    @classmethod
    def parse(cls, encoded: bytes, signature: bytes) -> UnverifiedHeader:
        """Raises: VerificationError("header") if it is malformed."""
        try:
            if len(signature) != SIGNATURE_BYTES:
                raise ProtocolError(f"bundle header: a signature has {SIGNATURE_BYTES} bytes")
            return cls(header=_parse_header(encoded), encoded=encoded, signature=signature)
        except (ProtocolError, ValueError) as exc:
            raise VerificationError("header", f"the bundle's header is malformed: {exc}") from exc

    @classmethod
    def sign(cls, header: BundleHeader, key: PartyKey) -> UnverifiedHeader:
        """Make a signed header."""
        return cls(header=header, encoded=header.to_bytes(), signature=key.sign(HEADER_LABEL, header.hash))

    @property
    def prefix(self) -> bytes:
        """The first bytes of the bundle's file."""
        return MAGIC + len(self.encoded).to_bytes(FRAME_BYTES, "big") + self.encoded + self.signature

    def verify(self, *, job_id: str, party: str, public_key: bytes) -> BundleHeader:
        """Return the header if it is this party's for this job.

        Raises: VerificationError with code "job", "party" or "signature".
        """
        if self.header.job_id != job_id:
            raise VerificationError("job", f"the bundle is for job {self.header.job_id[:16]}, not {job_id[:16]}")
        if self.header.party != party:
            raise VerificationError("party", f"the bundle is of party {self.header.party!r}, not {party!r}")
        verify_signature(public_key, HEADER_LABEL, self.header.hash, self.signature, where=party)
        return self.header


def _parse_header(encoded: bytes) -> BundleHeader:
    fields = Fields.decode(encoded, max_bytes=MAX_HEADER_BYTES, what="bundle header")
    fields.integer("version", low=VERSION, high=VERSION)
    header = BundleHeader(
        job_id=fields.text("job_id"),
        party=fields.text("party"),
        kind=fields.text("kind"),  # type: ignore[arg-type]  # __post_init__ refuses other texts
        schema=fields.table("schema"),
        counts=fields.table("counts"),
        chunk_bytes=fields.integer("chunk_bytes", low=MIN_CHUNK_BYTES, high=MAX_CHUNK_BYTES),
        max_payload_bytes=fields.integer("max_payload_bytes", low=0, high=MAX_PAYLOAD_BYTES),
        bundle_id=fields.blob("bundle_id", size=16),
    )
    fields.end()
    return header


def read_header(source: Path | str | bytes | BinaryIO) -> UnverifiedHeader:
    """Read the header of a bundle's file, or of its first bytes; an open file is left behind the header.

    Raises: VerificationError with code "magic", "truncated" or "header"; OSError if the file cannot be read.
    """
    if isinstance(source, str | Path):
        with Path(source).open("rb") as file:
            return read_header(file)
    if isinstance(source, bytes):
        return read_header(BytesIO(source))
    if read_exactly(source, len(MAGIC)) != MAGIC:
        raise VerificationError("magic", "this is not a sealed bundle of this version")
    length = int.from_bytes(read_exactly(source, FRAME_BYTES), "big")
    if length > MAX_HEADER_BYTES:
        raise VerificationError("header", f"the bundle's header claims {length} bytes, allowed are {MAX_HEADER_BYTES}")
    encoded = read_exactly(source, length)
    return UnverifiedHeader.parse(encoded, read_exactly(source, SIGNATURE_BYTES))


def read_exactly(file: BinaryIO, size: int) -> bytes:
    """Read `size` bytes or raise VerificationError("truncated")."""
    data = file.read(size)
    if len(data) != size:
        raise VerificationError("truncated", "the bundle ends before its end", hint="send or copy the file again")
    return data


def chunk_nonce(index: int) -> bytes:
    """96-bit nonce of chunk `index`; a data key serves one bundle, so it never repeats."""
    return index.to_bytes(12, "big")


def chunk_aad(header_hash: bytes, index: int, *, last: bool) -> bytes:
    """What a chunk is bound to besides its content: 41 bytes."""
    return header_hash + index.to_bytes(8, "big") + bytes([last])


def trailer_message(header_hash: bytes, payload_bytes: int, commitment: bytes) -> bytes:
    """What the trailer's signature covers."""
    return encode({"header": header_hash, "payload_bytes": payload_bytes, "commitment": commitment})
