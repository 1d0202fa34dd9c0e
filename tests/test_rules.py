"""Check the settings, the domain and the invariances of the pure rules."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from alrc import rules
from alrc.moments import Moments
from alrc.ops import NUMPY, NumpyOps, Ops
from alrc.rules import ALRC, Batch, Huber

NAN, INF = float("nan"), float("inf")
START = (1.0, 1.04)


BACKENDS = ("torch", "jax", "keras")


@pytest.fixture(params=["rules", *BACKENDS])
def make(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Give ALRC of the core, then of each backend."""
    return ALRC if request.param == "rules" else pytest.importorskip(f"alrc.{request.param}").ALRC


INVALID = [
    ({"num_stddev": 0.0}, "0.0"),
    ({"num_stddev": -3.0}, "-3.0"),
    ({"num_stddev": INF}, "inf"),
    ({"num_stddev": NAN}, "nan"),
    ({"betas": (1.0, 0.9)}, "(1.0, 0.9)"),
    ({"betas": (0.9, 1.5)}, "(0.9, 1.5)"),
    ({"betas": (-0.1, 0.9)}, "(-0.1, 0.9)"),
    ({"betas": (0.9, NAN)}, "(0.9, nan)"),
    ({"betas": (0.9,)}, "(0.9,)"),
    ({"betas": (0.9, 0.9, 0.9)}, "(0.9, 0.9, 0.9)"),
    ({"start": (2.0, 4.0)}, "mu2=4"),
    ({"start": (2.0, 3.0)}, "mu2=3"),
    ({"start": (NAN, 4.0)}, "mu1=nan"),
    ({"start": (1.0, INF)}, "mu2=inf"),
    ({"start": (25.0,)}, "(25.0,)"),
    ({"start": "Auto"}, "'Auto'"),
    ({"start": "no"}, "'no'"),
    ({"feed": "both"}, "'both'"),
    ({"feed": None}, "None"),
    ({"second_moment": "median"}, "'median'"),
    ({"eps": -1e-8}, "-1e-08"),
    ({"eps": NAN}, "nan"),
    ({"eps": INF}, "inf"),
    ({"gain": 0.0}, "0.0"),
    ({"gain": 1.5}, "1.5"),
    ({"gain": NAN}, "nan"),
    ({"observe": 0}, "0"),
    ({"observe": 3}, "3"),
    ({"observe": 257}, "257"),
    ({"observe": 1.5}, "1.5"),
    ({"observe": True}, "True"),
    ({"observe": NAN}, "nan"),
    ({"num_stddev_below": 0.0}, "0.0"),
    ({"num_stddev_below": INF}, "inf"),
]


@pytest.mark.parametrize(("settings", "value"), INVALID, ids=str)
def test_invalid_setting_is_named(make: Callable[..., Any], settings: dict[str, Any], value: str) -> None:
    with pytest.raises(ValueError, match=f"{re.escape(value)}(?![0-9])") as caught:
        make(**settings)
    name = next(iter(settings))
    assert name in str(caught.value) or "mu1" in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_stddev": 1e-3},
        {"betas": (0.0, 0.0)},
        {"betas": (0.9, 0.9999999)},
        {"start": (-1.0, 1.5)},
        {"eps": 0},
        {"gain": 1e-3},
        {"observe": 4},
        {"observe": 256},
        {"signed": True},
        {"num_stddev_below": 0.1},
    ],
    ids=str,
)
def test_edge_of_the_range_is_accepted(make: Callable[..., Any], settings: dict[str, Any]) -> None:
    make(**settings)


@pytest.mark.parametrize(
    ("backend", "own"), [("torch", {"sync": False}), ("jax", {"axis_name": None}), ("keras", {"keywords": ...})]
)
def test_constructors_agree_on_names_order_and_defaults(backend: str, own: dict[str, Any]) -> None:
    theirs = inspect.signature(pytest.importorskip(f"alrc.{backend}").ALRC).parameters
    ours = inspect.signature(ALRC).parameters
    assert [*ours, *own] == list(theirs)
    defaults = [p.default if p.kind is not p.VAR_KEYWORD else ... for p in theirs.values()]
    assert [*(p.default for p in ours.values()), *own.values()] == defaults
    kinds = {p.kind for p in theirs.values()} - {inspect.Parameter.VAR_KEYWORD}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    assert next(iter(theirs.values())).kind is inspect.Parameter.POSITIONAL_OR_KEYWORD


def test_a_rule_is_a_frozen_value() -> None:
    rule = ALRC()
    assert rule == ALRC()
    assert rule != ALRC(2.0)
    assert isinstance(rule, rules.Rule)
    assert isinstance(Huber(), rules.Rule)
    with pytest.raises(FrozenInstanceError):
        rule.num_stddev = 2.0  # pyright: ignore[reportAttributeAccessIssue]


def test_numpy_ops_are_ops() -> None:
    assert isinstance(NUMPY, Ops)
    assert isinstance(NumpyOps(), Ops)
    assert not isinstance(object(), Ops)


def test_presets_say_what_was_published() -> None:
    paper = ALRC(2.0, betas=(0.9, 0.99), start=(4.0, 20.0), feed="unlimited", second_moment="mean")
    assert ALRC.paper(2.0, (0.9, 0.99), 4.0, 20.0) == paper
    assert ALRC.reference() == ALRC(3.0, betas=(0.999, 0.999), start=(25.0, 900.0), eps=1e-8)
    assert ALRC.reference(2.0, 0.99, 6.0, 60.0) == ALRC(2.0, betas=(0.99, 0.99), start=(6.0, 60.0), eps=1e-8)


def test_cifar_scripts_is_the_published_update() -> None:
    """Follow the scripts' own lines: mu ← 0.997 mu + 0.001 x from 10 and 20², 1e-3 under the root."""
    rule = ALRC.cifar_scripts(2.0)
    state, mu1, mu2 = rule.init(), 10.0, 400.0
    limits = 0
    for loss in np.random.default_rng(1).lognormal(3, 0.8, 2000):
        limit = mu1 + 2.0 * (mu2 - mu1**2 + 1e-3) ** 0.5
        decision = rule.decide(loss, state)
        assert rule.limit(state) == pytest.approx(limit, rel=1e-9)
        assert decision.limited == pytest.approx(min(loss, limit), rel=1e-9)
        limits += loss > limit
        mu1, mu2 = 0.997 * mu1 + 0.001 * min(loss, limit), 0.997 * mu2 + 0.001 * min(loss, limit) ** 2
        state = rule.update(loss, decision, state)
        assert state.mu1 / 3 == pytest.approx(mu1, rel=1e-9)
        assert state.mu2 / 3 == pytest.approx(mu2, rel=1e-9)
    assert limits > 100


NASTY = [
    0.0,
    -0.0,
    5e-324,
    1e-310,
    1e-45,
    1e-38,
    1e38,
    -1e38,
    1e154,
    1e300,
    -1e300,
    1.7976931348623157e308,
    NAN,
    INF,
    -INF,
]
ANY_LOSS = st.one_of(st.sampled_from(NASTY), st.sampled_from([0.5, 1.0, 2.0, 1e38]), st.floats())
ANY_RULE = st.sampled_from(
    [
        ALRC(observe=4),
        ALRC(start=START),
        ALRC(start=(-1.0, 1.5)),
        ALRC(0.5, betas=(0.0, 0.5), observe=4),
        ALRC(betas=(0.99, 0.9), start=START),
        ALRC.paper(mu1=1.0, mu2=1.04),
        ALRC.paper(3.0, (0.99, 0.9), 1.0, 1.04),
        ALRC.reference(),
        ALRC.cifar_scripts(),
    ]
)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@given(rule=ANY_RULE, stream=st.lists(st.lists(ANY_LOSS, min_size=1, max_size=4), min_size=1, max_size=8))
@example(rule=ALRC.paper(3.0, (0.99, 0.9), 1.0, 1.04), stream=[[1e300], [1.0]])
@example(rule=ALRC(observe=4), stream=[[1e300], [1.0], [1.0]])
@example(rule=ALRC(observe=4), stream=[[1e38], [1.0], [1.0]])
def test_scale_is_always_a_factor_from_zero_to_one(rule: ALRC, stream: list[list[float]], dtype: Any) -> None:
    def rounded(state: Any) -> Any:
        return type(state)(*(part if isinstance(part, int | np.integer) else dtype(part) for part in state))

    state = rounded(rule.init())
    with np.errstate(all="ignore"):
        for batch in stream:
            losses = np.array(batch, dtype)
            decision = rule.decide(losses, state)
            state = rounded(rule.update(losses, decision, state))
            assert np.all((decision.scale >= 0) & (decision.scale <= 1)), f"{losses} → {decision}"
            assert np.all(np.isfinite(decision.limited)), f"{losses} → {decision}"
            assert not np.isnan(state.mean), f"{losses} → {state}"
            assert not np.isnan(state.var), f"{losses} → {state}"


@given(losses=arrays(np.float64, 6, elements=ANY_LOSS))
def test_untouched_losses_are_untouched(losses: np.ndarray) -> None:
    rule = ALRC(start=START)
    decision = rule.decide(losses, rule.init())
    limit = rule.limit(rule.init())
    small = losses <= limit
    small &= np.isfinite(losses)
    assert decision.limited[small].tobytes() == losses[small].tobytes()
    assert np.all(decision.scale[small] == 1)
    large = np.isfinite(losses) & ~small
    assert np.all(decision.limited[large] == limit)
    assert np.all(decision.scale[large] == limit / losses[large])


@pytest.mark.parametrize("observe", [4, 5, 32])
def test_auto_limits_nothing_while_it_observes(observe: int) -> None:
    rule = ALRC(observe=observe)
    state = rule.init()
    for t in range(observe):
        assert rule.limit(state) == INF
        losses = np.array([1.0, 2.0 + t, 1e6 if t % 3 == 2 else 1.5])
        decision = rule.decide(losses, state)
        assert np.all(decision.scale == 1)
        assert decision.limited.tobytes() == losses.tobytes()
        state = rule.update(losses, decision, state)
    assert state.count == observe
    assert rule.limit(state) < INF
    assert rule.decide(np.array([1e9]), state).scale[0] < 1


def test_auto_does_not_count_a_batch_without_a_finite_loss() -> None:
    rule = ALRC(observe=4)
    state = rule.init()
    for losses in ([1.0, 2.0], [NAN, INF]):
        array = np.array(losses)
        state = rule.update(array, rule.decide(array, state), state)
    assert state.count == 1
    assert rule.limit(state) == INF


def scales_of(rule: ALRC, stream: np.ndarray) -> np.ndarray:
    """Return the gradient factors of every loss of a stream."""
    state, scales = rule.init(), []
    for losses in stream:
        decision = rule.decide(losses, state)
        state = rule.update(losses, decision, state)
        scales.append(decision.scale)
    return np.array(scales)


def spiky(steps: int) -> np.ndarray:
    """Make losses of which about a tenth deserve a limit."""
    rng = np.random.default_rng(2)
    return rng.lognormal(0, 0.5, (steps, 3)) * np.where(rng.random((steps, 3)) < 0.1, 30, 1)


@given(factor=st.floats(1e-8, 1e8))
def test_auto_decides_the_same_in_any_unit(factor: float) -> None:
    rule = ALRC(observe=8)
    scales = scales_of(rule, spiky(80))
    assert np.sum(scales < 1) > 10
    np.testing.assert_allclose(scales_of(rule, spiky(80) * factor), scales, rtol=1e-9)


@pytest.mark.parametrize("exponent", [-26, -3, 10, 26])
def test_auto_decides_bit_for_bit_the_same_after_scaling_by_a_power_of_two(exponent: int) -> None:
    rule = ALRC(observe=8)
    scales = scales_of(rule, spiky(80))
    assert scales_of(rule, np.ldexp(spiky(80), exponent)).tobytes() == scales.tobytes()


def test_a_given_start_knows_its_unit() -> None:
    """The twin: the invariance is a property of `auto`, and the comparison sees it missing."""
    rule = ALRC(start=(1.0, 2.0))
    assert np.any(scales_of(rule, spiky(80) * 4) != scales_of(rule, spiky(80)))


@pytest.mark.parametrize("losses", [3.7, np.float64(3.7), np.array(3.7), 5], ids=["float", "float64", "0-d", "int"])
def test_takes_plain_numbers(losses: Any) -> None:
    rule = ALRC(betas=(0.5, 0.5), start=START)
    decision = rule.decide(losses, rule.init())
    assert decision.limited == pytest.approx(1.6)
    assert decision.scale == pytest.approx(1.6 / float(losses))
    assert rule.update(losses, decision, rule.init()).mean == pytest.approx(1.3)


def test_an_empty_batch_changes_nothing() -> None:
    rule = ALRC(start=START)
    decision = rule.decide(np.empty(0), rule.init())
    assert decision.limited.shape == decision.scale.shape == (0,)
    assert rule.update(np.empty(0), decision, rule.init()) == rule.init()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_keeps_the_precision_of_losses_and_state(dtype: Any) -> None:
    rule = ALRC(start=START)
    state = Moments(dtype(1.0), dtype(0.04), 0)
    decision = rule.decide(np.array([0.5, 4.0], dtype), state)
    after = rule.update(np.array([0.5, 4.0], dtype), decision, state)
    assert decision.limited.dtype == decision.scale.dtype == dtype
    assert after.mean.dtype == after.var.dtype == dtype


@given(h=st.floats(1e-6, 1e6), losses=arrays(np.float64, 5, elements=st.floats(-1e9, 1e9)))
def test_huber_is_its_formula(h: float, losses: np.ndarray) -> None:
    decision = Huber(h).decide(losses)
    want = [min(loss, (h * loss) ** 0.5) if loss > h else loss for loss in losses]
    np.testing.assert_allclose(decision.limited, want, rtol=1e-14)
    np.testing.assert_allclose(
        decision.scale, [0.5 * (h / loss) ** 0.5 if loss > h else 1 for loss in losses], rtol=1e-14
    )
    assert decision.limited[losses <= h].tobytes() == losses[losses <= h].tobytes()


def test_huber_does_not_overflow() -> None:
    assert Huber(1e20).decide(np.array([1e300])).limited[0] == pytest.approx(1e160)


def test_huber_gives_what_is_not_finite_the_value_and_the_gradient_zero() -> None:
    decision = Huber().decide(np.array([NAN, INF, -INF, 4.0, 0.5]))
    assert decision.limited.tolist() == [0, 0, 0, 2, 0.5]
    assert decision.scale.tolist() == [0, 0, 0, 0.25, 1]


@pytest.mark.parametrize("h", [0.0, -1.0, NAN, INF])
def test_huber_names_an_invalid_setting(h: float) -> None:
    with pytest.raises(ValueError, match=re.escape(str(h))):
        Huber(h)
    with pytest.raises(ValueError, match=re.escape(str(h))):
        pytest.importorskip("alrc.torch").Huber(h)


@pytest.mark.parametrize("feed", ["limited", "unlimited"])
@pytest.mark.parametrize("second_moment", ["elements", "mean"])
@pytest.mark.parametrize("start", ["auto", (1.0, 1.04)])
@pytest.mark.parametrize("signed", [False, True])
def test_micro_batches_equal_one_batch_whatever_the_settings(
    feed: Any, second_moment: Any, start: Any, signed: bool
) -> None:
    rule = ALRC(observe=4, feed=feed, second_moment=second_moment, start=start, signed=signed, betas=(0.9, 0.95))
    rng, states = np.random.default_rng(0), {parts: rule.init() for parts in (1, 2, 8)}
    for step in range(40):
        losses = rng.normal(1, 0.2, 8) * (30 if step % 7 == 6 else 1)
        for parts, state in states.items():
            batches = [rule.measure(part, rule.decide(part, state), state) for part in np.split(losses, parts)]
            states[parts] = rule.commit(Batch.merged(batches), state)
    for parts in (2, 8):
        for name, want, got in zip(states[1]._fields, states[1], states[parts], strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-12, err_msg=f"{name} of {parts} micro-batches")
