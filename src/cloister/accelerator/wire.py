"""Bounded frames on a connected socket, with deadlines; and the stream link, which sends tensors behind their frames.

    frame = length (4 bytes, big endian) | CBOR

Whatever the peer does, only TransportError (gone, or too slow) and ProtocolError (too long a frame) leave, and both
name the peer.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from cloister.accelerator.messages import MAX_FRAME_BYTES
from cloister.errors import ProtocolError, TransportError

_LENGTH_BYTES = 4
_LOST = "see that it runs, then start this again"
_MAX_WRITE = 1 << 20


class Wire:
    """A connected socket: Unix, TCP or TLS.

    Args:
        peer: names the other end in errors.
        descriptors: whether frames may bring a descriptor (Unix only).
    """

    def __init__(self, sock: socket.socket, peer: str, *, descriptors: bool = False) -> None:
        self._socket = sock
        self._descriptors = descriptors
        self._descriptor: int | None = None
        self.peer = peer

    def write(self, pieces: Sequence[bytes | memoryview], timeout_s: float) -> None:
        """Send all pieces, in order. Raises: TransportError."""
        deadline = time.monotonic() + timeout_s
        try:
            for piece in pieces:
                view = memoryview(piece).cast("B")
                while len(view):
                    self._arm(deadline)
                    view = view[self._socket.send(view[:_MAX_WRITE]) :]
        except OSError as exc:
            raise self._lost(exc, timeout_s) from exc

    def read_frame(self, timeout_s: float | None, *, rest_timeout_s: float) -> bytes:
        """The next frame. Its first byte may take `timeout_s` (None: for ever), the rest of it `rest_timeout_s`.

        Raises:
            TransportError: the peer is gone or too slow. ProtocolError: the frame is longer than allowed.
        """
        head = bytearray(_LENGTH_BYTES)
        first = None if timeout_s is None else time.monotonic() + timeout_s
        got = self._some(memoryview(head), first, timeout_s, with_descriptor=self._descriptors)
        deadline = time.monotonic() + rest_timeout_s
        self._fill(memoryview(head)[got:], deadline, rest_timeout_s)
        length = int.from_bytes(head, "big")
        if length > MAX_FRAME_BYTES:
            raise ProtocolError(f"a frame of {length} bytes; allowed are {MAX_FRAME_BYTES}", where=self.peer)
        frame = bytearray(length)
        self._fill(memoryview(frame), deadline, rest_timeout_s)
        return bytes(frame)

    def read_into(self, view: memoryview, timeout_s: float) -> None:
        """Fill a buffer. Raises: TransportError."""
        self._fill(view, time.monotonic() + timeout_s, timeout_s)

    def send_descriptor(self, frame: bytes, descriptor: int, timeout_s: float) -> None:
        """Send a frame with a descriptor. Raises: TransportError."""
        data = frame_bytes(frame)
        try:
            self._arm(time.monotonic() + timeout_s)
            sent = socket.send_fds(self._socket, [data], [descriptor])
        except OSError as exc:
            raise self._lost(exc, timeout_s) from exc
        self.write([data[sent:]], timeout_s)

    def take_descriptor(self) -> int | None:
        """The descriptor that came with the last frame; the caller closes it."""
        descriptor, self._descriptor = self._descriptor, None
        return descriptor

    def cut(self) -> None:
        """From any thread: end the connection. Whoever waits on it gets an error, and closes it."""
        with contextlib.suppress(OSError):  # the peer was faster
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        """By the thread that uses it: end the connection and give it back."""
        if (descriptor := self.take_descriptor()) is not None:
            os.close(descriptor)
        self.cut()
        self._socket.close()

    def _fill(self, view: memoryview, deadline: float, timeout_s: float) -> None:
        while len(view):
            view = view[self._some(view, deadline, timeout_s) :]

    def _some(
        self, view: memoryview, deadline: float | None, timeout_s: float | None, *, with_descriptor: bool = False
    ) -> int:
        try:
            self._arm(deadline)
            got = self._receive_with_descriptor(view) if with_descriptor else self._socket.recv_into(view)
        except OSError as exc:
            raise self._lost(exc, timeout_s) from exc
        if got == 0:
            raise TransportError("closed the connection", where=self.peer, hint=_LOST)
        return got

    def _receive_with_descriptor(self, view: memoryview) -> int:
        data, descriptors, _, _ = socket.recv_fds(self._socket, len(view), 1)
        for descriptor in descriptors:
            if self._descriptor is not None:
                os.close(self._descriptor)
            self._descriptor = descriptor
        view[: len(data)] = data
        return len(data)

    def _arm(self, deadline: float | None) -> None:
        """Let the next operation take until the deadline. Raises: TimeoutError when that is over."""
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)

    def _lost(self, exc: OSError, timeout_s: float | None) -> TransportError:
        if isinstance(exc, TimeoutError):
            return TransportError(f"did not answer within {timeout_s:g} s", where=self.peer, hint=_LOST)
        return TransportError("the connection was lost", where=self.peer, hint=_LOST)


def prepare_tcp(sock: socket.socket) -> None:
    """For either end: frames leave at once, and a dead peer is noticed."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def frame_bytes(frame: bytes) -> bytes:
    """A frame behind its length."""
    return len(frame).to_bytes(_LENGTH_BYTES, "big") + frame


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    return tensor.view(-1).view(torch.uint8).numpy().data.cast("B")


class Link(Protocol):
    """Frames with tensors, in one of two ways: behind each other in a stream, or beside it in shared memory."""

    @property
    def wire(self) -> Wire:
        """Carries the frames."""
        ...

    def send(self, frame: bytes, tensors: Sequence[Tensor], timeout_s: float) -> None:
        """Send a frame and the tensors that go with it, on the CPU, of the link's byte order (little endian)."""
        ...

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, timeout_s: float) -> Tensor:
        """The tensor that goes with the frame that was read last, in memory that the peer cannot change."""
        ...


class StreamLink:
    """Tensors behind their frames, in one stream."""

    def __init__(self, wire: Wire, *, pinned: bool = False) -> None:
        """`pinned`: receive into page-locked memory, from which a GPU reads at full speed."""
        self.wire = wire
        self._pinned = pinned

    def send(self, frame: bytes, tensors: Sequence[Tensor], timeout_s: float) -> None:
        """See `Link`. Raises: TransportError."""
        contents = [bytes_of(tensor.contiguous()) for tensor in tensors]
        self.wire.write([frame_bytes(frame), *contents], timeout_s)

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, timeout_s: float) -> Tensor:
        """See `Link`. Raises: TransportError."""
        tensor = torch.empty(shape, dtype=dtype, pin_memory=self._pinned)
        self.wire.read_into(bytes_of(tensor), timeout_s)
        return tensor
