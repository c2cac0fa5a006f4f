"""The study's results as text and figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cloister.errors import DataError
from cloister.job import Job
from cloister.report.model import ALL
from experiments import figures
from experiments.page import (
    ablation_table,
    difference_table,
    main_table,
    margins,
    party_table,
    points,
    relative,
    verdict_table,
)
from experiments.run import Done
from experiments.study import FOR_RATES, MAIN, REFERENCE, Arm, Budget
from experiments.tables import Columns, Row, columns, rows, together

Facts = dict[str, tuple[str, str]]
"""Trained parameters and learning rate, by title."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything that was trained, by name of the arm; one entry for each seed."""

    base: Job
    budget: Budget
    cut: int
    main: Mapping[str, Sequence[Done]]
    tables: Mapping[str, Sequence[Arm]]
    ablated: Mapping[str, Mapping[str, Sequence[Done]]]
    rates: Mapping[str, Mapping[float, float]]


def write_report(results: Results, folder: Path) -> str:
    """Markdown; figures go to `folder`/figures.

    Raises:
        DataError: systems were scored on different examples.
    """
    compared = {arm.title: _compared(results, arm) for arm in MAIN}
    facts = {arm.title: _facts(arm, results.main[arm.name][0]) for arm in MAIN}
    parties = [party.name for party in results.base.party]
    text = [
        _setting(results),
        "All test records together; against centralised LoRA on all layers, paired, with 95 % intervals:\n",
        main_table(compared, facts),
        "![Bits per byte against centralised LoRA](figures/differences.svg)\n",
        "Bits per byte by party:\n",
        party_table(compared, parties, accuracy=False),
        "Accuracy on classification records by party, in per cent:\n",
        party_table(compared, parties, accuracy=True),
        "Against centralised LoRA by party: paired, with 95 % intervals and two-sided p, Holm-corrected over the "
        "parties; bits per byte:\n",
        difference_table(compared, parties, accuracy=False),
        "Points of accuracy:\n",
        difference_table(compared, parties, accuracy=True),
        f"Not worse than centralised LoRA, with margins fixed beforehand ({margins()})? One-sided, Holm-corrected over "
        "the parties; bits per byte:\n",
        verdict_table(compared, parties, accuracy=False),
        "Accuracy:\n",
        verdict_table(compared, parties, accuracy=True),
        _rounding(results),
        _rates(results),
    ]
    figures.differences(compared, folder / "figures" / "differences.svg")
    ablated = {title: _ablation(results, title) for title in results.tables}
    for title, (table, rest) in ablated.items():
        text += [f"**{title}** (one seed)\n", ablation_table(table, *rest)]
    if ablated:
        figures.ablations({title: table for title, (table, _) in ablated.items()}, folder / "figures" / "ablations.svg")
        text.append("![Ablations](figures/ablations.svg)\n")
    return "\n".join(text)


def _compared(results: Results, arm: Arm) -> list[Row]:
    """Rows of the main table: against the same seeds of the reference."""
    own, reference = results.main[arm.name], results.main[REFERENCE]
    same = reference if arm.system == "base" else reference[: len(own)]
    return rows(_columns(own), None if arm.name == REFERENCE else _columns(same))


def _ablation(results: Results, title: str) -> tuple[dict[str, list[Row]], tuple[dict[str, Row], str, Facts]]:
    """Rows of one table, compared with the first seed of the reference; the same compared with the table's own system
    of the main table, and its title; facts."""
    found, beside, facts = dict[str, list[Row]](), dict[str, Row](), Facts()
    reference = _together(results, results.main[REFERENCE][0])
    origin = next(arm for arm in results.tables[title] if arm.name in results.main)
    unchanged = _together(results, results.ablated[title][origin.name][0])
    for arm in results.tables[title]:
        done = results.ablated[title][arm.name][0]
        own = _together(results, done)
        found[arm.title] = rows(own, reference)
        if arm is not origin:
            beside[arm.title] = rows(own, unchanged)[0]
        facts[arm.title] = _facts(arm, done)
    return found, (beside, origin.title, facts)


def _together(results: Results, done: Done) -> dict[str, Columns]:
    if done.outcome is None:
        raise DataError("training diverged", where=f"job {done.job_id[:16]}")
    return together(done.outcome.scores, [party.name for party in results.base.party])


def _columns(done: Sequence[Done]) -> dict[str, Columns]:
    return columns([one.outcome.scores for one in done if one.outcome is not None])


def _facts(arm: Arm, done: Done) -> tuple[str, str]:
    if arm.system == "base" or done.outcome is None:
        return "", ""
    return f"{done.outcome.trained_parameters:,}", f"{done.cell.job.training.learning_rate:g}"


def _setting(results: Results) -> str:
    budget, job = results.budget, results.base
    reference = next(d.outcome for d in results.main[REFERENCE] if d.outcome)
    seeds = f"{len(budget.seeds)} seeds" if len(budget.seeds) > 1 else "one seed"
    return (
        f"{Path(job.model.path).name}, cut after layer {results.cut}; {budget.steps} steps of {budget.batch_tokens:,} "
        f"tokens ({reference.tokens:,} in all) for every system over all parties together, except that each party "
        f"*alone* has the whole budget for itself; {budget.rounds} rounds; {seeds}; "
        f"{sum(map(len, reference.scores.values())):,} test records, at most {budget.examples} of each task of each "
        "party. Examination questions with choices of their own count by their bits alone.\n"
    )


def _rounding(results: Results) -> str:
    """The integers of slice against the same rounds in floating point; empty where one of them is missing."""
    integers, plain = (results.main.get(name, []) for name in ("slice-lora", "fedavg"))
    if not integers or not plain:
        return ""
    row = next(row for row in rows(_columns(integers), _columns(plain[: len(integers)])) if row.party == ALL)
    return (
        "What the integers of `slice` cost, against FedAvg with the same rounds, batches and rate in floating point: "
        f"{relative(row)} of the bits per byte, {points(row)} points of accuracy.\n"
    )


def _rates(results: Results) -> str:
    if not results.budget.tuned:
        return "Learning rates were not tuned: those of the adapter's kind were taken.\n"
    tried = "; ".join(f"{name} {_tried(found)}" for name, found in results.rates.items())
    return (
        "Learning rates, by one rule for all: the rate of the adapter's kind and its neighbours at a factor of 3.2, "
        "further while the best is at an end; best by validation records after a third of the budget, first seed. Bits "
        f"per byte of what was tried: {tried}. **Not tuned by themselves**, but taken from the arm that stands behind "
        f"each: {_taken(results)}. A difference between an ablation and its origin is one at that rate.\n"
    )


def _taken(results: Results) -> str:
    arms = {arm.name: arm for arm in (*MAIN, *(arm for table in results.tables.values() for arm in table))}
    names = {arm.name: arm.title for arm in (*FOR_RATES, *arms.values())}
    return "; ".join(f"{arm.title}: {names[arm.rate_of]}" for arm in arms.values() if arm.rate_of)


def _tried(found: Mapping[float, float]) -> str:
    losses = {rate: "diverged" if math.isinf(loss) else f"{loss:.4f}" for rate, loss in sorted(found.items())}
    return ", ".join(f"{rate:g}: {loss}" for rate, loss in losses.items())
