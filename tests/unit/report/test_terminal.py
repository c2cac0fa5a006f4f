"""Terminal tables: all numbers, within the width, in words as loud as they must be."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from cloister.report import summary
from cloister.report.model import ALL, RunReport, Scored
from cloister.report.outputs import CompareReport, RunRef
from cloister.report.terminal import print_compare, print_run

from .fake import PARTIES, run_report


def shown(report: RunReport | CompareReport, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    if isinstance(report, RunReport):
        print_run(report, console)
    else:
        print_compare(report, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def comparison() -> CompareReport:
    report = run_report()
    side = RunRef(
        path="[bold]a[/bold]", job_id=report.job_id, job_name="job", system="cloister", created=report.created
    )
    scores = [
        Scored(**{k: v for k, v in dict(r).items() if k in Scored.model_fields})
        for r in report.results
        if r.system == "cloister"
    ]
    rows = [c.model_copy(update={"a": "a", "b": "b"}) for c in report.comparisons if c.b == "base" and not c.trained_on]
    return CompareReport(a=side, b=side, comparisons=rows, scores_a=scores, scores_b=scores, warnings=["careful"])


@pytest.mark.parametrize("width", [80, 100, 140, 200])
def test_table_holds_every_number_within_the_width(width: int) -> None:
    report = run_report()
    text = shown(report, width)
    assert max(len(line) for line in text.splitlines()) <= width
    for row in report.results:
        if row.task == ALL:
            assert summary.rate(row.bits_per_byte) in text
            assert summary.span(row.bits_per_byte_ci) in text
            assert row.accuracy is not None
            assert summary.percent(row.accuracy) in text
            assert summary.percent_span(row.accuracy_ci) in text


def test_systems_go_down_where_there_is_room_and_across_where_there_is_not() -> None:
    assert "cloister" in next(line for line in shown(run_report(), 80).splitlines() if "base model" in line)
    assert all(
        p in next(line for line in shown(run_report(), 100).splitlines() if "neurology" in line) for p in PARTIES
    )


def test_simulated_is_said_in_a_frame_and_only_when_true() -> None:
    assert "┃ SIMULATED" in shown(run_report(), 100).replace("  ", "")
    assert "SIMULATED" not in shown(run_report(hardware=True), 100)


def test_best_leaves_out_the_oracle_and_ties_are_marked() -> None:
    cells = summary.table(run_report())
    assert all(cell and cell.best for cell in cells["cloister"].values())
    assert not any(cell and cell.best for cell in cells["central"].values())
    assert all(cell and cell.tied for cell in cells["central"].values())
    assert not any(cell and cell.tied for cell in cells["base"].values())


def test_best_goes_to_whoever_is_best() -> None:
    report = run_report(names=("x",))
    worse = [r.model_copy(update={"bits_per_byte": 9.0}) if r.system == "cloister" else r for r in report.results]
    cells = summary.table(report.model_copy(update={"results": worse}))
    assert {line for line, row in cells.items() for cell in row.values() if cell and cell.best} == {"local"}


def test_foreign_cell_is_the_mean_over_the_other_parties_models() -> None:
    report = run_report()
    rates = [r.bits_per_byte for r in report.local_cross if r.party == "neurology"]
    assert len(rates) == 4
    cell = summary.table(report)["foreign"]["neurology"]
    assert cell is not None
    assert cell.rate == f"{sum(rates) / 4:.3f}"
    assert cell.rate_interval == f"{min(rates):.3f}\u2013{max(rates):.3f}"


def test_headline_says_which_way_a_difference_goes() -> None:
    report = run_report()
    own, base, central = (summary.pooled(report, s) for s in ("cloister", "base", "central"))
    assert own
    assert base
    assert central
    text = summary.headline(report)
    assert f"{100 * (1 - own.bits_per_byte / base.bits_per_byte):.1f} % less than the base model" in text
    assert f"{100 * (own.bits_per_byte / central.bits_per_byte - 1):.1f} % more than centralised training" in text


@pytest.mark.parametrize("width", [120, 160])
def test_comparison_shows_sides_intervals_and_corrected_p(width: int) -> None:
    report = comparison()
    text = shown(report, width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "[bold]a[/bold]" in text  # a path is text, not markup
    assert "warning: careful" in text
    for row in report.comparisons:
        assert summary.change(row.delta, row.metric) in text
        assert row.ci is not None
        assert summary.change(row.ci[0], row.metric) in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (31_400_000, "31.4 MB"),
        (2 * 10**9, "2.0 GB"),
        (5 * 10**12, "5.0 TB"),
    ],
)
def test_sizes_are_decimal(value: int, text: str) -> None:
    assert summary.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.44, "0.4 s"), (12.3, "12 s"), (59.7, "1 min 00 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")],
)
def test_durations_read_naturally(value: float, text: str) -> None:
    assert summary.seconds(value) == text
