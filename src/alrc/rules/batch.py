"""What one batch of losses says about their level, in a form that can be merged.

The micro-batches of one update and the shards of several processes are merged before they enter the state, so that they
equal the joined batch (SPEC S23, S24). Must import no framework.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple

from alrc.ops import NUMPY, Ops
from alrc.rules.loss import LARGEST_LOSS, Decision

__all__ = ["Batch", "weigh_limited"]


class Batch(NamedTuple):
    """Hold the statistics of some losses, 0-d arrays.

    The last three are there for `start="auto"` only, else None.

    Example:
        >>> batch = Batch.merged([Batch(3.0, 3.0, 2.0, 0.5), Batch(1.0, 1.0, 6.0, None)])
        >>> batch.number, batch.mean, batch.var
        (4.0, 3.0, 3.375)

    References:
        Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance".
    """

    number: Any
    """Number of finite losses, or the sum of their weights."""
    kept: Any
    """The same with limited losses weighted as S17 says: the weight of `mean` and `var`."""
    mean: Any
    """Mean of the losses that the moments are fed with."""
    var: Any = None
    """Their variance, ≥ 0; None for a single loss, or where the second moment is that of the mean (S11)."""
    hits: Any = None
    """Number of limited losses, or the sum of their weights."""
    raw_mean: Any = None
    """Mean of the losses before they were limited."""
    raw_var: Any = None
    """Their variance, ≥ 0."""

    @classmethod
    def merged(cls, batches: Sequence[Batch], ops: Ops = NUMPY) -> Batch:
        """Return the statistics of the joined batch.

        Args:
            batches: At least one, all measured with one state.
            ops: Primitives of the framework they live in.

        Returns:
            One batch; that itself when there is only one.
        """
        return reduce(lambda one, other: one._merged_with(other, ops), batches)

    def sums(self, center: Any, ops: Ops = NUMPY) -> Any:
        """Return count, sum and centred square sum, which add up over processes.

        Args:
            center: 0-d reference that all processes share, such as the running mean.
            ops: Primitives of the framework.

        Returns:
            Array of shape (3,), or (7,) where all fields are there.
        """
        gap = self.mean - center
        var = 0 * gap if self.var is None else self.var
        sums = [self.number, self.kept, self.kept * gap, self.kept * (var + gap * gap)]
        if self.hits is not None:
            gap = self.raw_mean - center
            sums += [self.hits, self.number * gap, self.number * (self.raw_var + gap * gap)]
        return ops.stack(sums)

    @classmethod
    def from_sums(cls, sums: Any, center: Any, ops: Ops = NUMPY) -> Batch:
        """Return the batch that has these sums.

        Args:
            sums: What `sums` returned, added up.
            center: The reference it was given.
            ops: Primitives of the framework.

        Returns:
            The joined batch.
        """

        def level(weight: Any, total: Any, square: Any) -> tuple[Any, Any]:
            divisor = ops.where(weight > 0, weight, 1.0)
            gap = total / divisor
            return center + gap, ops.clip(square / divisor - gap * gap, 0.0, None)

        batch = cls(sums[0], sums[1], *level(sums[1], sums[2], sums[3]))
        if sums.shape[0] == 4:
            return batch
        return cls(*batch[:4], sums[4], *level(sums[0], sums[5], sums[6]))

    def joined(self, add_up: Callable[[Any], Any], center: Any, ops: Ops = NUMPY) -> Batch:
        """Return the joined batch of a group whose members all call this.

        In two rounds, the second about the joint mean: exact in float32, where `sums` needs float64.

        Args:
            add_up: Adds up an array over the members, such as an all-reduce.
            center: 0-d reference that all members share, such as the running mean.
            ops: Primitives of the framework.

        Returns:
            One batch, the same for every member.
        """
        levels = [(self.kept, self.mean, self.var)]
        if self.hits is not None:
            levels.append((self.number, self.raw_mean, self.raw_var))
        sums = add_up(
            ops.stack(
                [self.number, self.number if self.hits is None else self.hits]
                + [part for weight, mean, _ in levels for part in (weight, weight * (mean - center))]
            )
        )
        means = [center + sums[i + 1] / ops.where(sums[i] > 0, sums[i], 1.0) for i in range(2, 2 + 2 * len(levels), 2)]
        squares = add_up(
            ops.stack(
                [
                    weight * ((0 if var is None else var) + (mean - joint) * (mean - joint))
                    for (weight, mean, var), joint in zip(levels, means, strict=True)
                ]
            )
        )
        joint = [
            (mean, squares[i] / ops.where(sums[2 + 2 * i] > 0, sums[2 + 2 * i], 1.0)) for i, mean in enumerate(means)
        ]
        if self.hits is None:
            return Batch(sums[0], sums[2], *joint[0])
        return Batch(sums[0], sums[2], *joint[0], sums[1], *joint[1])

    def _merged_with(self, other: Batch, ops: Ops) -> Batch:
        """Return the statistics of two batches as one."""

        def level(weights: Any, means: Any, variances: Any) -> tuple[Any, Any]:
            both = weights[0] + weights[1]
            share = weights[1] / ops.where(both > 0, both, 1.0)
            gap = means[1] - means[0]
            within = [0 if var is None else var for var in variances]
            return means[0] + share * gap, within[0] + share * (within[1] - within[0]) + share * (1 - share) * gap * gap

        batch = Batch(
            self.number + other.number,
            self.kept + other.kept,
            *level((self.kept, other.kept), (self.mean, other.mean), (self.var, other.var)),
        )
        if self.hits is None:
            return batch
        raw = level((self.number, other.number), (self.raw_mean, other.raw_mean), (self.raw_var, other.raw_var))
        return Batch(*batch[:4], self.hits + other.hits, *raw)


def weigh_limited(
    batch: Batch, excess: Any, deviation: Any, decision: Decision, lost: Any | None, weight: Any | None, ops: Ops
) -> Batch:
    """Add to a batch how many losses were limited and what they were before, and let them count less (S17).

    Args:
        batch: Number, mean and variance of the losses the moments are fed with.
        excess: What limiting took from each loss: 0 where nothing, negative where it was raised; 0-d for one loss.
        deviation: Difference of each fed loss from their mean, times its weight; None where `batch.var` is.
        decision: The decision; its limits are used.
        lost: What a limited loss counts less than 1 in the moments; None where they are fed with unlimited losses.
        weight: Weight of each loss, or None.
        ops: Primitives of the framework.

    Returns:
        The batch with all its fields.
    """
    number, _, mean, var, *_ = batch
    is_single = ops.size(excess) == 1
    if is_single:
        hits = ops.where(excess != 0, number, 0 * number)
    else:
        hits = ops.count_nonzero(excess) if weight is None else ops.dot(ops.where(excess != 0, 1.0, 0.0), weight)
    level = mean, 0 * mean if var is None else var
    if lost is None:
        return Batch(number, number, mean, var, hits, *level)
    divisor = ops.where(number > 0, number, 1.0)

    def unlimited() -> tuple[Any, Any]:
        """Return mean and variance of L from L = limited + excess; every term is as exact as its parts."""
        weighted = excess if weight is None or is_single else excess * weight
        mean_excess = weighted if is_single else ops.total(weighted) / divisor
        raw_var = level[1]
        if var is not None:
            both = ops.dot(weighted, excess) + 2 * ops.dot(deviation, excess)
            raw_var = var + both / divisor - mean_excess * mean_excess
        return _bounded(mean + mean_excess, -LARGEST_LOSS, LARGEST_LOSS, ops), _bounded(
            raw_var, 0.0, LARGEST_LOSS**2, ops
        )

    raw = ops.select(hits > 0, unlimited, level)
    kept = number - lost * hits
    if is_single:
        return Batch(number, kept, mean, var, hits, *raw)

    def reweighted() -> tuple[Any, Any]:
        """Return mean and variance of the fed losses with the limited ones counted `lost` less."""
        parts = [(hits, decision.ceiling - mean)]
        if decision.floor is not None:
            low = ops.clip(excess, None, 0.0)
            below = ops.count_nonzero(low) if weight is None else ops.dot(ops.where(low != 0, 1.0, 0.0), weight)
            parts = [(hits - below, decision.ceiling - mean), (below, decision.floor - mean)]
        rest = ops.where(kept > 0, kept, 1.0)
        moved = lost * sum(part * gap for part, gap in parts) / rest
        square = number * level[1] - lost * sum(part * gap * gap for part, gap in parts)
        return mean - moved, ops.clip(square / rest - moved * moved, 0.0, LARGEST_LOSS**2)

    mean, new_var = ops.select(hits > 0, reweighted, level)
    return Batch(number, kept, mean, None if var is None else new_var, hits, *raw)


def _bounded(x: Any, low: float, high: float, ops: Ops) -> Any:
    """Return a number moved into [low, high], and `high` where it could not be computed."""
    return ops.clip(ops.replace_nonfinite(x, high), low, high)
