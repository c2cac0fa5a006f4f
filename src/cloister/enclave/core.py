"""What the enclave knows and does between its first message and its last, without I/O.

    collecting   parties approve the job and send bundles
    agreeing     all bundles are here: parties sign the manifest, consent to where training goes on from, release
                 their data keys, and keep a share of this instance's sealing key
    training     all that is here; parties sign checkpoints
    finished     results, adapter and receipt are ready; queries are answered
    failed       something of the above could not be done; every party is told what

`handle` answers one request of one authenticated party. It is called from several threads; the training thread
waits in `wait_for_keys`, goes on from what `restore` returns, and hands results to `finish`. No answer to a party
depends on another party's data except for the metrics that the job declares.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cloister.agreement import (
    APPROVAL_LABEL,
    KEYS_LABEL,
    MANIFEST_LABEL,
    Manifest,
    approval_message,
    keys_message,
    wrap_info,
)
from cloister.agreement.checkpoint import Start, lineage_nonce, share_info
from cloister.agreement.receipt import Receipt
from cloister.attest.attester import Attester
from cloister.attest.binding import instance_report_data
from cloister.attest.claims import Claims
from cloister.attest.evidence import Evidence
from cloister.attest.verify import MAX_CLOCK_SKEW_S
from cloister.crypto.encoding import Fields
from cloister.crypto.hpke import HpkeKey
from cloister.crypto.keys import DATA_KEY_BYTES, DataKey, PartyKey, verify_signature
from cloister.enclave.checkpoints import CheckpointFolder
from cloister.enclave.intake import Handler, Intake
from cloister.enclave.lineage import InstanceEntry, Lineage
from cloister.enclave.results import Outcome, ResultDesk, wait_s
from cloister.errors import CloisterError, ProtocolError, RunError, VerificationError
from cloister.report.outputs import EnclaveReport

Phase = Literal["collecting", "agreeing", "training", "finished", "failed"]


@dataclass(kw_only=True)
class _PartyState:
    public_key: bytes
    approval: bytes | None = None
    manifest_signature: bytes | None = None
    data_keys: dict[str, DataKey] = field(default_factory=dict)
    left: bool = False


def _seconds_since_boot() -> float:
    """A clock that nobody sets. It goes on while the machine sleeps, where the system has such a one."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class EnclaveCore:
    """One instance for one job.

    Args:
        parties: Public keys by name, from the job.
        intake: What each party brings before training.
        claims: What this enclave's own evidence says, by the job's policy.
        recipients: Parties that get the adapter.
        checkpoints: Where sealed states are, perhaps of an earlier instance.
        quorum: How many parties must sign a checkpoint, and how many of their shares open it.
        query: Answers split-inference requests: (party, method, body) -> body.
        handlers: Further requests, of the job's method.
    """

    def __init__(
        self,
        *,
        job_id: str,
        parties: Mapping[str, bytes],
        intake: Intake,
        attester: Attester,
        claims: Claims,
        recipients: frozenset[str],
        checkpoints: CheckpointFolder,
        quorum: int,
        query: Callable[[str, str, Fields], dict[str, Any]],
        handlers: Mapping[str, Handler] | None = None,
        clock: Callable[[], float] = time.time,
        steady: Callable[[], float] = _seconds_since_boot,
    ) -> None:
        self.job_id = job_id
        self.kinds = intake.kinds
        self.instance_id = secrets.token_bytes(16)
        self.signing_key = PartyKey.generate()
        self.hpke_key = HpkeKey.generate()
        self.claims = claims
        self.phase: Phase = "collecting"
        self.manifest: Manifest | None = None
        self._parties = {name: _PartyState(public_key=key) for name, key in parties.items()}
        self._intake = intake
        self._attester = attester
        self._query = query
        self._clock, self._steady = clock, steady
        self._began = clock(), steady()
        self._events: list[dict[str, Any]] = []
        self._failure: CloisterError | None = None
        self.concluded: EnclaveReport | None = None
        """Of a job that an earlier instance has brought to its end."""
        self._news = threading.Condition()
        self.lineage = Lineage(
            job_id=job_id,
            parties=parties,
            quorum=quorum,
            instance_id=self.instance_id,
            signing_key=self.signing_key,
            folder=checkpoints,
            news=self._news,
        )
        self._desk = ResultDesk(parties, recipients, self._news)
        self._methods: dict[str, Handler] = {
            "instance": self._instance,
            "approve": self._approve,
            "manifest": self._manifest,
            "start": self._start,
            "keys": self._keys,
            "share": self._share,
            "kept": self._kept,
            "checkpoint": self._checkpoint,
            "watch": self._watch,
            "countersignatures": self._countersignatures,
            "leave": self._leave,
            **(handlers or {}),
        }

    @property
    def outcome(self) -> Outcome | None:
        """None until the phase is "finished"."""
        return self._desk.outcome

    # For parties ----------------------------------------------------------------------------------------------------

    def handle(self, party: str, method: str, body: dict[str, Any]) -> dict[str, Any]:
        """Answer a request of `party`, whom the session has authenticated. The body is unverified.

        Raises:
            ProtocolError: no such request, or not now.
            VerificationError: a signature or a wrapped key does not hold.
        """
        fields = Fields(body, f"request {method!r} of {party}")
        if method.startswith("query."):
            if self.phase != "finished":
                raise ProtocolError("the model is not trained yet", where=party, hint="wait for the job to finish")
            return self._query(party, method, fields)
        if method in self._desk.handlers:
            with self._news:
                self._raise_failure(party)
            return self._desk.handlers[method](party, fields)
        if method not in self._methods:
            raise ProtocolError(f"there is no request {method!r}", where=party)
        return self._methods[method](party, fields)

    def _instance(self, party: str, fields: Fields) -> dict[str, Any]:
        nonce = fields.blob("nonce", size=32)
        fields.end()
        return {
            "instance_id": self.instance_id,
            "signing_key": self.signing_key.public,
            "hpke_key": self.hpke_key.public,
            "evidence": self.evidence(nonce).to_bytes(),
            "kinds": list(self.kinds),
        }

    def _approve(self, party: str, fields: Fields) -> dict[str, Any]:
        signature = fields.blob("signature", size=64)
        fields.end()
        state = self._parties[party]
        verify_signature(state.public_key, APPROVAL_LABEL, approval_message(self.job_id), signature, where=party)
        with self._news:
            state.approval = signature
            self._news.notify_all()
        return {}

    def _manifest(self, party: str, fields: Fields) -> dict[str, Any]:
        wait = wait_s(fields)
        fields.end()
        with self._news:
            self._news.wait_for(lambda: self._try_manifest() or self._failure is not None, wait)
            self._raise_failure(party)
            if self.manifest is None:
                return {"manifest": b"", "missing": self._missing()}
            return {"manifest": self.manifest.to_bytes(), "missing": []}

    def _start(self, party: str, fields: Fields) -> dict[str, Any]:
        certificate = fields.blob("certificate", max_size=1 << 20)
        fields.end()
        with self._news:
            if self.manifest is None:
                raise ProtocolError("the start is asked for before the manifest", where=party)
            return self.lineage.offer(party, certificate)

    def _keys(self, party: str, fields: Fields) -> dict[str, Any]:
        manifest_signature = fields.blob("manifest_signature", size=64)
        wrapped = fields.table("wrapped")
        signature = fields.blob("signature", size=64)
        start = Start.from_bytes(fields.blob("start", max_size=1024))
        share_from, wrapped_share = fields.blob("share_from", max_size=16), fields.blob("share", max_size=4096)
        fields.end()
        if self.manifest is None:
            raise ProtocolError("data keys came before the manifest", where=party)
        if set(wrapped) != set(self._intake.sealed_kinds) or not all(isinstance(w, bytes) for w in wrapped.values()):
            kinds = ", ".join(self._intake.sealed_kinds) or "nothing"
            raise ProtocolError(f"data keys must come for {kinds}", where=party)
        state, digest = self._parties[party], self.manifest.sha256
        verify_signature(state.public_key, MANIFEST_LABEL, digest, manifest_signature, where=party)
        message = keys_message(manifest_sha256=digest, instance_id=self.instance_id, wrapped=wrapped)
        verify_signature(state.public_key, KEYS_LABEL, message, signature, where=party)
        data_keys = {kind: self._unwrap(party, kind, digest, blob) for kind, blob in wrapped.items()}
        share = None
        if wrapped_share:
            info = share_info(manifest_sha256=digest, instance_id=self.instance_id, made_by=share_from, party=party)
            share = self.hpke_key.unwrap(wrapped_share, info)
        with self._news:
            self.lineage.check_consent(party, start, share_from, share)
            self.lineage.consent(party, start, share)
            state.manifest_signature, state.data_keys = manifest_signature, data_keys
            self._news.notify_all()
        return {}

    def _share(self, party: str, fields: Fields) -> dict[str, Any]:
        wait = wait_s(fields)
        fields.end()
        with self._news:
            self._news.wait_for(lambda: self.lineage.all_consent or self._failure is not None, wait)
            self._raise_failure(party)
            return self.lineage.share_of(party)

    def _kept(self, party: str, fields: Fields) -> dict[str, Any]:
        signature = fields.blob("signature", size=64)
        fields.end()
        with self._news:
            self.lineage.keep(party, signature)
            self._news.notify_all()
        return {}

    def _checkpoint(self, party: str, fields: Fields) -> dict[str, Any]:
        number = fields.integer("number", low=1, high=2**31)
        signature = fields.blob("signature", size=64)
        fields.end()
        with self._news:
            self.lineage.sign(party, number, signature)
            self._news.notify_all()
        return {}

    def _unwrap(self, party: str, kind: str, manifest_sha256: bytes, wrapped: bytes) -> DataKey:
        info = wrap_info(manifest_sha256=manifest_sha256, instance_id=self.instance_id, party=party, kind=kind)
        secret = self.hpke_key.unwrap(wrapped, info)
        if len(secret) != DATA_KEY_BYTES:
            raise VerificationError("unwrap", f"the {kind} data key has a wrong length", where=party)
        return DataKey(secret)

    def _watch(self, party: str, fields: Fields) -> dict[str, Any]:
        after = fields.integer("after", low=0, high=2**31)
        committed = fields.integer("committed", low=0, high=2**31)
        wait = wait_s(fields)
        fields.end()
        with self._news:
            self._news.wait_for(lambda: self._has_news(party, after, committed), wait)
            self._raise_failure(party)
            return {
                "phase": self.phase,
                "events": self._events[after : after + 256],
                "checkpoint": self.lineage.to_sign(party),
                "certificate": self.lineage.certificate_after(committed),
            }

    def _has_news(self, party: str, after: int, committed: int) -> bool:
        ended = self.phase in ("finished", "failed")
        return ended or len(self._events) > after or self.lineage.has_news(party, committed)

    def _countersignatures(self, party: str, fields: Fields) -> dict[str, Any]:
        """All parties' under a receipt of an earlier instance that ended before this party heard of them."""
        body = fields.blob("body_sha256", size=32).hex()
        fields.end()
        found = self.concluded
        known = found.countersignatures if found is not None and found.receipt_body_sha256 == body else {}
        return {"countersignatures": {n: [c.time, bytes.fromhex(c.signature)] for n, c in known.items()}}

    def _leave(self, party: str, fields: Fields) -> dict[str, Any]:
        fields.end()
        with self._news:
            self._parties[party].left = True
            self._news.notify_all()
        return {}

    # For the training thread ----------------------------------------------------------------------------------------

    def evidence(self, nonce: bytes) -> Evidence:
        """Fresh evidence that binds this instance's keys to the job and to a verifier's nonce."""
        return self._attester.collect(
            instance_report_data(
                job_id=self.job_id,
                instance_id=self.instance_id,
                signing_key=self.signing_key.public,
                hpke_key=self.hpke_key.public,
                nonce=nonce,
            )
        )

    def wait_for_keys(self, timeout_s: float, on_change: Callable[[list[str]], None]) -> None:
        """Return when every party's data keys are here; the phase is then "training".

        Raises:
            ProtocolError: not all parties came in time; names those missing.
        """
        deadline = time.monotonic() + timeout_s
        with self._news:
            while missing := self._missing():
                on_change(missing)
                if not self._news.wait(min(1.0, max(0.0, deadline - time.monotonic()))) and time.monotonic() > deadline:
                    raise ProtocolError(
                        f"still missing: {', '.join(missing)}", where="enclave", hint="start these parties"
                    )
                self._try_manifest()
            self.phase = "training"
            self._news.notify_all()

    def check_clock(self) -> None:
        """Before a time is attested: sessions have compared clocks at their beginning only.

        Raises:
            RunError: the machine's clock was set since this instance began, by more than clocks may differ.
        """
        by = (self._clock() - self._began[0]) - (self._steady() - self._began[1])
        if abs(by) > MAX_CLOCK_SKEW_S:
            raise RunError(
                f"the machine's clock was set {'forward' if by > 0 else 'back'} by {abs(by):.0f} seconds meanwhile",
                where="enclave",
                hint="set it right and start the enclave and the parties again: they go on from the last checkpoint",
            )

    def restore(self) -> bytes | None:
        """The state of training that all parties have consented to go on from; None at the beginning.

        Raises:
            VerificationError: "sealed", "share". RunError: see `check_clock`.
        """
        self.check_clock()
        if self.manifest is None:
            raise RuntimeError("there is nothing to restore before the manifest")
        entry = InstanceEntry(
            id=self.instance_id,
            signing_key=self.signing_key.public,
            hpke_key=self.hpke_key.public,
            evidence=self.evidence(lineage_nonce(self.manifest.sha256)).to_bytes(),
            time=int(self._clock()),
        )
        return self.lineage.restore(entry)

    def wait_for_commit(self, timeout_s: float) -> bool:
        """Whether a quorum has signed the newest checkpoint within the time."""
        with self._news:
            return self._news.wait_for(self.lineage.is_committed, timeout_s)

    def history(self) -> dict[str, Any]:
        """For the receipt: see `agreement.history`."""
        with self._news:
            return self.lineage.to_receipt()

    def checkpoints_so_far(self) -> dict[str, int]:
        """How many there are, how many of them a quorum has signed, and how often training was restarted."""
        with self._news:
            return self.lineage.counts()

    def data_keys(self) -> dict[str, Mapping[str, DataKey]]:
        """By party and kind, in the order of the job."""
        return {name: state.data_keys for name, state in self._parties.items()}

    def approvals(self) -> dict[str, bytes]:
        return {name: state.approval for name, state in self._parties.items() if state.approval is not None}

    def manifest_signatures(self) -> dict[str, bytes]:
        return {name: state.manifest_signature for name, state in self._parties.items() if state.manifest_signature}

    def announce(self, event: dict[str, Any]) -> None:
        """Tell all parties something that the job declares (a step's loss, a validation result)."""
        with self._news:
            self._events.append(event)
            self._news.notify_all()

    def finish(self, outcome: Outcome, on_complete: Callable[[Receipt], None] = lambda receipt: None) -> None:
        """Hand over results; the phase is then "finished".

        Args:
            on_complete: called when the last party has countersigned, before any party is told so.
        """
        with self._news:
            self._desk.outcome, self._desk.on_complete, self.phase = outcome, on_complete, "finished"
            self._news.notify_all()

    def fail(self, error: CloisterError) -> None:
        """Tell every party why the job ended without a result."""
        with self._news:
            self._failure, self.phase = error, "failed"
            self._news.notify_all()

    def wait_until_left(self, timeout_s: float | None) -> bool:
        """Whether all parties have left within the time."""
        with self._news:
            return self._news.wait_for(lambda: all(s.left for s in self._parties.values()), timeout_s)

    def wait_forever(self) -> None:
        """Return only by an exception, such as an interrupt."""
        while True:
            with self._news:
                self._news.wait(3600.0)

    # State ----------------------------------------------------------------------------------------------------------

    def _here(self, party: str, kind: str) -> bool:
        return self._intake.commitment(party, kind) is not None

    def _try_manifest(self) -> bool:
        """Make the manifest once all approvals and bundles are here. Called with the lock held."""
        if self.manifest is None and not any(s.approval is None for s in self._parties.values()):
            commitments = {
                name: {kind: c for kind in self.kinds if (c := self._intake.commitment(name, kind)) is not None}
                for name in self._parties
            }
            if any(len(own) < len(self.kinds) for own in commitments.values()):
                return False
            manifest = Manifest(
                job_id=self.job_id,
                policy_sha256=self.claims.policy_sha256,
                attester=self.claims.type,
                registers=self.claims.registers,
                bundles=commitments,
            )
            self.lineage.begin(manifest.sha256)
            self.manifest = manifest
            self.phase = "agreeing"
            self._news.notify_all()
        return self.manifest is not None

    def _missing(self) -> list[str]:
        """What the job still waits for, in words: "NAME (what)"."""
        missing, sealed = [], bool(self._intake.sealed_kinds)
        for name, state in self._parties.items():
            if state.approval is None:
                missing.append(f"{name} (approval)")
            elif absent := [kind for kind in self.kinds if not self._here(name, kind)]:
                missing.append(f"{name} ({', '.join(absent)} {'bundle' if sealed else 'commitment'})")
            elif state.manifest_signature is None:
                missing.append(f"{name} ({'data keys' if sealed else 'signed manifest'})")
            elif needed := self.lineage.missing(name):
                missing.append(f"{name} ({needed})")
        return missing

    def _raise_failure(self, party: str) -> None:
        """Tell a party why the job has failed; there is nothing else it could wait for. Called with the lock held."""
        if self._failure is not None:
            self._parties[party].left = True
            self._news.notify_all()
            raise self._failure
