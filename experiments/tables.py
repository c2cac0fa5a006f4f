"""From scores to the rows of the tables: estimates with 95 % intervals, paired differences, non-inferiority.

Seeds are averaged example by example; intervals and p-values resample examples, so they speak of other test records,
not of other seeds. How far the seeds lie apart stands beside them. The margins were fixed before anything was run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from cloister.evaluation import statistics
from cloister.evaluation.compare import pair
from cloister.evaluation.scores import Scores
from cloister.evaluation.statistics import Difference, Estimate, Floats
from cloister.report.model import ALL

BITS_MARGIN = 0.01
"""Relative, of bits per byte."""
ACCURACY_MARGIN = 0.02
"""Absolute: two points."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """One system's examples of one party or of all, averaged over seeds."""

    bits: Floats
    response_bytes: npt.NDArray[np.int64]
    share: Floats
    """How often each classification record was answered correctly, [number of those records]."""
    by_seed: tuple[float, ...]
    """Bits per byte of each seed."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One system on one party's test records, or on all."""

    party: str
    bits: Estimate
    accuracy: Estimate | None
    by_seed: tuple[float, ...]
    bits_difference: Difference | None = None
    """To the reference, bits per byte."""
    relative: float | None = None
    """The same as a share of the reference's."""
    relative_interval: tuple[float, float] | None = None
    accuracy_difference: Difference | None = None
    bits_p: float | None = None
    """Two-sided p-value of "no difference"; this and the following are Holm-corrected over the parties, and that of
    all together is by itself."""
    accuracy_p: float | None = None
    bits_not_worse: float | None = None
    """One-sided."""
    accuracy_not_worse: float | None = None


def columns(seeds: Sequence[Mapping[str, Scores]]) -> dict[str, Columns]:
    """By party, and `ALL` for all parties' examples together.

    Raises:
        DataError: two seeds were not scored on the same examples.
    """
    first = seeds[0]
    by_party = {
        party: [pair(scores, other[party], where=f"seeds of {party}").b for other in seeds]
        for party, scores in first.items()
    }
    found = {party: _average(scores) for party, scores in by_party.items()}
    pooled = [_concatenated([scores[i] for scores in by_party.values()], list(by_party)) for i in range(len(seeds))]
    return {**found, ALL: _average(pooled)}


def together(scores: Mapping[str, Scores], sets: Sequence[str]) -> dict[str, Columns]:
    """All examples of one seed, in an order that does not depend on which silo of its set holds an example."""
    pooled = _concatenated(scores.values(), [_set_of(party, sets) for party in scores])
    return {ALL: _average([pooled.take(np.argsort(pooled.example_id, kind="stable"))])}


def _set_of(party: str, sets: Sequence[str]) -> str:
    """The set that a party of `silos.split_silos`, or of none, has its records from."""
    return max((name for name in sets if party == name or party.startswith(f"{name}.")), key=len)


def _average(seeds: Sequence[Scores]) -> Columns:
    judged = seeds[0].correct >= 0
    return Columns(
        bits=np.mean([s.bits for s in seeds], axis=0),
        response_bytes=seeds[0].response_bytes,
        share=np.mean([s.correct[judged].astype(np.float64) for s in seeds], axis=0),
        by_seed=tuple(s.bits_per_byte() for s in seeds),
    )


def _concatenated(scores: Collection[Scores], names: Sequence[str]) -> Scores:
    """One after the other; a part's name goes before its examples' ids."""
    parts = list(scores)
    return Scores(
        example_id=[f"{name}:{i}" for name, part in zip(names, parts, strict=True) for i in part.example_id],
        task=[t for part in parts for t in part.task],
        bits=np.concatenate([p.bits for p in parts]),
        response_bytes=np.concatenate([p.response_bytes for p in parts]),
        correct=np.concatenate([p.correct for p in parts]),
    )


def rows(system: Mapping[str, Columns], reference: Mapping[str, Columns] | None) -> list[Row]:
    """A row for each party and one for all; compared with `reference` unless that is None."""
    plain = [_row(party, own) for party, own in system.items()]
    if reference is None:
        return plain
    compared = [_compared(row, system[row.party], reference[row.party]) for row in plain]
    return _holm(compared)


def _row(party: str, own: Columns) -> Row:
    return Row(
        party=party,
        bits=statistics.bits_per_byte(own.bits, own.response_bytes),
        accuracy=statistics.mean_share(own.share) if own.share.size else None,
        by_seed=own.by_seed,
    )


def _compared(row: Row, own: Columns, other: Columns) -> Row:
    difference = statistics.bits_per_byte_difference(own.bits, other.bits, own.response_bytes)
    base = float(other.bits.sum() / other.response_bytes.sum())
    low, high = difference.interval or (difference.delta, difference.delta)
    judged = statistics.share_difference(own.share, other.share) if own.share.size else None
    return Row(
        party=row.party,
        bits=row.bits,
        accuracy=row.accuracy,
        by_seed=row.by_seed,
        bits_difference=difference,
        relative=difference.delta / base,
        relative_interval=(low / base, high / base),
        accuracy_difference=judged,
        bits_p=difference.p,
        accuracy_p=judged.p if judged else None,
        bits_not_worse=statistics.bits_not_worse(own.bits, other.bits, own.response_bytes, BITS_MARGIN),
        accuracy_not_worse=statistics.share_not_worse(own.share, other.share, ACCURACY_MARGIN) if judged else None,
    )


def _holm(compared: Sequence[Row]) -> list[Row]:
    """p-values of the parties corrected as one family for each question."""
    found = list(compared)
    for question in ("bits_p", "accuracy_p", "bits_not_worse", "accuracy_not_worse"):
        asked = [i for i, row in enumerate(compared) if row.party != ALL and getattr(row, question) is not None]
        corrected = statistics.holm([getattr(compared[i], question) for i in asked])
        for i, p in zip(asked, corrected, strict=True):
            change: Any = {question: p}
            found[i] = replace(found[i], **change)
    return found
