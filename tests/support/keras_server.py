"""Drive `alrc.keras.ALRC` in a process of its own, since a process has one Keras backend.

Started by keras_driver.py: `python keras_server.py` with KERAS_BACKEND set. Reads pickled requests from its standard
input and writes pickled answers to its standard output.
"""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np


def step_jax() -> Callable[..., Any]:
    """Return a step that jax compiles for each layer and shape."""
    import jax

    def run(limit: Any, losses: Any, state: Any) -> Any:
        def call(losses: Any) -> Any:
            return limit.stateless_call([], state, losses, training=True)

        limited, pull, after = jax.vjp(call, losses, has_aux=True)
        return limited, pull(jax.numpy.ones_like(limited))[0], after

    compiled = jax.jit(run, static_argnums=0)

    def step(limit: Any, losses: Any) -> tuple[Any, Any]:
        limited, gradient, after = compiled(limit, losses, [weight.value for weight in limit.non_trainable_variables])
        for weight, value in zip(limit.non_trainable_variables, after, strict=True):
            weight.assign(value)
        return limited, gradient

    return step


def step_torch() -> Callable[..., Any]:
    """Return a step that differentiates as torch does."""
    import torch

    torch.set_num_threads(1)

    def step(limit: Any, losses: Any) -> tuple[Any, Any]:
        leaf = losses.detach().requires_grad_()
        limited = limit(leaf, training=True)
        limited.backward(torch.ones_like(limited))
        return limited.detach(), leaf.grad

    return step


def step_tensorflow() -> Callable[..., Any]:
    """Return a step that tensorflow compiles for each layer and shape."""
    import tensorflow as tf

    graphs: dict[int, Any] = {}

    def step(limit: Any, losses: Any) -> tuple[Any, Any]:
        def run(losses: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(losses)
                limited = limit(losses, training=True)
            return limited, tape.gradient(limited, losses)

        return graphs.setdefault(id(limit), tf.function(run))(losses)

    return step


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until there are no more."""
    import keras

    from alrc.keras import ALRC

    step = {"jax": step_jax, "torch": step_torch, "tensorflow": step_tensorflow}[keras.backend.backend()]()
    layers: list[Any] = []

    def answer(kind: str, *parts: Any) -> Any:
        if kind == "make":
            rule, dtype = parts
            layers.append(ALRC.from_rule(rule, dtype=dtype))
            return len(layers) - 1
        limit = layers[parts[0]]
        if kind == "step":
            losses = keras.ops.convert_to_tensor(parts[1], dtype=parts[2])
            limited, gradient = step(limit, losses)
            assert keras.backend.standardize_dtype(limited.dtype) == parts[2], limited.dtype
            return [
                np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(part, limit.mean.dtype)))
                for part in (limited, gradient)
            ]
        if kind == "read":
            return [float(keras.ops.convert_to_numpy(part)) for part in (limit.mu1, limit.mu2, limit.limit)]
        return limit.state_dict() if kind == "save" else limit.load_state_dict(parts[1])

    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        try:
            reply = (True, answer(*request))
        except Exception:
            reply = (False, traceback.format_exc())
        pickle.dump(reply, answers)
        answers.flush()


if __name__ == "__main__":
    # What frameworks print must not end up among the answers.
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, channel)
