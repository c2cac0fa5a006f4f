"""Peers that no enclave wants: run as a program, it bothers HOST:PORT in every way at once until it is told to stop.

python -m tests.net.strangers HOST:PORT CONNECTIONS      prints what it did as JSON, on SIGTERM
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import random
import resource
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable

import grpc

from cloister.channel.grpc_common import OFFSET, SESSION, UPLOAD, common_options

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = bytes(3) + b"\x04" + bytes(5)
"""An empty SETTINGS frame."""
LONG_FRAME = (2**24 - 1).to_bytes(3, "big") + b"\x00\x00" + (1).to_bytes(4, "big")
"""Head of a DATA frame of 16 MiB."""


class Strangers:
    """Everything at once, each kind in a thread of its own."""

    def __init__(self, address: str, connections: int) -> None:
        host, _, port = address.rpartition(":")
        self._address, self._place, self._most = address, (host, int(port)), connections
        self._stop = threading.Event()
        self.done: Counter[str] = Counter()
        kinds = (self._silent, self._one_byte_a_second, self._long_frames, self._garbage, self._silent_calls)
        self._threads = [threading.Thread(target=self._repeat, args=(kind,)) for kind in (*kinds, self._long_messages)]

    def run(self) -> None:
        for thread in self._threads:
            thread.start()
        signal.signal(signal.SIGTERM, lambda *_: self._stop.set())
        self._stop.wait()  # not for the threads: a server under this load may let them wait for minutes

    def _repeat(self, kind: Callable[[], None]) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(OSError, grpc.RpcError):
                kind()
            self._stop.wait(0.05)

    def _dial(self, kind: str) -> socket.socket:
        connection = socket.create_connection(self._place, timeout=5)
        self.done[kind] += 1
        return connection

    def _silent(self) -> None:
        """As many connections as there may be, opened anew when they are closed."""
        held: list[socket.socket] = []
        with contextlib.ExitStack() as opened:
            for _ in range(self._most):
                if self._stop.is_set():
                    return
                held.append(opened.enter_context(self._dial("silent")))
                self.done["silent at once"] = max(len(held), self.done["silent at once"])
            self._stop.wait(2.0)

    def _one_byte_a_second(self) -> None:
        with contextlib.ExitStack() as opened:
            slow = [opened.enter_context(self._dial("slow")) for _ in range(8)]
            for byte in itertools.chain(PREFACE, itertools.repeat(0)):
                if self._stop.wait(1.0):
                    return
                for connection in slow:
                    connection.send(bytes([byte]))

    def _long_frames(self) -> None:
        with self._dial("long frames") as connection:
            connection.sendall(PREFACE + SETTINGS)
            for _ in range(16):
                connection.sendall(LONG_FRAME + bytes(1 << 20))

    def _garbage(self) -> None:
        with self._dial("garbage") as connection:
            connection.sendall(random.randbytes(1 << 16))  # noqa: S311

    def _silent_calls(self) -> None:
        silence: queue.Queue[bytes | None] = queue.Queue()
        with grpc.insecure_channel(self._address, options=common_options()) as channel:
            calls = []
            for method in (SESSION, UPLOAD, OFFSET) * 4:
                stream: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(method)
                calls.append(stream(iter(silence.get, None)))
                self.done["silent calls"] += 1
            self._stop.wait(1.0)
            for call in calls:
                call.cancel()
                silence.put(None)

    def _long_messages(self) -> None:
        with grpc.insecure_channel(self._address, options=[("grpc.max_send_message_length", -1)]) as channel:
            stream: grpc.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(UPLOAD)
            self.done["long messages"] += 1
            stream(iter([bytes(16 << 20)]), timeout=5)


if __name__ == "__main__":
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(files, min(most, 1 << 14)), most))
    strangers = Strangers(sys.argv[1], int(sys.argv[2]))
    strangers.run()
    sys.stdout.write(json.dumps(dict(strangers.done)))
    sys.stdout.flush()
    os._exit(0)  # gRPC's threads have nothing more to say
