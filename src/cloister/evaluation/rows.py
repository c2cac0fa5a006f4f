"""From per-example scores to the rows of a report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cloister.evaluation import statistics
from cloister.evaluation.scores import Scores
from cloister.report.model import ALL, OTHERS, CrossRow, ResultRow, Scored, System

ByParty = Mapping[str, Scores]
"""Owner of the test set to its scores, under one system."""


def results_rows(system: System, scores: ByParty, trained_on: str | None = None) -> list[ResultRow]:
    """One row for each (party, task), (party, "all"), ("all", task) and ("all", "all").

    For system "local", `scores` holds each party's own model on its own test set; `trained_on` stays None and is set
    to the party in the party's rows.

    Raises:
        ValueError: a party has no scores.
    """
    rows = []
    for row in _rows(scores):
        owner = row.party if system == "local" and row.party != ALL else trained_on
        rows.append(ResultRow(system=system, trained_on=owner, **dict(row)))
    return rows


def cross_rows(local: Mapping[str, ByParty]) -> list[CrossRow]:
    """Each party's own model on the others' test sets: a row per (party, task), (party, "all") and ("others", "all").

    Args:
        local: {trained on: {owner of the test set: scores}}; a model's scores on its own party are left out.
    """
    rows = []
    for trained_on, scores in local.items():
        foreign = {party: s for party, s in scores.items() if party != trained_on}
        if not foreign:
            continue
        own_rows = [row for party, s in foreign.items() for row in _party_rows(party, _Columns.of([s]))]
        own_rows.append(_row(OTHERS, ALL, _Columns.of(foreign.values())))
        rows += [CrossRow(trained_on=trained_on, **dict(row)) for row in own_rows]
    return rows


def scored_rows(scores: ByParty) -> list[Scored]:
    """As `results_rows`, without naming a system."""
    return list(_rows(scores))


@dataclass(frozen=True, kw_only=True)
class _Columns:
    """Scores of some examples, possibly of several parties: [n] each."""

    task: npt.NDArray[np.str_]
    bits: npt.NDArray[np.float64]
    response_bytes: npt.NDArray[np.int64]
    correct: npt.NDArray[np.int8]

    @classmethod
    def of(cls, parts: Iterable[Scores]) -> _Columns:
        listed = list(parts)
        return cls(
            task=np.array([t for part in listed for t in part.task], dtype=np.str_),
            bits=np.concatenate([part.bits for part in listed]),
            response_bytes=np.concatenate([part.response_bytes for part in listed]),
            correct=np.concatenate([part.correct for part in listed]),
        )

    def where(self, mask: npt.NDArray[np.bool_]) -> _Columns:
        return _Columns(
            task=self.task[mask],
            bits=self.bits[mask],
            response_bytes=self.response_bytes[mask],
            correct=self.correct[mask],
        )


def _rows(scores: ByParty) -> Iterator[Scored]:
    for party, s in scores.items():
        yield from _party_rows(party, _Columns.of([s]))
    yield from _party_rows(ALL, _Columns.of(scores.values()))


def _party_rows(party: str, columns: _Columns) -> Iterator[Scored]:
    """A row per task in order of first appearance, then the pooled row."""
    tasks = list(dict.fromkeys(columns.task.tolist()))
    pooled = _row(party, ALL, columns)
    if len(tasks) == 1:
        yield pooled.model_copy(update={"task": tasks[0]})  # the same examples: no second bootstrap
    else:
        for task in tasks:
            yield _row(party, task, columns.where(columns.task == task))
    yield pooled


def _row(party: str, task: str, columns: _Columns) -> Scored:
    rate = statistics.bits_per_byte(columns.bits, columns.response_bytes)
    share = statistics.accuracy(columns.correct)
    judged: dict[str, Any] = {"accuracy": None, "accuracy_ci": None}
    if share is not None:
        judged = {"accuracy": share.value, "accuracy_ci": share.interval}
    return Scored(
        party=party,
        task=task,
        examples=int(columns.bits.size),
        bits_per_byte=rate.value,
        bits_per_byte_ci=rate.interval,
        **judged,
    )
