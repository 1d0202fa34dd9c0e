"""The rules as optax transformations: `scale_by_alrc` limits by the loss, `clip_by` by a gradient rule of `alrc.rules`.

Both measure, let a rule decide, and scale updates. What was decided stands in the optimiser's state. No arithmetic of a
rule in here, and no other framework.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.tree_util import keystr, tree_flatten_with_path

from alrc import rules
from alrc.jax.ops import JAX
from alrc.rules.gradient import GradientDecision, GradientRule, UnitNorms

__all__ = ["ClipState", "ScaleByALRCState", "clip_by", "scale_by_alrc"]


class ScaleByALRCState(NamedTuple):
    """Hold what `scale_by_alrc` has learned, and what it did last; `optax.tree_utils.tree_get` finds each by name."""

    moments: Any
    """State of the rule: float32 or better, `count` int32."""
    limit: Array
    """What the last loss was held against, 0-d; inf where there was no limit."""
    scale: Array
    """Factor that the last updates were multiplied by, 0-d, in [0, 1]; 0 where the loss was not finite."""


class ClipState(NamedTuple):
    """Hold what `clip_by` has learned, and what it did last; `optax.tree_utils.tree_get` finds each by name."""

    memory: Any
    """State of the rule, float32 or better; None for a rule without memory."""
    norm: Array
    """Norm of all updates before limiting, 0-d; of the order the rule measures with, so the largest |g| for Value."""
    threshold: Array
    """What each magnitude was held against, inf where there was no limit: 0-d, or one for each parameter or unit."""
    fraction_limited: Array
    """Share of the finite magnitudes that were limited, 0-d, in [0, 1]. For Value, of the parameters."""


def scale_by_alrc(
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
    rule: rules.ALRC | None = None,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Scale updates by what ALRC decides on the loss they come from: `update(updates, state, params, value=loss)`.

    For a scalar loss this is the gradient of the limited loss. Put it first in a chain, before anything with a memory.
    Where the loss is not finite, updates become 0 by a select; updates that are not finite though the loss is stay so,
    for a guard around the chain to see. Settings are those of `alrc.rules.ALRC`, static: no schedules.

    Args:
        num_stddev: Standard deviations n above the mean, > 0.
        betas: Decay rates of the running first and second moment, each in [0, 1).
        start: `"auto"` learns the loss scale and its shifts; or raw moments `(mu1, mu2)`, followed as published.
        feed: Which losses the moments see, `"limited"` or `"unlimited"`.
        second_moment: `"elements"` averages squared elements of a batch, `"mean"` squares their mean.
        eps: Added to the variance under the root.
        gain: Factor on both raw moments when the limit is made.
        observe: Updates before the first limit when `start="auto"`, 4 to 256.
        signed: Whether losses may be of either sign.
        num_stddev_below: Standard deviations below the mean under which losses are limited too; None for none.
        rule: A ready rule, such as `alrc.rules.ALRC.paper()`, instead of the settings above.
        axis_name: Mapped axis, or axes, over whose devices the loss is averaged before the one decision for all.

    Returns:
        The transformation; its state is a `ScaleByALRCState`.
    """
    settings: dict[str, Any] = {"num_stddev": num_stddev, "betas": betas, "start": start, "feed": feed, "eps": eps}
    settings |= {"second_moment": second_moment, "gain": gain, "observe": observe, "signed": signed}
    settings["num_stddev_below"] = num_stddev_below
    for name, setting in settings.items():
        if isinstance(setting, Array):
            raise TypeError(
                f"{name} must be a Python number, got {setting!r:.80}; with optax.inject_hyperparams name it in "
                "static_args."
            )
    made = rules.ALRC(**settings)
    if rule is not None and made != rules.ALRC():
        raise ValueError(f"give either settings or a ready rule, got {made!r} and rule={rule!r}.")
    applied = made if rule is None else rule

    def init(params: optax.Params) -> ScaleByALRCState:
        dtype = real_dtype(jax.tree.leaves(params))
        return ScaleByALRCState(arrays_of(applied.init(), dtype), jnp.full((), math.inf, dtype), jnp.ones((), dtype))

    def update(
        updates: optax.Updates, state: Any, params: Any = None, *, value: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, ScaleByALRCState]:
        loss = loss_of(value, state.limit.dtype, "scale_by_alrc", axis_name)
        decision = applied.decide(loss, state.moments, JAX)
        moments = applied.update(loss, decision, state.moments, JAX)
        scale = decision.scale
        # 0 · NaN would be NaN.
        scaled = jax.tree.map(lambda update: jnp.where(scale > 0, _times(update, scale), 0), updates)
        return scaled, like(ScaleByALRCState(moments, applied.limit(state.moments, JAX), scale), state)

    return optax.GradientTransformationExtraArgs(init, update)


def clip_by(rule: GradientRule) -> optax.GradientTransformationExtraArgs:
    """Limit updates by a gradient rule.

    Equals `optax.clip`, `optax.clip_by_global_norm` and `optax.adaptive_grad_clip` on finite gradients, up to rounding;
    half precision is measured and multiplied in float32 and rounded once. Updates whose magnitude is not finite keep
    the factor 1 and never enter a state, where those of optax turn all others into NaN: a guard around it sees them.

    `AGC` needs `params=` and has optax's units: an array with at most one axis longer than 1 is one unit; of 2 or 3
    axes the first is summed over, of more all but the last. Names for its `exclude` are the keys of the path to a leaf
    joined by dots, such as `"params.head.kernel"`; patterns as in `"*.head.*"`.

    Args:
        rule: A rule of `alrc.rules`: `Value`, `Norm`, `AGC`, `AutoClip`, `ZClip` or your own `GradientRule`.

    Returns:
        The transformation; its state is a `ClipState`. `init` raises ValueError where an excluded name fits no leaf.

    Example:
        >>> transform = clip_by(rules.Norm(1.0))
        >>> gradient = jnp.array([3.0, 4.0])
        >>> updates, state = transform.update(gradient, transform.init(gradient))
        >>> print(updates, optax.tree_utils.tree_get(state, "norm"))
        [0.6 0.8] 5.0
    """
    if not isinstance(rule, GradientRule):
        raise TypeError(f"rule must be a gradient rule such as alrc.rules.Norm(1.0), got {rule!r}.")
    measure = rule.measures
    take = _GRANULARITIES[measure.granularity]

    def init(params: optax.Params) -> ClipState:
        leaves, names, _ = _flat(params)
        kept = [leaf for leaf, is_out in zip(leaves, _excluded(measure.exclude, names), strict=True) if not is_out]
        dtype = real_dtype(leaves)
        memory = rule.init(len(kept) if measure.granularity == "parameter" else None)
        number = {"global": (), "unit": (sum(math.prod(_unit_shape(jnp.shape(leaf))) for leaf in kept),)}
        threshold = jnp.full(number.get(measure.granularity, (len(kept),)), math.inf, dtype)
        return ClipState(arrays_of(memory, dtype), jnp.zeros((), dtype), threshold, jnp.zeros((), dtype))

    def update(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, ClipState]:
        leaves, names, treedef = _flat(updates)
        is_out = _excluded(measure.exclude, names)
        places = [place for place, out in enumerate(is_out) if not out]
        if not places:
            return updates, state
        dtype = state.norm.dtype
        weights: list[Any] = []
        if measure.weights:
            if params is None:
                raise ValueError(f"{rule!r} measures the weights too: call update(updates, state, params).")
            flat = treedef.flatten_up_to(params)
            weights = [flat[place] for place in places]
        taken = take([leaves[place] for place in places], weights, measure.norm_type, dtype)
        decision = rule.decide(taken.magnitudes, state.memory, JAX)
        memory = rule.update(taken.magnitudes, decision, state.memory, JAX)
        after = list(leaves)
        for place, limited in zip(places, taken.scaled(decision), strict=True):
            after[place] = limited
        powers = [taken.power]
        powers += [_power(leaf, measure.norm_type, dtype) for leaf, out in zip(leaves, is_out, strict=True) if out]
        seen = taken.magnitudes.gradient if measure.weights else taken.magnitudes
        number = jnp.maximum(jnp.sum(jnp.isfinite(seen)), 1)
        now = ClipState(
            memory=memory,
            norm=_root(_together(powers, measure.norm_type), measure.norm_type),
            threshold=jnp.broadcast_to(decision.threshold, state.threshold.shape),
            fraction_limited=jnp.sum(decision.scale < 1) / number,
        )
        return treedef.unflatten(after), like(now, state)

    return optax.GradientTransformationExtraArgs(init, update)


def loss_of(value: Any, dtype: Any, user: str, axis_name: Any) -> Array:
    """Return the loss that came with the updates, averaged over the axis; refuse what is no loss."""
    if value is None:
        raise TypeError(f"{user} needs the loss: call update(updates, state, params, value=loss).")
    loss = jnp.asarray(value)
    if loss.ndim:
        raise ValueError(
            f"value must be a scalar loss, got shape {loss.shape}; pass its mean, or limit the losses themselves with "
            "alrc.jax.ALRC."
        )
    loss = lax.stop_gradient(loss).astype(jnp.promote_types(loss.dtype, dtype))
    return loss if axis_name is None else lax.pmean(loss, axis_name)


def norm_of(updates: Any, dtype: Any) -> Array:
    """Return the Euclidean norm of all updates together, 0-d."""
    powers = [_power(leaf, 2.0, dtype) for leaf in jax.tree.leaves(updates)]
    return _root(_together(powers or [jnp.zeros((), dtype)], 2.0), 2.0)


def real_dtype(leaves: Sequence[Any]) -> Any:
    """Return the dtype that norms and moments have beside these arrays: float32, or float64 if one of them is."""
    is_double = any(jnp.result_type(leaf) in (jnp.float64, jnp.complex128) for leaf in leaves)
    return jnp.dtype(jnp.float64 if is_double else jnp.float32)


def arrays_of(state: Any, dtype: Any) -> Any:
    """Return the state of a rule as arrays: whole numbers int32, all others of `dtype`."""
    return jax.tree.map(lambda x: jnp.array(x, jnp.int32 if jnp.result_type(x).kind in "iu" else dtype), state)


def like(state: Any, old: Any) -> Any:
    """Return a state in the dtypes of the one before, none of them weak: or step 2 would be compiled again."""
    return jax.tree.map(lambda new, x: jnp.asarray(new, x.dtype), state, old)


class _Taken(NamedTuple):
    """Hold what was measured, and the way to scale what it was measured on."""

    magnitudes: Any
    """What the rule is asked about."""
    power: Array
    """Sum of |g|ᵖ over all of it, or the largest |g|; 0-d."""
    scaled: Callable[[GradientDecision], list[Any]]
    """Returns the updates as the rule decided."""


def _take_global(updates: list[Any], weights: list[Any], norm_type: float, dtype: Any) -> _Taken:
    """Measure one norm over all updates."""
    power = _together([_power(update, norm_type, dtype) for update in updates], norm_type)
    return _Taken(
        _root(power, norm_type), power, lambda decision: [_times(update, decision.scale) for update in updates]
    )


def _take_parameters(updates: list[Any], weights: list[Any], norm_type: float, dtype: Any) -> _Taken:
    """Measure the norm of each array."""
    powers = jnp.stack([_power(update, norm_type, dtype) for update in updates])

    def scaled(decision: GradientDecision) -> list[Any]:
        return [_times(update, factor) for update, factor in zip(updates, decision.scale, strict=True)]

    return _Taken(_root(powers, norm_type), _together([powers], norm_type), scaled)


def _take_elements(updates: list[Any], weights: list[Any], norm_type: float, dtype: Any) -> _Taken:
    """Measure the largest element of each array, which shares its threshold with all the others."""
    taken = _take_parameters(updates, weights, math.inf, dtype)

    def scaled(decision: GradientDecision) -> list[Any]:
        # |g| · threshold / |g|, without the division. Arrays that are not finite stay as they are.
        bounds = jnp.where(taken.magnitudes < math.inf, decision.threshold, math.inf)
        rounded = [bound.astype(update.dtype) for update, bound in zip(updates, bounds, strict=True)]
        return [jnp.clip(update, -bound, bound) for update, bound in zip(updates, rounded, strict=True)]

    return taken._replace(scaled=scaled)


def _take_units(updates: list[Any], weights: list[Any], norm_type: float, dtype: Any) -> _Taken:
    """Measure the norms of each output unit's update and weights."""
    shapes = [_unit_shape(update.shape) for update in updates]

    def powers_of(arrays: list[Any]) -> Array:
        powers = [_power(x, norm_type, dtype, _summed(x.shape)) for x in arrays]
        return jnp.concatenate([power.reshape(-1) for power in powers])

    # Else XLA would sum the squares twice, for the units and for all of them, and write them to memory for that.
    powers = lax.optimization_barrier(powers_of(updates))

    def scaled(decision: GradientDecision) -> list[Any]:
        ends = [sum(math.prod(shape) for shape in shapes[: i + 1]) for i in range(len(shapes) - 1)]
        factors = jnp.split(decision.scale, ends)
        return [
            _times(update, factor.reshape(shape))
            for update, factor, shape in zip(updates, factors, shapes, strict=True)
        ]

    norms = UnitNorms(_root(powers, norm_type), _root(powers_of(weights), norm_type))
    return _Taken(norms, _together([powers], norm_type), scaled)


_GRANULARITIES = {
    "global": _take_global,
    "parameter": _take_parameters,
    "element": _take_elements,
    "unit": _take_units,
}
"""How to measure, by what `alrc.rules.Measure` says."""


def _times(update: Any, factor: Any) -> Any:
    """Return an array times a factor: multiplied in the better precision of both, rounded once."""
    return (update.astype(jnp.promote_types(update.dtype, factor.dtype)) * factor).astype(update.dtype)


def _power(x: Any, norm_type: float, dtype: Any, axes: tuple[int, ...] | None = None) -> Array:
    """Return Σ |x|ᵖ, or the largest |x|; reduced axes are kept where axes are given."""
    # Else XLA shares the squares of these with an optimiser that needs squares too, for which it writes them to memory:
    # that takes longer than all the rest of a step.
    size = jnp.abs(lax.optimization_barrier(x)).astype(dtype)
    is_kept = axes is not None
    if norm_type == math.inf:
        return jnp.max(size, axis=axes, initial=0.0, keepdims=is_kept)
    power = size * size if norm_type == 2 else size**norm_type
    return jnp.sum(power, axis=axes, keepdims=is_kept)


def _together(powers: list[Array], norm_type: float) -> Array:
    """Return the power of everything whose parts have these, 0-d."""
    flat = jnp.concatenate([power.reshape(-1) for power in powers])
    return jnp.max(flat, initial=0.0) if norm_type == math.inf else jnp.sum(flat)


def _root(power: Array, norm_type: float) -> Array:
    """Return the norm that has this power."""
    if norm_type == math.inf:
        return power
    return jnp.sqrt(power) if norm_type == 2 else power ** (1 / norm_type)


def _summed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the axes along which a unit lies, those of `optax.adaptive_grad_clip`."""
    if sum(size != 1 for size in shape) < 2:
        return tuple(range(len(shape)))
    return (0,) if len(shape) < 4 else tuple(range(len(shape) - 1))


def _unit_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of what there is one of for each unit."""
    summed = _summed(shape)
    return tuple(1 if axis in summed else size for axis, size in enumerate(shape))


def _flat(tree: Any) -> tuple[list[Any], list[str], Any]:
    """Return leaves, their names and the structure of a pytree."""
    entries, treedef = tree_flatten_with_path(tree)
    names = [keystr(path, simple=True, separator=".") for path, _ in entries]
    return [jnp.asarray(leaf) for _, leaf in entries], names, treedef


def _excluded(patterns: tuple[str, ...], names: list[str]) -> list[bool]:
    """Tell of each leaf whether a rule leaves it alone."""
    for pattern in patterns:
        if names and not any(name == pattern or fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"exclude has '{pattern}', which fits none of the {len(names)} leaves, such as '{names[0]}'; names are "
                "the keys of the path joined by dots."
            )
    return [any(name == pattern or fnmatchcase(name, pattern) for pattern in patterns) for name in names]
