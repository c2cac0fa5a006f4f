"""The tables as Markdown, and their place in docs/results.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from cloister.errors import DataError
from cloister.evaluation.statistics import Estimate
from cloister.report.model import ALL
from experiments.tables import ACCURACY_MARGIN, BITS_MARGIN, Row

BEGIN, END = "<!-- experiments: begin -->", "<!-- experiments: end -->"
LEVEL = 0.05


def replace_section(page: Path, text: str) -> None:
    """Put `text` between the page's two marks.

    Raises:
        DataError: the page has no marks.
    """
    content = page.read_text(encoding="utf-8")
    head, begin, rest = content.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise DataError(f"has no lines {BEGIN} and {END}", where=str(page), hint="put them where the tables belong")
    page.write_text(f"{head}{BEGIN}\n{text.strip()}\n{END}{tail}", encoding="utf-8")


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main_table(systems: Mapping[str, Sequence[Row]], facts: Mapping[str, tuple[str, str]]) -> str:
    """All parties together. facts: trained parameters and learning rate by title."""
    header = (
        "system",
        "trained",
        "rate",
        "bits per byte",
        "seeds",
        "against centralised",
        "accuracy",
        "against centralised",
    )
    lines = []
    for title, rows in systems.items():
        row = _of(rows, ALL)
        lines.append(
            (
                title,
                *facts[title],
                estimate(row.bits),
                f"{min(row.by_seed):.4f} to {max(row.by_seed):.4f}" if len(row.by_seed) > 1 else "one",
                relative(row),
                percent(row.accuracy),
                points(row),
            )
        )
    return table(header, lines)


def party_table(systems: Mapping[str, Sequence[Row]], parties: Sequence[str], *, accuracy: bool) -> str:
    """One column for each party."""
    return table(
        ("system", *parties),
        [
            (
                title,
                *(percent(_of(rows, p).accuracy) if accuracy else estimate(_of(rows, p).bits, 3) for p in parties),
            )
            for title, rows in systems.items()
        ],
    )


def difference_table(systems: Mapping[str, Sequence[Row]], parties: Sequence[str], *, accuracy: bool) -> str:
    """How far a system is from the reference: interval, and two-sided p, Holm-corrected over the parties."""

    def cell(row: Row) -> str:
        text, p = (points(row), row.accuracy_p) if accuracy else (relative(row), row.bits_p)
        return text if p is None else f"{text}, {p_value(p)}"

    return table(
        ("system", *parties, ALL),
        [
            (title, *(cell(_of(rows, party)) for party in (*parties, ALL)))
            for title, rows in systems.items()
            if rows[0].bits_p is not None
        ],
    )


def verdict_table(systems: Mapping[str, Sequence[Row]], parties: Sequence[str], *, accuracy: bool) -> str:
    """Is a system shown to be no worse than the centralised one by the margin? Holm-corrected p, one-sided."""
    lines = []
    for title, rows in systems.items():
        found = [_of(rows, party) for party in (*parties, ALL)]
        values = [row.accuracy_not_worse if accuracy else row.bits_not_worse for row in found]
        if all(value is None for value in values):
            continue
        lines.append((title, *map(verdict, values)))
    return table(("system", *parties, ALL), lines)


def verdict(p: float | None) -> str:
    """ "yes" where shown at the level of 5 %."""
    if p is None:
        return ""
    return f"{'yes' if p < LEVEL else 'not shown'} ({p_value(p)})"


def p_value(p: float) -> str:
    """ "p 0.012"; the smallest that the bootstrap can tell from 0 is 0.001."""
    return "p < 0.001" if p < 0.001 else f"p {p:.3f}"


def ablation_table(
    systems: Mapping[str, Sequence[Row]], beside: Mapping[str, Row], origin: str, facts: Mapping[str, tuple[str, str]]
) -> str:
    """All parties together, without verdicts: one seed.

    Args:
        beside: by title, the same against `origin`, the system that one thing is changed in; not `origin` itself.
    """
    lines = []
    for title, rows in systems.items():
        row, other = _of(rows, ALL), beside.get(title)
        changed = "" if other is None or other.bits_p is None else f"{relative(other)}, {p_value(other.bits_p)}"
        lines.append((title, *facts[title], estimate(row.bits), relative(row), changed, percent(row.accuracy)))
    return table(
        ("system", "trained", "rate", "bits per byte", "against centralised", f"against {origin}", "accuracy"), lines
    )


def estimate(value: Estimate, digits: int = 4) -> str:
    """A value with its interval."""
    if value.interval is None:
        return f"{value.value:.{digits}f}"
    return (
        f"{value.value:.{digits}f} ({value.interval[0]:.{min(digits, 3)}f} to {value.interval[1]:.{min(digits, 3)}f})"
    )


def percent(value: Estimate | None) -> str:
    """An accuracy in per cent with its interval."""
    if value is None:
        return ""
    low, high = value.interval or (value.value, value.value)
    return f"{100 * value.value:.1f} ({100 * low:.0f} to {100 * high:.0f})"


def relative(row: Row) -> str:
    """A difference in per cent of the reference's bits per byte."""
    if row.relative is None or row.relative_interval is None:
        return ""
    low, high = row.relative_interval
    return f"{100 * row.relative:+.2f} % ({100 * low:+.2f}..{100 * high:+.2f})"


def points(row: Row) -> str:
    """A difference of accuracies in points."""
    difference = row.accuracy_difference
    if difference is None:
        return ""
    low, high = difference.interval or (difference.delta, difference.delta)
    return f"{100 * difference.delta:+.1f} ({100 * low:+.1f}..{100 * high:+.1f})"


def margins() -> str:
    """The margins in words."""
    return f"{100 * BITS_MARGIN:g} % of the bits per byte, {100 * ACCURACY_MARGIN:g} points of accuracy"


def _of(rows: Sequence[Row], party: str) -> Row:
    return next(row for row in rows if row.party == party)
