"""Sharpen photographs with flax nnx and optax, while some batches come in with pixels from 0 to 255 instead of 0 to 1.

`ALRC` gives each example's loss that is far too large the value of a limit, and its gradient the matching factor. Three
lines of the training step are about it: the call, the state that is handed back, and what is printed.

    python examples/jax_flax.py
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from skimage import data

from alrc.jax import ALRC, Telemetry

STEPS = 200
BATCH = 32
SIZE = 16
BAD = (80, 120, 121, 170)
"""Steps whose images somebody forgot to divide by 255."""


class Sharpener(nnx.Module):
    """Add what a blurred patch lacks: two small convolutions."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.inner = nnx.Conv(1, 8, (5, 5), rngs=rngs)
        self.outer = nnx.Conv(8, 1, (5, 5), rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return sharper images of the same shape."""
        return images + self.outer(nnx.relu(self.inner(images)))


def make_step(rule: ALRC) -> Any:
    """Return a compiled training step that carries the state of the rule beside the model."""

    @nnx.jit
    def step(
        model: Sharpener, optimizer: nnx.Optimizer, state: Any, blurred: jax.Array, sharp: jax.Array
    ) -> tuple[Any, jax.Array, Telemetry]:
        def objective(model: Sharpener) -> tuple[jax.Array, tuple[Any, jax.Array]]:
            losses = jnp.mean((model(blurred) - sharp) ** 2, axis=(1, 2, 3))  # one for each image
            limited, after = rule(losses, state)
            return limited.mean(), (after, losses)

        (_, (after, losses)), gradient = nnx.value_and_grad(objective, has_aux=True)(model)
        optimizer.update(model, gradient)
        return after, losses, rule.telemetry(losses, state)

    return step


def batches() -> Any:
    """Yield patches of a photograph, blurred and sharp, shape (BATCH, SIZE, SIZE, 1); some in the wrong unit."""
    rng = np.random.default_rng(0)
    photograph = data.camera().astype(np.float32) / 255
    blurred = sum(np.roll(photograph, shift, (0, 1)) for shift in [(0, 0), (0, 1), (1, 0), (1, 1)]) / 4
    for i in range(STEPS):
        corners = rng.integers(1, len(photograph) - SIZE, (BATCH, 2))
        pair = [
            np.stack([image[y : y + SIZE, x : x + SIZE, None] for y, x in corners]) for image in (blurred, photograph)
        ]
        yield [255 * images for images in pair] if i in BAD else pair


def main() -> dict[str, float]:
    """Train, print what is limited, and return what a test looks at."""
    rule = ALRC()
    state = rule.init()
    model = Sharpener(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    step, usual, limited_steps = make_step(rule), [], []
    for i, (blurred, sharp) in enumerate(batches()):
        state, losses, told = step(model, optimizer, state, blurred, sharp)
        if told.fraction_limited > 0.5:
            limited_steps.append(i)
            print(
                f"step {i:3d}: losses up to {told.largest:8.3g}, limit {told.limit:.3g}: {told.fraction_limited:4.0%} "
                f"limited, gradients of the largest times {told.scale.min():.1e}"
            )
        elif i not in BAD:
            usual.append(float(losses.mean()))
    report = {
        "first_loss": np.mean(usual[:10]),
        "last_loss": np.mean(usual[-10:]),
        "mostly_limited": len(limited_steps),
    }
    print(f"loss {report['first_loss']:.2e} -> {report['last_loss']:.2e}; mostly limited: steps {limited_steps}")
    return {name: float(value) for name, value in report.items()}


if __name__ == "__main__":
    main()
