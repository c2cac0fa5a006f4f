"""The event log of a TDX guest: what was extended into its runtime registers (RTMR 0 to 3), in order.

The log itself is not signed. It counts because replaying it gives exactly the registers of a verified quote: then
every digest is genuine. Of an event's name and payload only those of runtime events (dstack's and Cloister's own) are
covered by the digest and checked; for events of firmware and loader they are a hint for people, nothing more.

Form: JSON, a list of {imr, event_type, digest, event, event_payload}, as dstack writes it. Replay: RTMR' = SHA-384(RTMR
|| digest), from 48 zero bytes (Intel TDX Module ABI, TDG.MR.RTMR.EXTEND).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cloister.attest.evidence import MAX_EVENT_LOG_BYTES
from cloister.errors import VerificationError

REGISTERS = 4
DIGEST_BYTES = 48
RUNTIME_EVENT = 0x08000001
"""dstack's event type; its digest is SHA-384(type, 4 bytes little endian || ":" || name || ":" || payload)."""

_KEYS = {"imr", "event_type", "digest", "event", "event_payload"}


@dataclass(frozen=True, kw_only=True)
class Event:
    """One measurement."""

    register: int
    """0 to 3."""
    type: int
    digest: bytes
    """48 bytes."""
    name: str
    payload: bytes
    """What the digest was made of, as the name, if `type` is RUNTIME_EVENT; else nobody vouches for either."""


def parse(data: bytes) -> tuple[Event, ...]:
    """Read a log that a peer or a file gave us.

    Raises: VerificationError("event-log") if it is malformed or a runtime event is not what its digest says.
    """
    if len(data) > MAX_EVENT_LOG_BYTES:
        raise _refuse(f"it is longer than {MAX_EVENT_LOG_BYTES} bytes")
    try:
        entries = json.loads(data, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as exc:
        raise _refuse("it is not JSON") from exc
    if not isinstance(entries, list):
        raise _refuse("it must be a list of events")
    return tuple(_event(entry, number) for number, entry in enumerate(entries, 1))


def replay(events: Iterable[Event]) -> tuple[bytes, ...]:
    """The four registers after these events, 48 bytes each."""
    registers = [bytes(DIGEST_BYTES)] * REGISTERS
    for event in events:
        registers[event.register] = hashlib.sha384(registers[event.register] + event.digest).digest()
    return tuple(registers)


def check(data: bytes, rtmrs: Sequence[bytes]) -> tuple[Event, ...]:
    """Return the events if they replay to the registers of a verified quote.

    Raises: VerificationError("event-log").
    """
    events = parse(data)
    wrong = [f"rtmr{i}" for i, (got, quoted) in enumerate(zip(replay(events), rtmrs, strict=True)) if got != quoted]
    if wrong:
        hint = "events were left out, added, changed or reordered; or the log is of another boot than the quote"
        raise VerificationError("event-log", f"the event log does not give {', '.join(wrong)} of the quote", hint=hint)
    return events


def runtime_digest(name: str, payload: bytes) -> bytes:
    """What a runtime event extends its register with: 48 bytes."""
    return hashlib.sha384(RUNTIME_EVENT.to_bytes(4, "little") + b":" + name.encode() + b":" + payload).digest()


def _event(entry: Any, number: int) -> Event:
    if not isinstance(entry, dict) or set(entry) != _KEYS:
        raise _refuse(f"event {number} must have exactly {', '.join(sorted(_KEYS))}")
    register, kind, name = entry["imr"], entry["event_type"], entry["event"]
    if type(register) is not int or not 0 <= register < REGISTERS:
        raise _refuse(f"event {number} is of no register 0 to {REGISTERS - 1}")
    if type(kind) is not int or not 0 <= kind < 1 << 32 or not isinstance(name, str):
        raise _refuse(f"event {number} has a malformed type or name")
    try:
        name.encode()
        digest, payload = bytes.fromhex(entry["digest"]), bytes.fromhex(entry["event_payload"])
    except (ValueError, TypeError) as exc:
        raise _refuse(f"event {number} has a name that is no text, or a digest or payload that is not hex") from exc
    if len(digest) != DIGEST_BYTES:
        raise _refuse(f"event {number} has a digest of {len(digest)} bytes, not {DIGEST_BYTES}")
    if kind == RUNTIME_EVENT and digest != runtime_digest(name, payload):
        raise _refuse(f"event {number} ({name[:64]!r}) is not what its digest was made of")
    return Event(register=register, type=kind, digest=digest, name=name, payload=payload)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key appears twice")
    return table


def _refuse(what: str) -> VerificationError:
    return VerificationError("event-log", f"the event log is malformed: {what}")
