"""`cloister plan` for method `split`: what parties and the enclave will need.

Records are tokenised for real, a sample of them where there are many; times come from a rehearsal of the job's own
work on a few layers, or where those would not fit this machine, from the speed of bare matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import psutil
from transformers import PreTrainedTokenizerBase

from cloister.data.packing import Pack, pack_documents
from cloister.data.records import Record, load_records
from cloister.data.tokens import Document, Encoder
from cloister.job import Job
from cloister.jobfile import LoadedJob, ModelFiles
from cloister.methods import estimate
from cloister.methods.estimate import ModelSize, PartCount
from cloister.methods.host import usable_cpus
from cloister.methods.plan_parts import MethodPlan, describe_party, threads
from cloister.methods.plan_processes import busy_threads, crowding, idleness, team_memory
from cloister.methods.rehearsal import Cost, Rehearsal, may_repack, rehearsal_bytes, rehearse
from cloister.model.anatomy import DTYPES, load_tokenizer
from cloister.model.repacked import pays
from cloister.progress import Progress, task
from cloister.report.model import Records, Truncated
from cloister.report.plan import RolePlan

Kind = Literal["train", "validation", "test"]
_SAMPLE = 400
"""Records of a file that are tokenised: the mean length is then known to about 5 per cent."""
_REHEARSED_TOKENS = 1024
"""Of each kind of packs, about."""


@dataclass(frozen=True, kw_only=True)
class PartyCount:
    """One party's data after packing. `truncated` counts records; `sampled` says that counts are extrapolated."""

    name: str
    parts: Mapping[str, PartCount]
    packs: Mapping[str, Sequence[Pack]]
    """Of kinds "train" and "test", those of the sample."""
    truncated: Truncated
    sampled: bool


def plan_split(
    loaded: LoadedJob,
    files: ModelFiles,
    config: Any,
    model: ModelSize,
    rate: Callable[[], float],
    progress: Progress,
) -> MethodPlan:
    """The part of a plan that is this method's own.

    Args:
        config: the model's configuration, of its architecture's class.
        rate: measures the machine's floating-point products.

    Raises:
        JobError, DataError, ModelError, AdapterError: as a run would.
    """
    job, tokenizer = loaded.job, load_tokenizer(files.folder)
    with task(progress, "tokenising", total=len(job.party), unit="parties") as running:
        parties = []
        for party in job.party:
            parties.append(count_party(loaded, party.name, tokenizer))
            running.advance()
    warnings = []
    if sampled := [party.name for party in parties if party.sampled]:
        warnings.append(f"counts of tokens are extrapolated from {_SAMPLE} records per file: {', '.join(sampled)}")
    if job.enclave.device not in ("auto", "cpu"):
        warnings.append(f"[enclave] device: times are of this machine's processors, not of {job.enclave.device}")
    with task(progress, "rehearsing on this machine"), threads(busy_threads(job.enclave)):
        if rehearsal_bytes(config, model.total, job.training.max_tokens) < psutil.virtual_memory().available // 2:
            costs = rehearse(config, job, _some(parties, "train"), _some(parties, "test"))
        else:
            costs = by_arithmetic(job, model, parties, rate())
            warnings.append("a few layers of the model would not fit here: times are those of matrix products, rough")
    train = _pooled(parties, "train")
    steps, passes = _steps(job, train)
    roles = [_party_role(job, model, party, costs) for party in parties]
    timing = _timing(job, model, parties, passes, costs)
    roles.append(_enclave_role(job, model, train, roles, costs, timing["training"] + timing["scoring"]))
    return MethodPlan(
        trainable=model.adapter,
        steps=steps,
        parties=[
            describe_party(job, p.name, Records(**{kind: part.records for kind, part in p.parts.items()}), p.truncated)
            for p in parties
        ],
        roles=roles,
        timing=timing,
        warnings=[*warnings, *crowding(job.enclave), *idleness(job, train)],
    )


def count_party(loaded: LoadedJob, name: str, tokenizer: PreTrainedTokenizerBase) -> PartyCount:
    """Tokenise and pack one party's records, or a sample of them.

    Raises:
        JobError, DataError: a file is missing, or a record is malformed.
    """
    job = loaded.job
    train = load_records(loaded.data_file(name, "train"), job.data.format)
    tests = load_records(loaded.data_file(name, "test"), job.data.format)
    num_validation = _validation_count(len(train), job.data.validation)
    num_tests = min(len(tests), job.evaluation.max_examples or len(tests))
    training, testing = _encoder(job, tokenizer), _encoder(job, tokenizer)
    sample, tests_sample = _spread(train, _SAMPLE), _spread(tests, _SAMPLE)
    packs = {
        "train": _packed(training.training(sample), job),
        "test": _packed(testing.scoring(tests_sample, choices=True)[0], job),
    }
    whole = _count(packs["train"], len(sample))
    # Validation documents are training documents less their end-of-text token.
    parts = {
        "train": _scaled(whole, len(train) - num_validation),
        "validation": _scaled(whole, num_validation),
        "test": _scaled(_count(packs["test"], len(tests_sample)), num_tests),
    }
    scales = ((training.truncated, len(train) / len(sample)), (testing.truncated, num_tests / len(tests_sample)))
    return PartyCount(
        name=name,
        parts=parts,
        packs=packs,
        truncated=Truncated(
            prompts=round(sum(t.prompts * scale for t, scale in scales)),
            responses=round(sum(t.responses * scale for t, scale in scales)),
        ),
        sampled=len(train) > _SAMPLE or len(tests) > _SAMPLE,
    )


def by_arithmetic(job: Job, model: ModelSize, parties: Sequence[PartyCount], rate: float) -> Rehearsal:
    """Costs from counting operations, at `rate` operations per second of a bare matrix product."""

    def cost(operations: float, head: float, layers: int) -> Cost:
        """Seconds a token, of operations of a token, `head` of them not in layers."""
        return Cost(once=estimate.seconds(head, rate), layer=estimate.seconds(operations - head, rate) / layers)

    train, test = _pooled(parties, "train"), _pooled(parties, "test")
    latter, max_tokens = model.layers - model.cut, job.training.max_tokens
    copy = 4.0 if may_repack(job) and pays(DTYPES[job.model.dtype], "cpu") else 0.0
    training = estimate.training_operations(model, train, 1.0, max_tokens, whole=False) / train.tokens
    scoring = estimate.scoring_operations(model, test, max_tokens, whole=False) / test.tokens
    head = 2.0 * model.hidden * model.vocabulary
    return Rehearsal(
        former=cost(estimate.former_operations(model, 1, max_tokens), 0.0, model.cut),
        training=cost(training, 2 * head * train.targets / train.tokens, latter),
        scoring=cost(scoring, head * test.targets / test.tokens, latter),
        kept=Cost(once=8.0 * model.vocabulary, layer=4.0 * (8 * model.hidden + 4 * model.widest)),
        copied=Cost(once=copy * model.end, layer=copy * model.latter / latter),
    )


def _some(parties: Sequence[PartyCount], kind: Kind) -> list[Pack]:
    """Packs of all parties in turn, until there is enough to rehearse with."""
    found = list[Pack]()
    for turn in range(max(len(party.packs[kind]) for party in parties)):
        for party in parties:
            if turn < len(party.packs[kind]) and (not found or sum(map(len, found)) < _REHEARSED_TOKENS):
                found.append(party.packs[kind][turn])
    return found


def _pooled(parties: Sequence[PartyCount], kind: Kind) -> PartCount:
    return estimate.pooled([party.parts[kind] for party in parties])


def _encoder(job: Job, tokenizer: PreTrainedTokenizerBase) -> Encoder:
    return Encoder(tokenizer=tokenizer, settings=job.data, max_tokens=job.training.max_tokens)


def _packed(documents: Sequence[Document], job: Job) -> list[Pack]:
    return pack_documents(documents, job.training.max_tokens, job.job.seed)


def _count(packs: Sequence[Pack], records: int) -> PartCount:
    return PartCount(
        records=records,
        tokens=sum(map(len, packs)),
        targets=sum(len(p.target_pos_N) for p in packs),
        packs=len(packs),
        groups=sum(len(p.group_role_G) for p in packs),
    )


def _scaled(part: PartCount, records: int) -> PartCount:
    scale = records / part.records
    counts = {field.name: round(getattr(part, field.name) * scale) for field in fields(part)}
    return PartCount(**{**counts, "packs": math.ceil(part.packs * scale)})


def _steps(job: Job, train: PartCount) -> tuple[int, float]:
    """Optimiser steps, and how often the training data are passed over. A step takes as many whole packs as fit."""
    mean_pack = train.tokens / max(train.packs, 1)
    steps_per_epoch = math.ceil(train.packs / max(1, int(job.training.batch_tokens / mean_pack)))
    if job.training.steps is not None:
        return job.training.steps, job.training.steps / steps_per_epoch
    epochs = job.training.epochs or 0.0
    return max(1, round(epochs * steps_per_epoch)), epochs


def _validation_count(records: int, share: float) -> int:
    """How many training records `data.prepare` keeps for validation; a test holds the two together."""
    return min(max(round(share * records), 1), records - 1) if share > 0 else 0


def _party_role(job: Job, model: ModelSize, party: PartyCount, costs: Rehearsal) -> RolePlan:
    chunk = job.transport.chunk_mib << 20
    bundles = sum(
        estimate.bundle_bytes(part, model.hidden, job.transport.activation_dtype, chunk, scored=kind != "train")
        for kind, part in party.parts.items()
    )
    parts = list(party.parts.values())
    recipient = job.release.to != "none" and party.name in job.release.to
    systems = 1 + ("base" in job.evaluation.baselines)
    return RolePlan(
        role="party",
        name=party.name,
        memory_bytes=estimate.party_memory(
            model,
            parts,
            estimate.BYTES[job.model.dtype],
            job.training.max_tokens,
            model.cut * costs.copied.layer,
        ),
        disk_bytes=bundles,
        bytes_up=estimate.bytes_up(bundles),
        bytes_down=estimate.bytes_down(party.parts["test"].records, systems, 4 * model.adapter if recipient else 0),
        seconds=sum(p.tokens for p in parts) * costs.former.of(model.cut),
    )


def _enclave_role(
    job: Job, model: ModelSize, train: PartCount, roles: Sequence[RolePlan], costs: Rehearsal, took: float
) -> RolePlan:
    per_value = estimate.BYTES[job.model.dtype]
    cache = min(job.enclave.cache_mib << 20, int(train.tokens * model.hidden * per_value))
    latter = model.layers - model.cut
    kept = job.training.max_tokens * costs.kept.of(latter)
    return RolePlan(
        role="enclave",
        name="enclave",
        memory_bytes=team_memory(
            job, model, per_value, kept, 2 * costs.copied.of(latter) + 2 * costs.copied.once, cache
        ),
        disk_bytes=sum(role.disk_bytes for role in roles),
        bytes_up=sum(role.bytes_up for role in roles),
        bytes_down=sum(role.bytes_down for role in roles),
        seconds=took,
    )


def _timing(
    job: Job, model: ModelSize, parties: Sequence[PartyCount], passes: float, costs: Rehearsal
) -> dict[str, float]:
    """Seconds per phase on one machine like this one, where the parties share the processor."""
    train, validation, test = (_pooled(parties, kind).tokens for kind in ("train", "validation", "test"))
    latter = model.layers - model.cut
    validations, systems = job.training.evaluations * validation, 1 + ("base" in job.evaluation.baselines)
    timing = {
        "preparing": estimate.preparing_seconds(
            model, estimate.BYTES[job.model.dtype], len(parties) + 1, usable_cpus()
        ),
        "former layers": (train + validation + test) * costs.former.of(model.cut),
        "training": passes * train * costs.training.of(latter) + validations * costs.scoring.of(latter),
        "scoring": systems * test * costs.scoring.of(latter),
    }
    if baselines := {"local", "central"} & set(job.evaluation.baselines):
        once, score = passes * train * costs.training.of(model.layers), test * costs.scoring.of(model.layers)
        # All parties' own trainings together see each record as often as the pooled one; each scores every test set.
        trainings = {"central": 1, "local": len(parties)}
        timing["baselines"] = sum(once + trainings[name] * score for name in baselines)
    return timing


def _spread(records: Sequence[Record], most: int) -> Sequence[Record]:
    """At most `most` records, evenly spread over the file, since files are often sorted."""
    if len(records) <= most:
        return records
    return [records[i * len(records) // most] for i in range(most)]
