"""What ALRC costs in a Keras `fit`: a step of LimitedModel over a plain one, beside `global_clipnorm`.

Run with `KERAS_BACKEND=torch python benchmarks/keras_layer.py`, or jax, or tensorflow.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable

import keras
import numpy as np

from alrc.keras import LimitedModel

BATCH, INPUTS, HIDDEN, OUTPUTS = 64, 256, 896, 10
STEPS, ROUNDS = 20, 9


def build_network() -> keras.Model:
    """Return a network of about a million parameters."""
    keras.utils.set_random_seed(0)
    hidden = [keras.layers.Dense(HIDDEN, activation="relu") for _ in range(2)]
    return keras.Sequential([keras.Input((INPUTS,)), *hidden, keras.layers.Dense(OUTPUTS)])


def make_steps(x: np.ndarray, y: np.ndarray) -> dict[str, Callable[[], object]]:
    """Return functions that fit some steps, by name."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    plain, limited, clipped = build_network(), LimitedModel(build_network()), build_network()
    plain.compile(keras.optimizers.Adam(1e-4), loss)
    limited.compile(keras.optimizers.Adam(1e-4), loss)
    clipped.compile(keras.optimizers.Adam(1e-4, global_clipnorm=1.0), loss)
    models = {"plain": plain, "LimitedModel": limited, "global_clipnorm=1.0": clipped}
    return {
        name: lambda model=model: model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
        for name, model in models.items()
    }


def header(parameters: int) -> str:
    """Say what is measured, on what."""
    return (
        f"A step of fit, {parameters:,} parameters, {BATCH} losses\n"
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; "
        f"Keras {keras.version()} on {keras.backend.backend()}, Python {platform.python_version()}\n"
        f"medians over {ROUNDS} alternating rounds of {STEPS} steps, quartiles in brackets"
    )


def main() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(STEPS * BATCH, INPUTS)).astype(np.float32)
    y = rng.integers(0, OUTPUTS, STEPS * BATCH)
    calls = make_steps(x, y)
    print(header(build_network().count_params()))
    for call in calls.values():
        call()
        call()
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            spent[name].append(1e6 * (time.perf_counter() - started) / STEPS)
    plain = np.array(spent["plain"])
    for name, values in spent.items():
        low, middle, high = np.percentile(np.array(values) / plain, [25, 50, 75])
        print(f"{name:<22}{np.median(values):>9.0f} µs  {middle:>5.2f} ({low:.2f}-{high:.2f}) of plain")


if __name__ == "__main__":
    main()
