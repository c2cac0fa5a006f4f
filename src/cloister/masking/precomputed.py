"""Pads whose products were computed beforehand: rows are taken in order, each once, by any number of threads.

`ephemeral_pads` keeps the products in a file that has no name, under a key that is nowhere but in this process: no
copy of a disk can bring a pad back, and nothing is left when the process ends, however it ends. `store` has the kind
that is kept between processes.
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from cloister.crypto.bundle.writer import disk_error
from cloister.errors import CapacityError
from cloister.masking.layout import Layout, lay_out
from cloister.masking.linear import Reply
from cloister.masking.pads import OneProcess, PadKey, StreamId
from cloister.masking.precompute import Precomputation, pad_rows
from cloister.masking.products import KEY_BYTES, SealedProducts
from cloister.masking.quantise import Direction
from cloister.masking.weights import GroupPlan


class PadsUsedUpError(CapacityError):
    """More rows were drawn than were computed: what was interrupted and done again takes pads again."""


class PrecomputedPads:
    """A `PadSource`."""

    name = "precomputed pads"

    def __init__(
        self,
        layout: Layout,
        key: PadKey,
        products: SealedProducts,
        *,
        used: Sequence[int] = (),
        is_ready: Callable[[], bool] = lambda: True,
    ) -> None:
        """
        Args:
            used: rows of each stream that were used up before. is_ready: whether the products are complete.
        """
        self._layout, self._key, self._products, self._is_ready = layout, key, products, is_ready
        self._streams = {(stream.group, stream.direction): stream for stream in layout.streams}
        self._used = list(used) or [0] * len(layout.streams)
        self._lock = threading.Lock()
        self._process = OneProcess()
        self._closed = False

    def draw(self, group: str, direction: Direction, rows: int) -> tuple[Tensor, Reply]:
        """The next rows of a stream, burnt when this returns; see `PadSource`. Products are unsealed by the reply.

        Raises:
            PadsUsedUpError: fewer rows are left. RunError: this is a copy of the process, by fork().
        """
        if rows < 1:
            raise ValueError("a pad has at least one row")
        self._process.check()
        stream = self._streams.get((group, direction))
        with self._lock:
            if self._closed or not self._is_ready():
                raise RuntimeError("these pads are not ready, or closed")
            first = 0 if stream is None else self._used[stream.index]
            if stream is None or first + rows > stream.rows:
                raise _exhausted(group, direction, planned=0 if stream is None else stream.rows)
            self._used[stream.index] = first + rows

        def reply() -> list[Tensor]:
            products_TPM = torch.from_numpy(self._products.read(stream, first, rows))
            return [products_TPM[:, part] for part in range(stream.parts)]

        return pad_rows(self._key, stream, first, rows), reply

    def close(self) -> list[int]:
        """Hand out no more. Returns: how many rows of each stream were used."""
        with self._lock:
            self._closed = True
            return list(self._used)

    def left(self) -> dict[StreamId, int]:
        """Rows that can still be drawn of each stream."""
        with self._lock:
            return {key: stream.rows - self._used[stream.index] for key, stream in self._streams.items()}


@contextmanager
def ephemeral_pads(
    groups: Sequence[GroupPlan],
    rows: Mapping[StreamId, int],
    *,
    parts: int,
    folder: Path,
    count: Callable[[int], object] = lambda multiply_adds: None,
) -> Iterator[tuple[Precomputation, PrecomputedPads]]:
    """Pads for this process alone: what computes them while the weights stream by, and where they are drawn then.

    Args:
        rows: of each stream, see `budget`. folder: on a disk with room for the products (`Layout.sealed_bytes`).
        count: is told of work done.

    Raises:
        CapacityError, DataError: there is no room, or the folder cannot be written to.
    """
    layout = lay_out(groups, rows, parts=parts)
    require_room(folder, layout.sealed_bytes)
    try:
        file = tempfile.TemporaryFile(dir=folder, prefix="pads-")  # noqa: SIM115  # closed below
    except OSError as exc:
        raise disk_error(exc, folder, layout.sealed_bytes) from exc
    with file:
        key = PadKey()
        products = SealedProducts(file, folder, key=secrets.token_bytes(KEY_BYTES), purpose=b"this process")
        computing = Precomputation(layout, key, products, count=count)
        pads = PrecomputedPads(layout, key, products, is_ready=lambda: computing.finished)
        try:
            yield computing, pads
        finally:
            pads.close()


def require_room(folder: Path, num_bytes: int) -> None:
    """Raises: CapacityError if the disk has less room."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        message = f"precomputed pads need {num_bytes / 2**30:.1f} GiB, the disk has {free / 2**30:.1f} GiB left"
        hint = 'make room, plan fewer steps, or use pads = "dual"; `cloister plan` shows the bytes'
        raise CapacityError(message, where=str(folder), hint=hint)


def _exhausted(group: str, direction: Direction, *, planned: int) -> PadsUsedUpError:
    return PadsUsedUpError(
        f"its {direction} pads are used up: {planned} rows were planned",
        where=group,
        hint="start again; pads that are kept have to be made anew before, with `cloister pads`",
    )
