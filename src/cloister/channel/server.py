"""The enclave's gRPC server: sessions and uploads, with limits against strangers and slow peers."""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType

import grpc

from cloister.channel.grpc_common import MAX_UPLOAD_HEAD_BYTES, SERVICE, Limits, common_options, refusal
from cloister.channel.handshake import Established, Responder
from cloister.channel.rpc import Handler, serve
from cloister.crypto.bundle import BundleHeader, IncomingBundle, UnverifiedHeader
from cloister.crypto.encoding import Fields, encode
from cloister.crypto.keys import SIGNATURE_BYTES
from cloister.errors import CapacityError, CloisterError, ProtocolError, TransportError, UsageError

_log = logging.getLogger(__name__)
_MAX_OFFSET = 1 << 48


class EnclaveServer:
    """Listens for parties.

    Args:
        listen: "host:port"; port 0 takes a free one.
        responder_factory: a fresh handshake per connection.
        handler: answers requests of authenticated peers; called from several threads.
        incoming: finds the bundle that an unverified header claims to be (`IncomingStore`).
    Raises: UsageError if the address cannot be listened on.
    """

    def __init__(
        self,
        listen: str,
        *,
        responder_factory: Callable[[], Responder],
        handler: Handler,
        incoming: Callable[[BundleHeader], IncomingBundle],
        limits: Limits | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._limits = limits or Limits()
        self._responder_factory = responder_factory
        self._handler = handler
        self._incoming = incoming
        self._clock = clock
        self._handshakes = _Places(self._limits.max_handshakes, "too many connections are waiting to authenticate")
        self._uploads = _Places(self._limits.max_uploads, "too many uploads at one time")
        self._sessions: defaultdict[str, _Places] = defaultdict(
            lambda: _Places(self._limits.max_sessions_per_party, "this party has too many sessions open")
        )
        self._watchdog = _Watchdog()
        self._server = grpc.server(
            ThreadPoolExecutor(self._limits.max_connections, thread_name_prefix="enclave"),
            options=[*common_options(), ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000)],
            maximum_concurrent_rpcs=self._limits.max_connections,
        )
        self._server.add_generic_rpc_handlers((self._handlers(),))
        self.address = self._bind(listen)

    def start(self) -> EnclaveServer:
        """Begin to accept connections."""
        self._watchdog.start()
        self._server.start()
        return self

    def stop(self, grace_s: float = 2.0) -> None:
        """Refuse new connections, wait a little for open ones, then cut them.

        A handler that is still at work is not interrupted, and the process cannot end before it returns.
        """
        self._server.stop(grace_s).wait()
        self._watchdog.stop()

    def __enter__(self) -> EnclaveServer:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.stop(0.5)

    def _bind(self, listen: str) -> str:
        host, _, port = listen.rpartition(":")
        if not host or not port.isdigit() or int(port) > 65535:
            raise UsageError("must be HOST:PORT", where=f"listen address {listen!r}")
        try:
            bound = self._server.add_insecure_port(listen)
        except RuntimeError as exc:
            bound = 0
            cause: Exception | None = exc
        else:
            cause = None
        if bound == 0:
            hint = "choose another port, or port 0 for any free one"
            raise UsageError("cannot listen: the port is in use or not ours", where=listen, hint=hint) from cause
        return f"{host}:{bound}"

    def _handlers(self) -> grpc.GenericRpcHandler:
        # Without serialisers, messages are bytes: no protobuf, and nothing is parsed before we do it.
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Session": grpc.stream_stream_rpc_method_handler(self._session),
                "Upload": grpc.stream_unary_rpc_method_handler(self._upload),
                "Offset": grpc.unary_unary_rpc_method_handler(self._offset),
            },
        )

    def _session(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        try:
            with self._watchdog.watch(context) as timer:
                established = yield from self._handshake(messages, timer)
                with self._sessions[established.peer.party].take():  # only the job's parties come here
                    _log.info("session open: %s", established.peer.party)
                    records = _timed(messages, timer, self._limits.idle_timeout_s)
                    for record in serve(established, records, self._handler):
                        timer.set(self._limits.stall_timeout_s)
                        yield record
                        timer.set(None)
        except grpc.RpcError:
            _log.info("session cut")
        except CloisterError as exc:
            _log.info("session refused: %s", exc.code)
            context.abort(*refusal(exc))

    def _handshake(self, messages: Iterator[bytes], timer: _Timer) -> Generator[bytes, None, Established]:
        with self._handshakes.take():
            timer.set(self._limits.handshake_timeout_s)
            responder = self._responder_factory()
            while True:
                result = responder.receive(_next(messages), self._clock())
                if isinstance(result, Established):
                    timer.set(None)
                    return result
                yield result

    def _upload(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        try:
            with self._uploads.take(), self._watchdog.watch(context) as timer:
                timer.set(self._limits.handshake_timeout_s)
                header, offset = _parse_head(_next(messages), with_offset=True)
                bundle = self._incoming(header.header)
                expected = bundle.begin(header.encoded, header.signature)
                complete = bundle.bundle is not None
                if not complete and offset != expected:
                    raise ProtocolError(f"the upload begins at offset {offset}, the next is {expected}")
                for piece in _timed(messages, timer, self._limits.stall_timeout_s):
                    complete = bundle.feed(offset, piece)
                    offset += len(piece)
                return encode({"complete": complete, "offset": offset})
        except grpc.RpcError:
            _log.info("upload cut")
            raise
        except CloisterError as exc:
            _log.info("upload refused: %s", exc.code)
            context.abort(*refusal(exc))

    def _offset(self, message: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            header, _ = _parse_head(message, with_offset=False)
            bundle = self._incoming(header.header)
            offset = bundle.begin(header.encoded, header.signature)
            return encode({"complete": bundle.bundle is not None, "offset": offset})
        except CloisterError as exc:
            context.abort(*refusal(exc))


def _parse_head(message: bytes, *, with_offset: bool) -> tuple[UnverifiedHeader, int]:
    fields = Fields.decode(message, max_bytes=MAX_UPLOAD_HEAD_BYTES, what="upload request")
    encoded, signature = fields.blob("header"), fields.blob("signature", size=SIGNATURE_BYTES)
    offset = fields.integer("offset", low=0, high=_MAX_OFFSET) if with_offset else 0
    fields.end()
    return UnverifiedHeader.parse(encoded, signature), offset


def _next(messages: Iterator[bytes]) -> bytes:
    message = next(messages, None)
    if message is None:
        raise TransportError("the connection was cut")
    return message


def _timed(messages: Iterator[bytes], timer: _Timer, timeout_s: float) -> Iterator[bytes]:
    """Yield messages; the timer runs while we wait for one, not while it is worked on."""
    while True:
        timer.set(timeout_s)
        message = next(messages, None)
        timer.set(None)
        if message is None:
            return
        yield message


class _Places:
    """A bounded number of places; whoever finds none is refused at once."""

    def __init__(self, count: int, refusal: str) -> None:
        self._free = threading.BoundedSemaphore(count)
        self._refusal = refusal

    @contextmanager
    def take(self) -> Iterator[None]:
        """Raises: CapacityError when there is none."""
        if not self._free.acquire(blocking=False):
            raise CapacityError(self._refusal, hint="try again later")
        try:
            yield
        finally:
            self._free.release()


class _Timer:
    """When a connection is to be cut unless something happens."""

    def __init__(self, context: grpc.ServicerContext) -> None:
        self.context = context
        self.deadline: float | None = None

    def set(self, timeout_s: float | None) -> None:
        """Start anew, or stop with None."""
        self.deadline = None if timeout_s is None else time.monotonic() + timeout_s


class _Watchdog:
    """One thread that cuts connections whose timer has run out: strangers, slow readers, the silent."""

    _PERIOD_S = 0.25

    def __init__(self) -> None:
        self._timers: set[_Timer] = set()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="enclave-watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    @contextmanager
    def watch(self, context: grpc.ServicerContext) -> Iterator[_Timer]:
        """A timer for this connection, as long as the block runs."""
        timer = _Timer(context)
        with self._lock:
            self._timers.add(timer)
        try:
            yield timer
        finally:
            with self._lock:
                self._timers.discard(timer)

    def _run(self) -> None:
        while not self._stopped.wait(self._PERIOD_S):
            now = time.monotonic()
            with self._lock:
                late = [t for t in self._timers if t.deadline is not None and t.deadline < now]
            for timer in late:
                _log.info("connection cut: too slow")
                timer.set(None)
                timer.context.cancel()
