"""Every estimate against a slower or independent way to the same number."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from cloister.evaluation import statistics
from cloister.evaluation.statistics import (
    accuracy,
    accuracy_difference,
    bits_not_worse,
    bits_per_byte,
    bits_per_byte_difference,
    holm,
    mean_share,
    share_difference,
    share_not_worse,
)


def _examples(n: int, *, rate: float = 1.2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Bits and bytes of n responses: log-normal lengths, noisy rates around `rate` bits per byte."""
    rng = np.random.default_rng(seed)
    size = np.maximum(1, np.exp(rng.normal(4, 0.8, n))).round()
    return size * rng.gamma(8, rate / 8, n), size


def test_bits_per_byte_is_a_ratio_of_sums_not_a_mean_of_ratios() -> None:
    assert bits_per_byte([10.0, 300.0], [10, 100]).value == 310 / 110


def test_interval_equals_an_enumeration_of_all_resamples() -> None:
    bits, size = np.array([3.0, 40.0, 9.0, 100.0, 11.0]), np.array([2, 30, 10, 50, 9])
    draws = [bits[list(i)].sum() / size[list(i)].sum() for i in itertools.product(range(5), repeat=5)]
    lo, hi = np.quantile(draws, [0.025, 0.975])
    interval = bits_per_byte(bits, size).interval
    assert interval is not None
    assert interval == pytest.approx((lo, hi), rel=0.01)


def test_interval_covers_the_truth_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 499)
    intervals = [bits_per_byte(*_examples(200, seed=seed)).interval for seed in range(200)]
    covered = sum(i is not None and i[0] <= 1.2 <= i[1] for i in intervals)
    # 190 expected, standard deviation 3.1, and percentile intervals run a little narrow.
    assert 176 <= covered <= 199


def test_one_example_has_a_value_and_no_interval() -> None:
    estimate = bits_per_byte([8.0], [4])
    assert (estimate.value, estimate.interval) == (2.0, None)
    assert bits_per_byte_difference([8.0], [4.0], [4]).p == 1.0


def test_equal_examples_have_an_interval_of_no_width() -> None:
    estimate = bits_per_byte([6.0] * 40, [3] * 40)
    assert estimate.interval == (2.0, 2.0)


def test_same_input_gives_the_same_digits() -> None:
    bits, size = _examples(50)
    assert bits_per_byte(bits, size) == bits_per_byte(bits, size)


@pytest.mark.parametrize(
    ("bits", "size"),
    [([], []), ([1.0], [0]), ([1.0, 2.0], [3]), ([float("nan"), 1.0], [1, 1]), ([[1.0]], [[1]])],
    ids=["empty", "no bytes", "lengths", "nan", "two dimensions"],
)
def test_impossible_scores_are_refused(bits: list[float], size: list[int]) -> None:
    with pytest.raises(ValueError, match=r"needs|no bytes|lengths|finite"):
        bits_per_byte(bits, size)


def test_paired_interval_is_much_narrower_than_unpaired_when_systems_agree() -> None:
    bits, size = _examples(300)
    better = 0.97 * bits
    paired = bits_per_byte_difference(better, bits, size)
    assert paired.interval is not None
    assert paired.delta == pytest.approx(-0.03 * bits.sum() / size.sum())
    assert paired.interval[1] < 0
    assert paired.p <= 2 / (statistics.RESAMPLES + 1)
    alone = bits_per_byte(bits, size).interval
    assert alone is not None
    assert paired.interval[1] - paired.interval[0] < 0.1 * (alone[1] - alone[0])


def test_paired_interval_matches_the_sum_of_variances_when_systems_are_independent() -> None:
    rng = np.random.default_rng(5)
    size = np.full(2000, 10)
    a, b = rng.normal(12, 2, 2000), rng.normal(12, 3, 2000)
    interval = bits_per_byte_difference(a, b, size).interval
    assert interval is not None
    half = 1.96 * np.sqrt((a.var() + b.var()) / 2000) / 10
    assert (interval[1] - interval[0]) / 2 == pytest.approx(half, rel=0.06)


def test_p_values_are_uniform_when_nothing_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 499)
    p = []
    for seed in range(200):
        bits, size = _examples(100, seed=seed)
        noise = np.random.default_rng(1000 + seed).normal(0, 10, (2, 100))
        p.append(bits_per_byte_difference(bits + noise[0], bits + noise[1], size).p)
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert 2 <= sum(value < 0.05 for value in p) <= 22


def test_p_and_interval_say_the_same() -> None:
    for seed in range(40):
        bits, size = _examples(60, seed=seed)
        other = bits + np.random.default_rng(seed).normal(4, 20, 60)
        difference = bits_per_byte_difference(bits, other, size)
        assert difference.interval is not None
        # A hair around the threshold is left to rounding of the quantile.
        if not 0.045 < difference.p < 0.055:
            assert (difference.p < 0.05) == (difference.interval[0] > 0 or difference.interval[1] < 0)


def test_no_difference_at_all_has_p_one() -> None:
    bits, size = _examples(30)
    difference = bits_per_byte_difference(bits, bits, size)
    assert (difference.delta, difference.interval, difference.p) == (0.0, (0.0, 0.0), 1.0)


def test_wilson_interval_matches_its_formula() -> None:
    estimate = accuracy([1] * 8 + [0] * 2 + [-1] * 5)
    assert estimate is not None
    n, p, z = 10, 0.8, stats.norm.ppf(0.975)
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert estimate.value == 0.8
    assert estimate.interval == pytest.approx((centre - half, centre + half))


def test_accuracy_is_absent_without_choices() -> None:
    assert accuracy([-1, -1]) is None
    assert accuracy_difference([-1, -1], [-1, -1]) is None


def test_mcnemar_is_the_binomial_test_on_the_disagreements() -> None:
    a = [1] * 12 + [0] * 4 + [1] * 30 + [0] * 20 + [-1] * 3
    b = [0] * 12 + [1] * 4 + [1] * 30 + [0] * 20 + [-1] * 3
    difference = accuracy_difference(a, b)
    assert difference is not None
    assert difference.delta == pytest.approx(8 / 66)
    assert difference.p == pytest.approx(stats.binomtest(4, 16).pvalue)


def test_accuracy_that_never_disagrees_has_p_one() -> None:
    difference = accuracy_difference([1, 0, 1], [1, 0, 1])
    assert difference is not None
    assert (difference.delta, difference.p) == (0.0, 1.0)


def test_accuracy_of_different_examples_is_refused() -> None:
    with pytest.raises(ValueError, match="same examples"):
        accuracy_difference([1, -1], [1, 0])
    with pytest.raises(ValueError, match="other than"):
        accuracy([2, 1])


def test_holm_matches_its_definition() -> None:
    p = [0.01, 0.04, 0.03, 0.005]
    order = np.argsort(p)
    expected, running = np.empty(4), 0.0
    for position, index in enumerate(order):
        running = max(running, min(1.0, (4 - position) * p[index]))
        expected[index] = running
    assert holm(p) == pytest.approx(expected)
    assert holm([]) == []
    assert holm([0.2]) == [0.2]


def test_not_worse_equals_an_enumeration_of_all_resamples() -> None:
    a, b, size = (
        np.array([3.1, 40.0, 9.4, 99.0, 11.1]),
        np.array([3.0, 40.2, 9.0, 100.0, 11.0]),
        np.array([2, 30, 10, 50, 9]),
    )
    for margin in (-0.02, 0.0, 0.01):
        beyond = a - (1 + margin) * b
        share = np.mean([beyond[list(i)].sum() >= 0 for i in itertools.product(range(5), repeat=5)])
        assert bits_not_worse(a, b, size, margin) == pytest.approx(share, abs=0.03)
    shares_a, shares_b = np.array([1.0, 0.0, 2 / 3, 1.0, 0.0]), np.array([1.0, 1 / 3, 2 / 3, 0.0, 0.0])
    lost = shares_b - shares_a - 0.1
    share = np.mean([lost[list(i)].sum() >= 0 for i in itertools.product(range(5), repeat=5)])
    assert share_not_worse(shares_a, shares_b, 0.1) == pytest.approx(share, abs=0.03)


def test_at_the_margin_itself_not_worse_is_claimed_in_one_of_twenty_samples() -> None:
    """The error rate that a p-value below 0.05 promises, where a is exactly 1 % worse."""
    claimed = 0
    for seed in range(200):
        bits, size = _examples(150, seed=seed)
        noise = np.random.default_rng(1000 + seed).normal(0, 0.05, 150)
        claimed += bits_not_worse(bits * 1.01 * (1 + noise), bits, size, 0.01) < 0.05
    assert 2 <= claimed <= 22


def test_shares_of_seeds_are_means() -> None:
    share = mean_share([0.0, 1 / 3, 1.0])
    assert share.value == pytest.approx(4 / 9)
    assert share.interval is not None
    assert share.interval[0] < 4 / 9 < share.interval[1]
    gained = share_difference([1.0, 1 / 3], [1.0, 0.0])
    assert gained.delta == pytest.approx(1 / 6)
    assert gained.p > 0.05
