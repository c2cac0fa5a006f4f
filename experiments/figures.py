"""The tables as pictures that can be read in black and white."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cloister.report.model import ALL
from experiments.tables import BITS_MARGIN, Row

_STYLE: Any = {
    "svg.hashsalt": "cloister",  # the same figures give the same bytes
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_TICKS = (-10, -2, -1, 0, 1, 2, 10, 50, 200)
_MARKS = ("o", "s", "^", "D", "v")


def differences(systems: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Relative difference of bits per byte to the reference, all parties together and each party, with intervals."""
    compared = {title: rows for title, rows in systems.items() if rows[0].relative is not None}
    parties = [row.party for row in next(iter(compared.values()))]
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(10, 0.42 * len(compared) + 1.4), sharey=True, layout="constrained")
        _forest(axes[0], compared, [ALL], "all test records")
        _forest(axes[1], compared, [p for p in parties if p != ALL], "each party; logarithmic beyond 2 %")
        axes[1].set_xscale("symlog", linthresh=2, linscale=1.5)
        axes[1].set_xticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
        axes[1].minorticks_off()
        axes[0].set_yticks(range(len(compared)), list(compared))
        axes[0].invert_yaxis()
        axes[1].legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        _save(figure, path)


def _forest(axis: Axes, systems: Mapping[str, Sequence[Row]], parties: Sequence[str], title: str) -> None:
    axis.axvline(0, color="black", linewidth=0.8)
    axis.axvline(100 * BITS_MARGIN, color="black", linewidth=0.8, linestyle=":")
    for index, party in enumerate(parties):
        offset = (index - (len(parties) - 1) / 2) * 0.15
        found = [next(row for row in rows if row.party == party) for rows in systems.values()]
        values = [100 * (row.relative or 0.0) for row in found]
        ends = [row.relative_interval or (0.0, 0.0) for row in found]
        errors = [
            [v - 100 * e[0] for v, e in zip(values, ends, strict=True)],
            [100 * e[1] - v for v, e in zip(values, ends, strict=True)],
        ]
        axis.errorbar(
            values,
            [place + offset for place in range(len(values))],
            xerr=errors,
            fmt=_MARKS[index % len(_MARKS)],
            color="black",
            markerfacecolor="white" if index % 2 else "black",
            markersize=4,
            linewidth=0.8,
            capsize=2,
            label=party,
        )
    axis.set_xlabel("bits per byte, % more (dotted: margin)")
    axis.set_title(title, fontsize=9)


def ablations(tables: Mapping[str, Mapping[str, Sequence[Row]]], path: Path) -> None:
    """Relative difference of bits per byte to the reference, one panel for each ablation, all on one scale."""
    lines = -(-len(tables) // 2)
    with plt.rc_context(_STYLE):
        figure, grid = plt.subplots(lines, 2, figsize=(10, 2.4 * lines), sharex=True, layout="constrained")
        axes = list(grid.flat)
        for axis, (title, systems) in zip(axes, tables.items(), strict=False):
            _forest(axis, systems, [ALL], title)
            axis.set_yticks(range(len(systems)), list(systems), fontsize=8)
            axis.invert_yaxis()
            axis.margins(y=0.2)
            axis.tick_params(labelbottom=True)
        for axis in axes[len(tables) :]:
            axis.remove()
        _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
