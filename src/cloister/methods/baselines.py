"""What cloister is compared with, on one machine that holds everybody's data: each party alone, and all data pooled.

Both train the job's adapter on *all* layers of the whole model, with the job's settings and the same batches that the
enclave sees. A party alone makes as many passes over its own data as the pooled training makes over all data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from cloister.adapters.add import add_adapter
from cloister.agreement.job import open_job
from cloister.data.packing import Pack
from cloister.data.prepare import PartyData, prepare
from cloister.errors import DataError
from cloister.evaluation.scores import Scores, score
from cloister.job import Job, TrainingSection
from cloister.jobfile import LoadedJob, ResolvedJob
from cloister.model.anatomy import load_model, load_tokenizer, pick_device
from cloister.model.cut import Whole
from cloister.model.repacked import repack
from cloister.progress import Progress, task
from cloister.training.checkpoint import Point
from cloister.training.first_step import first_step
from cloister.training.loop import PackList, TrainingResult, train

Curve = list[dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """One training: its scores on every party's test set, and its curve."""

    scores: dict[str, Scores]
    curve: Curve


Kind = Literal["central", "local"]
KINDS: tuple[Kind, ...] = ("central", "local")


def trainings(job: Job, kind: Kind) -> list[str]:
    """What a kind of baseline consists of: "central", or "local:NAME" for each party."""
    return ["central"] if kind == "central" else [f"local:{party.name}" for party in job.party]


def baseline_job(loaded: LoadedJob, kind: Kind, out: Path, *, progress: Progress) -> None:
    """One kind of baseline of a job whose parties all have keys, as a process of its own.

    Raises:
        CloisterError: see `open_job` and `run_baselines`.
    """
    resolved = open_job(loaded, progress=progress).resolved
    run_baselines(resolved, kind, out, device=pick_device(loaded.job.enclave.device), progress=progress)


def run_baselines(resolved: ResolvedJob, kind: Kind, folder: Path, *, device: str, progress: Progress) -> None:
    """Train and score one kind of baseline, and leave the results in `folder`.

    Trainings that are finished there are not repeated, so that a run that was interrupted continues.
    """
    missing = [name for name in trainings(resolved.job, kind) if _read(resolved, folder, name) is None]
    if not missing:
        return
    with task(progress, "reading records"):
        tokenizer = load_tokenizer(resolved.model.folder)
        loaded = resolved.loaded
        data = {
            p.name: prepare(
                resolved.job, tokenizer, loaded.data_file(p.name, "train"), loaded.data_file(p.name, "test")
            )
            for p in resolved.job.party
        }
    for name in missing:
        _write(folder, name, _run(resolved, data, name, device, progress))


def read_baselines(resolved: ResolvedJob, kinds: Sequence[Kind], folder: Path) -> dict[str, Baseline]:
    """The finished trainings of some kinds.

    Raises:
        DataError: one is missing.
    """
    found = {}
    for name in (name for kind in kinds for name in trainings(resolved.job, kind)):
        baseline = _read(resolved, folder, name)
        if baseline is None:
            raise DataError(f"the baseline {name} is not finished", where=str(folder))
        found[name] = baseline
    return found


def _run(resolved: ResolvedJob, data: Mapping[str, PartyData], name: str, device: str, progress: Progress) -> Baseline:
    job = resolved.job
    members = list(data) if name == "central" else [name.partition(":")[2]]
    packs = [pack for party in members for pack in data[party].parts["train"].packs]
    whole = Whole(repack(load_model(resolved.model.folder, job.model.dtype, device), job.enclave.repack))
    source, training = PackList(packs), _scaled(job.training, packs, data)
    placed_by = partial(first_step, whole, source, training, job.job.seed)
    adapted = add_adapter(whole, job.adapter, first_layer=0, seed=job.job.seed, first_step=placed_by)

    def validate() -> float:
        parts = [data[party].parts["validation"] for party in members if "validation" in data[party].parts]
        scores = [score(whole, PackList(part.packs), part.examples, where=name) for part in parts]
        return float(sum(s.bits.sum() for s in scores) / sum(s.response_bytes.sum() for s in scores))

    with task(progress, name, unit="steps") as running:

        def on_point(point: Point, num_steps: int) -> None:
            running.set(point.step, total=num_steps, note=f"loss {point.train_loss:.3f}")

        result = train(
            whole,
            adapted,
            source,
            training,
            seed=job.job.seed,
            validate=validate if job.data.validation > 0 else None,
            on_point=on_point,
        )
    tokens = sum(len(p) for d in data.values() for p in d.parts["test"].packs)
    with task(progress, f"{name}: scoring", total=tokens, unit="tokens") as running:
        scores = {
            party: score(
                whole,
                PackList(d.parts["test"].packs),
                d.parts["test"].examples,
                where=party,
                on_pack=running.advance,
            )
            for party, d in data.items()
        }
    return Baseline(scores=scores, curve=_curve(result))


def _scaled(training: TrainingSection, packs: list[Pack], data: Mapping[str, PartyData]) -> TrainingSection:
    """The job's training, with `steps` scaled so that fewer data mean proportionally fewer steps."""
    if training.steps is None:
        return training
    everything = sum(len(p) for d in data.values() for p in d.parts["train"].packs)
    share = sum(map(len, packs)) / everything
    return training.model_copy(update={"steps": max(1, round(training.steps * share))})


def _curve(result: TrainingResult) -> Curve:
    names = ("step", "tokens", "train_loss", "validation_bits_per_byte")
    return [{k: v for k, v in asdict(p).items() if k in names and v is not None} for p in result.curve]


def _folder(folder: Path, name: str) -> Path:
    return folder / name.replace(":", "-", 1)


def _write(folder: Path, name: str, baseline: Baseline) -> None:
    place = _folder(folder, name)
    place.mkdir(parents=True, exist_ok=True)
    for party, scores in baseline.scores.items():
        (place / f"{party}.jsonl").write_text(scores.to_json_lines(), encoding="utf-8")
    part = place / "curve.json.part"
    part.write_text(json.dumps(baseline.curve))
    part.replace(place / "curve.json")


def _read(resolved: ResolvedJob, folder: Path, name: str) -> Baseline | None:
    place = _folder(folder, name)
    with suppress(OSError, ValueError, DataError):
        curve = json.loads((place / "curve.json").read_text())  # written last: without it the rest is incomplete
        names = [party.name for party in resolved.job.party]
        texts = {party: (place / f"{party}.jsonl").read_text(encoding="utf-8") for party in names}
        return Baseline(scores={p: Scores.from_json_lines(t) for p, t in texts.items()}, curve=curve)
    return None
