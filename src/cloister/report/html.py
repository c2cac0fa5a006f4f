"""`report.html`: one self-contained page, readable offline, in light, in dark and on paper.

Everything in it is inline: no script, no font, no picture from elsewhere, and a content security policy that would stop
them. All values pass through jinja2's autoescaping; the drawings are built from escaped elements. The same report gives
the same bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cloister.report import charts, fits, knowledge, rounds, summary
from cloister.report.model import ALL, OTHERS, Comparison, CrossRow, Metric, ResultRow, RunReport
from cloister.report.summary import Line

_FOLDER = Path(__file__).parent


def write_html(report: RunReport, path: Path) -> None:
    """Write the report page; an existing file is replaced."""
    path.write_text(render_html(report), encoding="utf-8", newline="\n")


def render_html(report: RunReport) -> str:
    """The report page as text."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        loader=FileSystemLoader(_FOLDER),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "rate": summary.rate,
        "percent": summary.percent,
        "span": summary.span,
        "percent_span": summary.percent_span,
        "size": summary.size,
        "seconds": summary.seconds,
        "change": summary.change,
        "p_value": summary.p_value,
    }
    return environment.get_template("report.html.j2").render(_context(report))


def _context(report: RunReport) -> dict[str, Any]:  # Any: what a template may hold
    return {
        "r": report,
        # The style sheet is part of this package, not input.
        "css": Markup("".join(_style(name) for name in _styles(report))),  # noqa: S704
        "alarm": summary.protection(report),
        "exposures": summary.exposures(report),
        "headline": summary.headline(report),
        "own": summary.pooled(report, "cloister"),
        "table": summary.table(report),
        "ties": summary.has_ties(report),
        "parties": summary.party_names(report),
        "labels": summary.LABELS,
        "notes": summary.NOTES,
        "measures": summary.MEASURES,
        "legend_mark": charts.legend_mark,
        "rate_chart": charts.intervals(report, "bits_per_byte"),
        "accuracy_chart": charts.intervals(report, "accuracy"),
        "curves": _curves(report),
        "cross": _cross(report),
        "tasks": _task_rows(report),
        "drawing": knowledge.drawing(report),
        "columns": knowledge.columns(report),
        "knowledge": knowledge.knowledge(report),
        "marks": knowledge.MARKS,
        "rounds": rounds,
        "fits": fits,
        "per_token": summary.per_token(report),
        "up_bars": charts.bars({w.party: w.bytes_up for w in report.wire.parties}, _size, "Bytes sent, by party"),
        "time_bars": charts.bars(report.timing, summary.seconds, "Seconds, by phase") if report.timing else None,
        "total_seconds": report.timing.get("total", sum(report.timing.values())),
        "compared": _compared(report),
        "compared_metrics": [m for m in summary.MEASURES if any(c.metric == m for c in report.comparisons)],
    }


def _styles(report: RunReport) -> list[str]:
    return ["report.css", "slice.css"] if report.method == "slice" else ["report.css"]


def _style(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _curves(report: RunReport) -> list[tuple[str, Markup]]:
    """Validation loss of every training; training loss of the pooled ones, which share their batches."""
    joint = {label: points for label, points in report.curves.items() if not label.startswith("local")}
    drawn = [
        (
            "Validation, bits per byte",
            charts.curves(report.curves, lambda p: p.validation_bits_per_byte, "Validation loss"),
        ),
        ("Training, nats per response token", charts.curves(joint, lambda p: p.train_loss, "Training loss")),
    ]
    return [(title, chart) for title, chart in drawn if chart is not None]


def _compared(report: RunReport) -> list[tuple[Line, str, dict[Metric, Comparison]]]:
    """(line, name, {metric: comparison}) of cloister against each other system, pooled."""
    found: dict[tuple[Line, str], dict[Metric, Comparison]] = {}
    for row in report.comparisons:
        if row.a == "cloister" and row.party == OTHERS:
            found.setdefault(("foreign", f"{row.trained_on} alone, others' data"), {})[row.metric] = row
        elif row.a == "cloister" and row.party == ALL:
            line = next(line for line in summary.LABELS if line == row.b)
            found.setdefault((line, summary.LABELS[line]), {})[row.metric] = row
    return [(line, name, rows) for (line, name), rows in found.items()]


def _size(count: float) -> str:
    return summary.size(int(count))


def _cross(report: RunReport) -> list[tuple[str, list[tuple[str, str, float]]]]:
    """(model, [(interval, rate, shade 0-1) per test set]): every party's own model on every test set, and cloister."""
    names = [p.name for p in report.parties]
    if not report.local_cross:
        return []
    found: dict[tuple[str, str], CrossRow] = {(r.trained_on, r.party): r for r in report.local_cross if r.task == ALL}
    grid = []
    for trained_on in [*names, "cloister"]:
        cells = []
        for party in names:
            if trained_on == "cloister":
                row = summary.pooled(report, "cloister", party)
            else:
                row = summary.pooled(report, "local", party) if party == trained_on else None
            scored = row or found.get((trained_on, party))
            base = summary.pooled(report, "base", party)
            if scored is None:
                cells.append(("", "\u2013", 0.0))
                continue
            best = summary.pooled(report, "cloister", party)
            cells.append(
                (
                    summary.span(scored.bits_per_byte_ci),
                    summary.rate(scored.bits_per_byte),
                    _shade(scored.bits_per_byte, best, base),
                )
            )
        grid.append((trained_on, cells))
    return grid


def _shade(value: float, best: ResultRow | None, base: ResultRow | None) -> float:
    """0 where a model is as good as cloister on this test set, 1 where it is no better than the base model."""
    if best is None or base is None or base.bits_per_byte <= best.bits_per_byte:
        return 0.0
    share = (value - best.bits_per_byte) / (base.bits_per_byte - best.bits_per_byte)
    return round(min(1.0, max(0.0, share)), 2)


def _task_rows(report: RunReport) -> list[tuple[str, dict[str, ResultRow]]]:
    """The pooled rows of each task, by system; empty when there is only one task."""
    rows = [r for r in report.results if r.party == ALL and r.task != ALL]
    tasks = list(dict.fromkeys(r.task for r in rows))
    if len(tasks) < 2:
        return []
    return [(task, {r.system: r for r in rows if r.task == task}) for task in tasks]
