"""Tell a spike from a shift: how often is the limit hit, and what was the level lately?

The moments of ALRC learn from limited losses, so one spike cannot raise their limit. Alone, they would also take a
thousand updates to accept that the level has risen. This file is the way out (SPEC S17-S20). It knows nothing of losses
but a share and a pair of moments for each update, and imports no framework.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from alrc.moments import Moments
from alrc.ops import Ops

__all__ = ["Watched", "alarm_delay", "explained_share", "largest_share"]

RATE_WEIGHT = 1 / 32
"""Weight of one update in the running share of limited losses (S18)."""
ALARM_MARGIN = 1 / 3
"""How far the alarm lies between the explained share and 1 (S18)."""
WINSOR = 4.0
"""Distance of the ceiling of the recent means from their median, in distances of the upper quartile (S19)."""
RECENCY = 3
"""With the weight (1 + 3) / (t + 1 + 3) after t updates, the last quarter of them is remembered (S17)."""


class Watched(NamedTuple):
    """Hold running moments, and what tells whether they still describe the losses.

    The state of `ALRC(start="auto")`. The first three fields are those of `Moments`.
    """

    mean: Any
    """Running mean μ1 of the losses."""
    var: Any
    """Running variance; never below zero while both decays are equal."""
    count: Any
    """Number of updates that the moments stand for, an integer; goes back to `observe` when they are learned anew."""
    rate: Any
    """Running share of limited losses, in [0, 1]."""
    recent: Any
    """Mean and variance of the unlimited losses of the last updates, oldest first, shape (2, observe)."""

    @property
    def mu1(self) -> Any:
        """First raw moment, the running mean of L."""
        return self.mean

    @property
    def mu2(self) -> Any:
        """Second raw moment, the running mean of L²."""
        return self.var + self.mean * self.mean


def explained_share(num_stddev: float) -> float:
    """Return the largest share of losses that can lie n standard deviations above their mean.

    Cantelli's inequality: no distribution has more than 1 / (1 + n²) of its mass beyond n standard deviations on one
    side. Losses that are limited more often are not described by the moments that limit them (SPEC S18).

    Args:
        num_stddev: Standard deviations n, > 0.

    Returns:
        The share, in (0, 1).

    Example:
        >>> round(explained_share(3.0), 12)
        0.1

    References:
        Cantelli 1929, "Sui confini della probabilità".
    """
    return 1 / (1 + num_stddev * num_stddev)


def largest_share(num_stddev: float) -> float:
    """Return the running share of limited losses above which the moments are learned anew (SPEC S18).

    Args:
        num_stddev: Standard deviations n, > 0.

    Returns:
        The share, in (1/3, 1): a third of the way from what Cantelli's inequality allows to 1.

    Example:
        >>> round(largest_share(3.0), 12)
        0.4
    """
    share = explained_share(num_stddev)
    return share + ALARM_MARGIN * (1 - share)


def alarm_delay(num_stddev: float) -> int:
    """Return after how many updates that are limited altogether the moments are learned anew (SPEC S20).

    Args:
        num_stddev: Standard deviations n, > 0.

    Returns:
        Number of updates when none was limited before; fewer when some were.

    Example:
        >>> alarm_delay(3.0)
        17
    """
    return math.ceil(math.log(1 - largest_share(num_stddev)) / math.log(1 - RATE_WEIGHT))


def feed_weight(rate: Any, num_stddev: float, ops: Ops) -> Any:
    """Return the weight of a limited loss in the moments, in [0, 1] (S17).

    0 while limits are at most half as frequent as the moments can explain, so that a lone spike leaves no trace; 1 once
    they are as frequent as that, so that the moments can follow.
    """
    return ops.clip(2 / explained_share(num_stddev) * rate - 1, 0.0, 1.0)


def moment_weight(beta: float, before: Moments, ops: Ops) -> Any:
    """Return the weight of the next update in a running moment: that of the recent quarter, at least 1 - β (S17)."""
    return ops.clip((1 + RECENCY) / ops.real(before.count + (1 + RECENCY), before.mean), 1 - beta, None)


def watch(
    moments: Moments, some: Any, share: Any, recent: Any, before: Watched, num_stddev: float, ops: Ops
) -> Watched:
    """Return the state after an update, learned anew from the recent past where that is called for (S18, S19).

    Args:
        moments: Moments with the update taken in.
        some: Whether the update held a loss at all, a 0-d boolean.
        share: Share of its losses that were limited, 0-d.
        recent: Mean and variance of its losses before limiting, shape (2,).
        before: State before the update.
        num_stddev: Standard deviations n.
        ops: Primitives of the framework.

    Returns:
        The state; where `some` is false, that before.
    """
    size = before.recent.shape[-1]
    pushed = ops.where(some, ops.push(before.recent, recent), before.recent)
    rate = before.rate + ops.where(some, RATE_WEIGHT, 0.0) * (share - before.rate)
    is_full = moments.count >= size
    is_first = is_full & (before.count < size)
    is_anew = is_first | (is_full & (rate > largest_share(num_stddev)))
    mean, var = ops.select(is_anew, lambda: level_of(pushed, ops), (moments.mean, moments.var))
    return Watched(mean, var, ops.where(is_anew, size, moments.count), ops.where(is_anew, 0.0, rate), pushed)


def level_of(recent: Any, ops: Ops) -> tuple[Any, Any]:
    """Return mean and variance of the recent losses, in which up to a quarter of the updates may be anything (S19)."""
    size = recent.shape[-1]
    ordered = ops.sort(recent)
    middle, high = ordered[:, size // 2 : size // 2 + 1], ordered[:, 3 * size // 4 : 3 * size // 4 + 1]
    low = ordered[:, size - 1 - 3 * size // 4 : size - 3 * size // 4]
    bounded = ops.clip(recent, middle - WINSOR * (middle - low), middle + WINSOR * (high - middle))
    means, variances = bounded[0], bounded[1]
    mean = ops.total(means) / size
    return mean, (ops.total_square(means - mean) + ops.total(variances)) / size
