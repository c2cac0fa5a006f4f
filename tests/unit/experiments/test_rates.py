"""The rule finds the best rate of its grid, wherever it lies within a factor of 100."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
from experiments.rates import find_rate, step


def valley(bottom: float, tried: list[float]) -> object:
    def judge(rates: list[float]) -> Mapping[float, float]:
        tried.extend(rates)
        return {rate: abs(math.log10(rate / bottom)) for rate in rates}

    return judge


@pytest.mark.parametrize("bottom", [2e-5, 6e-4, 2e-3, 5e-3, 0.2])
def test_the_best_rate_is_within_half_a_step_of_the_bottom(bottom: float) -> None:
    tried: list[float] = []
    found = find_rate(2e-3, valley(bottom, tried))  # type: ignore[arg-type]
    assert abs(math.log10(next(iter(found)) / bottom)) <= 0.26
    assert len(tried) == len(set(tried)) == len(found)
    best = next(iter(found))
    assert min(found) < best < max(found), "the best has a neighbour on both sides"


def test_it_stops_where_there_is_no_bottom_or_all_diverges() -> None:
    assert len(find_rate(1e-3, lambda rates: {rate: -rate for rate in rates})) == 7
    assert len(find_rate(1e-3, lambda rates: dict.fromkeys(rates, math.inf))) == 3


def test_rates_have_two_digits() -> None:
    assert [step(2e-3, i) for i in (-2, -1, 0, 1, 2)] == [2e-4, 6.3e-4, 2e-3, 6.3e-3, 2e-2]
