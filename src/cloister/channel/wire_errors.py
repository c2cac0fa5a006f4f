"""Errors on the wire: what we tell a peer, and what we believe of what a peer tells us.

A peer's text is never passed on as ours: it is bounded, stripped of control characters and marked as reported. Paths
stay here; an error that is not of our tree becomes "internal".
"""

from __future__ import annotations

import re
from typing import Any

from cloister.crypto.encoding import Fields
from cloister.errors import (
    AdapterError,
    BusyError,
    CapacityError,
    CloisterError,
    DataError,
    JobError,
    ModelError,
    ProtocolError,
    RunError,
    TransportError,
    UsageError,
    VerificationError,
)

MAX_TEXT = 1000

_KINDS: dict[str, type[CloisterError]] = {
    cls.__name__: cls
    for cls in (
        UsageError,
        JobError,
        DataError,
        ModelError,
        AdapterError,
        CapacityError,
        RunError,
        ProtocolError,
        TransportError,
        BusyError,
    )
}
_CODE = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")


def to_wire(exc: BaseException) -> dict[str, str]:
    """What a peer is told: kind, code, message, where, hint."""
    if not isinstance(exc, CloisterError):
        return {"kind": "RunError", "code": "internal", "message": "internal error", "where": "", "hint": ""}
    kind = next((c.__name__ for c in type(exc).__mro__ if c.__name__ in _KINDS), "RunError")
    if isinstance(exc, VerificationError):
        kind = "VerificationError"
    where = "" if "/" in exc.where or "\\" in exc.where else exc.where
    return {
        "kind": kind,
        "code": exc.code,
        "message": exc.message[:MAX_TEXT],
        "where": where[:MAX_TEXT],
        "hint": exc.hint[:MAX_TEXT],
    }


def from_wire(reported: Any, *, peer: str) -> CloisterError:
    """The error that a peer reported, as one of ours that says so.

    Raises: ProtocolError if it is malformed.
    """
    fields = Fields(reported, "error report")
    kind, code = fields.text("kind"), fields.text("code")
    message, where, hint = (_clean(fields.text(n, max_size=MAX_TEXT)) for n in ("message", "where", "hint"))
    fields.end()
    text = f"the {peer} reports: {message}"
    if kind == "VerificationError":
        if not _CODE.fullmatch(code):
            raise ProtocolError("error report: malformed code")
        return VerificationError(code, text, where=where, hint=hint)
    if kind not in _KINDS:
        raise ProtocolError("error report: unknown kind")
    return _KINDS[kind](text, where=where, hint=hint)


def _clean(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)
