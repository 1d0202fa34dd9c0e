"""Estimate means, paired differences and moving averages from a handful of runs.

Pure functions of numbers, apart from the rest of the report so that each formula can be checked against a
textbook. What they mean, and why, is in `docs/design/0004-statistics.md`. Must not import any other part of the lab.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats as scipy_stats

CONFIDENCE = 0.95
# Differences that agree to this fraction of the values they come from differ by rounding alone.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Estimate:
    """Hold a mean with its uncertainty; what n runs cannot tell is None.

    Attributes:
        n: How many values went in.
        mean: Their mean; None without values.
        std: Standard deviation of one value (n − 1 in the denominator); None below two values.
        low: Lower end of the 95 % t interval of the mean; None below two values.
        high: Upper end of it.
    """

    n: int
    mean: float | None
    std: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class PairedDifference:
    """Hold what changing one setting did to the metric, seed by seed.

    Attributes:
        n: Number of seeds that both settings finished.
        mean: Mean of (setting − baseline); None without pairs.
        low: Lower end of its 95 % t interval; None where undefined.
        high: Upper end of it.
        p_value: Two-sided paired t test of "no difference"; None where undefined.
        baseline: Mean of the baseline over the same seeds.
        relative: `mean / baseline`; None where the baseline is 0.
    """

    n: int
    mean: float | None
    low: float | None
    high: float | None
    p_value: float | None
    baseline: float | None
    relative: float | None

    def in_percent(self, difference: float | None) -> float | None:
        """Express a difference (the mean or an end of the interval) in percent of the baseline's mean."""
        if difference is None or not self.baseline:
            return None
        return 100.0 * difference / abs(self.baseline)


def summarise(values: Sequence[float] | np.ndarray) -> Estimate:
    """Estimate the mean of a setting from one value per run.

    The interval is Student's t, `mean ± t(0.975, n − 1) · std / √n`. One value has no interval: it is None, not zero.

    Args:
        values: One finite number per finished run, shape (n,).

    Returns:
        The estimate, in the unit of the values.

    Raises:
        ValueError: If a value is not finite or the array is not one-dimensional.

    Example:
        >>> summarise([1.0, 2.0, 3.0]).mean
        2.0
        >>> summarise([1.0]).low is None
        True
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"values must have one dimension, got shape {array.shape}")
    if not np.isfinite(array).all():
        bad = array[~np.isfinite(array)][0]
        raise ValueError(f"values must be finite, got {bad}: a diverged run has no value to average")
    n = array.size
    if n == 0:
        return Estimate(0, None, None, None, None)
    mean = float(array.mean())
    if n == 1:
        return Estimate(1, mean, None, None, None)
    std = float(array.std(ddof=1))
    half = float(scipy_stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * std / math.sqrt(n)
    return Estimate(n, mean, std, mean - half, mean + half)


def paired(values_a: Mapping[int, float], values_b: Mapping[int, float]) -> PairedDifference:
    """Compare a setting with its baseline over the seeds that both finished.

    Runs of one seed share their initial weights and their images, so their noise is largely common and cancels in the
    difference. Two degenerate cases are told apart: differences that are all 0 (the setting changed nothing)
    have the interval [0, 0] and p = 1; equal differences other than 0 show no spread to judge them by, so interval
    and p are None.

    Args:
        values_a: The setting's value by seed.
        values_b: The baseline's value by seed.

    Returns:
        The difference `a − b`; below two pairs without interval and p-value.

    Raises:
        ValueError: If a value is not finite; names the seed.

    Example:
        >>> paired({1: 9.0, 2: 8.0, 3: 5.0}, {1: 10.0, 2: 10.0, 4: 1.0}).relative
        -0.15
    """
    for values in (values_a, values_b):
        for seed, value in values.items():
            if not math.isfinite(value):
                raise ValueError(f"the value of seed {seed} must be finite, got {value}")
    seeds = sorted(values_a.keys() & values_b.keys())
    n = len(seeds)
    if n == 0:
        return PairedDifference(0, None, None, None, None, None, None)
    a = np.array([values_a[seed] for seed in seeds], dtype=np.float64)
    b = np.array([values_b[seed] for seed in seeds], dtype=np.float64)
    mean, baseline = float((a - b).mean()), float(b.mean())
    relative = mean / abs(baseline) if baseline else None
    low, high, p_value = _paired_t(a, b) if n > 1 else (None, None, None)
    return PairedDifference(n, mean, low, high, p_value, baseline, relative)


def _paired_t(a: np.ndarray, b: np.ndarray) -> tuple[float | None, float | None, float | None]:
    """Return interval and p-value of a paired t test, None where the differences have no spread."""
    differences = a - b
    if not differences.any():
        return 0.0, 0.0, 1.0
    if np.ptp(differences) <= _ROUNDING * max(np.abs(a).max(), np.abs(b).max()):
        return None, None, None
    test = scipy_stats.ttest_rel(a, b)
    interval = test.confidence_interval(CONFIDENCE)
    return float(interval.low), float(interval.high), float(test.pvalue)


def boxcar(values: np.ndarray, width: int, stride: int = 1) -> np.ndarray:
    """Average each stretch of `width` neighbouring values with equal weights.

    Only whole windows are used, so the result is shorter by `width − 1` and nothing is padded. A window that holds a
    NaN or an infinity yields NaN, and only such windows do: averages after a spike to infinity are exact again.

    Args:
        values: Shape (n,), any real dtype.
        width: Number of values in a window, at least 1.
        stride: Return every `stride`-th window only, which saves the time of the others.

    Returns:
        float64, shape (⌈(n − width + 1) / stride⌉,); empty if n < width. Element i averages
        `values[i·stride : i·stride + width]`.

    Raises:
        ValueError: If width or stride is below 1, or values is not one-dimensional.

    Example:
        >>> boxcar(np.array([1.0, 3.0, 5.0, np.inf]), 2)
        array([ 2.,  4., nan])
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"values must have one dimension, got shape {array.shape}")
    if width < 1 or stride < 1:
        raise ValueError(f"width and stride must be at least 1, got {width} and {stride}")
    if array.size < width:
        return np.empty(0)
    finite = np.where(np.isfinite(array), array, np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(finite, width)[::stride]
    # A running sum would be quicker, but one spike of 1e30 would wipe out every digit after it.
    return windows.mean(axis=1)
