"""Turn samples into estimates, intervals and p-values, by the functions of SciPy and statsmodels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import DescrStatsW

LEVEL = 0.95
"""Level of every interval."""


def mean_of(sample: np.ndarray) -> dict[str, float]:
    """Return `mean` and the t interval `low`, `high` of a sample's mean; NaN where a value is not finite."""
    if len(sample) < 2 or not np.isfinite(sample).all():
        return {"mean": math.nan, "low": math.nan, "high": math.nan}
    if np.ptp(sample) == 0:
        return dict.fromkeys(("mean", "low", "high"), float(sample[0]))
    low, high = DescrStatsW(sample).tconfint_mean(1 - LEVEL)
    return {"mean": float(np.mean(sample)), "low": float(low), "high": float(high)}


def equivalence_p(sample: np.ndarray, center: float, margin: float) -> float:
    """Return the p-value of two one-sided t tests (TOST) that the mean lies within `margin` of `center`."""
    if len(sample) < 2 or not np.isfinite(sample).all():
        return math.nan
    if np.ptp(sample) == 0:
        return float(abs(sample[0] - center) >= margin)
    return float(DescrStatsW(sample).ttost_mean(center - margin, center + margin)[0])


def difference_p(sample: np.ndarray, center: float = 0.0) -> float:
    """Return the p-value of the t test that the mean is `center`."""
    if len(sample) < 2 or not np.isfinite(sample).all():
        return math.nan
    if np.ptp(sample) == 0:
        return float(sample[0] == center)
    summary: Any = DescrStatsW(sample)
    return float(summary.ttest_mean(center)[1])


def least_distance(low: float, high: float) -> float:
    """Return how far an interval stays away from 0: 0 if it holds it, NaN if an end is."""
    if math.isnan(low) or math.isnan(high):
        return math.nan
    return max(low, -high, 0.0)


def share_of(hits: Any, number: int) -> dict[str, float]:
    """Return `share` and its exact Clopper-Pearson interval `low`, `high`."""
    interval = stats.binomtest(int(hits), int(number)).proportion_ci(LEVEL, method="exact")
    return {"share": hits / number, "low": float(interval.low), "high": float(interval.high)}


def median_of(sample: np.ndarray) -> dict[str, float]:
    """Return `median` and its exact interval `low`, `high` from order statistics."""
    quantile_test: Any = stats.quantile_test
    found = quantile_test(sample, q=float(np.median(sample)), p=0.5).confidence_interval(LEVEL)
    return {"median": float(np.median(sample)), "low": float(found.low), "high": float(found.high)}


def bootstrap(sample: Sequence[np.ndarray], statistic: Callable[..., Any], seed: list[int]) -> dict[str, float]:
    """Return the percentile bootstrap interval `low`, `high` of a statistic of paired samples.

    Args:
        sample: Arrays of one length, resampled together.
        statistic: Function of them with an `axis` argument.
        seed: Seed of the resampling.

    Returns:
        The interval.
    """
    result = stats.bootstrap(
        tuple(sample),
        statistic,
        n_resamples=999,
        paired=len(sample) > 1,
        vectorized=True,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed),
        batch=100,
    )
    return {"low": float(result.confidence_interval.low), "high": float(result.confidence_interval.high)}


def paired_p(first: np.ndarray, second: np.ndarray) -> float:
    """Return the exact McNemar p-value of two outcomes, true or false, of the same seeds."""
    table = [[np.sum(first & second), np.sum(first & ~second)], [np.sum(~first & second), np.sum(~first & ~second)]]
    result: Any = mcnemar(table, exact=True)
    return float(result.pvalue)


def greater_p(difference: np.ndarray) -> float:
    """Return the one-sided Wilcoxon signed-rank p-value that paired differences tend to be above 0."""
    if not np.any(difference != 0):
        return 1.0
    result: Any = stats.wilcoxon(difference, alternative="greater")
    return float(result.pvalue)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return Holm's adjusted p-values under the same keys with `_holm` appended; those that are NaN stay out."""
    kept = {key: p for key, p in p_values.items() if not math.isnan(p)}
    if not kept:
        return {}
    adjusted: Any = multipletests(list(kept.values()), method="holm")[1]
    return {f"{key}_holm": float(p) for key, p in zip(kept, adjusted, strict=True)}
