"""Check values, gradients and state of the JAX rule against the slow oracle: masks, micro-batches, checkpoints."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import FrozenInstanceError, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax", reason="needs JAX")
import jax
import jax.numpy as jnp
from jax import lax

from alrc import Moments, rules
from alrc.jax import ALRC, Telemetry
from alrc.ops import NUMPY, Ops
from alrc.reference import alrc_trace
from alrc.rules import Batch, Decision

NAN, INF = np.nan, np.inf
START = (1.0, 1.04)
"""Mean 1, standard deviation 0.2: the limit is 1.6."""
RULES: dict[str, rules.ALRC] = {
    "default": rules.ALRC(observe=8, betas=(0.95, 0.95)),
    "start": rules.ALRC(start=START, betas=(0.9, 0.9)),
    "paper": rules.ALRC.paper(2.0, (0.95, 0.98), 1.5, 4.0),
    "reference": rules.ALRC.reference(2.0, 0.95, 1.5, 4.0),
    "scripts": replace(rules.ALRC.cifar_scripts(), start=(4.0, 18.0)),
    "two-sided": rules.ALRC(2.0, observe=8, signed=True, num_stddev_below=2.0),
    "below": rules.ALRC(observe=8, num_stddev_below=1.0),
    "unlimited mean": rules.ALRC(observe=8, feed="unlimited", second_moment="mean"),
}
QUICK = ("default", "paper", "two-sided")
by_rule = pytest.mark.parametrize(
    "rule",
    [pytest.param(rule, id=name, marks=[pytest.mark.slow] * (name not in QUICK)) for name, rule in RULES.items()],
)
"""Each rule costs a second of compiling; the others wait for the slow tier."""


def spiky(seed: int, *shape: int) -> np.ndarray:
    """Make positive losses around 1 of which about every tenth is far out."""
    rng = np.random.default_rng(seed)
    return (np.exp(rng.normal(0, 0.3, shape)) * np.where(rng.random(shape) < 0.1, 20, 1)).astype(np.float32)


def judge(rule: Any, losses: Any, state: Any, mask: Any = None, weight: Any = None) -> tuple[Any, Any, Any]:
    """Return limited losses, the gradient of their sum by each loss, and the new state."""
    limited, back, after = jax.vjp(lambda losses: rule(losses, state, mask, weight), losses, has_aux=True)
    return limited, back(jnp.ones_like(limited))[0], after


judge_compiled = jax.jit(judge, static_argnums=0)


@partial(jax.jit, static_argnums=0)
def scan(rule: ALRC, state: Any, stream: Any, masks: Any = None, weights: Any = None) -> tuple[Any, Any, Any]:
    """Go through a stream in one scan; return values, gradients and all states."""

    def step(state: Any, given: Any) -> tuple[Any, tuple[Any, Any, Any]]:
        limited, gradient, after = judge(rule, given[0], state, *given[1:])
        return after, (limited, gradient, after)

    return lax.scan(step, state, (stream, masks, weights))[1]


def follow(rule: ALRC, stream: Any, how: str = "scan", dtype: Any = jnp.float32) -> tuple[Any, Any, Any]:
    """Go through a stream eagerly, with a compiled step or in one scan; return values, gradients and all states."""
    state = rule.init(dtype)
    if how == "scan":
        return scan(rule, state, jnp.asarray(stream))
    call, seen = judge if how == "eager" else judge_compiled, []
    for losses in stream:
        seen.append(call(rule, jnp.asarray(losses), state))
        state = seen[-1][2]
    return jax.tree.map(lambda *parts: np.stack(parts), *seen)


def check_stream(rule: ALRC, stream: np.ndarray, how: str = "scan", rtol: float = 5e-6, dtype: Any = "float32") -> None:
    """Compare values, gradients, moments and limits of every step with the oracle."""
    want = alrc_trace(stream, **vars(rule.rule))
    assert sum(int(np.sum(scale < 1)) for scale in want.scale) >= 3, "the stream limits too little to test"
    limited, gradient, states = follow(rule, stream.astype(dtype), how, dtype)
    np.testing.assert_allclose(limited, want.limited, rtol=rtol)
    np.testing.assert_allclose(gradient, want.scale, rtol=rtol)
    np.testing.assert_allclose(states.mu1, want.mu1, rtol=rtol)
    np.testing.assert_allclose(states.mu2, want.mu2, rtol=rtol)
    np.testing.assert_allclose(jax.vmap(rule.limit)(states)[:-1], want.limit[1:], rtol=rtol)
    kept = np.asarray(gradient) == 1
    np.testing.assert_array_equal(np.asarray(limited)[kept], stream[kept])


# -------------------------------------------------------------------------------------------------- against the oracle


@by_rule
def test_follows_the_oracle_in_a_scan(rule: rules.ALRC) -> None:
    check_stream(ALRC.from_rule(rule), spiky(1, 60, 4))


@pytest.mark.parametrize("shape", [(), (2, 3)], ids=str)
def test_follows_the_oracle_in_other_shapes(shape: tuple[int, ...]) -> None:
    check_stream(ALRC.from_rule(RULES["default"]), spiky(1, 60, *shape))


@pytest.mark.parametrize("how", ["eager", "jit"])
def test_follows_the_oracle_step_by_step(how: str) -> None:
    check_stream(ALRC.from_rule(RULES["default"]), spiky(2, 20 if how == "eager" else 60, 4), how)


@by_rule
def test_follows_the_oracle_in_double_precision(rule: rules.ALRC) -> None:
    with jax.enable_x64(True):
        check_stream(ALRC.from_rule(rule), spiky(3, 60, 4), rtol=1e-10, dtype="float64")


def test_poison_leaves_no_trace() -> None:
    stream = spiky(5, 60, 4)
    stream[0, 1], stream[5, 0], stream[40, 2], stream[41, 3] = NAN, INF, -INF, NAN
    stream[3], stream[50] = NAN, [INF, NAN, -INF, INF]
    rule = ALRC.from_rule(RULES["default"])
    check_stream(rule, stream)
    limited, gradient, _ = follow(rule, stream)
    bad = ~np.isfinite(stream)
    assert np.all(np.asarray(gradient)[bad] == 0)
    assert np.all(np.asarray(limited)[bad] == 0)


@pytest.mark.parametrize("rule", [ALRC(observe=4), ALRC.paper(mu1=1.0, mu2=1.04)], ids=repr)
def test_the_largest_number_does_no_harm(rule: ALRC) -> None:
    stream = np.stack([spiky(6, 30), np.ones(30, np.float32)], 1)
    stream[[2, 20], 0] = np.finfo(np.float32).max
    limited, gradient, states = follow(rule, stream)
    assert np.all(np.isfinite(limited))
    assert np.all((np.asarray(gradient) >= 0) & (np.asarray(gradient) <= 1))
    assert all(np.all(np.isfinite(part)) for part in states)


def test_knows_a_small_spread_on_a_large_mean() -> None:
    stream = np.random.default_rng(7).normal(1000, 0.1, (200, 4)).astype(np.float32)
    rule = ALRC(betas=(0.99, 0.99), observe=8)
    _, _, states = follow(rule, stream)
    assert float(states.var[-1]) ** 0.5 == pytest.approx(0.1, rel=0.05)


def test_untouched_losses_keep_every_bit() -> None:
    losses = jnp.array([-0.0, 0.0, -3.0, 1e-30, 0.5, 1.6])
    for rule in (ALRC(), ALRC(start=(1.0, 1.5))):
        limited, gradient, _ = judge_compiled(rule, losses, rule.init())
        assert np.asarray(limited).tobytes() == np.asarray(losses).tobytes()
        np.testing.assert_array_equal(gradient, 1)


@dataclass(frozen=True)
class LimitingDisabled(rules.ALRC):
    """Learn the moments and limit nothing."""

    def decide(self, losses: Any, state: Any, ops: Ops = NUMPY) -> Decision:
        return super().decide(losses, state, ops)._replace(limited=losses, scale=0 * losses + 1)


@dataclass(frozen=True)
class GradientZeroed(rules.ALRC):
    """Select the limit instead of scaling: right values, no gradient where limited."""

    def decide(self, losses: Any, state: Any, ops: Ops = NUMPY) -> Decision:
        decision = super().decide(losses, state, ops)
        return decision._replace(scale=jnp.floor(decision.scale))


@dataclass(frozen=True)
class BiasedDecay(rules.ALRC):
    """Keep a little less of the old mean than the weights say."""

    def commit(self, batch: Batch, state: Any, ops: Ops = NUMPY, when: Any = None) -> Any:
        after = super().commit(batch, state, ops, when)
        return after._replace(mean=after.mean - 0.002 * state.mean)


@pytest.mark.parametrize("mutant", [LimitingDisabled, GradientZeroed, BiasedDecay])
def test_a_wrong_rule_is_seen(mutant: type[rules.ALRC]) -> None:
    with pytest.raises(AssertionError):
        check_stream(ALRC.from_rule(mutant(**vars(RULES["start"]))), spiky(2, 60, 4))


# ------------------------------------------------------------------------------------------------------- precisions


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_half_precision_is_decided_in_full(dtype: Any) -> None:
    """Losses up to 30,000: their squares overflow float16."""
    stream = jnp.asarray(1500 * spiky(8, 60, 4), dtype)
    rule = ALRC.from_rule(RULES["default"])
    limited, gradient, states = follow(rule, stream)
    wide, factor, expected = follow(rule, stream.astype(jnp.float32))
    assert limited.dtype == gradient.dtype == dtype
    assert (factor < 1).sum() > 5
    np.testing.assert_array_equal(limited, wide.astype(dtype))
    np.testing.assert_array_equal(gradient, factor.astype(dtype))
    jax.tree.map(np.testing.assert_array_equal, states, expected)
    assert states.mean.dtype == jnp.float32


def avals(array: Any) -> tuple[Any, ...]:
    """Return all that makes a compiler compile again."""
    return array.shape, array.dtype, array.weak_type


@pytest.mark.parametrize("losses", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("state", ["float32", "float64"])
def test_losses_and_state_keep_their_types(losses: str, state: str) -> None:
    with jax.enable_x64(True):
        for rule in (ALRC(observe=4), ALRC.paper(mu1=1.0, mu2=1.04)):
            before = rule.init(jnp.dtype(state))
            for shape in ((), (4,)):
                given = jax.ShapeDtypeStruct(shape, losses)
                limited, gradient, after = jax.eval_shape(partial(judge, rule), given, before)
                assert limited.dtype == gradient.dtype == losses
                assert jax.tree.map(avals, after) == jax.tree.map(avals, before)
                assert jax.eval_shape(rule.limit, after).dtype == state


def test_a_python_number_is_a_loss() -> None:
    limited, state = ALRC(start=START)(2.0, ALRC(start=START).init())
    assert float(limited) == pytest.approx(1.6)
    assert state.count == 1


def test_a_state_of_less_than_float32_is_refused() -> None:
    rule = ALRC()
    with pytest.raises(ValueError, match="must be float32 or float64 whatever that of the losses, got bfloat16"):
        rule.init(jnp.bfloat16)
    state = jax.tree.map(lambda part: part.astype(jnp.bfloat16), rule.init())
    with pytest.raises(ValueError, match="state must be float32 or float64, got bfloat16; leave it out"):
        rule(jnp.ones(2), state)
    with pytest.raises(ValueError, match="jax_enable_x64"):
        rule.init(jnp.float64)


# ------------------------------------------------------------------------------------------------- masks and weights


@by_rule
def test_padding_is_not_there(rule: rules.ALRC) -> None:
    stream, masks = spiky(10, 40, 4, 3), np.random.default_rng(10).random((40, 4, 3)) < 0.6
    masks[10] = False
    masks[11] = False
    masks[11, 2, 1] = True
    want = alrc_trace([losses[mask] for losses, mask in zip(stream, masks, strict=True)], **vars(rule))
    ours = ALRC.from_rule(rule)
    for fill in (NAN, INF, -INF, -1.0, 0.0, 1e38):
        limited, gradient, states = scan(ours, ours.init(), jnp.where(masks, stream, fill), masks)
        np.testing.assert_allclose(np.asarray(limited)[masks], np.concatenate(want.limited), rtol=5e-6)
        np.testing.assert_allclose(np.asarray(gradient)[masks], np.concatenate(want.scale), rtol=5e-6)
        np.testing.assert_allclose(states.mu2, want.mu2, rtol=5e-6)
        assert not np.any(np.asarray(limited)[~masks])
        assert not np.any(np.asarray(gradient)[~masks])


def test_padding_that_is_learned_from_is_seen() -> None:
    stream, masks = spiky(10, 40, 4), np.random.default_rng(10).random((40, 4)) < 0.6
    rule = RULES["default"]
    want = alrc_trace([losses[mask] for losses, mask in zip(stream, masks, strict=True)], **vars(rule))
    states = follow(ALRC.from_rule(rule), stream * masks)[2]
    assert not np.allclose(states.mu2, want.mu2, rtol=1e-2)


@by_rule
def test_a_whole_weight_repeats_a_loss(rule: rules.ALRC) -> None:
    stream, weights = spiky(11, 40, 6), np.random.default_rng(11).integers(0, 3, (40, 6))
    want = alrc_trace([np.repeat(*one) for one in zip(stream, weights, strict=True)], **vars(rule))
    ours = ALRC.from_rule(rule)
    limited, _, states = scan(ours, ours.init(), stream, None, weights.astype(np.float32))
    repeated = [np.repeat(*one) for one in zip(np.asarray(limited), weights, strict=True)]
    np.testing.assert_allclose(np.concatenate(repeated), np.concatenate(want.limited), rtol=5e-6)
    np.testing.assert_allclose(states.mu2, want.mu2, rtol=5e-6)


def test_an_empty_mask_changes_nothing() -> None:
    for name in ("default", "two-sided"):
        rule = ALRC.from_rule(RULES[name])
        state = trained(rule)
        for losses in (jnp.array([NAN, 1.0, 99.0]), jnp.array(99.0), jnp.zeros(0)):
            limited, gradient, after = judge_compiled(rule, losses, state, jnp.array(False))
            assert not limited.any()
            assert not gradient.any()
            jax.tree.map(np.testing.assert_array_equal, after, state)


def test_masks_and_weights_are_broadcast() -> None:
    losses, rng = jnp.asarray(spiky(13, 4, 6)), np.random.default_rng(13)
    rule = ALRC(start=START)
    for shape in [(6,), (4, 1), ()]:
        mask, weight = jnp.asarray(rng.random(shape) < 0.7), jnp.asarray(rng.random(shape), jnp.bfloat16)
        got = judge_compiled(rule, losses, rule.init(), mask, weight)
        wide = (jnp.broadcast_to(part, (4, 6)) for part in (mask, weight))
        jax.tree.map(np.testing.assert_array_equal, got, judge_compiled(rule, losses, rule.init(), *wide))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"losses": np.ones(3, int)}, TypeError, "losses must be a floating-point array, got int32; average or cast"),
        ({"losses": True}, TypeError, "losses must be a floating-point array, got bool"),
        ({"mask": np.ones(3)}, TypeError, "mask must be a boolean array, got float32; use mask != 0"),
        ({"weight": np.ones(3, bool)}, TypeError, "weight must be a floating-point array, got bool; use weight.astype"),
        ({"mask": np.ones((2, 3), bool)}, ValueError, r"mask of shape \(2, 3\) does not broadcast to .* \(3,\)"),
        ({"weight": np.ones(4)}, ValueError, r"weight of shape \(4,\) does not broadcast to losses of shape \(3,\)"),
        ({"state": (0.0, 0.0, 0)}, TypeError, "state must be the Watched that init.* got a tuple; restore"),
        ({"state": Moments(0.0, 1.0, 0)}, TypeError, "state must be the Watched that init.* got a Moments"),
        ({"state": ALRC(observe=8).init()}, ValueError, r"state.recent has shape \(2, 8\), .* has \(2, 32\)"),
    ],
)
@pytest.mark.parametrize("method", ["apply", "observe", "telemetry"])
def test_what_does_not_fit_is_refused(method: str, given: dict[str, Any], error: type[Exception], message: str) -> None:
    rule, method = ALRC(), "apply" if "weight" in given else method
    arguments = {"losses": jnp.ones(3), "state": rule.init(), **given}
    with pytest.raises(error, match=message):
        getattr(rule, method)(**arguments)


# ------------------------------------------------------------------------------------------------------ micro-batches


def accumulate(rule: ALRC, stream: Any, parts: int, is_stacked: bool = False) -> tuple[Any, Any]:
    """Give each row of a stream as so many micro-batches; return all limited losses and states."""

    def step(state: Any, row: Any) -> Any:
        if is_stacked:
            micro = row.reshape(parts, -1)
            _, (limited, seen) = lax.scan(lambda _, part: (None, rule.observe(part, state)), None, micro)
        else:
            each = [rule.observe(part, state) for part in jnp.array_split(row, parts)]
            limited, seen = jnp.concatenate([one[0] for one in each]), [one[1] for one in each]
        after = rule.commit(seen, state)
        return after, (limited.ravel(), after)

    return lax.scan(step, rule.init(), jnp.asarray(stream))[1]


stack = partial(accumulate, is_stacked=True)


def check_parts(rule: ALRC, parts: int, accumulate: Callable[..., Any]) -> None:
    """Compare a stream in micro-batches with the oracle on whole batches."""
    stream = spiky(20, 60, 8)
    stream[30, 2], stream[40] = NAN, INF
    want = alrc_trace(stream, **vars(rule.rule))
    limited, states = accumulate(rule, stream, parts)
    np.testing.assert_allclose(limited, want.limited, rtol=5e-6)
    np.testing.assert_allclose(states.mu1, want.mu1, rtol=5e-6)
    np.testing.assert_allclose(states.mu2, want.mu2, rtol=5e-6)
    assert int(states.count[-1]) <= 59


@pytest.mark.parametrize("parts", range(1, 9))
def test_listed_micro_batches_equal_one_batch(parts: int) -> None:
    # What an auto start adds is compiled for a long time, and asked for 1 to 8 parts by the conformance kit.
    check_parts(ALRC.from_rule(RULES["default" if parts in (3, 8) else "start"]), parts, accumulate)


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_stacked_micro_batches_equal_one_batch(parts: int) -> None:
    check_parts(ALRC.from_rule(RULES["default" if parts in (4, 8) else "start"]), parts, stack)


@by_rule
def test_micro_batches_of_every_rule_equal_one_batch(rule: rules.ALRC) -> None:
    check_parts(ALRC.from_rule(rule), 2, stack)


def test_micro_batches_committed_one_by_one_are_seen() -> None:
    def wrong(rule: ALRC, stream: Any, parts: int) -> Any:
        def step(state: Any, row: Any) -> Any:
            after, all_limited = state, []
            for part in jnp.split(row, parts):
                limited, after = rule(part, after)
                all_limited.append(limited)
            return after, (jnp.concatenate(all_limited), after)

        return lax.scan(step, rule.init(), jnp.asarray(stream))[1]

    rule = ALRC.from_rule(RULES["start"])
    check_parts(rule, 1, wrong)
    with pytest.raises(AssertionError):
        check_parts(rule, 2, wrong)


def test_stacks_of_stacks_are_one_update() -> None:
    rule = ALRC(start=START)
    losses = jnp.asarray(spiky(21, 2, 3, 4))
    _, seen = jax.vmap(jax.vmap(lambda part: rule.observe(part, rule.init())))(losses)
    got, want = rule.commit(seen, rule.init()), rule(losses, rule.init())[1]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), got, want)


def test_a_skipped_update_leaves_the_state() -> None:
    for rule in (ALRC(observe=4), ALRC(start=START)):
        _, batch = rule.observe(jnp.array([1.0, 30.0]), rule.init())
        commit = jax.jit(lambda when, rule=rule, batch=batch: rule.commit(batch, rule.init(), when))
        jax.tree.map(np.testing.assert_array_equal, commit(jnp.array(False)), rule.init())
        jax.tree.map(np.testing.assert_array_equal, commit(jnp.array(True)), rule.commit(batch, rule.init()))
        assert commit(jnp.array(True)).count == 1


def test_nothing_to_commit_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one batch, got an empty sequence"):
        ALRC().commit([], ALRC().init())


# ---------------------------------------------------------------------------------------------------------- telemetry


@pytest.mark.parametrize("rule", [ALRC(start=START), ALRC()], ids=["limiting", "observing"])
def test_telemetry_tells_what_happens(rule: ALRC) -> None:
    losses = jnp.array([0.5, 2.0, NAN, INF, -1.0, 4.0, 50.0])
    mask = jnp.array([True] * 6 + [False])
    told = jax.jit(rule.telemetry)(losses, rule.init(), mask)
    _, gradient, _ = judge(rule, losses, rule.init(), mask)
    is_limiting = rule.rule.start == START
    assert isinstance(told, Telemetry)
    np.testing.assert_array_equal(told.scale, gradient)
    assert told.limit == (np.float32(1.6) if is_limiting else INF)
    assert told.limit == rule.limit(rule.init())
    assert told.fraction_limited == (0.5 if is_limiting else 0.0)
    assert (told.nonfinite, told.nonpositive, told.largest) == (2, 1, 4.0)


@pytest.mark.parametrize(
    "losses", [np.zeros(0, np.float32), np.array(NAN, np.float32), np.full((2, 2), INF, np.float32)]
)
def test_telemetry_of_nothing(losses: np.ndarray) -> None:
    told = ALRC(start=START).telemetry(losses, ALRC(start=START).init())
    assert (told.fraction_limited, told.nonfinite, told.nonpositive, told.largest) == (0, losses.size, 0, -INF)
    assert told.scale.shape == losses.shape


def test_telemetry_has_the_fields_of_torch() -> None:
    torch_side = pytest.importorskip("alrc.torch", reason="compares with the torch side")
    assert Telemetry._fields == torch_side.Telemetry._fields


# ------------------------------------------------------------------------------------------------- the rule as a value


def test_arguments_are_those_of_the_pure_rule() -> None:
    ours, pure = (list(inspect.signature(kind).parameters.values()) for kind in (ALRC, rules.ALRC))
    assert [(p.name, p.default) for p in ours] == [*((p.name, p.default) for p in pure), ("axis_name", None)]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[1:])
    for preset in ("paper", "reference", "cifar_scripts"):
        ours, pure = (inspect.signature(getattr(kind, preset)).parameters for kind in (ALRC, rules.ALRC))
        assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in pure.values()]
        assert getattr(ALRC, preset)().rule == getattr(rules.ALRC, preset)()


def test_a_rule_is_a_value() -> None:
    rule = ALRC(2.0, betas=[0.9, 0.95], start=[1.0, 2.0], axis_name=["data", "model"])
    twin = ALRC(2.0, betas=(0.9, 0.95), start=(1.0, 2.0), axis_name=("data", "model"))
    assert rule == twin
    assert hash(rule) == hash(twin)
    assert rule != ALRC(2.0, betas=(0.9, 0.95), start=(1.0, 2.0))
    assert rule != ALRC(2.5, betas=(0.9, 0.95), start=(1.0, 2.0), axis_name=("data", "model"))
    assert ALRC.from_rule(rule.rule, rule.axis_name) == rule
    for other in (copy.copy(rule), copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
        assert other == rule
    with pytest.raises(FrozenInstanceError):
        rule.axis_name = None  # type: ignore[misc]
    assert repr(rule) == ("ALRC(num_stddev=2.0, betas=(0.9, 0.95), start=(1.0, 2.0), axis_name=('data', 'model'))")
    assert repr(ALRC()) == "ALRC()"


def test_a_wrong_setting_is_named() -> None:
    with pytest.raises(ValueError, match="observe must be a whole number of updates from 4 to 256, got 3"):
        ALRC(observe=3)


# ------------------------------------------------------------------------------------------------------- stored states


def trained(rule: ALRC, dtype: Any = jnp.float32) -> Any:
    """Return a state that has learned something."""
    return jax.tree.map(lambda part: part[-1], follow(rule, spiky(30, 60, 4).astype(dtype), dtype=dtype)[2])


def check_resumed(rule: ALRC, state: Any, restored: Any) -> None:
    """Go on from both states with a spike first, and compare every bit."""
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert jax.tree.map(avals, restored) == jax.tree.map(avals, state)
    stream = spiky(31, 60, 4).astype(state.mean.dtype)
    stream[0] = 100.0
    want, got = scan(rule, state, stream), scan(rule, restored, stream)
    assert np.all(want[1][0] < 0.1), "the spike is not limited"
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("name", ["default", "paper"])
@pytest.mark.parametrize("is_double", [False, True], ids=["float32", "float64"])
def test_a_state_dictionary_holds_the_state(name: str, is_double: bool) -> None:
    with jax.enable_x64(True) if is_double else nullcontext():
        dtype = jnp.float64 if is_double else jnp.float32
        rule = ALRC.from_rule(RULES[name])
        state = trained(rule, dtype)
        stored = rule.state_dict(state)
        assert {type(value) for value in stored.values()} == {np.ndarray}
        assert stored["version"] == (2 if rule.rule.is_auto else 1)
        assert stored["mean"].dtype == dtype
        check_resumed(rule, state, rule.load_state_dict(stored, dtype))


def test_a_wrong_state_dictionary_is_refused() -> None:
    with pytest.raises(ValueError, match="has version 1, but this ALRC reads version 2"):
        ALRC().load_state_dict(ALRC.paper().state_dict(ALRC.paper().init()))
    with pytest.raises(TypeError, match="state must be the Watched"):
        ALRC().state_dict(ALRC.paper().init())


@pytest.mark.parametrize("name", ["default", "paper"])
def test_orbax_keeps_the_state_as_a_plain_pytree(name: str, tmp_path: Path) -> None:
    checkpoint = pytest.importorskip("orbax.checkpoint", reason="needs orbax")
    rule = ALRC.from_rule(RULES[name])
    state = trained(rule)
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", {"alrc": state, "step": jnp.array(50)})
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "step", {"alrc": rule.init(), "step": jnp.array(0)})
    check_resumed(rule, state, restored["alrc"])
    with pytest.raises(AssertionError):
        check_resumed(rule, state, rule.init())


def test_numpy_states_and_copies_go_on_too() -> None:
    rule = ALRC.from_rule(RULES["default"])
    state = trained(rule)
    for other in (jax.device_get(state), copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        check_resumed(rule, state, jax.tree.map(jnp.asarray, other))
    losses = jnp.asarray(spiky(32, 4))
    want, got = (judge_compiled(rule, losses, one) for one in (state, jax.device_get(state)))
    jax.tree.map(np.testing.assert_array_equal, got, want)
