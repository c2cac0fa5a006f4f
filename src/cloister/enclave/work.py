"""The enclave's work once the data keys are here: train the latter layers, score every party's test set, sign."""

from __future__ import annotations

import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

from peft import PeftModel

from cloister.adapters.state import adapter_files
from cloister.crypto.encoding import decode, encode
from cloister.enclave.closing import Clock, close_job
from cloister.enclave.compute import Work, open_payloads, require_packs, run_scoring, run_training
from cloister.enclave.core import EnclaveCore
from cloister.enclave.intake import BundleIntake
from cloister.enclave.results import Outcome
from cloister.enclave.workers import spread_out
from cloister.evaluation.outliers import fits_of
from cloister.jobfile import ResolvedJob
from cloister.model.cut import Latter
from cloister.progress import Progress, task
from cloister.training.checkpoint import Checkpoint, Point
from cloister.training.loop import TrainingResult


def train_and_score(
    core: EnclaveCore,
    intake: BundleIntake,
    resolved: ResolvedJob,
    latter: Latter,
    *,
    cache_bytes: int,
    progress: Progress,
    parted: bool = False,
) -> tuple[PeftModel, Outcome]:
    """Run the job on the bundles that have come in. The trained adapter stays in `latter`.

    Training goes on from the checkpoint that the parties have consented to, if there is one.

    Args:
        parted: whether the frozen layers are parted between the processes; `latter` is then of no use afterwards.

    Raises:
        ProtocolError: a bundle's content is malformed; names the party.
        VerificationError: a chunk of a bundle was altered since it arrived.
        RunError: training diverged.
        JobError: there are more processes than packs in a step.
    """
    before = _restore(core.restore())
    clock = Clock()
    with ExitStack() as opened:
        keys = core.data_keys()
        sources = {kind: intake.sources(kind, keys) for kind in core.kinds}
        payloads = open_payloads(opened, resolved.job, latter, sources)
        require_packs(payloads, resolved.job)
        work = Work(job=resolved.job, cut=resolved.cut, latter=latter, payloads=payloads, cache_bytes=cache_bytes)
        kind, model = core.claims.type, resolved.model.folder
        with task(progress, "starting processes") if resolved.job.enclave.processes > 1 else nullcontext():
            work = opened.enter_context(spread_out(work, model, sources, before.checkpoint, kind=kind, parted=parted))
        adapted, result = _train(core, work, progress, before)
        clock.lap("training", before.seconds)
        tokens = len(work.systems) * sum(sum(p.tokens) for p in payloads["test"].values())
        with task(progress, "scoring test sets", total=tokens, unit="tokens") as running:
            scores = run_scoring(work, adapted, running.advance)
        clock.lap("scoring")
    files = adapter_files(adapted, resolved.job.model.revision or resolved.model.folder.name)
    declared = _declared(result, clock.laps)
    return adapted, close_job(core, resolved, scores=scores, declared=declared, adapter=files, started=before.started)


def _train(core: EnclaveCore, work: Work, progress: Progress, before: _Before) -> tuple[PeftModel, TrainingResult]:
    began = time.monotonic()
    with task(progress, "training", unit="steps") as running:

        def on_point(point: Point, num_steps: int) -> None:
            core.announce(
                {"step": point.step, "tokens": point.tokens, "train_loss": point.train_loss, "num_steps": num_steps}
            )
            running.set(point.step, total=num_steps)  # the operator sees counts, never a loss

        return run_training(
            work,
            resume=before.checkpoint,
            on_point=on_point,
            on_checkpoint=lambda checkpoint: _save(core, before, began, checkpoint),
        )


@dataclass(frozen=True, kw_only=True)
class _Before:
    """What earlier instances have done: nothing, or training up to a checkpoint."""

    started: int
    """Seconds since 1970."""
    seconds: float = 0.0
    """Time spent on training."""
    checkpoint: Checkpoint | None = None


def _save(core: EnclaveCore, before: _Before, began: float, checkpoint: Checkpoint) -> None:
    seconds = before.seconds + time.monotonic() - began
    head = encode({"started": before.started, "seconds": seconds})
    core.lineage.add(len(head).to_bytes(4, "big") + head + checkpoint.to_bytes(), checkpoint.step)


def _restore(saved: bytes | None) -> _Before:
    """What `_save` has sealed."""
    if saved is None:
        return _Before(started=int(time.time()))
    end = 4 + int.from_bytes(saved[:4], "big")
    head = decode(saved[4:end], max_bytes=1024, what="checkpoint")
    checkpoint = Checkpoint.from_bytes(saved[end:])
    return _Before(started=head["started"], seconds=head["seconds"], checkpoint=checkpoint)


def _declared(result: TrainingResult, laps: dict[str, float]) -> dict[str, Any]:
    """What all parties see of the training beside the results."""
    return {
        "training": {
            "tokens": result.tokens,
            "tokens_per_s": result.tokens / max(laps["training"], 1e-9),
            "steps": result.steps,
            "best_step": result.best_step,
        },
        "curve": [
            {"step": p.step, "tokens": p.tokens, "train_loss": p.train_loss}
            | ({} if p.validation_bits_per_byte is None else {"validation_bits_per_byte": p.validation_bits_per_byte})
            for p in result.curve
        ],
        "fits": [
            fit.model_dump(mode="json")
            for fit in fits_of({name: (fit.tokens, fit.loss, fit.gradient_norm) for name, fit in result.fits.items()})
        ],
        "timing": laps,
    }
