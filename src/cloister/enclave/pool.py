"""Packs of several sealed bundles as one source for training, decrypted when they are needed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from cloister.data.packing import Pack
from cloister.data.payload import Payload


class Pool:
    """All packs of all parties, in the order of the payloads given. Not for concurrent use.

    Decrypted packs stay in memory up to `cache_bytes` (those of least recent use go first); the others are read,
    decrypted and authenticated again. Nothing decrypted ever reaches a disk.
    """

    def __init__(self, payloads: Sequence[Payload], cache_bytes: int) -> None:
        self._places = [(p, i) for p in payloads for i in range(len(p))]
        self.tokens: list[int] = [t for p in payloads for t in p.tokens]
        self.targets: list[int] = [t for p in payloads for t in p.targets]
        self._cache: OrderedDict[int, Pack] = OrderedDict()
        self._room = cache_bytes

    def owner(self, index: int, /) -> str:
        """Name of the bundle that a pack came in."""
        return self._places[index][0].where

    def __getitem__(self, index: int, /) -> Pack:
        if index in self._cache:
            self._cache.move_to_end(index)
            return self._cache[index]
        payload, place = self._places[index]
        pack = payload[place]
        self._room -= pack.given.nbytes
        self._cache[index] = pack
        while self._room < 0 and self._cache:
            _, dropped = self._cache.popitem(last=False)
            self._room += dropped.given.nbytes
        return pack
