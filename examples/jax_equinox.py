"""Learn the text of Python's own help with equinox and optax, while some batches hold bytes that are no text.

Each character has a loss of its own. Padding is masked, and an update is made of several micro-batches, which are
observed one by one in a `lax.scan` and committed together. One batch brings a NaN.

    python examples/jax_equinox.py
"""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from alrc.jax import ALRC

STEPS = 300
MICRO, BATCH, LENGTH, CONTEXT = 2, 16, 24, 4
GARBAGE, POISON = (150, 220, 221, 270), 180
"""Steps whose characters are random bytes, and the step that brings a NaN."""


class Reader(eqx.Module):
    """Guess a character from the few before it. The rule is a setting of the model, its state is not."""

    embedding: eqx.nn.Embedding
    layers: eqx.nn.MLP
    rule: ALRC

    def __init__(self, key: jax.Array) -> None:
        one, two = jax.random.split(key)
        self.embedding = eqx.nn.Embedding(256, 16, key=one)
        self.layers = eqx.nn.MLP(CONTEXT * 16, 256, 64, 1, key=two)
        self.rule = ALRC()

    def losses(self, text: jax.Array) -> jax.Array:
        """Return the loss of each character of shape (LENGTH,) after the first few."""
        embedded = jax.vmap(self.embedding)(text)
        before = jnp.stack([embedded[i : LENGTH - CONTEXT + i] for i in range(CONTEXT)], 1)
        guesses = jax.vmap(self.layers)(before.reshape(LENGTH - CONTEXT, -1))
        return optax.softmax_cross_entropy_with_integer_labels(guesses, text[CONTEXT:])


@eqx.filter_jit
def step(model: Reader, moments: Any, state: Any, texts: jax.Array, lengths: jax.Array, poison: jax.Array) -> Any:
    """Make one update of several micro-batches; return what goes into the next step, and the telemetry of the last."""
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def look(gradients: Any, micro: Any) -> Any:
        texts, lengths = micro
        mask = jnp.arange(CONTEXT, LENGTH) < lengths[:, None]

        def objective(params: Any) -> Any:
            model = eqx.combine(params, static)
            losses = jax.vmap(model.losses)(texts) + poison
            limited, batch = model.rule.observe(losses, state, mask)
            return limited.sum() / mask.sum(), (batch, losses, model.rule.telemetry(losses, state, mask))

        (_, seen), gradient = jax.value_and_grad(objective, has_aux=True)(params)
        return jax.tree.map(jnp.add, gradients, gradient), (*seen, mask)

    nothing = jax.tree.map(jnp.zeros_like, params)
    gradients, (seen, losses, told, mask) = lax.scan(look, nothing, (texts, lengths))
    updates, moments = OPTIMIZER.update(gradients, moments, params)
    mean = jnp.sum(losses, where=mask) / mask.sum()
    return eqx.apply_updates(model, updates), moments, model.rule.commit(seen, state), mean, told


OPTIMIZER = optax.adam(3e-3)


def batches() -> Any:
    """Yield characters, shape (MICRO, BATCH, LENGTH), and how many of each row are text."""
    rng = np.random.default_rng(0)
    corpus = np.frombuffer("".join(topics.values()).encode("ascii", "replace"), np.uint8).astype(np.int32)
    for i in range(STEPS):
        starts = rng.integers(0, len(corpus) - LENGTH, (MICRO, BATCH, 1))
        texts = corpus[starts + np.arange(LENGTH)]
        yield (
            rng.integers(128, 256, texts.shape) if i in GARBAGE else texts,
            rng.integers(8, LENGTH + 1, texts.shape[:2]),
        )


def main() -> dict[str, float]:
    """Train, print what is limited, and return what a test looks at."""
    model = Reader(jax.random.key(0))
    moments, state = OPTIMIZER.init(eqx.filter(model, eqx.is_inexact_array)), model.rule.init()
    usual, limited_steps, nonfinite = [], [], 0
    for i, (texts, lengths) in enumerate(batches()):
        poison = jnp.zeros((BATCH, LENGTH - CONTEXT)).at[0, 0].set(jnp.nan if i == POISON else 0)
        model, moments, state, loss, told = step(model, moments, state, texts, lengths, poison)
        nonfinite += int(told.nonfinite.sum())
        share = float(told.fraction_limited.mean())
        if share > 0.3 or told.nonfinite.any():
            limited_steps += [i] if share > 0.3 else []
            print(
                f"step {i:3d}: mean loss {loss:5.2f}, limit {told.limit[0]:.2f}: {share:4.0%} of the characters "
                f"limited, {told.nonfinite.sum()} not finite"
            )
        elif i not in GARBAGE:
            usual.append(float(loss))
    report = {"first_loss": np.mean(usual[:10]), "last_loss": np.mean(usual[-10:])}
    report |= {"mostly_limited": len(limited_steps), "nonfinite": nonfinite, "updates": int(state.count)}
    print(f"loss {report['first_loss']:.2f} -> {report['last_loss']:.2f}; mostly limited: steps {limited_steps}")
    return {name: float(value) for name, value in report.items()}


if __name__ == "__main__":
    main()
