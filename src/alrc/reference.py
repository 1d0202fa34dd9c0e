"""The rule as slow, obvious loops in float64: the oracle every fast implementation is held against.

Written from the paper with raw moments and one loss at a time, so that nothing it computes shares an idea with
`alrc.rules`, which it must never import.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Trace", "alrc_trace"]


class Trace(NamedTuple):
    """Record what the rule did to a stream, one entry per step."""

    limited: list[NDArray[np.float64]]
    """Limited losses of each step, the shape they were given in."""
    scale: list[NDArray[np.float64]]
    """Gradient factors d limited / d loss, same shapes."""
    limit: NDArray[np.float64]
    """L_max that each step was held against, shape (steps,); inf while nothing is limited."""
    mu1: NDArray[np.float64]
    """First raw moment after each step, shape (steps,)."""
    mu2: NDArray[np.float64]
    """Second raw moment after each step, shape (steps,)."""


def alrc_trace(
    stream: Iterable[Any],
    *,
    num_stddev: float = 3.0,
    betas: tuple[float, float] = (0.999, 0.999),
    start: Literal["auto"] | tuple[float, float] = "auto",
    feed: Literal["limited", "unlimited"] = "limited",
    second_moment: Literal["elements", "mean"] = "elements",
    eps: float = 0.0,
    gain: float = 1.0,
    observe: int = 32,
    signed: bool = False,
    num_stddev_below: float | None = None,
) -> Trace:
    """Run ALRC over a stream of losses with plain loops and raw moments.

    Settings are those of `alrc.ALRC`. Use it to check an implementation; it is far too slow to train with.

    Args:
        stream: One entry per step: a number or an array of any shape.
        num_stddev: Standard deviations above the mean.
        betas: Decay rates of the first and second raw moment.
        start: `"auto"` or `(mu1, mu2)`.
        feed: Which losses the moments see.
        second_moment: Mean of squared elements, or square of the batch mean.
        eps: Added under the root.
        gain: Factor on both raw moments when the limit is made.
        observe: Updates before the first limit, and learned from after a shift, when `start="auto"`.
        signed: Whether losses may be of either sign.
        num_stddev_below: Standard deviations below the mean under which losses are limited too.

    Returns:
        The trace, all in float64.

    Example:
        >>> trace = alrc_trace([1.0, 3.0, 50.0], start=(1.0, 2.0), betas=(0.5, 0.5))
        >>> print(trace.limit[0], trace.scale[2].round(4))
        4.0 0.1071
    """
    mu1, mu2 = (0.0, 0.0) if isinstance(start, str) else (float(start[0]), float(start[1]))
    updates = 0
    rate = 0.0
    recent: list[tuple[float, float]] = []
    expected = 1 / (1 + num_stddev**2)
    alarm = expected + (1 - expected) / 3
    all_limited: list[NDArray[np.float64]] = []
    all_scale: list[NDArray[np.float64]] = []
    limits: list[float] = []
    mu1s: list[float] = []
    mu2s: list[float] = []
    for losses in stream:
        array = np.asarray(losses, dtype=np.float64)
        std = math.sqrt(max(gain * mu2 - (gain * mu1) ** 2, 0.0) + eps)
        limit = gain * mu1 + num_stddev * std
        low = -math.inf if num_stddev_below is None else gain * mu1 - num_stddev_below * std
        if (limit <= 0 and not signed) or (start == "auto" and updates < observe):
            limit, low = math.inf, -math.inf
        ceiling = limit if limit < math.inf else 1e15
        limit = limit if limit < 1e15 else math.inf
        limited: list[float] = []
        scale: list[float] = []
        raw: list[float] = []
        is_hit: list[bool] = []
        for loss in array.ravel().tolist():
            value, factor = loss, 1.0
            if not math.isfinite(loss):
                value, factor = 0.0, 0.0
            elif loss > ceiling:
                base = ceiling - 2 * num_stddev * std if signed else 0.0
                value, factor = ceiling, (ceiling - base) / (loss - base)
            elif loss < low and (signed or loss > 0):
                assert num_stddev_below is not None
                top = low + 2 * num_stddev_below * std
                value, factor = low, (top - low) / (top - loss)
            limited.append(value)
            scale.append(factor)
            if math.isfinite(loss):
                raw.append(loss)
                is_hit.append(value != loss)
        if raw:
            fed = [value for value, loss in zip(limited, array.ravel().tolist(), strict=True) if math.isfinite(loss)]
            fed = fed if feed == "limited" else raw
            weights = [1.0] * len(fed)
            beta1, beta2 = betas
            if start == "auto":
                share = sum(is_hit) / len(is_hit)
                hit_weight = min(max(2 * rate / expected - 1, 0.0), 1.0) if feed == "limited" else 1.0
                weights = [hit_weight if hit else 1.0 for hit in is_hit]
                beta1, beta2 = (1 - max(4 / (updates + 4), 1 - beta) * sum(weights) / len(fed) for beta in betas)
                level = sum(raw) / len(raw)
                spread = sum((loss - level) ** 2 for loss in raw) / len(raw) if second_moment == "elements" else 0.0
                recent = [*recent, (min(max(level, -1e15), 1e15), min(spread, 1e30))][-observe:]
                rate += (share - rate) / 32
            if sum(weights) > 0:
                mean = sum(weight * loss for weight, loss in zip(weights, fed, strict=True)) / sum(weights)
                mean = min(max(mean, -1e15), 1e15)
                square = mean * mean
                if second_moment == "elements":
                    square = sum(weight * loss * loss for weight, loss in zip(weights, fed, strict=True)) / sum(weights)
                mu1 = beta1 * mu1 + (1 - beta1) * mean
                mu2 = beta2 * mu2 + (1 - beta2) * square
            updates += 1
            if start == "auto" and (updates == observe or (updates > observe and rate > alarm)):
                levels, spreads = (_winsorised([pair[i] for pair in recent]) for i in (0, 1))
                mu1 = sum(levels) / observe
                mu2 = sum(level * level for level in levels) / observe + sum(spreads) / observe
                updates, rate = observe, 0.0
        all_limited.append(np.array(limited).reshape(array.shape))
        all_scale.append(np.array(scale).reshape(array.shape))
        limits.append(limit)
        mu1s.append(mu1)
        mu2s.append(mu2)
    return Trace(all_limited, all_scale, np.array(limits), np.array(mu1s), np.array(mu2s))


def _winsorised(values: list[float]) -> list[float]:
    """Move what lies farther than four quartile distances from the median to there."""
    ordered = sorted(values)
    middle, high = ordered[len(ordered) // 2], ordered[3 * len(ordered) // 4]
    low = ordered[len(ordered) - 1 - 3 * len(ordered) // 4]
    return [min(max(value, middle - 4 * (middle - low)), middle + 4 * (high - middle)) for value in values]
