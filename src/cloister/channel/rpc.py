"""Requests and replies over an open session.

One message per request, `{id, method, body}`, and one per reply, `{id, ok, body}`, as canonical CBOR;
with `ok` false the body is an error report.
Bodies are maps; large values (tensors) travel in them as bytes.
"""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Protocol

from cloister.attest.claims import Claims
from cloister.channel.handshake import Established, Peer
from cloister.channel.records import MAX_MESSAGE_BYTES
from cloister.channel.wire_errors import from_wire, to_wire
from cloister.crypto.encoding import Fields, Value, encode
from cloister.errors import CloisterError, ProtocolError, UsageError

MAX_ITEMS = 1 << 18
"""Numbers, texts and so on in one message. Send long columns as bytes."""
MAX_ID = 1 << 53

Handler = Callable[[Peer, str, dict[str, Any]], Mapping[str, Value]]
"""(authenticated peer, method, body) -> reply body. The body's fields are unchecked: read them with `Fields`."""

_log = logging.getLogger(__name__)


class Pipe(Protocol):
    """Carries records in both directions, each whole and in order."""

    def send(self, record: bytes) -> None:
        """Raises: TransportError."""

    def receive(self, timeout_s: float | None) -> bytes | None:
        """The next record, None at the end of the stream. Raises: TransportError, also when it takes too long."""

    def close(self) -> None:
        """End the carrier; never raises for a peer that is gone."""


class Session:
    """The party's end of an open session; one request at a time, safe to share between threads."""

    def __init__(self, established: Established, pipe: Pipe) -> None:
        self._established = established
        self._pipe = pipe
        self._lock = threading.Lock()
        self._next_id = 0
        self.bytes_sent = 0
        """Bytes of records, for reports; the handshake and the carrier's own are not counted."""
        self.bytes_received = 0
        self._closed = False

    @property
    def claims(self) -> Claims:
        """What the enclave's accepted evidence says."""
        claims = self._established.peer.claims
        if claims is None:
            raise RuntimeError("a party's session always has claims")
        return claims

    @property
    def transcript(self) -> bytes:
        """64 bytes, equal at both ends and unique to this session."""
        return self._established.transcript

    def request(
        self, method: str, body: Mapping[str, Value] | None = None, *, timeout_s: float | None = 60.0
    ) -> dict[str, Any]:
        """Send a request and wait for its reply; returns the reply's body, unchecked.

        Raises: what the enclave reported, marked as reported; ProtocolError, TransportError or VerificationError
            for the session itself, which is then closed.
        """
        with self._lock:
            if self._closed:
                raise UsageError("the session is closed", hint="connect again")
            self._next_id += 1
            message = encode({"id": self._next_id, "method": method, "body": dict(body or {})})
            if len(message) > MAX_MESSAGE_BYTES:
                raise ValueError(f"a request has {len(message)} bytes, allowed are {MAX_MESSAGE_BYTES}")
            try:
                for record in self._established.sealer.seal(message):
                    self._pipe.send(record)
                    self.bytes_sent += len(record)
                fields = self._reply(timeout_s)
                fields.integer("id", low=self._next_id, high=self._next_id)
                succeeded = fields.boolean("ok")
                result = fields.table("body")
                fields.end()
                error = None if succeeded else from_wire(result, peer="enclave")
            except BaseException:
                self._abandon()
                raise
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        """Say goodbye, so that the other end knows that nothing was cut off."""
        with self._lock:
            if self._closed:
                return
            try:
                if not self._established.sealer.closed:
                    self._pipe.send(self._established.sealer.close())
                    self._await_close()
            except CloisterError as exc:
                _log.debug("closing: %s", exc)  # the peer is gone already, which is what we wanted
            finally:
                self._abandon()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _reply(self, timeout_s: float | None) -> Fields:
        opener = self._established.opener
        while True:
            record = self._pipe.receive(timeout_s)
            if record is None:
                opener.end_of_stream()
                raise ProtocolError("the enclave closed the session instead of answering")
            self.bytes_received += len(record)
            message = opener.feed(record)
            if message is not None:
                return Fields.decode(message, max_bytes=MAX_MESSAGE_BYTES, max_items=MAX_ITEMS, what="reply")
            if opener.closed:
                raise ProtocolError("the enclave closed the session instead of answering")

    def _await_close(self) -> None:
        record = self._pipe.receive(5.0)
        if record is not None:
            self._established.opener.feed(record)

    def _abandon(self) -> None:
        self._closed = True
        self._pipe.close()


def serve(established: Established, records: Iterable[bytes], handler: Handler) -> Iterator[bytes]:
    """The enclave's end of an open session: records in, records out, until the peer closes.

    An error that the handler raises is reported to the peer, and the session goes on. Anything wrong with the session
    itself is raised and ends it.

    Raises: ProtocolError, VerificationError; TransportError if the stream was cut.
    """
    for record in records:
        message = established.opener.feed(record)
        if established.opener.closed:
            yield established.sealer.close()
            return
        if message is not None:
            yield from established.sealer.seal(_answer(established.peer, message, handler))
    established.opener.end_of_stream()


def _answer(peer: Peer, message: bytes, handler: Handler) -> bytes:
    fields = Fields.decode(message, max_bytes=MAX_MESSAGE_BYTES, max_items=MAX_ITEMS, what="request")
    number, method, body = fields.integer("id", low=0, high=MAX_ID), fields.text("method"), fields.table("body")
    fields.end()
    try:
        result = encode({"id": number, "ok": True, "body": dict(handler(peer, method, body))})
        if len(result) > MAX_MESSAGE_BYTES:
            raise ValueError(f"a reply has {len(result)} bytes, allowed are {MAX_MESSAGE_BYTES}")
    except CloisterError as exc:
        return _error_reply(number, exc)
    except Exception as exc:  # noqa: BLE001  # the top of a task: one bad request must not end the enclave
        # The type and place only: the operator reads the log, and a message may hold a party's data.
        frame = traceback.extract_tb(exc.__traceback__)[-1]
        _log.error("request failed: %s at %s:%s", type(exc).__name__, frame.name, frame.lineno)
        return _error_reply(number, exc)
    return result


def _error_reply(number: int, exc: Exception) -> bytes:
    return encode({"id": number, "ok": False, "body": to_wire(exc)})
