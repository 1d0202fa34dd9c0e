"""Wrap Keras layers that limit losses for `alrc.conformance`, and measure what they really do.

Gradient factors are the derivatives that the backend finds, in a step that it compiles (torch: does not). Replicas are
what Keras has: those of `tf.distribute` on tensorflow, one batch sharded over devices on jax. Not imported by
`alrc.keras`, since training needs none of it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from alrc.conformance import Make, Outcome, Traits
from alrc.conformance.verdict import NotApplicableError

__all__ = ["wrap_loss_limiter"]

ops: Any = keras.ops  # Keras declares no types

Shards = Sequence[Sequence[NDArray[Any]]]
Told = list[list[tuple[NDArray[Any], float]]]
"""For each replica, and in it for each step, the factors of its elements and the limit after the step."""


def wrap_loss_limiter(
    make: Callable[[], keras.layers.Layer],
    *,
    dtypes: Sequence[str] = ("float32", "bfloat16", "float16"),
    is_signed: bool = False,
    is_accumulating: bool = False,
    granularity: Any = "element",
    synced: Callable[[], keras.layers.Layer] | None = None,
) -> Make:
    """Wrap a layer that limits losses; it is called with `training=True`, and with False to evaluate.

    Its `limit` is read if it has one, else the limit is probed. Its weights are its state. One layer is made and
    stepped with the weights of whichever copy is asked, so that it is compiled once.

    Args:
        make: Makes a layer; `ALRC` itself, for example.
        dtypes: Precisions of losses to try.
        is_signed: Whether it claims losses of any sign.
        is_accumulating: Whether it claims one update per optimiser step; a layer that learns in each call cannot.
        granularity: What gets a factor of its own.
        synced: Makes a layer with a `limit` that learns from all replicas; `ALRC` itself, for example. On tensorflow it
            must be importable (no lambda): replicas need a process of their own. On jax it takes a `mask`; the batch is
            sharded over as many devices as there are shards, if there are. On torch Keras has no replicas: T7 is n/a.

    Returns:
        What `alrc.conformance.run` takes.

    Example:
        >>> from alrc.conformance import run
        >>> run(wrap_loss_limiter(keras.layers.Identity), "nothing", tests=["T8"]).failed
        ['T8']
    """
    traits = Traits("loss", granularity, tuple(dtypes), is_signed, is_accumulating)
    engine = _Engine(make())
    compiled = keras.backend.backend() != "torch"
    return lambda dtype: (_CompiledLosses if compiled else _Losses)(engine, traits, dtype, synced)


class _Engine:
    """Step a layer from any values of its weights."""

    def __init__(self, layer: keras.layers.Layer) -> None:
        self.layer = layer
        layer(ops.ones((1,)), training=False)
        self.start = [ops.convert_to_numpy(weight.value) for weight in layer.non_trainable_variables]
        self.traced = 0
        self.step = self._compiled()

    def call(self, state: list[Any], losses: Any, training: bool, **others: Any) -> tuple[Any, list[Any]]:
        """Return limited losses and the new values of the weights."""
        trainable = [weight.value for weight in self.layer.trainable_variables]
        layer: Any = self.layer
        return layer.stateless_call(trainable, state, losses, training=training, **others)

    def holding(self, state: list[Any]) -> Any:
        """Return the layer with these values in its weights."""
        for weight, value in zip(self.layer.non_trainable_variables, state, strict=True):
            weight.assign(value)
        return self.layer

    def _compiled(self) -> Callable[[list[Any], Any], tuple[Any, Any, list[Any]]]:
        """Return a step: from state and losses to limited losses, their derivatives, and the next state."""
        backend = keras.backend.backend()
        if backend == "jax":
            import jax

            def run_jax(state: list[Any], losses: Any) -> tuple[Any, Any, list[Any]]:
                self.traced += 1
                limited, pull, after = jax.vjp(lambda x: self.call(state, x, True), losses, has_aux=True)
                return limited, pull(ops.ones_like(limited))[0], after

            return jax.jit(run_jax)
        if backend == "tensorflow":
            import tensorflow as tf  # pyright: ignore[reportMissingModuleSource]

            def run_tensorflow(state: list[Any], losses: Any) -> tuple[Any, Any, list[Any]]:
                self.traced += 1
                with tf.GradientTape() as tape:
                    tape.watch(losses)
                    limited, after = self.call(state, losses, True)
                return limited, tape.gradient(limited, losses), after

            return tf.function(run_tensorflow)

        def run_torch(state: list[Any], losses: Any) -> tuple[Any, Any, list[Any]]:
            leaf = losses.detach().requires_grad_()
            limited, after = self.call(state, leaf, True)
            limited.backward(ops.ones_like(limited))
            gradient = ops.zeros_like(losses) if leaf.grad is None else leaf.grad
            return limited.detach(), gradient, [value.detach() for value in after]

        return run_torch


class _Losses:
    """Drive a loss limiter."""

    def __init__(self, engine: _Engine, traits: Traits, dtype: str, synced: Any) -> None:
        self.engine, self.traits, self.dtype = engine, traits, dtype
        self.state: list[Any] = [ops.convert_to_tensor(value) for value in engine.start]
        self.level = 1.0
        if synced is not None:
            self.ranks: Callable[[Shards], Told] = partial(RANKS[keras.backend.backend()], synced, dtype)

    def step(self, micro_batches: Sequence[NDArray[Any]], /) -> list[Outcome]:
        """Limit each micro-batch and differentiate; remember the level of the losses for the probe."""
        top = max((float(np.max(np.abs(batch), initial=0.0)) for batch in micro_batches), default=0.0)
        self.level = top if 0 < top < 1e30 else self.level
        outcomes = []
        for batch in micro_batches:
            limited, gradient, self.state = self.engine.step(list(self.state), _tensor(batch, self.dtype))
            outcomes.append(Outcome(*(ops.convert_to_numpy(ops.cast(x, "float32")) for x in (limited, gradient))))
        return [Outcome(value.astype(np.float64), factor.astype(np.float64)) for value, factor, _ in outcomes]

    def evaluate(self, batch: NDArray[Any], /) -> None:
        """Call the layer as in validation."""
        _, self.state = self.engine.call(list(self.state), _tensor(batch, self.dtype), False)

    def limit(self) -> float:
        """Read the limit, or find it out."""
        layer = self.engine.holding(self.state)
        if hasattr(layer, "limit"):
            return float(ops.convert_to_numpy(layer.limit))
        large = 1e6 * self.level
        limited = self.engine.step(list(self.state), _tensor(np.array([large]), self.dtype))[0]
        reduced = float(ops.convert_to_numpy(limited)[0])
        return reduced if reduced < large * (1 - 1e-6) else math.inf

    def save(self) -> Any:
        """Return the weights as a file would hold them."""
        return [np.array(ops.convert_to_numpy(value)) for value in self.state]

    def load(self, state: Any, /) -> None:
        """Take the weights."""
        self.state = [ops.convert_to_tensor(value) for value in state]


class _CompiledLosses(_Losses):
    """Drive it through a compiler, which looks at no value."""

    def traces(self) -> str:
        """Say why it cannot be compiled into one graph that serves every step; empty if it can."""
        batch = np.array([1.0, 2.0, 3.0, 1.0])
        try:
            for _ in range(3):
                self.step([batch])
            before = self.engine.traced
            for _ in range(10):
                self.step([batch])
        except Exception as error:
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:80]}"
        return "" if self.engine.traced == before else "recompiles while nothing but the numbers changes"

    def reads(self) -> list[str]:
        """Name what reads a tensor's value: nothing that a compiler could trace."""
        return ["the step, which cannot be traced"] if self.traces() else []


def _tensor(batch: NDArray[Any], dtype: str) -> Any:
    """Return losses in the precision to be tried."""
    return ops.cast(ops.convert_to_tensor(np.asarray(batch, dtype=np.float64).astype(np.float32)), dtype)


def _ranks_of_jax(synced: Callable[[], keras.layers.Layer], dtype: str, shards: Shards, /) -> Told:
    """Shard the joined batch over devices, as Keras' DataParallel does; a short shard is padded and masked."""
    import jax

    number, width = len(shards), max(len(batch) for stream in shards for batch in stream)
    devices = np.array(jax.devices()[: number if jax.device_count() >= number else 1])
    mesh = jax.sharding.Mesh(devices, ("batch",))
    split, whole = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axis)) for axis in (["batch"], []))
    engine = _Engine(synced())

    def run(state: list[Any], losses: Any, mask: Any) -> tuple[Any, Any, list[Any]]:
        call = partial(engine.call, state, training=True, mask=mask)
        limited, pull, after = jax.vjp(call, losses, has_aux=True)
        layer: Any = engine.layer
        with keras.StatelessScope([*zip(layer.non_trainable_variables, after, strict=True)]):
            return ops.cast(pull(ops.ones_like(limited))[0], "float32"), layer.limit, after

    step = jax.jit(run, out_shardings=(split, whole, whole))
    state, told = jax.device_put(engine.start, whole), [[] for _ in shards]
    for batches in zip(*shards, strict=True):
        padded = [np.pad(batch, (0, width - len(batch)), constant_values=np.nan) for batch in batches]
        mask = jax.device_put(np.concatenate([np.arange(width) < len(batch) for batch in batches]), split)
        factors, limit, state = step(state, jax.device_put(_tensor(np.concatenate(padded), dtype), split), mask)
        limits = [float(copy.data) for copy in limit.addressable_shards]
        for rank, factor in enumerate(np.split(np.asarray(factors, np.float64), number)):
            told[rank].append((factor[: len(batches[rank])], limits[rank % len(limits)]))
    return told


def _ranks_of_tensorflow(synced: Callable[[], keras.layers.Layer], dtype: str, shards: Shards, /) -> Told:
    """Run replicas in a process of their own, since here tensorflow has already made one device of the CPU."""
    os.environ["KERAS_BACKEND"] = "tensorflow"  # however it was chosen here, it must be so there
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(_run_replicas, synced, dtype, shards).result()


def _run_replicas(synced: Callable[[], keras.layers.Layer], dtype: str, shards: Shards) -> Told:
    """Be a process whose CPU is several devices, each with a replica under `tf.distribute.MirroredStrategy`."""
    import tensorflow as tf  # pyright: ignore[reportMissingModuleSource]

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration() for _ in shards])
    strategy = tf.distribute.MirroredStrategy([f"CPU:{rank}" for rank in range(len(shards))])
    with strategy.scope():
        layer: Any = synced()
        layer(ops.ones((1,)), training=False)

    def replica(losses: Any) -> tuple[Any, Any]:
        with tf.GradientTape() as tape:
            tape.watch(losses)
            limited = layer(losses, training=True)
        factor = tape.gradient(limited, losses, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        return ops.cast(factor, "float32"), layer.limit

    step = tf.function(lambda losses: strategy.run(replica, args=(losses,)))
    told: Told = [[] for _ in shards]
    for batches in zip(*shards, strict=True):
        parts = [_tensor(batch, dtype) for batch in batches]
        losses = strategy.experimental_distribute_values_from_function(
            lambda context, parts=parts: parts[context.replica_id_in_sync_group]
        )
        factors, limits = (strategy.experimental_local_results(part) for part in step(losses))
        for steps, factor, limit in zip(told, factors, limits, strict=True):
            steps.append((factor.numpy().astype(np.float64), float(limit)))
    return told


def _ranks_of_torch(*_: Any) -> Told:
    """Say that there is nothing to ask."""
    raise NotApplicableError("Keras has no replicas on torch; processes of torch's own are not asked")


RANKS = {"jax": _ranks_of_jax, "tensorflow": _ranks_of_tensorflow, "torch": _ranks_of_torch}
"""What runs shards as replicas, by backend."""
