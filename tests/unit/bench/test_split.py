"""Medians, seconds to a loss and ratios of `cloister bench split`, from rows written by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloister.bench.split import (
    Asked,
    bench_split,
    final_loss,
    ratios,
    row_of,
    seconds_to,
    target_of,
    with_held_out,
)
from cloister.errors import UsageError
from cloister.progress import Silent
from tests.unit.bench.small import measured, point, small_workload


def test_ratios_are_those_of_the_rows() -> None:
    rows = [
        row_of(("trainer", None), [measured(60.0, 50.0)], "shape", None),
        row_of(("central", None), [measured(45.0, 40.0)], "shape", None),
        row_of(("fedavg", None), [measured(90.0, 80.0)], "shape", None),
        row_of(("split", 6), [measured(30.0, 20.0)], "shape", None),
        row_of(("split", 9), [measured(20.0, 10.0)], "shape", None),
    ]
    assert ratios(rows, 12) == pytest.approx(
        {
            "trainer_over_split_6": 2.0,  # 60 / 30
            "central_over_split_6": 1.5,
            "fedavg_over_split_6": 3.0,
            "step_split_6_over_trainer": 2.5,  # (1000 / 20) / (1000 / 50)
            "step_split_6_over_central": 2.0,
            "bound_6": 2.0,  # 1 / (1 - 6 / 12)
            "cpu_trainer_over_split_6": 2.5,  # 100 / 40
            "cpu_central_over_split_6": 2.0,
            "cpu_fedavg_over_split_6": 4.0,
            "cpu_trainer_over_split_9": 5.0,
            "cpu_central_over_split_9": 4.0,
            "cpu_fedavg_over_split_9": 8.0,
            "trainer_over_split_9": 3.0,
            "central_over_split_9": 2.25,
            "fedavg_over_split_9": 4.5,
            "step_split_9_over_trainer": 5.0,
            "step_split_9_over_central": 4.0,
            "bound_9": 4.0,
        }
    )


def test_ratios_of_what_was_not_measured_are_left_out() -> None:
    rows = [
        row_of(("fedavg", None), [measured(9.0, 8.0)], "", None),
        row_of(("split", 1), [measured(3.0, 2.0)], "", None),
    ]
    assert ratios(rows, 4) == pytest.approx(
        {"fedavg_over_split_1": 3.0, "cpu_fedavg_over_split_1": 4.0, "bound_1": 4 / 3}
    )
    assert ratios(rows[:1], 4) == {}


def test_a_row_holds_medians_the_range_and_the_largest_peaks() -> None:
    runs = [
        measured(10.0, 8.0, peak_rss_mib={"enclave": 700.0, "party": 300.0}),
        measured(30.0, 4.0, peak_rss_mib={"enclave": 900.0}),
        measured(20.0, 5.0, peak_rss_mib={"enclave": 800.0, "party": 400.0}),
    ]
    row = row_of(("split", 2), runs, "shape", None)
    assert (row.seconds, row.seconds_to_loss, row.seconds_range) == (20.0, 20.0, (10.0, 30.0))
    assert (row.train_s, row.tokens_per_s, row.runs) == (5.0, 200.0, 3)
    assert row.peak_rss_mib == {"enclave": 900.0, "party": 400.0}


def test_seconds_to_a_loss_lie_on_the_line_between_two_measurements() -> None:
    run = measured(50.0, 40.0, curve=[point(10.0, 2.0), point(15.0, None, 2), point(20.0, 1.5, 3), point(40.0, 1.0, 4)])
    assert seconds_to(run, 1.25) == pytest.approx(30.0)
    assert seconds_to(run, 1.0) == pytest.approx(40.0)
    assert seconds_to(run, 2.5) == 10.0  # below it at the first measurement: no line to follow
    assert seconds_to(run, 0.9) is None
    assert seconds_to(run, None) == 50.0


def test_the_target_is_the_worst_end_or_what_was_asked_for() -> None:
    found = {
        ("trainer", None): [measured(2.0, 1.0, curve=[point(1.0, 1.2), point(2.0, 1.1, 2)])],
        ("split", 6): [measured(2.0, 1.0, curve=[point(1.0, 1.3), point(2.0, 1.15, 2), point(2.5, None, 3)])],
    }
    assert target_of(found, None) == 1.15
    assert target_of(found, 1.05) == 1.05
    assert target_of({**found, ("central", None): [measured(2.0, 1.0)]}, 1.05) is None
    row = row_of(("split", 6), found["split", 6], "", 1.05)
    assert row.seconds_to_loss is None
    assert "trainer_over_split_6" not in ratios([row_of(("trainer", None), found["trainer", None], "", 1.1), row], 12)


def test_losses_of_another_run_go_to_the_same_steps() -> None:
    timed = measured(4.0, 3.0, curve=[point(1.0, None, 1), point(2.0, None, 2), point(3.0, None, 3)])
    joined = with_held_out(timed, [point(70.0, None, 1), point(80.0, 1.4, 2), point(90.0, 1.3, 3)])
    assert [(p.seconds, p.held_out) for p in joined.curve] == [(1.0, None), (2.0, 1.4), (3.0, 1.3)]
    assert final_loss(joined.curve) == 1.3
    assert final_loss(timed.curve) is None


@pytest.mark.parametrize(
    ("asked", "where"),
    [
        (Asked(peers=[], cuts=[3]), "--cut"),
        (Asked(peers=[], cuts=[0]), "--cut"),
        (Asked(peers=["fedavg"], cuts=[1], rounds=40), "--rounds"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(tmp_path: Path, asked: Asked, where: str) -> None:
    with pytest.raises(UsageError) as refused:
        bench_split(small_workload(tmp_path), asked, command="", progress=Silent())
    assert refused.value.where == where
    assert refused.value.hint
