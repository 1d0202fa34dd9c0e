"""Hold every backend to the truth about values, gradients and state, in one body each.

A test of values alone passes the best-known port of this rule, whose limited losses carry no gradient. So every check
compares values, gradients and state, takes the implementation as an argument, and is itself checked: for each mutant
at least one check must go red.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest

import mutants
from alrc.reference import alrc_trace
from alrc.rules import ALRC
from drivers import Driver, Make, drive_class, drive_compiled, drive_numpy, drive_numpy32, drive_torch, drive_torch64
from jax_driver import drive_jax, drive_jax64, drive_jax_jit
from keras_driver import drive_keras

# The tracing compiler warns about its own way of making an autograd context.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:ALRC met losses"),
]

START = (1.0, 1.04)
"""Mean 1, standard deviation 0.2: three of them make the limit 1.6."""

BACKENDS: dict[str, Make] = {
    "numpy": drive_numpy,
    "numpy-float32": drive_numpy32,
    "torch": drive_torch,
    "torch-float64": drive_torch64,
    "torch-compiled": drive_compiled,
    "jax": drive_jax,
    "jax-jit": drive_jax_jit,
    "jax-jit-float64": drive_jax64,
    "keras-torch": drive_keras("torch"),
    "keras-jax": drive_keras("jax"),
    "keras-tensorflow": drive_keras("tensorflow"),
    "keras-torch-float64": drive_keras("torch", double=True),
    "keras-tensorflow-float64": drive_keras("tensorflow", double=True),
}
NARROW = ["torch", "torch-compiled", "jax", "jax-jit", "keras-torch", "keras-jax", "keras-tensorflow"]
"""Those that are given losses in bfloat16 too; numpy has none, and a float64 state adds nothing."""


SLOW = {"jax"}
"""Operation by operation it takes thirty milliseconds a step; the same code runs compiled in the default tier."""


def named(backends: Iterable[str]) -> list[Any]:
    """Return parameters for some backends, marked as they have to be."""
    return [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in backends]


@pytest.fixture(params=named(BACKENDS))
def make(request: pytest.FixtureRequest) -> Make:
    return BACKENDS[request.param]


def precision(driver: Driver) -> float:
    """Return the relative error a few hundred steps may gather: some 20 roundings, for contractions forget the rest."""
    return {np.float32: 5e-6, np.float64: 1e-10}[driver.dtype]


def check_stream(make: Make, rule: ALRC, stream: np.ndarray, at_least: int = 5) -> None:
    """Compare values, gradients, moments and limits of every step with the slow oracle."""
    driver = make(rule)
    stream = stream.astype(np.float32)  # The same numbers for every precision.
    want = alrc_trace(stream, **vars(rule))
    assert sum(int(np.sum(scale < 1)) for scale in want.scale) >= at_least, "the stream limits too little to test"
    close = {"rtol": precision(driver), "atol": 0}
    for i, losses in enumerate(stream):
        limited, gradient = driver.step(losses)
        np.testing.assert_allclose(limited, want.limited[i], **close, err_msg=f"values of step {i}")
        np.testing.assert_allclose(gradient, want.scale[i], **close, err_msg=f"gradients of step {i}")
        mu1, mu2, limit = driver.read()
        np.testing.assert_allclose(mu1, want.mu1[i], **close, err_msg=f"mu1 after step {i}")
        np.testing.assert_allclose(mu2, want.mu2[i], **close, err_msg=f"mu2 after step {i}")
        if i + 1 < len(stream):
            np.testing.assert_allclose(limit, want.limit[i + 1], **close, err_msg=f"limit after step {i}")


def spiky(seed: int, *shape: int) -> np.ndarray:
    """Make positive losses around 1 of which every 20th or so is far out."""
    rng = np.random.default_rng(seed)
    return np.exp(rng.normal(0, 0.3, shape)) * np.where(rng.random(shape) < 0.05, rng.uniform(2, 50, shape), 1)


def check_mixed_batch(make: Make) -> None:
    """Limit the large losses of a batch, scale their gradients, leave the others alone bit for bit."""
    driver = make(ALRC(start=START))
    losses = np.array([0.5, 2.0, 1.5, 16.0, 1.0])
    limited, gradient = driver.step(losses)
    large = losses > 1.6
    np.testing.assert_allclose(limited[large], 1.6, rtol=1e-6)
    np.testing.assert_allclose(gradient[large], 1.6 / losses[large], rtol=1e-6)
    np.testing.assert_array_equal(limited[~large], losses[~large])
    np.testing.assert_array_equal(gradient[~large], 1)
    mean, square = 0.2 * (0.5 + 1.6 + 1.5 + 1.6 + 1.0), 0.2 * (0.25 + 2.56 + 2.25 + 2.56 + 1)
    np.testing.assert_allclose(driver.read()[:2], [0.999 + 0.001 * mean, 0.999 * 1.04 + 0.001 * square], rtol=1e-6)


def check_all_limited(make: Make) -> None:
    """Limit every loss of a batch by its own factor."""
    limited, gradient = make(ALRC(start=START)).step([2.0, 3.0, 100.0])
    np.testing.assert_allclose(limited, [1.6, 1.6, 1.6], rtol=1e-6)
    np.testing.assert_allclose(gradient, [0.8, 1.6 / 3, 0.016], rtol=1e-6)


def check_loss_at_the_limit(make: Make) -> None:
    """Leave a loss that equals the limit alone; limit the next larger number."""
    driver = make(ALRC(start=START))
    limit = driver.dtype(driver.read()[2])
    above = np.nextafter(limit, driver.dtype(np.inf))
    limited, gradient = driver.step([limit, above])
    assert limited[0] == limit
    assert limited[1] == limit
    assert gradient[0] == 1
    assert gradient[1] == limit / above < 1


def check_scalar_stream(make: Make) -> None:
    """Follow 300 single losses from a given start."""
    check_stream(make, ALRC(betas=(0.98, 0.98), start=(2.0, 6.0)), spiky(1, 300))


def check_batch_stream(make: Make) -> None:
    """Follow batches that learn their own scale."""
    check_stream(make, ALRC(betas=(0.95, 0.95), observe=8), spiky(2, 120, 6))


def check_unequal_decays(make: Make) -> None:
    """Follow summands with two decays and moments of the unlimited batch mean, as the paper has them."""
    check_stream(make, ALRC.paper(2.0, (0.95, 0.98), 1.5, 4.0), spiky(3, 120, 3, 4))


def check_scripts(make: Make) -> None:
    """Follow single losses by the published scripts' rule, whose moments settle at a third of the truth."""
    check_stream(make, ALRC.cifar_scripts(), 30 * spiky(4, 300))


def check_poison(make: Make) -> None:
    """Keep NaN and infinity out of values, gradients and moments: at step 0, in warm-up, late, in part and in whole."""
    stream = spiky(5, 150, 4)
    stream[0, 1], stream[5, 0], stream[60, 2], stream[61, 3] = np.nan, np.inf, -np.inf, np.nan
    stream[3], stream[80] = np.nan, [np.inf, np.nan, -np.inf, np.inf]
    stream[-1, 0] = 100
    rule = ALRC(betas=(0.95, 0.95), observe=8)
    check_stream(make, rule, stream)
    driver = make(rule)
    for losses in stream[:-1]:
        limited, gradient = driver.step(losses)
        assert np.all(gradient[~np.isfinite(losses)] == 0)
        assert np.all(np.isfinite(limited))
    assert driver.step(stream[-1]).gradient[0] < 0.1, "a spike after the poison is not limited"


def check_largest_number(make: Make) -> None:
    """Stay a number when the largest one of the dtype comes by, while observing and after; still catch later spikes."""
    rules = (ALRC(observe=4), ALRC(start=START), ALRC.paper(mu1=1.0, mu2=1.04), ALRC.paper(3.0, (0.99, 0.9), 1.0, 1.04))
    for rule in rules:
        driver = make(rule)
        losses = np.exp(np.random.default_rng(6).normal(0, 0.2, 30))
        losses[[2, 20]] = np.finfo(driver.dtype).max
        for loss in losses:
            with np.errstate(over="ignore", invalid="ignore"):
                limited, gradient = driver.step([loss, 1.0])
                moments = driver.read()
            assert np.all(np.isfinite(limited)), f"values {limited} in {rule}"
            assert np.all((gradient >= 0) & (gradient <= 1)), f"gradients {gradient} in {rule}"
            assert not np.any(np.isnan(moments)), f"mu1, mu2 and limit are {moments} in {rule}"
        if rule.feed == "limited" and not rule.is_auto:
            assert driver.step([100.0, 1.0]).gradient[0] < 0.1, f"a spike is not limited in {rule}"


def check_small_spread(make: Make) -> None:
    """Know the spread of losses whose mean is 10,000 times as large, in float32 too."""
    driver = make(ALRC(betas=(0.99, 0.99), observe=8))
    for loss in np.random.default_rng(7).normal(1000, 0.1, (300, 4)):
        driver.step(loss)
    mu1, _, limit = driver.read()
    assert (limit - mu1) / 3 == pytest.approx(0.1, rel=0.05)


def check_domain(make: Make) -> None:
    """Neither amplify nor flip a gradient where losses, or the limit, are not positive."""
    streams = {"negative": [-1.0, -2.0, -0.5], "zero": [0.0, 0.0, 0.0], "crossing": [-3.0, 4.0, -1.0]}
    for name, losses in streams.items():
        driver = make(ALRC(num_stddev=0.5, betas=(0.9, 0.9), start=(-1.0, 1.5)))
        for _ in range(20):
            limited, gradient = driver.step(losses)
            assert np.all((gradient >= 0) & (gradient <= 1)), f"{name}: gradients {gradient}"
            outside = np.less_equal(losses, 0)
            np.testing.assert_array_equal(limited[outside], np.array(losses)[outside])


def in_bfloat16(losses: np.ndarray) -> np.ndarray:
    """Round to 8 bits of significand, to even: the numbers that bfloat16 has, in float32."""
    bits = losses.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def check_narrow_losses(make: Make) -> None:
    """Follow losses in bfloat16: decisions and state are those of float32, values and gradients are rounded once."""
    for rule in (ALRC(betas=(0.95, 0.95), observe=8), ALRC(betas=(0.98, 0.98), start=(2.0, 6.0))):
        driver, stream = make(rule), in_bfloat16(spiky(8, 120, 6))
        want = alrc_trace(stream, **vars(rule))
        assert sum(int(np.sum(scale < 1)) for scale in want.scale) > 10
        for i, losses in enumerate(stream):
            limited, gradient = driver.step(losses, narrow=True)
            np.testing.assert_allclose(limited, want.limited[i], rtol=2**-8, err_msg=f"values of step {i}")
            np.testing.assert_allclose(gradient, want.scale[i], rtol=2**-8, err_msg=f"gradients of step {i}")
            np.testing.assert_array_equal(limited[want.scale[i] == 1], losses[want.scale[i] == 1])
            np.testing.assert_allclose(driver.read()[:2], (want.mu1[i], want.mu2[i]), rtol=precision(driver))


CHECKS: tuple[Callable[[Make], Any], ...] = (
    check_mixed_batch,
    check_all_limited,
    check_loss_at_the_limit,
    check_scalar_stream,
    check_batch_stream,
    check_unequal_decays,
    check_scripts,
    check_poison,
    check_largest_number,
    check_small_spread,
    check_domain,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_holds(check: Callable[[Make], Any], make: Make) -> None:
    check(make)


@pytest.mark.parametrize("backend", named(NARROW))
def test_holds_for_narrow_losses(backend: str) -> None:
    check_narrow_losses(BACKENDS[backend])


CAUGHT_BY: dict[type, tuple[Callable[[Make], Any], ...]] = {
    mutants.LimitingDisabled: (check_mixed_batch, check_all_limited, check_scalar_stream, check_poison),
    mutants.GradientZeroed: (
        check_mixed_batch,
        check_all_limited,
        check_scalar_stream,
        check_loss_at_the_limit,
        check_narrow_losses,
    ),
    mutants.LiteralFormula: (check_domain, check_poison),
    mutants.BatchMeanLimited: (check_mixed_batch, check_all_limited, check_batch_stream),
    mutants.UnlimitedFeed: (check_mixed_batch, check_scalar_stream, check_batch_stream, check_narrow_losses),
    mutants.BiasedDecay: (check_mixed_batch, check_scalar_stream, check_unequal_decays),
    mutants.RawMoments: (check_small_spread,),
    mutants.UpdateFirst: (check_loss_at_the_limit, check_scalar_stream, check_batch_stream),
    mutants.NonfiniteEnters: (check_poison,),
    mutants.NonfiniteCounted: (check_poison,),
}


@pytest.mark.parametrize(
    ("mutant", "check"),
    [(mutant, check) for mutant, checks in CAUGHT_BY.items() for check in checks],
    ids=lambda thing: thing.__name__,
)
def test_goes_red_on_a_mutant(mutant: type, check: Callable[[Make], Any]) -> None:
    with pytest.raises(AssertionError):
        check(drive_class(mutant))


def test_no_mutant_is_forgotten() -> None:
    assert set(CAUGHT_BY) == set(mutants.MUTANTS)
    defined = {thing for thing in vars(mutants).values() if isinstance(thing, type) and thing.__module__ == "mutants"}
    assert set(mutants.MUTANTS) == {thing for thing in defined if not thing.__name__.startswith("_")}


def test_a_stream_that_limits_nothing_is_refused() -> None:
    with pytest.raises(AssertionError, match="too little"):
        check_stream(drive_numpy, ALRC(start=START), np.ones(20))
