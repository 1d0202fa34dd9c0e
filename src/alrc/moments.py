"""Running mean and variance of a loss, in the form that float32 can hold.

Exists because the obvious form - keep E[L] and E[L²], subtract - loses the variance of any loss whose mean is large
beside its spread. Imports nothing but the standard library and numpy; works on arrays of any framework by operators.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Moments", "estimate_start"]


class Moments(NamedTuple):
    """Hold the running mean, variance and number of updates of a stream of losses (SPEC S3).

    An immutable tuple of scalars: Python floats, 0-d arrays or 0-d tensors of any framework. The raw moments of the
    paper, μ1 = E[L] and μ2 = E[L²], are derived properties; they are never stored.

    Example:
        >>> moments = Moments.from_raw(mu1=25.0, mu2=900.0)
        >>> moments.var, moments.mu2
        (275.0, 900.0)
        >>> moments.updated(mean=5.0, var=None, weights=(0.5, 0.5)).mean
        15.0

    References:
        Ede & Beanland 2020, Algorithm 1 (μ1, μ2 and their decay).
    """

    mean: Any
    """Running mean μ1 of the losses."""
    var: Any
    """Running variance μ2 - μ1²; never below zero while both decays are equal (S4)."""
    count: Any
    """Number of updates since the start, an integer."""

    @classmethod
    def from_raw(cls, mu1: float, mu2: float, count: int = 0) -> Moments:
        """Start from the raw moments of the paper.

        Args:
            mu1: Estimate of the mean loss, finite.
            mu2: Estimate of the mean squared loss, finite and larger than `mu1`².
            count: Number of updates the estimates stand for.

        Returns:
            The same moments as mean and variance.

        Raises:
            ValueError: If `mu2` is not larger than `mu1`², or either is not finite.
        """
        mu1, mu2 = float(mu1), float(mu2)
        if not (math.isfinite(mu1) and math.isfinite(mu2)):
            raise ValueError(f"mu1 and mu2 must be finite, got mu1={mu1} and mu2={mu2}.")
        if mu2 <= mu1 * mu1:
            raise ValueError(
                f"mu2 must be larger than mu1² = {mu1 * mu1:g} (a variance is positive), got mu2={mu2:g}; "
                "estimate_start(sample_losses) gives a valid pair."
            )
        return cls(mu1, mu2 - mu1 * mu1, count)

    @property
    def mu1(self) -> Any:
        """First raw moment, the running mean of L."""
        return self.mean

    @property
    def mu2(self) -> Any:
        """Second raw moment, the running mean of L²."""
        return self.var + self.mean * self.mean

    def updated(self, mean: Any, var: Any | None, weights: tuple[Any, Any], step: Any = 1) -> Moments:
        """Take one batch into the moments.

        Algebraically the recursion μ1 ← (1 - w1) μ1 + w1 m, μ2 ← (1 - w2) μ2 + w2 q of Algorithm 1 with w = 1 - β,
        in the central form that SPEC S4 derives. Passing the same object twice as weights drops the cross term.

        Args:
            mean: Mean m of the batch.
            var: Variance q - m² of the batch, ≥ 0; None for a single loss, which has none.
            weights: Weight of the batch in the first and the second moment, each in [0, 1].
            step: What is added to `count`: 1, or 0 for a batch that holds no valid loss (its weights must be 0 too).

        Returns:
            The new moments; `self` is unchanged.
        """
        w1, w2 = weights
        delta = mean - self.mean
        step_mean = w1 * delta
        if w1 is w2:
            # kept ≥ 0, and kept + w (var - kept) ≥ 0 for w ≤ 1: rounding cannot make the variance negative.
            kept = self.var + step_mean * delta
            new_var = kept - w1 * kept if var is None else kept + w1 * (var - kept)
        else:
            cross = 2 * (w2 - w1) * (self.mean * delta)
            new_var = self.var - w2 * self.var + (w2 - w1 * w1) * (delta * delta) + cross
            if var is not None:
                new_var = new_var + w2 * var
        return Moments(self.mean + step_mean, new_var, self.count + step)


def estimate_start(losses: Any, overestimate: float = 3.0) -> tuple[float, float]:
    """Estimate `start=(mu1, mu2)` from some losses of the untrained network.

    The published presets need starting moments that are not too low; their README multiplies a rough estimate by 3.
    `ALRC()` with `start="auto"` needs none of this.

    Args:
        losses: Loss values, any shape; non-finite ones are ignored. At least two different values.
        overestimate: Factor on the loss scale, ≥ 1: `mu1` grows by it, `mu2` by its square.

    Returns:
        `(mu1, mu2)` with `mu2 > mu1²`, in float64.

    Raises:
        ValueError: If `overestimate` < 1, or the losses have no spread.

    Example:
        >>> estimate_start([1.0, 3.0])
        (6.0, 45.0)

    References:
        Ede & Beanland 2020, section II, and the README of their published code.
    """
    if not (math.isfinite(overestimate) and overestimate >= 1):
        raise ValueError(f"overestimate must be at least 1 (an under-estimate blinds the rule), got {overestimate}.")
    values = np.asarray(losses, dtype=np.float64).ravel()
    values = values[np.isfinite(values)]
    scaled = overestimate * values
    mean, spread = (float(scaled.mean()), float(scaled.var())) if scaled.size else (0.0, 0.0)
    mu2 = mean * mean + spread
    if mu2 <= mean * mean:
        raise ValueError(
            f"need at least two different finite losses to estimate a spread, got {values.size} finite value(s)"
            f"{f' all equal to {values[0]:g}' if values.size else ''}; run a few more batches."
        )
    return mean, mu2
