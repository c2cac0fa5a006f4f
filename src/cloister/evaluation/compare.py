"""Paired comparisons: between the systems of one run, and between two runs.

Two systems are compared on the same examples, paired by example id; anything that does not pair is an error, never left
out. p-values are Holm-corrected over the parties of one metric and one pair of systems. The pooled row ("all") is one
question asked once, so it is a family of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cloister.errors import DataError
from cloister.evaluation import statistics
from cloister.evaluation.rows import ByParty, scored_rows
from cloister.evaluation.scores import Scores
from cloister.evaluation.statistics import Difference
from cloister.report.model import ALL, OTHERS, Comparison, Metric, RunReport, System
from cloister.report.outputs import CompareReport, RunRef

_NAMED = 3
"""How many unpaired example ids an error names."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two systems' scores of the same n examples in the same order."""

    a: Scores
    b: Scores


@dataclass(frozen=True, kw_only=True)
class ScoredRun:
    """A finished run and the per-example scores of one of its systems."""

    path: str
    report: RunReport
    system: System
    scores: ByParty


def scores_path(folder: Path, party: str, system: str) -> Path:
    """Where a run folder keeps a party's per-example scores."""
    return folder / "parties" / party / "scores" / f"{system}.jsonl"


def load_run(folder: Path, system: System = "cloister") -> ScoredRun:
    """A run folder's report and the scores of one system.

    Raises:
        DataError: the report or a party's scores are missing or malformed.
    """
    report = RunReport.read(folder / "report.json")
    scores = {party.name: load_scores(scores_path(folder, party.name, system)) for party in report.parties}
    return ScoredRun(path=str(folder), report=report, system=system, scores=scores)


def compare(a: ScoredRun, b: ScoredRun) -> CompareReport:
    """Compare two runs on the examples that both scored.

    Raises:
        DataError: the runs have different parties, or an example is in only one of them, or differs between them.
    """
    warnings = []
    if a.report.model != b.report.model:
        warnings.append(f"the base models differ: {a.report.model} and {b.report.model}")
    return CompareReport(
        a=_reference(a),
        b=_reference(b),
        comparisons=compare_scores(a.scores, b.scores, names=("a", "b"), where=f"{a.path} and {b.path}"),
        scores_a=scored_rows(a.scores),
        scores_b=scored_rows(b.scores),
        warnings=warnings,
    )


def compare_systems(systems: Mapping[System, ByParty], a: System = "cloister") -> list[Comparison]:
    """System a of a run against each of its other systems; "local" is each party's own model on its own test set."""
    rows = []
    for b, scores in systems.items():
        if b != a:
            rows += compare_scores(systems[a], scores, names=(a, b), where=f"{a} and {b}")
    return rows


def compare_with_foreign(cloister: ByParty, local: Mapping[str, ByParty]) -> list[Comparison]:
    """Cloister against each party's own model on the pooled test sets of all other parties.

    Args:
        cloister: {owner of the test set: scores}.
        local: {trained on: {owner of the test set: scores}}.
    """
    families: dict[str, list[Pair]] = {}
    for trained_on, scores in local.items():
        others = [party for party in scores if party != trained_on]
        if others:
            families[trained_on] = [pair(cloister[p], scores[p], where=f"{trained_on} on {p}") for p in others]
    rows = []
    for metric in _METRICS:
        tested = {name: _difference(metric, pairs) for name, pairs in families.items()}
        for name, (found, holm_p, count) in _corrected(tested).items():
            row = _row(("cloister", "local"), OTHERS, metric, found, holm_p, count)
            rows.append(row.model_copy(update={"trained_on": name}))
    return rows


def compare_scores(a: ByParty, b: ByParty, *, names: tuple[str, str], where: str) -> list[Comparison]:
    """Rows for each party and the pool, for bits per byte and, where there are choices, accuracy.

    Raises:
        DataError: parties or examples do not pair.
    """
    if set(a) != set(b):
        lone = ", ".join(sorted(set(a) ^ set(b)))
        raise DataError(f"only one side has scores of: {lone}", where=where)
    pairs = {party: pair(a[party], b[party], where=f"{where}, party {party}") for party in a}
    rows = []
    for metric in _METRICS:
        tested = {party: _difference(metric, [p]) for party, p in pairs.items()}
        rows += [_row(names, party, metric, *rest) for party, rest in _corrected(tested).items()]
        pooled, count = _difference(metric, list(pairs.values()))
        if pooled is not None:
            rows.append(_row(names, ALL, metric, pooled, pooled.p, count))
    return rows


def pair(a: Scores, b: Scores, *, where: str) -> Pair:
    """b in the order of a.

    Raises:
        DataError: an example id is doubled or in only one of the two, or an example's task, response or choices differ.
    """
    for ids in (a.example_id, b.example_id):
        if len(set(ids)) != len(ids):
            raise DataError("an example id occurs twice", where=where)
    lone = sorted(set(a.example_id) ^ set(b.example_id))
    if lone:
        raise DataError(
            f"{len(lone)} examples are in only one of the two: {_some(lone)}",
            where=where,
            hint="score both with the same test files, seed and max_examples",
        )
    position = {example: index for index, example in enumerate(b.example_id)}
    ordered = b.take(np.array([position[i] for i in a.example_id], dtype=np.int64))
    same = (a.response_bytes == ordered.response_bytes) & ((a.correct < 0) == (ordered.correct < 0))
    same &= np.array(a.task) == np.array(ordered.task)
    if not same.all():
        differing = [a.example_id[i] for i in np.flatnonzero(~same)]
        raise DataError(
            f"{len(differing)} examples have another task, response or choices: {_some(differing)}", where=where
        )
    return Pair(a=a, b=ordered)


def _bits_per_byte(pairs: list[Pair]) -> Difference | None:
    return statistics.bits_per_byte_difference(
        np.concatenate([p.a.bits for p in pairs]),
        np.concatenate([p.b.bits for p in pairs]),
        np.concatenate([p.a.response_bytes for p in pairs]),
    )


def _accuracy(pairs: list[Pair]) -> Difference | None:
    return statistics.accuracy_difference(
        np.concatenate([p.a.correct for p in pairs]), np.concatenate([p.b.correct for p in pairs])
    )


_METRICS: dict[Metric, Callable[[list[Pair]], Difference | None]] = {
    "bits_per_byte": _bits_per_byte,
    "accuracy": _accuracy,
}


def _difference(metric: Metric, pairs: list[Pair]) -> tuple[Difference | None, int]:
    """The difference over some parties' examples and the number of examples it rests on."""
    judged = [len(p.a.example_id) if metric == "bits_per_byte" else int((p.a.correct >= 0).sum()) for p in pairs]
    return _METRICS[metric](pairs), sum(judged)


def _corrected(
    family: Mapping[str, tuple[Difference | None, int]],
) -> dict[str, tuple[Difference, float, int]]:
    """The members of a family that have a difference, with Holm's p-values."""
    found = {name: (d, count) for name, (d, count) in family.items() if d is not None}
    corrected = statistics.holm([d.p for d, _ in found.values()])
    return {name: (d, p, count) for (name, (d, count)), p in zip(found.items(), corrected, strict=True)}


def _row(
    names: tuple[str, str], party: str, metric: Metric, found: Difference, p_holm: float, examples: int
) -> Comparison:
    return Comparison(
        a=names[0],
        b=names[1],
        party=party,
        metric=metric,
        delta=found.delta,
        ci=found.interval,
        p=found.p,
        p_holm=p_holm,
        examples=examples,
    )


def _reference(run: ScoredRun) -> RunRef:
    report = run.report
    return RunRef(
        path=run.path, job_id=report.job_id, job_name=report.job_name, system=run.system, created=report.created
    )


def load_scores(path: Path) -> Scores:
    """A file of per-example scores.

    Raises:
        DataError: it is missing, malformed, or holds what no scoring can give.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as exc:
        raise DataError(
            f"cannot read per-example scores: {exc.strerror}",
            where=str(path),
            hint="a run keeps the scores of cloister and of the systems in [evaluation] baselines",
        ) from exc
    except UnicodeDecodeError as exc:
        raise DataError("per-example scores are not UTF-8 text", where=str(path)) from exc
    scores = Scores.from_json_lines(text, where=str(path))
    sound = np.isfinite(scores.bits) & (scores.response_bytes >= 1) & np.isin(scores.correct, (-1, 0, 1))
    if len(scores) == 0 or not sound.all():
        line = "" if len(scores) == 0 else f":{int(np.flatnonzero(~sound)[0]) + 1}"
        raise DataError("holds no scores" if not line else "is not a possible score", where=f"{path}{line}")
    return scores


def _some(ids: list[str]) -> str:
    return ", ".join(repr(i) for i in ids[:_NAMED]) + (", ..." if len(ids) > _NAMED else "")
