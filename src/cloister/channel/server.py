"""The enclave's gRPC server: sessions and uploads, with limits against strangers and slow peers."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType

import grpc

from cloister.channel.files import make_room_for_files
from cloister.channel.grpc_common import MAX_UPLOAD_HEAD_BYTES, SERVICE, refusal, server_options
from cloister.channel.handshake import Established, Responder
from cloister.channel.limits import Limits
from cloister.channel.places import Places, Strangers, Timer, Watchdog
from cloister.channel.rpc import Handler, serve
from cloister.crypto.bundle import BundleHeader, IncomingBundle, UnverifiedHeader
from cloister.crypto.encoding import Fields, encode
from cloister.crypto.keys import SIGNATURE_BYTES
from cloister.errors import CloisterError, ProtocolError, TransportError, UsageError

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
        self._limits = make_room_for_files(limits or Limits())
        self._responder_factory = responder_factory
        self._handler = handler
        self._incoming = incoming
        self._clock = clock
        self._strangers = Strangers(self._limits.max_strangers)
        self._uploads = Places(self._limits.max_uploads, "too many uploads at one time")
        # Only names of the job's parties come into these two.
        self._sessions_of: defaultdict[str, Places] = defaultdict(
            lambda: Places(self._limits.max_sessions_per_party, "this party has too many sessions open")
        )
        self._uploads_of: defaultdict[str, Places] = defaultdict(
            lambda: Places(self._limits.max_uploads_per_party, "this party has too many uploads open")
        )
        self._watchdog = Watchdog()
        self._server = grpc.server(
            ThreadPoolExecutor(self._limits.max_calls, thread_name_prefix="enclave"),
            options=server_options(self._limits),
            maximum_concurrent_rpcs=self._limits.max_calls,
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
            raise UsageError("must be HOST:PORT, with a port up to 65535", where=f"listen address {listen!r}")
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
                # A stream of one message, which nothing on the wire tells from a plain request: gRPC would wait for a
                # plain request's message for ever, in one of our threads.
                "Offset": grpc.stream_unary_rpc_method_handler(self._offset),
            },
        )

    def _session(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        try:
            with ExitStack() as place, self._watchdog.watch(context) as timer:
                established = yield from self._handshake(messages, context, place, timer)
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

    def _handshake(
        self, messages: Iterator[bytes], context: grpc.ServicerContext, place: ExitStack, timer: Timer
    ) -> Generator[bytes, None, Established]:
        place.enter_context(self._strangers.wait(context))
        timer.set(self._limits.handshake_timeout_s)
        responder = self._responder_factory()
        responder.on_admitted = lambda party: _move(place, self._sessions_of[party])
        while True:
            result = responder.receive(_next(messages), self._clock())
            if isinstance(result, Established):
                timer.set(None)
                return result
            yield result

    def _upload(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        try:
            with ExitStack() as place, self._watchdog.watch(context) as timer:
                header, offset, bundle = self._head(messages, context, place, timer, with_offset=True)
                _move(place, self._uploads_of[header.header.party], self._uploads)
                expected = bundle.begin(header.encoded, header.signature)
                complete = bundle.bundle is not None
                if not complete and offset != expected:
                    raise ProtocolError(f"the upload begins at offset {offset}, the next is {expected}")
                for piece in self._pieces(messages, timer):
                    complete = bundle.feed(offset, piece)
                    offset += len(piece)
                return encode({"complete": complete, "offset": offset})
        except grpc.RpcError:
            _log.info("upload cut")
            raise
        except CloisterError as exc:
            _log.info("upload refused: %s", exc.code)
            context.abort(*refusal(exc))

    def _offset(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        try:
            with ExitStack() as place, self._watchdog.watch(context) as timer:
                header, _, bundle = self._head(messages, context, place, timer, with_offset=False)
                _move(place, self._uploads_of[header.header.party])
                offset = bundle.begin(header.encoded, header.signature)
                return encode({"complete": bundle.bundle is not None, "offset": offset})
        except grpc.RpcError:
            _log.info("question cut")
            raise
        except CloisterError as exc:
            context.abort(*refusal(exc))

    def _head(
        self,
        messages: Iterator[bytes],
        context: grpc.ServicerContext,
        place: ExitStack,
        timer: Timer,
        *,
        with_offset: bool,
    ) -> tuple[UnverifiedHeader, int, IncomingBundle]:
        """The first message of an upload: a header that is a party's, whoever sent it here, and the offset."""
        place.enter_context(self._strangers.wait(context))
        timer.set(self._limits.handshake_timeout_s)
        header, offset = _parse_head(_next(messages), with_offset=with_offset)
        timer.set(None)
        bundle = self._incoming(header.header)
        bundle.check(header)
        return header, offset, bundle

    def _pieces(self, messages: Iterator[bytes], timer: Timer) -> Iterator[bytes]:
        """The messages of an upload, as long as they bring enough."""
        began, received = time.monotonic(), 0
        while True:
            enough = self._limits.stall_timeout_s + received / self._limits.min_upload_bytes_per_s
            timer.set(min(self._limits.stall_timeout_s, began + enough - time.monotonic()))
            piece = next(messages, None)
            timer.set(None)
            if piece is None:
                return
            received += len(piece)
            yield piece


def _move(place: ExitStack, *to: Places) -> None:
    """Give up a stranger's place for a party's. Raises: BusyError when there is none."""
    place.close()
    for places in to:
        place.enter_context(places.take())


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


def _timed(messages: Iterator[bytes], timer: Timer, timeout_s: float) -> Iterator[bytes]:
    """Yield messages; the timer runs while we wait for one, not while it is worked on."""
    while True:
        timer.set(timeout_s)
        message = next(messages, None)
        timer.set(None)
        if message is None:
            return
        yield message
