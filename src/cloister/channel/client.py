"""The party's end of the carrier: open a session, upload bundles and go on where an upload was cut."""

from __future__ import annotations

import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc

from cloister.channel.grpc_common import OFFSET, PIECE_BYTES, SESSION, UPLOAD, common_options, reported
from cloister.channel.handshake import Initiator
from cloister.channel.rpc import Session
from cloister.crypto.bundle import UnverifiedHeader, read_header
from cloister.crypto.encoding import Fields, encode
from cloister.errors import BusyError, CloisterError, DataError, ProtocolError, TransportError

CONNECT_TIMEOUT_S = 30.0
MAX_RETRIES = 8
"""Attempts in a row without a single new byte at the server."""
BUSY_TIMEOUT_S = 3600.0
"""How long to ask for a place among the enclave's uploads, beyond which it counts as failed attempts."""
_BACKOFF_S = 0.25
_MAX_BACKOFF_S = 15.0
_QUEUED_RECORDS = 4

Progress = Callable[[int, int], None]
"""(bytes of the file that are sent, bytes of the file)"""


def connect(address: str, initiator: Initiator, *, timeout_s: float = CONNECT_TIMEOUT_S) -> Session:
    """Connect, run the handshake, and return the open session.

    Raises: TransportError if the enclave cannot be reached in time; VerificationError if its evidence is refused or
        it refuses us; ProtocolError if it misbehaves.
    """
    pipe = _GrpcPipe(address)
    try:
        deadline = time.monotonic() + timeout_s
        pipe.wait_until_connected(timeout_s)
        pipe.send(initiator.start(time.time()))
        reply = pipe.receive(max(0.1, deadline - time.monotonic()))
        if reply is None:
            raise TransportError("the enclave closed the connection", where=address)
        finish, established = initiator.receive(reply, time.time())
        pipe.send(finish)
    except BaseException:
        pipe.close()
        raise
    return Session(established, pipe)


def upload(
    address: str,
    path: Path | str,
    on_progress: Progress | None = None,
    *,
    timeout_s: float = CONNECT_TIMEOUT_S,
    stall_timeout_s: float = 60.0,
    max_retries: int = MAX_RETRIES,
) -> int:
    """Send a finished bundle. After a broken connection, go on at the offset that the enclave names.

    Returns: bytes of the file that this call sent; 0 if the enclave had them all.

    Args:
        timeout_s: for each short request. stall_timeout_s: how long the enclave may take no bytes.
        max_retries: attempts in a row without progress before giving up; for an hour more while the enclave is busy.
    Raises: TransportError when the retries are used up; what the enclave reported if it refuses the bundle;
        DataError if the file cannot be read.
    """
    path = Path(path)
    try:
        unverified, size = read_header(path), path.stat().st_size
    except OSError as exc:
        raise DataError(f"cannot read the bundle: {exc.strerror}", where=str(path)) from exc
    attempt, best, first, patient_until = 0, -1, -1, time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            with _channel(address) as channel:
                complete, offset = _ask_offset(channel, unverified, timeout_s)
                first = offset if first < 0 else first
                if offset > best:
                    attempt, best, patient_until = 0, offset, time.monotonic() + BUSY_TIMEOUT_S
                if not complete:
                    complete = _send(channel, path, size, unverified, offset, on_progress, stall_timeout_s)
            if complete:
                if on_progress is not None:
                    on_progress(size, size)
                return size - first
            error: CloisterError = ProtocolError("the enclave took the whole bundle for incomplete", where=address)
        except grpc.RpcError as exc:
            error = reported(exc, address=address)
            if not isinstance(error, TransportError):
                raise error from exc
        except TransportError as exc:
            error = exc
        attempt += 1
        waits = isinstance(error, BusyError) and time.monotonic() < patient_until
        if attempt > max_retries and not waits:
            raise error
        # Many parties lose an enclave at one moment; they should not all come back at one moment.
        longest = min(_MAX_BACKOFF_S, _BACKOFF_S * 2 ** min(attempt - 1, 10))
        time.sleep(longest * (0.5 + secrets.randbelow(1000) / 2000))


def _channel(address: str) -> grpc.Channel:
    return grpc.insecure_channel(address, options=common_options())


def _ask_offset(channel: grpc.Channel, unverified: UnverifiedHeader, timeout_s: float) -> tuple[bool, int]:
    request = encode({"header": unverified.encoded, "signature": unverified.signature})
    call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(OFFSET)
    return _parse_state(call(request, timeout=timeout_s))


def _parse_state(reply: bytes) -> tuple[bool, int]:
    fields = Fields.decode(reply, max_bytes=1024, what="upload reply")
    state = fields.boolean("complete"), fields.integer("offset", low=0, high=1 << 62)
    fields.end()
    return state


def _send(
    channel: grpc.Channel,
    path: Path,
    size: int,
    unverified: UnverifiedHeader,
    offset: int,
    on_progress: Progress | None,
    stall_timeout_s: float,
) -> bool:
    """Stream the file from `offset`; return whether the enclave has all of it. Raises: grpc.RpcError, DataError."""
    if offset > size:
        raise ProtocolError("the enclave claims to have more than the bundle's bytes")
    pieces = _Pieces(path, unverified, offset, on_progress, size)
    stream: grpc.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(UPLOAD)
    call = stream.future(iter(pieces))
    finished = threading.Event()
    call.add_done_callback(lambda _: finished.set())
    # gRPC asks for the next piece only when the one before is on its way: that is the back-pressure, and a count that
    # stands still is a stall. Once all is sent, the enclave checks the whole file, which takes a while.
    seen = -1
    while not finished.wait(stall_timeout_s if pieces.sent < size else 10 * stall_timeout_s):
        if pieces.sent == seen:
            call.cancel()
            raise TransportError(f"the enclave took no data for {stall_timeout_s:g} s")
        seen = pieces.sent
    if pieces.error is not None:
        raise DataError(f"cannot read the bundle: {pieces.error.strerror}", where=str(path)) from pieces.error
    complete, _ = _parse_state(call.result())
    return complete


class _Pieces:
    """The messages of one upload: the request, then the file's bytes from an offset."""

    def __init__(
        self, path: Path, unverified: UnverifiedHeader, offset: int, on_progress: Progress | None, size: int
    ) -> None:
        self.sent = offset
        self.error: OSError | None = None
        self._path = path
        self._unverified = unverified
        self._on_progress = on_progress
        self._size = size

    def __iter__(self) -> Iterator[bytes]:
        yield encode({"header": self._unverified.encoded, "signature": self._unverified.signature, "offset": self.sent})
        try:
            with self._path.open("rb", buffering=0) as file:
                file.seek(self.sent)
                while piece := file.read(PIECE_BYTES):
                    yield piece
                    self.sent += len(piece)
                    if self._on_progress is not None:
                        self._on_progress(self.sent, self._size)
        except OSError as exc:  # gRPC would swallow it: it runs us in a thread of its own
            self.error = exc


class _GrpcPipe:
    """`rpc.Pipe` over one bidirectional stream."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._channel = _channel(address)
        self._outgoing: queue.Queue[bytes | None] = queue.Queue(_QUEUED_RECORDS)
        self._incoming: queue.Queue[bytes | CloisterError | None] = queue.Queue(_QUEUED_RECORDS)
        self._call: grpc.Call | None = None
        self._closed = threading.Event()
        self._ended: CloisterError | None = None

    def wait_until_connected(self, timeout_s: float) -> None:
        try:
            grpc.channel_ready_future(self._channel).result(timeout=timeout_s)
        except grpc.FutureTimeoutError as exc:
            hint = "is the enclave running, and is the address right?"
            message = f"the enclave cannot be reached within {timeout_s:g} s"
            raise TransportError(message, where=self._address, hint=hint) from exc
        stream: grpc.StreamStreamMultiCallable[bytes, bytes] = self._channel.stream_stream(SESSION)
        call = stream(iter(self._outgoing.get, None))
        self._call = call
        threading.Thread(target=self._read, args=(call,), name="session-reader", daemon=True).start()

    def send(self, record: bytes) -> None:
        """See `rpc.Pipe`."""
        if self._ended is not None:
            raise self._ended
        try:
            self._outgoing.put(record, timeout=60.0)
        except queue.Full as exc:
            raise TransportError("the enclave takes no more data", where=self._address) from exc

    def receive(self, timeout_s: float | None) -> bytes | None:
        """See `rpc.Pipe`."""
        try:
            item = self._incoming.get(timeout=timeout_s)
        except queue.Empty as exc:
            message = f"the enclave did not answer within {timeout_s:g} s"
            raise TransportError(message, where=self._address) from exc
        if isinstance(item, CloisterError):
            raise item
        return item

    def close(self) -> None:
        """See `rpc.Pipe`."""
        self._closed.set()
        try:
            self._outgoing.put_nowait(None)
        except queue.Full:
            if self._call is not None:
                self._call.cancel()
        self._channel.close()

    def _read(self, call: Iterator[bytes]) -> None:
        try:
            for record in call:
                self._put(record)
            self._put(None)
        except grpc.RpcError as exc:
            self._ended = reported(exc, address=self._address)
            self._put(self._ended)

    def _put(self, item: bytes | CloisterError | None) -> None:
        while not self._closed.is_set():
            try:
                self._incoming.put(item, timeout=0.5)
            except queue.Full:
                continue
            return
