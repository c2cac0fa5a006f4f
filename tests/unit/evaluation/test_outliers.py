"""Robust z-scores: what stands out among few values, and what does not."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.evaluation.outliers import MIN_VALUES, robust_z
from cloister.report.fits import THRESHOLD

VALUES = st.lists(st.floats(1e-3, 1e3), min_size=MIN_VALUES, max_size=12)


def test_one_wild_value_stands_out_however_wild() -> None:
    """A mean and a standard deviation would let it hide: among n values none is beyond (n-1)/sqrt(n) of them."""
    for wild in (2.0, 10.0, 1e6):
        *honest, odd = robust_z([1.0, 1.1, 0.95, 1.05, wild], 0.1)
        assert odd is not None
        assert odd > THRESHOLD
        assert all(z is not None and abs(z) < THRESHOLD for z in honest)


def test_by_hand() -> None:
    z = robust_z([1.0, math.e, math.e**2, math.e**3, math.e**5], 0.0)
    assert z == pytest.approx([x / 1.4826 for x in (-2, -1, 0, 1, 3)])


def test_values_that_are_alike_do_not_stand_out() -> None:
    assert robust_z([1.0, 1.0, 1.0, 1.01], 0.1)[3] == pytest.approx(math.log(1.01) / 0.1)


def test_of_two_nobody_is_the_odd_one() -> None:
    assert robust_z([1.0, 100.0], 0.1) == [None, None]
    assert robust_z([], 0.1) == []


@given(VALUES, st.floats(0.01, 100.0))
def test_the_unit_does_not_matter(values: list[float], unit: float) -> None:
    scaled = robust_z([v * unit for v in values], 0.1)
    assert scaled == pytest.approx(robust_z(values, 0.1), abs=1e-6)


@given(VALUES)
def test_fewer_than_half_stand_out(values: list[float]) -> None:
    assert sum(z is not None and abs(z) > THRESHOLD for z in robust_z(values, 0.1)) < len(values) / 2
