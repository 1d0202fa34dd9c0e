"""Wrap Keras layers that limit losses for `alrc.conformance`, and measure what they really do.

Gradient factors are the derivatives that the backend finds, in a step that it compiles (torch: does not). Not imported
by `alrc.keras`, since training needs none of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from alrc.conformance import Make, Outcome, Traits

__all__ = ["wrap_loss_limiter"]

ops: Any = keras.ops  # Keras declares no types


def wrap_loss_limiter(
    make: Callable[[], keras.layers.Layer],
    *,
    dtypes: Sequence[str] = ("float32", "bfloat16", "float16"),
    is_signed: bool = False,
    is_accumulating: bool = False,
    granularity: Any = "element",
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
    return lambda dtype: (_CompiledLosses if compiled else _Losses)(engine, traits, dtype)


class _Engine:
    """Step a layer from any values of its weights."""

    def __init__(self, layer: keras.layers.Layer) -> None:
        self.layer = layer
        layer(ops.ones((1,)), training=False)
        self.start = [ops.convert_to_numpy(weight.value) for weight in layer.non_trainable_variables]
        self.traced = 0
        self.step = self._compiled()

    def call(self, state: list[Any], losses: Any, training: bool) -> tuple[Any, list[Any]]:
        """Return limited losses and the new values of the weights."""
        trainable = [weight.value for weight in self.layer.trainable_variables]
        layer: Any = self.layer
        return layer.stateless_call(trainable, state, losses, training=training)

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

    def __init__(self, engine: _Engine, traits: Traits, dtype: str) -> None:
        self.engine, self.traits, self.dtype = engine, traits, dtype
        self.state: list[Any] = [ops.convert_to_tensor(value) for value in engine.start]
        self.level = 1.0

    def step(self, micro_batches: Sequence[NDArray[Any]], /) -> list[Outcome]:
        """Limit each micro-batch and differentiate; remember the level of the losses for the probe."""
        top = max((float(np.max(np.abs(batch), initial=0.0)) for batch in micro_batches), default=0.0)
        self.level = top if 0 < top < 1e30 else self.level
        outcomes = []
        for batch in micro_batches:
            limited, gradient, self.state = self.engine.step(list(self.state), self._tensor(batch))
            outcomes.append(Outcome(*(ops.convert_to_numpy(ops.cast(x, "float32")) for x in (limited, gradient))))
        return [Outcome(value.astype(np.float64), factor.astype(np.float64)) for value, factor, _ in outcomes]

    def evaluate(self, batch: NDArray[Any], /) -> None:
        """Call the layer as in validation."""
        _, self.state = self.engine.call(list(self.state), self._tensor(batch), False)

    def limit(self) -> float:
        """Read the limit, or find it out."""
        layer = self.engine.holding(self.state)
        if hasattr(layer, "limit"):
            return float(ops.convert_to_numpy(layer.limit))
        large = 1e6 * self.level
        reduced = float(ops.convert_to_numpy(self.engine.step(list(self.state), self._tensor(np.array([large])))[0])[0])
        return reduced if reduced < large * (1 - 1e-6) else math.inf

    def save(self) -> Any:
        """Return the weights as a file would hold them."""
        return [np.array(ops.convert_to_numpy(value)) for value in self.state]

    def load(self, state: Any, /) -> None:
        """Take the weights."""
        self.state = [ops.convert_to_tensor(value) for value in state]

    def _tensor(self, batch: NDArray[Any]) -> Any:
        """Return losses in the precision to be tried."""
        return ops.cast(ops.convert_to_tensor(np.asarray(batch, dtype=np.float64).astype(np.float32)), self.dtype)


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
