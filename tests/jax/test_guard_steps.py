"""Check that a skipped update leaves no trace, against the pure rule and against runs without the bad steps."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax", reason="needs JAX")
pytest.importorskip("optax", reason="needs optax")
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from alrc.jax.guard import GuardState, TooManySkips, guard_steps, raise_if_too_many_skips
from alrc.jax.transforms import clip_by, scale_by_alrc
from alrc.rules import SkipStep, ZClip

NAN, INF = np.nan, np.inf
tree_get = optax.tree_utils.tree_get
WEIGHTS = {"a": np.array([[1.0, -0.0, 2.0]], np.float32), "b": np.float32(-0.0)}
DIRECTION = {"a": np.full((1, 3), 0.5, np.float32), "b": np.float32(0.5)}
"""A gradient of norm 1."""


@cache
def follower(optimizer: Any, has_value: bool = True) -> Callable[..., Any]:
    """Compile a scan that gives gradients of the given norms, with a loss each."""

    def step(carry: Any, seen: Any) -> tuple[Any, Any]:
        weights, state = carry
        norm, loss = seen
        gradients = jax.tree.map(lambda x: x * norm, DIRECTION)
        extra = {"value": loss} if has_value else {}
        updates, state = optimizer.update(gradients, state, weights, **extra)
        return (optax.apply_updates(weights, updates), state), (norm, updates)

    return jax.jit(lambda carry, stream: lax.scan(step, carry, stream))


def run(optimizer: Any, norms: Any, losses: Any = None, carry: Any = None) -> tuple[Any, Any]:
    """Return weights and state after gradients of these norms."""
    stream = (
        jnp.asarray(norms, jnp.float32),
        jnp.asarray(np.ones(len(norms)) if losses is None else losses, jnp.float32),
    )
    start = jax.tree.map(jnp.asarray, WEIGHTS)
    return follower(optimizer)((start, optimizer.init(start)) if carry is None else carry, stream)[0]


def same(one: Any, other: Any) -> bool:
    """Compare two pytrees bit for bit: -0.0 is not 0.0."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def calm(number: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(1.0, 0.1, number)


ADAM = optax.adam(1e-2)
GUARDED = guard_steps(ADAM)
JUDGED = guard_steps(ADAM, SkipStep())

# ----------------------------------------------------------------------------------------------- a step that never was


def leaves_no_trace(optimizer: Any, bad: float, place: int) -> bool:
    """Tell whether weights and inner state, at every place, are those of a run without the bad step."""
    norms = calm(100)
    with_it, without = (np.insert(norms, place, bad), norms)
    weights, state = run(optimizer, with_it)
    wanted, clean = run(optimizer, without)
    return same(weights, wanted) and same(state.inner_state, clean.inner_state)


@pytest.mark.parametrize("place", [0, 5, 90])
@pytest.mark.parametrize("bad", [NAN, INF, -INF, 1e30])
def test_a_skipped_step_leaves_no_trace(bad: float, place: int) -> None:
    assert leaves_no_trace(GUARDED, bad, place)
    assert leaves_no_trace(JUDGED, bad, place)


@pytest.mark.parametrize("optimizer", [optax.apply_if_finite(ADAM, 0), optax.chain(optax.zero_nans(), ADAM)])
def test_the_comparison_can_fail(optimizer: Any) -> None:
    norms = calm(100)
    one, two = run(optimizer, np.insert(norms, 5, NAN)), run(optimizer, norms)
    assert not same(one[0], two[0])
    assert not same(tree_get(one[1], "nu"), tree_get(two[1], "nu"))


def test_not_even_the_sign_of_zero_changes() -> None:
    weights, _ = run(GUARDED, [NAN])
    assert same(weights, WEIGHTS)
    assert not same(weights, jax.tree.map(lambda x: x + 0.0, WEIGHTS))


@pytest.mark.parametrize("bad", [NAN, INF, 1e20])
@pytest.mark.parametrize("place", [0, 30, 150])
def test_after_a_bad_step_good_ones_are_made_and_spikes_are_caught(bad: float, place: int) -> None:
    norms = np.insert(calm(300), place, bad)
    norms[-1] *= 100
    weights, state = run(JUDGED, norms[:-1], norms[:-1])
    assert int(state.total_skipped) == 1
    assert tree_get(state, "count", filtering=lambda path, _: "Adam" in str(path)) == 299
    after = run(JUDGED, norms[-1:], norms[-1:], carry=(weights, state))
    assert bool(after[1].is_skipped)
    assert same(after[0], weights)
    assert same(after[1].inner_state, state.inner_state)


def test_alrc_inside_learns_nothing_from_a_skipped_step() -> None:
    optimizer = guard_steps(optax.chain(scale_by_alrc(observe=8), clip_by(ZClip(warmup=4)), optax.adam(1e-3)))
    norms, losses = calm(40), calm(40, 1)
    # A finite loss, which ALRC would learn, with gradients that are not.
    bad = run(optimizer, np.insert(norms, 20, NAN), np.insert(losses, 20, 1.3))
    good = run(optimizer, norms, losses)
    assert same(bad[0], good[0])
    assert same(bad[1].inner_state, good[1].inner_state)
    assert tree_get(bad[1], "moments").count == 40
    outside = optax.chain(scale_by_alrc(observe=8), guard_steps(optax.adam(1e-3)))
    _, state = run(outside, np.insert(norms, 20, NAN), np.insert(losses, 20, 1.3))
    assert tree_get(state, "moments").count == 41


# ------------------------------------------------------------------------------------------------ against the pure rule


def spiky(number: int, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    values = np.exp(rng.normal(0, 0.2, number)) * np.where(rng.random(number) < 0.03, 30, 1)
    values[rng.integers(0, number, 4)] = [NAN, INF, 1e20, 1e16]
    values[150:] *= 5  # a shift, which is to be accepted
    return values.astype(np.float32)


@pytest.mark.parametrize("has_loss", [True, False])
def test_verdicts_are_those_of_the_rule(has_loss: bool) -> None:
    rule = SkipStep(4.0, window=32, min_history=16)
    norms, losses = spiky(300, 0), spiky(300, 1)
    optimizer = guard_steps(optax.sgd(0.0), rule)
    update = jax.jit(optimizer.update)
    state, memory = optimizer.init(jnp.zeros(())), rule.init()
    verdicts, wanted = list[bool](), list[bool]()
    for norm, loss in zip(norms, losses, strict=True):
        _, state = update(norm, state, **({"value": loss} if has_loss else {}))
        verdicts.append(bool(state.is_skipped))
        with np.errstate(all="ignore"):
            seen = (np.float64(loss) if has_loss else None, np.float64(norm))
            verdict = rule.decide(seen, memory)
            memory = rule.update(seen, verdict, memory)
        wanted.append(bool(verdict.is_skipped))
        assert int(state.step) == len(verdicts)
    assert verdicts == wanted
    assert 15 < sum(wanted) < 100
    assert int(state.total_skipped) == sum(wanted)
    np.testing.assert_allclose(state.history.values, memory.values, rtol=1e-4)
    np.testing.assert_array_equal(state.history.is_trusted, memory.is_trusted)
    assert int(state.history.count) == int(memory.count)


# ----------------------------------------------------------------------------------------------------------- the budget


def test_a_spent_budget_lets_nothing_through_and_raises_outside() -> None:
    optimizer = guard_steps(ADAM, max_consecutive_skips=3)
    losses = [1.0, 1.0, 7.5, NAN, 2.0, 2.0, 2.0, 2.0]
    weights, state = run(optimizer, [1, 1, NAN, INF, NAN], losses[:5])
    good, _ = run(optimizer, [1, 1])
    with pytest.raises(TooManySkips) as caught:
        raise_if_too_many_skips(state)
    assert [entry[0] for entry in caught.value.skipped] == [2, 3, 4]
    np.testing.assert_array_equal([entry.loss for entry in caught.value.skipped], losses[2:5])
    np.testing.assert_array_equal([entry.norm for entry in caught.value.skipped], [NAN, INF, NAN])
    message = str(caught.value)
    assert message.startswith("3 updates in a row were skipped, steps 2 to 4;")
    assert "Gradient norms: nan, inf, nan." in message
    assert "Losses: 7.5, nan, 2." in message
    assert "raise max_consecutive_skips" in message
    weights, state = run(optimizer, [NAN] * 50, carry=(weights, state))
    assert same(weights, good)
    assert int(state.consecutive) == 53
    # A budget that was once spent stays so, and so does its evidence.
    weights, state = run(optimizer, [1, NAN, 1], carry=(weights, state))
    with pytest.raises(TooManySkips, match="steps 2 to 4"):
        raise_if_too_many_skips(state)
    zero = jnp.zeros((), jnp.int32)
    state = optax.tree_utils.tree_set(state, consecutive=zero, longest=zero)
    raise_if_too_many_skips(state)
    _, state = run(optimizer, [NAN] * 3, carry=(weights, state))
    with pytest.raises(TooManySkips, match="steps 58 to 60"):
        raise_if_too_many_skips(state)


def test_skips_with_good_steps_between_spend_nothing() -> None:
    _, state = run(guard_steps(ADAM, max_consecutive_skips=3), [NAN, NAN, 1] * 5)
    raise_if_too_many_skips(state)
    assert (int(state.total_skipped), int(state.longest), int(state.consecutive)) == (10, 2, 0)


def test_without_a_budget_it_never_raises() -> None:
    _, state = run(guard_steps(ADAM, max_consecutive_skips=None), [NAN] * 30)
    raise_if_too_many_skips(state)
    assert int(state.longest) == 30


def test_a_guard_is_found_wherever_it_is() -> None:
    inner = guard_steps(optax.sgd(0.1), max_consecutive_skips=2)
    for optimizer in (
        optax.chain(clip_by(ZClip()), inner),
        guard_steps(optax.chain(inner), max_consecutive_skips=None),
    ):
        state = optimizer.init(jnp.ones(2))
        update = jax.jit(optimizer.update)
        for _ in range(2):
            _, state = update(jnp.array([1.0, NAN]), state)
        if not isinstance(state, GuardState):  # the outer guard keeps NaN from the inner
            with pytest.raises(TooManySkips):
                raise_if_too_many_skips(state)
        else:
            raise_if_too_many_skips(state)
    with pytest.raises(ValueError, match=r"no GuardState in this state.*guard_steps"):
        raise_if_too_many_skips(ADAM.init(jnp.ones(2)))


def test_apply_if_finite_alone_gives_up() -> None:
    weights, _ = run(optax.apply_if_finite(ADAM, 3), [1.0] + [NAN] * 4)
    assert not np.isfinite(weights["b"])
    weights, state = run(guard_steps(optax.apply_if_finite(ADAM, 3)), [1.0] + [NAN] * 50)
    assert np.isfinite(weights["b"])
    with pytest.raises(TooManySkips):
        raise_if_too_many_skips(state)
    # The other way round it counts as well, and guards as long as the guard inside does.
    weights, _ = run(optax.apply_if_finite(guard_steps(ADAM), 3), [1.0] + [NAN] * 50)
    assert same(weights, run(GUARDED, [1.0])[0])


@pytest.mark.parametrize("budget", [0, -1, 2.5])
def test_a_wrong_budget_is_refused(budget: Any) -> None:
    with pytest.raises(ValueError, match=f"whole number ≥ 1, or None, got {budget}"):
        guard_steps(ADAM, max_consecutive_skips=budget)


def test_losses_that_are_no_scalar_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scalar loss, got shape \(3,\)"):
        JUDGED.update(WEIGHTS, JUDGED.init(WEIGHTS), WEIGHTS, value=jnp.ones(3))


# --------------------------------------------------------------------------------------------------------- MultiSteps


def multi_steps(inner: Any, number: int) -> Any:
    """Return MultiSteps as a transformation that hands extra arguments on, which its own method does not make."""
    steps = optax.MultiSteps(inner, number)
    return optax.GradientTransformationExtraArgs(steps.init, steps.update)


def test_around_multi_steps_a_bad_micro_batch_is_one_that_never_was() -> None:
    optimizer = guard_steps(multi_steps(optax.sgd(0.1), 2))
    weights, state = run(optimizer, [1, NAN, 3, 5, 7])
    wanted, clean = run(optimizer, [1, 3, 5, 7])
    assert same(weights, wanted)
    assert same(state.inner_state, clean.inner_state)


def test_inside_multi_steps_a_nan_stays_in_the_accumulator_for_good() -> None:
    weights, state = run(multi_steps(guard_steps(optax.sgd(0.1)), 2), [1, NAN] + [1] * 10)
    assert np.isnan(tree_get(state, "acc_grads")["b"])
    assert tree_get(state, "total_skipped") == 6  # every update since
    np.testing.assert_array_equal(weights["a"], WEIGHTS["a"])


# ----------------------------------------------------------------------------------------- transformations of JAX


@pytest.mark.parametrize("optimizer", [GUARDED, JUDGED, guard_steps(optax.chain(scale_by_alrc(), ADAM), SkipStep())])
def test_it_is_compiled_once_and_its_state_keeps_its_types(optimizer: Any) -> None:
    traces = []
    weights = jax.tree.map(jnp.asarray, WEIGHTS)

    @jax.jit
    def step(state: Any, norm: Any) -> Any:
        traces.append(1)
        gradients = jax.tree.map(lambda x: x * norm, DIRECTION)
        return optimizer.update(gradients, state, weights, value=norm)[1]

    state = optimizer.init(weights)
    avals = jax.tree.map(jax.typeof, state)
    for norm in jnp.asarray([1.0, NAN, 2.0]):
        state = step(state, norm)
        assert jax.tree.map(jax.typeof, state) == avals
    assert len(traces) == 1
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))


def test_several_runs_in_one_vmap_equal_each_alone() -> None:
    norms = np.stack([np.insert(calm(30, seed), 3 + 5 * seed, NAN) for seed in range(3)]).astype(np.float32)
    start = jax.tree.map(jnp.asarray, WEIGHTS)
    optimizer = guard_steps(ADAM, SkipStep(window=32, min_history=16), max_consecutive_skips=1)
    carry = (start, optimizer.init(start))
    weights, state = jax.vmap(lambda norms: follower(optimizer)(carry, (norms, norms))[0])(norms)
    for index in range(3):
        wanted, alone = run(optimizer, norms[index], norms[index])
        for x, y in zip(jax.tree.leaves((weights, state)), jax.tree.leaves((wanted, alone)), strict=True):
            np.testing.assert_allclose(x[index], y, rtol=1e-5, atol=1e-6)
    with pytest.raises(TooManySkips, match="steps 3 to 3"):
        raise_if_too_many_skips(state)


@pytest.mark.parametrize("way", ["shard_map", "pmap"])
def test_devices_that_see_different_losses_decide_alike(way: str) -> None:
    number = min(4, len(jax.devices()))
    if number < 2:
        pytest.skip("needs several devices: XLA_FLAGS=--xla_force_host_platform_device_count=4")
    losses = np.random.default_rng(0).normal(2.0, 0.1, (60, number)).astype(np.float32)
    losses[50, 0] = 200.0
    losses[55, 1] = NAN
    norms = np.ones(60, np.float32)
    rule = SkipStep(window=32, min_history=32)

    def member(losses: Any, optimizer: Any) -> Any:
        start = jax.tree.map(jnp.asarray, WEIGHTS)
        weights, state = follower(optimizer)((start, optimizer.init(start)), (norms, losses.reshape(-1)))[0]
        return weights, state.total_skipped, state.evidence

    def follow(optimizer: Any) -> Any:
        if way == "pmap":
            found = jax.pmap(
                lambda x: member(x, optimizer), axis_name="data", in_axes=1, devices=jax.devices()[:number]
            )
            return found(losses)
        mesh = Mesh(np.array(jax.devices()[:number]), ("data",))
        whole, parts = PartitionSpec(), PartitionSpec(None, "data")
        spread = jax.shard_map(lambda x: member(x, optimizer), mesh=mesh, in_specs=parts, out_specs=whole)
        return jax.tree.map(lambda x: x[None], jax.jit(spread)(losses))

    weights, skipped, _ = follow(guard_steps(ADAM, rule, axis_name="data"))
    np.testing.assert_array_equal(skipped, 2)
    wanted, _ = run(ADAM, norms[:-2])
    np.testing.assert_allclose(weights["b"], np.broadcast_to(wanted["b"], weights["b"].shape), rtol=1e-5)
    if way == "pmap":
        assert len(set(np.asarray(follow(guard_steps(ADAM, rule))[1]).tolist())) > 1


def test_typed_random_keys_in_a_state_are_kept() -> None:
    def init(params: Any) -> Any:
        return {"key": jax.random.key(0), "counts": jnp.zeros((), jnp.int8)}

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return updates, {"key": jax.random.split(state["key"])[0], "counts": state["counts"] + 1}

    optimizer = guard_steps(optax.GradientTransformation(init, update))
    state = optimizer.init(jnp.ones(2))
    _, bad = jax.jit(optimizer.update)(jnp.array([1.0, NAN]), state)
    _, good = jax.jit(optimizer.update)(jnp.ones(2), state)
    keys = [jax.random.key_data(held.inner_state["key"]).tolist() for held in (state, bad, good)]
    assert keys[0] == keys[1] != keys[2]
    assert good.inner_state["counts"].dtype == jnp.int8


def test_the_state_is_plain_data_for_pickle_and_orbax(tmp_path: Any) -> None:
    _, state = run(JUDGED, np.insert(calm(40), 7, NAN))
    assert same(pickle.loads(pickle.dumps(state)), state)
    checkpoint = pytest.importorskip("orbax.checkpoint", reason="needs orbax")
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.tree.map(jnp.zeros_like, state))
    assert isinstance(restored, GuardState)
    assert same(restored, state)


def test_the_telemetry_is_found_by_name() -> None:
    _, state = run(optax.chain(optax.clip(10.0), guard_steps(ADAM)), [1.0, 2.0, NAN])
    found: Sequence[Any] = [tree_get(state, name) for name in ("is_skipped", "consecutive", "total_skipped", "step")]
    assert [int(x) for x in found] == [1, 1, 1, 3]
    assert np.isnan(tree_get(state, "gradient_norm"))
