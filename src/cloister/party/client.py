"""A party's side of a job, step by step, over an attested session.

1. verify the enclave's instance keys against the party's own policy
2. approve the job
3. send the bundles (what has arrived before is not sent again)
4. wait for the manifest, check it, sign it
5. release the data keys to this instance, for this manifest
6. follow the training
7. take results, verify the receipt, countersign it
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from cloister.agreement import (
    APPROVAL_LABEL,
    KEYS_LABEL,
    MANIFEST_LABEL,
    Manifest,
    approval_message,
    keys_message,
    wrap_info,
)
from cloister.agreement.receipt import COUNTERSIGN_LABEL, Receipt, countersign_message, verify_receipt
from cloister.attest.binding import instance_report_data
from cloister.attest.claims import Claims
from cloister.attest.evidence import Evidence
from cloister.attest.policy import AppraisalPolicy
from cloister.attest.verify import verify
from cloister.crypto.encoding import Fields
from cloister.crypto.hpke import wrap
from cloister.crypto.keys import PartyKey
from cloister.errors import ProtocolError, VerificationError
from cloister.party.bundles import SealedParty

WAIT_MS = 15_000


class Requests(Protocol):
    """An attested session with the enclave."""

    def request(self, method: str, body: dict[str, Any]) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class VerifiedInstance:
    """An enclave instance whose keys are bound to evidence that this party's policy accepted."""

    id: bytes
    signing_key: bytes
    hpke_key: bytes
    claims: Claims


@dataclass(frozen=True, kw_only=True)
class Results:
    """What a party has at the end. `adapter` is empty unless the job releases it to this party."""

    declared: dict[str, Any]
    scores: dict[str, str]
    adapter: dict[str, bytes]
    receipt: Receipt
    claims: Claims


@dataclass(kw_only=True)
class PartyClient:
    """One party in one job."""

    job_id: str
    name: str
    key: PartyKey
    parties: Mapping[str, bytes]
    policy: AppraisalPolicy
    allow_simulated: bool
    clock: Callable[[], float] = time.time

    def take_part(
        self,
        session: Requests,
        sealed: SealedParty,
        *,
        upload: Callable[[], None],
        on_missing: Callable[[list[str]], None],
        on_event: Callable[[dict[str, Any]], None],
    ) -> Results:
        """Go through all steps.

        Raises:
            VerificationError: instance, manifest or receipt are not what they must be; nothing is released.
            ProtocolError, TransportError: the enclave misbehaves, or went away.
        """
        instance = self.verify_instance(session)
        signature = self.key.sign(APPROVAL_LABEL, approval_message(self.job_id))
        session.request("approve", {"signature": signature})
        upload()
        manifest = self._await_manifest(session, instance, sealed, on_missing)
        self._release_keys(session, instance, sealed, manifest)
        self._follow(session, on_event)
        return self._take_results(session, instance)

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
        return VerifiedInstance(id=instance_id, signing_key=signing_key, hpke_key=hpke_key, claims=claims)

    def _await_manifest(
        self,
        session: Requests,
        instance: VerifiedInstance,
        sealed: SealedParty,
        on_missing: Callable[[list[str]], None],
    ) -> Manifest:
        while True:
            fields = Fields(session.request("manifest", {"wait_ms": WAIT_MS}), "manifest reply")
            encoded = fields.blob("manifest", max_size=4 << 20)
            if encoded:
                break
            on_missing([str(name) for name in fields.items("missing", max_items=4096)])
        manifest = Manifest.from_bytes(encoded)
        own = {kind: bundle.commitment for kind, bundle in sealed.bundles.items()}
        manifest.check(job_id=self.job_id, claims=instance.claims, party=self.name, own=own, parties=self.parties)
        return manifest

    def _release_keys(
        self, session: Requests, instance: VerifiedInstance, sealed: SealedParty, manifest: Manifest
    ) -> None:
        digest = manifest.sha256
        wrapped = {
            kind: wrap(
                instance.hpke_key,
                key.reveal(),
                wrap_info(manifest_sha256=digest, instance_id=instance.id, party=self.name, kind=kind),
            )
            for kind, key in sealed.data_keys.items()
        }
        message = keys_message(manifest_sha256=digest, instance_id=instance.id, wrapped=wrapped)
        session.request(
            "keys",
            {
                "manifest_signature": self.key.sign(MANIFEST_LABEL, digest),
                "wrapped": wrapped,
                "signature": self.key.sign(KEYS_LABEL, message),
            },
        )

    def _follow(self, session: Requests, on_event: Callable[[dict[str, Any]], None]) -> None:
        seen, phase = 0, ""
        while phase != "finished":
            fields = Fields(session.request("watch", {"after": seen, "wait_ms": WAIT_MS}), "watch reply")
            events = fields.items("events", max_items=4096)
            phase = fields.text("phase") if len(events) < 256 else ""
            seen += len(events)
            for event in events:
                if isinstance(event, dict):
                    on_event(event)

    def _take_results(self, session: Requests, instance: VerifiedInstance) -> Results:
        fields = Fields(session.request("result", {}), "result")
        declared = _json_object(fields.blob("declared", max_size=64 << 20))
        scores = {str(k): str(v) for k, v in fields.table("scores").items()}
        adapter = fields.table("adapter")
        if not all(isinstance(content, bytes) for content in adapter.values()):
            raise ProtocolError("the adapter's files are not bytes", where="result")
        receipt = Receipt.from_bytes(fields.blob("receipt", max_size=64 << 20))
        self._countersign(session, instance, receipt)
        complete = False
        while not complete:
            reply = Fields(session.request("receipt", {"wait_ms": WAIT_MS}), "receipt reply")
            receipt = Receipt.from_bytes(reply.blob("receipt", max_size=64 << 20))
            complete = reply.boolean("complete")
        self._check_receipt(receipt, complete=True)
        return Results(declared=declared, scores=scores, adapter=adapter, receipt=receipt, claims=instance.claims)

    def _countersign(self, session: Requests, instance: VerifiedInstance, receipt: Receipt) -> None:
        """Vouch for the receipt of the very instance that this party verified live."""
        if (receipt.instance.id, receipt.instance.signing_key) != (instance.id, instance.signing_key):
            raise VerificationError("receipt-instance", "the receipt is of another instance", where="receipt")
        self._check_receipt(receipt, complete=False)
        at = int(self.clock())
        signature = self.key.sign(COUNTERSIGN_LABEL, countersign_message(receipt, at))
        session.request("countersign", {"time": at, "signature": signature})

    def _check_receipt(self, receipt: Receipt, *, complete: bool) -> None:
        verdict = verify_receipt(
            receipt.to_bytes(), policy=self.policy, adapter_sha256=None, allow_simulated=self.allow_simulated
        )
        failed = [c for c in verdict.checks if not c.passed and (complete or c.name != "countersignatures")]
        if failed:
            raise VerificationError("receipt", f"{failed[0].name}: {failed[0].reason}", where="receipt")


def _json_object(unverified: bytes) -> dict[str, Any]:
    try:
        content = json.loads(unverified)
    except (ValueError, RecursionError) as exc:
        raise ProtocolError("the declared metrics are not JSON", where="result") from exc
    if not isinstance(content, dict):
        raise ProtocolError("the declared metrics are not an object", where="result")
    return content
