"""Check the JAX rule across four devices of one CPU: all learn from the joined batch, as one process would.

The oracle is one process on the whole batch, itself held against `alrc_trace`; the twin is a rule without `axis_name`.
"""

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
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from alrc import rules
from alrc.jax import ALRC
from alrc.reference import alrc_trace

DEVICES = 4
WIDTH = 6
pytestmark = pytest.mark.skipif(
    jax.device_count() < DEVICES, reason="needs XLA_FLAGS=--xla_force_host_platform_device_count=4"
)

RULES: dict[str, rules.ALRC] = {
    "auto": rules.ALRC(observe=8, betas=(0.95, 0.95)),
    "paper": rules.ALRC.paper(2.0, (0.95, 0.98), 1.5, 4.0),
    "reference": rules.ALRC.reference(2.0, 0.95, 1.5, 4.0),
}
Run = Callable[[ALRC, Any, Any], tuple[Any, Any, Any]]


def streams(steps: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """Make losses and masks, shape (steps, devices, width); a spike or a NaN comes on one device alone."""
    rng = np.random.default_rng(1)
    losses = np.exp(rng.normal(0, 0.3, (steps, DEVICES, WIDTH))) * np.array([1, 1.2, 0.8, 1.5])[:, None]
    losses[steps - 20, 2, 3], losses[steps - 15, 1, 1], losses[steps - 10, 3], losses[0, 2] = (
        100,
        np.nan,
        np.nan,
        np.inf,
    )
    masks = rng.random(losses.shape) < 0.8
    masks[5, 1], masks[steps - 5, :3] = False, False
    masks[steps - 20] = masks[steps - 15] = True
    return losses.astype(np.float32), masks


def step(rule: ALRC, state: Any, given: Any) -> tuple[Any, tuple[Any, Any, Any]]:
    """Limit, differentiate and learn."""
    losses, mask = given
    limited, back, after = jax.vjp(lambda losses: rule(losses, state, mask), losses, has_aux=True)
    return after, (limited, back(jnp.ones_like(limited))[0], after)


def alone(rule: ALRC, losses: Any, masks: Any) -> tuple[Any, Any, Any]:
    """Run the whole batch in one process."""
    return jax.jit(lambda *given: lax.scan(partial(step, rule), rule.init(), given)[1])(losses, masks)


def mesh_of(*sizes: int) -> Any:
    """Lay the devices out along one axis or two."""
    names = ("data", "model")[: len(sizes)]
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes))


def by_shard_map(rule: ALRC, losses: Any, masks: Any) -> tuple[Any, Any, Any]:
    """Run one shard on each device; every device's states come back, shape (steps, devices)."""

    @partial(jax.shard_map, mesh=mesh_of(DEVICES), in_specs=PartitionSpec(None, "data"), out_specs=OUT)
    def run(losses: Any, masks: Any) -> Any:
        state = jax.tree.map(lambda part: lax.pcast(part, "data", to="varying"), rule.init())
        limited, gradient, states = lax.scan(partial(step, rule), state, (losses, masks))[1]
        return limited, gradient, jax.tree.map(lambda part: part[:, None], states)

    return jax.jit(run)(losses, masks)


OUT = (PartitionSpec(None, "data"), PartitionSpec(None, "data"), PartitionSpec(None, "data"))


def by_pmap(rule: ALRC, losses: Any, masks: Any) -> tuple[Any, Any, Any]:
    """Run the same through `pmap`, one step at a time."""
    run = jax.pmap(partial(step, rule), axis_name="data")
    state, seen = jax.tree.map(lambda part: jnp.stack([part] * DEVICES), rule.init()), []
    for given in zip(losses, masks, strict=True):
        state, one = run(state, given)
        seen.append(one)
    return jax.tree.map(lambda *parts: np.stack(parts), *seen)


def by_vmap(rule: ALRC, losses: Any, masks: Any) -> tuple[Any, Any, Any]:
    """Run the same through `vmap`, whose axes have names too."""
    run = jax.vmap(lambda *given: lax.scan(partial(step, rule), rule.init(), given)[1], 1, 1, axis_name="data")
    return jax.jit(run)(losses, masks)


def check_joined(run: Run, pure: rules.ALRC, axis_name: str | None = "data") -> None:
    """Compare values, gradients and states of four devices with those of one process on the joined batch."""
    losses, masks = streams()
    want = alone(ALRC.from_rule(pure), losses, masks)
    trace = alrc_trace([one[mask] for one, mask in zip(losses, masks, strict=True)], **vars(pure))
    np.testing.assert_allclose(want[2].mu2, trace.mu2, rtol=5e-6)
    assert np.any((np.asarray(want[1]) < 1) & (np.asarray(want[1]) > 0)), "nothing is limited"
    limited, gradient, states = run(ALRC.from_rule(pure, axis_name), losses, masks)
    for part in states:
        for device in range(1, DEVICES):
            np.testing.assert_array_equal(part[:, device], part[:, 0])
    np.testing.assert_allclose(limited, want[0], rtol=2e-6)
    np.testing.assert_allclose(gradient, want[1], rtol=2e-6)
    for got, wanted in zip(states, want[2], strict=True):
        np.testing.assert_allclose(np.asarray(got)[:, 0], wanted, rtol=5e-6, atol=1e-6)


@pytest.mark.parametrize("pure", RULES.values(), ids=RULES)
@pytest.mark.parametrize("run", [by_shard_map, by_vmap])
def test_devices_learn_from_the_joined_batch(run: Run, pure: rules.ALRC) -> None:
    check_joined(run, pure)


def test_pmap_learns_from_the_joined_batch() -> None:
    check_joined(by_pmap, RULES["auto"])


@pytest.mark.parametrize("run", [by_shard_map, by_pmap, by_vmap])
def test_devices_that_learn_alone_are_seen(run: Run) -> None:
    with pytest.raises(AssertionError):
        check_joined(run, RULES["reference"], None)


def test_a_state_that_is_replicated_stays_so() -> None:
    """The compiler's own check of what varies over devices: it refuses the state of a rule that learns alone."""
    losses, masks = streams(20)

    def run(rule: ALRC) -> Any:
        @partial(
            jax.shard_map,
            mesh=mesh_of(DEVICES),
            in_specs=(PartitionSpec(), PartitionSpec(None, "data"), PartitionSpec(None, "data")),
            out_specs=PartitionSpec(),
        )
        def states(state: Any, *given: Any) -> Any:
            return lax.scan(partial(step, rule), state, given)[0]

        return jax.jit(states)(rule.init(), losses, masks)

    want = jax.tree.map(lambda part: part[-1], alone(ALRC(observe=8), losses, masks)[2])
    got = run(ALRC(observe=8, axis_name="data"))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=5e-6), got, want)
    with pytest.raises(TypeError, match="carry"):
        run(ALRC(observe=8))


def test_two_axes_are_one_group() -> None:
    losses, masks = streams(20)
    rule = ALRC(observe=8, axis_name=("data", "model"))
    both = PartitionSpec(None, ("data", "model"))

    @partial(jax.shard_map, mesh=mesh_of(2, 2), in_specs=(both, both), out_specs=PartitionSpec())
    def run(*given: Any) -> Any:
        return lax.scan(partial(step, rule), rule.init(), given)[0]

    want = jax.tree.map(lambda part: part[-1], alone(ALRC(observe=8), losses, masks)[2])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=5e-6), jax.jit(run)(losses, masks), want)


@pytest.mark.parametrize("is_stacked", [False, True], ids=["listed", "stacked"])
def test_micro_batches_on_devices_are_one_batch(is_stacked: bool) -> None:
    losses, masks = streams(20)
    rule = ALRC(observe=8, axis_name="data")

    def update(state: Any, given: Any) -> Any:
        halves = jax.tree.map(lambda part: part.reshape(-1, WIDTH // 2, 2).transpose(2, 0, 1), given)
        if is_stacked:
            seen = lax.scan(lambda _, half: (None, rule.observe(half[0], state, half[1])[1]), None, halves)[1]
        else:
            seen = [rule.observe(halves[0][i], state, halves[1][i])[1] for i in (0, 1)]
        return rule.commit(seen, state), None

    part = PartitionSpec(None, "data")

    @partial(jax.shard_map, mesh=mesh_of(DEVICES), in_specs=(part, part), out_specs=PartitionSpec())
    def run(*given: Any) -> Any:
        return lax.scan(update, rule.init(), given)[0]

    want = jax.tree.map(lambda part: part[-1], alone(ALRC(observe=8), losses, masks)[2])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=5e-6), jax.jit(run)(losses, masks), want)


def test_a_small_spread_on_a_large_mean_survives_the_sum() -> None:
    """Mean 1000, standard deviation 0.1, in float32; raw sums of squares would lose it altogether."""
    losses = np.random.default_rng(3).normal(1000, 0.1, (200, DEVICES, WIDTH)).astype(np.float32)
    masks = np.ones_like(losses, bool)
    pure = rules.ALRC(observe=8)
    trace = alrc_trace(losses, **vars(pure))
    limited, _, states = by_shard_map(ALRC.from_rule(pure, "data"), losses, masks)
    state = jax.tree.map(lambda part: part[-1, 0], states)
    std = float(state.var) ** 0.5
    assert float(state.mean) == pytest.approx(trace.mu1[-1], rel=1e-6)
    assert std == pytest.approx((trace.mu2[-1] - trace.mu1[-1] ** 2) ** 0.5, rel=1e-3)
    np.testing.assert_allclose(limited, np.array(trace.limited), rtol=1e-6)
    raw = np.float32((losses**2).sum()) / np.float32(losses.size) - (losses.sum() / np.float32(losses.size)) ** 2
    assert abs(raw - 0.01) > 0.001, "the raw way is good enough here, and the test proves nothing"


def test_arrays_that_jit_shards_are_whole_to_the_rule() -> None:
    """Without `axis_name`: the compiler adds up over devices by itself."""
    losses, masks = streams()
    rule = ALRC(observe=8)
    mesh = mesh_of(DEVICES)
    sharded = jax.device_put((losses, masks), NamedSharding(mesh, PartitionSpec(None, "data")))
    state = jax.device_put(rule.init(), NamedSharding(mesh, PartitionSpec()))
    run = jax.jit(lambda state, *given: lax.scan(partial(step, rule), state, given))
    after, (limited, gradient, _) = run(state, *sharded)
    want = alone(rule, losses, masks)
    assert not limited.sharding.is_fully_replicated
    assert after.mean.sharding.is_fully_replicated
    np.testing.assert_allclose(limited, want[0], rtol=2e-6)
    np.testing.assert_allclose(gradient, want[1], rtol=2e-6)
    jax.tree.map(lambda got, wanted: np.testing.assert_allclose(got, wanted[-1], rtol=5e-6, atol=1e-6), after, want[2])


def test_an_axis_that_is_not_there_is_named() -> None:
    with pytest.raises(NameError, match="data"):
        ALRC(axis_name="data")(jnp.ones(2), ALRC().init())
