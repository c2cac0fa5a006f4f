"""One-time pads: uniformly random ring elements from an AES-256-CTR keystream, each position used at most once.

An allocator owns a key and hands out positions in order. A range is burnt before anything that it hides is sent: a
retry, an evaluation, a recomputation takes a new one. The key is drawn anew by every instance of an enclave, never from
the job's seed and never stored, so that a restored or cloned disk leads to no second use.
"""

from __future__ import annotations

import secrets
import threading
from dataclasses import dataclass

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from torch import Tensor

from cloister.errors import CapacityError

KEY_BYTES = 32
_BLOCK_ELEMENTS = 4
"""Ring elements in one block of AES."""
_MAX_BLOCKS = 1 << 64
"""Far below the birthday bound of the 128-bit block, at which a keystream could be told from random."""


@dataclass(frozen=True)
class PadRange:
    """Positions of one keystream, used up."""

    first_block: int
    elements: int


class PadAllocator:
    """Hands out disjoint ranges. Safe to call from several threads."""

    def __init__(self) -> None:
        self._next = 0
        self._lock = threading.Lock()

    def take(self, elements: int) -> PadRange:
        """Burn the next positions.

        Raises:
            CapacityError: the keystream is used up.
        """
        if elements < 1:
            raise ValueError("a pad has at least one element")
        blocks = -(-elements // _BLOCK_ELEMENTS)
        with self._lock:
            first = self._next
            if first + blocks > _MAX_BLOCKS:
                raise CapacityError("the pad's keystream is used up", where="masking", hint="restart the enclave")
            self._next = first + blocks
        return PadRange(first, elements)


class PadKey:
    """A keystream's key: secret, in memory only."""

    def __init__(self, secret: bytes | None = None) -> None:
        self._secret = secrets.token_bytes(KEY_BYTES) if secret is None else secret
        if len(self._secret) != KEY_BYTES:
            raise ValueError(f"a pad key has {KEY_BYTES} bytes")

    def __repr__(self) -> str:
        return "PadKey(...)"

    def reveal(self) -> bytes:
        """The key itself, for the holder of the pad's half (`dual`)."""
        return self._secret

    def expand(self, pad: PadRange, shape: tuple[int, ...]) -> Tensor:
        """The range's elements: int32 of this shape, uniformly random to whoever lacks the key."""
        blocks = -(-pad.elements // _BLOCK_ELEMENTS)
        keystream = np.empty(blocks * 4, dtype="<i4")
        counter = pad.first_block.to_bytes(16, "big")
        encryptor = Cipher(AES256(self._secret), CTR(counter)).encryptor()
        encryptor.update_into(bytes(blocks * 16), keystream.data.cast("B"))
        return torch.from_numpy(keystream[: pad.elements]).view(shape)
