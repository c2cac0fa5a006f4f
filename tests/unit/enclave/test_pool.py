"""The pool: all packs in order, read again when they do not fit into memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch

from cloister.data.packing import Pack
from cloister.data.payload import Payload
from cloister.enclave.pool import Pool
from tests.unit.data.tiny_packs import equal_packs, random_pack


@dataclass
class Counted:
    """A payload that counts how often each pack was decrypted."""

    packs: list[Pack]
    reads: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> Pack:
        self.reads.append(index)
        return self.packs[index]

    @property
    def tokens(self) -> list[int]:
        return [len(p) for p in self.packs]

    @property
    def targets(self) -> list[int]:
        return [len(p.target_pos_N) for p in self.packs]


def payloads() -> tuple[Counted, Counted]:
    return tuple(Counted([random_pack([5 + i, 4], 50, seed=10 * p + i, hidden=8) for i in range(3)]) for p in range(2))  # type: ignore[return-value]


def pool(parts: Any, cache_bytes: int) -> Pool:
    return Pool(cast("list[Payload]", list(parts)), cache_bytes)


@pytest.mark.parametrize("cache_bytes", [0, 500, 1 << 20])
def test_packs_of_all_parties_in_order(cache_bytes: int) -> None:
    parts = payloads()
    everything = [pack for part in parts for pack in part.packs]
    source = pool(parts, cache_bytes)
    assert source.tokens == [len(p) for p in everything]
    assert source.targets == [len(p.target_pos_N) for p in everything]
    for index in torch.randint(6, (40,), generator=torch.Generator().manual_seed(1)).tolist():
        assert equal_packs(source[index], everything[index])


def test_what_fits_is_decrypted_once() -> None:
    parts = payloads()
    source = pool(parts, 1 << 20)
    for _ in range(3):
        for index in range(6):
            source[index]
    assert [part.reads for part in parts] == [[0, 1, 2], [0, 1, 2]]


def test_memory_is_bounded() -> None:
    parts = payloads()
    size = parts[0].packs[0].given.nbytes
    source = pool(parts, 2 * size + 100)
    for _ in range(3):
        for index in range(6):
            source[index]
            held = sum(pack.given.nbytes for pack in source._cache.values())
            assert held <= 2 * size + 100
    assert len(parts[0].reads) == 9  # the least recently used go first, so that a cycle never hits
    nothing = pool(payloads(), 0)
    nothing[0]
    assert not nothing._cache
