"""Reading the next pack while the one before is worked on.

Packs of sealed bundles are read from disk, authenticated, decrypted and decoded when they are asked for; that is one
thread's work beside the products of a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from cloister.data.packing import Pack


class _Source(Protocol):
    def __getitem__(self, index: int, /) -> Pack: ...


def ahead(source: _Source, indices: Iterable[int]) -> Iterator[Pack]:
    """Packs of `source` in the order of `indices`; the source is used by one thread at a time.

    Raises: what the source raises, when the pack in question is due.
    """
    wanted = iter(indices)
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as reader:
        for index in wanted:
            coming = reader.submit(source.__getitem__, index)
            break
        else:
            return
        for index in wanted:
            pack = coming.result()
            coming = reader.submit(source.__getitem__, index)
            yield pack
        yield coming.result()
