"""Check the fast rule against the slow oracle on streams of hundreds of steps, whatever the settings.

Tolerance: the oracle keeps raw moments in float64. One step rounds each of them a few times, 2⁻⁵³ relative, and the
decay forgets, so after any number of steps at most some 1/(1 - β) · 2⁻⁵³ ≤ 1e-12 of μ2 is wrong, typically its square
root. The streams spread by at least a third of their mean, so var > μ2 / 10 and the limit inherits less than 1e-10. A
loss within that of the limit may be called limited by one side only; its value and factor still agree as closely, for
both are continuous there.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alrc.reference import Trace, alrc_trace
from alrc.rules import ALRC

RELATIVE = 1e-9
SHAPES = [(), (1,), (5,), (3, 4)]


def run_rule(rule: ALRC, stream: list[Any]) -> Trace:
    """Step the rule over a stream in float64 and record what the oracle records."""
    state = rule.init()
    limited, scale, limit, mu1, mu2 = [], [], [], [], []
    for losses in stream:
        decision = rule.decide(losses, state)
        limit.append(rule.limit(state))
        state = rule.update(losses, decision, state)
        limited.append(decision.limited)
        scale.append(decision.scale)
        mu1.append(state.mu1)
        mu2.append(state.mu2)
    return Trace(limited, scale, np.array(limit), np.array(mu1), np.array(mu2))


def assert_same(got: Trace, want: Trace) -> None:
    """Compare two traces, every step of every column."""
    for name in ("limit", "mu1", "mu2"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=RELATIVE, err_msg=name)
    for name in ("limited", "scale"):
        for i, (ours, theirs) in enumerate(zip(getattr(got, name), getattr(want, name), strict=True)):
            assert np.shape(ours) == np.shape(theirs)
            np.testing.assert_allclose(ours, theirs, rtol=RELATIVE, err_msg=f"{name} of step {i}")


def make_stream(seed: int, steps: int, shape: tuple[int, ...], level: float, poison: float) -> list[Any]:
    """Make losses that spread by 40 %, spike, drift by a factor of two, shift, and are now and then not finite."""
    rng = np.random.default_rng(seed)
    losses = level * np.exp(rng.normal(0, 0.4, (steps, *shape)))
    losses *= np.where(rng.random(losses.shape) < 0.04, rng.uniform(2, 1000, losses.shape), 1)
    losses *= np.linspace(1, rng.uniform(0.5, 2), steps).reshape(-1, *[1] * len(shape))
    losses[2 * steps // 3 :] *= rng.choice([0.3, 1, 10])
    bad = rng.choice([np.nan, np.inf, -np.inf], losses.shape)
    losses = np.where(rng.random(losses.shape) < poison, bad, losses)
    gone = rng.random(steps) < poison / 2
    losses[gone] = bad[gone]
    return list(losses)


decays = st.sampled_from([0.8, 0.9, 0.99, 0.997, 0.999, 0.9999])
starts = st.one_of(
    st.just("auto"),
    st.tuples(st.floats(0.5, 10), st.floats(0.2, 3)).map(lambda pair: (pair[0], pair[0] ** 2 * (1 + pair[1]))),
)
rules = st.builds(
    dict,
    num_stddev=st.floats(1.5, 4),
    betas=st.one_of(decays.map(lambda beta: (beta, beta)), st.tuples(decays, decays)),
    start=starts,
    feed=st.sampled_from(["limited", "unlimited"]),
    second_moment=st.sampled_from(["elements", "mean"]),
    eps=st.sampled_from([0.0, 1e-8, 1e-3]),
    gain=st.sampled_from([1.0, 1 / 3]),
    observe=st.integers(8, 32),
    signed=st.booleans(),
    num_stddev_below=st.sampled_from([None, 0.5, 2.0]),
)


def with_level(config: dict[str, Any], level: float) -> dict[str, Any]:
    """Bring the starting moments to the level of the losses."""
    if config["start"] == "auto":
        return config
    mu1, mu2 = config["start"]
    return {**config, "start": (level * mu1, level * level * mu2)}


@settings(max_examples=150)
@given(
    config=rules,
    shape=st.sampled_from(SHAPES),
    seed=st.integers(0, 2**32 - 1),
    level=st.sampled_from([1e-3, 1.0, 1e4]),
    poison=st.sampled_from([0.0, 0.05]),
)
def test_rule_is_the_oracle(
    config: dict[str, Any], shape: tuple[int, ...], seed: int, level: float, poison: float
) -> None:
    config = with_level(config, level)
    stream = make_stream(seed, 60, shape, level, poison)
    assert_same(run_rule(ALRC(**config), stream), alrc_trace(stream, **config))


@settings(max_examples=30)
@given(config=rules, shape=st.sampled_from(SHAPES), seed=st.integers(0, 2**32 - 1), poison=st.sampled_from([0.0, 0.05]))
def test_rule_is_the_oracle_for_300_steps(
    config: dict[str, Any], shape: tuple[int, ...], seed: int, poison: float
) -> None:
    stream = make_stream(seed, 300, shape, 1.0, poison)
    assert_same(run_rule(ALRC(**config), stream), alrc_trace(stream, **config))


@pytest.mark.parametrize(
    "rule",
    [ALRC(), ALRC.paper(mu1=3.0, mu2=15.0), ALRC.reference(mu1_start=3.0, mu2_start=15.0), ALRC.cifar_scripts(2.0)],
    ids=["default", "paper", "reference", "cifar_scripts"],
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_presets_are_the_oracle(rule: ALRC, shape: tuple[int, ...]) -> None:
    stream = make_stream(7, 300, shape, 5.0, 0.02)
    want = alrc_trace(stream, **vars(rule))
    assert_same(run_rule(rule, stream), want)
    assert any(np.any((scale > 0) & (scale < 1)) for scale in want.scale), "the stream limits nothing"


@pytest.mark.parametrize(
    "change",
    [
        {"num_stddev": 3.001},
        {"betas": (0.99, 0.9901)},
        {"betas": (0.9901, 0.99)},
        {"start": (2.0, 6.001)},
        {"feed": "unlimited"},
        {"second_moment": "mean"},
        {"eps": 1e-3},
        {"gain": 0.999},
        {"start": "auto"},
        {"signed": True},
        {"num_stddev_below": 0.5},
    ],
    ids=str,
)
def test_comparison_goes_red_when_one_setting_differs(change: dict[str, Any]) -> None:
    """The twin: each setting matters to the stream, so agreement above says something about it."""
    config: dict[str, Any] = {"betas": (0.99, 0.99), "start": (2.0, 6.0)}
    stream = make_stream(8, 100, (4,), 1.0, 0.02)
    assert_same(run_rule(ALRC(**config), stream), alrc_trace(stream, **config))
    with pytest.raises(AssertionError):
        assert_same(run_rule(ALRC(**config), stream), alrc_trace(stream, **{**config, **change}))


def test_oracle_by_hand() -> None:
    """Hold the oracle itself against numbers worked out on paper."""
    trace = alrc_trace([1.0, 3.0, [50.0, 2.0]], start=(1.0, 2.0), betas=(0.5, 0.5))
    # Step 0: limit 1 + 3·1; L = 1 passes: μ1 = 1, μ2 = (2 + 1) / 2. Step 1: 1 + 3·√0.5; L = 3 passes.
    # Step 2: μ1 = 2, μ2 = 5.25, limit 2 + 3·√1.25; 50 is limited, fed as the limit.
    limit = 2 + 3 * math.sqrt(1.25)
    np.testing.assert_allclose(trace.limit, [4, 1 + 3 * math.sqrt(0.5), limit], rtol=1e-15)
    np.testing.assert_allclose(trace.limited[2], [limit, 2], rtol=1e-15)
    np.testing.assert_allclose(trace.scale[2], [limit / 50, 1], rtol=1e-15)
    np.testing.assert_allclose(trace.mu1, [1, 2, (2 + (limit + 2) / 2) / 2], rtol=1e-15)
    np.testing.assert_allclose(trace.mu2, [1.5, 5.25, (5.25 + (limit**2 + 4) / 2) / 2], rtol=1e-15)
    assert trace.scale[0] == trace.scale[1] == 1


def test_oracle_starts_from_the_winsorised_first_losses() -> None:
    """Four losses: the sorted ones are 1, 2, 3, 9; median 3 (third), quartiles 1 (first) and 9 (fourth)."""
    trace = alrc_trace([2.0, 9.0, 1.0, 3.0, 0.5], observe=4)
    assert np.all(np.isinf(trace.limit[:4]))
    mean, square = (1 + 2 + 3 + 9) / 4, (1 + 4 + 9 + 81) / 4  # 9 is within 4 quartile distances of the median
    np.testing.assert_allclose([trace.mu1[3], trace.mu2[3]], [mean, square], rtol=1e-15)
    # The fifth update has the weight 4 / (4 + 4), and is the recent quarter's.
    np.testing.assert_allclose([trace.mu1[4], trace.mu2[4]], [(mean + 0.5) / 2, (square + 0.25) / 2], rtol=1e-15)
    assert trace.limit[4] == mean + 3 * math.sqrt(square - mean**2)

    poisoned = alrc_trace([2.0, 3e38, 1.0, 3.0, 2.5, math.nan, 2.0, 1.5, 2.2], observe=8)
    # Sorted: 1, 1.5, 2, 2, 2.2, 2.5, 3, 1e15 (the largest loss there is); median 2.2, upper quartile 3.
    capped = [2.0, 2.2 + 4 * 0.8, 1.0, 3.0, 2.5, 2.0, 1.5, 2.2]
    np.testing.assert_allclose(poisoned.mu1[-1], np.mean(capped), rtol=1e-15)


def test_oracle_learns_a_shift_anew() -> None:
    old = [1.0, 1.2, 0.8, 1.0] * 250
    trace = alrc_trace([*old, *[10.0] * 60])
    scales = np.array([float(scale) for scale in trace.scale])[1000:]
    # The alarm comes after 17 updates that are limited altogether (1 - (31/32)^17 > 0.4), see SPEC S20.
    assert np.all(scales[:17] < 1)
    assert np.all(scales[17:] == 1)
    # The last 32 updates are then 15 old and 17 new ones.
    np.testing.assert_allclose(trace.mu1[1016], (17 * 10 + sum(old[-15:])) / 32, rtol=1e-14)


def test_oracle_keeps_a_lone_spike_out_of_the_moments() -> None:
    losses = np.random.default_rng(9).lognormal(0, 0.2, 200)
    spiky = losses.copy()
    spiky[150] *= 1000
    calm, disturbed = alrc_trace(losses), alrc_trace(spiky)
    assert disturbed.scale[150] < 0.003
    # All that differs is that one loss is missing.
    assert disturbed.limit[151] == disturbed.limit[150]
    assert abs(disturbed.limit[151] / calm.limit[151] - 1) < 0.01


def test_oracle_limits_signed_losses_from_both_sides() -> None:
    trace = alrc_trace([[5.0, -7.0, 0.0]], start=(-1.0, 2.0), signed=True, num_stddev=2.0, num_stddev_below=3.0)
    # Mean -1, deviation 1: between -4 and 1. Above, from the base -3: (1 + 3) / (5 + 3). Below, from the top 2: 6 / 9.
    assert trace.limited[0].tolist() == [1, -4, 0]
    np.testing.assert_allclose(trace.scale[0], [0.5, 2 / 3, 1], rtol=1e-15)


def test_oracle_leaves_a_batch_without_a_finite_loss_out() -> None:
    trace = alrc_trace([1.0, [np.nan, np.inf], 2.0], start=(1.0, 2.0))
    assert trace.mu1[1] == trace.mu1[0]
    assert trace.mu2[1] == trace.mu2[0]
    assert trace.scale[1].tolist() == trace.limited[1].tolist() == [0, 0]
