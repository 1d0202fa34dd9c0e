"""Limit loss spikes in a plain Keras `fit`, on text that comes with Python. One line is changed.

A small network learns to guess the next character of Python's documentation. Some batches are broken: their labels are
a character that no text contains. Run with `KERAS_BACKEND=torch python examples/keras_fit.py`, or jax, or tensorflow.
"""

from __future__ import annotations

from pydoc_data.topics import topics

import keras
import numpy as np

from alrc.keras import LimitedModel

CONTEXT, CHARACTERS, BATCH = 8, 96, 64


def read_text(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return windows of characters, shape (number, CONTEXT), and the character after each."""
    text = "".join(topics[name] for name in sorted(topics))[: number + CONTEXT]
    codes = np.clip(np.frombuffer(text.encode("ascii", "replace"), dtype=np.uint8).astype(np.int32) - 31, 0, 94)
    windows = np.lib.stride_tricks.sliding_window_view(codes, CONTEXT + 1)
    return windows[:, :-1], windows[:, -1]


def build_network() -> keras.Model:
    """Return a network that guesses a character from those before it."""
    return keras.Sequential(
        [
            keras.Input((CONTEXT,), dtype="int32"),
            keras.layers.Embedding(CHARACTERS, 16),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(CHARACTERS),
        ]
    )


def main() -> dict[str, float]:
    """Train, and return what a test can check."""
    keras.utils.set_random_seed(0)
    windows, labels = read_text(12_000)
    broken = labels.copy()
    for start in range(100 * BATCH, len(labels), 30 * BATCH):
        broken[start : start + 8] = CHARACTERS - 1  # no text contains it
    model = LimitedModel(build_network())  # the changed line: it was model = build_network()
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    history = model.fit(windows, broken, batch_size=BATCH, epochs=3, shuffle=False, verbose=0).history
    for epoch, (loss, share) in enumerate(zip(history["loss"], history["alrc_limited"], strict=True), start=1):
        print(f"epoch {epoch}: loss {loss:.3f}, {share:.2%} of the losses limited")
    loss, accuracy = model.evaluate(windows, labels, verbose=0)
    limit = float(keras.ops.convert_to_numpy(model.limit.limit))
    print(f"backend {keras.backend.backend()}: losses above {limit:.2f} are limited")
    print(f"on the sound labels: loss {loss:.3f}, accuracy {accuracy:.3f}")
    return {"loss": loss, "accuracy": accuracy, "limit": limit, "limited": history["alrc_limited"][-1]}


if __name__ == "__main__":
    main()
