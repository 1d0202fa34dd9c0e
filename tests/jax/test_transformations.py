"""Check the JAX rule under the transformations: all kinds of derivatives, vmap, donation, no second trace."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax", reason="needs JAX")
import jax
import jax.numpy as jnp
from jax import lax

from alrc import rules
from alrc.jax import ALRC
from alrc.reference import alrc_trace

START = (1.0, 1.04)
"""Mean 1, standard deviation 0.2: the limit is 1.6."""
LIMIT = 1.6
RULE = ALRC(start=START)


def spiky(seed: int, *shape: int) -> np.ndarray:
    """Make positive losses around 1 of which about every tenth is far out."""
    rng = np.random.default_rng(seed)
    return (np.exp(rng.normal(0, 0.3, shape)) * np.where(rng.random(shape) < 0.1, 20, 1)).astype(np.float32)


def close(got: Any, want: Any, rtol: float = 1e-6) -> None:
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=rtol * 1e-2), got, want)


def same(got: Any, want: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, got, want)


# ---------------------------------------------------------------------------------------------------------- derivatives

WEIGHTS = jnp.array([0.3, 1.0, -2.0, 3.0, 0.1])


def squares(weights: Any) -> Any:
    """Make five losses of which two are above the limit: curved, so that second derivatives show."""
    return (weights + jnp.roll(weights, 1) / 8) ** 2


def limited_sum(weights: Any, apply: Callable[..., Any] = RULE) -> tuple[Any, Any]:
    """Return a curved function of limited losses, and the state."""
    limited, state = apply(squares(weights), RULE.init())
    return jnp.sum(limited + limited**2), state


def as_written(losses: Any, state: Any) -> tuple[Any, Any]:
    """Write the rule as the paper does, with a constant factor."""
    factor = lax.stop_gradient(jnp.where(losses > LIMIT, LIMIT / losses, 1))
    return losses * factor, state


def dropped(losses: Any, state: Any) -> tuple[Any, Any]:
    """Select the limit: right values, no gradient."""
    return jnp.minimum(losses, LIMIT), state


DERIVATIVES: dict[str, Callable[[Callable[..., Any]], Callable[[Any], Any]]] = {
    "value_and_grad": lambda f: (
        lambda w: tuple(part if i else part[0] for i, part in enumerate(jax.value_and_grad(f, has_aux=True)(w)))
    ),
    "grad": lambda f: lambda w: jax.grad(f, has_aux=True)(w)[0],
    "jvp": lambda f: lambda w: jax.jvp(lambda w: f(w)[0], (w,), (jnp.arange(5.0),)),
    "jacrev": lambda f: jax.jacrev(lambda w: f(w)[0]),
    "hessian": lambda f: jax.hessian(lambda w: f(w)[0]),
    "reverse over reverse": lambda f: jax.jacrev(jax.grad(lambda w: f(w)[0])),
    "third": lambda f: jax.jacfwd(jax.hessian(lambda w: f(w)[0])),
    "linearize": lambda f: lambda w: jax.linearize(lambda w: f(w)[0], w)[1](jnp.arange(5.0)),
    "checkpoint": lambda f: jax.grad(jax.checkpoint(lambda w: f(w)[0])),
    "vmap of grad": lambda f: lambda w: jax.vmap(jax.grad(lambda w: f(w)[0]))(jnp.stack([w, 2 * w])),
}


def check_derivative(derive: Callable[..., Any], apply: Callable[..., Any]) -> None:
    """Compare a derivative with that of the losses times a constant."""
    got = jax.jit(derive(partial(limited_sum, apply=apply)))(WEIGHTS)
    close(got, jax.jit(derive(partial(limited_sum, apply=as_written)))(WEIGHTS), rtol=1e-5)


@pytest.mark.parametrize("derive", DERIVATIVES.values(), ids=DERIVATIVES)
def test_every_derivative_is_that_of_a_constant_factor(derive: Callable[..., Any]) -> None:
    assert 0 < int(jnp.sum(squares(WEIGHTS) > LIMIT)) < 5
    check_derivative(derive, RULE)
    with pytest.raises(AssertionError):
        check_derivative(derive, dropped)


def test_untouched_gradients_are_one_and_limited_ones_are_exact() -> None:
    losses = jnp.array([0.5, 1.6, 2.0, 4.0])
    gradient = jax.grad(lambda losses: RULE(losses, RULE.init())[0].sum())(losses)
    same(gradient[:2], np.ones(2, np.float32))
    close(gradient[2:], [0.8, 0.4], rtol=1e-7)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_tangent_of_nan_stops_at_a_loss_that_is_not_finite(bad: float) -> None:
    losses, tangent = jnp.array([bad, 1.0, 4.0]), jnp.array([jnp.nan, 1.0, 1.0])
    limited, out = jax.jvp(lambda losses: RULE(losses, RULE.init())[0], (losses,), (tangent,))
    close((limited, out), (np.array([0, 1, 1.6]), np.array([0, 1, 0.4])))
    _, back = jax.vjp(lambda losses: RULE(losses, RULE.init())[0], losses)
    close(back(tangent)[0], np.array([0, 1, 0.4]))


def test_a_masked_loss_has_no_gradient_whatever_it_is() -> None:
    mask = jnp.array([True, False])

    def total(weight: Any) -> Any:
        losses = jnp.stack([weight, jnp.sqrt(weight - 1)])  # infinite slope at 1
        return RULE(jnp.where(mask, losses, 0), RULE.init(), mask)[0].sum()

    _, out = jax.jvp(lambda x: RULE(x, RULE.init(), mask)[0], (jnp.ones(2),), (jnp.array([1.0, jnp.nan]),))
    same(out, np.array([1.0, 0.0], np.float32))
    assert jax.jit(total)(jnp.array(1.0)) == 1


def test_no_gradient_goes_through_the_state() -> None:
    def last(scale: Any) -> Any:
        state = RULE.init()
        for losses in scale * jnp.array([[1.0, 2.0], [1.0, 5.0]]):
            limited, state = RULE(losses, state)
        return limited.sum() + state.mean + state.var + RULE.limit(state)

    first = RULE(jnp.array([1.0, 2.0]), RULE.init())[1]
    assert jax.grad(last)(1.0) == pytest.approx(1 + float(RULE.limit(first)), rel=1e-5)


def test_what_each_example_does_to_the_weights_is_scaled() -> None:
    rng = np.random.default_rng(1)
    images, targets, weights = rng.normal(size=(8, 3)), 2 * rng.normal(size=8), rng.normal(size=3)

    def loss(weights: Any, image: Any, target: Any) -> Any:
        return (image @ weights - target) ** 2

    each = jax.vmap(jax.grad(loss), (None, 0, 0))(weights, images, targets)
    losses = jax.vmap(loss, (None, 0, 0))(weights, images, targets)
    factors = jnp.minimum(LIMIT / losses, 1)
    assert 0 < int((factors < 1).sum()) < 8

    def total(weights: Any) -> Any:
        return RULE(jax.vmap(loss, (None, 0, 0))(weights, images, targets), RULE.init())[0].sum()

    close(jax.grad(total)(weights), factors @ each, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------------------- vmap


@pytest.mark.parametrize("rule", [ALRC(observe=4), ALRC.reference(2.0, 0.9, 1.5, 4.0)], ids=["auto", "reference"])
def test_vmap_over_states_is_a_loop(rule: ALRC) -> None:
    streams = np.stack([spiky(seed, 30, 3) * (seed + 1) for seed in range(3)])
    states = jax.tree.map(lambda part: jnp.stack([part] * 3), rule.init())

    def run(state: Any, stream: Any) -> Any:
        return lax.scan(lambda state, losses: rule(losses, state)[::-1], state, stream)

    states, limited = jax.jit(jax.vmap(run))(states, streams)
    for i, stream in enumerate(streams):
        want = alrc_trace(stream, **vars(rule.rule))
        np.testing.assert_allclose(limited[i], want.limited, rtol=5e-6)
        assert float(states.mean[i]) == pytest.approx(want.mu1[-1], rel=5e-6)
    assert np.any(np.asarray(limited) < streams)


def test_stacked_states_outside_of_vmap_are_refused() -> None:
    states = jax.tree.map(lambda part: jnp.stack([part] * 3), RULE.init())
    with pytest.raises(ValueError, match=r"state.mean has shape \(3,\).* use jax.vmap for several states"):
        RULE(jnp.ones(3), states)


# ---------------------------------------------------------------------------------------------- one program, no reading


def count_traces(rule: ALRC, steps: int = 4, dtype: Any = jnp.float32) -> int:
    """Return how often a training step with this rule is traced."""
    traces = 0

    @jax.jit
    def step(weight: Any, state: Any, inputs: Any) -> Any:
        nonlocal traces
        traces += 1

        def objective(weight: Any) -> Any:
            limited, after = rule((weight * inputs) ** 2, state)
            return limited.mean(), after

        (_, after), gradient = jax.value_and_grad(objective, has_aux=True)(weight)
        return weight - 0.1 * gradient, after

    weight, state = jnp.ones((), dtype), rule.init()
    for _ in range(steps):
        weight, state = step(weight, state, jnp.arange(4, dtype=dtype))
    return traces


class Weak(ALRC):
    """Forget the type of the state."""

    def commit(self, batch: Any, state: Any, when: Any = None) -> Any:
        return jax.tree.map(lambda part: part.astype(float), super().commit(batch, state, when))


@pytest.mark.parametrize("rule", [ALRC(observe=4), ALRC.paper(), ALRC.cifar_scripts()], ids=repr)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_is_traced_once(rule: ALRC, dtype: Any) -> None:
    assert count_traces(rule, dtype=dtype) == 1


def test_double_precision_losses_do_not_move_the_state() -> None:
    with jax.enable_x64(True):
        assert count_traces(ALRC(observe=4), dtype=jnp.float64) == 1
        assert count_traces(ALRC.paper(), dtype=jnp.float64) == 1


def test_a_second_trace_is_seen() -> None:
    with jax.enable_x64(True):
        assert count_traces(Weak.from_rule(RULE.rule)) > 1


def test_nothing_is_moved_to_or_from_the_host() -> None:
    rule = ALRC(observe=4)
    step = jax.jit(lambda losses, state: (*rule(losses, state), rule.telemetry(losses, state), rule.limit(state)))
    losses = jnp.ones(4)
    state = step(losses, rule.init())[1]
    with jax.transfer_guard("disallow"):
        for _ in range(6):
            _, state, _, _ = step(losses, state)
    assert state.count == 7
    with pytest.raises(Exception, match=r"[Dd]isallowed"), jax.transfer_guard("disallow"):
        step(np.ones(4, np.float32), state)


def test_the_state_can_be_donated() -> None:
    rule = ALRC(observe=4)
    step, plain = jax.jit(rule.apply, donate_argnums=1), jax.jit(rule.apply)
    state, other = rule.init(), rule.init()
    for losses in spiky(3, 8, 4):
        before = state
        limited, state = step(losses, state)
        want, other = plain(losses, other)
        same((limited, state), (want, other))
        assert all(part.is_deleted() for part in before)


def test_the_rule_is_a_static_argument_a_leafless_tree_and_a_closure() -> None:
    rule, losses = ALRC(start=START), jnp.array([1.0, 4.0])
    traces = 0

    def step(rule: ALRC, losses: Any, state: Any) -> Any:
        nonlocal traces
        traces += 1
        return rule(losses, state)

    want = jax.jit(partial(step, rule))(losses, rule.init())
    traces = 0
    for compiled in (jax.jit(step), jax.jit(step, static_argnums=0)):
        same(compiled(rule, losses, rule.init()), want)
        same(compiled(ALRC.from_rule(rules.ALRC(start=START)), losses, rule.init()), want)
    assert traces == 2
    assert jax.tree.leaves(rule) == []
    assert jax.tree.map(lambda leaf: leaf + 1, {"rule": rule}) == {"rule": rule}
    assert jax.jit(lambda rule: rule)(rule) == rule


def test_the_state_is_a_plain_tree() -> None:
    for rule, names in ((ALRC(), ["mean", "var", "count", "rate", "recent"]), (ALRC.paper(), ["mean", "var", "count"])):
        paths = jax.tree_util.tree_flatten_with_path(rule.init())[0]
        assert [path[0].name for path, _ in paths] == names
        assert [leaf.weak_type for _, leaf in paths] == [False] * len(names)
        same(jax.tree.map(lambda part: part, rule.init()), rule.init())


# --------------------------------------------------------------------------------------------------- where people train


def test_is_an_attribute_of_a_flax_module() -> None:
    nnx = pytest.importorskip("flax.nnx", reason="needs flax")

    class Model(nnx.Module):
        def __init__(self) -> None:
            self.weight = nnx.Param(jnp.array([1.0, 2.0]))
            self.rule = ALRC(start=START)
            self.seen = nnx.Variable(self.rule.init())

    @nnx.jit
    def step(model: Any) -> Any:
        def objective(model: Any) -> Any:
            limited, after = model.rule(model.weight[...] ** 2, model.seen.get_value())
            model.seen.set_value(after)
            return limited.sum()

        return nnx.value_and_grad(objective)(model)

    model = Model()
    value, gradient = step(model)
    step(model)
    close((value, gradient["weight"][...]), (2.6, np.array([2.0, 4 * 0.4])))
    assert model.seen.get_value().count == 2


def test_is_a_field_of_an_equinox_module() -> None:
    equinox = pytest.importorskip("equinox", reason="needs equinox")

    class Model(equinox.Module):
        weight: Any
        rule: ALRC

    model = Model(jnp.array([1.0, 2.0]), ALRC(start=START))

    @equinox.filter_jit
    def step(model: Any, state: Any) -> Any:
        def objective(model: Any) -> Any:
            limited, after = model.rule(model.weight**2, state)
            return limited.sum(), after

        return equinox.filter_value_and_grad(objective, has_aux=True)(model)

    (value, state), gradient = step(model, model.rule.init())
    close((value, gradient.weight), (2.6, np.array([2.0, 4 * 0.4])))
    assert state.count == 1
    assert jax.tree.leaves(equinox.filter(model, equinox.is_array)) == [model.weight]
