"""Means, intervals, paired tests and moving averages against textbook formulae."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student

from alrc_lab.report.stats import boxcar, paired, summarise

finite = st.floats(-1e6, 1e6, allow_nan=False)


def by_hand(values):
    """Mean and 95 % t interval with nothing but sums and Student's quantile."""
    n = len(values)
    mean = sum(values) / n
    half_width = student.ppf(0.975, n - 1) * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return mean, mean - half_width, mean + half_width


@given(st.lists(finite, min_size=2, max_size=12))
def test_summary_is_the_textbook_interval(values):
    estimate = summarise(values)
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx(by_hand(values), rel=1e-9, abs=1e-6)
    assert estimate.n == len(values)


def test_t_quantile_is_the_tables():
    # 1, 2, …, 8: standard deviation √6; t(0.975, 7) = 2.3646 in any printed table.
    estimate = summarise(range(1, 9))
    assert estimate.std == pytest.approx(math.sqrt(6))
    assert (estimate.high - estimate.low) / 2 == pytest.approx(2.364624 * math.sqrt(6 / 8), rel=1e-6)


def test_what_few_values_cannot_tell_is_none():
    assert summarise([]).mean is None
    one = summarise([4.0])
    assert (one.n, one.mean, one.std, one.low, one.high) == (1, 4.0, None, None, None)
    single = paired({1: 2.0, 2: 3.0}, {2: 4.0, 5: 1.0})
    assert (single.n, single.mean, single.relative) == (1, -1.0, -0.25)
    assert single.p_value is single.low is single.high is None
    assert paired({1: 2.0}, {2: 4.0}).mean is None


@given(st.lists(st.tuples(st.floats(1, 100), st.floats(-5, 5)), min_size=3, max_size=10))
def test_paired_is_a_one_sample_test_of_the_differences(pairs):
    a = {seed: base + change for seed, (base, change) in enumerate(pairs)}
    b = {seed: base for seed, (base, _) in enumerate(pairs)}
    differences = [a[seed] - b[seed] for seed in a]
    if np.ptp(differences) < 1e-6:
        return
    found = paired(a, {**b, 99: 1e6})  # a seed without partner changes nothing
    mean, low, high = by_hand(differences)
    assert (found.mean, found.low, found.high) == pytest.approx((mean, low, high), rel=1e-7, abs=1e-9)
    statistic = mean / ((high - mean) / student.ppf(0.975, len(pairs) - 1))
    expected = 2 * student.sf(abs(statistic), len(pairs) - 1)
    assert found.p_value == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert found.relative == pytest.approx(mean / np.mean([base for base, _ in pairs]), rel=1e-9, abs=1e-12)


def test_pairing_finds_what_the_spread_between_seeds_hides():
    spread = {seed: 10.0 * seed for seed in range(1, 7)}
    less = {seed: value - 1 - 0.1 * (seed % 2) for seed, value in spread.items()}
    assert paired(less, spread).p_value < 1e-4
    shuffled = {seed: less[7 - seed] for seed in less}  # the same numbers, wrongly paired
    assert paired(shuffled, spread).p_value > 0.5


def test_differences_without_spread_are_no_proof():
    base = {1: 1.0, 2: 2.0, 3: 4.0}
    same = paired(base, base)
    assert (same.mean, same.low, same.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)
    for step in (0.5, 0.1):  # 0.1 leaves differences that only rounding tells apart
        shifted = paired({seed: value + step for seed, value in base.items()}, base)
        assert shifted.mean == pytest.approx(step)
        assert shifted.p_value is shifted.low is shifted.high is None
    assert paired({1: 1.0, 2: -1.5}, {1: 0.0, 2: 0.0}).relative is None


def test_statistics_refuse_what_is_not_finite():
    with pytest.raises(ValueError, match="finite, got nan"):
        summarise([1.0, math.nan])
    with pytest.raises(ValueError, match="seed 7 must be finite, got inf"):
        paired({7: math.inf}, {7: 1.0})


@pytest.mark.slow
def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    trials, hits, alarms = 4000, 0, 0
    for _ in range(trials):
        noise = rng.normal(size=(2, 5)) + rng.normal(scale=3, size=5)
        a, b = (dict(enumerate(row)) for row in noise)
        found = paired(a, b)
        hits += found.low <= 0 <= found.high
        alarms += found.p_value < 0.05
        assert (found.p_value < 0.05) == (not found.low <= 0 <= found.high)
    # Binomial standard deviation: √(0.95 · 0.05 / 4000) = 0.0034.
    assert hits / trials == pytest.approx(0.95, abs=0.014)
    assert alarms / trials == pytest.approx(0.05, abs=0.014)


@given(st.lists(finite, max_size=40), st.integers(1, 12), st.integers(1, 5))
def test_boxcar_is_a_plain_mean_of_each_window(values, width, stride):
    expected = [sum(values[i : i + width]) / width for i in range(0, len(values) - width + 1, stride)]
    np.testing.assert_allclose(boxcar(np.array(values), width, stride), expected, rtol=1e-9, atol=1e-6)


def test_boxcar_confines_what_is_not_finite_and_forgets_spikes():
    values = np.array([1.0, 2.0, 3.0, np.inf, 5.0, 6.0, -np.inf, np.nan, 1.0, 2.0])
    expected = [1.5, 2.5, np.nan, np.nan, 5.5, np.nan, np.nan, np.nan, 1.5]
    np.testing.assert_array_equal(boxcar(values, 2), expected)
    spike = np.r_[1e30, np.full(10, 0.1)]
    np.testing.assert_allclose(boxcar(spike, 3)[1:], 0.1, rtol=1e-15)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        boxcar(values, 0)
