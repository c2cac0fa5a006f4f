"""Bounds against strangers and slow peers: connections that say nothing, little, too much or the same again."""

from __future__ import annotations

import contextlib
import queue
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from cloister.channel import client as client_module
from cloister.channel.files import make_room_for_files
from cloister.channel.grpc_common import OFFSET, SESSION, UPLOAD, common_options
from cloister.channel.grpc_io import Limits, upload
from cloister.channel.limits import SPARE_FILES
from cloister.channel.server import _timed
from cloister.crypto.bundle import read_header
from cloister.errors import CapacityError, TransportError
from tests.unit.channel.peers import KEY, PARTY
from tests.unit.channel.test_grpc import CHUNK, Enclave, head, open_session, sealed
from tests.unit.crypto.bundles import write


@contextmanager
def enclave(tmp_path: Path, **limits: float) -> Iterator[Enclave]:
    running = Enclave(tmp_path / "enclave", Limits(**limits))  # type: ignore[arg-type]  # integers stay integers
    try:
        yield running
    finally:
        running.server.stop(0)


def until(fact: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def dial(running: Enclave) -> socket.socket:
    host, _, port = running.address.rpartition(":")
    return socket.create_connection((host, int(port)))


def closed(connection: socket.socket) -> bool:
    """Whether the other end has hung up; what it had said before is thrown away."""
    try:
        while select.select([connection], [], [], 0)[0]:
            if not connection.recv(1 << 16):
                return True
    except OSError:
        return True
    return False


@contextmanager
def silent_call(running: Enclave, method: str, *first: bytes) -> Iterator[grpc.Future]:
    """A stream that sends `first` and then nothing."""
    messages: queue.Queue[bytes | None] = queue.Queue()
    for message in first:
        messages.put(message)
    with grpc.insecure_channel(running.address, options=common_options()) as channel:
        stream: grpc.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(method)
        call = stream.future(iter(messages.get, None))
        yield call
        messages.put(None)


def test_more_connections_than_allowed_are_closed_and_a_session_goes_on(tmp_path: Path) -> None:
    with enclave(tmp_path, max_connections=8, greeting_timeout_s=300) as running, open_session(running) as session:
        crowd = [dial(running) for _ in range(40)]
        until(lambda: sum(map(closed, crowd)) >= 40 - 7)
        assert session.request("x") == {"party": PARTY}
        for connection in crowd:
            connection.close()


def test_connections_that_say_nothing_or_a_byte_at_a_time_are_closed(tmp_path: Path) -> None:
    with enclave(tmp_path, max_connections=8, greeting_timeout_s=0.5) as running:
        crowd = [dial(running) for _ in range(8)]
        slow, *silent = crowd
        preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        for byte in preface[:-1]:
            if closed(slow):
                break
            slow.send(bytes([byte]))
            time.sleep(0.05)
        until(lambda: all(map(closed, silent)) and closed(slow))
        with open_session(running) as session:  # and their places are free
            assert session.request("x") == {"party": PARTY}
        for connection in crowd:
            connection.close()


def test_a_connection_without_a_call_is_closed(tmp_path: Path) -> None:
    with enclave(tmp_path, unused_timeout_s=0.5) as running, closing(dial(running)) as connection:
        connection.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5))  # and SETTINGS
        until(lambda: closed(connection))


def test_calls_on_one_connection_are_bounded(tmp_path: Path) -> None:
    """More streams than allowed wait at the client: an enclave sees none of them."""
    with (
        enclave(tmp_path, max_calls_per_connection=2, max_strangers=8) as running,
        grpc.insecure_channel(running.address, options=common_options()) as channel,
    ):
        stream: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(SESSION)
        silence: queue.Queue[bytes | None] = queue.Queue()
        calls = [stream(iter(silence.get, None)) for _ in range(6)]
        until(lambda: len(running.server._strangers._waiting) == 2)
        time.sleep(0.3)
        assert len(running.server._strangers._waiting) == 2
        for call in calls:
            call.cancel()
        for _ in calls:
            silence.put(None)


@pytest.mark.parametrize("method", [OFFSET, UPLOAD, SESSION])
def test_a_call_that_stays_silent_is_cut(tmp_path: Path, method: str) -> None:
    with enclave(tmp_path, handshake_timeout_s=0.5) as running, silent_call(running, method) as call:
        with pytest.raises(grpc.RpcError):
            call.result(timeout=20)
        until(lambda: not running.server._watchdog._timers)


def test_a_flood_of_silent_strangers_keeps_no_party_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strangers come without pause and stay; sessions, new ones, and uploads go on beside them."""
    monkeypatch.setattr(client_module, "_BACKOFF_S", 0.01)
    path = sealed(tmp_path, 1000)
    with enclave(tmp_path, max_strangers=8, max_calls=64) as running, open_session(running) as before:
        stop = threading.Event()

        def flood() -> None:
            silence: queue.Queue[bytes | None] = queue.Queue()
            with grpc.insecure_channel(running.address, options=common_options()) as channel:
                stream: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(SESSION)
                calls = []
                while not stop.wait(0.05):
                    calls.append(stream(iter(silence.get, None)))
                for call in calls:
                    call.cancel()
                    silence.put(None)

        def comes_in() -> bool:
            with contextlib.suppress(TransportError), open_session(running) as during:
                return during.request("x") == {"party": PARTY}
            return False

        crowd = [threading.Thread(target=flood) for _ in range(2)]
        for each in crowd:
            each.start()
        try:
            until(lambda: len(running.server._strangers._waiting) == 8)
            assert before.request("x") == {"party": PARTY}
            until(comes_in)
            upload(running.address, path)
        finally:
            stop.set()
            for each in crowd:
                each.join()
        assert running.store.expected(PARTY, "train").bundle is not None


def test_an_upload_that_trickles_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sealed(tmp_path, 100_000)
    start = len(read_header(path).prefix)
    with enclave(tmp_path, stall_timeout_s=0.6, min_upload_bytes_per_s=1000) as running:
        messages: queue.Queue[bytes | None] = queue.Queue()
        messages.put(head(path, start))
        with grpc.insecure_channel(running.address, options=common_options()) as channel:
            stream: grpc.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(UPLOAD)
            call = stream.future(iter(messages.get, None))
            for byte in path.read_bytes()[start : start + 300]:
                if call.done():
                    break
                messages.put(bytes([byte]))
                time.sleep(0.05)  # never silent for as long as the stall time
            messages.put(None)
            assert call.code() is grpc.StatusCode.CANCELLED
        assert 0 < running.store.expected(PARTY, "train").offset - start < 200
        upload(running.address, path)  # what came is kept


def test_one_party_cannot_take_all_uploads(tmp_path: Path) -> None:
    path = sealed(tmp_path, 1000)
    with (
        enclave(tmp_path, max_uploads=8, max_uploads_per_party=1) as running,
        silent_call(running, UPLOAD, head(path, len(read_header(path).prefix))),
    ):
        until(lambda: running.store.expected(PARTY, "train").offset > 0)
        with grpc.insecure_channel(running.address, options=common_options()) as channel:
            stream: grpc.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(UPLOAD)
            with pytest.raises(grpc.RpcError, match="too many uploads open") as refused:
                stream(iter([head(path, 0)]), timeout=10)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_bundle_begun_anew_without_end(tmp_path: Path) -> None:
    """A party that begins bundle after bundle is stopped, by name; what it has sent of the last one stays."""
    with enclave(tmp_path) as running:
        incoming = running.store.expected(PARTY, "train")
        for number in range(64):
            write(tmp_path / str(number), bytes(100), KEY, chunk_bytes=CHUNK)
            unverified = read_header(tmp_path / str(number))
            incoming.begin(unverified.encoded, unverified.signature)
        with pytest.raises(CapacityError, match="anew 64 times") as refused:
            upload(running.address, sealed(tmp_path, 1000))
        assert refused.value.where == PARTY
        upload(running.address, tmp_path / "63")
        assert sum(1 for _ in running.store.folder.iterdir()) == 1


def test_compressed_messages_are_refused(tmp_path: Path) -> None:
    with enclave(tmp_path) as running, grpc.insecure_channel(running.address) as channel:
        stream: grpc.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(UPLOAD)
        with pytest.raises(grpc.RpcError) as refused:
            stream(iter([bytes(1 << 20)]), timeout=10, compression=grpc.Compression.Gzip)
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_long_metadata_is_refused(tmp_path: Path) -> None:
    with enclave(tmp_path) as running, grpc.insecure_channel(running.address) as channel:
        stream: grpc.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(UPLOAD)
        with pytest.raises(grpc.RpcError) as refused:
            stream(iter([b""]), timeout=10, metadata=[("x", "y" * (32 << 10))])
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_flood_leaves_file_descriptors_to_the_process() -> None:
    """In a process of its own, whose limits are its own."""
    code = """
import resource
from cloister.channel.files import make_room_for_files
from cloister.channel.limits import Limits
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 1000))
print(make_room_for_files(Limits(max_connections=500)).max_connections, *resource.getrlimit(resource.RLIMIT_NOFILE))
print(make_room_for_files(Limits(max_connections=5000)).max_connections, *resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [f"500 {500 + SPARE_FILES} 1000", f"{1000 - SPARE_FILES} 1000 1000"]


class Process:
    """Limits on open files as another process may have them; `refuses` to change them, as seccomp may."""

    def __init__(self, soft: int, hard: int, *, refuses: bool = False) -> None:
        self.limits, self._refuses = (soft, hard), refuses

    def rlimit(self, _: int, limits: tuple[int, int] | None = None) -> tuple[int, int]:
        if limits is not None:
            if self._refuses:
                raise PermissionError
            self.limits = limits
        return self.limits


@pytest.mark.parametrize(
    ("process", "taken", "soft"),
    [
        (Process(64, 1000), 500, 500 + SPARE_FILES),
        (Process(64, 300), 300 - SPARE_FILES, 300),
        (Process(SPARE_FILES, 1000, refuses=True), 1, SPARE_FILES),
        (Process(-1, -1), 500, -1),  # no limit
        (SimpleNamespace(), 500, None),  # a system without such limits
    ],
)
def test_connections_fit_into_the_limits(
    process: Any, taken: int, soft: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.Process", lambda: process)
    assert make_room_for_files(Limits(max_connections=500)).max_connections == taken
    assert soft is None or process.limits[0] == soft


def test_room_for_every_party_of_a_job() -> None:
    limits = Limits.of_job(64, 1024)
    assert limits.max_calls >= limits.max_strangers + 64 * (
        limits.max_sessions_per_party + limits.max_uploads_per_party
    )
    assert limits.max_uploads >= 64
    assert Limits.of_job(2, 9).max_connections == 9


def test_the_timer_runs_while_a_message_is_waited_for() -> None:
    """Also to the end of the stream, which a peer that closes may or may not reach before its call ends."""
    seen: list[float | None] = []
    timer = SimpleNamespace(set=seen.append)
    for message in _timed(iter([b"one", b"two"]), timer, 5.0):  # type: ignore[arg-type]  # all of one that is used
        seen.append(float(len(message)))
    assert seen == [5.0, None, 3.0, 5.0, None, 3.0, 5.0, None]
