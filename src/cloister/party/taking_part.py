"""What every party does around its part of a job, whatever the method: enter, come back, keep the results, report."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from cloister.agreement.approval import Approval
from cloister.agreement.job import OpenJob, open_job
from cloister.attest.attester import Attester
from cloister.attest.claims import Claims
from cloister.attest.evidence import Evidence
from cloister.attest.production import require_confidential, require_listed_measurements
from cloister.attest.verify import verify
from cloister.channel.client import connect
from cloister.channel.handshake import Initiator
from cloister.channel.rpc import Session
from cloister.crypto.keys import PartyKey
from cloister.crypto.sealing import write_durably
from cloister.data.records import Record, load_records
from cloister.errors import TransportError, UsageError
from cloister.jobfile import LoadedJob
from cloister.party.client import PartyClient, Results
from cloister.party.generate import as_trained, prompt_ids
from cloister.progress import Progress, task
from cloister.report.claims import attestation_of
from cloister.report.fits import read_fits
from cloister.report.fits import warnings as fit_warnings
from cloister.report.model import Masking, ReceiptRef, Records, ResultRow, Sample, Truncated, WireBytes
from cloister.report.outputs import JoinReport

RECONNECT_S = 300.0
"""How long a party tries to come back to an enclave that went away."""
ANSWER_TOKENS = 48
"""Length of a sample answer."""
_LOOKED_AT = 200
"""Among how many test records samples are chosen."""


@dataclass(frozen=True, kw_only=True)
class Entering:
    """How a party enters a job.

    Args:
        enclave: its address. approval: made by `cloister sign`; without it the key approves the job here.
        on_open: is shown what this party is about to approve.
        accept_checkpoint: hash of the one checkpoint from which the enclave may go on although this party has seen a
            newer one; that is noted in `out` and in the receipt.
    """

    loaded: LoadedJob
    party: str
    key: PartyKey
    out: Path
    enclave: str
    insecure_simulated: bool
    insecure_not_confidential: bool = False
    approval: Path | None = None
    on_open: Callable[[OpenJob], None] = lambda opened: None
    accept_checkpoint: bytes | None = None
    key_file: Path | None = None
    """Where the key is, for links to accelerators on other machines."""

    def open(self, progress: Progress) -> OpenJob:
        """Read the job and check that this party may take part in it.

        Raises:
            JobError, ModelError, UsageError, VerificationError: it may not, and why.
        """
        opened = open_job(self.loaded, progress=progress)
        require_listed_measurements(opened.policy, address=self.enclave, insecure_simulated=self.insecure_simulated)
        if self.key.public != opened.parties[self.party]:
            hint = "give the right --key file"
            raise UsageError("this key is not the party's key in the job", where=self.party, hint=hint)
        self.on_open(opened)
        if (threads := self.loaded.job.enclave.threads) is not None:
            torch.set_num_threads(threads)
        return opened

    @property
    def is_recipient(self) -> bool:
        """Whether the job releases the adapter to this party."""
        to = self.loaded.job.release.to
        return to != "none" and self.party in to

    def client(self, opened: OpenJob, attester: Attester | None = None) -> PartyClient:
        """The party's side of the protocol; `attester`: of its own TEE, if it has one."""
        approved = None if self.approval is None else Approval.load(self.approval)
        if approved is not None:
            approved.check(job_id=opened.resolved.job_id, party=self.party, public_key=self.key.public)
        return PartyClient(
            job_id=opened.resolved.job_id,
            name=self.party,
            key=self.key,
            parties=opened.parties,
            policy=opened.policy,
            allow_simulated=self.insecure_simulated,
            memory=self.out / "manifest.cbor",
            allow_not_confidential=self.insecure_not_confidential,
            approval=b"" if approved is None else approved.signature,
            quorum=self.loaded.job.quorum,
            accept=self.accept_checkpoint,
            attester=attester,
        )


@dataclass
class Counter:
    """Bytes between a party and the server's enclave."""

    up: int = 0
    down: int = 0

    def add(self, session: Session) -> None:
        """Count a session that has ended."""
        self.up += session.bytes_sent
        self.down += session.bytes_received


def open_session(client: PartyClient, enclave: str, progress: Progress) -> Session:
    """An attested session with the enclave.

    Raises:
        TransportError: it cannot be reached. VerificationError: the party's policy refuses it.
    """

    def appraise(evidence: Evidence, expected: bytes, now: float) -> Claims:
        claims = verify(evidence, client.policy, expected, now, allow_simulated=client.allow_simulated)
        return require_confidential(claims, allowed=client.allow_not_confidential)

    initiator = Initiator(
        job_id=client.job_id,
        party=client.name,
        key=client.key,
        verify_evidence=appraise,
        attester=client.attester,
    )
    with task(progress, "connecting"):
        return connect(enclave, initiator)


def with_reconnect(
    attempt: Callable[[], Results],
    kept: Callable[[], Results | None] = lambda: None,
    *,
    progress: Progress,
) -> Results:
    """Begin again with a new session when the connection is lost; what was sent is not sent again.

    Args:
        kept: what this party has on disk. Where every party has countersigned it, nobody needs to come back; where
            not, it is what there is once the enclave stays away.
    """
    deadline, pause = time.monotonic() + RECONNECT_S, 0.5
    while True:
        begun = time.monotonic()
        try:
            return attempt()
        except TransportError as exc:
            found, now = kept(), time.monotonic()
            if found is not None and found.complete:
                return found
            if now - begun > 60.0:  # it worked for a while: a new loss has its own time
                deadline, pause = now + RECONNECT_S, 0.5
            if now + pause > deadline:
                if found is not None:
                    return found
                raise
            with task(progress, "connection lost, waiting") as waiting:
                waiting.set(0.0, note=f"{exc.message}; tried for {deadline - now:.0f} s more")
                time.sleep(pause)
            pause = min(2 * pause, 15.0)


def show_event(show: Callable[..., None], event: dict[str, Any]) -> None:
    with suppress(KeyError, TypeError, ValueError):
        show(float(event["step"]), total=float(event["num_steps"]), note=f"loss {float(event['train_loss']):.3f}")


def may_ask(opened: OpenJob, party: str) -> bool:
    """Whether the job lets this party query the tuned model."""
    allow = opened.resolved.job.inference.allow
    return allow != "none" and (allow == "all" or party in allow)


def sample_prompts(
    opened: OpenJob, party: str, count: int, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Record, str]]:
    """Some of the party's own test records with their prompts as the model is to see them, for the report."""
    job = opened.resolved.job
    fitting = []
    for record in load_records(opened.resolved.loaded.data_file(party, "test"), job.data.format)[:_LOOKED_AT]:
        if isinstance(record.prompt, str):
            prompt = as_trained(job.data, tokenizer, record.prompt)
            if len(prompt_ids(tokenizer, prompt)) + ANSWER_TOKENS <= job.training.max_tokens:
                fitting.append(record)
    for record in _spread(fitting, count):
        yield record, as_trained(job.data, tokenizer, str(record.prompt))


def sample(party: str, record: Record, answer: str) -> Sample:
    return Sample(party=party, prompt=str(record.prompt), response=answer, reference=record.response)


def write_samples(out: Path, samples: list[Sample]) -> None:
    write_durably(out / "samples.json", json.dumps([s.model_dump() for s in samples], indent=1).encode(), mode=0o666)


def _spread(records: list[Record], count: int) -> list[Record]:
    """Records of different tasks first."""
    by_task: dict[str, list[Record]] = {}
    for record in records:
        by_task.setdefault(record.task, []).append(record)
    rounds = max((len(r) for r in by_task.values()), default=0)
    mixed = [listed[i] for i in range(rounds) for listed in by_task.values() if i < len(listed)]
    return mixed[:count]


def make_report(
    opened: OpenJob,
    party: str,
    results: Results,
    out: Path,
    *,
    records: Mapping[str, int],
    truncated: Mapping[str, int],
    counter: Counter,
    timing: Mapping[str, float],
    masking: Masking | None = None,
    warnings: list[str] | None = None,
) -> JoinReport:
    """What `join` prints, written to OUT/join.json too."""
    receipt, fits = results.receipt.to_bytes(), read_fits(results.declared)
    incomplete = [] if results.complete else [f"{party}: not every party has countersigned the receipt"]
    report = JoinReport(
        job_id=opened.resolved.job_id,
        party=party,
        attestation=attestation_of(results.claims),
        records=Records(**{kind: records.get(kind, 0) for kind in ("train", "validation", "test")}),
        truncated=Truncated(**truncated),
        results=[ResultRow.model_validate_json(json.dumps(row)) for row in results.declared.get("results", [])],
        wire=WireBytes(
            bytes_up=counter.up,
            bytes_down=counter.down,
            activation_dtype=opened.resolved.job.transport.activation_dtype,
        ),
        timing=dict(timing),
        adapter_sha256=json.loads(results.receipt.body)["adapter_sha256"],
        released=bool(results.adapter),
        receipt=ReceiptRef(path=str(out / "receipt.json"), sha256=hashlib.sha256(receipt).hexdigest()),
        masking=masking,
        fits=fits,
        warnings=incomplete + (warnings or []) + fit_warnings(fits),
    )
    write_durably(out / "join.json", report.to_json().encode(), mode=0o666)
    return report
