"""What strangers, slow peers and single parties may cost an enclave: every bound of the carrier in one place.

docs/protocol.md, "Bounds", lists them with what happens beyond each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

SPARE_CALLS = 32
"""Threads for calls that are being refused, and for those that have been cut and are about to notice."""
SPARE_FILES = 256
"""File descriptors that connections leave to everything else in the process."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds on what comes in. A "call" is a session, an upload or a question for an offset; each holds a thread."""

    max_connections: int = 1024
    """TCP connections at one time, whoever they are of: more are closed as soon as they are accepted."""
    max_calls_per_connection: int = 8
    max_strangers: int = 128
    """Calls that have not shown anything signed by a party; a newcomer takes the place of the oldest."""
    max_calls: int = 256
    """Threads at most."""
    max_sessions_per_party: int = 8
    max_uploads_per_party: int = 4
    max_uploads: int = 24
    """Uploads at one time."""
    greeting_timeout_s: float = 10.0
    """How long a TCP connection may take to begin HTTP/2."""
    unused_timeout_s: float = 60.0
    """How long a connection may stay open without a call."""
    handshake_timeout_s: float = 30.0
    """From a call's begin to its authentication."""
    idle_timeout_s: float = 900.0
    """How long an open session may say nothing."""
    stall_timeout_s: float = 60.0
    """How long a peer may take to send the next piece of an upload, or to read a record."""
    min_upload_bytes_per_s: int = 1024
    """An upload that has brought less than this on average, beyond `stall_timeout_s`, is cut."""

    @classmethod
    def of_job(cls, parties: int, max_connections: int) -> Self:
        """Room for all parties of a job at once."""
        uploads = max(cls.max_uploads, 2 * parties)
        per_party = cls.max_sessions_per_party + cls.max_uploads_per_party
        return cls(
            max_connections=max_connections,
            max_uploads=uploads,
            max_calls=cls.max_strangers + SPARE_CALLS + per_party * parties,
        )
