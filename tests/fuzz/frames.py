"""Several byte strings in one fuzzing input, such that no mutation makes it unreadable."""

from __future__ import annotations

_LENGTH_BYTES = 4


def pack(*parts: bytes) -> bytes:
    """Every part but the last behind its length (4 bytes, big endian)."""
    return b"".join(len(part).to_bytes(_LENGTH_BYTES, "big") + part for part in parts[:-1]) + parts[-1]


def unpack(data: bytes, count: int) -> list[bytes]:
    """Exactly `count` parts; a length that is too large takes what is there."""
    parts = []
    for _ in range(count - 1):
        length = int.from_bytes(data[:_LENGTH_BYTES], "big")
        parts.append(data[_LENGTH_BYTES : _LENGTH_BYTES + length])
        data = data[_LENGTH_BYTES + length :]
    return [*parts, data]
