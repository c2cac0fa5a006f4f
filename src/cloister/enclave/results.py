"""Results as parties fetch them when training has ended, and their countersignatures under the receipt."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cloister.agreement.receipt import COUNTERSIGN_LABEL, Receipt, countersign_message
from cloister.attest.verify import MAX_CLOCK_SKEW_S
from cloister.crypto.encoding import Fields
from cloister.crypto.keys import verify_signature
from cloister.enclave.intake import Handler
from cloister.errors import ProtocolError, VerificationError

PIECE_BYTES = 8 << 20
"""Most of a file in one message."""
MAX_WAIT_S = 20.0
"""Longest time that one request is held back until there is news."""


@dataclass(kw_only=True)
class Outcome:
    """What training has produced, and who may see it."""

    declared: bytes
    """Metrics that every party may see, JSON."""
    private: Mapping[str, Mapping[str, str]]
    """Per-example scores by owner and system, JSON lines."""
    adapter: Mapping[str, bytes]
    """Files of the adapter, for the job's recipients."""
    receipt: Receipt


def wait_s(fields: Fields) -> float:
    """How long a request may be held back, in seconds."""
    return min(MAX_WAIT_S, fields.integer("wait_ms", low=0, high=3_600_000) / 1000)


class ResultDesk:
    """Hands out one outcome.

    Args:
        parties: public keys by name. recipients: who gets the adapter. news: lock of all state.
    """

    def __init__(self, parties: Mapping[str, bytes], recipients: frozenset[str], news: threading.Condition) -> None:
        self.outcome: Outcome | None = None
        self.on_complete: Callable[[Receipt], None] = lambda receipt: None
        self._parties, self._recipients, self._news = dict(parties), recipients, news
        self.handlers: dict[str, Handler] = {
            "result": self._result,
            "adapter": self._adapter,
            "countersign": self._countersign,
            "receipt": self._receipt,
        }

    def _result(self, party: str, fields: Fields) -> dict[str, Any]:
        fields.end()
        outcome = self._finished(party)
        files = outcome.adapter if party in self._recipients else {}
        return {
            "declared": outcome.declared,
            "scores": dict(outcome.private.get(party, {})),
            "adapter": {name: len(content) for name, content in files.items()},
            "receipt": outcome.receipt.to_bytes(),
        }

    def _adapter(self, party: str, fields: Fields) -> dict[str, Any]:
        """A piece of an adapter file, for recipients; a file may be larger than one message."""
        name = fields.text("name")
        offset = fields.integer("offset", low=0, high=2**62)
        fields.end()
        content = self._finished(party).adapter.get(name) if party in self._recipients else None
        if content is None:
            raise VerificationError("release", "the job does not release this to the party", where=party)
        return {"data": content[offset : offset + PIECE_BYTES]}

    def _countersign(self, party: str, fields: Fields) -> dict[str, Any]:
        at = fields.integer("time", low=0, high=2**40)
        signature = fields.blob("signature", size=64)
        fields.end()
        outcome = self._finished(party)
        # The evidence is appraised at the earliest of these times: one false date would spoil everybody's receipt.
        if at < json.loads(outcome.receipt.body)["ended"] - MAX_CLOCK_SKEW_S:
            hint = "set the party's clock"
            raise ProtocolError("the countersignature is dated before the end of the run", where=party, hint=hint)
        message = countersign_message(outcome.receipt, at)
        verify_signature(self._parties[party], COUNTERSIGN_LABEL, message, signature, where=party)
        with self._news:
            receipt = outcome.receipt.countersigned(party, at, signature)
            if len(receipt.countersignatures) == len(self._parties):
                self.on_complete(receipt)  # before any party hears of it, and leaves
            outcome.receipt = receipt
            self._news.notify_all()
        return {}

    def _receipt(self, party: str, fields: Fields) -> dict[str, Any]:
        """The receipt with everybody's countersignature; after the wait with those that are there."""
        wait = wait_s(fields)
        fields.end()
        outcome = self._finished(party)
        with self._news:
            self._news.wait_for(lambda: len(outcome.receipt.countersignatures) == len(self._parties), wait)
            complete = len(outcome.receipt.countersignatures) == len(self._parties)
            return {"receipt": outcome.receipt.to_bytes(), "complete": complete}

    def _finished(self, party: str) -> Outcome:
        if self.outcome is None:
            raise ProtocolError("the job is not finished", where=party)
        return self.outcome
