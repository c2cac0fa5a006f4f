"""What the stories elsewhere reach only by chance or never: peers that vanish at a bad moment, our own mistakes."""

from __future__ import annotations

import json
import queue
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from cloister.channel import client
from cloister.channel.grpc_common import reported
from cloister.channel.handshake import Initiator, Responder, State
from cloister.channel.rpc import Session
from cloister.channel.server import EnclaveServer
from cloister.channel.wire_errors import to_wire
from cloister.crypto.bundle import IncomingStore
from cloister.errors import DataError, ProtocolError, TransportError
from tests.unit.channel.peers import JOB, NOW, MemoryPipe, initiator, session, settings, shake


class Refused(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, details: str | None = None) -> None:
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str | None:
        return self._details


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (grpc.StatusCode.UNAVAILABLE, "cannot be reached"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "too many connections"),
        (grpc.StatusCode.UNIMPLEMENTED, "no cloister enclave"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "deadline exceeded"),
    ],
)
def test_what_a_status_means(code: grpc.StatusCode, words: str) -> None:
    error = reported(Refused(code), address="here:1")
    assert isinstance(error, TransportError)
    assert words in error.message
    assert error.where == "here:1"


@pytest.mark.parametrize("details", ["{", '{"kind": 1}', "{" + '"a":{' * 5000])
def test_malformed_refusals(details: str) -> None:
    error = reported(Refused(grpc.StatusCode.ABORTED, details), address="here:1")
    assert isinstance(error, ProtocolError)
    assert "malformed refusal" in error.message


def test_a_refusal_is_what_was_reported() -> None:
    error = reported(Refused(grpc.StatusCode.ABORTED, json.dumps(to_wire(DataError("no")))), address="")
    assert isinstance(error, DataError)


# The party's pipe -----------------------------------------------------------------------------------------------------


class FullQueue:
    """Never takes anything."""

    def put(self, item: object, timeout: float = 0) -> None:
        raise queue.Full

    put_nowait = put


def pipe() -> Any:
    return client._GrpcPipe("127.0.0.1:1")


def test_an_enclave_that_takes_no_more_data() -> None:
    full = pipe()
    full._outgoing = FullQueue()
    with pytest.raises(TransportError, match="takes no more data"):
        full.send(b"record")
    full.close()


def test_sending_after_the_end_says_why_it_ended() -> None:
    ended = pipe()
    ended._read(iter_that_fails(Refused(grpc.StatusCode.UNAVAILABLE)))
    for _ in range(2):
        with pytest.raises(TransportError, match="went away"):
            ended.send(b"record")
    with pytest.raises(TransportError, match="went away"):
        ended.receive(1.0)
    ended.close()


def iter_that_fails(error: Exception) -> Any:
    yield from ()
    raise error


def test_closing_a_pipe_that_is_full_cancels_the_call() -> None:
    cancelled: list[bool] = []
    full = pipe()
    for _ in range(client._QUEUED_RECORDS):
        full.send(b"record")
    full._call = SimpleNamespace(cancel=lambda: cancelled.append(True))
    full.close()
    assert cancelled == [True]


def test_closing_a_full_pipe_that_was_never_connected() -> None:
    full = pipe()
    for _ in range(client._QUEUED_RECORDS):
        full.send(b"record")
    full.close()
    assert full._closed.is_set()


def test_a_reader_stops_when_the_pipe_is_closed() -> None:
    """Nobody takes what has arrived: the reading thread must not wait for ever."""
    slow = pipe()
    for _ in range(client._QUEUED_RECORDS):
        slow._put(b"record")
    slow.close()
    slow._put(b"one more")
    assert slow._incoming.qsize() == client._QUEUED_RECORDS


def test_an_enclave_that_closes_instead_of_replying(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []
    fake = SimpleNamespace(
        wait_until_connected=lambda timeout_s: None,
        send=lambda record: None,
        receive=lambda timeout_s: None,
        close=lambda: closed.append(True),
    )
    monkeypatch.setattr(client, "_GrpcPipe", lambda address: fake)
    with pytest.raises(TransportError, match="closed the connection"):
        client.connect("here:1", initiator())
    assert closed == [True]


# Sessions -------------------------------------------------------------------------------------------------------------


def echo(peer: object, method: str, body: dict[str, Any]) -> dict[str, Any]:
    return body


def test_a_session_knows_its_transcript() -> None:
    at_party, at_enclave = shake()
    assert Session(at_party, MemoryPipe(at_enclave, echo)).transcript == at_enclave.transcript


def test_a_partys_session_always_has_claims() -> None:
    at_party, at_enclave = shake()
    without = replace(at_party, peer=replace(at_party.peer, claims=None))
    with pytest.raises(RuntimeError, match="claims"):
        _ = Session(without, MemoryPipe(at_enclave, echo)).claims


def test_closing_a_session_whose_sealer_is_closed_sends_nothing() -> None:
    at_party, _ = shake()
    sent: list[bytes] = []
    silent = SimpleNamespace(send=sent.append, receive=lambda timeout_s: None, close=lambda: None)
    at_party.sealer.close()
    Session(at_party, silent).close()
    assert sent == []


def test_closing_towards_a_peer_that_ends_without_a_word() -> None:
    at_party, _ = shake()
    sent: list[bytes] = []
    silent = SimpleNamespace(send=sent.append, receive=lambda timeout_s: None, close=lambda: None)
    Session(at_party, silent).close()
    assert [record[0] for record in sent] == [0x13]


def test_closing_twice() -> None:
    open_session, memory = session(echo)
    open_session.close()
    sent = len(memory.sent)
    open_session.close()
    assert len(memory.sent) == sent


def test_finish_without_keys_is_our_own_mistake() -> None:
    enclave = Responder(settings())
    enclave.state = State.WAIT_FINISH
    with pytest.raises(RuntimeError, match="no keys"):
        enclave.receive(b"\x03" + bytes(32), NOW)


def test_an_open_handshake_has_no_deadline() -> None:
    party = initiator()
    assert isinstance(party, Initiator)
    shake(party)
    party.check_deadline(NOW + 1e6)
    assert party.state is State.OPEN


# The server -----------------------------------------------------------------------------------------------------------


def server(folder: Path) -> EnclaveServer:
    return EnclaveServer(
        "127.0.0.1:0",
        responder_factory=lambda: Responder(settings()),
        handler=echo,
        incoming=IncomingStore(folder, job_id=JOB, public_keys={}, chunk_bytes=0, max_payload_bytes=0),
    )


def test_a_server_as_a_block(tmp_path: Path) -> None:
    with server(tmp_path) as running:
        assert not running.address.endswith(":0")
        assert running._watchdog._thread.is_alive()
    assert not running._watchdog._thread.is_alive()


def test_stopping_a_server_that_never_started(tmp_path: Path) -> None:
    server(tmp_path).stop(0)
