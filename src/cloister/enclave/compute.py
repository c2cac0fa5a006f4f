"""What every process of an enclave does alike: open the bundles, train on their packs, score the test sets."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field

from peft import PeftModel

from cloister.adapters.add import add_adapter
from cloister.crypto.bundle import SealedReader, VerifiedBundle
from cloister.crypto.keys import DataKey
from cloister.data.activations import Schema
from cloister.data.payload import Payload
from cloister.enclave.pool import Pool
from cloister.errors import CloisterError, JobError, ProtocolError
from cloister.evaluation.scores import Scores, score
from cloister.job import Job
from cloister.model.anatomy import DTYPES
from cloister.model.cut import Latter
from cloister.training.checkpoint import Checkpoint, Point
from cloister.training.examine import examine, sample_packs
from cloister.training.first_step import first_step
from cloister.training.loop import Fit, Stepper, TrainingResult, train
from cloister.training.schedule import plan_steps
from cloister.training.team import Alone, Team

Sources = Mapping[str, Mapping[str, tuple[VerifiedBundle, DataKey]]]
"""By kind and party: a bundle that is here, and its key."""
Payloads = Mapping[str, Mapping[str, Payload]]


@dataclass(frozen=True, kw_only=True)
class Work:
    """One job's training and scoring, as one process of a team sees it."""

    job: Job
    cut: int
    latter: Latter
    payloads: Payloads
    cache_bytes: int
    """Of this process, for decrypted packs."""
    team: Team = field(default_factory=Alone)
    place: Callable[[Latter, PeftModel], None] = lambda latter, adapted: None
    """Called once the adapter is there: may part the frozen weights between the processes."""

    @property
    def systems(self) -> list[str]:
        """What is scored."""
        return ["base", "cloister"] if "base" in self.job.evaluation.baselines else ["cloister"]


def open_payloads(opened: ExitStack, job: Job, latter: Latter, sources: Sources) -> Payloads:
    """Open all bundles until `opened` is closed; what is in them is decrypted when it is read.

    Raises:
        ProtocolError: a bundle's header or index is malformed, or a test set has more examples than the job takes;
            names the party.
    """
    payloads = {
        kind: {party: _open(opened, job, latter, f"{kind} bundle of {party}", *source) for party, source in of.items()}
        for kind, of in sources.items()
    }
    most = job.evaluation.max_examples
    for payload in payloads.get("test", {}).values():
        if most is not None and (count := len(payload.examples())) > most:
            raise ProtocolError(f"there are {count} examples, the job takes {most}", where=payload.where)
    return payloads


def require_packs(payloads: Payloads, job: Job) -> None:
    """Refuse more processes than a step has packs: some would never have anything to do.

    Raises: JobError.
    """
    tokens = [count for payload in payloads["train"].values() for count in payload.tokens]
    most = max(len(members) for members in plan_steps(tokens, job.training, job.job.seed))
    if job.enclave.processes > most:
        message = f"{job.enclave.processes} processes share the packs of a step, but no step has more than {most}"
        hint = "take fewer processes, or more [training] batch_tokens"
        raise JobError(message, where="[enclave] processes", hint=hint)


def run_training(
    work: Work,
    *,
    resume: Checkpoint | None,
    on_point: Callable[[Point, int], None] = lambda point, num_steps: None,
    on_checkpoint: Callable[[Checkpoint], None] = lambda checkpoint: None,
) -> tuple[PeftModel, TrainingResult]:
    """Put the adapter into the latter half and train it, from the beginning or from a checkpoint; then look at how it
    fits each party's packs.

    Raises:
        ProtocolError, VerificationError: a bundle's content is malformed or was altered; names the party.
        RunError: training diverged, or another process is gone.
    """
    job, latter = work.job, work.latter
    pool = Pool(list(work.payloads["train"].values()), work.cache_bytes)
    placed_by = functools.partial(first_step, latter, pool, job.training, job.job.seed)
    adapted = add_adapter(latter, job.adapter, first_layer=work.cut, seed=job.job.seed, first_step=placed_by)
    work.team.require_same(dict(adapted.named_parameters()), "the model with its adapter")
    work.place(latter, adapted)
    validation = [(p, p.examples()) for p in work.payloads.get("validation", {}).values()]

    def validate() -> float:
        scores = [score(latter, p, examples, where=p.where, team=work.team) for p, examples in validation]
        return float(sum(s.bits.sum() for s in scores) / sum(s.response_bytes.sum() for s in scores))

    result = train(
        latter,
        adapted,
        pool,
        job.training,
        seed=job.job.seed,
        validate=validate if validation else None,
        on_point=on_point,
        resume=resume,
        checkpoints=job.checkpoint.count,
        on_checkpoint=on_checkpoint,
        team=work.team,
        owner=pool.owner,
    )
    result.fits = _fits(work, adapted, pool, result.tokens)
    return adapted, result


def _fits(work: Work, adapted: PeftModel, pool: Pool, trained_tokens: int) -> dict[str, Fit]:
    """How the trained adapter fits each party's training packs."""
    lengths = [len(payload) for payload in work.payloads["train"].values()]
    places = [range(end - length, end) for end, length in zip(itertools.accumulate(lengths), lengths, strict=True)]
    chosen = sample_packs(pool.tokens, places, trained_tokens, work.job.job.seed)
    stepper = Stepper(work.latter, adapted, work.job.training, team=work.team)
    return dict(zip(work.payloads["train"], examine(stepper, pool, chosen, pool.owner), strict=True))


def run_scoring(
    work: Work, adapted: PeftModel, on_tokens: Callable[[int], None] = lambda tokens: None
) -> dict[str, dict[str, Scores]]:
    """Scores of every party's test set by system and party; `on_tokens` is told of progress.

    Raises: as `run_training`.
    """
    tests = {party: (payload, payload.examples()) for party, payload in work.payloads["test"].items()}
    found = {}
    for system in work.systems:
        with adapted.disable_adapter() if system == "base" else nullcontext():
            found[system] = {
                party: score(work.latter, payload, examples, where=payload.where, on_pack=on_tokens, team=work.team)
                for party, (payload, examples) in tests.items()
            }
    return found


def _open(opened: ExitStack, job: Job, latter: Latter, where: str, bundle: VerifiedBundle, key: DataKey) -> Payload:
    schema = Schema(
        activation_dtype=job.transport.activation_dtype,
        hidden=latter.config.get_text_config().hidden_size,
        vocabulary=latter.config.get_text_config().vocab_size,
        max_tokens=job.training.max_tokens,
    )
    if dict(bundle.header.schema) != {"activation_dtype": schema.activation_dtype, "hidden": schema.hidden}:
        raise ProtocolError(f"its header declares {dict(bundle.header.schema)}", where=where)
    reader = opened.enter_context(SealedReader(bundle, key))
    read = functools.partial(_read, reader, where)
    return Payload.open(read, bundle.payload_bytes, schema, DTYPES[job.model.dtype], where)


def _read(reader: SealedReader, where: str, offset: int, length: int) -> bytes:
    """Plaintext of a bundle; errors name the party and the kind, where the reader knows only a path of this machine."""
    try:
        return reader.read(offset, length)
    except CloisterError as exc:
        exc.where = where
        raise
