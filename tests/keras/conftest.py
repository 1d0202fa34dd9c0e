"""What every test of the Keras side needs: one backend, chosen before Keras is imported, and its gradients.

The environment variable KERAS_BACKEND chooses; unset, it is the first installed of torch, jax, tensorflow (the
`conftest.py` at the root sees to that). The same tests run once for each backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

# Keras converts tensors of torch to numpy in a way that numpy is about to forbid.
QUIET = "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"

Step = Callable[[Any, NDArray[Any]], tuple[NDArray[Any], NDArray[Any]]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let Keras convert tensors as it does."""
    for item in items:
        if "tests/keras" in item.path.as_posix():
            item.add_marker(pytest.mark.filterwarnings(QUIET))


@pytest.fixture
def numbers() -> Callable[[Any], NDArray[Any]]:
    """Give what turns a tensor of any backend into a numpy array, halves into float32."""
    keras = pytest.importorskip("keras", reason="these are the tests of alrc.keras")

    def convert(x: Any) -> NDArray[Any]:
        x = keras.ops.convert_to_tensor(x)
        is_half = keras.backend.standardize_dtype(x.dtype) in ("bfloat16", "float16")
        return np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(x, "float32") if is_half else x))

    return convert


@pytest.fixture
def backward(numbers: Callable[[Any], NDArray[Any]]) -> Callable[..., Any]:
    """Give what calls a function of losses and differentiates the sum of the result, eagerly: torch and tensorflow."""
    import keras

    backend = keras.backend.backend()

    def run(call: Callable[[Any], Any], losses: Any, dtype: str = "float32") -> tuple[NDArray[Any], NDArray[Any]]:
        losses = keras.ops.cast(keras.ops.convert_to_tensor(np.asarray(losses)), dtype)
        if backend == "tensorflow":
            import tensorflow as tf

            with tf.GradientTape() as tape:
                tape.watch(losses)
                value = call(losses)
            return numbers(value), numbers(tape.gradient(value, losses))
        leaf = losses.detach().requires_grad_()
        value = call(leaf)
        value.backward(keras.ops.ones_like(value))
        return numbers(value.detach()), numbers(leaf.grad)

    return run


@pytest.fixture
def step(backward: Callable[..., Any], numbers: Callable[[Any], NDArray[Any]]) -> Step:
    """Give what makes one training step of a layer: values and gradients of losses; the layer learns."""
    import keras

    compiled: dict[int, Any] = {}

    def run_jax(limit: Any, losses: Any, dtype: str = "float32", **others: Any) -> tuple[NDArray[Any], NDArray[Any]]:
        import jax

        def differentiate(state: Any, losses: Any, others: Any) -> Any:
            def call(losses: Any) -> Any:
                return limit.stateless_call([], state, losses, training=True, **others)

            value, pull, after = jax.vjp(call, losses, has_aux=True)
            return value, pull(jax.numpy.ones_like(value))[0], after

        losses = keras.ops.cast(keras.ops.convert_to_tensor(np.asarray(losses)), dtype)
        state = [weight.value for weight in limit.non_trainable_variables]
        value, gradient, after = compiled.setdefault(id(limit), jax.jit(differentiate))(state, losses, others)
        for weight, new in zip(limit.non_trainable_variables, after, strict=True):
            weight.assign(new)
        return numbers(value), numbers(gradient)

    def run(limit: Any, losses: Any, dtype: str = "float32", **others: Any) -> tuple[NDArray[Any], NDArray[Any]]:
        return backward(lambda x: limit(x, training=True, **others), losses, dtype)

    return run_jax if keras.backend.backend() == "jax" else run
