"""The processes of one enclave as a group of `torch.distributed`: how they meet, and that nobody else meets them.

They find each other by a file in a folder that only this user may enter. gloo, which has no transport without TCP, then
connects each pair over the loopback interface; for that every process listens on a port of the kernel's choice, and
goes on listening for as long as the group lives. Once all are connected these ports are made deaf: a filter of the
kernel drops every packet that asks for a connection. The loopback interface of a TEE is inside the TEE.
"""

from __future__ import annotations

import ctypes
import datetime as dt
import os
import socket
import struct
from pathlib import Path

import torch
import torch.distributed as dist

from cloister.errors import RunError
from cloister.training.team import Joined, LostProcessError

STORE = "store"
TIMEOUT_S = 1800.0
"""How long a process waits for another one that lives but does not answer; one that has ended is noticed at once."""

LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
"""Environment of every process of a group: read by gloo and NCCL when they are started."""

_SO_ATTACH_FILTER = 26  # Linux, asm-generic/socket.h
_RETURN_ZERO_BYTES = struct.pack("HBBI", 0x06, 0, 0, 0)
"""A classic BPF program of one instruction, BPF_RET | BPF_K with 0: keep nothing of any packet (linux/filter.h)."""


def join(folder: Path, dist_rank: int, count: int, device: torch.device, *, even: bool) -> Joined:
    """Become process `dist_rank` of `count`; returns when all have met.

    Args:
        folder: The private folder, the same for all. even: see `Joined`.

    Raises:
        LostProcessError: they did not all come. RunError: the port cannot be closed.
    """
    os.environ.update(LOOPBACK)
    before = _listening()
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=dist.FileStore(str(folder / STORE), count),  # type: ignore[attr-defined]  # torch names no exports
            rank=dist_rank,
            world_size=count,
            timeout=dt.timedelta(seconds=TIMEOUT_S),
        )
        dist.barrier()
    except RuntimeError as exc:
        message = f"the processes cannot meet: {exc}".splitlines()[0]
        raise LostProcessError(message, where="[enclave] processes") from exc
    for descriptor in _listening() - before:
        _deafen(descriptor)
    return Joined(device, even=even)


def leave() -> None:
    """Close the connections; without a group nothing happens."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _listening() -> set[int]:
    """Descriptors of this process's listening sockets. The image's service sees nothing of /proc/net."""
    found = set()
    for place in list(Path("/proc/self/fd").iterdir()):
        descriptor = int(place.name)
        try:
            with socket.socket(fileno=os.dup(descriptor)) as open_socket:
                if open_socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    found.add(descriptor)
        except OSError:  # it is no socket, or closed since it was listed
            continue
    return found


def _deafen(descriptor: int) -> None:
    """Let a listening socket take no further connection. It cannot be closed: gloo ends the process if it is."""
    program = ctypes.create_string_buffer(_RETURN_ZERO_BYTES)
    described = struct.pack("HP", 1, ctypes.addressof(program))
    try:
        with socket.socket(fileno=os.dup(descriptor)) as listening:
            listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, described)
    except OSError as exc:
        message = f"the port between the processes cannot be closed: {exc.strerror}"
        raise RunError(message, where="[enclave] processes", hint="take processes = 1 on this kernel") from exc
