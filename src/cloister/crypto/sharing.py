"""A 256-bit key as shares of which any k give it back and fewer say nothing: Shamir's scheme, by pycryptodome.

The library shares 16 bytes at a time: the two halves of a key are shared alike, with polynomials of their own.
With k = 1 every share is the key itself; a job of one party has no other choice.

A share alone does not show that it is right. Its `commitment` is published beforehand, so that a wrong one is found
and put down to its holder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from hmac import compare_digest

from Crypto.Protocol.SecretSharing import Shamir

from cloister.crypto.encoding import join
from cloister.errors import VerificationError

_HALF_BYTES, _INDEX_BYTES = 16, 2
SECRET_BYTES = 2 * _HALF_BYTES
SHARE_BYTES = _INDEX_BYTES + SECRET_BYTES
"""Number of the share (from 1), its half of the first half, its half of the second."""
MAX_SHARES = 2 ** (8 * _INDEX_BYTES) - 1


def split(secret: bytes, *, quorum: int, count: int) -> list[bytes]:
    """Make `count` shares of 32 bytes, any `quorum` of which give them back. Drawn anew at each call."""
    if len(secret) != SECRET_BYTES or not 1 <= quorum <= count <= MAX_SHARES:
        raise ValueError(f"cannot share {len(secret)} bytes as {quorum} of {count}")
    halves = [Shamir.split(quorum, count, half, False) for half in (secret[:_HALF_BYTES], secret[_HALF_BYTES:])]
    return [
        index.to_bytes(_INDEX_BYTES, "big") + first + second
        for (index, first), (_, second) in zip(*halves, strict=True)
    ]


def combine(shares: Sequence[bytes], *, quorum: int) -> bytes:
    """The secret from at least `quorum` different shares that hold by their commitments.

    Wrong shares give a wrong secret, not an error: check commitments first.

    Raises:
        VerificationError: "share": there are too few, or one is malformed or there twice.
    """
    chosen = {share[:_INDEX_BYTES]: share for share in shares if is_share(share)}
    if len(chosen) != len(shares) or len(chosen) < quorum:
        raise VerificationError("share", f"{len(chosen)} different shares of a key are here, {quorum} are needed")
    taken = [(int.from_bytes(index, "big"), share) for index, share in sorted(chosen.items())[:quorum]]
    middle = _INDEX_BYTES + _HALF_BYTES
    first = Shamir.combine([(index, share[_INDEX_BYTES:middle]) for index, share in taken], False)
    second = Shamir.combine([(index, share[middle:]) for index, share in taken], False)
    return bytes(first) + bytes(second)


def is_share(unverified: bytes) -> bool:
    """Whether this has the form of a share."""
    return len(unverified) == SHARE_BYTES and unverified[:_INDEX_BYTES] != bytes(_INDEX_BYTES)


def commitment(share: bytes, context: bytes) -> bytes:
    """32 bytes that fix a share and say nothing about it; `context` names job, instance and holder."""
    return hashlib.sha256(join(b"cloister share v1", context, share)).digest()


def check_share(unverified: bytes, context: bytes, expected: bytes, *, holder: str) -> None:
    """Check a share against its commitment.

    Raises:
        VerificationError: "share"; names the holder.
    """
    if not is_share(unverified) or not compare_digest(commitment(unverified, context), expected):
        raise VerificationError(
            "share",
            "this party's share of the sealing key is not the one it was given",
            where=holder,
            hint="the party's memory was changed or is of another run; the others' shares are needed instead",
        )
