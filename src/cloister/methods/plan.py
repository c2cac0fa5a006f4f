"""`cloister plan`: what a job will need, from its files, before anything is started.

Data are tokenised for real, a sample of them where there are many; sizes come from the headers of the weight files;
the machine's speed from a moment of matrix products. The arithmetic is in `estimate.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedTokenizerBase

from cloister.adapters.size import Sizes, trained_parameters
from cloister.adapters.spf.rows import Heads
from cloister.agreement.job import count_layers, find_cut
from cloister.attest.policy import AppraisalPolicy
from cloister.data.packing import pack_documents
from cloister.data.records import Record, load_records
from cloister.data.tokens import Document, Encoder
from cloister.errors import ModelError
from cloister.job import Job
from cloister.jobfile import LoadedJob, ModelFiles, find_model, resolve
from cloister.methods import estimate
from cloister.methods.estimate import ModelSize, PartCount
from cloister.methods.plan_processes import busy_threads, crowding, idleness, team_memory
from cloister.methods.plan_slice import SlicePlan, describe_party, plan_slice
from cloister.model.anatomy import DTYPES, load_tokenizer
from cloister.progress import Progress, task
from cloister.report.model import Party, Records, Truncated
from cloister.report.plan import PlanReport, RolePlan

_SAMPLE = 400
"""Records of a file that are tokenised: the mean length is then known to about 5 per cent."""
_BENCHMARK_S = 0.3


@dataclass(frozen=True, kw_only=True)
class PartyCount:
    """One party's data after packing. `truncated` counts records; `sampled` says that counts are extrapolated."""

    name: str
    parts: dict[str, PartCount]
    truncated: Truncated
    sampled: bool


def plan_job(loaded: LoadedJob, *, progress: Progress) -> PlanReport:
    """Estimate memory, disk, bytes on the wire and time for each role.

    Raises:
        JobError, DataError, ModelError: as a run would, for a fault that can be found without starting one.
    """
    job = loaded.job
    policy = loaded.policy_file()
    policy_bytes = AppraisalPolicy.load(policy).to_bytes() if policy else b""
    files = find_model(loaded.local_path(job.model.path), where=loaded.where("model", "path"))
    layers, cut = count_layers(files), find_cut(loaded, files)
    with task(progress, "hashing the model", total=files.num_bytes, unit="bytes") as running:
        resolved = resolve(loaded, cut=cut, policy_bytes=policy_bytes, count=running.advance)
    model, architecture = _measure(files, job, layers, cut)
    if job.job.method == "slice":
        own = plan_slice(loaded, files, model, lambda: measure_rate(model, job), progress)
        return _slice_report(resolved.job_id, job, architecture, model, own)
    tokenizer = load_tokenizer(files.folder)
    with task(progress, "tokenising", total=len(job.party), unit="parties") as running:
        parties = []
        for party in job.party:
            parties.append(count_party(loaded, party.name, tokenizer))
            running.advance()
    with task(progress, "measuring this machine"):
        rate = measure_rate(model, job)
    return _report(resolved.job_id, job, architecture, model, parties, rate)


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
    whole = _count_part(training.training(sample), len(train), len(sample), job)
    tested = _count_part(testing.scoring(tests_sample, choices=True)[0], num_tests, len(tests_sample), job)
    # Validation documents are training documents less their end-of-text token.
    parts = {
        "train": _scaled(whole, len(train) - num_validation),
        "validation": _scaled(whole, num_validation),
        "test": tested,
    }
    scales = ((training.truncated, len(train) / len(sample)), (testing.truncated, num_tests / len(tests_sample)))
    return PartyCount(
        name=name,
        parts=parts,
        truncated=Truncated(
            prompts=round(sum(t.prompts * scale for t, scale in scales)),
            responses=round(sum(t.responses * scale for t, scale in scales)),
        ),
        sampled=len(train) > _SAMPLE or len(tests) > _SAMPLE,
    )


def measure_rate(model: ModelSize, job: Job) -> float:
    """Operations per second of matrix products of the model's shape on this machine's processor.

    One thread's best time is taken, times the threads of the job: an average would measure whatever else the machine
    does at this moment, and threads that wait for a busy processor are slower than one.
    """
    dtype = DTYPES[job.model.dtype]
    x_TD = torch.randn(job.training.max_tokens, model.hidden, dtype=dtype)
    w_DF = torch.randn(model.hidden, model.widest, dtype=dtype)
    before, best = torch.get_num_threads(), math.inf
    torch.set_num_threads(1)
    try:
        end = time.perf_counter() + _BENCHMARK_S
        while (started := time.perf_counter()) < end:
            x_TD @ w_DF
            best = min(best, time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)
    return 2.0 * x_TD.numel() * model.widest / best * busy_threads(job.enclave)


def _measure(files: ModelFiles, job: Job, layers: int, cut: int) -> tuple[ModelSize, str]:
    config: Any = AutoConfig.from_pretrained(files.folder, local_files_only=True)  # Any: each architecture has its own
    text = config.get_text_config()
    shapes: dict[str, Sequence[int]] = {}
    for path in sorted(files.folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  # not a dict
    model = estimate.measure_model(
        shapes,
        layers=layers,
        cut=cut,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        adapter=_trained(job, shapes, text, layers, cut),
        whole_adapter=_trained(job, shapes, text, layers, 0),
    )
    return model, (config.architectures or [config.model_type])[0]


def _trained(job: Job, shapes: estimate.Shapes, config: Any, layers: int, first_layer: int) -> int:
    heads = Heads.of(config)
    if heads is None:
        raise ModelError("the configuration does not say how many attention heads there are", where=job.model.path)
    sizes = Sizes(
        hidden=config.hidden_size,
        heads=heads,
        head_width=getattr(config, "head_dim", None) or config.hidden_size // heads.query,
        matrices=estimate.matrices(shapes, first_layer),
    )
    return trained_parameters(job.adapter, sizes, layers - first_layer)


def _encoder(job: Job, tokenizer: PreTrainedTokenizerBase) -> Encoder:
    return Encoder(tokenizer=tokenizer, settings=job.data, max_tokens=job.training.max_tokens)


def _count_part(documents: Sequence[Document], records: int, sampled: int, job: Job) -> PartCount:
    """Counts of `records` records, of which `sampled` gave these documents."""
    packs = pack_documents(documents, job.training.max_tokens, job.job.seed)
    counted = PartCount(
        records=sampled,
        tokens=sum(map(len, packs)),
        targets=sum(len(p.target_pos_N) for p in packs),
        packs=len(packs),
        groups=sum(len(p.group_role_G) for p in packs),
    )
    return _scaled(counted, records)


def _scaled(part: PartCount, records: int) -> PartCount:
    scale = records / part.records
    counts = {field.name: round(getattr(part, field.name) * scale) for field in fields(part)}
    return PartCount(**{**counts, "packs": math.ceil(part.packs * scale)})


def _report(
    job_id: str, job: Job, architecture: str, model: ModelSize, parties: Sequence[PartyCount], rate: float
) -> PlanReport:
    train = estimate.pooled([p.parts["train"] for p in parties])
    steps, passes = _steps(job, train)
    roles = [_party_role(job, model, party, rate) for party in parties]
    timing = _timing(job, model, parties, passes, rate)
    enclave_seconds = timing["training"] + timing["scoring"]
    roles.append(_enclave_role(job, model, parties, roles, enclave_seconds))
    described = [
        describe_party(job, p.name, Records(**{kind: part.records for kind, part in p.parts.items()}), p.truncated)
        for p in parties
    ]
    return PlanReport(
        job_id=job_id,
        job_name=job.job.name,
        method=job.job.method,
        architecture=architecture,
        parameters=model.total,
        trainable_parameters=model.adapter,
        layers=model.layers,
        former_layers=model.cut,
        hidden_size=model.hidden,
        activation_dtype=job.transport.activation_dtype,
        steps=steps,
        tokens_per_step=job.training.batch_tokens,
        parties=described,
        roles=roles,
        timing=timing,
        warnings=[
            *_warnings(job, described, [p.name for p in parties if p.sampled]),
            *crowding(job.enclave),
            *idleness(job, train),
        ],
    )


def _slice_report(job_id: str, job: Job, architecture: str, model: ModelSize, own: SlicePlan) -> PlanReport:
    return PlanReport(
        job_id=job_id,
        job_name=job.job.name,
        method=job.job.method,
        architecture=architecture,
        parameters=model.total,
        trainable_parameters=own.trainable,
        layers=model.layers,
        former_layers=0,
        hidden_size=model.hidden,
        activation_dtype=job.transport.activation_dtype,
        steps=own.steps,
        tokens_per_step=job.training.batch_tokens,
        parties=own.parties,
        roles=own.roles,
        timing=own.timing,
        masking=own.masking,
        warnings=_warnings(job, own.parties, []),
    )


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


def _party_role(job: Job, model: ModelSize, party: PartyCount, rate: float) -> RolePlan:
    chunk = job.transport.chunk_mib << 20
    bundles = sum(
        estimate.bundle_bytes(part, model.hidden, job.transport.activation_dtype, chunk, scored=kind != "train")
        for kind, part in party.parts.items()
    )
    parts = list(party.parts.values())
    width = job.training.max_tokens
    recipient = job.release.to != "none" and party.name in job.release.to
    work = estimate.former_operations(model, sum(p.tokens for p in parts), width)
    systems = 1 + ("base" in job.evaluation.baselines)
    return RolePlan(
        role="party",
        name=party.name,
        memory_bytes=estimate.party_memory(model, parts, estimate.BYTES[job.model.dtype], width),
        disk_bytes=bundles,
        bytes_up=estimate.bytes_up(bundles),
        bytes_down=estimate.bytes_down(party.parts["test"].records, systems, 4 * model.adapter if recipient else 0),
        seconds=estimate.seconds(work, rate),
    )


def _enclave_role(
    job: Job, model: ModelSize, parties: Sequence[PartyCount], roles: Sequence[RolePlan], took: float
) -> RolePlan:
    train = estimate.pooled([p.parts["train"] for p in parties])
    per_value = estimate.BYTES[job.model.dtype]
    cache = min(job.enclave.cache_mib << 20, int(train.tokens * model.hidden * per_value))
    return RolePlan(
        role="enclave",
        name="enclave",
        memory_bytes=team_memory(job, model, per_value, cache),
        disk_bytes=sum(role.disk_bytes for role in roles),
        bytes_up=sum(role.bytes_up for role in roles),
        bytes_down=sum(role.bytes_down for role in roles),
        seconds=took,
    )


def _timing(job: Job, model: ModelSize, parties: Sequence[PartyCount], passes: float, rate: float) -> dict[str, float]:
    """Seconds per phase on one machine like this one, where the parties share the processor."""
    width = job.training.max_tokens
    by_kind = {kind: estimate.pooled([p.parts[kind] for p in parties]) for kind in ("train", "validation", "test")}
    validations = job.training.evaluations * estimate.scoring_operations(
        model, by_kind["validation"], width, whole=False
    )
    systems = 1 + ("base" in job.evaluation.baselines)
    work = {
        "former layers": estimate.former_operations(model, sum(p.tokens for p in by_kind.values()), width),
        "training": estimate.training_operations(model, by_kind["train"], passes, width, whole=False) + validations,
        "scoring": systems * estimate.scoring_operations(model, by_kind["test"], width, whole=False),
    }
    if baselines := {"local", "central"} & set(job.evaluation.baselines):
        once = estimate.training_operations(model, by_kind["train"], passes, width, whole=True)
        score = estimate.scoring_operations(model, by_kind["test"], width, whole=True)
        # All parties' own trainings together see each record as often as the pooled one; each scores every test set.
        trainings = {"central": 1, "local": len(parties)}
        work["baselines"] = sum(once + trainings[name] * score for name in baselines)
    return {phase: estimate.seconds(operations, rate) for phase, operations in work.items()}


def _warnings(job: Job, parties: Sequence[Party], sampled: Sequence[str]) -> list[str]:
    found = ["times and memory are estimates from a short measurement of this machine"]
    if sampled:
        found.append(f"counts of tokens are extrapolated from {_SAMPLE} records per file: {', '.join(sampled)}")
    if keyless := [party.name for party in job.party if party.public_key is None]:
        found.append(f"job_id will differ once these parties have public keys: {', '.join(keyless)}")
    for party in parties:
        if cut := party.truncated.prompts + party.truncated.responses:
            found.append(
                f"{party.name}: about {cut:,} texts are longer than max_tokens and lose their beginning or end"
            )
    return found


def _spread(records: Sequence[Record], most: int) -> Sequence[Record]:
    """At most `most` records, evenly spread over the file, since files are often sorted."""
    if len(records) <= most:
        return records
    return [records[i * len(records) // most] for i in range(most)]
