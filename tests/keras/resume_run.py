"""Fit a model for some epochs, after loading it or before saving it, in a process of its own.

Started by test_keras_saving.py: `python resume_run.py FILE EPOCHS load|make`; prints what the test compares.
"""

from __future__ import annotations

import sys

import keras
import numpy as np

from alrc.keras import ALRC, LimitedModel


def data() -> tuple[np.ndarray, list[np.ndarray]]:
    """Return inputs and the targets of two outputs, with a spike in every epoch."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(50, 4)).astype(np.float32)
    y = (x @ np.ones((4, 1)) + 0.1 * rng.normal(size=(50, 1))).astype(np.float32)
    y[[2, 30]] += 40  # one right after the load
    return x, [y, rng.integers(0, 3, (50, 1))]


def make() -> keras.Model:
    """Return a compiled model with two limited losses."""
    keras.utils.set_random_seed(5)
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(8, activation="tanh")(inputs)
    # Named against the alphabet: what is stored by place instead of name is mixed up.
    heads = [keras.layers.Dense(1, name="z")(hidden), keras.layers.Dense(3, activation="softmax", name="b")(hidden)]
    model = LimitedModel(keras.Model(inputs, heads), {"z": ALRC(start=(1.0, 2.0)), "b": ALRC(observe=4)})
    model.compile("adam", ["mse", "sparse_categorical_crossentropy"], metrics=[["mae"], None])
    return model


def fit(model: keras.Model, epochs: int) -> list[dict[str, float]]:
    """Fit and return what the logs say of each epoch."""
    x, y = data()
    history = model.fit(x, y, batch_size=8, epochs=epochs, shuffle=False, verbose=0).history
    return [{name: float(values[i]) for name, values in history.items()} for i in range(epochs)]


def facts(model: keras.Model) -> dict[str, np.ndarray]:
    """Return every weight and every limiter's state."""
    found = {f"weight {i}": value for i, value in enumerate(model.get_weights())}
    for output, layer in model.limits.items():
        found |= {f"{output} {name}": value for name, value in layer.state_dict().items()}
    return found


if __name__ == "__main__":
    file, answer = sys.argv[1:]
    loaded = keras.models.load_model(file)
    logs = fit(loaded, 1)
    np.savez(answer, **facts(loaded), loss=np.array([logs[0]["loss"]]), limited=np.array([logs[0]["z_alrc_limited"]]))
