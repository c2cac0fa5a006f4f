"""Requests over a session in memory: values, errors, limits, and misbehaving peers."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cloister.channel import rpc
from cloister.channel.handshake import Peer
from cloister.channel.records import MAX_RECORD_PLAINTEXT
from cloister.channel.wire_errors import MAX_TEXT, from_wire, to_wire
from cloister.crypto.encoding import encode
from cloister.errors import (
    CapacityError,
    CloisterError,
    DataError,
    ProtocolError,
    TransportError,
    UsageError,
    VerificationError,
)
from tests.unit.channel.peers import PARTY, MemoryPipe, session, shake


def echo(peer: Peer, method: str, body: dict[str, Any]) -> dict[str, Any]:
    return {"party": peer.party, "method": method, **body}


def test_request() -> None:
    with session(echo)[0] as opened:
        reply = opened.request("score", {"n": 1, "text": "ä", "list": [1.5, None]})
    assert reply == {"party": PARTY, "method": "score", "n": 1, "text": "ä", "list": [1.5, None]}


def test_many_requests_and_large_bodies() -> None:
    opened, pipe = session(echo)
    tensor = os.urandom(2 * MAX_RECORD_PLAINTEXT + 17)
    assert opened.request("x", {"tensor": tensor})["tensor"] == tensor
    assert len(pipe.sent) == 3
    for n in range(50):
        assert opened.request("x", {"n": n})["n"] == n
    opened.close()
    pipe.join()
    assert pipe.failure is None


def test_nothing_travels_in_clear() -> None:
    opened, pipe = session(echo)
    opened.request("a-method-name", {"text": "patient record"})
    assert all(b"patient" not in r and b"method" not in r for r in pipe.sent)
    opened.close()


@pytest.mark.parametrize(
    "error",
    [
        DataError("non-finite activations", where=PARTY, hint="check the model"),
        VerificationError("manifest", "another manifest", where=PARTY),
        CapacityError("full"),
        UsageError("no such method"),
        ProtocolError("not now"),
    ],
)
def test_errors_arrive_as_reported(error: CloisterError) -> None:
    def fail(peer: Peer, method: str, body: dict[str, Any]) -> dict[str, Any]:
        if method == "fail":
            raise error
        return {}

    with session(fail)[0] as opened:
        with pytest.raises(type(error)) as reported:
            opened.request("fail")
        assert reported.value.code == error.code
        assert reported.value.message == f"the enclave reports: {error.message}"
        assert (reported.value.where, reported.value.hint) == (error.where, error.hint)
        assert opened.request("again") == {}  # the session goes on


def test_a_bug_in_a_handler_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Neither the peer nor the operator's log sees what an unexpected exception holds."""

    def fail(peer: Peer, method: str, body: dict[str, Any]) -> dict[str, Any]:
        raise KeyError("secret of a patient")

    opened, _ = session(fail)
    with caplog.at_level(logging.DEBUG), pytest.raises(CloisterError, match="internal error") as reported:
        opened.request("x")
    opened.close()
    assert "secret" not in str(reported.value) + reported.value.hint + caplog.text
    assert "KeyError" in caplog.text


def test_a_reply_that_cannot_be_encoded_is_internal() -> None:
    opened, _ = session(lambda *_: {"x": object()})
    with opened, pytest.raises(CloisterError, match="internal error"):
        opened.request("x")


def test_closed_sessions() -> None:
    opened, pipe = session(echo)
    opened.close()
    opened.close()
    with pytest.raises(UsageError, match="closed"):
        opened.request("x")
    pipe.join()
    assert pipe.failure is None


def test_a_cut_is_seen_at_both_ends() -> None:
    opened, pipe = session(echo)
    opened.request("x")
    pipe.to_enclave.put(None)  # the carrier ends without a close record
    pipe.join()
    assert isinstance(pipe.failure, TransportError)
    with pytest.raises(TransportError, match="cut"):
        opened.request("x")
    with pytest.raises(UsageError, match="closed"):
        opened.request("x")


def test_a_tampering_carrier() -> None:
    opened, pipe = session(echo)
    real = pipe.send
    pipe.send = lambda record: real(record[:-1] + bytes([record[-1] ^ 1]))  # type: ignore[method-assign]  # the attack
    with pytest.raises(CloisterError):
        opened.request("x", timeout_s=5)
    pipe.join()
    assert isinstance(pipe.failure, VerificationError)


def test_no_answer_in_time_closes() -> None:
    class Silent(MemoryPipe):
        def send(self, record: bytes) -> None:
            pass

    at_party, at_enclave = shake()
    opened = rpc.Session(at_party, Silent(at_enclave, echo))
    with pytest.raises(TransportError, match="did not answer"):
        opened.request("x", timeout_s=0.05)
    with pytest.raises(UsageError, match="closed"):
        opened.request("x")


def test_an_over_long_request_is_our_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "MAX_MESSAGE_BYTES", 100)
    with session(echo)[0] as opened, pytest.raises(ValueError, match="allowed are 100"):
        opened.request("x", {"b": bytes(200)})


def misbehaving(answer: Callable[[bytes], bytes]) -> rpc.Session:
    """A session whose enclave holds the keys and answers as it likes."""
    at_party, at_enclave = shake()

    class Pipe:
        def __init__(self) -> None:
            self.records: Iterator[bytes] = iter(())

        def send(self, record: bytes) -> None:
            message = at_enclave.opener.feed(record)
            if message is not None:
                self.records = at_enclave.sealer.seal(answer(message))

        def receive(self, timeout_s: float | None) -> bytes | None:
            return next(self.records, None)

        def close(self) -> None:
            pass

    return rpc.Session(at_party, Pipe())


@pytest.mark.parametrize("with_record", [True, False])
def test_an_enclave_that_closes_instead_of_answering(with_record: bool) -> None:
    at_party, at_enclave = shake()

    class Pipe:
        def send(self, record: bytes) -> None:
            pass

        def receive(self, timeout_s: float | None) -> bytes | None:
            return at_enclave.sealer.close() if with_record else None

        def close(self) -> None:
            pass

    if not with_record:
        at_party.opener.feed(at_enclave.sealer.close())  # it had closed before we asked
    with pytest.raises(ProtocolError, match="instead of answering"):
        rpc.Session(at_party, Pipe()).request("x")


def test_closing_towards_a_peer_that_is_gone() -> None:
    at_party, _ = shake()

    class Broken:
        closed = False

        def send(self, record: bytes) -> None:
            raise TransportError("gone")

        def receive(self, timeout_s: float | None) -> bytes | None:
            raise TransportError("gone")

        def close(self) -> None:
            self.closed = True

    pipe = Broken()
    rpc.Session(at_party, pipe).close()
    assert pipe.closed


def test_a_reply_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    with session(lambda *_: {"b": bytes(300)})[0] as opened:
        monkeypatch.setattr(rpc, "MAX_MESSAGE_BYTES", 200)
        with pytest.raises(CloisterError, match="internal error"):
            opened.request("x")


GOOD_ERROR: dict[str, Any] = {"kind": "DataError", "code": "data", "message": "m", "where": "", "hint": ""}


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"\xff",
        encode([]),
        encode({"id": 1, "ok": True}),
        encode({"id": 2, "ok": True, "body": {}}),  # an answer to another request
        encode({"id": 1, "ok": True, "body": {}, "more": 1}),
        encode({"id": 1, "ok": 1, "body": {}}),
        encode({"id": 1, "ok": True, "body": []}),
        encode({"id": 1, "ok": False, "body": {}}),
        encode({"id": 1, "ok": False, "body": GOOD_ERROR | {"kind": "KeyboardInterrupt"}}),
        encode({"id": 1, "ok": False, "body": GOOD_ERROR | {"kind": "VerificationError", "code": "Not A Code\n"}}),
        encode({"id": 1, "ok": False, "body": GOOD_ERROR | {"message": "x" * 2000}}),
        encode({"id": 1, "ok": False, "body": GOOD_ERROR | {"message": 5}}),
    ],
)
def test_misbehaving_enclave(reply: bytes) -> None:
    opened = misbehaving(lambda _: reply)
    with pytest.raises(ProtocolError):
        opened.request("x")
    with pytest.raises(UsageError, match="closed"):
        opened.request("x")


@pytest.mark.parametrize(
    "request_bytes",
    [b"\x00", encode({"id": 1, "method": "x"}), encode({"id": -1, "method": "x", "body": {}}), encode([0] * 300_000)],
)
def test_misbehaving_party(request_bytes: bytes) -> None:
    """What is not a request ends the session; the handler never sees it."""
    at_party, at_enclave = shake()
    called: list[str] = []

    def handler(peer: Peer, method: str, body: dict[str, Any]) -> dict[str, Any]:
        called.append(method)
        return {}

    records = list(at_party.sealer.seal(request_bytes))
    with pytest.raises(ProtocolError):
        list(rpc.serve(at_enclave, records, handler))
    assert called == []


def test_peer_text_is_cleaned_and_bounded() -> None:
    error = from_wire(GOOD_ERROR | {"message": "a\x1b[31m\nb\u202e"}, peer="enclave")
    assert error.message == "the enclave reports: a [31m b "
    assert len(to_wire(DataError("x" * 5000))["message"]) == MAX_TEXT


def test_paths_stay_here() -> None:
    assert to_wire(CapacityError("full", where="/srv/enclave/a.bundle"))["where"] == ""
    assert to_wire(CapacityError("full", where="C:\\enclave"))["where"] == ""
    assert to_wire(CapacityError("full", where="hospital-a"))["where"] == "hospital-a"
    assert to_wire(ValueError("/etc/secret")) == {
        "kind": "RunError", "code": "internal", "message": "internal error", "where": "", "hint": ""
    }  # fmt: skip
