"""Collecting AWS Nitro documents: one request to the Nitro security module through /dev/nsm.

Source: Linux, include/uapi/linux/nsm.h (the request and its limits); AWS, aws-nitro-enclaves-nsm-api, src/api/mod.rs
(the CBOR inside).
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cloister.attest.backends import nitro_document
from cloister.attest.evidence import REPORT_DATA_BYTES, Evidence
from cloister.crypto.encoding import encode
from cloister.errors import ProtocolError, RunError, VerificationError

TYPE = "nitro"
DEVICE = "dev/nsm"

MAX_REQUEST_BYTES = 0x1000
MAX_RESPONSE_BYTES = 0x3000
# _IOWR(NSM_MAGIC, 0, struct nsm_raw): read and write, 32 bytes, magic number 0x0A.
NSM_IOCTL_RAW = (3 << 30) | (32 << 16) | (0x0A << 8)

Exchange = Callable[[Path, bytes], bytes]
"""Sends a request to the device and returns its answer; both are CBOR. Raises: OSError."""


class _Buffer(ctypes.Structure):
    """struct nsm_iovec"""

    _fields_ = (("address", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Raw(ctypes.Structure):
    """struct nsm_raw"""

    _fields_ = (("request", _Buffer), ("response", _Buffer))


def exchange_with_device(device: Path, request: bytes) -> bytes:
    """Ask the module. Raises: OSError."""
    if len(request) > MAX_REQUEST_BYTES:
        raise ValueError(f"a request has at most {MAX_REQUEST_BYTES} bytes")
    sent = ctypes.create_string_buffer(request, len(request))
    answer = ctypes.create_string_buffer(MAX_RESPONSE_BYTES)
    raw = _Raw(
        request=_Buffer(ctypes.addressof(sent), len(request)),
        response=_Buffer(ctypes.addressof(answer), MAX_RESPONSE_BYTES),
    )
    descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, NSM_IOCTL_RAW, raw)
    finally:
        os.close(descriptor)
    return answer.raw[: raw.response.length]


class NitroAttester:
    """Attests the Nitro enclave that this process runs in."""

    type = TYPE

    def __init__(self, root: Path = Path("/"), *, exchange: Exchange = exchange_with_device) -> None:
        """Args: root: where /dev lies. exchange: how to reach the module (both for tests)."""
        self._device = root / DEVICE
        self._exchange = exchange

    @classmethod
    def found(cls, root: Path = Path("/")) -> str | None:
        """The device, if there is one; see `attest.attester.Backend`."""
        device = root / DEVICE
        return str(device) if device.exists() else None

    def collect(self, report_data: bytes) -> Evidence:
        """See `attest.attester.Attester`.

        Raises: RunError if the module cannot be used or answers with something else than a document for us.
        """
        if len(report_data) != REPORT_DATA_BYTES:
            raise ValueError(f"report data has {REPORT_DATA_BYTES} bytes")
        request = encode({"Attestation": {"user_data": report_data, "nonce": None, "public_key": None}})
        try:
            answer = self._exchange(self._device, request)
        except OSError as exc:
            hint = "run inside a Nitro enclave, as root"
            raise RunError(f"cannot be used: {exc.strerror}", where=str(self._device), hint=hint) from exc
        blob = self._document(answer)
        self._check(blob, report_data)
        return Evidence(type=TYPE, blob=blob)

    def _document(self, answer: bytes) -> bytes:
        try:
            table = nitro_document.decode(answer)
        except ProtocolError as exc:
            raise self._useless(f"malformed: {exc}") from exc
        content = table.get("Attestation") if isinstance(table, dict) else None
        document = content.get("document") if isinstance(content, dict) else None
        if type(document) is not bytes:
            raise self._useless(f"no document: {_error(table)}")
        return document

    def _check(self, blob: bytes, report_data: bytes) -> None:
        """Better told here, where it happens, than refused by every party."""
        try:
            document = nitro_document.parse(blob)
        except VerificationError as exc:
            raise self._useless(str(exc)) from exc
        if document.user_data != report_data:
            raise self._useless("the document is not for our report data")

    def _useless(self, what: str) -> RunError:
        return RunError(f"the Nitro security module answered with something unusable: {what}", where=str(self._device))


def _error(table: Any) -> str:
    """The module's own word for a failure."""
    word = table.get("Error") if isinstance(table, dict) else None
    return word if isinstance(word, str) and len(word) <= 64 else "unknown"
