"""The gradient rules that remember: AutoClip and ZClip hold a norm against the norms before it.

Their states are fixed-size arrays, whatever the length of the run. A norm that is NaN, infinite, or so large that its
square could not be held in float32 never enters them.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from alrc.ops import NUMPY, Ops
from alrc.rules.gradient import GradientDecision, Measure, check_positive, check_scope, scale_to
from alrc.rules.shift import RATE_WEIGHT, largest_share

__all__ = ["LARGEST_NORM", "AutoClip", "NormHistory", "NormStatistics", "ZClip"]

LARGEST_NORM = 1e15
"""Norms from here on are limited like others but not remembered: in float32 their squares would leave no room."""

SMALLEST_NORM = 1e-30
"""Norms below count as this one, so that zero can be divided by zero."""
UPPER_QUARTILE = 0.6745
"""Distance of the upper quartile of a normal distribution from its median, in standard deviations."""
RECENT = 32
"""Number of norms from which the statistics are learned anew."""


class NormHistory(NamedTuple):
    """Hold the last norms, for one magnitude or for many in a row. The state of `AutoClip`."""

    norms: Any
    """Ring of norms along the last axis, shape (window,) or (number, window); `LARGEST_NORM` where none was yet."""
    count: Any
    """Number of norms seen so far, an integer for each ring."""


@dataclass(frozen=True)
class AutoClip:
    """Limit a norm to a percentile of the norms seen so far, itself included.

    The percentile interpolates linearly, exactly as `numpy.percentile`. The published method keeps every norm of a run;
    here the last `window` ones are kept, so memory and time are bounded, and it is the published method until then.

    Args:
        percentile: Percentile of the norms that is the limit, in [0, 100]. The paper uses 10.
        window: Number of norms that are remembered, ≥ 1. Non-finite ones are not.
        scope: `"global"` for one norm over all parameters, `"parameter"` for one norm and one history each.

    Raises:
        ValueError: If a setting is outside its range; the message names the value.

    Example:
        >>> rule = AutoClip(50.0)
        >>> state = rule.init()
        >>> for norm in (1.0, 3.0, 8.0):
        ...     decision = rule.decide(norm, state)
        ...     state = rule.update(norm, decision, state)
        >>> decision.threshold.item(), decision.scale.item()
        (3.0, 0.375)

    References:
        Seetharaman, Wichern, Pardo & Le Roux 2020, "AutoClip: adaptive gradient clipping for source separation
        networks", Algorithm 1.
    """

    percentile: float = 10.0
    _: KW_ONLY
    window: int = 1000
    scope: Literal["global", "parameter"] = "global"

    def __post_init__(self) -> None:
        if isinstance(self.percentile, bool) or not 0 <= self.percentile <= 100:
            raise ValueError(f"percentile must be in [0, 100], got {self.percentile}.")
        _check_whole(window=self.window)
        check_scope(self.scope)

    @property
    def measures(self) -> Measure:
        """The norm of all gradients, or of each."""
        return Measure(self.scope)

    def init(self, number: int | None = None) -> NormHistory:
        """Return empty histories.

        Args:
            number: How many norms a step has, for `scope="parameter"`; None for one 0-d norm.

        Returns:
            The state, float64 numpy arrays.
        """
        if number is None:
            return NormHistory(np.full(self.window, LARGEST_NORM), 0)
        return NormHistory(np.full((number, self.window), LARGEST_NORM), np.zeros(number, dtype=np.int64))

    def decide(self, measured: Any, state: NormHistory, ops: Ops = NUMPY) -> GradientDecision:
        """Decide the factor of each norm.

        Args:
            measured: Norms ≥ 0, shape of `state.count`.
            state: State from `init` or `update`.
            ops: Primitives of the framework.

        Returns:
            The decision; its arrays have the shape of the norms.
        """
        is_valid = measured < LARGEST_NORM
        slot = state.count % self.window
        norms = ops.put(state.norms, slot, ops.where(is_valid, measured, ops.take(state.norms, slot)))
        count = state.count + is_valid
        last = ops.clip(count, 1, self.window) - 1
        position = self.percentile / 100 * last
        below = -ops.ceil(-position)
        ordered = ops.sort(norms)
        lower, upper = ops.take(ordered, below), ops.take(ordered, ops.ceil(position))
        share, distance = position - below, upper - lower
        # From the nearer of the two, as numpy does: then rounding cannot leave their interval.
        threshold = ops.where(share < 0.5, lower + share * distance, upper - (1 - share) * distance)
        return GradientDecision(scale_to(threshold, measured, ops), threshold, (norms, count))

    def update(self, measured: Any, decision: GradientDecision, state: NormHistory, ops: Ops = NUMPY) -> NormHistory:
        """Return the histories with these norms.

        Args:
            measured: What was given to `decide`.
            decision: What `decide` returned for it.
            state: State the decision was made with.
            ops: Primitives of the framework.

        Returns:
            The new state; where a norm was not finite, the old one.
        """
        return NormHistory(*decision.carry)


class NormStatistics(NamedTuple):
    """Hold what `ZClip` knows of the norms so far."""

    mean: Any
    """Running mean of the norms, spikes cut."""
    var: Any
    """Running variance of the same."""
    count: Any
    """Number of norms seen so far, an integer."""
    rate: Any
    """Running share of steps that were spikes, in [0, 1]; 0 with `recover=False`."""
    recent: Any
    """The last 32 norms, spikes uncut, oldest first, shape (32,); zeros with `recover=False`."""


@dataclass(frozen=True)
class ZClip:
    """Cut the global gradient norm where its z-score, against running statistics, says it is a spike.

    With z = (norm - mean) / (std + eps), a norm with z > z_threshold is cut to mean + z_threshold² / z · std: the
    larger the spike, the deeper the cut. The first `warmup` norms are averaged; then statistics learn from cut norms.
    Equals `zclip.ZClip` in its default mode, which locks itself in when norms rise for good: what learns only from
    what it has cut never follows. `recover` is the way out (see `update`), and changes no number before it is needed.

    Args:
        decay: Weight of the old statistics in a step, in (0, 1).
        z_threshold: z-score above which a norm is a spike, > 0.
        max_norm: Largest norm whatever the statistics say, > 0; None for none. It also holds in the warm-up.
        warmup: Number of norms before the first decision by z-score, ≥ 1.
        eps: Added to the standard deviation, > 0; in units of the norm.
        recover: Whether to learn anew after a lasting shift; False is the published rule.

    Raises:
        ValueError: If a setting is outside its range; the message names the value.

    Example:
        >>> rule, state = ZClip(max_norm=None, warmup=4), ZClip().init()
        >>> for norm in (1.0, 3.0, 1.0, 3.0, 12.0):
        ...     decision = rule.decide(norm, state)
        ...     state = rule.update(norm, decision, state)
        >>> round(float(decision.scale * 12.0), 4)
        2.625

    References:
        Kumar et al. 2025, "ZClip: adaptive spike mitigation for LLM pre-training".
    """

    decay: float = 0.97
    _: KW_ONLY
    z_threshold: float = 2.5
    max_norm: float | None = 1.0
    warmup: int = 25
    eps: float = 1e-6
    recover: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.decay < 1:
            raise ValueError(f"decay must be in (0, 1), got {self.decay}.")
        check_positive(z_threshold=self.z_threshold, eps=self.eps)
        if self.max_norm is not None:
            check_positive(max_norm=self.max_norm)
        _check_whole(warmup=self.warmup)

    @property
    def measures(self) -> Measure:
        """The norm of all gradients."""
        return Measure("global")

    def init(self, number: int | None = None) -> NormStatistics:
        """Return the statistics of nothing.

        Args:
            number: None; there is one norm, that of all gradients.

        Returns:
            The state, Python numbers and a numpy array.
        """
        return NormStatistics(0.0, 0.0, 0, 0.0, np.zeros(RECENT))

    def decide(self, measured: Any, state: NormStatistics, ops: Ops = NUMPY) -> GradientDecision:
        """Decide the factor of all gradients.

        Args:
            measured: The global norm, 0-d, ≥ 0.
            state: State from `init` or `update`.
            ops: Primitives of the framework.

        Returns:
            The decision, 0-d arrays.
        """
        norm = ops.replace_nonfinite(measured, 0.0)
        std = ops.sqrt(state.var)
        z = (norm - state.mean) / (std + self.eps)
        is_learned = state.count >= self.warmup
        is_spike = (z > self.z_threshold) & is_learned
        cut = state.mean + self.z_threshold**2 * std / ops.clip(z, self.z_threshold, None)
        fed, threshold = ops.where(is_spike, cut, norm), ops.where(is_learned, cut, math.inf)
        if self.max_norm is not None:
            threshold = ops.clip(threshold, None, self.max_norm)
        # The quotient of two equal numbers is 1 exactly, so what is not cut is not touched.
        scale = ops.clip(fed, SMALLEST_NORM, self.max_norm) / ops.clip(norm, SMALLEST_NORM, None)
        return GradientDecision(scale, threshold, (fed, is_spike, is_learned))

    def update(
        self, measured: Any, decision: GradientDecision, state: NormStatistics, ops: Ops = NUMPY
    ) -> NormStatistics:
        """Return the statistics with this norm, cut if it was a spike.

        With `recover`, and when the running share of spikes is larger than Cantelli's inequality allows, by a third of
        the way to 1, the last 32 norms as they were are the new statistics: their median is the mean, and the
        distance of their upper quartile from it gives the standard deviation. Up to a quarter of them may be anything.

        Args:
            measured: What was given to `decide`.
            decision: What `decide` returned for it.
            state: State the decision was made with.
            ops: Primitives of the framework.

        Returns:
            The new state; where the norm was not finite, the old one.
        """
        fed, is_spike, is_learned = decision.carry
        is_valid = measured < LARGEST_NORM
        weight = ops.where(is_learned, 1 - self.decay, 1 / (state.count + 1)) * is_valid
        rest = 1 - weight
        delta = fed - state.mean
        step = weight * delta
        # zclip takes the deviation from the new mean, rest · delta; an average over the warm-up has one such factor.
        var = rest * (state.var + step * delta * ops.where(is_learned, rest, 1.0))
        after = NormStatistics(state.mean + step, var, state.count + is_valid, state.rate, state.recent)
        return self._watch(measured, is_spike, is_valid, after, ops) if self.recover else after

    def _watch(self, norm: Any, is_spike: Any, is_valid: Any, state: NormStatistics, ops: Ops) -> NormStatistics:
        """Count the spikes, and learn anew from the recent norms when there are more than spikes can be."""
        recent = ops.where(is_valid, ops.push(state.recent, norm), state.recent)
        rate = state.rate + RATE_WEIGHT * is_valid * (ops.where(is_spike, 1.0, 0.0) - state.rate)
        is_shift = rate > largest_share(self.z_threshold)
        ordered = ops.sort(recent)
        middle = ordered[RECENT // 2 - 1]
        std = (ordered[3 * RECENT // 4 - 1] - middle) / UPPER_QUARTILE
        return NormStatistics(
            ops.where(is_shift, middle, state.mean),
            ops.where(is_shift, std * std, state.var),
            state.count,
            ops.where(is_shift, 0.0, rate),
            recent,
        )


def _check_whole(**settings: int) -> None:
    """Refuse settings that are not whole numbers ≥ 1."""
    for name, value in settings.items():
        if isinstance(value, bool) or value != int(value) or value < 1:
            raise ValueError(f"{name} must be a whole number ≥ 1, got {value}.")
