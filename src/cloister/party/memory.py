"""What a party must not forget between two starts of its own or of the enclave's.

    manifest     the one manifest of this job that it has signed
    instances    the enclave instances that it has followed; it speaks to the last one only
    position     the newest checkpoint that it has signed or gone on from
    certificate  the newest checkpoint that it knows to be signed by a quorum
    shares       its shares of those instances' sealing keys that may still be needed

One file, written whole and synced before anything that depends on it is sent; `counter` grows with every write. It
holds secrets: mode 0600. An older copy, put back, is noticed where it matters: others hold what it signed since.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cloister.agreement.checkpoint import CHECKPOINT_LABEL, Certificate, Position, Seal, checkpoint_message
from cloister.crypto.encoding import Fields, encode
from cloister.crypto.keys import verify_signature
from cloister.crypto.sealing import write_durably
from cloister.errors import DataError, ProtocolError, VerificationError

_MAX_BYTES = 16 << 20
_RESTORED_HINT = (
    "was this party's folder restored from a copy? If you are sure that the checkpoint offered is the right one, "
    "start again with --accept-checkpoint"
)


@dataclass(frozen=True, kw_only=True)
class Followed:
    """An enclave instance that this party has attested and released its keys to."""

    id: bytes
    signing_key: bytes
    since: int
    """Seconds since 1970."""

    def to_value(self) -> dict[str, Any]:
        return {"id": self.id, "signing_key": self.signing_key, "since": self.since}


@dataclass(frozen=True, kw_only=True)
class State:
    """One content of the memory's file. Immutable; `Memory.write` makes the next."""

    manifest_sha256: bytes
    position: Position
    counter: int = 0
    instances: tuple[Followed, ...] = ()
    certificate: bytes = b""
    shares: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    """By hex id of the instance whose sealing key it is."""
    consent: bytes = b""
    """The encoded `Start` given to the current instance."""
    authorised: tuple[str, ...] = ()
    """What the user has explicitly allowed, in words, oldest first."""

    @property
    def current(self) -> bytes:
        """Id of the instance that this party follows, empty before the first."""
        return self.instances[-1].id if self.instances else b""

    def signing_key(self, instance_id: bytes) -> bytes | None:
        return next((i.signing_key for i in self.instances if i.id == instance_id), None)

    def certified(self) -> Certificate | None:
        return Certificate.from_bytes(self.certificate) if self.certificate else None

    def to_bytes(self) -> bytes:
        return encode(
            {
                "version": 1,
                "counter": self.counter,
                "manifest_sha256": self.manifest_sha256,
                "number": self.position.number,
                "hash": self.position.hash,
                "instances": [instance.to_value() for instance in self.instances],
                "certificate": self.certificate,
                "shares": dict(self.shares),
                "consent": self.consent,
                "authorised": list(self.authorised),
            }
        )

    @classmethod
    def from_bytes(cls, content: bytes) -> State:
        """Raises: ProtocolError if it is malformed."""
        fields = Fields.decode(content, max_bytes=_MAX_BYTES, what="party's memory")
        fields.integer("version", low=1, high=1)
        number = fields.integer("number", low=0, high=2**31)
        state = cls(
            manifest_sha256=fields.blob("manifest_sha256", size=32),
            position=Position(number=number, hash=fields.blob("hash", size=32)),
            counter=fields.integer("counter", low=0, high=2**62),
            instances=tuple(_followed(value) for value in fields.items("instances", max_items=1 << 16)),
            certificate=fields.blob("certificate", max_size=_MAX_BYTES),
            shares=fields.table("shares"),
            consent=fields.blob("consent", max_size=1024),
            authorised=tuple(str(text) for text in fields.items("authorised", max_items=1 << 16)),
        )
        fields.end()
        return state


def _followed(value: object) -> Followed:
    fields = Fields(value, "party's memory")
    return Followed(
        id=fields.blob("id", size=16),
        signing_key=fields.blob("signing_key", size=32),
        since=fields.integer("since", low=0, high=2**40),
    )


class Memory:
    """The file. It is read again before every decision: another start of the same party may have moved on."""

    def __init__(self, path: Path, manifest_sha256: bytes) -> None:
        self.path = path
        self._beginning = State(manifest_sha256=manifest_sha256, position=Position(number=0, hash=manifest_sha256))

    def read(self) -> State:
        """Raises: DataError if the file cannot be read or is damaged."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return self._beginning
        except OSError as exc:
            raise DataError(f"cannot read: {exc.strerror}", where=str(self.path)) from exc
        try:
            state = State.from_bytes(content)
        except ProtocolError as exc:
            hint = "restore the file as it was"
            raise DataError("this party's memory is damaged", where=str(self.path), hint=hint) from exc
        if state.manifest_sha256 != self._beginning.manifest_sha256:
            hint = "the manifest that lies beside it is damaged: restore both files as they were"
            raise DataError("this party's memory is of another manifest", where=str(self.path), hint=hint)
        return state

    def write(self, state: State) -> State:
        """Make this the content, durably. Raises: DataError, CapacityError."""
        state = replace(state, counter=state.counter + 1)
        write_durably(self.path, state.to_bytes())
        return state

    def check_followed(self, instance_id: bytes) -> State:
        """The content, if this is the instance that the party follows.

        Raises:
            VerificationError: "lease": the party has released its keys to a later instance, or to none yet.
        """
        state = self.read()
        if state.current != instance_id:
            raise VerificationError(
                "lease",
                "this party no longer follows this enclave instance: it has released its keys to a later one",
                where="enclave",
                hint="two instances of one job must not run at the same time; end the older one",
            )
        return state


def check_offer(
    state: State,
    offered: Position,
    seal: Seal | None,
    certificates: list[Certificate],
    *,
    party: str,
    public_key: bytes,
    accept: bytes | None,
) -> bool:
    """Decide whether a new instance may go on from `offered`; returns whether only the user's word allowed it.

    It may, if it is where the chain was when this party last looked, or further on by the hand of the instance that
    this party follows. Files are on disk before parties hear of them, so an honest crash offers nothing older.

    Args:
        state: of this party's memory. seal: of the offered checkpoint, None for the beginning.
        certificates: what the enclave has seen of the chain. accept: hash that the user has authorised.

    Raises:
        VerificationError: "memory", "rollback", "lease" or "checkpoint".
    """
    try:
        check_memory(state, certificates, party=party, public_key=public_key)
        _check_place(state, offered, seal)
    except VerificationError:
        if accept is None or accept != offered.hash:
            raise
        return True
    return False


def _check_place(state: State, offered: Position, seal: Seal | None) -> None:
    if seal is not None:
        signing_key = state.signing_key(seal.instance_id)
        if signing_key is None:
            raise VerificationError(
                "checkpoint", "the checkpoint was made by an enclave instance that this party never attested",
                where=f"checkpoint {seal.number}", hint=_RESTORED_HINT,
            )  # fmt: skip
        seal.verify(signing_key)
    if offered == state.position:
        return
    if offered.number <= state.position.number:
        raise VerificationError(
            "rollback",
            f"the enclave would go on from {offered}, but this party has seen {state.position}",
            where="enclave",
            hint="its disk holds an old copy. If all of you want to go back, join with "
            f"--accept-checkpoint {offered.hash.hex()}",
        )
    if seal is None or seal.instance_id != state.current:
        raise VerificationError(
            "lease", f"{offered} was made by an enclave instance that this party had left", where="enclave",
            hint="two instances have run at the same time; remove the newest files of the checkpoint folder",
        )  # fmt: skip


def check_memory(state: State, certificates: list[Certificate], *, party: str, public_key: bytes) -> None:
    """Notice that this party has signed what its memory does not know.

    Raises:
        VerificationError: "memory".
    """
    known = {instance.id for instance in state.instances}
    for certificate in certificates:
        seal = certificate.seal
        signature = certificate.signatures.get(party)
        if signature is None:
            continue
        verify_signature(public_key, CHECKPOINT_LABEL, checkpoint_message(seal), signature, where="enclave")
        behind = seal.instance_id == state.current and seal.number > state.position.number
        if seal.instance_id not in known or behind:
            raise VerificationError(
                "memory",
                f"this party's own signature is under {seal.position}, but its memory ends at {state.position}",
                where=party,
                hint=_RESTORED_HINT,
            )
