"""ALRC for JAX: measure the losses, let `alrc.rules` decide, scale their gradients.

A rule here is a constant and its state is data that goes in and comes out, so that every transformation of JAX applies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpy.typing import NDArray

from alrc import rules
from alrc.jax.ops import JAX
from alrc.moments import Moments
from alrc.rules import Batch, Watched
from alrc.rules.presets import Presets

__all__ = ["ALRC", "Telemetry"]


class Telemetry(NamedTuple):
    """Say what happens to some losses, as arrays on their device."""

    limit: Any
    """L_max the losses are held against, 0-d; inf where nothing is limited."""
    scale: Any
    """Gradient factor of every loss, in [0, 1], shape of the losses; 0 where masked or not finite."""
    fraction_limited: Any
    """Share of the finite losses that are limited, 0-d, in [0, 1]."""
    nonfinite: Any
    """Number of losses that are NaN or infinite, 0-d integer; masked ones do not count."""
    nonpositive: Any
    """Number of losses ≤ 0, 0-d integer: a rule that is not `signed` never limits them (S7)."""
    largest: Any
    """Largest finite loss before it is limited, 0-d; -inf if there is none."""


@jax.tree_util.register_static
@dataclass(frozen=True, init=False, repr=False)
class ALRC(Presets):
    """Limit losses to a number of running standard deviations above their running mean.

    Call it on the losses before they are averaged, with the state of the call before. A loss above L_max = mean +
    num_stddev · std gets the value L_max and the gradient (L_max / L) · ∇L; every other loss passes unchanged (SPEC S5,
    S6). Each call learns from its losses: in evaluation do not call it. It holds settings alone, no array: close over
    it, pass it to jit, or make it an attribute of a module. Settings are those of `alrc.torch.ALRC`, in its order.

    Args:
        num_stddev: Standard deviations n above the mean, > 0.
        betas: Decay rates of the running first and second moment, each in [0, 1).
        start: `"auto"` learns the loss scale and its shifts; or raw moments `(mu1, mu2)`, followed as published.
        feed: Which losses the moments see, `"limited"` or `"unlimited"`.
        second_moment: `"elements"` averages squared elements of a batch, `"mean"` squares their mean.
        eps: Added to the variance under the root.
        gain: Factor on both raw moments when the limit is made; 1 except in `ALRC.cifar_scripts`.
        observe: Updates before the first limit when `start="auto"`, 4 to 256.
        signed: Whether losses may be of either sign.
        num_stddev_below: Standard deviations below the mean under which losses are limited too; None for none.
        axis_name: Axis of `shard_map`, `pmap` or `vmap`, or a tuple of them, whose members learn from all their losses
            together (S24). Not for arrays that jit itself shards: they are whole to it.

    Raises:
        ValueError: If a setting is outside its range; the message names the value.

    Example:
        >>> rule = ALRC(start=(1.0, 1.04))
        >>> limited, state = rule(jnp.array([0.5, 2.0, 4.0]), rule.init())
        >>> print(limited, state.count)
        [0.5 1.6 1.6] 1

    References:
        Ede & Beanland 2020, "Adaptive learning rate clipping stabilizes learning", Algorithm 1.
    """

    rule: rules.ALRC = field(init=False)
    """The pure rule."""
    axis_name: str | tuple[str, ...] | None = field(init=False)
    """Mapped axes whose members learn together."""

    def __init__(
        self,
        num_stddev: float = 3.0,
        *,
        betas: tuple[float, float] = (0.999, 0.999),
        start: Literal["auto"] | tuple[float, float] = "auto",
        feed: Literal["limited", "unlimited"] = "limited",
        second_moment: Literal["elements", "mean"] = "elements",
        eps: float = 0.0,
        gain: float = 1.0,
        observe: int = 32,
        signed: bool = False,
        num_stddev_below: float | None = None,
        axis_name: str | Sequence[str] | None = None,
    ) -> None:
        others: dict[str, Any] = {"second_moment": second_moment, "eps": eps, "gain": gain, "observe": observe}
        others |= {"signed": signed, "num_stddev_below": num_stddev_below}
        self._set(rules.ALRC(num_stddev, betas=betas, start=start, feed=feed, **others), axis_name)

    @classmethod
    def from_rule(cls, rule: rules.ALRC, axis_name: str | Sequence[str] | None = None) -> Self:
        """Make what applies a pure rule.

        Args:
            rule: Any `alrc.rules.ALRC`.
            axis_name: Mapped axis, or a tuple of them, whose members learn together.

        Returns:
            The same rule for arrays of JAX.
        """
        made = cls.__new__(cls)
        made._set(rule, axis_name)
        return made

    def init(self, dtype: Any = jnp.float32) -> Any:
        """Return the state before the first loss: a tuple of arrays, a pytree like any other.

        Args:
            dtype: Precision of the moments, float32 or float64; for float64 JAX must be told to have it.

        Returns:
            `alrc.rules.Watched` for an auto start, else `alrc.Moments`; `count` is int32.

        Raises:
            ValueError: If the precision is less than that of float32 (S3), or JAX does not have it.
        """
        return self._as_arrays(self.rule.init(), dtype)

    def __call__(self, losses: Any, state: Any, mask: Any = None, weight: Any = None) -> tuple[Array, Any]:
        """Limit `losses` and learn from them; the same as `apply`."""
        return self.apply(losses, state, mask, weight)

    def apply(self, losses: Any, state: Any, mask: Any = None, weight: Any = None) -> tuple[Array, Any]:
        """Limit `losses` and learn from them.

        Nothing can be looked at under jit, so nothing warns of losses ≤ 0, which are never limited unless `signed`:
        `telemetry` counts them.

        Args:
            losses: Floating-point losses of any shape and dtype: one loss, a batch, or summands such as pixels.
            state: State from `init` or the call before.
            mask: Boolean, broadcasts to `losses`; false where there is no loss (padding). Such elements get value and
                gradient 0, whatever they hold, and are not learned from; if nothing is left the state stays.
            weight: How much each loss counts in the moments, ≥ 0, broadcasts to `losses`. The result is not multiplied.

        Returns:
            Limited losses, same shape and dtype, whose gradient is that of `losses` times the factor of each; and the
            new state, of the shapes and dtypes of the old one, without a gradient.

        Raises:
            TypeError: If `losses` or `weight` is not floating point, `mask` not boolean, or `state` of another kind.
            ValueError: If `mask` or `weight` does not broadcast to `losses`, or the state is that of another rule.
        """
        limited, batch = self.observe(losses, state, mask, weight)
        return limited, self.commit(batch, state)

    def observe(self, losses: Any, state: Any, mask: Any = None, weight: Any = None) -> tuple[Array, Batch]:
        """Limit the losses of one micro-batch, and say what is to be learned from them once all are there (S23).

        Args:
            losses: Floating-point losses of any shape and dtype.
            state: State from `init` or the last `commit`, the same for all micro-batches of an update.
            mask: Boolean, broadcasts to `losses`; false where there is no loss.
            weight: How much each loss counts in the moments, ≥ 0, broadcasts to `losses`.

        Returns:
            Limited losses, and what `commit` takes: 0-d arrays, which `lax.scan` may stack.
        """
        losses = jnp.asarray(losses)
        wide, mask, weight, state = self._checked(losses, state, mask, weight)
        fixed = lax.stop_gradient(wide)
        decision = self.rule.decide(fixed, state, JAX)
        batch = self.rule.measure(fixed, decision, state, JAX, weight)
        return _scaled(wide, decision.limited, decision.scale).astype(losses.dtype), batch

    def commit(self, batch: Batch | Sequence[Batch], state: Any, when: Any = None) -> Any:
        """Return the state after one update, which may have had several micro-batches (S23).

        With an `axis_name`, this is where the members of the axis tell each other what they saw.

        Args:
            batch: What `observe` returned; a sequence of those; or those stacked along a leading axis, as `lax.scan`
                stacks them. k micro-batches equal one batch.
            state: State they were all observed with.
            when: 0-d boolean, such as whether the optimiser made its step; where false the state stays. None is true.

        Returns:
            The new state, of the shapes and dtypes of the old one.

        Raises:
            ValueError: If there is no batch.
        """
        if not isinstance(batch, Batch):
            if not batch:
                raise ValueError("commit needs at least one batch, got an empty sequence; keep the state as it is.")
            batch = Batch.merged(batch, JAX)
        old = self._checked_state(state)
        axes = self.axis_name

        def add_up(sums: Array) -> Array:
            local = jnp.sum(sums, axis=tuple(range(1, sums.ndim)))
            return local if axes is None else lax.psum(local, axes)

        if axes is not None or jnp.ndim(batch.number) > 0:
            batch = batch.joined(add_up, old.mean, JAX)
        new = self.rule.commit(batch, old, JAX, when)
        return type(old)(*(value.astype(was.dtype) for value, was in zip(new, old, strict=True)))

    def limit(self, state: Any) -> Array:
        """Return L_max for the next losses, 0-d; inf while nothing can be limited (S5)."""
        return self.rule.limit(self._checked_state(state), JAX)

    def telemetry(self, losses: Any, state: Any, mask: Any = None) -> Telemetry:
        """Say what happens to losses that are held against a state.

        Pure, like everything here: give it what was given to the call, inside the same jit, where it costs next to
        nothing because the compiler finds most of it there.

        Args:
            losses: Floating-point losses of any shape and dtype.
            state: State before the call, not the one it returned.
            mask: Boolean, broadcasts to `losses`; false where there is no loss.

        Returns:
            The telemetry, without gradients.
        """
        wide, mask, _, state = self._checked(jnp.asarray(losses), state, mask, None)
        wide = lax.stop_gradient(wide)
        _, scale, ceiling, _ = self.rule.decide(wide, state, JAX)
        is_finite = scale > 0
        number = jnp.sum(is_finite)
        masked = 0 if mask is None else jnp.sum(~jnp.broadcast_to(mask, wide.shape))
        return Telemetry(
            limit=jnp.where(ceiling < rules.LARGEST_LOSS, ceiling, jnp.inf),
            scale=scale,
            fraction_limited=jnp.sum((scale < 1) & is_finite).astype(scale.dtype) / jnp.maximum(number, 1),
            nonfinite=wide.size - number - masked,
            nonpositive=jnp.sum((wide <= 0) & is_finite),
            largest=jnp.max(jnp.where(is_finite, wide, -jnp.inf), initial=-jnp.inf),
        )

    def state_dict(self, state: Any) -> dict[str, NDArray[Any]]:
        """Return a state as every framework reads it: a versioned dictionary of numpy arrays (S16)."""
        return self.rule.state_dict(self._checked_state(state))

    def load_state_dict(self, stored: Mapping[str, Any], dtype: Any = jnp.float32) -> Any:
        """Return the state that a dictionary of `state_dict` holds, whichever framework wrote it.

        Args:
            stored: The dictionary; its values may be arrays of any framework that numpy can read.
            dtype: Precision of the moments, float32 or float64.

        Returns:
            The state, as `init` returns it.

        Raises:
            KeyError: If an entry is missing.
            ValueError: If the version, a shape or the precision is not that of this rule, or an entry is unknown.
        """
        return self._as_arrays(self.rule.load_state_dict(stored), dtype)

    def __repr__(self) -> str:
        """Show the settings that differ from the defaults."""
        default = rules.ALRC()
        shown = [f"{name}={value!r}" for name, value in vars(self.rule).items() if value != getattr(default, name)]
        shown += [f"axis_name={self.axis_name!r}"] * (self.axis_name is not None)
        return f"{type(self).__name__}({', '.join(shown)})"

    def _set(self, rule: rules.ALRC, axis_name: str | Sequence[str] | None) -> None:
        """Fill the fields, with nothing in them that could change or has no hash."""
        start = rule.start if isinstance(rule.start, str) else (rule.start[0], rule.start[1])
        object.__setattr__(self, "rule", replace(rule, betas=(rule.betas[0], rule.betas[1]), start=start))
        axes = axis_name if axis_name is None or isinstance(axis_name, str) else tuple(axis_name)
        object.__setattr__(self, "axis_name", axes)

    def _checked(
        self, losses: Array, state: Any, mask: Any, weight: Any
    ) -> tuple[Array, Array | None, Array | None, Any]:
        """Return losses in the precision of the state or better, NaN where masked; mask, weights, fixed state."""
        state = self._checked_state(state)
        if not jnp.issubdtype(losses.dtype, jnp.floating):
            raise TypeError(f"losses must be a floating-point array, got {losses.dtype}; average or cast them first.")
        if mask is not None:
            mask = jnp.asarray(mask)
            if mask.dtype != jnp.bool:
                raise TypeError(
                    f"mask must be a boolean array, got {mask.dtype}; use mask != 0, or weight= for weights."
                )
        if weight is not None:
            weight = lax.stop_gradient(jnp.asarray(weight))
            if not jnp.issubdtype(weight.dtype, jnp.floating):
                raise TypeError(f"weight must be a floating-point array, got {weight.dtype}; use weight.astype(float).")
        for name, part in (("mask", mask), ("weight", weight)):
            if part is not None and not _broadcasts(part.shape, losses.shape):
                raise ValueError(
                    f"{name} of shape {part.shape} does not broadcast to losses of shape {losses.shape}; give it their "
                    "shape, or axes of length 1."
                )
        dtype = max(losses.dtype, state.mean.dtype, key=lambda dtype: dtype.itemsize)
        wide = losses.astype(dtype)
        if mask is not None:
            wide = jnp.where(mask, wide, jnp.nan)
        if weight is not None:
            weight = jnp.broadcast_to(weight.astype(dtype), losses.shape)
        return wide, mask, weight, state

    def _checked_state(self, state: Any) -> Any:
        """Return a state as arrays without gradients, or say why it is none of this rule."""
        wanted = self.rule.init()
        if not isinstance(state, type(wanted)):
            raise TypeError(
                f"state must be the {type(wanted).__name__} that init() of this rule returns, got a "
                f"{type(state).__name__}; restore a checkpoint with init() as its target."
            )
        state = lax.stop_gradient(jax.tree.map(jnp.asarray, state))
        for name, value, like in zip(state._fields, state, wanted, strict=True):
            if value.shape != np.shape(like):
                raise ValueError(
                    f"state.{name} has shape {value.shape}, but one state of this rule has {np.shape(like)}; "
                    "use jax.vmap for several states."
                )
        if state.mean.dtype.itemsize < 4:
            raise ValueError(
                f"the state must be float32 or float64, got {state.mean.dtype}; leave it out when casting others (S3)."
            )
        return state

    @staticmethod
    def _as_arrays(state: Moments | Watched, dtype: Any) -> Any:
        """Return a state of strongly typed arrays of its own."""
        dtype = np.dtype(dtype)
        if dtype not in (np.float32, np.float64):
            raise ValueError(f"dtype must be float32 or float64 whatever that of the losses, got {dtype} (S3).")
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise ValueError("dtype float64 is not there: JAX has it after jax.config.update('jax_enable_x64', True).")
        parts = zip(state._fields, state, strict=True)
        return type(state)(*(jnp.array(value, jnp.int32 if name == "count" else dtype) for name, value in parts))


@jax.custom_jvp
def _scaled(losses: Array, limited: Array, scale: Array) -> Array:
    """Return limited losses, whose derivative is that of the losses times the scale."""
    return limited


@_scaled.defjvp
def _scaled_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    """Scale the tangent; what is not finite may have one of NaN, and 0 · NaN is no 0."""
    losses, _, scale = primals
    # Not `limited`, which is a constant: the value may be differentiated again.
    return _scaled(*primals), scale * jnp.where(jnp.isfinite(losses), tangents[0], 0)


def _broadcasts(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Return whether a shape can be expanded to another."""
    sizes = zip(reversed(shape), reversed(wanted), strict=False)
    return len(shape) <= len(wanted) and all(size in (1, want) for size, want in sizes)
