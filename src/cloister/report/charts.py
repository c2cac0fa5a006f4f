"""The charts of the report page, as inline SVG: scores with intervals, loss curves, bars."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean

from markupsafe import Markup

from cloister.report import svg
from cloister.report.model import ALL, CurvePoint, Interval, Metric, ResultRow, RunReport
from cloister.report.summary import LABELS, Line, foreign, lines, party_names, pooled

SHAPES: dict[Line, svg.Shape] = {
    "base": "ring",
    "foreign": "cross",
    "local": "triangle",
    "central": "diamond",
    "cloister": "disc",
}
WIDTH = 1000.0
_LEFT, _RIGHT = 150.0, 40.0
_MAX_NAMED = 16
"""With more trainings than this, only the pooled ones are named: the names would not fit beside the chart."""
_PITCH, _PAD = 17.0, 12.0
"""Height of a marker's line, and air between two test sets."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A value with its interval on one line of a chart."""

    line: Line
    value: float
    interval: Interval | None


def intervals(report: RunReport, metric: Metric) -> Markup | None:
    """Each test set's scores by system, as marker and interval; None where no example has choices."""
    groups = {party: _marks(report, party, metric) for party in party_names(report)}
    marks = [mark for group in groups.values() for mark in group]
    if not marks:
        return None
    ends = [end for mark in marks for end in (mark.value, *(mark.interval or ()))]
    axis = svg.scale(ends, _LEFT, WIDTH - _RIGHT)
    bands, drawn, y = [], [], 26.0
    for index, (party, group) in enumerate(groups.items()):
        height = len(group) * _PITCH + _PAD
        bands.append(_band(index, party, y, height))
        drawn += [_mark(m, axis, y + _PAD / 2 + (i + 0.5) * _PITCH, metric) for i, m in enumerate(group)]
        y += height
    grid = [svg.line(axis(t), 22, axis(t), y, "grid") for t in axis.ticks()]
    labels = [svg.text(axis(t), 14, _axis_label(t, metric), "tick", "middle") for t in axis.ticks()]
    title = "Bits per byte" if metric == "bits_per_byte" else "Accuracy"
    title += " by test set and system, with 95 % intervals"
    return svg.drawing(WIDTH, y + 4, title, *bands, *grid, *labels, *drawn)


def legend_mark(line: Line) -> Markup:
    """A marker by itself, for a legend or a table."""
    return svg.element(
        "svg", svg.marker(SHAPES[line], 8, 8, f"s-{line}"), viewBox="0 0 16 16", class_="mark", aria_hidden="true"
    )


def curves(
    trainings: Mapping[str, list[CurvePoint]], value: Callable[[CurvePoint], float | None], title: str
) -> Markup | None:
    """One measurement of some trainings over their tokens; each line is named at its end. None without two points."""
    series = {
        name: [(p.tokens, v) for p in points if (v := value(p)) is not None] for name, points in trainings.items()
    }
    series = {label: points for label, points in series.items() if len(points) > 1}
    if not series:
        return None
    height, edge = 300.0, WIDTH / 2 - 150
    x = svg.scale([t for points in series.values() for t, _ in points], 52, edge, zero=True)
    y = svg.scale([v for points in series.values() for _, v in points], height - 34, 12)
    grid = [svg.line(52, y(t), edge, y(t), "grid") for t in y.ticks(5)]
    grid += [svg.text(44, y(t) + 4, svg.tick_label(t), "tick", "end") for t in y.ticks(5)]
    grid += [svg.text(x(t), height - 14, _thousands(t), "tick", "middle") for t in x.ticks(4)]
    grid.append(svg.text(edge, height, "tokens", "tick", "end"))
    order = sorted(series, key=lambda label: (not label.startswith("local"), label == "cloister"))
    paths = [_path(label, [(x(t), y(v)) for t, v in series[label]]) for label in order]
    named = [label for label in series if len(series) <= _MAX_NAMED or not label.startswith("local")]
    ends = {label: y(series[label][-1][1]) for label in named}
    names = []
    for label, at in _spread(ends, 14.0, height - 36).items():
        line = _curve_line(label)
        names.append(svg.line(x(series[label][-1][0]), ends[label], edge + 6, at, f"leader s-{line}"))
        names.append(svg.text(edge + 9, at + 4, _curve_name(label), f"name t-{line}"))
    return svg.drawing(WIDTH / 2, height + 4, title, *grid, *paths, *names)


def bars(values: Mapping[str, float], shown: Callable[[float], str], title: str) -> Markup:
    """Horizontal bars from zero, in the given order, with their values written out."""
    width, pitch, left = WIDTH / 2, 24.0, 130.0
    axis = svg.Scale(low=0.0, high=max([*values.values(), 0.0]) or 1.0, start=left, end=width - 90)
    parts = []
    for index, (name, value) in enumerate(values.items()):
        y = index * pitch
        parts.append(svg.text(left - 8, y + 16, _short(name, 20), "label", "end"))
        parts.append(svg.rect(left, y + 4, max(1.0, axis(value) - left), pitch - 8, "bar", 2))
        parts.append(svg.text(axis(value) + 7, y + 16, shown(value), "tick"))
    return svg.drawing(width, max(1, len(values)) * pitch + 2, title, *parts)


def _marks(report: RunReport, party: str, metric: Metric) -> list[Mark]:
    marks = []
    for line in lines(report):
        if line == "foreign":
            values = foreign(report, party, metric)
            if values:
                marks.append(Mark(line=line, value=fmean(values), interval=(min(values), max(values))))
            continue
        row = pooled(report, line, party)
        value = _value(row, metric)
        if row is not None and value is not None:
            interval = row.bits_per_byte_ci if metric == "bits_per_byte" else row.accuracy_ci
            marks.append(Mark(line=line, value=value, interval=interval))
    return marks


def _value(row: ResultRow | None, metric: Metric) -> float | None:
    if row is None:
        return None
    return row.bits_per_byte if metric == "bits_per_byte" else row.accuracy


def _band(index: int, party: str, y: float, height: float) -> Markup:
    name = svg.text(
        _LEFT - 16, y + height / 2 + 4, "all parties" if party == ALL else _short(party, 18), "label", "end"
    )
    shade = svg.rect(0, y, WIDTH, height, "band" if index % 2 == 0 else "band odd", 3)
    return svg.join([shade, name])


def _mark(mark: Mark, axis: svg.Scale, y: float, metric: Metric) -> Markup:
    low, high = mark.interval or (mark.value, mark.value)
    shown = f"{mark.value:.3f}" if metric == "bits_per_byte" else f"{100 * mark.value:.1f} %"
    tip = svg.element("title", f"{LABELS[mark.line]}: {shown}")
    bar = svg.line(axis(low), y, axis(high), y, f"interval s-{mark.line}")
    dot = svg.marker(SHAPES[mark.line], axis(mark.value), y, f"s-{mark.line}")
    return svg.element("g", tip, bar, dot)


def _axis_label(value: float, metric: Metric) -> str:
    return svg.tick_label(value) if metric == "bits_per_byte" else f"{100 * value:.0f} %"


def _path(label: str, points: list[tuple[float, float]]) -> Markup:
    steps = " ".join(f"{svg.number(x)},{svg.number(y)}" for x, y in points)
    return svg.element("polyline", points=steps, class_=f"curve s-{_curve_line(label)}")


def _curve_line(label: str) -> str:
    name = label.partition(":")[0]
    return name if name in LABELS else "base"


def _curve_name(label: str) -> str:
    kind, _, party = label.partition(":")
    return _short(f"{party} alone" if kind == "local" and party else label, 20)


def _spread(ends: Mapping[str, float], gap: float, bottom: float) -> dict[str, float]:
    """Heights of labels, moved as little as keeps them `gap` apart and above `bottom`."""
    ordered = sorted(ends, key=lambda label: ends[label])
    heights = [ends[label] for label in ordered]
    for index in range(1, len(heights)):
        heights[index] = max(heights[index], heights[index - 1] + gap)
    for index in reversed(range(len(heights))):
        limit = bottom if index == len(heights) - 1 else heights[index + 1] - gap
        heights[index] = min(heights[index], limit)
    return dict(zip(ordered, heights, strict=True))


def _thousands(tokens: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if tokens >= limit:
            return f"{svg.tick_label(tokens / limit)} {unit}"
    return svg.tick_label(tokens)


def _short(name: str, limit: int) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "\u2026"
