"""The record layer: AES-256-GCM, one key per direction, counter nonces, a close alert.

    record = kind (1 byte, authenticated) | ciphertext | tag

A message is any number of MORE records and one END record. The counter is not sent: a record that was altered,
dropped, repeated, reordered or reflected does not open. A stream that ends without CLOSE was cut. After any failure
the direction is closed for good.
"""

from __future__ import annotations

from collections.abc import Iterator

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cloister.errors import CapacityError, ProtocolError, TransportError, VerificationError

MORE, END, CLOSE = 0x11, 0x12, 0x13
TAG_BYTES = 16
MAX_RECORD_PLAINTEXT = 1 << 20
MAX_RECORD_BYTES = 1 + MAX_RECORD_PLAINTEXT + TAG_BYTES
MAX_MESSAGE_BYTES = 80 << 20
"""Room for a tensor of 64 MiB and what goes with it."""
MAX_RECORDS = 1 << 32
"""Far below the 2^64 nonces that there are; a session that needs more is not ours."""


def _nonce(counter: int) -> bytes:
    return counter.to_bytes(12, "big")


class Sealer:
    """Turns messages into records of one direction. Not safe to share between threads."""

    def __init__(self, key: bytes, *, max_records: int = MAX_RECORDS) -> None:
        self._aead = AESGCM(key)
        self._counter = 0
        self._max_records = max_records
        self._buffer = bytearray()  # grows with the longest record so far: most sessions never send a full one
        self.closed = False

    def seal(self, message: bytes | bytearray | memoryview) -> Iterator[bytes]:
        """Yield the records of a message. All of them must be sent, in order.

        Raises: RuntimeError after close; CapacityError when the nonces are used up.
        """
        view = memoryview(message).cast("B")
        while len(view) > MAX_RECORD_PLAINTEXT:
            yield self._record(MORE, view[:MAX_RECORD_PLAINTEXT])
            view = view[MAX_RECORD_PLAINTEXT:]
        yield self._record(END, view)

    def close(self) -> bytes:
        """Return the close record; nothing can be sealed after it."""
        record = self._record(CLOSE, memoryview(b""))
        self.closed = True
        return record

    def _record(self, kind: int, plain: memoryview) -> bytes:
        if self.closed:
            raise RuntimeError("this direction of the session is closed")
        if self._counter >= self._max_records:
            self.closed = True
            raise CapacityError("the session has used up its nonces", hint="connect again")
        end = 1 + len(plain) + TAG_BYTES
        if end > len(self._buffer):
            self._buffer = bytearray(end)
        self._buffer[0] = kind
        sealed = memoryview(self._buffer)[1:end]
        self._aead.encrypt_into(_nonce(self._counter), plain, bytes([kind]), sealed)
        self._counter += 1
        return bytes(memoryview(self._buffer)[:end])


class Opener:
    """Turns records of one direction back into messages."""

    def __init__(self, key: bytes, *, max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self._aead = AESGCM(key)
        self._counter = 0
        self._max_message_bytes = max_message_bytes
        self._buffer = bytearray()  # grows with the longest record so far
        self._message = bytearray()
        self._dead = False
        self.closed = False
        """Whether the peer has said that it sends no more."""

    def feed(self, record: bytes) -> bytes | None:
        """Take the next record; return a message when it completes one.

        Raises: VerificationError("record") if it does not open; ProtocolError for a malformed one, too long a
            message, or anything after close or failure.
        """
        try:
            return self._feed(record)
        except (VerificationError, ProtocolError):
            self._dead = True
            self._message.clear()
            raise

    def end_of_stream(self) -> None:
        """The carrier has ended. Raises: TransportError if the peer had not closed."""
        if not self.closed:
            self._dead = True
            raise TransportError("the connection was cut", hint="connect again")

    def _feed(self, record: bytes) -> bytes | None:
        if self._dead or self.closed:
            raise ProtocolError("a record came after the session was closed")
        if not 1 + TAG_BYTES <= len(record) <= MAX_RECORD_BYTES or record[0] not in (MORE, END, CLOSE):
            raise ProtocolError("a record is malformed")
        plain = self._open(record)
        if len(self._message) + len(plain) > self._max_message_bytes:
            raise ProtocolError(f"a message is longer than {self._max_message_bytes} bytes")
        if record[0] == CLOSE:
            if self._message or plain:
                raise ProtocolError("the session was closed inside a message")
            self.closed = True
            return None
        if record[0] == MORE:
            if len(plain) != MAX_RECORD_PLAINTEXT:
                raise ProtocolError("a record that is not its message's last must be full")
            self._message += plain
            return None
        if not self._message:
            return bytes(plain)
        self._message += plain
        message = bytes(self._message)
        self._message = bytearray()
        return message

    def _open(self, record: bytes) -> memoryview:
        length = len(record) - 1 - TAG_BYTES
        if length > len(self._buffer):
            self._buffer = bytearray(length)
        plain = memoryview(self._buffer)[:length]
        try:
            self._aead.decrypt_into(_nonce(self._counter), memoryview(record)[1:], record[:1], plain)
        except InvalidTag as exc:
            plain[:] = bytes(len(plain))  # `decrypt_into` leaves unauthenticated plaintext behind
            hint = "it was altered, repeated, reordered or dropped on the way"
            raise VerificationError("record", "a record of the session does not open", hint=hint) from exc
        self._counter += 1
        return plain
