"""What an accelerator may do wrong: each is an error that names it, in bounded time, and never a number."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cloister.accelerator import messages
from cloister.accelerator.client import AcceleratorClient
from cloister.accelerator.messages import (
    DONE,
    MAX_FRAME_BYTES,
    REFUSALS,
    WAITING,
    Welcome,
    begun_bytes,
    product_bytes,
    refusal_bytes,
    welcome_bytes,
)
from cloister.accelerator.wire import Wire
from cloister.crypto.encoding import encode
from cloister.errors import CapacityError, CloisterError, ProtocolError, RunError, TransportError, UsageError
from tests.unit.accelerator.serving import WEIGHTS_ID, StandIn, client_of, plan, push, read, say, serving

Z = torch.zeros(2, 4, dtype=torch.int32)
PRODUCT = product_bytes(rows=2, columns=6, parts=1)


def ask(folder: Path, at_the_product: Callable[[Wire], None], *, timeout_s: float = 10.0) -> CloisterError:
    """The error that a client gets from a stand-in that is honest until it is asked for a product."""

    def behave(wire: Wire) -> None:
        read(wire)
        say(wire, messages.welcome_bytes(Welcome(identity=bytes(16), device="lies")))
        read(wire)
        say(wire, begun_bytes(held=True))
        read(wire)  # memory
        say(wire, DONE)
        read(wire)
        at_the_product(wire)

    with StandIn(folder, behave) as stand_in:
        client = AcceleratorClient(stand_in.address, name="acc", timeout_s=timeout_s)
        with client:
            assert client.begin(WEIGHTS_ID, [plan("g", 4, 6)], 1)
            reply = client.submit("g", "forward", Z)
            with pytest.raises(CloisterError) as caught:
                reply()
            with pytest.raises(CloisterError) as again:
                client.submit("g", "forward", Z)
            assert again.value is caught.value, "a client that has failed is closed"
    assert caught.value.where == "accelerator acc"
    return caught.value


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\xff" * 10,
        PRODUCT[:-1],
        PRODUCT + b"\0",
        encode({"is": "product", "rows": 2, "columns": 6}),
        encode({"is": "product", "rows": 2, "columns": 6, "parts": 1, "more": 1}),
        encode({"is": "product", "rows": 2, "columns": 6, "parts": 1.0}),
        product_bytes(rows=1, columns=6, parts=1),
        product_bytes(rows=2, columns=5, parts=1),
        product_bytes(rows=2, columns=6, parts=2),
        product_bytes(rows=1 << 40, columns=6, parts=1),
        DONE,
        WAITING,
        begun_bytes(held=True),
        encode({"is": "nonsense"}),
        encode({"is": 1}),
        encode([]),
        refusal_bytes("something new"),
    ],
)
def test_a_malformed_reply_or_one_of_another_shape(tmp_path: Path, answer: bytes) -> None:
    assert isinstance(ask(tmp_path, lambda wire: say(wire, answer)), ProtocolError)


def test_an_oversized_reply_is_refused_before_it_is_read(tmp_path: Path) -> None:
    error = ask(tmp_path, lambda wire: wire.write([(MAX_FRAME_BYTES + 1).to_bytes(4, "big")], 5))
    assert isinstance(error, ProtocolError)
    assert str(MAX_FRAME_BYTES) in error.message


@pytest.mark.parametrize("said", [b"", b"\0", b"\0\0\0\x20", b"\0\0\0\x20" + b"x" * 31])
def test_a_crash(tmp_path: Path, said: bytes) -> None:
    error = ask(tmp_path, lambda wire: wire.write([said], 5))
    assert isinstance(error, TransportError)
    assert "closed" in error.message or "lost" in error.message
    assert "start" in error.hint


@pytest.mark.parametrize("drips", [False, True])
def test_a_hang_ends_at_the_deadline(tmp_path: Path, drips: bool) -> None:
    """Also if a byte of a frame comes now and then."""

    def hang(wire: Wire) -> None:
        with contextlib.suppress(TransportError):  # the client has left
            if not drips:
                read(wire)
            wire.write([b"\0\0\1\0"], 5)
            for _ in range(100):
                wire.write([b"\0"], 5)
                time.sleep(0.1)

    error = ask(tmp_path, hang, timeout_s=0.5)
    assert isinstance(error, TransportError)
    assert "within 0.5 s" in error.message
    assert error.hint


@pytest.mark.parametrize("why", REFUSALS)
def test_a_refusal_is_told_in_our_words(tmp_path: Path, why: str) -> None:
    error = ask(tmp_path, lambda wire: say(wire, refusal_bytes(why)))
    assert type(error) is REFUSALS[why][0]
    assert error.message == REFUSALS[why][1]


@pytest.mark.parametrize(
    "greeting",
    [
        b"",
        DONE,
        encode({"is": "welcome", "version": 2, "identity": bytes(16), "device": ""}),
        encode({"is": "welcome", "version": 1, "identity": bytes(15), "device": ""}),
        encode({"is": "welcome", "version": 1, "identity": bytes(16), "device": "x" * 101}),
    ],
)
def test_a_malformed_welcome(tmp_path: Path, greeting: bytes) -> None:
    def behave(wire: Wire) -> None:
        read(wire)
        say(wire, greeting)

    with StandIn(tmp_path, behave) as stand_in, pytest.raises(ProtocolError, match="accelerator acc"):
        AcceleratorClient(stand_in.address, name="acc")


def test_what_it_says_of_its_device_prints_safely(tmp_path: Path) -> None:
    def behave(wire: Wire) -> None:
        read(wire)
        say(wire, welcome_bytes(Welcome(identity=bytes(16), device="a\x1b[2J\nb")))

    with StandIn(tmp_path, behave) as stand_in, AcceleratorClient(stand_in.address) as client:
        assert client.device == "a?[2J?b"


def test_a_crash_while_weights_are_sent(tmp_path: Path) -> None:
    def behave(wire: Wire) -> None:
        read(wire)
        say(wire, welcome_bytes(Welcome(identity=bytes(16), device="")))
        read(wire)
        say(wire, begun_bytes(held=False))
        read(wire)  # memory; the answer never comes

    with StandIn(tmp_path, behave) as stand_in, AcceleratorClient(stand_in.address, name="acc") as client:
        assert not client.begin(WEIGHTS_ID, [plan("g", 4, 6)], 1)
        with pytest.raises(TransportError, match="accelerator acc"):
            client.load("g", 0, 0, torch.zeros(6, 4, dtype=torch.int8))


def test_waiting_for_ever_for_anothers_weights_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloister.accelerator.client.LOAD_TIMEOUT_S", 0.3)

    def behave(wire: Wire) -> None:
        read(wire)
        say(wire, welcome_bytes(Welcome(identity=bytes(16), device="")))
        read(wire)
        with contextlib.suppress(TransportError):  # the client has left
            while True:
                say(wire, WAITING)
                time.sleep(0.01)

    with StandIn(tmp_path, behave) as stand_in, AcceleratorClient(stand_in.address, name="acc") as client:
        with pytest.raises(TransportError, match="in time") as caught:
            client.begin(WEIGHTS_ID, [plan("g", 4, 6)], 1)
        assert caught.value.where == "accelerator acc"


@pytest.mark.parametrize("transport", ["unix", "tls"])
def test_an_accelerator_that_stops(tmp_path: Path, transport: str) -> None:
    with serving(transport, tmp_path) as server, client_of(server) as client:
        push(client, [plan("g", 4, 6)], {"g": [torch.zeros(6, 4, dtype=torch.int8)]}, WEIGHTS_ID)
        client.submit("g", "forward", Z)()
        server.stop()
        with pytest.raises(TransportError, match="accelerator acc"):
            client.submit("g", "forward", Z)()


def test_one_that_was_restarted_is_not_taken_for_the_same(tmp_path: Path) -> None:
    caught: list[CloisterError] = []

    def ask_by_another_thread(client: AcceleratorClient) -> None:
        try:
            client.submit("g", "forward", Z)()
        except CloisterError as error:
            caught.append(error)

    weights = {"g": [torch.zeros(6, 4, dtype=torch.int8)]}
    with serving("unix", tmp_path) as first, client_of(first) as client:
        push(client, [plan("g", 4, 6)], weights, WEIGHTS_ID)
        first.stop()
        with serving("unix", tmp_path) as second, client_of(second) as other:
            push(other, [plan("g", 4, 6)], weights, WEIGHTS_ID)
            thread = threading.Thread(target=ask_by_another_thread, args=(client,))
            thread.start()
            thread.join(10)
    assert [error.message for error in caught] == ["is another process than before"]
    assert caught[0].where == "accelerator acc"


@pytest.mark.parametrize("transport", ["unix", "tls"])
def test_a_failed_product_is_told(tmp_path: Path, transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("cloister.accelerator.engine.modular_product", broken)
    with serving(transport, tmp_path) as server, client_of(server) as client:
        push(client, [plan("g", 4, 6)], {"g": [torch.zeros(6, 4, dtype=torch.int8)]}, WEIGHTS_ID)
        with pytest.raises(RunError, match="accelerator acc: failed to compute"):
            client.submit("g", "forward", Z)()


def test_a_closed_client_says_so_also_to_who_waits(tmp_path: Path) -> None:
    waiting, over = threading.Event(), threading.Event()
    caught: list[CloisterError] = []

    def behave(wire: Wire) -> None:
        read(wire)
        say(wire, welcome_bytes(Welcome(identity=bytes(16), device="")))
        read(wire)
        say(wire, begun_bytes(held=True))
        read(wire)
        say(wire, DONE)
        read(wire)
        waiting.set()
        over.wait(10)

    with StandIn(tmp_path, behave) as stand_in:
        client = AcceleratorClient(stand_in.address, name="acc")
        client.begin(WEIGHTS_ID, [plan("g", 4, 6)], 1)

        def wait() -> None:
            try:
                reply()
            except CloisterError as error:
                caught.append(error)

        reply = client.submit("g", "forward", Z)
        thread = threading.Thread(target=wait)
        thread.start()
        waiting.wait(10)
        client.close()
        thread.join(10)
        over.set()
        with pytest.raises(TransportError):
            client.submit("g", "forward", Z)
    assert [type(error) for error in caught] == [TransportError]


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="accelerator acc: cannot be reached"):
        AcceleratorClient(f"unix:{tmp_path / 'none'}", name="acc")


@pytest.mark.parametrize(
    "address", ["", "unix:", "unix:" + "x" * 108, "host", "host:", ":7", "host:x", "host:70000", "host:1#ff", "a:1#"]
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(UsageError):
        AcceleratorClient(address)


# What a client may do wrong -------------------------------------------------------------------------------------------


def raw(address: str) -> Wire:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(address.removeprefix("unix:"))
    return Wire(sock, "server")


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [encode({"op": "hello", "version": 2})],
        [encode({"op": "complete"})],
        [messages.request_bytes(messages.Hello()), messages.request_bytes(messages.Complete())],
        [messages.request_bytes(messages.Hello()), messages.request_bytes(messages.Memory(up=4096, down=4096))],
        [messages.request_bytes(messages.Hello()), encode({"op": "nonsense"})],
    ],
)
def test_a_client_that_breaks_the_rules_is_refused_and_others_are_served(tmp_path: Path, frames: list[bytes]) -> None:
    with serving("unix", tmp_path, places=2) as server:
        for _ in range(4):  # a place is given back
            wire = raw(server.address)
            for frame in frames:
                say(wire, frame)
            answers = [read(wire) for _ in frames]
            assert answers[-1] == refusal_bytes("request")
            with pytest.raises(TransportError, match="closed"):
                read(wire)
            wire.close()
        with client_of(server) as client:
            assert client.device == "cpu"


def test_more_connections_than_places_are_turned_away(tmp_path: Path) -> None:
    with serving("unix", tmp_path, places=1) as server:
        with client_of(server), pytest.raises(TransportError):
            client_of(server)
        deadline = time.monotonic() + 10
        while True:
            try:
                client_of(server).close()
                break
            except TransportError:
                assert time.monotonic() < deadline


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    refused = pytest.raises(CapacityError, match="accelerator acc: has no room")
    with serving("unix", tmp_path, max_bytes=23) as server, client_of(server) as client, refused:
        client.begin(WEIGHTS_ID, [plan("g", 4, 6)], 1)
