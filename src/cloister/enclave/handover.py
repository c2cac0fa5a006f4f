"""What the enclave's own process gives to each process that it starts: the job, the bundles that are here, their keys.

It travels through an anonymous piece of memory whose descriptor the processes inherit as their standard input: neither
command lines nor environments nor files hold a key. Once all have read it, it is emptied.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from hmac import compare_digest
from pathlib import Path
from typing import Any

from cloister.crypto.bundle import UnverifiedHeader, VerifiedBundle
from cloister.crypto.encoding import Fields, encode
from cloister.crypto.keys import DATA_KEY_BYTES, DataKey
from cloister.enclave.compute import Sources
from cloister.errors import ProtocolError, RunError
from cloister.job import Job
from cloister.jobfile import parse_job, render_job

_MAX_BYTES = 1 << 36
_MAX_ITEMS = 1 << 20
_WHAT = "handover"


@dataclass(frozen=True, kw_only=True)
class Handover:
    """Everything that decides what a process computes, but its rank."""

    job: Job
    cut: int
    model: Path
    device: str
    parted: bool
    """Whether frozen layers are parted between the processes."""
    threads: int
    cache_bytes: int
    folder: Path
    """Where the processes meet."""
    checkpoint: bytes = field(repr=False)
    """State of training to go on from; empty at the beginning."""
    sources: Sources = field(repr=False)

    def to_bytes(self) -> bytes:
        """Secret: holds the data keys."""
        return encode(
            {
                "job": render_job(self.job).encode(),
                "cut": self.cut,
                "model": os.fsencode(self.model),
                "device": self.device,
                "parted": self.parted,
                "threads": self.threads,
                "cache_bytes": self.cache_bytes,
                "folder": os.fsencode(self.folder),
                "checkpoint": self.checkpoint,
                "bundles": [
                    _bundle(kind, party, *source) for kind, of in self.sources.items() for party, source in of.items()
                ],
            }
        )

    @classmethod
    def from_bytes(cls, content: bytes) -> Handover:
        """Read what the enclave's own process wrote; bundles are those that it has verified.

        Raises:
            ProtocolError: it is something else.
        """
        fields = Fields.decode(content, max_bytes=_MAX_BYTES, what=_WHAT, max_items=_MAX_ITEMS)
        sources: dict[str, dict[str, tuple[VerifiedBundle, DataKey]]] = {}
        for entry in fields.items("bundles", max_items=_MAX_ITEMS):
            bundle, key = _read_bundle(Fields(entry, _WHAT))
            sources.setdefault(bundle.header.kind, {})[bundle.header.party] = bundle, key
        found = cls(
            job=parse_job(fields.blob("job", max_size=_MAX_BYTES).decode(), Path("job.toml")).job,
            cut=fields.integer("cut", low=1, high=1 << 20),
            model=Path(os.fsdecode(fields.blob("model"))),
            device=fields.text("device"),
            parted=fields.boolean("parted"),
            threads=fields.integer("threads", low=1, high=1 << 16),
            cache_bytes=fields.integer("cache_bytes", low=0, high=1 << 62),
            folder=Path(os.fsdecode(fields.blob("folder"))),
            checkpoint=fields.blob("checkpoint", max_size=_MAX_BYTES),
            sources=sources,
        )
        fields.end()
        return found


def write_memory(content: bytes) -> int:
    """Put bytes into anonymous memory; returns its descriptor, which the caller closes.

    Raises:
        RunError: this kernel has none.
    """
    try:
        descriptor = os.memfd_create("handover")
    except (OSError, AttributeError) as exc:
        message = "there is no anonymous memory to hand keys over in"
        raise RunError(message, where="[enclave] processes", hint="take processes = 1") from exc
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
    return descriptor


def read_memory(descriptor: int) -> bytes:
    """All bytes, wherever others who share the descriptor have read to."""
    parts, offset = [], 0
    while piece := os.pread(descriptor, 1 << 28, offset):
        parts.append(piece)
        offset += len(piece)
    return b"".join(parts)


def _bundle(kind: str, party: str, bundle: VerifiedBundle, key: DataKey) -> dict[str, Any]:
    if (bundle.header.kind, bundle.header.party) != (kind, party):
        raise RuntimeError("a bundle stands under another name than its own")
    return {
        "path": os.fsencode(bundle.path),
        "header": bundle.header.to_bytes(),
        "commitment": bundle.commitment,
        "payload_bytes": bundle.payload_bytes,
        "data_offset": bundle.data_offset,
        "leaves": bundle.leaves,
        "key": key.reveal(),
    }


def _read_bundle(fields: Fields) -> tuple[VerifiedBundle, DataKey]:
    # The header's signature was checked by whoever wrote this, as was that the party signed the commitment.
    header = UnverifiedHeader.parse(fields.blob("header"), bytes(64)).header
    bundle = VerifiedBundle(
        path=Path(os.fsdecode(fields.blob("path"))),
        header=header,
        commitment=fields.blob("commitment", size=32),
        payload_bytes=fields.integer("payload_bytes", low=0, high=1 << 62),
        data_offset=fields.integer("data_offset", low=0, high=1 << 62),
        leaves=fields.blob("leaves", max_size=_MAX_BYTES),
    )
    key = DataKey(fields.blob("key", size=DATA_KEY_BYTES))
    fields.end()
    if not compare_digest(hashlib.sha256(header.hash + bundle.leaves).digest(), bundle.commitment):
        raise ProtocolError("a bundle's hashes are not those of its commitment", where=_WHAT)
    return bundle, key
