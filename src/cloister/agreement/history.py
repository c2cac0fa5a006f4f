"""Checking the history in a receipt: the instances that trained, the chain of their checkpoints, who let them go on.

quorum    how many parties must sign a checkpoint
earlier   instances before the one that signed the receipt: id, keys, evidence, time
starts    for each instance, oldest first, every party's consent to where it began
chain     every checkpoint: its seal and the parties' signatures
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cloister.agreement.checkpoint import CHECKPOINT_LABEL, Position, Seal, Start, checkpoint_message, lineage_nonce
from cloister.agreement.manifest import Manifest
from cloister.attest.binding import instance_report_data
from cloister.attest.evidence import Evidence
from cloister.attest.policy import AppraisalPolicy
from cloister.attest.verify import verify
from cloister.crypto.keys import verify_signature
from cloister.errors import VerificationError


@dataclass(frozen=True, kw_only=True)
class EarlierInstance:
    """An instance whose work the receipt's own instance went on with."""

    id: bytes
    signing_key: bytes
    hpke_key: bytes
    evidence: bytes
    time: int


@dataclass(frozen=True, kw_only=True)
class History:
    """The parsed history of a body; nothing in it is verified."""

    quorum: int
    earlier: list[EarlierInstance]
    starts: list[dict[str, Start]]
    chain: list[tuple[Seal, dict[str, bytes]]]

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> History:
        """Raises: KeyError, TypeError, ValueError, AttributeError or ProtocolError if it is malformed."""
        found = body["history"]
        return cls(
            quorum=found["quorum"],
            earlier=[
                EarlierInstance(
                    time=int(entry["time"]),
                    **{name: bytes.fromhex(entry[name]) for name in ("id", "signing_key", "hpke_key", "evidence")},
                )
                for entry in found["earlier"]
            ],
            starts=[{p: Start.from_bytes(bytes.fromhex(s)) for p, s in start.items()} for start in found["starts"]],
            chain=[
                (
                    Seal.from_bytes(bytes.fromhex(link["seal"])),
                    {party: bytes.fromhex(s) for party, s in link["signatures"].items()},
                )
                for link in found["chain"]
            ],
        )


def check_chain(
    body: Mapping[str, Any],
    *,
    instance_id: bytes,
    signing_key: bytes,
    parties: Mapping[str, bytes],
    manifest: Manifest,
) -> tuple[str, None]:
    """Check that the checkpoints are one chain, each by the instance whose turn it was, each turn agreed to by all.

    Args:
        instance_id, signing_key: of the instance that signed the receipt. parties: public keys by name.

    Raises:
        VerificationError: "checkpoint" or "signature"; and what `History.of` raises.
    """
    history = History.of(body)
    instances = [(i.id, i.signing_key) for i in history.earlier] + [(instance_id, signing_key)]
    _check_quorum(body, history.quorum, len(parties))
    if len({id for id, _ in instances}) != len(instances) or len(history.starts) != len(instances):
        raise VerificationError("checkpoint", "the history does not show one start for each instance")
    chain = [Position(number=0, hash=manifest.sha256)]
    left = list(history.chain)
    for turn, ((id, key), start) in enumerate(zip(instances, history.starts, strict=True)):
        _check_start(start, id, chain[-1], parties, manifest)
        made = 0
        while left and left[0][0].instance_id == id:
            seal, signatures = left.pop(0)
            _check_link(seal, signatures, chain[-1], key, parties, manifest)
            chain.append(seal.position)
            made += 1
        if made == 0 and turn < len(instances) - 1:
            raise VerificationError("checkpoint", "an earlier instance is listed that made no checkpoint")
    if left:
        raise VerificationError("checkpoint", "the chain holds a checkpoint of an instance whose turn it was not")
    return _in_words(history, len(instances)), None


def _check_quorum(body: Mapping[str, Any], quorum: int, count: int) -> None:
    """The job says how many must sign; a receipt of an older job without that section means all."""
    section = json.loads(body["job"])["job"].get("checkpoint", {})
    if quorum != (section.get("quorum") or count):
        raise VerificationError("checkpoint", "the history names another quorum than the job")


def _check_start(
    start: Mapping[str, Start], instance_id: bytes, at: Position, parties: Mapping[str, bytes], manifest: Manifest
) -> None:
    if set(start) != set(parties):
        raise VerificationError("checkpoint", "not exactly the job's parties let an instance begin")
    for party, consent in start.items():
        consent.verify(
            parties[party],
            job_id=manifest.job_id,
            manifest_sha256=manifest.sha256,
            instance_id=instance_id,
            party=party,
        )
        if consent.position != at:
            raise VerificationError("checkpoint", f"{party} let an instance go on from {consent.position}, not {at}")


def _check_link(
    seal: Seal, signatures: Mapping[str, bytes], before: Position, key: bytes, parties: Mapping[str, bytes],
    manifest: Manifest,
) -> None:  # fmt: skip
    seal.check(job_id=manifest.job_id, manifest_sha256=manifest.sha256)
    seal.verify(key)
    if (seal.number, seal.previous) != (before.number + 1, before.hash):
        raise VerificationError("checkpoint", f"checkpoint {seal.number} does not follow on {before}")
    if not set(signatures) <= set(parties):
        raise VerificationError("checkpoint", f"a stranger has signed checkpoint {seal.number}")
    for party, signature in signatures.items():
        verify_signature(parties[party], CHECKPOINT_LABEL, checkpoint_message(seal), signature, where=party)


def _in_words(history: History, instances: int) -> str:
    full = sum(len(signatures) >= history.quorum for _, signatures in history.chain)
    words = [f"{len(history.chain)} checkpoints in one chain by {instances} instance{'s' if instances > 1 else ''}"]
    words.append(f"{full} of them signed by a quorum of {history.quorum}")
    allowed = sorted({party for start in history.starts for party, consent in start.items() if consent.authorised})
    if allowed:
        words.append(f"going back was explicitly allowed by {', '.join(allowed)}")
    return "; ".join(words)


def check_earlier(
    body: Mapping[str, Any], *, policy: AppraisalPolicy, manifest: Manifest, allow_simulated: bool
) -> tuple[str, None]:
    """Check the evidence of every earlier instance by the verifier's policy, at the time when it began to train.

    Raises:
        VerificationError: as `attest.verify`, or "receipt-measurement"; and what `History.of` raises.
    """
    earlier = History.of(body).earlier
    for instance in earlier:
        expected = instance_report_data(
            job_id=manifest.job_id,
            instance_id=instance.id,
            signing_key=instance.signing_key,
            hpke_key=instance.hpke_key,
            nonce=lineage_nonce(manifest.sha256),
        )
        evidence = Evidence.from_bytes(instance.evidence)
        claims = verify(evidence, policy, expected, instance.time, allow_simulated=allow_simulated)
        if (manifest.attester, dict(manifest.registers)) != (claims.type, dict(claims.registers)):
            raise VerificationError("receipt-measurement", "an earlier instance ran another program")
    if not earlier:
        return "no earlier instance: the run was not interrupted", None
    return f"the evidence of {len(earlier)} earlier instance{'s' if len(earlier) > 1 else ''} holds", None
