"""The step guard for optax: make an update, or leave weights and optimiser as if it had never been tried.

A compiled step cannot raise, so skips are counted and their evidence is kept in the optimiser's state;
`raise_if_too_many_skips` looks at it from outside. Imports no other framework.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from alrc.jax.ops import JAX
from alrc.jax.transforms import arrays_of, like, loss_of, norm_of, real_dtype
from alrc.rules.skips import SkippedStep, TooManySkips
from alrc.rules.step import SkipStep

__all__ = ["GuardState", "SkipEvidence", "guard_steps", "raise_if_too_many_skips"]


class SkipEvidence(NamedTuple):
    """Hold what is known of the updates of the last streak of skips; arrays of shape (max_consecutive_skips,)."""

    steps: Array
    """Number of each update, int32."""
    losses: Array
    """Their losses; NaN where none was given."""
    norms: Array
    """Their gradient norms."""


class GuardState(NamedTuple):
    """Hold the state of the guarded optimiser and what the guard knows; all arrays, for any checkpoint.

    `optax.tree_utils.tree_get(state, "is_skipped")` finds each field by its name.
    """

    inner_state: Any
    """State of the guarded optimiser."""
    history: Any
    """State of the rule; None without one."""
    is_skipped: Array
    """Whether the last update was skipped, boolean."""
    gradient_norm: Array
    """Norm of its gradients as they came, float32 or better; inf where it overflows."""
    consecutive: Array
    """Number of updates skipped in a row, the last included; 0 if it was made. int32, as all counters."""
    longest: Array
    """The largest that `consecutive` has been."""
    total_skipped: Array
    """Number of updates skipped so far."""
    step: Array
    """Number of updates judged so far."""
    evidence: SkipEvidence
    """The streak that first spent the budget; until there is one, the last."""


def guard_steps(
    inner: optax.GradientTransformation,
    rule: SkipStep | None = None,
    *,
    max_consecutive_skips: int | None = 20,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Make an update of a whole optimiser only if its gradients are finite and a rule does not reject it.

    A skipped update leaves weights and `inner`'s state bit for bit, ALRC's moments in it included. When the budget is
    spent it goes on skipping: nothing that is not finite ever gets through, and `raise_if_too_many_skips`, called
    outside of jit, says so. Wrap everything with a memory, `optax.MultiSteps` too: an accumulator keeps a NaN for good.

    Skipping is a `lax.cond`: on a CPU a step with a select after it takes a third to two thirds longer, for it must
    copy the old state. Under `vmap` it becomes a select by itself.

    Args:
        inner: The optimiser; `value=` and all other extra arguments are handed on to it.
        rule: Judges the gradient norm, and the loss if `update` is given `value=` (in every step, or in none). None
            only asks whether the square of the norm is finite.
        max_consecutive_skips: Skipped updates in a row that are too many; None for no such budget.
        axis_name: Mapped axis, or axes, over whose devices loss and norm are averaged, where they differ.

    Returns:
        The transformation; its state is a `GuardState`.

    Example:
        >>> guarded, weight = guard_steps(optax.adam(0.1)), jnp.ones(2)
        >>> updates, state = guarded.update(jnp.array([1.0, jnp.nan]), guarded.init(weight), weight)
        >>> print(optax.apply_updates(weight, updates), state.is_skipped)
        [1. 1.] True
    """
    if max_consecutive_skips is not None and (max_consecutive_skips < 1 or max_consecutive_skips % 1):
        raise ValueError(f"max_consecutive_skips must be a whole number ≥ 1, or None, got {max_consecutive_skips}.")
    budget = int(max_consecutive_skips or 0)
    extended = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> GuardState:
        dtype = real_dtype(jax.tree.leaves(params))
        zero = jnp.zeros((), jnp.int32)
        return GuardState(
            inner_state=extended.init(params),
            history=None if rule is None else arrays_of(rule.init(), dtype),
            is_skipped=jnp.zeros((), bool),
            gradient_norm=jnp.zeros((), dtype),
            consecutive=zero,
            longest=zero,
            total_skipped=zero,
            step=zero,
            evidence=SkipEvidence(jnp.zeros(budget, jnp.int32), jnp.zeros(budget, dtype), jnp.zeros(budget, dtype)),
        )

    def update(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, GuardState]:
        dtype = state.gradient_norm.dtype
        norm = norm_of(updates, dtype)
        if axis_name is not None:
            norm = lax.pmean(norm, axis_name)
        value = extra_args.get("value")
        loss = None if value is None else loss_of(value, dtype, "guard_steps", axis_name)
        history = state.history
        if rule is None:
            # Where its square is not finite, the moments of the optimiser would not be either.
            is_bad = jnp.logical_not(norm * norm < jnp.inf)
        else:
            verdict = rule.decide((loss, norm), history, JAX)
            is_bad, history = verdict.is_skipped, rule.update((loss, norm), verdict, history, JAX)
        made, inner_state = _step(extended, is_bad, updates, state.inner_state, params, extra_args)
        number = is_bad.astype(jnp.int32)
        consecutive = (state.consecutive + 1) * number
        evidence = state.evidence
        if budget:
            is_open = is_bad & (state.longest < budget)
            is_row = (jnp.arange(budget) == state.consecutive % budget) & is_open
            row = (state.step, jnp.nan if loss is None else loss, norm)
            evidence = SkipEvidence(*(jnp.where(is_row, new, old) for new, old in zip(row, evidence, strict=True)))
        known = GuardState(
            inner_state=(),
            history=history,
            is_skipped=is_bad,
            gradient_norm=norm,
            consecutive=consecutive,
            longest=jnp.maximum(state.longest, consecutive),
            total_skipped=state.total_skipped + number,
            step=state.step + 1,
            evidence=evidence,
        )
        return made, like(known, state._replace(inner_state=()))._replace(inner_state=inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def raise_if_too_many_skips(state: Any) -> None:
    """Raise if a guard has skipped as many updates in a row as its budget allows; waits for the step.

    Call it outside of jit, as often as you like: a budget that was once spent stays so, with the evidence of that
    streak. To go on all the same, `optax.tree_utils.tree_set(state, consecutive=zero, longest=zero)` with `zero` an
    int32 array.

    Args:
        state: State of an optimiser that holds a `GuardState`, anywhere in it; also stacked, by `vmap` or `pmap`.

    Raises:
        TooManySkips: If the budget is spent; it has steps, losses and norms.
        ValueError: If there is no guard in the state.
    """
    guards = list(_guards(state))
    if not guards:
        raise ValueError("there is no GuardState in this state; make the optimiser with guard_steps(...).")
    for guard in guards:
        budget = guard.evidence.steps.shape[-1]
        spent = np.flatnonzero(np.asarray(guard.longest) >= budget)
        if budget and spent.size:
            columns = [np.asarray(column).reshape(-1, budget)[spent[0]].tolist() for column in guard.evidence]
            raise TooManySkips(sorted(SkippedStep(*entry) for entry in zip(*columns, strict=True)))


def _step(
    inner: optax.GradientTransformationExtraArgs, is_bad: Any, updates: Any, state: Any, params: Any, extra_args: Any
) -> tuple[Any, Any]:
    """Return updates and state of an optimiser after its step, or updates that change nothing and the old state."""

    def step() -> tuple[Any, Any]:
        made, after = inner.update(updates, state, params, **extra_args)
        return made, jax.tree.map(_in_dtype_of, after, state)

    def stay() -> tuple[Any, Any]:
        # 0.0 would turn a weight of -0.0 into 0.0.
        return jax.tree.map(lambda x: jnp.full(x.shape, -0.0, x.dtype), shapes), state

    shapes, _ = jax.eval_shape(step)
    # In this order: with the step as the second branch, XLA copies the state before either of them.
    return lax.cond(jnp.logical_not(is_bad), step, stay)


def _in_dtype_of(new: Any, old: Any) -> Any:
    """Return an array in the dtype that it had before the step, and not a weak one; else the branches would differ."""
    return new if jnp.issubdtype(old.dtype, jax.dtypes.extended) else jnp.asarray(new, old.dtype)


def _guards(state: Any) -> Iterator[GuardState]:
    """Yield the guards in a state, the outer before the inner."""
    for leaf in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, GuardState)):
        if isinstance(leaf, GuardState):
            yield leaf
            yield from _guards(leaf.inner_state)
