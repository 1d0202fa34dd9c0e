"""Hold the gradient rules against loops and numpy in float64; every check that could pass for nothing has a mutant."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from alrc.ops import NUMPY, Ops
from alrc.rules import (
    AGC,
    AutoClip,
    GradientDecision,
    GradientRule,
    Huber,
    Norm,
    NormHistory,
    NormStatistics,
    UnitNorms,
    Value,
    ZClip,
)
from alrc.rules.history import LARGEST_NORM

BAD = (math.nan, math.inf)
REMEMBERING: tuple[Any, ...] = (AutoClip(), AutoClip(50.0, window=7), ZClip(), ZClip(max_norm=None, recover=False))
RULES: tuple[Any, ...] = (Value(0.5), Norm(0.5), *REMEMBERING)


def run(rule: Any, norms: Sequence[float] | NDArray[Any]) -> tuple[NDArray[Any], list[Any]]:
    """Step a rule through a stream; return the limited norms and the states after each step."""
    state, limited, states = rule.init(), [], []
    for norm in norms:
        decision = rule.decide(np.float64(norm), state)
        state = rule.update(np.float64(norm), decision, state)
        limited.append(norm * decision.scale)
        states.append(state)
    return np.array(limited), states


def spiky(number: int = 300, seed: int = 0) -> NDArray[Any]:
    """Make norms with a spread of 30 % and some spikes."""
    generator = np.random.default_rng(seed)
    norms = np.exp(generator.normal(0, 0.3, number))
    norms[[place for place in (60, 100, 101, 200) if place < number]] *= 30
    return norms


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Value(0.0), "threshold must be a positive finite number, got 0.0"),
        (lambda: Value(math.nan), "got nan"),
        (lambda: Norm(-1.0), "max_norm must be a positive finite number, got -1.0"),
        (lambda: Norm(True), "got True"),
        (lambda: Norm(1.0, scope="layer"), "scope must be 'global' or 'parameter', got 'layer'"),  # type: ignore[arg-type]
        (lambda: Norm(1.0, norm_type=0.0), "norm_type must be a number > 0 or math.inf, got 0.0"),
        (lambda: Norm(1.0, norm_type=math.nan), "got nan"),
        (lambda: AGC(0.0), "clip_factor must be a positive finite number, got 0.0"),
        (lambda: AGC(eps=0.0), "eps must be a positive finite number, got 0.0"),
        (lambda: AGC(exclude="head"), "exclude must be a tuple of names or glob patterns, got 'head'"),  # type: ignore[arg-type]
        (lambda: AutoClip(101.0), r"percentile must be in \[0, 100\], got 101.0"),
        (lambda: AutoClip(math.nan), "got nan"),
        (lambda: AutoClip(window=0), "window must be a whole number ≥ 1, got 0"),
        (lambda: AutoClip(scope="unit"), "got 'unit'"),  # type: ignore[arg-type]
        (lambda: ZClip(1.0), r"decay must be in \(0, 1\), got 1.0"),
        (lambda: ZClip(z_threshold=0.0), "z_threshold must be a positive finite number, got 0.0"),
        (lambda: ZClip(max_norm=0.0), "max_norm must be a positive finite number, got 0.0"),
        (lambda: ZClip(warmup=2.5), "warmup must be a whole number ≥ 1, got 2.5"),  # type: ignore[arg-type]
        (lambda: ZClip(eps=0.0), "eps must be a positive finite number, got 0.0"),
    ],
)
def test_a_wrong_setting_is_named(make: Callable[[], Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make()


@pytest.mark.parametrize("rule", [*RULES, AGC()], ids=repr)
def test_follows_the_protocol(rule: Any) -> None:
    assert isinstance(rule, GradientRule)
    assert not isinstance(Huber(), GradientRule)
    assert hash(rule) == hash(eval(repr(rule)))  # a rule is its settings


def test_agc_takes_a_list_of_names() -> None:
    assert AGC(exclude=["head.*"]).exclude == ("head.*",)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------- memoryless


@pytest.mark.parametrize("rule", [Value(0.5), Norm(0.5), Norm(0.5, scope="parameter", norm_type=math.inf)], ids=repr)
def test_brings_magnitudes_down_to_the_threshold(rule: Any) -> None:
    magnitudes = np.array([0.0, 0.25, 0.5, 0.75, 1e30, math.nan, math.inf])
    decision = rule.decide(magnitudes, rule.init())
    np.testing.assert_array_equal(decision.scale[[0, 1, 2, 5, 6]], 1.0)
    np.testing.assert_allclose(decision.scale[[3, 4]] * magnitudes[[3, 4]], 0.5, rtol=1e-15)
    assert rule.update(magnitudes, decision, None) is None


def test_agc_holds_each_unit_to_its_weights() -> None:
    gradient = np.array([1.0, 0.0, 1.0, 1.0, math.nan, math.inf])
    weight = np.array([10.0, 10.0, 0.0, 1000.0, 1.0, 1.0])
    decision = AGC(0.05, eps=1e-2).decide(UnitNorms(gradient, weight))
    np.testing.assert_allclose(decision.scale, [0.5, 1.0, 5e-4, 1.0, 1.0, 1.0], rtol=1e-15)
    np.testing.assert_allclose(decision.threshold, 0.05 * np.maximum(weight, 1e-2), rtol=1e-15)


# --------------------------------------------------------------------------------------------------------- AutoClip


def check_percentile(rule: AutoClip, norms: NDArray[Any]) -> None:
    """Compare with numpy over the last finite norms, the current one among them, to the last bit."""
    state, kept = rule.init(), list[float]()
    for norm in norms:
        decision = rule.decide(norm, state)
        state = rule.update(norm, decision, state)
        if math.isfinite(norm):
            kept = [*kept, norm][-rule.window :]
            assert decision.threshold == np.percentile(kept, rule.percentile), f"after {len(kept)} norms"
            assert decision.scale == min(1.0, decision.threshold / norm)
        else:
            assert decision.scale == 1.0
        assert state.norms.shape == (rule.window,), "the memory grows"


class _WithoutCurrent(AutoClip):
    """Hold a norm against the ones before it alone, as the package on PyPI does."""

    def decide(self, measured: Any, state: NormHistory, ops: Ops = NUMPY) -> GradientDecision:
        now = super().decide(measured, state, ops)
        before = super().decide(math.nan, state, ops) if state.count else now
        return GradientDecision(np.minimum(1.0, before.threshold / measured), before.threshold, now.carry)


class _Nearest(AutoClip):
    """Take the nearest norm instead of interpolating."""

    def decide(self, measured: Any, state: NormHistory, ops: Ops = NUMPY) -> GradientDecision:
        decision = super().decide(measured, state, ops)
        kept = np.sort(decision.carry[0])[: min(self.window, int(decision.carry[1]))]
        threshold = kept[np.abs(kept - decision.threshold).argmin()]
        return GradientDecision(min(1.0, threshold / measured), threshold, decision.carry)


@pytest.mark.parametrize("percentile", [0.0, 10.0, 33.3, 50.0, 97.5, 100.0])
@pytest.mark.parametrize("window", [1, 2, 7, 50, 1000])
def test_autoclip_is_the_percentile_of_numpy(percentile: float, window: int) -> None:
    norms = spiky(210)
    norms[[0, 5, 6, 120]] = math.nan, math.inf, math.nan, math.nan
    check_percentile(AutoClip(percentile, window=window), norms)


@pytest.mark.parametrize("mutant", [_WithoutCurrent, _Nearest])
def test_another_percentile_is_caught(mutant: type[AutoClip]) -> None:
    with pytest.raises(AssertionError):
        check_percentile(mutant(10.0, window=50), spiky(210))


def test_autoclip_keeps_a_history_for_each_parameter() -> None:
    generator = np.random.default_rng(1)
    norms = np.exp(generator.normal(0, 1, (90, 4)))
    norms[generator.random(norms.shape) < 0.3] = math.nan  # a parameter without a gradient
    norms[:3, 2] = math.inf
    rule = AutoClip(25.0, window=20, scope="parameter")
    state, alone = rule.init(4), [AutoClip(25.0, window=20).init() for _ in range(4)]
    for row in norms:
        decision = rule.decide(row, state)
        state = rule.update(row, decision, state)
        for place, norm in enumerate(row):
            one = AutoClip(25.0, window=20).decide(norm, alone[place])
            alone[place] = AutoClip(25.0, window=20).update(norm, one, alone[place])
            assert decision.scale[place] == one.scale
            assert decision.threshold[place] == one.threshold
    assert state.norms.shape == (4, 20)
    assert list(state.count) == [one.count for one in alone]


# ------------------------------------------------------------------------------------------------------------ ZClip


def zclip_by_hand(rule: ZClip, norms: NDArray[Any]) -> tuple[list[float], list[tuple[float, float]]]:
    """Follow the paper's recursion with Python floats: limited norms, and (mean, var) after each step."""
    mean = var = 0.0
    warm, limited, statistics = list[float](), list[float](), list[tuple[float, float]]()
    cap = math.inf if rule.max_norm is None else rule.max_norm
    for norm in map(float, norms):
        fed = norm
        if len(warm) < rule.warmup:
            warm.append(norm)
            mean, var = float(np.mean(warm)), float(np.var(warm))
        else:
            z = (norm - mean) / (math.sqrt(var) + rule.eps)
            if z > rule.z_threshold:
                fed = mean + rule.z_threshold * math.sqrt(var) * (rule.z_threshold / z)
            mean = rule.decay * mean + (1 - rule.decay) * fed
            var = rule.decay * var + (1 - rule.decay) * (fed - mean) ** 2
        limited.append(min(fed, cap))
        statistics.append((mean, var))
    return limited, statistics


def check_zclip(rule: ZClip, norms: NDArray[Any]) -> None:
    """Compare every limited norm and the statistics of every step with the recursion."""
    limited, states = run(rule, norms)
    expected, statistics = zclip_by_hand(rule, norms)
    assert 0 < np.mean(np.array(expected) < norms) < 1, "the stream limits all or nothing"
    np.testing.assert_allclose(limited, expected, rtol=1e-12)
    np.testing.assert_allclose([(s.mean, s.var) for s in states], statistics, rtol=1e-9, atol=1e-15)


class _ToTheMean(ZClip):
    """Cut a spike to the mean, another mode of the package."""

    def decide(self, measured: Any, state: NormStatistics, ops: Ops = NUMPY) -> GradientDecision:
        scale, threshold, (fed, is_spike, is_learned) = super().decide(measured, state, ops)
        fed = ops.where(is_spike, state.mean, fed)
        return GradientDecision(ops.where(is_spike, fed / measured, scale), threshold, (fed, is_spike, is_learned))


class _Unlimited(ZClip):
    """Learn from spikes as they are."""

    def decide(self, measured: Any, state: NormStatistics, ops: Ops = NUMPY) -> GradientDecision:
        scale, threshold, (_, is_spike, is_learned) = super().decide(measured, state, ops)
        return GradientDecision(scale, threshold, (measured, is_spike, is_learned))


@pytest.mark.parametrize(
    "rule",
    [
        ZClip(),
        ZClip(max_norm=None),
        ZClip(max_norm=3.0, warmup=1),
        ZClip(0.9, z_threshold=1.5, max_norm=None, warmup=10, eps=0.1),
        ZClip(0.99, z_threshold=4.0, max_norm=None, recover=False),
    ],
    ids=repr,
)
def test_zclip_follows_the_paper(rule: ZClip) -> None:
    check_zclip(rule, spiky())


@pytest.mark.parametrize("mutant", [_ToTheMean, _Unlimited])
def test_another_zclip_is_caught(mutant: type[ZClip]) -> None:
    with pytest.raises(AssertionError):
        check_zclip(mutant(max_norm=None), spiky())


@pytest.mark.parametrize("spread", [0.05, 0.5, 1.0])
def test_recovery_waits_until_it_is_needed(spread: float) -> None:
    norms = np.exp(np.random.default_rng(2).normal(0, spread, 4000))
    norms[500::400] *= 1000
    published, states = run(ZClip(max_norm=None, recover=False), norms)
    assert np.any(published < norms)
    limited, others = run(ZClip(max_norm=None), norms)
    np.testing.assert_array_equal(limited, published)
    assert [s[:3] for s in states] == [s[:3] for s in others]


def check_shift(rule: ZClip, factor: float, noise: float, usual: float = 0.05) -> None:
    """Accept a lasting shift within 50 steps, and catch a spike again afterwards."""
    norms = np.abs(np.random.default_rng(3).normal(1, noise, 1200))
    norms[300:] *= factor
    norms[1000] *= 100
    limited, _ = run(rule, norms)
    is_limited = limited < norms
    assert np.mean(is_limited[:300]) < usual
    assert np.all(is_limited[300:310]), "the shift is not even noticed, so nothing is tested"
    assert np.mean(is_limited[350:1000]) < usual, f"{np.mean(is_limited[350:1000]):.0%} are limited after the shift"
    assert limited[1000] < 2 * factor, "a spike passes after the shift"
    assert np.mean(is_limited[1001:]) < usual


@pytest.mark.parametrize("noise", [0.02, 0.05])
@pytest.mark.parametrize("factor", [1.5, 3.0, 10.0, 1e4])
def test_zclip_follows_a_shift(factor: float, noise: float) -> None:
    check_shift(ZClip(max_norm=None), factor, noise)


@pytest.mark.parametrize(("z_threshold", "usual"), [(1.5, 0.15), (4.0, 0.02), (8.0, 0.01)])
def test_zclip_follows_a_shift_whatever_its_threshold(z_threshold: float, usual: float) -> None:
    check_shift(ZClip(z_threshold=z_threshold, max_norm=None), 10.0, 0.02, usual)


def test_the_published_rule_is_locked_in() -> None:
    with pytest.raises(AssertionError, match="100% are limited after the shift"):
        check_shift(ZClip(max_norm=None, recover=False), 1.5, 0.05)


@pytest.mark.parametrize("place", [10, 25, 300])
def test_spikes_among_the_last_norms_do_not_spoil_the_recovery(place: int) -> None:
    norms = np.abs(np.random.default_rng(4).normal(1, 0.05, 700))
    norms[300:] *= 3
    norms[300 + place % 17 :: 5][:3] *= 1000
    _, states = run(ZClip(max_norm=None), norms[:400])
    assert states[-1].mean + 2.5 * math.sqrt(states[-1].var) < 6, "spikes have become the new level"


def test_a_spike_hardly_moves_the_threshold() -> None:
    norms = np.abs(np.random.default_rng(5).normal(1, 0.05, 200))
    norms[150] = 1000.0
    rule = ZClip(max_norm=None)
    _, states = run(rule, norms)
    before, after = (float(rule.decide(1.0, states[step]).threshold) for step in (149, 150))
    assert after == pytest.approx(before, rel=0.01)


# ------------------------------------------------------------------------------------------------------- non-finite


def same(one: Any, other: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def check_poison(rule: Any, bad: float) -> None:
    """Leave state and gradient as they are when a norm is not finite: first, in the warm-up, and late."""
    norms = spiky(120)
    state = rule.init()
    for step, norm in enumerate(norms):
        if step in (0, 1, 12, 80):
            decision = rule.decide(np.float64(bad), state)
            assert decision.scale == 1.0, "what is not finite is multiplied"
            assert not np.isnan(decision.threshold)
            after = rule.update(np.float64(bad), decision, state)
            assert same(after, state), f"{bad} has entered the state at step {step}"
        decision = rule.decide(norm, state)
        state = rule.update(norm, decision, state)
    assert rule.decide(np.float64(1000.0), state).scale < 0.1, "a later spike passes"


class _Enters(ZClip):
    """Let a NaN into the statistics, as the package does."""

    def update(
        self, measured: Any, decision: GradientDecision, state: NormStatistics, ops: Ops = NUMPY
    ) -> NormStatistics:
        return super().update(measured, decision, state, ops)._replace(mean=state.mean + 0.0 * measured)


class _Multiplies(AutoClip):
    """Divide by whatever norm there is, as `clip_grad_norm_` does."""

    def decide(self, measured: Any, state: NormHistory, ops: Ops = NUMPY) -> GradientDecision:
        decision = super().decide(measured, state, ops)
        return decision._replace(scale=np.minimum(1.0, decision.threshold / measured))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("rule", REMEMBERING, ids=repr)
def test_nonfinite_norms_leave_no_trace(rule: Any, bad: float) -> None:
    check_poison(rule, bad)


@pytest.mark.parametrize("mutant", [_Enters(), _Multiplies()], ids=repr)
def test_a_trace_of_nonfinite_norms_is_caught(mutant: Any) -> None:
    with pytest.raises(AssertionError):
        check_poison(mutant, math.nan)


@pytest.mark.parametrize("rule", REMEMBERING, ids=repr)
def test_astronomic_norms_are_limited_and_not_remembered(rule: Any) -> None:
    norms = spiky(100)
    norms[[3, 70]] = 1e200, LARGEST_NORM
    limited, states = run(rule, norms)
    assert limited[70] < 100
    assert all(np.all(np.isfinite(field)) for field in states[-1])
    assert np.max(states[-1][0]) <= LARGEST_NORM


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_zero_gradients_stay_zero(rule: Any) -> None:
    limited, _ = run(rule, [0.0] * 60 + [1.0] + [0.0] * 3)
    assert np.all(np.isfinite(limited))
    assert np.all(limited[:60] == 0)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_no_factor_is_above_one(rule: Any) -> None:
    norms = spiky(400, seed=6) * np.logspace(-6, 6, 400)
    limited, _ = run(rule, norms)
    assert np.all((limited >= 0) & (limited <= norms))
    assert np.any(limited < norms)


@pytest.mark.parametrize("rule", [AutoClip(), ZClip(max_norm=None)], ids=repr)
def test_the_state_does_not_grow(rule: Any) -> None:
    sizes = [sum(np.size(field) for field in state) for state in run(rule, spiky(1100))[1]]
    assert set(sizes) == {sum(np.size(field) for field in rule.init())}
