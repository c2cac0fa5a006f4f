"""The carrier on loopback: sessions, uploads that are cut and resume, limits against strangers."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from cloister.channel import client as client_module
from cloister.channel.grpc_common import OFFSET, SESSION, UPLOAD, common_options, reported
from cloister.channel.grpc_io import EnclaveServer, Limits, Session, connect, upload
from cloister.channel.handshake import Initiator, Peer, Responder
from cloister.crypto.bundle import IncomingStore, UnverifiedHeader, read_header
from cloister.crypto.encoding import encode
from cloister.crypto.keys import PartyKey
from cloister.errors import (
    BusyError,
    CapacityError,
    CloisterError,
    DataError,
    ProtocolError,
    TransportError,
    UsageError,
    VerificationError,
)
from tests.unit.channel.peers import JOB, KEY, PARTY, CountingAttester, appraise, settings
from tests.unit.crypto.bundles import header, write

QUICK = Limits(handshake_timeout_s=0.6, idle_timeout_s=30, stall_timeout_s=30)


class NowAttester(CountingAttester):
    """Dated by the real clock, as everything on the carrier is."""

    def __init__(self) -> None:
        super().__init__()
        self._real._clock = time.time


CHUNK = 1 << 16


class Enclave:
    """A running server."""

    def __init__(self, folder: Path, limits: Limits | None = None, max_payload_bytes: int = 1 << 26) -> None:
        folder.mkdir(exist_ok=True)
        self.attester = NowAttester()
        shared = settings(attester=self.attester)
        self.store = IncomingStore(
            folder, job_id=JOB, public_keys={PARTY: KEY.public}, chunk_bytes=CHUNK, max_payload_bytes=max_payload_bytes
        )
        self.server = EnclaveServer(
            "127.0.0.1:0",
            responder_factory=lambda: Responder(shared),
            handler=self.handle,
            incoming=self.store,
            limits=limits,
        ).start()
        self.address = self.server.address

    def handle(self, peer: Peer, method: str, body: dict[str, Any]) -> dict[str, Any]:
        if method == "refuse":
            raise DataError("no")
        if method == "slow":
            time.sleep(body["seconds"])
        return {"party": peer.party, **body}


@pytest.fixture
def enclave(tmp_path: Path) -> Iterator[Enclave]:
    running = Enclave(tmp_path / "enclave")
    yield running
    running.server.stop(0)


@pytest.fixture
def strict(tmp_path: Path) -> Iterator[Enclave]:
    running = Enclave(tmp_path / "enclave", Limits(max_calls=8, max_strangers=2, handshake_timeout_s=0.6))
    yield running
    running.server.stop(0)


def initiator(**changes: Any) -> Initiator:
    values: dict[str, Any] = {"job_id": JOB, "party": PARTY, "key": KEY, "verify_evidence": appraise}
    return Initiator(**(values | changes))


def open_session(enclave: Enclave) -> Session:
    return connect(enclave.address, initiator(), timeout_s=10)


def test_session(enclave: Enclave) -> None:
    with open_session(enclave) as session:
        assert session.claims.type == "simulated"
        assert session.request("x", {"n": 5}) == {"party": PARTY, "n": 5}
        tensor = os.urandom(5 << 20)
        assert session.request("x", {"t": tensor})["t"] == tensor
        with pytest.raises(DataError, match="reports: no"):
            session.request("refuse")
        assert session.request("x") == {"party": PARTY}


def test_sessions_side_by_side(enclave: Enclave) -> None:
    with open_session(enclave) as slow, open_session(enclave) as quick:
        done = threading.Event()

        def wait() -> None:
            slow.request("slow", {"seconds": 1.0})
            done.set()

        thread = threading.Thread(target=wait)
        thread.start()
        assert quick.request("x") == {"party": PARTY}
        assert not done.is_set()
        thread.join()


def test_a_request_that_takes_too_long(enclave: Enclave) -> None:
    session = open_session(enclave)
    with pytest.raises(TransportError, match="did not answer within"):
        session.request("slow", {"seconds": 1.0}, timeout_s=0.1)
    with pytest.raises(UsageError):
        session.request("x")


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"job_id": "cd" * 32}, "job"),
        ({"party": "stranger"}, "party"),
        ({"key": PartyKey.generate()}, "signature"),
    ],
)
def test_refusals_reach_the_party(enclave: Enclave, changes: dict[str, Any], code: str) -> None:
    with pytest.raises(VerificationError, match="the enclave reports") as refused:
        connect(enclave.address, initiator(**changes), timeout_s=10)
    assert refused.value.code == code
    assert enclave.attester.asked == []


def test_a_refused_enclave(enclave: Enclave) -> None:
    def refuse(*_: object) -> Any:
        raise VerificationError("measurement", "not ours")

    with pytest.raises(VerificationError, match="not ours"):
        connect(enclave.address, initiator(verify_evidence=refuse), timeout_s=10)
    with open_session(enclave) as session:  # the server goes on
        assert session.request("x") == {"party": PARTY}


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(TransportError, match="cannot be reached") as refused:
        connect(address, initiator(), timeout_s=0.5)
    assert refused.value.where == address


def test_the_enclave_goes_away(tmp_path: Path) -> None:
    running = Enclave(tmp_path / "enclave")
    session = open_session(running)
    running.server.stop(0)
    with pytest.raises(TransportError):
        session.request("x", timeout_s=10)
    session.close()


@pytest.mark.parametrize("listen", ["127.0.0.1", "127.0.0.1:x", "127.0.0.1:99999", ":"])
def test_malformed_addresses(enclave: Enclave, listen: str) -> None:
    with pytest.raises(UsageError, match="HOST:PORT"):
        EnclaveServer(listen, responder_factory=lambda: None, handler=enclave.handle, incoming=enclave.store)  # type: ignore[arg-type,return-value]  # never called


def test_a_port_in_use(enclave: Enclave) -> None:
    with pytest.raises(UsageError, match="in use") as refused:
        EnclaveServer(
            enclave.address,
            responder_factory=lambda: Responder(settings()),
            handler=enclave.handle,
            incoming=enclave.store,
        )
    assert refused.value.where == enclave.address


# Uploads


def sealed(tmp_path: Path, size: int = 3 << 20, **changes: Any) -> Path:
    limits = {"chunk_bytes": CHUNK, "max_payload_bytes": size}
    write(tmp_path / "out", os.urandom(size), KEY, **(limits | changes))
    return tmp_path / "out"


def test_upload(enclave: Enclave, tmp_path: Path) -> None:
    path = sealed(tmp_path)
    steps: list[tuple[int, int]] = []
    upload(enclave.address, path, lambda done, total: steps.append((done, total)))
    bundle = enclave.store.expected(PARTY, "train").bundle
    assert bundle is not None
    assert bundle.path.read_bytes() == path.read_bytes()
    size = path.stat().st_size
    assert steps == sorted(steps)
    assert steps[-1] == (size, size)
    upload(enclave.address, path)  # once more: complete already, nothing is sent


class CuttingProxy:
    """Forwards TCP to `address`, a little slowly; cuts its n-th connection as soon as `cuts[n]` says so."""

    def __init__(self, address: str, cuts: list[Callable[[], bool]]) -> None:
        host, port = address.split(":")
        self._target = (host, int(port))
        self._cuts = cuts
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            cut = self._cuts.pop(0) if self._cuts else lambda: False
            server = socket.create_connection(self._target)
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._pump, args=(source, sink, cut), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket, cut: Callable[[], bool]) -> None:
        with contextlib.suppress(OSError):
            while (data := source.recv(65536)) and not cut():
                sink.sendall(data)
                time.sleep(0.001)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def stop(self) -> None:
        self._listener.close()


def test_a_cut_upload_resumes(enclave: Enclave, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_BACKOFF_S", 0.01)
    path = sealed(tmp_path, 24 << 20)
    incoming = enclave.store.expected(PARTY, "train")
    cuts: list[Callable[[], bool]] = [
        lambda: incoming.offset > 3 << 20,
        lambda: True,  # at once
        lambda: incoming.offset > 8 << 20,
    ]
    proxy = CuttingProxy(enclave.address, cuts)
    starts: list[int] = []
    real = client_module._send

    def noting(channel: Any, path: Path, size: int, unverified: Any, offset: int, *rest: Any) -> bool:
        starts.append(offset)
        return real(channel, path, size, unverified, offset, *rest)

    monkeypatch.setattr(client_module, "_send", noting)
    upload(proxy.address, path, timeout_s=5)
    proxy.stop()
    bundle = enclave.store.expected(PARTY, "train").bundle
    assert bundle is not None
    assert bundle.path.read_bytes() == path.read_bytes()
    assert proxy.connections >= 4
    assert starts == sorted(starts)
    assert starts[-1] > 8 << 20  # what had arrived was not sent again


def test_an_upload_resumes_at_a_restarted_enclave(tmp_path: Path) -> None:
    path = sealed(tmp_path)
    first = Enclave(tmp_path / "enclave")
    unverified = read_header(path)
    incoming = first.store.expected(PARTY, "train")
    offset = incoming.begin(unverified.encoded, unverified.signature)
    incoming.feed(offset, path.read_bytes()[offset : offset + 100_000])
    first.server.stop(0)
    second = Enclave(tmp_path / "enclave")
    steps: list[int] = []
    upload(second.address, path, lambda done, total: steps.append(done))
    assert min(steps) > 100_000
    assert second.store.expected(PARTY, "train").bundle is not None
    second.server.stop(0)


def test_a_file_that_fails_while_it_is_sent(enclave: Enclave, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sealed(tmp_path)

    class Failing(client_module._Pieces):
        def __iter__(self) -> Iterator[bytes]:
            self._path = tmp_path / "gone"
            return super().__iter__()

    monkeypatch.setattr(client_module, "_Pieces", Failing)
    with pytest.raises(DataError, match="cannot read"):
        upload(enclave.address, path)


def test_an_enclave_that_claims_too_much(enclave: Enclave, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_ask_offset", lambda *_: (False, 1 << 40))
    with pytest.raises(ProtocolError, match="more than"):
        upload(enclave.address, sealed(tmp_path))


def test_retries_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(client_module, "_BACKOFF_S", 0.01)
    path = sealed(tmp_path, 1000)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(TransportError, match="cannot be reached"):
        upload(address, path, max_retries=2, timeout_s=2)
    with pytest.raises(DataError, match="cannot read"):
        upload(address, tmp_path / "absent")


def test_an_altered_bundle_is_refused_at_its_end(enclave: Enclave, tmp_path: Path) -> None:
    path = sealed(tmp_path)
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(VerificationError, match="the enclave reports") as refused:
        upload(enclave.address, path)
    assert refused.value.code == "commitment"
    assert enclave.store.expected(PARTY, "train").bundle is None


def test_a_truncated_file_at_the_sender(enclave: Enclave, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_BACKOFF_S", 0.01)
    path = sealed(tmp_path)
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(CloisterError, match="incomplete"):
        upload(enclave.address, path, max_retries=2)


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda: header(party="stranger"), "party"),
        (lambda: header(job_id="cd" * 32), "job"),
    ],
)
def test_a_strangers_upload(enclave: Enclave, tmp_path: Path, make: Any, code: str) -> None:
    made = make()
    write(tmp_path / "out", b"x", KEY, job_id=made.job_id, party=made.party)
    with pytest.raises(VerificationError) as refused:
        upload(enclave.address, tmp_path / "out")
    assert refused.value.code == code
    assert list(enclave.store.folder.iterdir()) == []


def test_more_than_the_enclave_takes(tmp_path: Path) -> None:
    running = Enclave(tmp_path / "enclave", max_payload_bytes=1000)
    with pytest.raises(CapacityError, match="takes 1000"):
        upload(running.address, sealed(tmp_path, 5000))
    assert list(running.store.folder.iterdir()) == []
    running.server.stop(0)


# Strangers that do not use our client


def call_upload(address: str, messages: list[bytes]) -> bytes:
    with grpc.insecure_channel(address, options=common_options()) as channel:
        stream: grpc.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(UPLOAD)
        return stream(iter(messages), timeout=10)


def head(path: Path, offset: int) -> bytes:
    unverified = read_header(path)
    return encode({"header": unverified.encoded, "signature": unverified.signature, "offset": offset})


def test_offsets_and_sizes_beyond_the_signed_header(enclave: Enclave, tmp_path: Path) -> None:
    path = sealed(tmp_path, 1000)
    start = len(read_header(path).prefix)
    cases = [
        [head(path, 0), b"x"],
        [head(path, 1 << 40), b"x"],
        [head(path, start), *[bytes(1 << 20)] * 3],
        [b"\x00"],
        [b""],
        [encode({"header": b"", "signature": bytes(64), "offset": 0})],
        [encode({"header": bytes(70000), "signature": bytes(64), "offset": 0})],
        [],
    ]
    for messages in cases:
        with pytest.raises(grpc.RpcError) as refused:
            call_upload(enclave.address, messages)
        assert refused.value.code() in (
            grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.DEADLINE_EXCEEDED
        )  # fmt: skip
        assert "Traceback" not in (refused.value.details() or "")
    held = sum(f.stat().st_size for f in enclave.store.folder.iterdir())
    assert held <= read_header(path).header.max_file_bytes
    upload(enclave.address, path)  # and the honest party still gets through


def test_a_forged_header_costs_no_disk(enclave: Enclave, tmp_path: Path) -> None:
    forged = UnverifiedHeader.sign(header(max_payload_bytes=1 << 20), PartyKey.generate())
    request = encode({"header": forged.encoded, "signature": forged.signature, "offset": len(forged.prefix)})
    with pytest.raises(grpc.RpcError):
        call_upload(enclave.address, [request, bytes(1000)])
    with grpc.insecure_channel(enclave.address) as channel:
        unary: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(OFFSET)
        with pytest.raises(grpc.RpcError):
            unary(encode({"header": forged.encoded, "signature": forged.signature}), timeout=5)
    assert list(enclave.store.folder.iterdir()) == []


def test_a_message_that_is_too_large(enclave: Enclave, tmp_path: Path) -> None:
    path = sealed(tmp_path, 10 << 20)
    big = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(enclave.address, options=big) as channel:
        stream: grpc.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(UPLOAD)
        with pytest.raises(grpc.RpcError) as refused:
            stream(iter([head(path, len(read_header(path).prefix)), bytes(4 << 20)]), timeout=10)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_silent_strangers_are_dropped_and_bounded(strict: Enclave) -> None:
    """More strangers than places: the oldest make room, the last are cut when their time is up; a party gets in."""
    channels, calls = [], []
    for _ in range(6):
        channel = grpc.insecure_channel(strict.address, options=common_options())
        channels.append(channel)
        silence: queue.Queue[bytes | None] = queue.Queue()
        stream: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(SESSION)
        calls.append(stream(iter(silence.get, None)))
    began = time.monotonic()
    codes = []
    for call in calls:
        with pytest.raises(grpc.RpcError) as refused:
            next(call)
        codes.append(refused.value.code())
    assert time.monotonic() - began < 5
    assert codes == [grpc.StatusCode.CANCELLED] * 6
    with open_session(strict) as session:
        assert session.request("x") == {"party": PARTY}
    for channel in channels:
        channel.close()


def test_one_party_cannot_take_all_places(tmp_path: Path) -> None:
    running = Enclave(tmp_path / "enclave", Limits(max_sessions_per_party=2))
    first, second = open_session(running), open_session(running)
    asked = len(running.attester.asked)
    with pytest.raises(BusyError, match="too many sessions"):
        open_session(running)
    assert len(running.attester.asked) == asked  # and no evidence was made for it
    first.close()
    deadline = time.monotonic() + 5
    while True:  # its place is free as soon as the enclave has seen the end
        with contextlib.suppress(BusyError), open_session(running) as again:
            assert again.request("x") == {"party": PARTY}
            break
        assert time.monotonic() < deadline
    second.close()
    running.server.stop(0)


def test_uploads_cannot_take_all_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Who finds no place is told so, and waits for one without giving up."""
    caplog.set_level("INFO")
    monkeypatch.setattr(client_module, "_BACKOFF_S", 0.01)
    running = Enclave(tmp_path / "enclave", Limits(max_uploads=1))
    path = sealed(tmp_path, 1000)
    with grpc.insecure_channel(running.address) as channel:
        stream: grpc.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(UPLOAD)
        silence: queue.Queue[bytes | None] = queue.Queue()
        silence.put(head(path, len(read_header(path).prefix)))
        call = stream.future(iter(silence.get, None))
        while running.store.expected(PARTY, "train").offset == 0:
            time.sleep(0.01)
        monkeypatch.setattr(client_module, "BUSY_TIMEOUT_S", 0.0)
        with pytest.raises(BusyError, match="too many uploads"):
            upload(running.address, path, max_retries=1)
        monkeypatch.setattr(client_module, "BUSY_TIMEOUT_S", 60.0)
        caplog.clear()
        waiting = ThreadPoolExecutor(1).submit(upload, running.address, path, max_retries=1)
        while caplog.text.count("upload refused: busy") < 3:  # more than its attempts
            time.sleep(0.01)
        silence.put(None)
        call.result(timeout=5)
    waiting.result(timeout=30)
    running.server.stop(0)


def test_a_handshake_that_stops_half_way(strict: Enclave) -> None:
    pipe = client_module._GrpcPipe(strict.address)
    pipe.wait_until_connected(5)
    pipe.send(initiator().start(time.time()))
    assert pipe.receive(5) is not None
    with pytest.raises(TransportError):  # no FINISH: cut after the handshake's time
        pipe.receive(5)
    pipe.close()


def test_an_idle_session_is_closed(tmp_path: Path) -> None:
    running = Enclave(tmp_path / "enclave", Limits(idle_timeout_s=0.5))
    session = open_session(running)
    assert session.request("x") == {"party": PARTY}
    time.sleep(1.2)
    with pytest.raises(TransportError):
        session.request("x", timeout_s=5)
    running.server.stop(0)


def test_a_slow_reader_is_dropped(tmp_path: Path) -> None:
    """A peer that asks for much and reads nothing holds its thread for the stall time only."""
    running = Enclave(tmp_path / "enclave", Limits(stall_timeout_s=0.6))
    pipe = client_module._GrpcPipe(running.address)
    pipe.wait_until_connected(5)
    party = initiator()
    pipe.send(party.start(time.time()))
    reply = pipe.receive(5)
    assert reply is not None
    finish, established = party.receive(reply, time.time())
    pipe.send(finish)
    body = encode({"id": 1, "method": "x", "body": {"t": bytes(60 << 20)}})
    for record in established.sealer.seal(body):
        pipe.send(record)
    time.sleep(2.5)  # the answer of 60 MiB is not read; then what is left in the pipe ends in a cut
    received: list[bytes] = []
    with pytest.raises(TransportError):
        received.extend(iter(lambda: pipe.receive(5) or b"", b""))
    assert len(received) < 60
    pipe.close()
    running.server.stop(0)


def test_a_stalled_enclave_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_BACKOFF_S", 0.01)
    running = Enclave(tmp_path / "enclave")
    release = threading.Event()
    incoming = running.store.expected(PARTY, "train")
    monkeypatch.setattr(incoming, "feed", lambda *_: release.wait(20))
    with pytest.raises(TransportError, match="took no data"):
        upload(running.address, sealed(tmp_path, 40 << 20), stall_timeout_s=0.3, max_retries=1)
    release.set()
    running.server.stop(0)


def test_a_server_that_is_none_of_ours() -> None:
    """A gRPC server without our service, and refusals that are malformed."""
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with pytest.raises(TransportError, match="no cloister enclave"):
        connect(f"127.0.0.1:{port}", initiator(), timeout_s=5)
    server.stop(0).wait()

    class Refusal(grpc.RpcError):
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.ABORTED

        def details(self) -> str:
            return '{"kind": "RunError"}'

    assert isinstance(reported(Refusal(), address="a"), ProtocolError)
