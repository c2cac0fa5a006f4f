"""Packs in their order, one read ahead of its turn, and never two at a time."""

from __future__ import annotations

import threading
import time

import pytest

from cloister.data.packing import Pack
from cloister.errors import ProtocolError
from cloister.training.ahead import ahead
from tests.unit.data.tiny_packs import random_pack

PACKS = [random_pack([5], 64, seed=i, hidden=4) for i in range(4)]


class Source:
    """Notes what is read, and refuses to be read by two threads at once."""

    def __init__(self, broken: int = -1) -> None:
        self.read: list[int] = []
        self._broken, self._busy = broken, threading.Lock()

    def __getitem__(self, index: int, /) -> Pack:
        assert self._busy.acquire(blocking=False)
        time.sleep(0.01)
        self.read.append(index)
        self._busy.release()
        if index == self._broken:
            raise ProtocolError("a pack is malformed", where="train bundle of south")
        return PACKS[index]


@pytest.mark.parametrize("indices", [[], [2], [3, 0, 2, 0]])
def test_packs_come_in_the_order_asked_for(indices: list[int]) -> None:
    source = Source()
    assert [id(pack) for pack in ahead(source, indices)] == [id(PACKS[i]) for i in indices]
    assert source.read == indices


def test_the_next_is_read_meanwhile_and_no_further() -> None:
    source = Source()
    packs = ahead(source, [0, 1, 2, 3])
    next(packs)
    deadline = time.monotonic() + 20
    while len(source.read) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert source.read == [0, 1]
    packs.close()  # type: ignore[attr-defined]
    assert source.read == [0, 1]


def test_what_is_wrong_with_a_pack_is_raised_in_its_turn() -> None:
    packs = ahead(Source(broken=1), [0, 1, 2])
    assert next(packs) is PACKS[0]
    with pytest.raises(ProtocolError, match="train bundle of south"):
        next(packs)
    assert not [t for t in threading.enumerate() if t.name.startswith("ahead")]
