"""A party's part in the chain of checkpoints: which instance it follows, from where, and what it signs.

What is decided is in the memory's file before the enclave hears of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from cloister.agreement.checkpoint import (
    CHECKPOINT_LABEL,
    KEPT_LABEL,
    MAX_CERTIFICATE_BYTES,
    MAX_RECORD_BYTES,
    MAX_SEAL_BYTES,
    Certificate,
    Position,
    Seal,
    ShareRecord,
    Start,
    checkpoint_message,
    share_context,
    share_info,
)
from cloister.agreement.history import History
from cloister.agreement.receipt import Receipt
from cloister.attest.verify import MAX_CLOCK_SKEW_S
from cloister.crypto.encoding import Fields
from cloister.crypto.hpke import wrap
from cloister.crypto.keys import PartyKey
from cloister.crypto.sharing import check_share
from cloister.errors import ProtocolError, VerificationError
from cloister.party.memory import Followed, Memory, State, check_memory, check_offer

WAIT_MS = 15_000


class Requests(Protocol):
    """An attested session with the enclave."""

    def request(self, method: str, body: dict[str, Any]) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class Consent:
    """What goes to the instance together with the data keys."""

    start: Start
    share_from: bytes = b""
    """The instance whose sealing key opens the checkpoint; empty at the beginning, or if the share is lost."""
    share: bytes = b""
    """This party's share of that key, wrapped for the new instance."""


@dataclass(frozen=True, kw_only=True)
class Follower:
    """One party and one enclave instance that its policy has accepted, for the manifest that it has checked.

    Args:
        parties: public keys by name. quorum: how many must sign a checkpoint.
        accept: hash of a checkpoint that the user allows to go on from, whatever the memory says.
    """

    job_id: str
    name: str
    key: PartyKey
    parties: Mapping[str, bytes]
    quorum: int
    manifest_sha256: bytes
    instance_id: bytes
    signing_key: bytes
    hpke_key: bytes
    memory: Memory
    accept: bytes | None
    clock: Callable[[], float]

    def consent(self, session: Requests) -> Consent | None:
        """Learn where the instance would go on, check that, and from now on follow this instance alone.

        Returns: what to send, or None if this instance has had it all already.

        Raises:
            VerificationError: "rollback", "memory", "lease", "checkpoint"; nothing has changed then.
        """
        state = self.memory.read()
        fields = Fields(session.request("start", {"certificate": state.certificate}), "start reply")
        encoded = fields.blob("seal", max_size=MAX_SEAL_BYTES)
        certificates = self._certificates(fields.items("certificates", max_items=4096))
        joined = fields.boolean("joined")
        fields.end()
        if joined and state.current == self.instance_id and self.instance_id.hex() in state.shares:
            return None
        seal = Seal.from_bytes(encoded) if encoded else None
        offered = Position(number=0, hash=self.manifest_sha256)
        if seal is not None:
            seal.check(job_id=self.job_id, manifest_sha256=self.manifest_sha256)
            offered = seal.position
        start = self._start(state, offered, seal, certificates)
        share = state.shares.get(seal.instance_id.hex()) if seal is not None else None
        if seal is None or share is None:
            return Consent(start=start)
        return Consent(start=start, share_from=seal.instance_id, share=self._wrap(share, seal.instance_id))

    def _start(self, state: State, offered: Position, seal: Seal | None, certificates: list[Certificate]) -> Start:
        if state.current == self.instance_id:  # the connection was lost before all was sent
            start = Start.from_bytes(state.consent)
            if start.position != offered:
                raise VerificationError("checkpoint", "the enclave now offers another start", where="enclave")
            return start
        authorised = check_offer(
            state, offered, seal, certificates, party=self.name, public_key=self.key.public, accept=self.accept
        )
        start = Start(position=offered, last=state.position, authorised=authorised).signed(
            self.key, job_id=self.job_id, manifest_sha256=self.manifest_sha256, instance_id=self.instance_id
        )
        now = int(self.clock())
        note = f"{now}: {state.position.number} -> {offered.number} {offered.hash.hex()}"
        followed = Followed(id=self.instance_id, signing_key=self.signing_key, since=now)
        self.memory.write(
            replace(
                state,
                instances=(*state.instances, followed),
                position=offered,
                consent=start.to_bytes(),
                certificate=b"" if authorised else state.certificate,
                authorised=(*state.authorised, note) if authorised else state.authorised,
            )
        )
        return start

    def _wrap(self, share: bytes, made_by: bytes) -> bytes:
        info = share_info(
            manifest_sha256=self.manifest_sha256, instance_id=self.instance_id, made_by=made_by, party=self.name
        )
        return wrap(self.hpke_key, share, info)

    def keep_share(self, session: Requests, start: Start) -> None:
        """Wait until all parties have consented, then keep this party's share of the instance's own sealing key.

        Certificates are looked at again: by now every party has shown the newest that it knows.

        Raises:
            VerificationError: "memory", "share", "lease", "signature".
        """
        while True:
            fields = Fields(session.request("share", {"wait_ms": WAIT_MS}), "share reply")
            ready, share = fields.boolean("ready"), fields.blob("share", max_size=256)
            record = ShareRecord.from_bytes(fields.blob("record", max_size=2 * MAX_RECORD_BYTES))
            certificates = self._certificates(fields.items("certificates", max_items=4096))
            fields.end()
            state = self.check()
            if ready:
                break
        self._check_record(record)
        context = share_context(job_id=self.job_id, instance_id=self.instance_id, party=self.name)
        check_share(share, context, record.commitments[self.name], holder="enclave")
        if not start.authorised:
            check_memory(state, certificates, party=self.name, public_key=self.key.public)
        self.memory.write(replace(state, shares={**state.shares, self.instance_id.hex(): share}))
        session.request("kept", {"signature": self.key.sign(KEPT_LABEL, record.sha256)})

    def _check_record(self, record: ShareRecord) -> None:
        record.verify(self.signing_key)
        expected = (self.job_id, self.manifest_sha256, self.instance_id, self.quorum, set(self.parties))
        stated = (record.job_id, record.manifest_sha256, record.instance_id, record.quorum, set(record.commitments))
        if stated != expected:
            raise VerificationError("share", "the sealing key is shared otherwise than the job says", where="enclave")

    def check(self) -> State:
        """What this party remembers, as long as it follows this instance. Raises: VerificationError("lease")."""
        return self.memory.check_followed(self.instance_id)

    @property
    def committed(self) -> int:
        """Number of the newest checkpoint of this instance that this party knows to be signed by a quorum, or 0."""
        certificate = self.memory.read().certified()
        return certificate.seal.number if certificate and certificate.seal.instance_id == self.instance_id else 0

    def sign(self, session: Requests, encoded: bytes) -> None:
        """Note a checkpoint of this instance durably, then sign it; never one that is not further on than the last.

        Raises:
            VerificationError: "checkpoint", "lease".
        """
        seal = Seal.from_bytes(encoded)
        seal.check(job_id=self.job_id, manifest_sha256=self.manifest_sha256)
        seal.verify(self.signing_key)
        state = self.check()
        last = state.position
        again = seal.position == last
        follows = seal.number > last.number + 1 or (seal.number == last.number + 1 and seal.previous == last.hash)
        if seal.instance_id != self.instance_id or not (again or follows):
            raise VerificationError("checkpoint", f"{seal.position} does not follow on {last}", where="enclave")
        if not again:
            self.memory.write(replace(state, position=seal.position))
        signature = self.key.sign(CHECKPOINT_LABEL, checkpoint_message(seal))
        session.request("checkpoint", {"number": seal.number, "signature": signature})

    def note(self, encoded: bytes) -> None:
        """Keep the proof that a quorum has signed a checkpoint; shares that nothing newer needs are dropped.

        Raises:
            VerificationError: "checkpoint", "signature", "lease".
        """
        certificate = self._certificate(encoded)
        state = self.check()
        before = state.certified()
        needed = {self.instance_id.hex(), certificate.seal.instance_id.hex()}
        # The checkpoint before the newest is kept too: the newest may turn out to be damaged.
        needed |= {before.seal.instance_id.hex()} if before else set(state.shares)
        shares = {made_by: share for made_by, share in state.shares.items() if made_by in needed}
        self.memory.write(replace(state, certificate=encoded, shares=shares))

    def check_history(self, receipt: Receipt) -> None:
        """A party vouches for the instances that it has followed and for the checkpoints that it has signed.

        Raises:
            VerificationError: "receipt-history".
        """
        state, history = self.check(), History.of(json.loads(receipt.body))
        known = {followed.id: followed for followed in state.instances}
        for earlier in history.earlier:
            followed = known.get(earlier.id)
            if followed is None and state.authorised:  # its memory was lost, and its user allowed to go on
                continue
            if followed is None or followed.signing_key != earlier.signing_key:
                raise VerificationError("receipt-history", "an instance is listed that this party never followed")
            if not followed.since - MAX_CLOCK_SKEW_S <= earlier.time <= self.clock() + MAX_CLOCK_SKEW_S:
                raise VerificationError("receipt-history", "an earlier instance began at another time than stated")
        if state.position.hash not in {self.manifest_sha256, *(seal.hash for seal, _ in history.chain)}:
            raise VerificationError("receipt-history", f"the receipt does not know {state.position}")

    def _certificates(self, encoded: list[object]) -> list[Certificate]:
        if not all(isinstance(each, bytes) for each in encoded):
            raise ProtocolError("a checkpoint certificate is not bytes", where="enclave")
        return [self._certificate(each) for each in encoded if isinstance(each, bytes)]

    def _certificate(self, encoded: bytes) -> Certificate:
        if len(encoded) > MAX_CERTIFICATE_BYTES:
            raise ProtocolError("a checkpoint certificate is too long", where="enclave")
        certificate = Certificate.from_bytes(encoded)
        certificate.verify(self.parties, job_id=self.job_id, manifest_sha256=self.manifest_sha256, quorum=self.quorum)
        return certificate
