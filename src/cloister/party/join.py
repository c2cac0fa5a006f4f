"""The party process in method `split`: seal, connect, take part, keep the results."""

from __future__ import annotations

import functools
import time

from transformers import PreTrainedTokenizerBase

from cloister.agreement.job import OpenJob
from cloister.channel.client import upload
from cloister.channel.rpc import Session
from cloister.crypto.sealing import write_durably
from cloister.model.anatomy import load_model, load_tokenizer, pick_device
from cloister.model.cut import Former
from cloister.party.bundles import SealedParty, seal_party
from cloister.party.client import PartyClient, Results
from cloister.party.generate import generate, stop_ids
from cloister.party.results import come_back, completed, keep_receipt, keep_results
from cloister.party.taking_part import (
    ANSWER_TOKENS,
    Counter,
    Entering,
    make_report,
    may_ask,
    open_session,
    sample,
    sample_prompts,
    show_event,
    write_samples,
)
from cloister.progress import Progress, Task, task
from cloister.report.outputs import JoinReport

SENT = "sent"
"""In OUT once an enclave may have a bundle: it takes each but once."""
_QUOTA_SHARE = 10
"""Samples are made only if they use up at most this fraction (1/10) of the party's quota."""


def join_split(entering: Entering, *, progress: Progress, samples: int = 0) -> JoinReport:
    """Take part in a job to its end.

    Args:
        samples: how many test prompts to answer by split inference at the end.

    Raises:
        CloisterError: anything that stops this party; the bundles stay for the next start.
    """
    started = time.monotonic()
    timing: dict[str, float] = {}
    opened = entering.open(progress)
    client = entering.client(opened)
    party, out = entering.party, entering.out
    device = pick_device(opened.resolved.job.enclave.device)
    sealed = seal_party(
        opened.resolved,
        party,
        entering.key,
        out / "bundles",
        device=device,
        progress=progress,
        signed=client.memory.exists() or (out / SENT).exists(),
    )
    timing["former layers"] = time.monotonic() - started
    counter = Counter()
    results = come_back(
        lambda: _take_part(client, entering, opened, sealed, counter, timing, progress, samples),
        out,
        client,
        released=entering.is_recipient,
        progress=progress,
    )
    return make_report(
        opened,
        party,
        results,
        out,
        records=sealed.records,
        truncated=sealed.truncated,
        counter=counter,
        timing=timing,
    )


def _take_part(
    client: PartyClient,
    entering: Entering,
    opened: OpenJob,
    sealed: SealedParty,
    counter: Counter,
    timing: dict[str, float],
    progress: Progress,
    samples: int,
) -> Results:
    with open_session(client, entering.enclave, progress) as session:
        try:
            done = completed(session, client, entering.out, released=entering.is_recipient)
            if done is not None:
                session.request("leave", {})
                return done
            with task(progress, "waiting for the others") as waiting, task(progress, "training") as training:
                results = client.take_part(
                    session,
                    sealed,
                    upload=functools.partial(_upload, entering, sealed, counter, timing, progress),
                    on_missing=lambda names: waiting.set(0.0, note=", ".join(names)),
                    on_event=lambda event: show_event(training.set, event),
                    keep=functools.partial(keep_results, entering.out),
                )
            keep_receipt(entering.out, results.receipt)
            if samples:
                _answer_samples(session, opened, entering, samples, progress)
            session.request("leave", {})
        finally:
            counter.add(session)
    return results


def _upload(
    entering: Entering, sealed: SealedParty, counter: Counter, timing: dict[str, float], progress: Progress
) -> None:
    begun = time.monotonic()
    write_durably(entering.out / SENT)
    for kind, bundle in sealed.bundles.items():
        with task(progress, f"sending {kind}", total=bundle.path.stat().st_size, unit="bytes") as sending:
            counter.up += upload(entering.enclave, bundle.path, functools.partial(_sent, sending))
    timing["upload"] = time.monotonic() - begun


def _sent(sending: Task, done: int, _size: int) -> None:
    sending.set(done)


def _answer_samples(session: Session, opened: OpenJob, entering: Entering, count: int, progress: Progress) -> None:
    """Answer some of the party's own test prompts with the tuned model, for the report."""
    quota = opened.resolved.job.inference.quota_tokens
    # A small quota is for the party's own questions.
    if not may_ask(opened, entering.party) or quota < _QUOTA_SHARE * count * ANSWER_TOKENS:
        return
    with task(progress, "sample answers", total=count):
        former, tokenizer = former_half(opened)
        stops = stop_ids(opened.resolved.model.folder, tokenizer)
        answered = []
        for record, prompt in sample_prompts(opened, entering.party, count, tokenizer):
            answer = generate(session, former, tokenizer, prompt, stops=stops, max_new_tokens=ANSWER_TOKENS)
            answered.append(sample(entering.party, record, answer.text))
    write_samples(entering.out, answered)


def former_half(opened: OpenJob) -> tuple[Former, PreTrainedTokenizerBase]:
    """The party's half of the model, and the tokenizer."""
    job, folder = opened.resolved.job, opened.resolved.model.folder
    model = load_model(folder, job.model.dtype, pick_device(job.enclave.device))
    return Former(model, opened.resolved.cut), load_tokenizer(folder)
