"""The rule that judges a whole update: SkipStep.

Where ALRC limits losses and the clipping rules limit gradients, this one only says yes or no. It measures two numbers,
the loss and the gradient norm, and imports no framework.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import numpy as np

from alrc.ops import NUMPY, Ops
from alrc.rules.loss import LARGEST_LOSS
from alrc.rules.shift import RATE_WEIGHT, WINSOR, largest_share

__all__ = ["SkipStep", "StepState", "StepVerdict"]

RELEARNED = 13
"""Updates from which a new level is learned: the fewest rejections in a row that raise the alarm, whatever n."""


class StepState(NamedTuple):
    """Hold the losses and gradient norms of the last updates, oldest first, and which of them are believed.

    What `SkipStep.init` returns; arrays of one framework, on one device.
    """

    values: Any
    """Loss (row 0) and gradient norm (row 1) of the last updates, shape (2, window)."""
    is_trusted: Any
    """1 where the update belongs to the level that others are held against, else 0; shape (window,)."""
    age: Any
    """Updates that came after each column: window - 1, …, 1, 0. Never changes."""
    rate: Any
    """Running share of rejected updates, in [0, 1]."""
    count: Any
    """Number of updates whose loss and norm were finite, an integer."""


class StepVerdict(NamedTuple):
    """Say whether an update is to be skipped, and what it was held against."""

    is_skipped: Any
    """True where loss or norm lies above its limit, or is not finite; 0-d boolean."""
    is_finite: Any
    """True where loss and norm are both finite, 0-d boolean."""
    limits: Any
    """Limits of loss and norm, shape (2,); inf where there is none."""


@dataclass(frozen=True)
class SkipStep:
    """Reject an update whose loss or gradient norm stands far out of the last ones.

    A value is rejected above mean + num_stddev · std of the trusted values among the last `window`, and if it is not
    finite. What is rejected is not trusted, so a spike does not hide the next one. A new level is not mistaken for
    spikes for long: once the running share of rejections says so (`alrc.rules.shift`), after 14 rejections in a row by
    default, the level is learned anew from the last 13 updates, whatever they are.

    Args:
        num_stddev: Standard deviations n above the mean, > 0.
        window: Updates that are remembered, ≥ 32.
        min_history: Updates before the first limit, 13 to `window`. Spikes among them are capped (see `update`).
        min_rise: Rise above the mean, as a share of it, that is never rejected, ≥ 0: a constant loss has no std.

    Raises:
        ValueError: If a setting is outside its range; the message names the value.

    Example:
        >>> rule, state = SkipStep(min_history=13), SkipStep(min_history=13).init()
        >>> for loss in [2.0, 1.9, 2.1] * 10 + [2.2, 9.0]:
        ...     verdict = rule.decide((loss, None), state)
        ...     state = rule.update((loss, None), verdict, state)
        >>> bool(verdict.is_skipped), round(float(verdict.limits[0]), 1)
        (True, 2.5)

    References:
        OLMo-core, `SkipStepOptimizer`: mean + 6 std of the previous 128 values, of which it needs 64.
    """

    num_stddev: float = 6.0
    _: KW_ONLY
    window: int = 128
    min_history: int = 64
    min_rise: float = 0.01

    def __post_init__(self) -> None:
        if not (math.isfinite(self.num_stddev) and self.num_stddev > 0):
            raise ValueError(f"num_stddev must be a positive finite number, got {self.num_stddev}.")
        if self.window != int(self.window) or self.window < 32:
            raise ValueError(f"window must be a whole number of updates, at least 32, got {self.window}.")
        if self.min_history != int(self.min_history) or not RELEARNED <= self.min_history <= self.window:
            raise ValueError(
                f"min_history must be a whole number from {RELEARNED} to window={self.window}, got {self.min_history}."
            )
        if not (math.isfinite(self.min_rise) and self.min_rise >= 0):
            raise ValueError(f"min_rise must be a finite number ≥ 0, got {self.min_rise}.")

    def init(self) -> StepState:
        """Return the state before the first update, in float64 numpy arrays."""
        nothing = np.zeros(self.window)
        age = np.arange(self.window - 1.0, -1.0, -1.0)
        return StepState(np.zeros((2, self.window)), nothing, age, np.zeros(()), np.zeros((), dtype=np.int64))

    def limits(self, state: StepState, ops: Ops = NUMPY) -> Any:
        """Return the limits of the next loss and norm, shape (2,); inf where there is none yet, or no scale.

        limit = mean + max(num_stddev · std, min_rise · |mean|) over the trusted values; std with n - 1. Values that
        are all zero have no scale, so nothing is held against them; neither is a loss or norm that was never given.

        Args:
            state: State from `init` or `update`.
            ops: Primitives of the framework the state lives in.

        Returns:
            Array of shape (2,): limit of the loss, limit of the norm.
        """
        number = ops.total(state.is_trusted)
        mean = ops.row_total(state.values * state.is_trusted) / ops.clip(number, 1.0, None)
        deviation = (state.values - mean[:, None]) * state.is_trusted
        spread = self.num_stddev * ops.sqrt(ops.row_total(deviation * deviation) / ops.clip(number - 1, 1.0, None))
        rise = self.min_rise * abs(mean)
        margin = ops.where(spread > rise, spread, rise)
        return ops.where((margin > 0) & (state.count >= self.min_history), mean + margin, math.inf)

    def decide(self, measured: tuple[Any, Any], state: StepState, ops: Ops = NUMPY) -> StepVerdict:
        """Decide whether an update is to be skipped.

        Args:
            measured: Loss and gradient norm of the update, 0-d, in the dtype of the state; None for one that is not
                measured, which must then never be.
            state: State from `init` or `update`.
            ops: Primitives of the framework the state lives in.

        Returns:
            The verdict.
        """
        values = self._pair(measured, state, ops)
        limits = self.limits(state, ops)
        is_finite = abs(values) <= LARGEST_LOSS  # false for NaN
        number = ops.total(ops.where(is_finite & (values <= limits), 1.0, 0.0))
        return StepVerdict(number < 2, ops.total(ops.where(is_finite, 1.0, 0.0)) == 2, limits)

    def update(self, measured: tuple[Any, Any], verdict: StepVerdict, state: StepState, ops: Ops = NUMPY) -> StepState:
        """Return the state after an update, skipped or not.

        Where it was not finite, the state stays. When the first limit is made, values are capped at median + 4 (q95 -
        median) of the updates so far; when a level is learned anew, at median + 4 (q75 - median) of the last 13.

        Args:
            measured: What was given to `decide`.
            verdict: What `decide` returned for it.
            state: State the verdict was made with.
            ops: Primitives of the framework the state lives in.

        Returns:
            The new state; arrays of the same shapes and dtypes.
        """
        is_rejected = ops.where(verdict.is_skipped, 1.0, 0.0)
        rate = state.rate + RATE_WEIGHT * (is_rejected - state.rate)
        count = state.count + 1
        values = ops.push(state.values, self._pair(measured, state, ops))
        is_first = count == self.min_history
        is_shifted = rate > largest_share(self.num_stddev)
        ceiling = ops.where(is_shifted, _ceiling(values, RELEARNED, 0.75, ops), math.inf)
        ceiling = ops.where(is_first, _ceiling(values, self.min_history, 0.95, ops), ceiling)[:, None]
        after = StepState(
            values=ops.where(values > ceiling, ceiling, values),
            is_trusted=ops.where(is_shifted, state.age < RELEARNED, ops.push(state.is_trusted, 1 - is_rejected)),
            age=state.age,
            rate=ops.where(is_shifted, 0.0, rate),
            count=count,
        )
        kept = (ops.where(verdict.is_finite, new, old) for new, old in zip(after, state, strict=True))
        return StepState(*kept)

    def _pair(self, measured: tuple[Any, Any], state: StepState, ops: Ops) -> Any:
        """Return loss and norm as one array; 0, which has no scale and no limit, for what is not measured."""
        return ops.stack([0 * state.rate if value is None else value for value in measured])


def _ceiling(values: Any, number: int, share: float, ops: Ops) -> Any:
    """Return, for loss and norm, where the newest values are capped: above all but a share of them, and far above."""
    ordered = ops.sort(values[:, -number:])
    middle = ordered[:, (number - 1) // 2]
    return middle + WINSOR * (ordered[:, int(share * (number - 1))] - middle)
