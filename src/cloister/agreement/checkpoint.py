"""The chain of sealed checkpoints: what an enclave announces, what parties sign, and how a restart is agreed on.

    seal           public facts of one checkpoint with the hash of the one before, signed by the instance that made it
    certificate    a seal with the signatures of parties that have noted it; complete once a quorum has signed
    share record   commitments to the shares of an instance's sealing key, signed by that instance
    start          from which checkpoint a party lets an instance go on, signed by the party

The chain begins at number 0, whose hash is that of the manifest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cloister.agreement.signing import HASH_BYTES, INSTANCE_ID_BYTES
from cloister.crypto.encoding import Fields, decode, encode, join
from cloister.crypto.keys import SIGNATURE_BYTES, PartyKey, verify_signature
from cloister.crypto.sealing import SALT_BYTES
from cloister.errors import ProtocolError, VerificationError

CHECKPOINT_LABEL = "checkpoint"
SEAL_LABEL = "checkpoint seal"
SHARES_LABEL = "checkpoint shares"
KEPT_LABEL = "checkpoint share kept"
START_LABEL = "start"

MAX_NUMBER = 2**31
MAX_SEAL_BYTES = 4096
MAX_RECORD_BYTES = 1 << 20
MAX_CERTIFICATE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Position:
    """A place in the chain."""

    number: int
    hash: bytes

    def __str__(self) -> str:
        return f"checkpoint {self.number} ({self.hash.hex()[:16]}…)" if self.number else "the beginning"


@dataclass(frozen=True, kw_only=True)
class Seal:
    """Public facts of one sealed checkpoint. `step` counts optimiser steps done."""

    job_id: str
    manifest_sha256: bytes
    instance_id: bytes
    """Of the instance that made it, whose sealing key opens it."""
    number: int
    previous: bytes
    """Hash of the checkpoint before."""
    step: int
    shares_sha256: bytes
    """Of the record of shares of the sealing key."""
    salt: bytes
    content: bytes = b""
    """SHA-256 of what is sealed."""
    signature: bytes = b""

    def purpose(self) -> bytes:
        """Everything that must hold when the content is opened."""
        return encode(
            {
                "version": 1,
                "job_id": self.job_id,
                "manifest_sha256": self.manifest_sha256,
                "instance_id": self.instance_id,
                "number": self.number,
                "previous": self.previous,
                "step": self.step,
                "shares_sha256": self.shares_sha256,
                "salt": self.salt,
            }
        )

    @property
    def hash(self) -> bytes:
        return hashlib.sha256(join(b"cloister checkpoint v1", self.purpose(), self.content)).digest()

    @property
    def position(self) -> Position:
        return Position(number=self.number, hash=self.hash)

    def signed(self, content: bytes, key: PartyKey) -> Seal:
        """With the hash of its content and the signature of its instance."""
        full = replace(self, content=hashlib.sha256(content).digest())
        return replace(full, signature=key.sign(SEAL_LABEL, full.hash))

    def to_bytes(self) -> bytes:
        return encode({"purpose": self.purpose(), "content": self.content, "signature": self.signature})

    @classmethod
    def from_bytes(cls, unverified: bytes) -> Seal:
        """Parse. Raises: ProtocolError if it is malformed."""
        outer = Fields.decode(unverified, max_bytes=MAX_SEAL_BYTES, what="checkpoint seal")
        fields = Fields.decode(outer.blob("purpose"), max_bytes=MAX_SEAL_BYTES, what="checkpoint seal")
        fields.integer("version", low=1, high=1)
        seal = cls(
            job_id=fields.text("job_id", max_size=64),
            manifest_sha256=fields.blob("manifest_sha256", size=HASH_BYTES),
            instance_id=fields.blob("instance_id", size=INSTANCE_ID_BYTES),
            number=fields.integer("number", low=1, high=MAX_NUMBER),
            previous=fields.blob("previous", size=HASH_BYTES),
            step=fields.integer("step", low=0, high=2**53),
            shares_sha256=fields.blob("shares_sha256", size=HASH_BYTES),
            salt=fields.blob("salt", size=SALT_BYTES),
            content=outer.blob("content", size=HASH_BYTES),
            signature=outer.blob("signature", size=SIGNATURE_BYTES),
        )
        fields.end()
        outer.end()
        return seal

    def check(self, *, job_id: str, manifest_sha256: bytes) -> None:
        """Raises: VerificationError("checkpoint") if it belongs to another job or manifest."""
        if self.job_id != job_id:
            raise VerificationError("checkpoint", "the checkpoint is of another job", where=f"checkpoint {self.number}")
        if self.manifest_sha256 != manifest_sha256:
            raise VerificationError(
                "checkpoint",
                "the checkpoint is of another manifest: other bundles, another program or another policy",
                where=f"checkpoint {self.number}",
            )

    def verify(self, signing_key: bytes) -> None:
        """Raises: VerificationError("checkpoint") unless the instance with this key made it."""
        try:
            verify_signature(signing_key, SEAL_LABEL, self.hash, self.signature)
        except VerificationError as exc:
            raise VerificationError(
                "checkpoint",
                "the checkpoint was not made by the enclave instance that it names",
                where=f"checkpoint {self.number}",
            ) from exc


def checkpoint_message(seal: Seal) -> bytes:
    """What a party signs once it has durably noted that this checkpoint exists."""
    fixed = (bytes.fromhex(seal.job_id), seal.manifest_sha256, seal.instance_id)
    return join(*fixed, seal.number.to_bytes(8, "big"), seal.previous, seal.hash)


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """A seal and who has signed it."""

    seal: Seal
    signatures: Mapping[str, bytes] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        return encode({"seal": self.seal.to_bytes(), "signatures": dict(self.signatures)})

    @classmethod
    def from_bytes(cls, unverified: bytes) -> Certificate:
        """Parse. Raises: ProtocolError if it is malformed."""
        fields = Fields.decode(unverified, max_bytes=MAX_CERTIFICATE_BYTES, what="checkpoint certificate")
        certificate = cls(seal=Seal.from_bytes(fields.blob("seal")), signatures=fields.table("signatures"))
        fields.end()
        if not all(isinstance(s, bytes) for s in certificate.signatures.values()):
            raise ProtocolError("checkpoint certificate: a signature is not bytes")
        return certificate

    def verify(self, parties: Mapping[str, bytes], *, job_id: str, manifest_sha256: bytes, quorum: int) -> None:
        """Check that at least a quorum of the job's parties has signed, and that every signature holds.

        Raises:
            VerificationError: "checkpoint" or "signature".
        """
        self.seal.check(job_id=job_id, manifest_sha256=manifest_sha256)
        if not set(self.signatures) <= set(parties) or len(self.signatures) < quorum:
            message = f"{len(self.signatures)} parties have signed the checkpoint, {quorum} must"
            raise VerificationError("checkpoint", message, where=f"checkpoint {self.seal.number}")
        for party, signature in self.signatures.items():
            verify_signature(parties[party], CHECKPOINT_LABEL, checkpoint_message(self.seal), signature, where=party)


@dataclass(frozen=True, kw_only=True)
class ShareRecord:
    """Commitments to every party's share of one instance's sealing key."""

    job_id: str
    manifest_sha256: bytes
    instance_id: bytes
    quorum: int
    commitments: Mapping[str, bytes]
    signature: bytes = b""

    def content(self) -> bytes:
        return encode(
            {
                "version": 1,
                "job_id": self.job_id,
                "manifest_sha256": self.manifest_sha256,
                "instance_id": self.instance_id,
                "quorum": self.quorum,
                "commitments": dict(self.commitments),
            }
        )

    @property
    def sha256(self) -> bytes:
        return hashlib.sha256(self.content()).digest()

    def signed(self, key: PartyKey) -> ShareRecord:
        return replace(self, signature=key.sign(SHARES_LABEL, self.content()))

    def to_bytes(self) -> bytes:
        return encode({"content": self.content(), "signature": self.signature})

    @classmethod
    def from_bytes(cls, unverified: bytes) -> ShareRecord:
        """Parse. Raises: ProtocolError if it is malformed."""
        outer = Fields.decode(unverified, max_bytes=MAX_RECORD_BYTES, what="share record")
        content = outer.blob("content", max_size=MAX_RECORD_BYTES)
        fields = Fields.decode(content, max_bytes=MAX_RECORD_BYTES, what="share record")
        fields.integer("version", low=1, high=1)
        record = cls(
            job_id=fields.text("job_id", max_size=64),
            manifest_sha256=fields.blob("manifest_sha256", size=HASH_BYTES),
            instance_id=fields.blob("instance_id", size=INSTANCE_ID_BYTES),
            quorum=fields.integer("quorum", low=1, high=2**16),
            commitments=fields.table("commitments"),
            signature=outer.blob("signature", size=SIGNATURE_BYTES),
        )
        fields.end()
        outer.end()
        if not all(isinstance(c, bytes) and len(c) == HASH_BYTES for c in record.commitments.values()):
            raise ProtocolError("share record: a commitment is not 32 bytes")
        return record

    def verify(self, signing_key: bytes) -> None:
        """Raises: VerificationError("signature") unless the instance with this key made it."""
        verify_signature(signing_key, SHARES_LABEL, self.content(), self.signature, where="share record")


def lineage_nonce(manifest_sha256: bytes) -> bytes:
    """What an instance's evidence is bound to, beside its keys, when it begins to train."""
    return hashlib.sha256(join(b"cloister instance v1", manifest_sha256)).digest()


def share_context(*, job_id: str, instance_id: bytes, party: str) -> bytes:
    """What a share's commitment is bound to."""
    return join(bytes.fromhex(job_id), instance_id, party.encode())


def share_info(*, manifest_sha256: bytes, instance_id: bytes, made_by: bytes, party: str) -> bytes:
    """HPKE `info` of a share: given to this instance, of the sealing key that the instance `made_by` drew."""
    return join(b"cloister share v1", manifest_sha256, instance_id, made_by, party.encode())


@dataclass(frozen=True, kw_only=True)
class Start:
    """A party's consent that an instance goes on from a place in the chain."""

    position: Position
    last: Position
    """Where the chain was when this party last looked."""
    authorised: bool = False
    """Whether its user has explicitly allowed what it would have refused."""
    signature: bytes = b""

    def message(self, *, job_id: str, manifest_sha256: bytes, instance_id: bytes) -> bytes:
        places = [part for p in (self.position, self.last) for part in (p.number.to_bytes(8, "big"), p.hash)]
        return join(bytes.fromhex(job_id), manifest_sha256, instance_id, *places, bytes([self.authorised]))

    def signed(self, key: PartyKey, *, job_id: str, manifest_sha256: bytes, instance_id: bytes) -> Start:
        message = self.message(job_id=job_id, manifest_sha256=manifest_sha256, instance_id=instance_id)
        return replace(self, signature=key.sign(START_LABEL, message))

    def verify(self, public: bytes, *, job_id: str, manifest_sha256: bytes, instance_id: bytes, party: str) -> None:
        """Raises: VerificationError("signature")."""
        message = self.message(job_id=job_id, manifest_sha256=manifest_sha256, instance_id=instance_id)
        verify_signature(public, START_LABEL, message, self.signature, where=party)

    def to_bytes(self) -> bytes:
        return encode(
            {
                "number": self.position.number,
                "hash": self.position.hash,
                "last_number": self.last.number,
                "last_hash": self.last.hash,
                "authorised": self.authorised,
                "signature": self.signature,
            }
        )

    @classmethod
    def from_bytes(cls, unverified: bytes) -> Start:
        """Parse. Raises: ProtocolError if it is malformed."""
        fields = Fields(decode(unverified, max_bytes=1024, what="start"), "start")
        start = cls(
            position=_position(fields, ""),
            last=_position(fields, "last_"),
            authorised=fields.boolean("authorised"),
            signature=fields.blob("signature", size=SIGNATURE_BYTES),
        )
        fields.end()
        return start


def _position(fields: Fields, prefix: str) -> Position:
    number = fields.integer(f"{prefix}number", low=0, high=MAX_NUMBER)
    return Position(number=number, hash=fields.blob(f"{prefix}hash", size=HASH_BYTES))
