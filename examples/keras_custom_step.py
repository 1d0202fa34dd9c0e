"""Limit per-character losses in a Keras model that computes its loss itself, on any backend.

The limiter is a layer of the model: Keras compiles it, saves it, restores it. The same network and text as in
`keras_fit.py`; here each text position has a loss, and what comes before a text (padding) is masked.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import keras
import numpy as np
from keras import ops

from alrc.keras import ALRC

LENGTH, CHARACTERS, BATCH = 32, 96, 16


@keras.saving.register_keras_serializable(package="example")
class CharacterModel(keras.Model):
    """Guess every next character of a text."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.embed = keras.layers.Embedding(CHARACTERS, 24)
        self.look_back = keras.layers.Conv1D(64, 8, padding="causal", activation="relu")
        self.guess = keras.layers.Dense(CHARACTERS)
        self.limit = ALRC(name="alrc")

    def call(self, characters: Any) -> Any:
        """Return logits of the next character at every position."""
        return self.guess(self.look_back(self.embed(characters)))

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        """Average the losses of all positions that are not padding, limited while training."""
        losses = keras.losses.sparse_categorical_crossentropy(y, y_pred, from_logits=True)
        is_text = y > 0
        limited = self.limit(losses, mask=is_text, training=training)
        is_text = ops.cast(is_text, limited.dtype)
        return ops.sum(limited * is_text) / ops.maximum(ops.sum(is_text), 1.0)


def read_lines(number: int) -> np.ndarray:
    """Return lines of text as codes from 1, padded with 0 in front; shape (number, LENGTH + 1)."""
    lines = [line.strip() for name in sorted(topics) for line in topics[name].splitlines()]
    lines = [line[: LENGTH + 1].encode("ascii", "replace") for line in lines if len(line) > LENGTH // 2][:number]
    codes = np.zeros((len(lines), LENGTH + 1), dtype=np.int32)
    for row, line in zip(codes, lines, strict=True):
        row[len(row) - len(line) :] = np.clip(np.frombuffer(line, dtype=np.uint8).astype(np.int32) - 31, 1, 94)
    return codes


def main() -> dict[str, float]:
    """Train, save, load, go on, and return what a test can check."""
    keras.utils.set_random_seed(0)
    codes = read_lines(1200)
    x, y = codes[:, :-1], codes[:, 1:].copy()
    y[900 :: 5 * BATCH, -6:] = CHARACTERS - 1  # a broken record: no text contains this character
    model = CharacterModel()
    model.compile("adam")
    first = model.fit(x, y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0).history["loss"]
    limit = float(ops.convert_to_numpy(model.limit.limit))
    print(f"after 2 epochs: loss {first[-1]:.3f}, losses above {limit:.2f} are limited")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.keras")
        model.save(file)
        model = keras.models.load_model(file)
    restored = float(ops.convert_to_numpy(model.limit.limit))
    last = model.fit(x, y, batch_size=BATCH, epochs=1, shuffle=False, verbose=0).history["loss"]
    count = int(ops.convert_to_numpy(model.limit.count.value))
    print(
        f"loaded again: limit {restored:.2f}; after one more epoch: loss {last[-1]:.3f}, {count} updates learned from"
    )
    return {"first": first[0], "last": last[-1], "limit": limit, "restored": restored, "count": count}


if __name__ == "__main__":
    main()
