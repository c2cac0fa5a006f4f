"""A party's side of a job, step by step, over an attested session.

1. verify the enclave's instance keys against the party's own policy
2. approve the job
3. send the bundles (what has arrived before is not sent again)
4. wait for the manifest, check it, remember it, sign it
5. check from which checkpoint this instance would go on, and follow it alone from now on
6. release the data keys, and the share that opens the checkpoint, to this instance, for this manifest
7. keep a share of the instance's own sealing key
8. follow the training, note and sign its checkpoints
9. take results, verify the receipt, keep both on disk, countersign it
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from cloister.adapters.files import CONFIG, WEIGHTS, file_hashes
from cloister.agreement import (
    APPROVAL_LABEL,
    KEYS_LABEL,
    MANIFEST_LABEL,
    Manifest,
    approval_message,
    keys_message,
    wrap_info,
)
from cloister.agreement.receipt import COUNTERSIGN_LABEL, Receipt, Verdict, countersign_message, verify_receipt
from cloister.attest.attester import Attester
from cloister.attest.binding import instance_report_data
from cloister.attest.claims import Claims
from cloister.attest.evidence import Evidence
from cloister.attest.policy import AppraisalPolicy
from cloister.attest.production import require_confidential
from cloister.attest.verify import verify
from cloister.crypto.encoding import Fields
from cloister.crypto.hpke import wrap
from cloister.crypto.keys import DataKey, PartyKey
from cloister.crypto.sealing import write_durably
from cloister.errors import ProtocolError, VerificationError
from cloister.party.follower import WAIT_MS, Consent, Follower, Requests
from cloister.party.memory import Memory

MAX_ADAPTER_BYTES = 16 << 30
"""An adapter larger than this is no adapter; bounds what a malicious enclave can make a party hold."""
COUNTERSIGN_WAIT_S = 300.0
"""How long to wait for the other parties' countersignatures: a party that never comes back must not cost the rest
their results."""


class Contribution(Protocol):
    """What a party brings to a job."""

    @property
    def commitments(self) -> Mapping[str, bytes]:
        """32 bytes by kind of data; the manifest lists them."""

    @property
    def data_keys(self) -> Mapping[str, DataKey]:
        """By kind; empty where the data stay with the party."""


Alongside = Callable[[], AbstractContextManager[Callable[[], None]]]
"""What goes on beside following the enclave, once training may begin. Its value raises what has gone wrong in it."""


def _nothing_alongside() -> AbstractContextManager[Callable[[], None]]:
    return nullcontext(lambda: None)


def _keep_in_memory(results: Results) -> None:
    """For callers that live as long as they need the results."""


@dataclass(frozen=True, kw_only=True)
class VerifiedInstance:
    """An enclave instance whose keys are bound to evidence that this party's policy accepted."""

    id: bytes
    signing_key: bytes
    hpke_key: bytes
    claims: Claims


@dataclass(frozen=True, kw_only=True)
class Results:
    """What a party has at the end. `adapter` is empty unless the job releases it to this party.

    `complete` says whether all parties have countersigned the receipt.
    """

    declared: dict[str, Any]
    scores: dict[str, str]
    adapter: dict[str, bytes]
    receipt: Receipt
    complete: bool
    claims: Claims


@dataclass(kw_only=True)
class PartyClient:
    """One party in one job.

    Args:
        memory: file that keeps the manifest which this party has signed, across restarts of either side; what it must
            remember of instances and checkpoints is in `memory_file` beside it.
        quorum: how many parties must sign a checkpoint; None: all.
        accept: hash of a checkpoint that the user allows an instance to go on from, whatever the memory says.
    """

    job_id: str
    name: str
    key: PartyKey
    parties: Mapping[str, bytes]
    policy: AppraisalPolicy
    allow_simulated: bool
    memory: Path
    clock: Callable[[], float] = time.time
    allow_not_confidential: bool = False
    approval: bytes = b""
    """Made beforehand by `cloister sign`; empty: the key signs here."""
    quorum: int | None = None
    accept: bytes | None = None
    attester: Attester | None = None
    """Of the party's own TEE, if the method gives it one."""

    def take_part(
        self,
        session: Requests,
        brought: Contribution,
        *,
        upload: Callable[[], None],
        on_missing: Callable[[list[str]], None],
        on_event: Callable[[dict[str, Any]], None],
        alongside: Alongside = _nothing_alongside,
        keep: Callable[[Results], None] = _keep_in_memory,
    ) -> Results:
        """Go through all steps.

        Args:
            upload: step 3, whatever it takes.
            keep: puts verified results on disk. Countersigning says that this party has them: the others may leave.

        Raises:
            VerificationError: instance, manifest or receipt are not what they must be; nothing is released.
            ProtocolError, TransportError: the enclave misbehaves, or went away.
        """
        instance = self.verify_instance(session)
        self._check_not_left(instance)
        signature = self.approval or self.key.sign(APPROVAL_LABEL, approval_message(self.job_id))
        session.request("approve", {"signature": signature})
        upload()
        manifest = self._await_manifest(session, instance, brought, on_missing)
        follower = self.follower(instance, manifest.sha256)
        consent = follower.consent(session)
        if consent is not None:
            self._release_keys(session, instance, brought, manifest, consent)
            follower.keep_share(session, consent.start)
        with alongside() as check:
            self._follow(session, follower, on_event, check)
        return self._take_results(session, instance, follower, keep)

    @property
    def memory_file(self) -> Path:
        """See `party.memory`."""
        return self.memory.with_suffix(".memory")

    def follower(self, instance: VerifiedInstance, manifest_sha256: bytes) -> Follower:
        return Follower(
            job_id=self.job_id,
            name=self.name,
            key=self.key,
            parties=self.parties,
            quorum=self.quorum or len(self.parties),
            manifest_sha256=manifest_sha256,
            instance_id=instance.id,
            signing_key=instance.signing_key,
            hpke_key=instance.hpke_key,
            memory=Memory(self.memory_file, manifest_sha256),
            accept=self.accept,
            clock=self.clock,
        )

    def _check_not_left(self, instance: VerifiedInstance) -> None:
        """Say nothing to an instance that this party has left for a later one."""
        if self.memory.exists():
            follower = self.follower(instance, hashlib.sha256(self.memory.read_bytes()).digest())
            state = follower.memory.read()
            if instance.id != state.current and state.signing_key(instance.id) is not None:
                follower.check()

    def verify_instance(self, session: Requests) -> VerifiedInstance:
        """Step 1."""
        nonce = secrets.token_bytes(32)
        fields = Fields(session.request("instance", {"nonce": nonce}), "instance")
        instance_id = fields.blob("instance_id", size=16)
        signing_key = fields.blob("signing_key", size=32)
        hpke_key = fields.blob("hpke_key")
        evidence = Evidence.from_bytes(fields.blob("evidence", max_size=8 << 20))
        expected = instance_report_data(
            job_id=self.job_id, instance_id=instance_id, signing_key=signing_key, hpke_key=hpke_key, nonce=nonce
        )
        claims = verify(evidence, self.policy, expected, self.clock(), allow_simulated=self.allow_simulated)
        require_confidential(claims, allowed=self.allow_not_confidential)
        return VerifiedInstance(id=instance_id, signing_key=signing_key, hpke_key=hpke_key, claims=claims)

    def _await_manifest(
        self,
        session: Requests,
        instance: VerifiedInstance,
        brought: Contribution,
        on_missing: Callable[[list[str]], None],
    ) -> Manifest:
        while True:
            fields = Fields(session.request("manifest", {"wait_ms": WAIT_MS}), "manifest reply")
            encoded = fields.blob("manifest", max_size=4 << 20)
            if encoded:
                break
            on_missing([str(name) for name in fields.items("missing", max_items=4096)])
        manifest = Manifest.from_bytes(encoded)
        own = dict(brought.commitments)
        manifest.check(job_id=self.job_id, claims=instance.claims, party=self.name, own=own, parties=self.parties)
        self._remember(encoded)
        return manifest

    def _remember(self, manifest: bytes) -> None:
        """Keep the one manifest of this job; another one, from whatever instance, is refused.

        Data keys given for two manifests would let the others train twice, with and without some bundle, and learn
        from the difference.
        """
        if self.memory.exists():
            if self.memory.read_bytes() != manifest:
                raise VerificationError(
                    "manifest-changed",
                    "this party has signed another manifest for this job before",
                    where=str(self.memory),
                    hint="a job is trained once, on the bundles first agreed on; for other bundles make another job",
                )
            return
        write_durably(self.memory, manifest)

    def _release_keys(
        self,
        session: Requests,
        instance: VerifiedInstance,
        brought: Contribution,
        manifest: Manifest,
        consent: Consent,
    ) -> None:
        digest = manifest.sha256
        wrapped = {
            kind: wrap(
                instance.hpke_key,
                key.reveal(),
                wrap_info(manifest_sha256=digest, instance_id=instance.id, party=self.name, kind=kind),
            )
            for kind, key in brought.data_keys.items()
        }
        message = keys_message(manifest_sha256=digest, instance_id=instance.id, wrapped=wrapped)
        session.request(
            "keys",
            {
                "manifest_signature": self.key.sign(MANIFEST_LABEL, digest),
                "wrapped": wrapped,
                "signature": self.key.sign(KEYS_LABEL, message),
                "start": consent.start.to_bytes(),
                "share_from": consent.share_from,
                "share": consent.share,
            },
        )

    def _follow(
        self,
        session: Requests,
        follower: Follower,
        on_event: Callable[[dict[str, Any]], None],
        check: Callable[[], None],
    ) -> None:
        seen, phase = 0, ""
        while phase != "finished":
            body = {"after": seen, "committed": follower.committed, "wait_ms": WAIT_MS}
            fields = Fields(session.request("watch", body), "watch reply")
            follower.check()
            check()
            if checkpoint := fields.blob("checkpoint"):
                follower.sign(session, checkpoint)
            if certificate := fields.blob("certificate", max_size=1 << 20):
                follower.note(certificate)
            events = fields.items("events", max_items=4096)
            phase = fields.text("phase") if len(events) < 256 else ""
            seen += len(events)
            for event in events:
                if isinstance(event, dict):
                    on_event(event)

    def _take_results(
        self, session: Requests, instance: VerifiedInstance, follower: Follower, keep: Callable[[Results], None]
    ) -> Results:
        fields = Fields(session.request("result", {}), "result")
        declared = _json_object(fields.blob("declared", max_size=64 << 20))
        scores = {str(k): str(v) for k, v in fields.table("scores").items()}
        adapter = self._fetch_adapter(session, fields.table("adapter"))
        receipt = Receipt.from_bytes(fields.blob("receipt", max_size=64 << 20))
        self._check_instance(instance, receipt)
        self._check_receipt(receipt, complete=False)
        follower.check_history(receipt)
        _check_contents(json.loads(receipt.body), declared, adapter)
        results = Results(
            declared=declared,
            scores=scores,
            adapter=adapter,
            receipt=receipt,
            complete=False,
            claims=instance.claims,
        )
        keep(results)
        self._countersign(session, receipt)
        receipt, complete = self._await_countersignatures(session, receipt.body_sha256)
        return replace(results, receipt=receipt, complete=complete)

    def accept_kept(
        self, receipt: Receipt, declared: dict[str, Any], scores: dict[str, str], adapter: dict[str, bytes]
    ) -> Results:
        """Results that an earlier start has kept: checked as they were then, but for the instance, which is gone.

        Raises:
            VerificationError, ProtocolError: they are not of this job and manifest, or do not belong together.
            OSError: the manifest that this party has signed cannot be read.
        """
        body = self._check_body(receipt)
        verdict = self._check_receipt(receipt, complete=False)
        _check_contents(body, declared, adapter)
        if verdict.claims is None:
            raise VerificationError("receipt", "nobody vouches for the instance", where="receipt")
        return Results(
            declared=declared,
            scores=scores,
            adapter=adapter,
            receipt=receipt,
            complete=verdict.passed,
            claims=verdict.claims,
        )

    def complete(self, session: Requests, kept: Results) -> Results:
        """`kept` with all countersignatures, if an earlier instance had them and ended before it told this party.

        Raises:
            ProtocolError, VerificationError: what the enclave sends is not that.
        """
        receipt = kept.receipt
        reply = Fields(session.request("countersignatures", {"body_sha256": receipt.body_sha256}), "countersignatures")
        found = reply.table("countersignatures")
        reply.end()
        if not found:
            return kept
        for party, entry in found.items():
            at, signature = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
            if not isinstance(at, int) or not isinstance(signature, bytes):
                raise ProtocolError("a countersignature is malformed", where="enclave")
            receipt = receipt.countersigned(str(party), at, signature)
        self._check_receipt(receipt, complete=True)
        return replace(kept, receipt=receipt, complete=True)

    def _await_countersignatures(self, session: Requests, body_sha256: bytes) -> tuple[Receipt, bool]:
        """(receipt, whether all parties have countersigned it) once they have, or after COUNTERSIGN_WAIT_S."""
        deadline = time.monotonic() + COUNTERSIGN_WAIT_S
        while True:
            reply = Fields(session.request("receipt", {"wait_ms": WAIT_MS}), "receipt reply")
            receipt = Receipt.from_bytes(reply.blob("receipt", max_size=64 << 20))
            complete = reply.boolean("complete")
            if complete or time.monotonic() > deadline:
                break
        if receipt.body_sha256 != body_sha256:
            raise VerificationError("receipt-body", "the receipt changed after this party signed it", where="receipt")
        self._check_receipt(receipt, complete=complete)
        return receipt, complete

    def _check_instance(self, instance: VerifiedInstance, receipt: Receipt) -> None:
        """A party vouches for the very instance that it has verified live."""
        if (receipt.instance.id, receipt.instance.signing_key) != (instance.id, instance.signing_key):
            raise VerificationError("receipt-instance", "the receipt is of another instance", where="receipt")
        self._check_body(receipt)

    def _check_body(self, receipt: Receipt) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(receipt.body)
        if body.get("job_id") != self.job_id or body.get("manifest") != self.memory.read_bytes().hex():
            raise VerificationError("receipt-manifest", "the receipt is of another job or manifest", where="receipt")
        return body

    def _fetch_adapter(self, session: Requests, sizes: Mapping[str, object]) -> dict[str, bytes]:
        """The released files, piece by piece. The receipt, not the enclave's word, decides whether they are right."""
        if sizes and set(sizes) != {CONFIG, WEIGHTS}:
            raise ProtocolError("the adapter is not one weights file and one configuration", where="result")
        files = {}
        for name, size in sizes.items():
            if not isinstance(size, int) or not 0 < size <= MAX_ADAPTER_BYTES:
                raise ProtocolError("an adapter file has an impossible size", where="result")
            content = bytearray()
            while len(content) < size:
                reply = Fields(session.request("adapter", {"name": name, "offset": len(content)}), "adapter reply")
                piece = reply.blob("data", max_size=size - len(content))
                if not piece:
                    raise ProtocolError("an adapter file ends early", where="result")
                content += piece
            files[name] = bytes(content)
        return files

    def _countersign(self, session: Requests, receipt: Receipt) -> None:
        at = int(self.clock())
        signature = self.key.sign(COUNTERSIGN_LABEL, countersign_message(receipt, at))
        session.request("countersign", {"time": at, "signature": signature})

    def _check_receipt(self, receipt: Receipt, *, complete: bool) -> Verdict:
        verdict = verify_receipt(
            receipt.to_bytes(), policy=self.policy, adapter_sha256=None, allow_simulated=self.allow_simulated
        )
        failed = [c for c in verdict.checks if not c.passed and (complete or c.name != "countersignatures")]
        if failed:
            raise VerificationError("receipt", f"{failed[0].name}: {failed[0].reason}", where="receipt")
        return verdict


def _check_contents(body: Mapping[str, Any], declared: Mapping[str, Any], adapter: Mapping[str, Any]) -> None:
    """What came with the receipt is what the receipt speaks of."""
    if declared.get("results") != body.get("metrics"):
        raise VerificationError("receipt-metrics", "the metrics are not those of the receipt", where="receipt")
    if not adapter:
        return
    if file_hashes(adapter) != body.get("adapter_files"):
        raise VerificationError("receipt-adapter", "the adapter is not the one in the receipt", where="receipt")


def _json_object(unverified: bytes) -> dict[str, Any]:
    try:
        content = json.loads(unverified)
    except (ValueError, RecursionError) as exc:
        raise ProtocolError("the declared metrics are not JSON", where="result") from exc
    if not isinstance(content, dict):
        raise ProtocolError("the declared metrics are not an object", where="result")
    return content
