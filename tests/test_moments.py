"""Check the central form of the moments against the raw recursion it replaces, and where that recursion fails."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from alrc.moments import Moments, estimate_start

F32 = np.float32


def raw_recursion(batches, betas, mu1, mu2, dtype):
    """Run Algorithm 1 as the paper writes it: average L and L², subtract."""
    kept1, kept2 = dtype(betas[0]), dtype(betas[1])
    mu1, mu2 = dtype(mu1), dtype(mu2)
    for batch in batches:
        losses = np.atleast_1d(np.asarray(batch, dtype=dtype))
        mu1 = kept1 * mu1 + (dtype(1) - kept1) * losses.mean(dtype=dtype)
        mu2 = kept2 * mu2 + (dtype(1) - kept2) * np.square(losses).mean(dtype=dtype)
    return mu1, mu2


def central_form(batches, betas, mu1, mu2, dtype):
    """Run `Moments.updated` over the same batches."""
    start = Moments.from_raw(mu1, mu2)
    moments = Moments(dtype(start.mean), dtype(start.var), 0)
    first, second = dtype(1) - dtype(betas[0]), dtype(1) - dtype(betas[1])
    weights = (first, first) if betas[0] == betas[1] else (first, second)
    for batch in batches:
        losses = np.asarray(batch, dtype=dtype)
        mean = losses.mean(dtype=dtype)
        var = np.square(losses - mean).mean(dtype=dtype) if losses.ndim else None
        moments = moments.updated(mean, var, weights)
    return moments


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 4)], ids=str)
@pytest.mark.parametrize("betas", [(0.9, 0.9), (0.999, 0.999), (0.0, 0.0), (0.9, 0.99), (0.99, 0.9), (0.0, 0.999)])
def test_is_the_raw_recursion_in_float64(betas: tuple[float, float], shape: tuple[int, ...]) -> None:
    batches = np.random.default_rng(1).lognormal(0, 0.5, (300, *shape))
    mu1, mu2 = raw_recursion(batches, betas, 2.0, 5.0, np.float64)
    moments = central_form(batches, betas, 2.0, 5.0, np.float64)
    # Both sides contract, so a few roundings of the largest term, E[L²] ≤ 10, are all that is left.
    np.testing.assert_allclose([moments.mu1, moments.mu2], [mu1, mu2], rtol=1e-12)
    assert moments.var == pytest.approx(mu2 - mu1**2, rel=0, abs=1e-13)
    assert moments.count == 300


def test_unequal_decays_need_the_cross_term() -> None:
    batches = np.random.default_rng(2).lognormal(0, 0.5, 50)
    weights = (0.1, 0.01)
    right = without = Moments.from_raw(2.0, 5.0)
    for loss in batches:
        right = right.updated(loss, None, weights)
        delta = loss - without.mean
        var = (1 - weights[1]) * without.var + (weights[1] - weights[0] ** 2) * delta**2
        without = Moments(without.mean + weights[0] * delta, var, 0)
    mu1, mu2 = raw_recursion(batches, (0.9, 0.99), 2.0, 5.0, np.float64)
    assert right.var == pytest.approx(mu2 - mu1**2, abs=1e-13)
    assert abs(without.var - (mu2 - mu1**2)) > 0.1


@pytest.mark.parametrize("shape", [(), (16,)], ids=["scalar", "batch"])
def test_float32_holds_a_spread_of_a_ten_thousandth_of_the_mean(shape: tuple[int, ...]) -> None:
    batches = np.random.default_rng(3).normal(1000, 0.1, (10_000 if not shape else 5_000, *shape))
    start = (1000.0, 1000.0**2 + 0.04)
    moments = central_form(batches, (0.999, 0.999), *start, F32)
    exact = central_form(batches, (0.999, 0.999), *start, np.float64)
    assert moments.var.dtype == F32
    assert float(moments.var) == pytest.approx(float(exact.var), rel=0.02)
    assert float(moments.var) == pytest.approx(0.01, rel=0.05)

    mu1, mu2 = raw_recursion(batches, (0.999, 0.999), *start, F32)
    assert abs(float(mu2 - mu1 * mu1) - 0.01) > 1, "the raw recursion is expected to lose the variance in float32"


# Anything a float32 can hold whose square it can hold too.
BOUNDED = st.floats(-(2.0**60), 2.0**60, width=32)


@given(
    batches=st.lists(arrays(F32, st.sampled_from([1, 2, 5]), elements=BOUNDED), min_size=1, max_size=30),
    beta=st.sampled_from([0.0, 0.5, 0.9, 0.999, 0.9999999]),
    spread=st.floats(0, 1, width=32),
)
def test_variance_is_never_negative_with_equal_decays(batches: list[np.ndarray], beta: float, spread: float) -> None:
    weight = F32(1) - F32(beta)
    single = whole = Moments(F32(0), F32(spread), 0)
    for batch in batches:
        whole = whole.updated(batch.mean(dtype=F32), np.square(batch - batch.mean(dtype=F32)).mean(), (weight, weight))
        assert whole.var >= 0
        for loss in batch:
            single = single.updated(loss, None, (weight, weight))
            assert single.var >= 0


def test_the_raw_recursion_goes_negative_there() -> None:
    """The twin: what the property above forbids is what the published form does."""
    mu1, mu2 = F32(0), F32(0)
    lowest = 0.0
    for loss in np.random.default_rng(4).normal(1000, 0.01, 3000).astype(F32):
        mu1, mu2 = F32(0.9) * mu1 + F32(0.1) * loss, F32(0.9) * mu2 + F32(0.1) * loss * loss
        lowest = min(lowest, float(mu2 - mu1 * mu1))
    assert lowest < 0


def test_unequal_decays_can_make_the_variance_negative_as_the_recursion_itself_does() -> None:
    rise = [10.0] * 20
    mu1, mu2 = raw_recursion(rise, (0.9, 0.999), 1.0, 1.1, np.float64)
    assert mu2 - mu1**2 < 0
    assert central_form(rise, (0.9, 0.999), 1.0, 1.1, np.float64).var == pytest.approx(mu2 - mu1**2, rel=1e-12)


def test_weight_zero_leaves_the_state_alone() -> None:
    moments = Moments(3.0, 0.7, 5)
    assert moments.updated(100.0, 4.0, (0.0, 0.0), step=0) == moments
    assert moments.updated(100.0, None, (0.0, 0.0), step=0) == moments


def test_updating_makes_new_moments() -> None:
    moments = Moments(1.0, 1.0, 0)
    assert moments.updated(3.0, None, (0.5, 0.5)) == Moments(2.0, 1.5, 1)
    assert moments == Moments(1.0, 1.0, 0)


@pytest.mark.parametrize(("mu1", "mu2"), [(25.0, 900.0), (-1.0, 1.5), (0.0, 1e-30), (1000.0, 1000000.01)])
def test_from_raw_keeps_the_raw_moments(mu1: float, mu2: float) -> None:
    moments = Moments.from_raw(mu1, mu2, count=7)
    assert moments.count == 7
    assert moments.mu1 == mu1
    assert moments.mu2 == pytest.approx(mu2, rel=1e-15, abs=0)
    assert moments.var > 0


@pytest.mark.parametrize(
    ("mu1", "mu2", "named"),
    [
        (2.0, 4.0, "mu2=4"),
        (2.0, 3.5, "mu2=3.5"),
        (0.0, 0.0, "mu2=0"),
        (1.0, -7.0, "mu2=-7"),
        (float("nan"), 1.0, "mu1=nan"),
        (1.0, float("nan"), "mu2=nan"),
        (float("inf"), 1.0, "mu1=inf"),
        (1.0, float("inf"), "mu2=inf"),
        (1e200, 1e300, "mu2=1e+300"),
    ],
)
def test_from_raw_refuses_what_cannot_be_moments(mu1: float, mu2: float, named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        Moments.from_raw(mu1, mu2)


@pytest.mark.parametrize("overestimate", [1.0, 3.0, 10.0])
def test_estimate_start_scales_the_moments(overestimate: float) -> None:
    losses = np.random.default_rng(5).lognormal(0, 0.4, (8, 16))
    mu1, mu2 = estimate_start(losses, overestimate)
    assert mu1 == pytest.approx(overestimate * losses.mean(), rel=1e-12)
    assert mu2 == pytest.approx(overestimate**2 * np.mean(losses**2), rel=1e-12)
    moments = Moments.from_raw(mu1, mu2)
    assert moments.var == pytest.approx(overestimate**2 * losses.var(), rel=1e-10)


def test_estimate_start_triples_by_default() -> None:
    assert estimate_start([1.0, 3.0]) == estimate_start([1.0, 3.0], 3.0) == (6.0, 45.0)


def test_estimate_start_ignores_what_is_not_finite() -> None:
    losses = [1.0, np.nan, 3.0, np.inf, -np.inf]
    assert estimate_start(losses) == estimate_start([1.0, 3.0])


@pytest.mark.parametrize("overestimate", [0.99, 0.0, -3.0, np.nan, np.inf])
def test_estimate_start_refuses_an_underestimate(overestimate: float) -> None:
    with pytest.raises(ValueError, match=re.escape(str(overestimate))):
        estimate_start([1.0, 2.0], overestimate)


@pytest.mark.parametrize(
    ("losses", "named"),
    [([], "0 finite"), ([np.nan, np.inf], "0 finite"), ([2.5], "equal to 2.5"), ([2.5] * 9, "9 finite.*equal to 2.5")],
)
def test_estimate_start_needs_a_spread(losses: list[float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        estimate_start(losses)
