"""Collecting TDX quotes inside a dstack confidential VM, whose guest agent keeps the quote device to itself.

The agent answers on a Unix socket that the compose file mounts into the container; `dstack-sdk` speaks to it. What it
gives is a TDX quote like any other, with the event log of what was measured into the runtime registers.

Source: dstack-sdk 0.5 for Python (`DstackClient.get_quote`).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from cloister.attest.backends import dcap_quote
from cloister.attest.evidence import REPORT_DATA_BYTES, Evidence
from cloister.errors import RunError, UsageError, VerificationError

TYPE = "tdx"
SOCKETS = ("var/run/dstack.sock", "run/dstack.sock", "var/run/dstack/dstack.sock", "run/dstack/dstack.sock")
"""Where dstack puts its socket, in the order in which its SDK looks."""

_TIMEOUT_S = 10
_REPORT_DATA = slice(520, 584)  # in a TD report of any version


class DstackAttester:
    """Attests the dstack VM that this process runs in."""

    type = TYPE

    def __init__(
        self, root: Path = Path("/"), *, collateral: bytes = b"", connect: Callable[[str], Any] | None = None
    ) -> None:
        """Args:
        root: where the socket lies (tests).
        collateral: Intel's, fetched beforehand; without, whoever verifies must have it.
        connect: makes a client of the SDK for a socket (tests).
        """
        self._root = root
        self._collateral = collateral
        self._connect = connect

    @classmethod
    def found(cls, root: Path = Path("/")) -> str | None:
        """The socket, if there is one; see `attest.attester.Backend`."""
        present = (root / name for name in SOCKETS)
        return next((str(path) for path in present if path.exists()), None)

    def collect(self, report_data: bytes) -> Evidence:
        """See `attest.attester.Attester`.

        Raises: UsageError if dstack-sdk is missing; RunError if the agent cannot be reached or gives something else
            than our quote.
        """
        if len(report_data) != REPORT_DATA_BYTES:
            raise ValueError(f"report data has {REPORT_DATA_BYTES} bytes")
        socket = self.found(self._root)
        if socket is None:
            hint = "mount /var/run/dstack.sock into the container (see deploy/)"
            raise RunError("no socket of dstack's guest agent", where=str(self._root / SOCKETS[0]), hint=hint)
        quote, event_log = _ask(self._connect or _client, socket, report_data)
        _check(quote, report_data, socket)
        try:
            return Evidence(type=TYPE, blob=quote, collateral=self._collateral, event_log=event_log)
        except ValueError as exc:
            raise RunError(f"the guest agent's answer is too long: {exc}", where=socket) from exc


def _client(socket: str) -> Any:  # Any: the SDK is an optional package
    try:
        sdk = import_module("dstack_sdk")
    except ModuleNotFoundError as exc:
        hint = "pip install 'cloister[dstack]'"
        raise UsageError("dstack needs the package dstack-sdk", where=socket, hint=hint) from exc
    return sdk.DstackClient(socket, timeout=_TIMEOUT_S)


def _ask(connect: Callable[[str], Any], socket: str, report_data: bytes) -> tuple[bytes, bytes]:
    """Quote and event log (JSON)."""
    faults: tuple[type[Exception], ...] = (OSError, ValueError, *_transport_errors())
    try:
        answer = connect(socket).get_quote(report_data)
        return bytes.fromhex(answer.quote), str(answer.event_log).encode()
    except faults as exc:
        raise RunError(f"dstack's guest agent gave no quote: {exc}", where=socket) from exc


def _transport_errors() -> tuple[type[Exception], ...]:
    """What the SDK's own HTTP library raises, where it is installed."""
    try:
        return (import_module("httpx").HTTPError,)
    except ModuleNotFoundError:
        return ()


def _check(quote: bytes, report_data: bytes, socket: str) -> None:
    """The socket is shared: better told here than refused by every party."""
    try:
        parsed = dcap_quote.parse(quote)
    except VerificationError as exc:
        raise RunError(f"dstack's guest agent gave no TDX quote: {exc}", where=socket) from exc
    if parsed.tee != TYPE or parsed.body[_REPORT_DATA] != report_data:
        raise RunError("the quote is not for our report data", where=socket)
