"""`cloister plan` for method `slice`: what parties' enclaves, accelerators and the server's enclave will need.

Pads are counted from the data and the job's steps, exactly as a party counts them when it starts: so all records are
read. Times come from a moment of each kind of work on this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from cloister.adapters.add import add_adapter
from cloister.data.prepare import PartyData, prepare
from cloister.errors import DataError
from cloister.federation.aggregate import keeps_no_moments
from cloister.job import Job
from cloister.jobfile import LoadedJob, ModelFiles
from cloister.masking.budget import PadBudget
from cloister.masking.dual import require_two
from cloister.masking.layout import lay_out
from cloister.masking.pads import PadAllocator, PadKey
from cloister.masking.product import modular_product
from cloister.masking.skeleton import plan_groups
from cloister.masking.weights import GroupPlan
from cloister.methods import estimate
from cloister.methods.estimate import ModelSize, PartCount
from cloister.methods.host import usable_cpus
from cloister.methods.plan_parts import MethodPlan, best_time, describe_party
from cloister.model.anatomy import load_tokenizer
from cloister.model.cut import Whole
from cloister.model.hollow import hollow_model
from cloister.progress import Progress, task
from cloister.report.model import Records, Truncated
from cloister.report.plan import MaskingPlan, PartyPads, RolePlan
from cloister.silo.budget import party_budget, party_work, rows_at_start
from cloister.silo.model import IN_FLIGHT, insecure
from cloister.training.loop import PackList
from cloister.training.schedule import plan_steps

_MASKED_ROWS = 512


@dataclass(frozen=True, kw_only=True)
class SiloCount:
    """One party's data, steps and pads."""

    name: str
    parts: Mapping[str, PartCount]
    truncated: Truncated
    steps: int
    tokens: int
    """Trained on, over all steps."""
    passes: int
    """Packs through the whole model, backward ones too."""
    budget: PadBudget
    disk_bytes: int
    """Of precomputed pads."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What this machine does in a second."""

    multiply_adds: float
    """Of integers modulo 2^32 with int8 weights."""
    elements: float
    """Masked and unmasked again, each on one thread."""
    operations: float
    """Of floating-point matrix products, see `plan.measure_rate`."""


def plan_slice(
    loaded: LoadedJob, files: ModelFiles, model: ModelSize, rate: Callable[[], float], progress: Progress
) -> MethodPlan:
    """The part of a plan that is this method's own.

    Args:
        rate: measures the machine's floating-point products.

    Raises:
        JobError, DataError, ModelError, AdapterError: as a run would.
    """
    job = loaded.job
    if job.masking.pads == "dual" and job.masking.accelerators:
        require_two(job.masking.accelerators)
    groups = plan_groups(files.folder)
    trainable = count_trainable(job, files)
    silos = []
    with task(progress, "tokenising", total=len(job.party), unit="parties") as running:
        for party in job.party:
            silos.append(count_silo(loaded, files, groups, party.name))
            running.advance()
    with task(progress, "measuring this machine"):
        threads = job.enclave.threads or usable_cpus()
        rates = Rates(
            multiply_adds=measure_products(groups) * threads,
            elements=measure_masks(groups) * threads,
            operations=rate(),
        )
    computed = job.masking.pads == "precomputed"
    pads = [_pads(silo, rates if computed else None) for silo in silos]
    return MethodPlan(
        trainable=trainable,
        steps=max(silo.steps for silo in silos),
        parties=[describe_party(job, s.name, Records(**_records(s)), s.truncated) for s in silos],
        roles=_roles(job, model, groups, trainable, silos, pads, rates),
        timing=_timing(job, model, silos, pads, rates),
        masking=MaskingPlan(
            rounds=job.federation.rounds,
            pads=job.masking.pads,
            bits=job.masking.bits,
            checked=job.masking.check,
            parties=pads,
            bytes_per_token=_bytes_per_token(job, pads),
            insecure=insecure(job.masking),
        ),
    )


def count_silo(loaded: LoadedJob, files: ModelFiles, groups: Sequence[GroupPlan], name: str) -> SiloCount:
    """Read one party's records and count its work.

    Raises:
        JobError, DataError: a file is missing, a record is malformed, or there are fewer steps than rounds.
    """
    job = loaded.job
    data = prepare(job, load_tokenizer(files.folder), loaded.data_file(name, "train"), loaded.data_file(name, "test"))
    packs = PackList(data.parts["train"].packs)
    steps = plan_steps(packs.tokens, job.training, job.job.seed)
    if len(steps) < job.federation.rounds:
        raise DataError(
            f"its {len(steps)} steps cannot be spread over {job.federation.rounds} rounds",
            where=name,
            hint="lower [federation] rounds, or [training] batch_tokens",
        )
    budget, work = party_budget(job, data, groups, vocabulary=groups[-1].outputs), party_work(job, data)
    disk = lay_out(groups, rows_at_start(job, budget), parts=budget.parts).sealed_bytes
    return SiloCount(
        name=name,
        parts=_parts(data),
        truncated=Truncated(prompts=data.truncated.prompts, responses=data.truncated.responses),
        steps=len(steps),
        tokens=sum(packs.tokens[index] for members in steps for index in members),
        passes=2 * len(work.trained) + len(work.scored),
        budget=budget,
        disk_bytes=disk if job.masking.pads == "precomputed" else 0,
    )


def count_trainable(job: Job, files: ModelFiles) -> int:
    """Parameters that a job trains, of whatever kind its adapter is."""
    adapted = add_adapter(Whole(hollow_model(files.folder)), job.adapter, first_layer=0, seed=job.job.seed)
    return sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


def measure_products(groups: Sequence[GroupPlan]) -> float:
    """Multiply-adds per second of one thread, of pads with int8 weights of the model's widest group but the head."""
    widest = max(groups[:-1], key=lambda group: group.inputs * group.outputs)
    z_TK = torch.randint(-(2**31), 2**31 - 1, (_MASKED_ROWS, widest.inputs), dtype=torch.int32)
    weight_KM = torch.randint(-127, 128, (widest.inputs, widest.outputs), dtype=torch.int8)
    best = best_time(lambda: modular_product(z_TK, weight_KM))
    return _MASKED_ROWS * widest.inputs * widest.outputs / best


def measure_masks(groups: Sequence[GroupPlan]) -> float:
    """Elements per second of one thread: encoded, masked, and a product of as many unmasked and decoded."""
    width = max(group.inputs for group in groups)
    x_TK = torch.randn(_MASKED_ROWS, width)
    key, allocator = PadKey(), PadAllocator()

    def mask() -> None:
        pad_TK = key.expand(allocator.take(x_TK.numel()), (_MASKED_ROWS, width))
        z_TK = (x_TK * 1000.0).round_().to(torch.int32) + pad_TK
        (z_TK - pad_TK).to(torch.float32).mul_(0.001)

    return x_TK.numel() / best_time(mask)


def _parts(data: PartyData) -> dict[str, PartCount]:
    return {
        kind: PartCount(
            records=part.records,
            tokens=sum(map(len, part.packs)),
            targets=sum(len(p.target_pos_N) for p in part.packs),
            packs=len(part.packs),
            groups=sum(len(p.group_role_G) for p in part.packs),
        )
        for kind, part in data.parts.items()
    }


def _records(silo: SiloCount) -> dict[str, int]:
    empty = PartCount()
    return {kind: silo.parts.get(kind, empty).records for kind in ("train", "validation", "test")}


def _pads(silo: SiloCount, rates: Rates | None) -> PartyPads:
    """rates: None where pads are not computed beforehand."""
    budget = silo.budget
    return PartyPads(
        party=silo.name,
        steps=silo.steps,
        tokens=silo.tokens,
        rows=sum(budget.rows.values()),
        disk_bytes=silo.disk_bytes,
        pad_seconds=0.0 if rates is None else budget.multiply_adds / rates.multiply_adds,
        bytes_up=budget.bytes_up,
        bytes_down=budget.bytes_down,
    )


def _bytes_per_token(job: Job, pads: Sequence[PartyPads]) -> dict[Literal["up", "down"], int]:
    tokens, replies = sum(p.tokens for p in pads), 2 if job.masking.pads == "dual" else 1
    up, down = sum(p.bytes_up for p in pads), sum(p.bytes_down for p in pads) * replies
    return {"up": round(up / tokens), "down": round(down / tokens)}


def _roles(
    job: Job,
    model: ModelSize,
    groups: Sequence[GroupPlan],
    trainable: int,
    silos: Sequence[SiloCount],
    pads: Sequence[PartyPads],
    rates: Rates,
) -> list[RolePlan]:
    width = job.training.max_tokens
    state = estimate.update_bytes(trainable, moments=not keeps_no_moments(job.federation))
    names = ["accelerator", "second accelerator"][: 2 if job.masking.pads == "dual" else 1]
    roles = [
        RolePlan(
            role="party",
            name=silo.name,
            memory_bytes=estimate.silo_memory(model, trainable, width, packs=IN_FLIGHT),
            disk_bytes=silo.disk_bytes,
            bytes_up=job.federation.rounds * state,
            bytes_down=job.federation.rounds * state + (4 * trainable) * (job.training.evaluations + 1),
            seconds=own.pad_seconds + _enclave_seconds(model, silo, width, rates),
        )
        for silo, own in zip(silos, pads, strict=True)
    ]
    roles += [
        RolePlan(
            role="accelerator",
            name=name,
            memory_bytes=estimate.accelerator_memory(
                [(group.inputs, group.outputs) for group in groups], job.masking.bits // 8, width, silos=len(silos)
            ),
            disk_bytes=0,
            # The second one is sent positions, and expands the pads itself.
            bytes_up=sum(p.bytes_up for p in pads) if name == names[0] else 0,
            bytes_down=sum(p.bytes_down for p in pads),
            seconds=sum(silo.budget.multiply_adds for silo in silos) / rates.multiply_adds,
        )
        for name in names
    ]
    server = RolePlan(
        role="enclave",
        name="enclave",
        memory_bytes=estimate.server_memory(state, len(silos)),
        disk_bytes=job.checkpoint.count * state,
        bytes_up=sum(role.bytes_up for role in roles if role.role == "party"),
        bytes_down=sum(role.bytes_down for role in roles if role.role == "party"),
        seconds=None,
    )
    return [*roles, server]


def _enclave_seconds(model: ModelSize, silo: SiloCount, width: int, rates: Rates) -> float:
    """Masks and everything between the frozen layers, on all threads of this machine."""
    masks = (silo.budget.bytes_up + silo.budget.bytes_down) / 4 / rates.elements
    return masks + estimate.seconds(silo.passes * width * estimate.between_layers(model, width), rates.operations)


def _timing(
    job: Job, model: ModelSize, silos: Sequence[SiloCount], pads: Sequence[PartyPads], rates: Rates
) -> dict[str, float]:
    """Seconds per phase where one machine like this one has all roles."""
    replies, width = 2 if job.masking.pads == "dual" else 1, job.training.max_tokens
    products = replies * sum(silo.budget.multiply_adds for silo in silos) / rates.multiply_adds
    timing = {
        "computing pads": sum(p.pad_seconds for p in pads),
        "accelerators": products,
        "parties' enclaves": sum(_enclave_seconds(model, silo, width, rates) for silo in silos),
    }
    train = estimate.pooled([silo.parts["train"] for silo in silos])
    test = estimate.pooled([silo.parts["test"] for silo in silos])
    passes = sum(silo.tokens for silo in silos) / train.tokens
    once = estimate.training_operations(model, train, passes, width, whole=True)
    score = estimate.scoring_operations(model, test, width, whole=True)
    trainings = {"central": 1, "local": len(silos)}
    kinds = [kind for kind in trainings if kind in job.evaluation.baselines]
    if kinds:
        timing["baselines"] = estimate.seconds(sum(once + trainings[k] * score for k in kinds), rates.operations)
    return {phase: seconds for phase, seconds in timing.items() if seconds > 0}
