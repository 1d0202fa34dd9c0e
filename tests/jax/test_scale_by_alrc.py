"""Check that scaling updates by the loss equals limiting the loss, and that it composes with what optax has."""

from __future__ import annotations

import pickle
from collections.abc import Callable
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

from alrc import rules
from alrc.jax import ALRC
from alrc.jax.transforms import ScaleByALRCState, scale_by_alrc
from alrc.reference import alrc_trace

tree_get = optax.tree_utils.tree_get
START = (1.0, 1.04)
"""Mean 1, standard deviation 0.2: the limit is 1.6."""
RULES = {
    "default": rules.ALRC(observe=8, betas=(0.95, 0.95)),
    "paper": rules.ALRC.paper(2.0, (0.95, 0.98), 1.5, 4.0),
    "reference": rules.ALRC.reference(2.0, 0.95, 1.5, 4.0),
    "two-sided": rules.ALRC(2.0, observe=8, signed=True, num_stddev_below=2.0),
}


def spiky(number: int, seed: int = 0, nan: bool = True) -> np.ndarray:
    """Make positive losses around 1; about every tenth is far out, some are not finite."""
    rng = np.random.default_rng(seed)
    losses = np.exp(rng.normal(0, 0.3, number)) * np.where(rng.random(number) < 0.1, 20, 1)
    if nan:
        losses[[3, number // 2]] = np.nan
        losses[number // 3] = np.inf
    return losses.astype(np.float32)


def same(one: Any, other: Any) -> bool:
    """Compare two pytrees bit for bit."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


# ---------------------------------------------------------------------------------------- the same as limiting the loss


def loss_function(weights: Any, features: Any, size: Any) -> Any:
    """Return a scalar loss of about the given size, with gradients for leaves of several shapes."""
    hidden = jnp.tanh(features @ weights["matrix"] + weights["bias"])
    return size * (1 + jnp.mean((hidden * weights["scale"]) ** 2))


def compare_with_the_loss_form(make: Callable[[rules.ALRC], Any], rule: rules.ALRC, number: int = 300) -> None:
    """Step both forms along one path, each compiled by itself, and compare updates, decisions and moments."""
    limit, transform = ALRC.from_rule(rule), make(rule)

    def limited_loss(weights: Any, features: Any, size: Any, state: Any) -> tuple[Any, Any]:
        return limit(loss_function(weights, features, size), state)

    @jax.jit
    def by_loss(weights: Any, state: Any, features: Any, size: Any) -> tuple[Any, Any, Any]:
        gradients, after = jax.grad(limited_loss, has_aux=True)(weights, features, size, state)
        return gradients, after, limit.telemetry(loss_function(weights, features, size), state)

    @jax.jit
    def by_update(weights: Any, state: Any, features: Any, size: Any) -> tuple[Any, Any]:
        value, gradients = jax.value_and_grad(loss_function)(weights, features, size)
        return transform.update(gradients, state, weights, value=value)

    rng = np.random.default_rng(1)
    weights = {"matrix": rng.normal(size=(6, 4)), "bias": np.zeros(4), "scale": np.ones(())}
    weights = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), weights)
    one, two = limit.init(), transform.init(weights)
    limited = 0
    for size in spiky(number):
        features = jnp.asarray(rng.normal(size=(5, 6)), jnp.float32)
        wanted, one, told = by_loss(weights, one, features, size)
        updates, two = by_update(weights, two, features, size)
        assert same(one, two.moments), "the moments differ"
        assert same(two.limit, told.limit)
        assert same(two.scale, told.scale)
        if np.isfinite(size):
            for name, update in updates.items():
                few = 8 * np.finfo(np.float32).eps * np.max(np.abs(wanted[name]))  # sums of either sign
                np.testing.assert_allclose(update, wanted[name], rtol=1e-6, atol=few)
            limited += int(two.scale < 1)
            weights = jax.tree.map(lambda weight, gradient: weight - 1e-3 * gradient, weights, wanted)
        else:
            assert float(two.scale) == 0
            assert not any(np.any(update) for update in jax.tree.leaves(updates))
    assert limited > 5, "nothing was limited"


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_it_equals_the_gradient_of_the_limited_loss(rule: rules.ALRC) -> None:
    compare_with_the_loss_form(lambda rule: scale_by_alrc(rule=rule), rule)


def _wrong(how: str, rule: rules.ALRC) -> Any:
    """Make a transformation with one known mistake."""
    true = scale_by_alrc(rule=rule)

    def update(updates: Any, state: Any, params: Any = None, *, value: Any, **extra: Any) -> tuple[Any, Any]:
        scaled, after = true.update(updates, state, params, value=value)
        if how == "disabled":
            scaled = updates
        if how == "zeroed":
            scaled = jax.tree.map(lambda x: x * (after.scale == 1), updates)
        if how == "decides after learning":
            again, _ = true.update(updates, after, params, value=value)
            return again, after
        if how == "learns from the limited twice":
            _, after = true.update(updates, after, params, value=jnp.minimum(value, after.limit))
        if how == "multiplies only":
            scaled = jax.tree.map(lambda x: x * after.scale, updates)
        return scaled, after

    return optax.GradientTransformationExtraArgs(true.init, update)


@pytest.mark.parametrize(
    "how",
    ["disabled", "zeroed", "decides after learning", "learns from the limited twice", "multiplies only"],
)
def test_the_comparison_can_fail(how: str) -> None:
    with pytest.raises(AssertionError):
        compare_with_the_loss_form(lambda rule: _wrong(how, rule), RULES["reference"], number=60)


def test_settings_and_rule_mean_the_same() -> None:
    stream = jnp.asarray(spiky(60))
    settings: dict[str, Any] = {"observe": 8, "betas": (0.9, 0.95), "num_stddev_below": 2.0, "signed": True}
    one = trace(scale_by_alrc(2.5, **settings), stream)
    assert same(one, trace(scale_by_alrc(rule=rules.ALRC(2.5, **settings)), stream))
    assert not same(one, trace(scale_by_alrc(2.5), stream))


@cache
def follower(transform: Any) -> Callable[[Any, Any], Any]:
    """Compile a scan over losses that have a gradient of 1."""
    one = jnp.ones(())

    def step(state: Any, loss: Any) -> tuple[Any, Any]:
        update, state = transform.update(one, state, one, value=loss)
        return state, (update, tree_get(state, "limit"))

    return jax.jit(lambda state, stream: lax.scan(step, state, stream))


def trace(transform: Any, stream: Any) -> tuple[Any, Any]:
    """Give losses in one scan; return the last state, and scales and limits of all steps."""
    return follower(transform)(transform.init(jnp.ones(())), stream)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_it_follows_the_slow_reference(rule: rules.ALRC) -> None:
    losses = spiky(200)
    state, (scales, limits) = trace(scale_by_alrc(rule=rule), jnp.asarray(losses))
    wanted = alrc_trace(losses, **vars(rule))
    np.testing.assert_allclose(limits, wanted.limit, rtol=1e-4)
    np.testing.assert_allclose(scales, np.array(wanted.scale), rtol=1e-4)
    np.testing.assert_allclose(state.moments.mu1, wanted.mu1[-1], rtol=1e-4)
    assert 0.02 < np.mean(np.asarray(scales) < 1) < 0.5


# ------------------------------------------------------------------------------------------------- what is not finite


def started(**settings: Any) -> Any:
    return scale_by_alrc(start=START, **settings)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_updates_of_a_loss_that_is_not_finite_are_zero(value: float) -> None:
    transform, weights = started(), {"a": jnp.ones(3), "b": jnp.ones((2, 2), jnp.bfloat16)}
    state = transform.init(weights)
    gradients = jax.tree.map(lambda x: (x * jnp.nan).at[0].set(jnp.inf), weights)
    updates, after = jax.jit(transform.update)(gradients, state, value=value)
    assert same(updates, jax.tree.map(jnp.zeros_like, weights))
    assert same(after.moments, state.moments)
    assert float(after.scale) == 0


def test_what_is_wrong_with_the_updates_alone_stays_visible() -> None:
    transform = started()
    updates, _ = transform.update(jnp.array([1.0, jnp.nan]), transform.init(jnp.ones(2)), value=3.2)
    np.testing.assert_array_equal(updates, [0.5, np.nan])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.complex64])
def test_updates_are_multiplied_in_float32_and_keep_their_dtype(dtype: Any) -> None:
    transform = started()
    gradient = jnp.asarray(np.random.default_rng(0).normal(size=50), dtype)
    updates, state = transform.update(gradient, transform.init(gradient), value=4.7)
    assert updates.dtype == dtype
    assert state.scale.dtype == jnp.float32
    wide = np.asarray(gradient).astype(np.complex64 if dtype == jnp.complex64 else np.float32)
    np.testing.assert_array_equal(updates, jnp.asarray(wide * np.float32(state.scale)).astype(dtype))
    unlimited, _ = transform.update(gradient, transform.init(gradient), value=1.5)
    assert same(unlimited, gradient)


# -------------------------------------------------------------------------------------------------------------- errors


def test_a_missing_loss_is_named() -> None:
    transform = started()
    with pytest.raises(TypeError, match=r"scale_by_alrc needs the loss.*value=loss"):
        transform.update(jnp.ones(2), transform.init(jnp.ones(2)))
    chain = optax.chain(transform, optax.sgd(0.1))
    with pytest.raises(TypeError, match="needs the loss"):
        chain.update(jnp.ones(2), chain.init(jnp.ones(2)))


def test_losses_that_are_no_scalar_are_refused() -> None:
    transform = started()
    with pytest.raises(ValueError, match=r"scalar loss, got shape \(4,\).*mean"):
        transform.update(jnp.ones(2), transform.init(jnp.ones(2)), value=jnp.ones(4))


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="num_stddev must be a positive"):
        scale_by_alrc(-1.0)
    with pytest.raises(ValueError, match=r"either settings or a ready rule.*2\.0"):
        scale_by_alrc(2.0, rule=rules.ALRC.paper())
    with pytest.raises(TypeError, match=r"eps must be a Python number.*static_args"):
        scale_by_alrc(eps=jnp.zeros(()))  # pyright: ignore[reportArgumentType]


# ------------------------------------------------------------------------------------------------------------ telemetry


def test_the_state_says_what_was_limited() -> None:
    optimizer = optax.chain(started(), optax.adam(1e-3))
    weights = jnp.ones(2)
    state = optimizer.init(weights)
    assert (float(tree_get(state, "limit")), float(tree_get(state, "scale"))) == (np.inf, 1)
    for loss, limit, scale in ((3.2, 1.6, 0.5), (1.0, None, 1.0), (np.nan, None, 0.0)):
        _, state = optimizer.update(weights, state, weights, value=loss)
        assert float(tree_get(state, "scale")) == pytest.approx(scale)
        assert limit is None or float(tree_get(state, "limit")) == pytest.approx(limit)
    assert tree_get(state, "moments").count == 2
    assert isinstance(tree_get(state, "ScaleByALRCState"), ScaleByALRCState)


def test_there_is_no_limit_while_it_observes() -> None:
    _, (scales, limits) = trace(scale_by_alrc(observe=8), jnp.asarray(spiky(12, nan=False)))
    assert np.isinf(limits[:8]).all()
    assert np.isfinite(limits[8:]).all()
    assert (scales[:8] == 1).all()


# ---------------------------------------------------------------------------------------------------------- composition


def run(optimizer: Any, losses: Any, gradients: Any) -> tuple[Any, Any]:
    """Step a weight of two elements by compiled updates; return it and the state."""
    weights = jnp.ones(2)
    state = optimizer.init(weights)

    @jax.jit
    def step(weights: Any, state: Any, gradient: Any, loss: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(gradient, state, weights, value=loss)
        return optax.apply_updates(weights, updates), state

    for loss, gradient in zip(losses, gradients, strict=True):
        weights, state = step(weights, state, jnp.full(2, gradient), jnp.float32(loss))
    return weights, state


def test_first_in_a_chain_it_keeps_spikes_out_of_the_memory_of_adam() -> None:
    losses, gradients = [1.0, 3.2, 1.0], [1.0, 2.0, 1.0]
    _, state = run(optax.chain(started(), optax.adam(0.1)), losses, gradients)
    _, wanted = run(optax.adam(0.1), losses, [1.0, 1.0, 1.0])
    np.testing.assert_allclose(tree_get(state, "mu"), tree_get(wanted, "mu"), rtol=1e-3)
    _, late = run(optax.chain(optax.scale_by_adam(), started()), losses, gradients)
    assert np.all(np.abs(tree_get(late, "mu") - tree_get(wanted, "mu")) > 0.01)


def test_with_extra_args_support_leaves_it_alone() -> None:
    transform = started()
    assert optax.with_extra_args_support(transform) is transform


def multi_steps(inner: Any, number: int) -> Any:
    """Return MultiSteps as a transformation that hands extra arguments on, which its own method does not make."""
    steps = optax.MultiSteps(inner, number)
    return optax.GradientTransformationExtraArgs(steps.init, steps.update)


def test_before_multi_steps_every_micro_batch_is_decided_by_its_own_loss() -> None:
    losses, gradients = [1.0, 3.2, 1.2, 1.0], [1.0, 2.0, 3.0, 4.0]
    weights, state = run(optax.chain(started(), multi_steps(optax.sgd(0.1), 4)), losses, gradients)
    np.testing.assert_allclose(weights, 1 - 0.1 * np.mean([1, 1, 3, 4]), rtol=1e-3)
    assert tree_get(state, "moments").count == 4


def test_inside_multi_steps_the_last_micro_batch_decides_for_all() -> None:
    optimizer = multi_steps(optax.chain(started(), optax.sgd(0.1)), 4)
    gradients = [1.0, 2.0, 3.0, 4.0]
    weights, state = run(optimizer, [1.0, 1.2, 1.0, 3.2], gradients)
    np.testing.assert_allclose(weights, 1 - 0.1 * 0.5 * np.mean(gradients), rtol=1e-6)
    assert tree_get(state, "moments").count == 1
    # Hence the running mean of the losses of the update, which is that of all of them when it counts.
    running = np.cumsum([1.0, 1.2, 1.0, 3.2]) / np.arange(1, 5)
    weights, state = run(optimizer, running, gradients)
    np.testing.assert_allclose(weights, 1 - 0.1 * np.mean(gradients), rtol=1e-6)  # the mean, 1.6, is not limited
    _, wanted = started().update(jnp.ones(2), started().init(jnp.ones(2)), value=running[-1])
    np.testing.assert_allclose(tree_get(state, "moments").mean, wanted.moments.mean, rtol=1e-6)


def test_multi_steps_own_transformation_drops_the_loss() -> None:
    dropped = optax.MultiSteps(optax.chain(started(), optax.sgd(0.1)), 2).gradient_transformation()
    with pytest.raises(TypeError, match="needs the loss"):
        run(optax.chain(dropped), [1.0], [1.0])


def test_apply_if_finite_belongs_around_it() -> None:
    losses, gradients = [1.0, np.nan, 1.0], [1.0, np.nan, 1.0]
    around, state = run(optax.apply_if_finite(optax.chain(started(), optax.adam(0.1)), 5), losses, gradients)
    good, wanted = run(optax.chain(started(), optax.adam(0.1)), [1.0, 1.0], [1.0, 1.0])
    np.testing.assert_allclose(around, good, rtol=1e-6)
    assert same(tree_get(state, "moments"), tree_get(wanted, "moments"))
    # Inside, it is given the zeros that ALRC has made of the NaN, and lets Adam make a step of them.
    inside, state = run(optax.chain(started(), optax.apply_if_finite(optax.adam(0.1), 5)), losses, gradients)
    assert tree_get(state, "count", filtering=lambda path, _: "Adam" in str(path)) == 3
    assert np.all(np.abs(inside - good) > 0.01)


def test_masked_scales_what_is_not_masked() -> None:
    weights = {"a": jnp.ones(2), "b": jnp.ones(2)}
    optimizer = optax.masked(started(), {"a": True, "b": False})
    updates, _ = optimizer.update(weights, optimizer.init(weights), weights, value=3.2)
    np.testing.assert_allclose(updates["a"], 0.5)
    np.testing.assert_array_equal(updates["b"], 1.0)


def test_inject_hyperparams_schedules_what_stands_beside_it() -> None:
    @optax.inject_hyperparams
    def make(learning_rate: Any) -> Any:
        return optax.chain(started(), optax.sgd(learning_rate))

    weights, state = run(make(lambda step: 0.1 / (step + 1)), [1.0, 3.2], [1.0, 2.0])
    np.testing.assert_allclose(weights, 1 - 0.1 - 0.05, rtol=1e-3)
    assert float(tree_get(state, "scale")) == pytest.approx(0.5, rel=1e-2)
    static = ("num_stddev", "eps", "gain", "observe")
    injected = optax.inject_hyperparams(scale_by_alrc, static_args=static)(start=START)
    assert float(run(injected, [3.2], [1.0])[1].inner_state.scale) == pytest.approx(0.5)
    with pytest.raises(TypeError, match="static_args"):
        optax.inject_hyperparams(scale_by_alrc)(start=START).init(jnp.ones(2))


# ----------------------------------------------------------------------------------------------- transformations of JAX


def test_it_is_compiled_once_and_its_state_keeps_its_types() -> None:
    for transform in (scale_by_alrc(observe=4), started()):
        traces = []

        @jax.jit
        def step(gradient: Any, state: Any, loss: Any, transform: Any = transform, traces: Any = traces) -> Any:
            traces.append(1)
            return transform.update(gradient, state, value=loss)[1]

        state = transform.init(jnp.ones(2))
        avals = jax.tree.map(jax.typeof, state)
        for loss in jnp.asarray(spiky(12)):
            state = step(jnp.ones(2), state, loss)
            assert jax.tree.map(jax.typeof, state) == avals
        assert len(traces) == 1
        assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))
        assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("int32"), jnp.dtype("float32")}


def test_several_runs_in_one_vmap_equal_each_alone() -> None:
    transform = scale_by_alrc(observe=8)
    streams = jnp.stack([jnp.asarray(spiky(60, seed)) for seed in range(2)])
    together = jax.vmap(lambda stream: trace(transform, stream))(streams)
    for index, stream in enumerate(streams):
        alone = trace(transform, stream)
        for leaf, wanted in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(leaf[index], wanted, rtol=1e-5)


@pytest.mark.parametrize("way", ["shard_map", "pmap", "vmap"])
def test_devices_decide_on_their_mean_loss(way: str) -> None:
    number = min(4, len(jax.devices())) if way != "vmap" else 4
    if number < 2:
        pytest.skip("needs several devices: XLA_FLAGS=--xla_force_host_platform_device_count=4")
    losses = np.exp(np.random.default_rng(0).normal(0, 0.3, (40, number))).astype(np.float32)
    losses[20] = 30.0
    losses[30, 1] = np.nan
    alone = trace(scale_by_alrc(observe=8), jnp.asarray(losses.mean(1)))

    def follow(transform: Any) -> Any:
        def member(stream: Any) -> Any:
            return trace(transform, stream.reshape(-1))

        if way == "shard_map":
            mesh = Mesh(np.array(jax.devices()[:number]), ("data",))
            spread = jax.shard_map(member, mesh=mesh, in_specs=PartitionSpec(None, "data"), out_specs=PartitionSpec())
            return jax.jit(spread)(losses)
        if way == "pmap":
            gathered = jax.pmap(member, axis_name="data", in_axes=1, devices=jax.devices()[:number])(losses)
        else:
            gathered = jax.vmap(member, axis_name="data", in_axes=1)(losses)
        for leaf in jax.tree.leaves(gathered):
            np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[0], leaf.shape))
        return jax.tree.map(lambda leaf: leaf[0], gathered)

    together = follow(scale_by_alrc(observe=8, axis_name="data"))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), together, alone)
    assert float(together[1][0][30]) == 0
    if way != "shard_map":
        with pytest.raises(AssertionError):
            follow(scale_by_alrc(observe=8))  # every device goes its own way


def test_the_state_is_plain_data() -> None:
    transform = scale_by_alrc(observe=8)
    stream = jnp.asarray(spiky(60))
    state, _ = trace(transform, stream[:30])
    copy = pickle.loads(pickle.dumps(state))
    assert jax.tree.structure(copy) == jax.tree.structure(state)
    assert same(follower(transform)(copy, stream[30:]), follower(transform)(state, stream[30:]))


def test_no_gradient_flows_through_the_decision() -> None:
    transform = started()
    state = transform.init(jnp.ones(()))

    def applied(loss: Any) -> Any:
        return transform.update(loss * loss, state, value=loss)[0]

    assert float(jax.grad(applied)(3.2)) == pytest.approx(0.5 * 2 * 3.2, rel=1e-6)
