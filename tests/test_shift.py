"""Hold the default rule to the bounds of SPEC S20: lone spikes, second spikes, rises, falls, poisoned starts.

Twins take the mechanism apart - no alarm, a plain average, no winsor - and must break the bound it is there for.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alrc.rules import ALRC, alarm_delay, explained_share, largest_share, shift


def follow(rule: ALRC, stream: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the limit that each loss was held against, and each factor."""
    state: Any = rule.init()
    limits, scales = [], []
    with np.errstate(all="ignore"):
        for losses in stream:
            decision = rule.decide(losses, state)
            limits.append(rule.limit(state))
            scales.append(decision.scale)
            state = rule.update(losses, decision, state)
    return np.array(limits), np.array(scales)


def noise(seed: int, steps: int, *shape: int, sigma: float = 0.2) -> np.ndarray:
    """Make lognormal losses with median 1."""
    return np.random.default_rng(seed).lognormal(0, sigma, (steps, *shape))


@pytest.mark.parametrize("height", [30.0, 1e3, 1e30])
@pytest.mark.parametrize("shape", [(), (16,)], ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_a_lone_spike_leaves_the_limit_and_hides_nothing(height: float, shape: tuple[int, ...], seed: int) -> None:
    stream = noise(seed, 620, *shape)
    calm, _ = follow(ALRC(), stream)
    first = (600, *[3] * len(shape))
    second = (610, *[5] * len(shape))
    stream[first] *= height
    stream[second] *= 100
    limits, scales = follow(ALRC(), stream)
    assert scales[first] < 0.1
    assert scales[second] < 0.05
    assert abs(limits[601] / limits[600] - 1) < 1e-3
    assert np.all(np.abs(limits[601:611] / calm[601:611] - 1) < 0.01)


@pytest.mark.parametrize("n", [1.0, 2.0, 3.0, 6.0])
@pytest.mark.parametrize("factor", [1.5, 10.0, 1e6])
@pytest.mark.parametrize("shape", [(), (8,)], ids=str)
def test_a_permanent_rise_is_accepted_when_promised(n: float, factor: float, shape: tuple[int, ...]) -> None:
    stream = noise(1, 1200, *shape, sigma=0.05)
    stream[1000:] *= factor
    _, scales = follow(ALRC(n), stream)
    after = scales[1000 + alarm_delay(n) :]
    assert np.mean(after < 1) <= explained_share(n)
    assert np.all(scales[1000] < 1)


@pytest.mark.parametrize("before", ["spikes", "a constant"])
def test_a_rise_is_accepted_whatever_came_before(before: str) -> None:
    stream = np.ones(1100) if before == "a constant" else noise(2, 1100)
    if before == "spikes":
        stream[900:1000:12] *= 100
    stream[1000:] *= 10
    _, scales = follow(ALRC(), stream)
    assert np.mean(scales[1050:] < 1) < 0.1


def test_a_fall_keeps_the_limit_in_bounds() -> None:
    levels = 10.0 ** np.linspace(1, 0, 5000)
    stream = np.concatenate([10 * noise(3, 1000), levels * noise(4, 5000)])
    limits, _ = follow(ALRC(), stream)
    ratio = limits[1000:] / levels
    assert ratio.max() < 11
    assert ratio.min() > 1


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 3e38, 1e6], ids=str)
@pytest.mark.parametrize("place", [0, 3, 31])
@pytest.mark.parametrize("number", [1, 6])
def test_a_poisoned_start_blinds_nothing(poison: float, place: int, number: int) -> None:
    stream = noise(5, 300)
    stream[[(place + 5 * i) % 32 for i in range(number)]] = poison
    stream[100] = 100
    limits, scales = follow(ALRC(), stream)
    assert scales[100] < 0.1
    assert limits[100] < 5
    assert np.mean(scales[40:] == 1) > 0.9


BATCHES = st.lists(st.lists(st.floats(0.01, 100), min_size=3, max_size=3), min_size=45, max_size=60)


@given(stream=BATCHES, factor=st.floats(1e-6, 1e6), offset=st.floats(-1e3, 1e3))
def test_signed_decisions_do_not_depend_on_unit_or_origin(
    stream: list[list[float]], factor: float, offset: float
) -> None:
    rule = ALRC(2.0, signed=True, num_stddev_below=2.0, observe=8)
    losses = np.array(stream)
    _, scales = follow(rule, losses)
    _, moved = follow(rule, factor * (losses + offset))
    # A loss within rounding of a limit may be limited by a factor of nearly 1.
    np.testing.assert_allclose(moved, scales, atol=1e-6)
    assert np.all((scales >= 0) & (scales <= 1))


def test_a_signed_constant_is_left_alone_and_a_jump_of_it_is_not() -> None:
    rule = ALRC(signed=True)
    _, scales = follow(rule, np.array([-1.0] * 40 + [5.0] + [-1.0] * 5))
    assert np.all(np.delete(scales, 40) == 1)
    assert 0 < scales[40] < 1e-6


def test_the_thresholds_are_those_of_the_specification() -> None:
    assert [alarm_delay(n) for n in (3.0, 2.0, 1.0)] == [17, 20, 35]
    np.testing.assert_allclose([explained_share(n) for n in (3, 2, 1)], [0.1, 0.2, 0.5])
    np.testing.assert_allclose([largest_share(n) for n in (3, 2, 1)], [0.4, 7 / 15, 2 / 3])


# ---------------------------------------------------------------------------------------------------- failing twins


def test_without_an_alarm_a_rise_is_not_accepted_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shift, "ALARM_MARGIN", 1.0)
    for before in ("spikes", "a constant"):
        with pytest.raises(AssertionError):
            test_a_rise_is_accepted_whatever_came_before(before)


def test_a_quick_alarm_takes_two_spikes_for_a_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shift, "RATE_WEIGHT", 0.5)
    with pytest.raises(AssertionError):
        test_a_lone_spike_leaves_the_limit_and_hides_nothing(1e3, (), 0)


def test_without_the_winsor_a_poisoned_start_blinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shift, "WINSOR", 1e9)
    with pytest.raises(AssertionError):
        test_a_poisoned_start_blinds_nothing(1e6, 3, 1)


def test_limited_losses_at_full_weight_leave_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alrc.rules.alrc.feed_weight", lambda rate, n, ops: 1.0)
    with pytest.raises(AssertionError):
        test_a_lone_spike_leaves_the_limit_and_hides_nothing(1e3, (), 0)
