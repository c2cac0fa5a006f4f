"""A bad network for tests: hosts in namespaces of their own, and between them a switch that loses and delays packets.

Linux's netem would do the same, but it is a module that many kernels lack, and its losses cannot be repeated. Here each
host has a TUN device, and one thread carries IP packets between them as each host's `Link` says. TCP above it is the
kernel's own, so retransmission, windows and time-outs are real ones.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import itertools
import os
import random
import select
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000
_DEVICE, _MTU = "net0", 1500
_numbers = itertools.count()


@dataclass
class Link:
    """What happens to packets of one host, in both directions. May be changed while packets flow."""

    delay_s: float = 0.0
    jitter_s: float = 0.0
    """Added at random, without ever changing the order."""
    loss: float = 0.0
    """Share of packets that vanish."""
    reorder: float = 0.0
    """Share of packets that overtake those which wait for their delay."""
    bytes_per_s: float | None = None
    queue_s: float = 0.3
    """With a rate: packets that would wait longer vanish, as at the full queue of a router."""
    cut: bool = False
    """Nothing passes, and nobody is told."""


@dataclass
class Host:
    """One namespace. `carried` counts packets and `dropped` those that vanished, of this host's link."""

    name: str
    namespace: str
    address: str
    link: Link
    descriptor: int
    carried: int = 0
    dropped: int = 0
    carried_bytes: int = 0

    @property
    def inside(self) -> list[str]:
        """What to put before a command to run it in this host."""
        return ["ip", "netns", "exec", self.namespace]


class Schedule:
    """When each packet arrives, if it does. All that is kept is kept by direction: what one way waits for must not hold
    up the other, or round trips grow without bound."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311  # losses are to be repeatable, not secret
        self._free_at: dict[tuple[str, str], float] = {}  # of a link: when it has sent what it has taken
        self._last_due: dict[tuple[str, str], float] = {}  # from one host to another: jitter keeps the order

    def due(self, source: Host, target: Host, now: float, size: int) -> float | None:
        """When a packet of `size` bytes, sent `now`, arrives; None if it is lost, which that link's host counts."""
        overtakes = False
        for host, way in ((source, "out"), (target, "in")):
            sent = self._pass(host, way, now, size)
            if sent is None:
                host.dropped += 1
                return None
            host.carried += 1
            host.carried_bytes += size
            now = sent
            if self._random.random() < host.link.reorder:
                overtakes = True
            else:
                now += host.link.delay_s + host.link.jitter_s * self._random.random()
        if not overtakes:
            pair = (source.name, target.name)
            now = self._last_due[pair] = max(now, self._last_due.get(pair, now))
        return now

    def _pass(self, host: Host, way: str, now: float, size: int) -> float | None:
        """When a host's link has sent a packet, before its delay; None if the packet is lost."""
        link = host.link
        if link.cut or self._random.random() < link.loss:
            return None
        if link.bytes_per_s is None:
            return now
        begins = max(now, self._free_at.get((host.name, way), now))
        if begins - now > link.queue_s:
            return None
        ends = self._free_at[host.name, way] = begins + size / link.bytes_per_s
        return ends


class Switch:
    """Carries packets between hosts, in one thread."""

    def __init__(self, hosts: list[Host], seed: int) -> None:
        self._by_address = {bytes(map(int, host.address.split("."))): host for host in hosts}
        self._by_descriptor = {host.descriptor: host for host in hosts}
        self._schedule = Schedule(seed)
        self._waiting: list[tuple[float, int, int, bytes]] = []
        self._count = itertools.count()
        self._wake_read, self._wake_write = os.pipe()
        self._thread = threading.Thread(target=self._run, name="switch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        os.write(self._wake_write, b"x")
        self._thread.join()
        for descriptor in (*self._by_descriptor, self._wake_read, self._wake_write):
            os.close(descriptor)

    def _run(self) -> None:
        poll = select.poll()
        for descriptor in (*self._by_descriptor, self._wake_read):
            poll.register(descriptor, select.POLLIN)
        while True:
            now = time.monotonic()
            while self._waiting and self._waiting[0][0] <= now:
                _, _, descriptor, packet = heapq.heappop(self._waiting)
                os.write(descriptor, packet)
            timeout_ms = max(0.0, (self._waiting[0][0] - now) * 1000) if self._waiting else None
            for descriptor, _ in poll.poll(timeout_ms):
                if descriptor == self._wake_read:
                    return
                self._take(self._by_descriptor[descriptor], os.read(descriptor, 1 << 16))

    def _take(self, source: Host, packet: bytes) -> None:
        target = self._by_address.get(packet[16:20])
        if packet[0] >> 4 != 4 or target is None:
            return
        due = self._schedule.due(source, target, time.monotonic(), len(packet))
        if due is not None:
            heapq.heappush(self._waiting, (due, next(self._count), target.descriptor, packet))


@contextmanager
def network(names: list[str], seed: int = 0) -> Iterator[dict[str, Host]]:
    """Hosts by name, connected with each other. The test is skipped where namespaces are not permitted."""
    require_namespaces()
    hosts: list[Host] = []
    switch = None
    try:
        for number, name in enumerate(names, 1):
            namespace = f"cloister-{os.getpid()}-{next(_numbers)}"
            _ip("netns", "add", namespace)
            hosts.append(Host(name, namespace, f"10.77.0.{number}", Link(), -1))
            hosts[-1].descriptor = _tun(namespace)
            _ip("-n", namespace, "link", "set", "lo", "up")
            _ip("-n", namespace, "address", "add", f"{hosts[-1].address}/24", "dev", _DEVICE)
            _ip("-n", namespace, "link", "set", _DEVICE, "up", "mtu", str(_MTU))
        switch = Switch(hosts, seed)
        yield {host.name: host for host in hosts}
    finally:
        if switch is not None:
            switch.stop()
        for host in hosts:
            _ip("netns", "delete", host.namespace)


def require_namespaces() -> None:
    """Skip the test, and say why, where there can be no network of our own."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root: sudo make test-net")
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need iproute2: apt install iproute2")
    if not Path("/dev/net/tun").exists():
        pytest.skip("a network of our own needs /dev/net/tun: modprobe tun")
    name = f"cloister-{os.getpid()}-probe"
    probe = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        pytest.skip(f"network namespaces are not permitted here: {probe.stderr.strip()}")
    _ip("netns", "delete", name)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def _tun(namespace: str) -> int:
    """A TUN device in a namespace; returns the descriptor that its packets go through."""
    made: list[int | OSError] = []

    def make() -> None:  # in a thread of its own: it stays in that namespace
        try:
            with Path(f"/run/netns/{namespace}").open() as file:
                libc = ctypes.CDLL(None, use_errno=True)
                if libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), "setns")
            descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
            fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", _DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
            made.append(descriptor)
        except OSError as exc:
            made.append(exc)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if isinstance(made[0], OSError):
        pytest.skip(f"a TUN device cannot be made here: {made[0]}")
    return made[0]
