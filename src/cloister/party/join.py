"""The party process: seal, connect, take part, keep the results."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from cloister.adapters.files import write_adapter
from cloister.agreement.approval import Approval
from cloister.agreement.job import OpenJob, open_job
from cloister.attest.claims import Claims
from cloister.attest.evidence import Evidence
from cloister.attest.production import require_confidential, require_listed_measurements
from cloister.attest.verify import verify
from cloister.channel.client import connect, upload
from cloister.channel.handshake import Initiator
from cloister.channel.rpc import Session
from cloister.crypto.keys import PartyKey
from cloister.data.records import Record, load_records
from cloister.errors import TransportError, UsageError, VerificationError
from cloister.jobfile import LoadedJob
from cloister.model.anatomy import load_model, load_tokenizer, pick_device
from cloister.model.cut import Former
from cloister.party.bundles import SealedParty, seal_party
from cloister.party.client import PartyClient, Results
from cloister.party.generate import as_trained, generate, prompt_ids, stop_ids
from cloister.progress import Progress, Task, task
from cloister.report.claims import attestation_of
from cloister.report.model import ReceiptRef, Records, ResultRow, Sample, Truncated, WireBytes
from cloister.report.outputs import JoinReport

RECONNECT_S = 300.0
"""How long a party tries to come back to an enclave that went away."""


_ANSWER_TOKENS, _LOOKED_AT = 48, 200
"""Length of a sample answer, and among how many test records samples are chosen."""
_QUOTA_SHARE = 10
"""Samples are made only if they use up at most this fraction (1/10) of the party's quota."""


def join_job(
    loaded: LoadedJob,
    party: str,
    key: PartyKey,
    out: Path,
    *,
    enclave: str,
    insecure_simulated: bool,
    progress: Progress,
    samples: int = 0,
    insecure_not_confidential: bool = False,
    approval: Path | None = None,
    on_open: Callable[[OpenJob], None] = lambda opened: None,
    accept_checkpoint: bytes | None = None,
) -> JoinReport:
    """Take part in a job to its end.

    Args:
        out: folder for bundles, scores, receipt and, if the job releases it to this party, the adapter.
        enclave: its address. samples: how many test prompts to answer by split inference at the end.
        approval: made by `cloister sign`; without it the key approves the job here.
        on_open: is shown what this party is about to approve.
        accept_checkpoint: hash of the one checkpoint from which the enclave may go on although this party has seen a
            newer one; that is noted in `out` and in the receipt.

    Raises:
        CloisterError: anything that stops this party; the bundles stay for the next start.
    """
    started = time.monotonic()
    timing: dict[str, float] = {}
    opened = open_job(loaded, progress=progress)
    require_listed_measurements(opened.policy, address=enclave, insecure_simulated=insecure_simulated)
    if key.public != opened.parties[party]:
        raise UsageError("this key is not the party's key in the job", where=party, hint="give the right --key file")
    on_open(opened)
    approved = None if approval is None else Approval.load(approval)
    if approved is not None:
        approved.check(job_id=opened.resolved.job_id, party=party, public_key=key.public)
    device = pick_device(loaded.job.enclave.device)
    if loaded.job.enclave.threads is not None:
        torch.set_num_threads(loaded.job.enclave.threads)
    sealed = seal_party(opened.resolved, party, key, out / "bundles", device=device, progress=progress)
    timing["former layers"] = time.monotonic() - started
    client = PartyClient(
        job_id=opened.resolved.job_id,
        name=party,
        key=key,
        parties=opened.parties,
        policy=opened.policy,
        allow_simulated=insecure_simulated,
        memory=out / "manifest.cbor",
        allow_not_confidential=insecure_not_confidential,
        approval=b"" if approved is None else approved.signature,
        quorum=loaded.job.quorum,
        accept=accept_checkpoint,
    )
    counter = _Counter()
    results = _with_reconnect(
        lambda: _take_part(client, opened, sealed, enclave, insecure_simulated, counter, timing, progress, out, samples)
    )
    report = _report(opened, party, sealed, results, counter, timing, out)
    (out / "join.json").write_text(report.to_json(), encoding="utf-8")
    return report


class _Counter:
    def __init__(self) -> None:
        self.uploaded = 0
        self.session_up = 0
        self.session_down = 0


def _take_part(
    client: PartyClient,
    opened: OpenJob,
    sealed: SealedParty,
    enclave: str,
    insecure_simulated: bool,
    counter: _Counter,
    timing: dict[str, float],
    progress: Progress,
    out: Path,
    samples: int,
) -> Results:
    with open_session(client, enclave) as session:
        try:
            with task(progress, "waiting for the others") as waiting, task(progress, "training") as training:
                results = client.take_part(
                    session,
                    sealed,
                    upload=functools.partial(_upload, enclave, sealed, counter, timing, progress),
                    on_missing=lambda names: waiting.set(0.0, note=", ".join(names)),
                    on_event=lambda event: _show(training.set, event),
                )
            _keep(out, results)
            if samples:
                _answer_samples(session, opened, client.name, samples, out, progress)
            session.request("leave", {})
        finally:
            counter.session_up += session.bytes_sent
            counter.session_down += session.bytes_received
    return results


def open_session(client: PartyClient, enclave: str) -> Session:
    """An attested session with the enclave.

    Raises:
        TransportError: it cannot be reached. VerificationError: the party's policy refuses it.
    """

    def appraise(evidence: Evidence, expected: bytes, now: float) -> Claims:
        claims = verify(evidence, client.policy, expected, now, allow_simulated=client.allow_simulated)
        return require_confidential(claims, allowed=client.allow_not_confidential)

    initiator = Initiator(job_id=client.job_id, party=client.name, key=client.key, verify_evidence=appraise)
    return connect(enclave, initiator)


def _with_reconnect(attempt: Callable[[], Results]) -> Results:
    """Begin again with a new session when the connection is lost; what was sent is not sent again."""
    deadline, pause = time.monotonic() + RECONNECT_S, 0.5
    while True:
        begun = time.monotonic()
        try:
            return attempt()
        except TransportError:
            now = time.monotonic()
            if now - begun > 60.0:  # it worked for a while: a new loss has its own time
                deadline, pause = now + RECONNECT_S, 0.5
            if now + pause > deadline:
                raise
            time.sleep(pause)
            pause = min(2 * pause, 15.0)


def _upload(enclave: str, sealed: SealedParty, counter: _Counter, timing: dict[str, float], progress: Progress) -> None:
    begun = time.monotonic()
    for kind, bundle in sealed.bundles.items():
        with task(progress, f"sending {kind}", total=bundle.path.stat().st_size, unit="bytes") as sending:
            counter.uploaded += upload(enclave, bundle.path, functools.partial(_sent, sending))
    timing["upload"] = time.monotonic() - begun


def _sent(sending: Task, done: int, _size: int) -> None:
    sending.set(done)


def _show(show: Callable[..., None], event: dict[str, Any]) -> None:
    with suppress(KeyError, TypeError, ValueError):
        show(float(event["step"]), total=float(event["num_steps"]), note=f"loss {float(event['train_loss']):.3f}")


def _keep(out: Path, results: Results) -> None:
    """Write what the party got; the receipt last."""
    (out / "scores").mkdir(parents=True, exist_ok=True)
    for system, lines in results.scores.items():
        if system not in ("base", "cloister"):
            raise VerificationError("scores", f"the enclave sent scores of an unknown system {system[:40]!r}")
        (out / "scores" / f"{system}.jsonl").write_text(lines, encoding="utf-8")
    if results.adapter:
        write_adapter(results.adapter, out / "adapter")
    (out / "declared.json").write_text(json.dumps(results.declared, indent=1))
    (out / "receipt.json").write_bytes(results.receipt.to_bytes())


def _answer_samples(session: Session, opened: OpenJob, party: str, count: int, out: Path, progress: Progress) -> None:
    """Answer some of the party's own test prompts with the tuned model, for the report."""
    job, loaded = opened.resolved.job, opened.resolved.loaded
    rules = job.inference
    if rules.allow == "none" or (rules.allow != "all" and party not in rules.allow):
        return
    if rules.quota_tokens < _QUOTA_SHARE * count * _ANSWER_TOKENS:  # a small quota is for the party's own questions
        return
    with task(progress, "sample answers", total=count):
        former, tokenizer = former_half(opened)
        stops = stop_ids(opened.resolved.model.folder, tokenizer)
        answered = []
        records = [
            r
            for r in load_records(loaded.data_file(party, "test"), job.data.format)[:_LOOKED_AT]
            if isinstance(r.prompt, str)
            and len(prompt_ids(tokenizer, as_trained(job.data, tokenizer, r.prompt))) + _ANSWER_TOKENS
            <= job.training.max_tokens
        ]
        for record in _spread(records, count):
            prompt = as_trained(job.data, tokenizer, str(record.prompt))
            answer = generate(session, former, tokenizer, prompt, stops=stops, max_new_tokens=_ANSWER_TOKENS)
            answered.append(
                Sample(party=party, prompt=str(record.prompt), response=answer.text, reference=record.response)
            )
    (out / "samples.json").write_text(json.dumps([s.model_dump() for s in answered], indent=1))


def _spread(records: list[Record], count: int) -> list[Record]:
    """Records of different tasks first."""
    by_task: dict[str, list[Record]] = {}
    for record in records:
        by_task.setdefault(record.task, []).append(record)
    rounds = max((len(r) for r in by_task.values()), default=0)
    mixed = [listed[i] for i in range(rounds) for listed in by_task.values() if i < len(listed)]
    return mixed[:count]


def former_half(opened: OpenJob) -> tuple[Former, PreTrainedTokenizerBase]:
    """The party's half of the model, and the tokenizer."""
    job, folder = opened.resolved.job, opened.resolved.model.folder
    model = load_model(folder, job.model.dtype, pick_device(job.enclave.device))
    return Former(model, opened.resolved.cut), load_tokenizer(folder)


def _report(
    opened: OpenJob,
    party: str,
    sealed: SealedParty,
    results: Results,
    counter: _Counter,
    timing: dict[str, float],
    out: Path,
) -> JoinReport:
    receipt = results.receipt.to_bytes()
    return JoinReport(
        job_id=opened.resolved.job_id,
        party=party,
        attestation=attestation_of(results.claims),
        records=Records(**{kind: sealed.records.get(kind, 0) for kind in ("train", "validation", "test")}),
        truncated=Truncated(**sealed.truncated),
        results=[ResultRow.model_validate_json(json.dumps(row)) for row in results.declared.get("results", [])],
        wire=WireBytes(
            bytes_up=counter.uploaded + counter.session_up,
            bytes_down=counter.session_down,
            activation_dtype=opened.resolved.job.transport.activation_dtype,
        ),
        timing=timing,
        adapter_sha256=json.loads(results.receipt.body)["adapter_sha256"],
        released=bool(results.adapter),
        receipt=ReceiptRef(path=str(out / "receipt.json"), sha256=hashlib.sha256(receipt).hexdigest()),
        warnings=[] if results.complete else [f"{party}: not every party has countersigned the receipt"],
    )
