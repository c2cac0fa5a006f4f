"""Clients of a serving enclave and of an accelerator, of which few behave."""

from __future__ import annotations

import json
import os
import random as random_module
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import grpc

from cloister.channel.grpc_common import SESSION, common_options
from tests.crash.deployment import Deployment
from tests.crash.forking import Forked, in_child

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9)


class Clients:
    """Seeded clients of one enclave.

    Args:
        address: HOST:PORT of the enclave. accelerator: path of an accelerator's socket. folder: for their logs.
    """

    def __init__(self, deployment: Deployment, address: str, accelerator: str, folder: Path, random: Random) -> None:
        self._deployment, self._address, self._accelerator = deployment, address, accelerator
        self._folder, self._random, self._count = folder, random, 0
        self._kinds: dict[str, tuple[int, Callable[[], None]]] = {
            "query": (4, self.query),
            "query killed": (2, self.query_killed),
            "bytes": (3, self.send_bytes),
            "half a handshake": (3, self.half_a_handshake),
            "garbage session": (2, self.garbage_session),
            "accelerator bytes": (3, self.accelerator_bytes),
        }
        """By name: weight among all, and what is done."""

    def draw(self) -> tuple[str, Callable[[], None]]:
        """What is to be done next, with its name."""
        weights = [weight for weight, _ in self._kinds.values()]
        name = self._random.choices(list(self._kinds), weights)[0]
        return name, self._kinds[name][1]

    def query(self) -> None:
        """Ask and get an answer. Raises: RuntimeError: there is none."""
        command = self._generate()
        code = command.wait(600.0)
        if code != 0:
            command.kill()
            raise RuntimeError(f"a query ended with {code}: {command.stdout}{command.stderr[-500:]}")
        if not json.loads(command.stdout)["answers"][0]["token_ids"]:
            raise RuntimeError(f"a query got no token: {command.stdout}")

    def query_killed(self) -> None:
        command = self._generate()
        command.wait(self._random.uniform(0.05, 1.5))
        command.kill()

    def send_bytes(self) -> None:
        """A stranger's bytes, then silence, an end, or a reset."""
        self._bytes(socket.AF_INET, self._tcp)

    def accelerator_bytes(self) -> None:
        self._bytes(socket.AF_UNIX, self._accelerator)

    def half_a_handshake(self) -> None:
        """HTTP/2 begins, and nothing follows."""
        with socket.create_connection(self._tcp, timeout=5.0) as link:
            link.sendall(_PREFACE[: self._random.randrange(1, len(_PREFACE) + 1)])
            time.sleep(self._random.uniform(0.0, 0.3))

    def garbage_session(self) -> None:
        """gRPC that is sound, with a hello that is not; cut at some moment. In a fork: gRPC starts threads."""
        seed = self._random.random()
        in_child(lambda: _garbage_session(self._address, Random(seed)))  # noqa: S311

    @property
    def _tcp(self) -> tuple[str, int]:
        host, _, port = self._address.rpartition(":")
        return host, int(port)

    def _bytes(self, family: int, address: object) -> None:
        with socket.socket(family, socket.SOCK_STREAM) as link:
            link.settimeout(5.0)
            link.connect(address)  # type: ignore[arg-type]  # fits the family
            try:
                link.sendall(self._random.randbytes(self._random.choice([1, 100, 10_000])))
                time.sleep(self._random.uniform(0.0, 0.2))
            except OSError:  # refused already
                return
            if self._random.random() < 0.5 and family == socket.AF_INET:
                link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, no end

    def _generate(self) -> Forked:
        party = self._random.choice(self._deployment.parties)
        self._count += 1
        call: list[object] = ["generate", self._deployment.job, "--party", party, "--key", self._deployment.key(party)]
        call += ["--enclave", self._address, "--prompt", f"{party} test: what is 1?", "--max-new-tokens", "6"]
        return Forked([*call, "--insecure-simulated", "--json"], self._folder / str(self._count))


def _garbage_session(address: str, random: random_module.Random) -> None:
    """Raises nothing: whatever the enclave answers is right as long as it goes on."""
    with grpc.insecure_channel(address, options=common_options()) as channel:
        session = channel.stream_stream(SESSION)
        pieces = [random.randbytes(random.choice([0, 10, 2000])) for _ in range(random.randint(1, 4))]
        try:
            for _ in session(iter(pieces), timeout=random.uniform(0.05, 2.0)):
                break
        except grpc.RpcError:
            pass
    os._exit(0)
