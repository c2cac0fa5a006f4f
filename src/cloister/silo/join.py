"""The party process in method `slice`: the party's enclave, beside an untrusted accelerator."""

from __future__ import annotations

import functools
import hashlib
import hmac
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from cloister.agreement.job import OpenJob
from cloister.agreement.own import find_own_attester, own_claims
from cloister.channel.rpc import Session
from cloister.crypto.encoding import encode
from cloister.crypto.keys import DataKey
from cloister.crypto.sealing import write_durably
from cloister.data.packing import LAYOUT, TENSORS, Pack
from cloister.data.prepare import PartyData, prepare
from cloister.errors import DataError
from cloister.federation.state import GlobalState
from cloister.masking.pads import StreamId
from cloister.masking.precomputed import PadsUsedUpError
from cloister.masking.weights import GroupPlan
from cloister.model.anatomy import load_tokenizer
from cloister.party.client import PartyClient, Results
from cloister.party.generate import stop_ids
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
from cloister.progress import Progress, task
from cloister.report.model import Masking
from cloister.report.outputs import JoinReport
from cloister.silo.answer import answer
from cloister.silo.budget import party_budget, rows_at_start
from cloister.silo.model import IN_FLIGHT, SiloModel, Traffic, both_on_one_host, open_model
from cloister.silo.tasks import Worker
from cloister.silo.work import SiloWork

_SALT_BYTES = 32
RENEWALS = 16
"""How often pads are computed anew while a party runs, so that nobody can make it compute them for ever."""


@dataclass(frozen=True, kw_only=True)
class Committed:
    """A party's data, to which it has committed. See `client.Contribution`."""

    data: PartyData
    commitments: Mapping[str, bytes]
    data_keys: Mapping[str, DataKey] = field(default_factory=dict)


def join_slice(entering: Entering, *, progress: Progress, samples: int = 0) -> JoinReport:
    """Take part in a job to its end.

    Args:
        samples: how many test prompts to answer with the tuned model at the end.

    Raises:
        CloisterError: anything that stops this party; a new start begins the round again.
    """
    opened = entering.open(progress)
    entering.out.mkdir(parents=True, exist_ok=True)
    found = find_own_attester(opened, insecure_simulated=entering.insecure_simulated, progress=progress)
    own_claims(
        opened,
        found,
        role="party",
        insecure_simulated=entering.insecure_simulated,
        insecure_not_confidential=entering.insecure_not_confidential,
    )
    client = entering.client(opened, found.attester)
    return _Silo(entering, opened, client, progress, samples).join()


class _Silo:
    """One party's enclave from its start to its end."""

    def __init__(
        self, entering: Entering, opened: OpenJob, client: PartyClient, progress: Progress, samples: int
    ) -> None:
        self._entering, self._opened, self._client = entering, opened, client
        self._progress, self._samples = progress, samples if may_ask(opened, entering.party) else 0
        self._counter = Counter()
        self._timing: dict[str, float] = {}
        self._traffic: list[Traffic] = []
        self._warnings: list[str] = []
        self._tokenizer: PreTrainedTokenizerBase = load_tokenizer(opened.resolved.model.folder)

    def join(self) -> JoinReport:
        began = time.monotonic()
        entering, resolved = self._entering, self._opened.resolved
        with task(self._progress, "reading records"):
            files = (resolved.loaded.data_file(entering.party, part) for part in ("train", "test"))
            data = prepare(resolved.job, self._tokenizer, *files)
            committed = commit(data, _salt(entering.out / "commitment.salt"))
        for left in reversed(range(RENEWALS + 1)):
            try:
                results = self._behind_masks(committed, data, began)
                break
            except PadsUsedUpError:
                if not left or resolved.job.masking.pad_store is not None:
                    raise
        return make_report(
            self._opened,
            entering.party,
            results,
            entering.out,
            records={kind: part.records for kind, part in data.parts.items()},
            truncated={"prompts": data.truncated.prompts, "responses": data.truncated.responses},
            counter=self._counter,
            timing=self._timing,
            masking=Masking(
                pads=resolved.job.masking.pads,
                bits=resolved.job.masking.bits,
                checked=resolved.job.masking.check,
                one_host=both_on_one_host(resolved.job.masking),
                bytes_up=sum(each.bytes_up for each in self._traffic),
                bytes_down=sum(each.bytes_down for each in self._traffic),
            ),
            warnings=self._warnings,
        )

    def _behind_masks(self, committed: Committed, data: PartyData, began: float) -> Results:
        """From pads and weights to the results.

        Raises:
            PadsUsedUpError: rounds that were interrupted have taken what was to spare. A next start has new pads.
        """
        entering, job = self._entering, self._opened.resolved.job
        with open_model(entering, self._opened, lambda plans: self._rows(plans, data), self._progress) as model:
            self._traffic.append(model.traffic)
            self._warnings = model.warnings
            self._timing.setdefault("preparing", time.monotonic() - began)
            work = SiloWork(model.half, data, job, entering.party, in_flight=IN_FLIGHT, verify=model.verify)
            return come_back(
                lambda: self._take_part(committed, model, work),
                entering.out,
                self._client,
                released=entering.is_recipient,
                progress=self._progress,
            )

    def _rows(self, plans: Sequence[GroupPlan], data: PartyData) -> Mapping[StreamId, int]:
        job = self._opened.resolved.job
        budget = party_budget(job, data, plans, vocabulary=plans[-1].outputs, samples=self._samples)
        return rows_at_start(job, budget)

    def _take_part(self, committed: Committed, model: SiloModel, work: SiloWork) -> Results:
        job, entering, final = self._opened.resolved.job, self._entering, list[GlobalState]()
        worker = Worker(work, job, entering.party, self._progress, on_final=final.append)
        with self._session() as session:
            done = completed(session, self._client, entering.out, released=entering.is_recipient)
            if done is not None:
                session.request("leave", {})
                return done
            with task(self._progress, "waiting for the others") as waiting, task(self._progress, "training") as shown:
                results = self._client.take_part(
                    session,
                    committed,
                    upload=lambda: _send(session, committed, work, model.warnings),
                    on_missing=lambda names: waiting.set(0.0, note=", ".join(names)),
                    on_event=lambda event: show_event(shown.set, event),
                    alongside=lambda: worker.beside(self._session()),
                    keep=functools.partial(keep_results, entering.out),
                )
            keep_receipt(entering.out, results.receipt)
            if self._samples and final:
                self._answer_samples(model, work, final[-1])
            session.request("leave", {})
        return results

    @contextmanager
    def _session(self) -> Iterator[Session]:
        with open_session(self._client, self._entering.enclave, self._progress) as session:
            try:
                yield session
            finally:
                self._counter.add(session)

    def _answer_samples(self, model: SiloModel, work: SiloWork, final: GlobalState) -> None:
        """Answer some of the party's own test prompts with the tuned model, for the report."""
        stops = stop_ids(self._opened.resolved.model.folder, self._tokenizer)
        with task(self._progress, "sample answers", total=self._samples) as running, work.tuned(final.weights):
            answered = []
            for record, prompt in sample_prompts(self._opened, self._entering.party, self._samples, self._tokenizer):
                text = answer(model.half, self._tokenizer, prompt, stops=stops, max_new_tokens=ANSWER_TOKENS)
                answered.append(sample(self._entering.party, record, text))
                running.advance()
        model.verify()
        write_samples(self._entering.out, answered)


def _send(session: Session, committed: Committed, work: SiloWork, weak: list[str]) -> None:
    session.request(
        "commit",
        {
            "commitments": dict(committed.commitments),
            "round_tokens": work.round_tokens,
            "steps": work.num_steps,
            "insecure": [*weak],
        },
    )


def commit(data: PartyData, salt: bytes) -> Committed:
    """Bind the party to its data: HMAC-SHA-256 of each kind's packs under a random key that stays with the party."""
    return Committed(
        data=data, commitments={kind: _digest(salt, kind, part.packs) for kind, part in data.parts.items()}
    )


def _digest(salt: bytes, kind: str, packs: list[Pack]) -> bytes:
    mac = hmac.new(salt, kind.encode(), hashlib.sha256)
    for pack in packs:
        fields = {name: getattr(pack, name) for name in TENSORS} | {name: getattr(pack.layout, name) for name in LAYOUT}
        mac.update(encode({name: value.numpy().tobytes() for name, value in fields.items()}))
    return mac.digest()


def _salt(path: Path) -> bytes:
    """The key of the party's commitments: drawn once, so that a restart commits to the same."""
    if not path.exists():
        write_durably(path, secrets.token_bytes(_SALT_BYTES))
    salt = path.read_bytes()
    if len(salt) != _SALT_BYTES:
        raise DataError(f"has {len(salt)} bytes, not {_SALT_BYTES}", where=str(path), hint="choose another --out")
    return salt
