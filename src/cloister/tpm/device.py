"""Carrying TPM commands: bytes in, bytes out. A device speaks to one TPM; whoever opens it closes it.

Addresses: "/dev/tpmrm0" (or any path: Linux's device with its resource manager), "swtpm:/path/to/socket" and
"swtpm:HOST:PORT" (the command channel of a software TPM, which protects nothing).
"""

from __future__ import annotations

import os
import socket
from typing import Protocol

from cloister.errors import ProtocolError, TransportError, UsageError

DEFAULT = "/dev/tpmrm0"
MAX_RESPONSE_BYTES = 4096
"""Longest response of TPMs that Linux supports (TPM_BUFSIZE)."""
TIMEOUT_S = 60.0
"""Slow chips need seconds to make an RSA key."""

_SOFTWARE = "swtpm:"
_HEADER_BYTES = 10


class Device(Protocol):
    """A way to one TPM."""

    address: str

    def transmit(self, command: bytes) -> bytes:
        """Send one command and return its whole response. Raises: TransportError, ProtocolError."""

    def close(self) -> None:
        """Give the device back. Closing twice is allowed."""


def open_device(address: str = DEFAULT) -> Device:
    """Open a TPM by its address (see above).

    Raises: UsageError if the address names nothing that can be opened, TransportError if nobody answers there.
    """
    if address.startswith(_SOFTWARE):
        return SocketDevice(address)
    return FileDevice(address)


def is_software(address: str) -> bool:
    """Whether the address is that of a software TPM."""
    return address.startswith(_SOFTWARE)


class FileDevice:
    """A character device: a write is a command, the read after it the response."""

    def __init__(self, path: str) -> None:
        self.address = path
        try:
            self._file = os.open(path, os.O_RDWR)
        except OSError as exc:
            hint = "is there a TPM, and may this user open it (on Debian: group tss)?"
            raise UsageError(f"cannot open the TPM: {exc.strerror}", where=path, hint=hint) from exc

    def transmit(self, command: bytes) -> bytes:
        """See `Device`."""
        try:
            os.write(self._file, command)
            return os.read(self._file, MAX_RESPONSE_BYTES)
        except OSError as exc:
            raise TransportError(f"the TPM does not answer: {exc.strerror}", where=self.address) from exc

    def close(self) -> None:
        """See `Device`."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class SocketDevice:
    """The command channel of swtpm: commands and responses one after the other, each with its length in its header."""

    def __init__(self, address: str) -> None:
        self.address = address
        try:
            self._socket = _connect(address.removeprefix(_SOFTWARE))
        except OSError as exc:
            hint = "start it: swtpm socket --tpm2 --server type=unixio,path=... --flags not-need-init,startup-clear"
            raise TransportError(f"no software TPM answers: {exc.strerror or exc}", where=address, hint=hint) from exc

    def transmit(self, command: bytes) -> bytes:
        """See `Device`."""
        try:
            self._socket.sendall(command)
            header = self._receive(_HEADER_BYTES)
            size = int.from_bytes(header[2:6], "big")
            if not _HEADER_BYTES <= size <= MAX_RESPONSE_BYTES:
                raise ProtocolError(f"the TPM announces a response of {size} bytes", where=self.address)
            return header + self._receive(size - _HEADER_BYTES)
        except OSError as exc:
            raise TransportError(f"the TPM does not answer: {exc.strerror or exc}", where=self.address) from exc

    def _receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self._socket.recv(size - len(data))
            if not piece:
                raise TransportError("the TPM closed the connection", where=self.address)
            data += piece
        return data

    def close(self) -> None:
        """See `Device`."""
        self._socket.close()


def _connect(place: str) -> socket.socket:
    """To a Unix socket if `place` is a path, else to HOST:PORT. Raises: OSError, UsageError."""
    if "/" in place:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(TIMEOUT_S)
        try:
            connection.connect(place)
        except OSError:
            connection.close()
            raise
        return connection
    host, _, port = place.rpartition(":")
    if not host or not port.isdecimal():
        hint = 'write "/dev/tpmrm0", "swtpm:/path/to/socket" or "swtpm:127.0.0.1:2321"'
        raise UsageError("this is not the address of a TPM", where=_SOFTWARE + place, hint=hint)
    return socket.create_connection((host, int(port)), timeout=TIMEOUT_S)
