"""What is trained and scored: one cell of the study is one system with one job, and its result is kept by job id."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from cloister.agreement.job import find_cut
from cloister.errors import DataError
from cloister.evaluation.scores import Scores
from cloister.job import Job
from cloister.jobfile import ResolvedJob, find_model, parse_job, render_job, resolve

System = Literal["base", "local", "central", "latter", "fedavg", "split", "slice", "shira"]
"""base: untrained. local: each party alone, all layers. central: all data in one place, all layers. latter: the same,
layers from the cut on. fedavg: rounds in plain floating point. split, slice: Cloister's. shira: PEFT's adapter of that
name in place of the job's, on the same layers as `split`."""
Judged = Literal["validation", "test"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training (of `local`: one per party) and its scores."""

    system: System
    job: Job
    judged: Judged = "test"

    def resolve(self, folder: Path) -> ResolvedJob:
        """The job with its id. Paths in it are absolute, so that `folder` is only for messages."""
        loaded = parse_job(render_job(self.job), folder / "job.toml")
        find_model(Path(self.job.model.path), where="[model] path")
        return resolve(
            loaded, cut=find_cut(loaded, find_model(Path(self.job.model.path), where="[model] path")), policy_bytes=b""
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a cell gave. `scores` by party; seconds include preparing and scoring."""

    scores: dict[str, Scores]
    steps: int = 0
    tokens: int = 0
    trained_parameters: int = 0
    seconds: float = 0.0
    train_loss: list[float] = field(default_factory=list)
    """Nats per target of every step, or of every round's mean."""

    def bits_per_byte(self) -> float:
        """Of all parties' examples together."""
        bits = sum(float(s.bits.sum()) for s in self.scores.values())
        return bits / sum(int(s.response_bytes.sum()) for s in self.scores.values())


class Store:
    """Results in a folder, one file per cell, named by job id, system and what was judged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, cell: Cell, job_id: str) -> Path:
        return self.folder / f"{job_id[:32]}-{cell.system}-{cell.judged}.json"

    def read(self, cell: Cell, job_id: str, data_sha256: str) -> Outcome | None:
        """The kept result, unless there is none or it was made from other data."""
        path = self.path(cell, job_id)
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("data_sha256") != data_sha256 or content.pop("job_id") != job_id:
                return None
            scores = {p: Scores.from_json_lines(t, where=str(path)) for p, t in content.pop("scores").items()}
            return Outcome(scores=scores, **content)
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise DataError("is not a result of this study", where=str(path), hint="delete the file") from exc

    def write(self, cell: Cell, job_id: str, data_sha256: str, outcome: Outcome) -> None:
        """Whole or not at all, so that an interrupted study goes on."""
        content: dict[str, Any] = {"job_id": job_id, "data_sha256": data_sha256}
        content |= asdict(outcome) | {"scores": {p: s.to_json_lines() for p, s in outcome.scores.items()}}
        path = self.path(cell, job_id)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(content), encoding="utf-8")
        part.replace(path)


def data_sha256(job: Job) -> str:
    """Of the parties' files, which are no part of the job's id."""
    digest = hashlib.sha256()
    for party in job.party:
        for path in (party.train, party.test):
            digest.update(hashlib.sha256(Path(path or "").read_bytes()).digest())
    return digest.hexdigest()
