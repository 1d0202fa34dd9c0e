"""The rule as slow, obvious loops in float64: the oracle every fast implementation is held against.

Written from the paper with raw moments and one loss at a time, so that nothing it computes shares an idea with
`rules.py`, which it must never import.
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
        observe: Updates before the first limit when `start="auto"`.

    Returns:
        The trace, all in float64.

    Example:
        >>> trace = alrc_trace([1.0, 3.0, 50.0], start=(1.0, 2.0), betas=(0.5, 0.5))
        >>> print(trace.limit[0], trace.scale[2].round(4))
        4.0 0.1071
    """
    mu1, mu2 = (0.0, 0.0) if isinstance(start, str) else (float(start[0]), float(start[1]))
    updates = 0
    all_limited: list[NDArray[np.float64]] = []
    all_scale: list[NDArray[np.float64]] = []
    limits: list[float] = []
    mu1s: list[float] = []
    mu2s: list[float] = []
    for losses in stream:
        array = np.asarray(losses, dtype=np.float64)
        limit = gain * mu1 + num_stddev * math.sqrt(max(gain * mu2 - (gain * mu1) ** 2, 0.0) + eps)
        if limit <= 0 or (start == "auto" and updates < observe):
            limit = math.inf
        ceiling = limit if limit < math.inf else 1e15
        limit = limit if limit < 1e15 else math.inf
        limited: list[float] = []
        scale: list[float] = []
        fed: list[float] = []
        for loss in array.ravel().tolist():
            if not math.isfinite(loss):
                limited.append(0.0)
                scale.append(0.0)
            elif loss > ceiling:
                limited.append(ceiling)
                scale.append(ceiling / loss)
                fed.append(ceiling if feed == "limited" else loss)
            else:
                limited.append(loss)
                scale.append(1.0)
                fed.append(loss)
        if fed:
            mean = min(max(sum(fed) / len(fed), -1e15), 1e15)
            square = sum(loss * loss for loss in fed) / len(fed) if second_moment == "elements" else mean * mean
            beta1, beta2 = betas
            if start == "auto":
                beta1, beta2 = min(beta1, updates / (updates + 1)), min(beta2, updates / (updates + 1))
            mu1 = beta1 * mu1 + (1 - beta1) * mean
            mu2 = beta2 * mu2 + (1 - beta2) * square
            updates += 1
        all_limited.append(np.array(limited).reshape(array.shape))
        all_scale.append(np.array(scale).reshape(array.shape))
        limits.append(limit)
        mu1s.append(mu1)
        mu2s.append(mu2)
    return Trace(all_limited, all_scale, np.array(limits), np.array(mu1s), np.array(mu2s))
