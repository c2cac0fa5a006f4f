"""Rows of the tables against sums by hand, and verdicts that are given only where they are earned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from experiments import figures
from experiments.page import BEGIN, END, replace_section, table, verdict, verdict_table
from experiments.tables import Row, columns, rows, together

from cloister.errors import DataError
from cloister.evaluation.scores import Scores

PARTIES = ("north", "south")


def scores(worse: float = 0.0, *, seed: int = 0, right: float = 0.8, n: int = 200) -> dict[str, Scores]:
    """Two parties' examples, the same for all calls but for noise, `worse` as a share of the bits."""
    found = {}
    for index, party in enumerate(PARTIES):
        fixed, noise = np.random.default_rng(index), np.random.default_rng(100 + 10 * seed + index)
        size = fixed.integers(5, 80, n)
        bits = size * fixed.gamma(8, 0.15, n) * (1 + worse) * (1 + noise.normal(0, 0.01, n))
        correct = np.where(np.arange(n) % 2, -1, fixed.random(n) < right).astype(np.int8)
        ids = [f"{party}-{i}" for i in range(n)]
        found[party] = Scores(
            example_id=ids, task=["t"] * n, bits=bits, response_bytes=size.astype(np.int64), correct=correct
        )
    return found


def test_seeds_are_averaged_example_by_example() -> None:
    one, two = scores(seed=1), scores(seed=2)
    found = columns([one, two])
    assert np.allclose(found["north"].bits, (one["north"].bits + two["north"].bits) / 2)
    assert found["north"].by_seed == (one["north"].bits_per_byte(), two["north"].bits_per_byte())
    pooled = sum(s.bits.sum() for s in one.values()) / sum(s.response_bytes.sum() for s in one.values())
    assert found["all"].by_seed[0] == pytest.approx(pooled)
    assert len(found["north"].share) == 100
    assert len(found["all"].share) == 200


def test_seeds_of_other_examples_are_refused() -> None:
    with pytest.raises(DataError, match="only one of the two"):
        columns([scores(), scores(n=100)])


def test_differences_are_relative_to_the_reference() -> None:
    reference, system = columns([scores(seed=1)]), columns([scores(0.03, seed=1)])
    found = {row.party: row for row in rows(system, reference)}
    assert found["all"].relative == pytest.approx(0.03, abs=1e-9)
    assert found["all"].relative_interval is not None
    low, high = found["all"].relative_interval
    assert low < 0.03 < high
    difference = found["north"].bits_difference
    assert difference is not None
    by_hand = (system["north"].bits.sum() - reference["north"].bits.sum()) / system["north"].response_bytes.sum()
    assert difference.delta == pytest.approx(by_hand)


def test_not_worse_is_shown_where_it_is_so_and_not_where_it_is_not() -> None:
    reference = columns([scores(seed=1)])
    verdicts = {
        worse: {row.party: row.bits_not_worse for row in rows(columns([scores(worse, seed=2)]), reference)}
        for worse in (0.0, 0.009, 0.03)
    }
    for party in (*PARTIES, "all"):
        assert (verdicts[0.0][party] or 0.0) < 0.01
        assert verdicts[0.03][party] == pytest.approx(1.0, abs=0.01)
    assert all((p or 0.0) > 0.01 for p in verdicts[0.009].values())


def test_p_values_of_parties_are_holm_corrected_and_that_of_all_is_not() -> None:
    reference, system = columns([scores(seed=1)]), columns([scores(0.008, seed=2)])
    alone = {p: rows({p: system[p]}, {p: reference[p]})[0].bits_not_worse for p in (*PARTIES, "all")}
    both = {row.party: row.bits_not_worse for row in rows(system, reference)}
    plain = sorted((alone[p] or 0.0) for p in PARTIES)
    corrected = sorted((both[p] or 0.0) for p in PARTIES)
    assert corrected == pytest.approx([min(1, 2 * plain[0]), max(min(1, 2 * plain[0]), plain[1])])
    assert both["all"] == alone["all"]


def test_silos_of_a_set_are_compared_with_the_whole_set() -> None:
    whole, other = scores(seed=1), scores(0.02, seed=2)
    silos = {f"{p}.{i + 1}": s.take(np.arange(i, len(s), 2)[::-1]) for p, s in other.items() for i in range(2)}
    expected = rows(together(other, PARTIES), together(whole, PARTIES))
    assert rows(together(silos, PARTIES), together(whole, PARTIES)) == expected
    assert expected[0].party == "all"
    assert expected[0].relative == pytest.approx(rows(columns([other]), columns([whole]))[-1].relative)


def test_accuracy_that_fell_by_ten_points_is_not_shown_to_be_kept() -> None:
    found = rows(columns([scores(right=0.7)]), columns([scores(right=0.8)]))
    assert all((row.accuracy_not_worse or 0.0) > 0.9 for row in found)
    same = rows(columns([scores()]), columns([scores()]))
    assert all((row.accuracy_not_worse or 1.0) <= 0.001 for row in same)


def test_pages_and_figures_hold_what_the_rows_say(tmp_path: Path) -> None:
    reference = columns([scores(seed=1)])
    systems: dict[str, list[Row]] = {
        "reference": rows(reference, None),
        "good": rows(columns([scores(seed=2)]), reference),
        "bad": rows(columns([scores(0.05, seed=2)]), reference),
    }
    text = verdict_table(systems, PARTIES, accuracy=False)
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines()}
    assert "reference" not in lines
    assert lines["good"].count("yes") == 3
    assert lines["bad"].count("not shown") == 3
    figures.differences(systems, tmp_path / "d.svg")
    figures.ablations({"one": systems, "two": systems, "three": systems}, tmp_path / "a.svg")
    first = (tmp_path / "d.svg").read_bytes()
    figures.differences(systems, tmp_path / "d.svg")
    assert (tmp_path / "d.svg").read_bytes() == first
    assert first.count(b"<!-- bad -->") == 1
    assert verdict(0.0004) == "yes (p < 0.001)"
    assert verdict(0.2) == "not shown (p 0.200)"
    assert table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"


def test_only_the_section_between_the_marks_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    replace_section(page, "new\n")
    assert page.read_text() == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    page.write_text("none")
    with pytest.raises(DataError, match="no lines"):
        replace_section(page, "new")
    assert page.read_text() == "none"
