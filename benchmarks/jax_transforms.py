"""What the optax transformations cost under jit: ours beside optax's own, alone and inside a whole step of Adam.

Gradients have the shapes of a transformer, and nothing is limited or skipped, as in most steps of a training. Arrays
are float32, states are donated. Run with `python benchmarks/jax_transforms.py [1M|25M]`; takes a minute or two.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alrc.jax import ALRC
from alrc.jax.guard import guard_steps
from alrc.jax.transforms import clip_by, scale_by_alrc
from alrc.rules import AGC, AutoClip, Norm, SkipStep, Value, ZClip
from side_by_side import describe_ratio, header, time_rounds

SIZES = {"1M": (128, 4, 1500), "25M": (512, 7, 6000)}
"""Width, layers and vocabulary of a transformer of about that many parameters."""
REFERENCE = "optax.clip_by_global_norm"
BESIDE = {"clip_by(AGC)": "optax.adaptive_grad_clip", "guard_steps": "optax.apply_if_finite"}
BESIDE |= {"guard_steps(SkipStep)": "optax.apply_if_finite"}


def make_tree(width: int, layers: int, vocabulary: int, size: float) -> dict[str, Any]:
    """Make arrays of the shapes of a transformer's weights, normal numbers of the given size."""
    shapes: dict[str, tuple[int, ...]] = {"embedding": (vocabulary, width), "norm": (width,)}
    for layer in range(layers):
        for name, columns in {"qkv": 3 * width, "out": width, "up": 4 * width}.items():
            shapes |= {f"{layer}_{name}_kernel": (width, columns), f"{layer}_{name}_bias": (columns,)}
        shapes |= {f"{layer}_down_kernel": (4 * width, width), f"{layer}_down_bias": (width,)}
        shapes |= {f"{layer}_norm{i}_{kind}": (width,) for i in (1, 2) for kind in ("scale", "bias")}
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(size * rng.standard_normal(shape, np.float32)) for name, shape in shapes.items()}


def transformations() -> dict[str, Any]:
    """Return what is put before Adam; limits are so high that nothing is limited."""
    return {
        REFERENCE: optax.clip_by_global_norm(1e6),
        "optax.adaptive_grad_clip": optax.adaptive_grad_clip(1e3),
        "scale_by_alrc": scale_by_alrc(),
        "clip_by(Norm)": clip_by(Norm(1e6)),
        "clip_by(Norm, each)": clip_by(Norm(1e6, scope="parameter")),
        "clip_by(Value)": clip_by(Value(1e6)),
        "clip_by(AGC)": clip_by(AGC(1e3)),
        "clip_by(AutoClip)": clip_by(AutoClip(100.0)),
        "clip_by(ZClip)": clip_by(ZClip(max_norm=None)),
    }


def repeated(step: Callable[..., Any], carry: Any, *rest: Any) -> Callable[[], None]:
    """Compile a step that takes and returns a carry, and return a call of it that waits for the result."""
    compiled = jax.jit(step, donate_argnums=0)
    held = [jax.block_until_ready(compiled(jax.tree.map(jnp.copy, carry), *rest))]

    def call() -> None:
        held[0] = jax.block_until_ready(compiled(held[0], *rest))

    return call


def alone(transform: Any, weights: Any, gradients: Any) -> Callable[[], None]:
    """Return a call of a transformation, whose updates take the place of old ones."""
    extended = optax.with_extra_args_support(transform)

    def step(carry: Any, gradients: Any, weights: Any, loss: Any) -> Any:
        return extended.update(gradients, carry[1], weights, value=loss)

    return repeated(step, (gradients, extended.init(weights)), gradients, weights, jnp.float32(1.0))


def whole(optimizer: Any, weights: Any, gradients: Any) -> Callable[[], None]:
    """Return a call of a whole step of an optimiser."""
    extended = optax.with_extra_args_support(optimizer)

    def step(carry: Any, gradients: Any, loss: Any) -> Any:
        weights, state = carry
        updates, state = extended.update(gradients, state, weights, value=loss)
        return optax.apply_updates(weights, updates), state

    return repeated(step, (weights, extended.init(weights)), gradients, jnp.float32(1.0))


def loss_form() -> dict[str, Callable[[], None]]:
    """Return calls that differentiate the mean of 64 losses, with and without a limit on them."""
    rule = ALRC()
    losses = jnp.asarray(np.random.default_rng(0).uniform(1, 2, 64), jnp.float32)

    def limited(losses: Any, state: Any) -> Any:
        values, state = rule(losses, state)
        return values.mean(), state

    def step(carry: Any, losses: Any) -> Any:
        (_, state), gradient = jax.value_and_grad(limited, has_aux=True)(losses, carry[0])
        return state, gradient

    def plain(carry: Any, losses: Any) -> Any:
        return carry[0] + 1, jax.grad(jnp.mean)(losses)

    return {
        "mean of 64 losses": repeated(plain, (jnp.zeros(()), losses), losses),
        "alrc.jax.ALRC, 64 losses": repeated(step, (rule.init(), losses), losses),
    }


def show(title: str, spent: dict[str, np.ndarray], reference: str, base: str | None = None) -> None:
    """Print times, and ratios to the reference and to what each stands beside; times of the base are taken off."""
    off = spent[base] if base else np.zeros(1)
    print(f"\n{title}\n{'':<28} {'time':>12}   / {reference}")
    for name, times in spent.items():
        peer = BESIDE.get(name)
        beside = f"   {describe_ratio(times / spent[peer])} of {peer}" if peer else ""
        extra = f" {np.median(times - off) / 1000:>+9.3f} ms" if base else ""
        ratio = describe_ratio(times / spent[reference])
        print(f"{name:<28} {np.median(times) / 1000:>9.3f} ms{extra} {ratio:>20}{beside}")


def main(*sizes: str) -> None:
    print(
        f"{header('Cost of the optax transformations, jit, float32')}; jax {jax.__version__}, optax {optax.__version__}"
    )
    for size in sizes or tuple(SIZES):
        weights, gradients = (make_tree(*SIZES[size], size=scale) for scale in (0.02, 1e-4))
        number = sum(weight.size for weight in weights.values())
        settings: dict[str, Any] = {"rounds": 7 if number > 5e6 else 11, "round_s": 0.2 if number > 5e6 else 0.05}
        before, adam = transformations(), optax.adam(1e-3)
        calls = {name: alone(transform, weights, gradients) for name, transform in before.items()}
        show(f"{number:,} parameters, the transformation alone", time_rounds(calls, **settings), REFERENCE)
        optimizers = {"optax.adam": adam}
        optimizers |= {name: optax.chain(transform, adam) for name, transform in before.items()}
        optimizers |= {
            "optax.apply_if_finite": optax.apply_if_finite(adam, 20),
            "guard_steps": guard_steps(adam),
            "guard_steps(SkipStep)": guard_steps(adam, SkipStep()),
        }
        calls = {name: whole(optimizer, weights, gradients) for name, optimizer in optimizers.items()}
        spent = time_rounds(calls, **settings)
        show(f"{number:,} parameters, a whole step of Adam", spent, "optax.adam", base="optax.adam")
    show("The loss form", time_rounds(loss_form()), "mean of 64 losses", base="mean of 64 losses")


if __name__ == "__main__":
    main(*sys.argv[1:])
