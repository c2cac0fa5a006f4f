"""Method `slice` at the server: parties' enclaves commit to their data, work on rounds, and deliver updates."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cloister.agreement.job import OpenJob
from cloister.agreement.party_enclaves import MAX_SESSIONS, PartyEnclave
from cloister.channel.handshake import Peer
from cloister.crypto.bundle import IncomingStore
from cloister.crypto.encoding import Fields
from cloister.enclave.core import EnclaveCore
from cloister.enclave.federate import Federation, first_state
from cloister.enclave.intake import CommitmentIntake, Handler, Intake
from cloister.enclave.results import Outcome
from cloister.enclave.rounds import RoundBoard
from cloister.errors import ProtocolError
from cloister.progress import Progress, task


class SliceService:
    """See `server.Service`."""

    parties_have_enclaves = True

    def __init__(self, opened: OpenJob, out: Path, *, insecure_simulated: bool) -> None:
        self._opened = opened
        bundles = out / "bundles"
        bundles.mkdir(parents=True, exist_ok=True)
        # Nobody may send bundles: data stay with the parties.
        self.incoming = IncomingStore(
            bundles, job_id=opened.resolved.job_id, public_keys={}, chunk_bytes=0, max_payload_bytes=0
        )
        self._commitments = CommitmentIntake(opened.kinds, allow_insecure=insecure_simulated)
        self.intake: Intake = self._commitments
        self._board = RoundBoard(tuple(opened.parties))
        self.handlers: Mapping[str, Handler] = {"commit": self._commitments.commit, **self._board.handlers}
        self._party_enclaves: dict[str, list[PartyEnclave]] = {party: [] for party in opened.parties}
        self._lock = threading.Lock()
        self._federation: Federation | None = None

    def met(self, peer: Peer, method: str) -> None:
        """Keep the evidence of the sessions in which something was delivered, for the receipt."""
        if method != "deliver":
            return
        with self._lock:
            known = self._party_enclaves[peer.party]
            if not any(entry.bound_to == peer.bound_to for entry in known):
                known.append(PartyEnclave(evidence=peer.evidence, bound_to=peer.bound_to, time=int(time.time())))
                del known[:-MAX_SESSIONS]

    def prepare(self, progress: Progress) -> None:
        with task(progress, "first state of the adapter"):
            self._federation = first_state(self._opened.resolved)

    def work(self, core: EnclaveCore, progress: Progress) -> Outcome:
        if self._federation is None:
            raise RuntimeError("work begins before it was prepared")
        return self._federation.run(core, self._board, self._commitments.facts(), self._entries, progress)

    def _entries(self, earlier: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
        """The parties' enclaves so far, those that an earlier instance has met first."""
        with self._lock:
            return {
                party: (earlier.get(party, []) + [entry.to_dict() for entry in own])[-MAX_SESSIONS:]
                for party, own in self._party_enclaves.items()
            }

    def query(self, party: str, method: str, fields: Fields) -> dict[str, Any]:
        """Raises: ProtocolError: the tuned model is in the parties' enclaves, not here."""
        hint = "the party's own enclave answers while it runs"
        raise ProtocolError('with method "slice" the server answers no queries', where=party, hint=hint)
