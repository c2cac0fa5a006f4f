"""An enclave instance's place in the chain of checkpoints: what it goes on from, what it adds, who has signed.

Restoring takes the consent of every party and the shares of a quorum; adding takes nothing, but a checkpoint counts
only once a quorum has signed. The sealing key of the instance is drawn here and leaves this object as shares only.
Every method takes the lock given, which is the core's.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cloister.agreement.checkpoint import (
    CHECKPOINT_LABEL,
    KEPT_LABEL,
    Certificate,
    Position,
    Seal,
    ShareRecord,
    Start,
    checkpoint_message,
    share_context,
)
from cloister.crypto.encoding import Fields, decode, encode
from cloister.crypto.keys import PartyKey, verify_signature
from cloister.crypto.sealing import SALT_BYTES, SealingKey
from cloister.crypto.sharing import check_share, commitment
from cloister.enclave.checkpoints import CheckpointFolder, Stored
from cloister.errors import ProtocolError, VerificationError

_MAX_META_BYTES, _MAX_META_ITEMS = 1 << 30, 1 << 24
_LENGTH_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class InstanceEntry:
    """A former instance as the receipt shows it; its evidence is bound to `agreement.checkpoint.lineage_nonce`."""

    id: bytes
    signing_key: bytes
    hpke_key: bytes
    evidence: bytes
    time: int
    """Seconds since 1970, when the evidence was made: all parties had attested it by then."""

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in InstanceEntry.__dataclass_fields__}


@dataclass(kw_only=True)
class History:
    """How training came to where it is. It travels sealed inside each checkpoint."""

    chain: list[tuple[Seal, dict[str, bytes]]] = field(default_factory=list)
    """Every checkpoint with its signatures, oldest first."""
    instances: list[InstanceEntry] = field(default_factory=list)
    starts: list[dict[str, bytes]] = field(default_factory=list)
    """For each instance, the encoded consent (`Start`) of each party."""

    def to_value(self) -> dict[str, Any]:
        return {
            "chain": [{"seal": seal.to_bytes(), "signatures": dict(signed)} for seal, signed in self.chain],
            "instances": [entry.to_dict() for entry in self.instances],
            "starts": [dict(start) for start in self.starts],
        }

    @classmethod
    def from_value(cls, value: Mapping[str, Any]) -> History:
        return cls(
            chain=[(Seal.from_bytes(link["seal"]), dict(link["signatures"])) for link in value["chain"]],
            instances=[InstanceEntry(**entry) for entry in value["instances"]],
            starts=[dict(start) for start in value["starts"]],
        )


class Lineage:
    """See the module.

    Args:
        parties: public keys by name. quorum: how many must sign, and how many shares open a checkpoint.
        news: lock of all state, notified when there is something for the parties.

    Raises:
        VerificationError: the folder's newest checkpoint is of another job.
    """

    def __init__(
        self,
        *,
        job_id: str,
        parties: Mapping[str, bytes],
        quorum: int,
        instance_id: bytes,
        signing_key: PartyKey,
        folder: CheckpointFolder,
        news: threading.Condition,
    ) -> None:
        self.history = History()
        self.committed: Certificate | None = None
        """The newest checkpoint of this instance that a quorum has signed."""
        self._job_id, self._parties, self._quorum = job_id, dict(parties), quorum
        self._instance_id, self._signing_key = instance_id, signing_key
        self._folder, self._news = folder, news
        self._key = SealingKey.generate()
        self._own_shares = dict(zip(parties, self._key.shares(quorum=quorum, count=len(parties)), strict=True))
        self._manifest_sha256 = b""
        self._record: ShareRecord | None = None
        self._stored: Stored | None = folder.newest()
        if self._stored is not None and self._stored.seal.job_id != job_id:
            message, hint = "the folder holds a checkpoint of another job", "choose another --out"
            raise VerificationError("checkpoint", message, where=str(folder.folder), hint=hint)
        self._certificates: dict[bytes, Certificate] = {}
        self._starts: dict[str, Start] = {}
        self._shares: dict[str, bytes] = {}
        self._kept: set[str] = set()

    # Before training ------------------------------------------------------------------------------------------------

    def begin(self, manifest_sha256: bytes) -> None:
        """Take up the chain for this manifest.

        Raises:
            VerificationError: "checkpoint": the one on disk is of another manifest.
        """
        if self._stored is not None:
            self._stored.seal.check(job_id=self._job_id, manifest_sha256=manifest_sha256)
        self._manifest_sha256 = manifest_sha256
        self._record = ShareRecord(
            job_id=self._job_id,
            manifest_sha256=manifest_sha256,
            instance_id=self._instance_id,
            quorum=self._quorum,
            commitments={p: commitment(share, self._context(p)) for p, share in self._own_shares.items()},
        ).signed(self._signing_key)
        for certificate in self._folder.certificates():
            self._note(certificate, strict=False)

    @property
    def offered(self) -> Position:
        """What this instance goes on from, if all parties consent."""
        return self._stored.seal.position if self._stored else Position(number=0, hash=self._manifest_sha256)

    def offer(self, party: str, certificate: bytes) -> dict[str, Any]:
        """What a party must consent to; `certificate` is the newest that it keeps, or empty."""
        if certificate:
            self._note(Certificate.from_bytes(certificate), strict=True)
        seal = self._stored.seal.to_bytes() if self._stored else b""
        return {"seal": seal, "certificates": self.certificates(), "joined": party in self._kept}

    def certificates(self) -> list[bytes]:
        """All that are known from disk and parties, so that a party sees whether its memory is behind."""
        return [certificate.to_bytes() for certificate in self._certificates.values()]

    def check_consent(self, party: str, start: Start, made_by: bytes, share: bytes | None) -> None:
        """Check a party's consent and its share of the key that opens what is offered (None: it has none).

        Raises:
            VerificationError: "signature", "checkpoint", "share-epoch", "share".
        """
        start.verify(
            self._parties[party],
            job_id=self._job_id,
            manifest_sha256=self._manifest_sha256,
            instance_id=self._instance_id,
            party=party,
        )
        if start.position != self.offered:
            message = f"the party consents to {start.position}, offered is {self.offered}"
            raise VerificationError("checkpoint", message, where=party)
        if share is None:
            return
        if self._stored is None or made_by != self._stored.seal.instance_id:
            raise VerificationError(
                "share-epoch", "the share is of the sealing key of another enclave instance", where=party
            )
        record = self._stored.record
        context = share_context(job_id=self._job_id, instance_id=made_by, party=party)
        check_share(share, context, record.commitments.get(party, b""), holder=party)

    def consent(self, party: str, start: Start, share: bytes | None) -> None:
        """Note what `check_consent` has passed."""
        self._starts[party] = start
        if share is not None:
            self._shares[party] = share

    @property
    def all_consent(self) -> bool:
        return len(self._starts) == len(self._parties)

    def share_of(self, party: str) -> dict[str, Any]:
        """A party's share of this instance's sealing key. Once all have consented, `ready` is true."""
        if self._record is None or party not in self._starts:
            raise ProtocolError("a share is asked for before consent", where=party)
        return {
            "ready": self.all_consent,
            "share": self._own_shares[party],
            "record": self._record.to_bytes(),
            "certificates": self.certificates(),
        }

    def keep(self, party: str, signature: bytes) -> None:
        """The party has its share on disk. Raises: VerificationError("signature")."""
        if self._record is None:
            raise ProtocolError("a share is acknowledged before it was given", where=party)
        verify_signature(self._parties[party], KEPT_LABEL, self._record.sha256, signature, where=party)
        self._kept.add(party)

    def missing(self, party: str) -> str:
        """What is still needed of a party that has released its data keys, in words, or nothing."""
        if party not in self._kept:
            return "share of the sealing key"
        needed = self._stored.record.quorum if self._stored else 0
        if len(self._shares) < needed and party not in self._shares:
            return f"its share of the checkpoint's key, {len(self._shares)} of {needed} are here"
        return ""

    def restore(self, entry: InstanceEntry) -> bytes | None:
        """Open the checkpoint that all have consented to; this instance, described by `entry`, joins the history.

        Raises:
            VerificationError: "sealed" or "share".
        """
        training = None
        if self._stored is not None:
            stored = self._stored
            key = SealingKey.from_shares(list(self._shares.values()), quorum=stored.record.quorum)
            training = self._open(stored, key)
        with self._news:
            self._shares.clear()
            self.history.instances.append(entry)
            self.history.starts.append({party: start.to_bytes() for party, start in self._starts.items()})
        return training

    def _open(self, stored: Stored, key: SealingKey) -> bytes:
        seal = stored.seal
        plain = key.open(stored.content(), salt=seal.salt, purpose=seal.purpose())
        length = int.from_bytes(plain[:_LENGTH_BYTES], "big")
        meta = plain[_LENGTH_BYTES : _LENGTH_BYTES + length]
        fields = Fields(
            decode(meta, max_bytes=_MAX_META_BYTES, max_items=_MAX_META_ITEMS, what="checkpoint"), "checkpoint"
        )
        fields.integer("version", low=1, high=1)
        self.history = History.from_value(fields.table("history"))
        fields.end()
        signed = self._certificates.get(seal.hash)
        self.history.chain.append((seal, dict(signed.signatures) if signed else {}))
        return plain[_LENGTH_BYTES + length :]

    # During training ------------------------------------------------------------------------------------------------

    def add(self, training: bytes, step: int) -> Seal:
        """Seal a state of training, put it on disk, then ask the parties to sign it.

        Raises:
            CapacityError, DataError: the disk does not take it.
        """
        if self._record is None:
            raise RuntimeError("there is nothing to seal before the manifest")
        with self._news:
            last = self.history.chain[-1][0].position if self.history.chain else self.offered
            meta = encode({"version": 1, "history": self.history.to_value()})
        unsigned = Seal(
            job_id=self._job_id,
            manifest_sha256=self._manifest_sha256,
            instance_id=self._instance_id,
            number=last.number + 1,
            previous=last.hash,
            step=step,
            shares_sha256=self._record.sha256,
            salt=secrets.token_bytes(SALT_BYTES),
        )
        plain = len(meta).to_bytes(_LENGTH_BYTES, "big") + meta + training
        content = self._key.seal(plain, salt=unsigned.salt, purpose=unsigned.purpose())
        seal = unsigned.signed(content, self._signing_key)
        self._folder.write(seal, self._record, content)
        with self._news:
            self.history.chain.append((seal, {}))
            self._news.notify_all()
        return seal

    @property
    def _own(self) -> list[tuple[Seal, dict[str, bytes]]]:
        return [link for link in self.history.chain if link[0].instance_id == self._instance_id]

    def to_sign(self, party: str) -> bytes:
        """The newest checkpoint of this instance if this party has not signed it, else nothing."""
        own = self._own
        return own[-1][0].to_bytes() if own and party not in own[-1][1] else b""

    def certificate_after(self, number: int) -> bytes:
        """The newest complete certificate if it is of a later checkpoint than `number`, else nothing."""
        committed = self.committed
        return committed.to_bytes() if committed is not None and committed.seal.number > number else b""

    def has_news(self, party: str, committed: int) -> bool:
        """Whether there is something to sign or to note for this party."""
        return bool(self.to_sign(party) or self.certificate_after(committed))

    def sign(self, party: str, number: int, signature: bytes) -> None:
        """A party's signature; with that of a quorum the checkpoint is committed.

        Raises:
            VerificationError: "signature". ProtocolError: there is no such checkpoint.
        """
        found = [link for link in self._own if link[0].number == number]
        if not found:
            raise ProtocolError(f"there is no checkpoint {number} of this instance", where=party)
        seal, signatures = found[0]
        verify_signature(self._parties[party], CHECKPOINT_LABEL, checkpoint_message(seal), signature, where=party)
        signatures[party] = signature
        if len(signatures) < self._quorum or (self.committed is not None and number < self.committed.seal.number):
            return
        self.committed = Certificate(seal=seal, signatures=dict(signatures))
        self._folder.write_certificate(self.committed)

    def is_committed(self) -> bool:
        """Whether a quorum has signed this instance's newest checkpoint, or it has made none."""
        own = self._own
        return not own or len(own[-1][1]) >= self._quorum

    def counts(self) -> dict[str, int]:
        """Checkpoints made, of these signed by a quorum, and restarts."""
        chain = self.history.chain
        signed = sum(len(signatures) >= self._quorum for _, signatures in chain)
        return {"made": len(chain), "signed": signed, "restarts": len(self.history.instances) - 1}

    # Receipt --------------------------------------------------------------------------------------------------------

    def to_receipt(self) -> dict[str, Any]:
        """The history as it stands in a receipt's body; this instance's own evidence stands elsewhere in it."""
        return {
            "quorum": self._quorum,
            "earlier": [
                {k: v.hex() if isinstance(v, bytes) else v for k, v in entry.to_dict().items()}
                for entry in self.history.instances[:-1]
            ],
            "starts": [{party: start.hex() for party, start in parties.items()} for parties in self.history.starts],
            "chain": [
                {"seal": seal.to_bytes().hex(), "signatures": {party: s.hex() for party, s in signatures.items()}}
                for seal, signatures in self.history.chain
            ],
        }

    def _context(self, party: str) -> bytes:
        return share_context(job_id=self._job_id, instance_id=self._instance_id, party=party)

    def _note(self, certificate: Certificate, *, strict: bool) -> None:
        try:
            certificate.verify(
                self._parties, job_id=self._job_id, manifest_sha256=self._manifest_sha256, quorum=self._quorum
            )
        except VerificationError:
            if strict:
                raise
            return
        self._certificates[certificate.seal.hash] = certificate
