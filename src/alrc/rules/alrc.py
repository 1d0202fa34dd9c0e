"""Adaptive learning rate clipping, the pure rule: decide, measure, commit.

What a loss does (`decide`), what a batch says (`measure`) and what becomes of the state (`commit`) are three functions,
because between the first and the last there may be micro-batches, recomputations, other processes and skipped updates.
Must import no framework, and never `reference.py`, which checks it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from alrc.moments import Moments
from alrc.ops import NUMPY, Ops
from alrc.rules.batch import Batch, weigh_limited
from alrc.rules.loss import LARGEST_LOSS, Decision
from alrc.rules.shift import Watched, feed_weight, moment_weight, watch
from alrc.rules.stored import read_state, write_state

__all__ = ["ALRC"]

SMALLEST_REACH = 1e-30
"""Keeps the factor of a finite loss above zero where the moments have no spread (S21)."""


@dataclass(frozen=True)
class ALRC:
    """Limit losses to a number of running standard deviations above their running mean.

    The pure rule; `alrc.torch.ALRC` applies it to tensors and their gradients. A loss above
    L_max = mean + num_stddev · std keeps the value L_max and the gradient (L_max / L) · ∇L (SPEC S5, S6).
    The defaults need no knowledge of the loss, and tell a spike from a shift of its level (S17-S20).

    Args:
        num_stddev: Standard deviations n above the mean, > 0. Around 3 works.
        betas: Decay rates β1, β2 of the running first and second moment, each in [0, 1).
        start: `"auto"`, or raw moments `(mu1, mu2)` with `mu2 > mu1²`, which are then followed as published.
        feed: Which losses the moments see, `"limited"` or `"unlimited"` (S10).
        second_moment: `"elements"` averages the squared elements of a batch, `"mean"` squares their mean (S11).
        eps: Number ≥ 0 added to the variance under the root; in units of loss².
        gain: Factor in (0, 1] on both raw moments when the limit is made; 1 except in `ALRC.cifar_scripts` (S12).
        observe: Updates before the first limit, and that are learned from after a shift, 4 to 256; `start="auto"` only.
        signed: Whether losses may be of either sign; the factor is then that of S21, else that of S6.
        num_stddev_below: Standard deviations below the mean under which losses are limited too (S22); None for none.

    Raises:
        ValueError: If a setting is outside its range; the message names the value.

    Example:
        >>> import numpy as np
        >>> rule = ALRC.reference(mu1_start=1.0, mu2_start=1.04)
        >>> decision = rule.decide(np.array([0.5, 2.0, 4.0]), rule.init())
        >>> print(decision.limited.round(3), decision.scale.round(3))
        [0.5 1.6 1.6] [1.  0.8 0.4]

    References:
        Ede & Beanland 2020, "Adaptive learning rate clipping stabilizes learning", Algorithm 1.
    """

    num_stddev: float = 3.0
    _: KW_ONLY
    betas: tuple[float, float] = (0.999, 0.999)
    start: Literal["auto"] | tuple[float, float] = "auto"
    feed: Literal["limited", "unlimited"] = "limited"
    second_moment: Literal["elements", "mean"] = "elements"
    eps: float = 0.0
    gain: float = 1.0
    observe: int = 32
    signed: bool = False
    num_stddev_below: float | None = None

    def __post_init__(self) -> None:
        for name in ("num_stddev", "num_stddev_below"):
            number = getattr(self, name)
            if number is not None and not (math.isfinite(number) and number > 0):
                raise ValueError(
                    f"{name} must be a positive finite number, got {number}; to limit nothing, leave it out."
                )
        betas: Any = self.betas  # whatever a configuration file held
        start: Any = self.start
        if not isinstance(betas, Sequence) or len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two decay rates in [0, 1), got {self.betas}.")
        if self.feed not in ("limited", "unlimited"):
            raise ValueError(f"feed must be 'limited' or 'unlimited', got {self.feed!r}.")
        if self.second_moment not in ("elements", "mean"):
            raise ValueError(f"second_moment must be 'elements' or 'mean', got {self.second_moment!r}.")
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise ValueError(f"eps must be a finite number ≥ 0, got {self.eps}.")
        if not 0 < self.gain <= 1:
            raise ValueError(f"gain must be in (0, 1], got {self.gain}.")
        if self.is_auto:
            if isinstance(self.observe, bool) or not 4 <= self.observe <= 256 or self.observe != int(self.observe):
                raise ValueError(f"observe must be a whole number of updates from 4 to 256, got {self.observe}.")
        elif isinstance(self.start, str) or not isinstance(start, Sequence) or len(self.start) != 2:
            raise ValueError(f"start must be 'auto' or a pair (mu1, mu2), got {self.start!r}.")
        elif Moments.from_raw(*self.start).mu2 > LARGEST_LOSS**2:
            raise ValueError(f"start must have mu2 up to {LARGEST_LOSS**2:g}, got {self.start!r}; scale the loss down.")

    @classmethod
    def paper(
        cls,
        num_stddev: float = 3.0,
        betas: tuple[float, float] = (0.999, 0.999),
        mu1: float = 25.0,
        mu2: float = 900.0,
    ) -> ALRC:
        """Follow Algorithm 1 of the paper to the letter.

        The moments follow the batch mean of the *unlimited* losses, so one spike raises the limit for about
        1 / (1 - β) steps.

        Args:
            num_stddev: Standard deviations above the mean.
            betas: Decay rates of μ1 and μ2.
            mu1: Starting estimate of the mean loss; an over-estimate is fine.
            mu2: Starting estimate of the mean squared loss, > `mu1`².

        Returns:
            The rule.
        """
        return cls(num_stddev, betas=betas, start=(mu1, mu2), feed="unlimited", second_moment="mean")

    @classmethod
    def reference(
        cls,
        num_stddev: float = 3.0,
        decay: float = 0.999,
        mu1_start: float = 25.0,
        mu2_start: float = 900.0,
    ) -> ALRC:
        """Follow the code the authors published (`alrc.py`).

        The moments follow the *limited* losses, the second one their mean square, and 1e-8 is added under the root.

        Args:
            num_stddev: Standard deviations above the mean.
            decay: Decay rate of both moments.
            mu1_start: Starting estimate of the mean loss.
            mu2_start: Starting estimate of the mean squared loss, > `mu1_start`².

        Returns:
            The rule.
        """
        return cls(num_stddev, betas=(decay, decay), start=(mu1_start, mu2_start), eps=1e-8)

    @classmethod
    def cifar_scripts(cls, num_stddev: float = 3.0) -> ALRC:
        """Follow the authors' squared-error and unstable-learning-rate CIFAR-10 scripts.

        They update with 0.997 · old + 0.001 · new, so their moments settle at a third of the truth (S12), start at
        μ1 = 10, μ2 = 20², and add 1e-3 under the root.

        Args:
            num_stddev: Standard deviations above the mean.

        Returns:
            The rule.
        """
        return cls(num_stddev, betas=(0.997, 0.997), start=(30.0, 1200.0), eps=1e-3, gain=1 / 3)

    @property
    def is_auto(self) -> bool:
        """Whether the rule learns the loss scale by itself."""
        return isinstance(self.start, str) and self.start == "auto"

    def init(self) -> Moments | Watched:
        """Return the state before the first loss, as Python numbers and a nested tuple of zeros."""
        if isinstance(self.start, str):
            return Watched(0.0, 0.0, 0, 0.0, np.zeros((2, self.observe)))
        return Moments.from_raw(*self.start)

    def limit(self, state: Any, ops: Ops = NUMPY) -> Any:
        """Return L_max for the next losses (S5), +inf while nothing can be limited (S7, S9).

        Args:
            state: State from `init` or `update`.
            ops: Primitives of the framework the state lives in.

        Returns:
            0-d array in the dtype of the moments.
        """
        ceiling, *_ = self._bounds(state, ops)
        return ops.where(ceiling < LARGEST_LOSS, ceiling, math.inf)

    def decide(self, losses: Any, state: Any, ops: Ops = NUMPY) -> Decision:
        """Decide the limited values and gradient factors of `losses`.

        Args:
            losses: Losses of any shape: one loss, a batch, or summands such as pixels or tokens, in the precision of
                the moments or better; NaN where there is none (padding). Unless `signed`, a loss ≤ 0 is never limited.
            state: State from `init` or `update`.
            ops: Primitives of the framework the losses live in.

        Returns:
            The decision; its arrays have the shape of `losses`.
        """
        ceiling, floor, std = self._bounds(state, ops)
        poisoned_high = ops.replace_nonfinite(losses, math.inf)
        if self.signed:
            # r / (r + excess) is 1 exactly up to the ceiling and 0 exactly at infinity.
            reach = 2 * self.num_stddev * std + SMALLEST_REACH
            scale = ops.divide(reach, ops.shift(ops.clip(ops.shift(poisoned_high, -ceiling), 0.0, None), reach))
        else:
            # c / max(L, c) is 1 exactly up to the ceiling c, and 0 exactly at infinity: no select, no 0 · inf.
            scale = ops.divide(ceiling, ops.floor(poisoned_high, ceiling))
        limited = ops.cap(ops.replace_nonfinite(losses, 0.0), ceiling)
        if self.signed:
            limited = limited * ops.ceil(scale)  # a ceiling below 0 has moved what is not finite
        if self.num_stddev_below is not None:
            lack = ops.clip(ops.shift(-limited, floor), 0.0, None) * ops.ceil(scale)
            if not self.signed:
                lack = ops.where(limited > 0, lack, 0.0)
            reach = 2 * self.num_stddev_below * std + SMALLEST_REACH
            limited = ops.where(lack > 0, floor, limited)
            scale = scale * ops.divide(reach, ops.shift(lack, reach))
        return Decision(limited, scale, ceiling, floor)

    def calm(self, losses: Any, largest: float, state: Any, ops: Ops = NUMPY) -> tuple[Batch | None, Any]:
        """Return the batch at once where it is plain that nothing is limited; for backends that may look at numbers.

        Nearly every batch is calm, and this is a third of `decide` and `measure`, with the same result bit for bit.

        Args:
            losses: Finite losses, at least one, unmasked, in the precision of the moments or better.
            largest: The largest of them.
            state: State from `init` or `update`, of numbers.
            ops: Primitives of the framework the losses live in.

        Returns:
            What `measure` would return, or None if a loss is to be limited; and the 0-d limit.
        """
        ceiling, *_ = self._bounds(state, ops)
        if not largest <= ceiling or self.num_stddev_below is not None:
            return None, ceiling
        if ops.size(losses) == 1:
            number, mean, var = 1.0, ops.clip(ops.scalar(losses), -LARGEST_LOSS, None), None
        else:
            number = float(ops.size(losses))
            mean = ops.clip(ops.total(losses) / number, -LARGEST_LOSS, LARGEST_LOSS)
            var = None
            if self.second_moment == "elements":
                var = ops.clip(ops.total_square(ops.shift(losses, -mean)) / number, None, LARGEST_LOSS**2)
        if not self.is_auto:
            return Batch(number, number, mean, var), ceiling
        return Batch(number, number, mean, var, 0.0, mean, 0 * mean if var is None else var), ceiling

    def measure(self, losses: Any, decision: Decision, state: Any, ops: Ops = NUMPY, weight: Any = None) -> Batch:
        """Return what these losses say about the level, for `commit` (S8, S10, S11).

        Args:
            losses: What was given to `decide`.
            decision: What `decide` returned for them.
            state: State the decision was made with.
            ops: Primitives of the framework the losses live in.
            weight: How much each loss counts, ≥ 0, shape of the losses; None counts them alike.

        Returns:
            The statistics of the batch, 0-d arrays.
        """
        fed = decision.limited if self.feed == "limited" else ops.replace_nonfinite(losses, 0.0)
        is_plain = ops.is_finite and weight is None
        valid = None if is_plain else ops.ceil(decision.scale)
        if weight is not None:
            # Padding may hold anything, and 0 · NaN would be NaN.
            weight = ops.where((weight > 0) & (weight <= LARGEST_LOSS), weight, 0.0)
            valid = valid * weight
        var = deviation = None
        if ops.size(fed) == 1:
            number = 1.0 if is_plain else ops.scalar(valid)
            mean = ops.clip(ops.scalar(fed), -LARGEST_LOSS, LARGEST_LOSS)
        else:
            number = float(ops.size(fed)) if is_plain else ops.total(valid)
            divisor = ops.where(number > 0, number, 1.0)
            total = ops.total(fed) if weight is None else ops.dot(fed, valid)
            mean = ops.clip(total / divisor, -LARGEST_LOSS, LARGEST_LOSS)
            if self.second_moment == "elements":
                gap = ops.shift(fed, -mean)
                deviation = gap if is_plain else valid * gap
                square = ops.total_square(gap) if is_plain else ops.dot(deviation, gap)
                var = ops.clip(square / divisor, None, LARGEST_LOSS**2)
        batch = Batch(number, number, mean, var)
        if not self.is_auto:
            return batch
        excess = ops.scalar(ops.replace_nonfinite(ops.gap(losses, decision.limited), 0.0))
        lost = 1 - feed_weight(state.rate, self.num_stddev, ops) if self.feed == "limited" else None
        return weigh_limited(batch, excess, deviation, decision, lost, weight, ops)

    def commit(self, batch: Batch, state: Any, ops: Ops = NUMPY, when: Any = None) -> Any:
        """Return the state after a batch (S4, S9, S17-S19).

        Args:
            batch: What `measure` returned, or several of those merged: the micro-batches of one update, or the shards
                of several processes.
            state: State all of them were measured with.
            ops: Primitives of the framework the state lives in.
            when: 0-d boolean; where it is false the state stays as it is. None is true.

        Returns:
            The new state; equal to `state` when no loss was finite (S8).
        """
        some = batch.number > 0
        one = ops.where(some, 1, 0)
        number = ops.where(some, batch.number, 1.0)
        kept = batch.number / number
        var = batch.var if self.second_moment == "elements" else None
        if not self.is_auto:
            weights = [(1 - beta) * kept for beta in self._different_betas]
            after = state.updated(batch.mean, var, (weights[0], weights[-1]), one)
        else:
            kept = batch.kept / number
            weights = [moment_weight(beta, state, ops) * kept for beta in sorted({*self.betas}, key=self.betas.index)]
            moments = Moments(*state[:3]).updated(batch.mean, var, (weights[0], weights[-1]), one)
            # Merging gives a variance between the parts, which the one batch of a mean does not have (S11).
            raw_var = batch.raw_var if self.second_moment == "elements" else 0 * batch.raw_var
            recent = ops.stack((batch.raw_mean, raw_var))
            share = ops.clip(batch.hits / number, 0.0, 1.0)
            after = watch(moments, some, share, recent, state, self.num_stddev, ops)
        if when is None:
            return after
        return type(state)(*(ops.where(when, new, old) for new, old in zip(after, state, strict=True)))

    def update(self, losses: Any, decision: Decision, state: Any, ops: Ops = NUMPY, weight: Any = None) -> Any:
        """Return the state after these losses: `measure`, then `commit`.

        Args:
            losses: What was given to `decide`.
            decision: What `decide` returned for them.
            state: State the decision was made with.
            ops: Primitives of the framework the losses live in.
            weight: How much each loss counts, ≥ 0, shape of the losses; None counts them alike.

        Returns:
            The new state; equal to `state` when no loss was finite (S8).
        """
        return self.commit(self.measure(losses, decision, state, ops, weight), state, ops)

    def state_dict(self, state: Moments | Watched) -> dict[str, NDArray[Any]]:
        """Return a state as every framework reads it: a versioned dictionary of numpy arrays (S16)."""
        return write_state(state)

    def load_state_dict(self, stored: Mapping[str, Any]) -> Moments | Watched:
        """Return the state that a dictionary of `state_dict` holds, whichever framework wrote it.

        Args:
            stored: The dictionary; its values may be arrays of any framework that numpy can read.

        Returns:
            A state of numpy arrays.

        Raises:
            KeyError: If an entry is missing.
            ValueError: If the version or a shape is not that of this rule, or an entry is unknown.
        """
        return read_state(stored, self.init())

    @property
    def _different_betas(self) -> tuple[float, ...]:
        """β1 and β2, or one of them if they are equal: then one weight serves both moments (S4)."""
        return self.betas[:1] if self.betas[0] == self.betas[1] else self.betas

    def _bounds(self, state: Any, ops: Ops) -> tuple[Any, Any, Any]:
        """Return ceiling (where there is none: the largest loss that ever passes, S8), floor and standard deviation."""
        mean, var = state.mean, state.var
        if self.gain != 1:
            var = self.gain * var + self.gain * (1 - self.gain) * (mean * mean)
            mean = self.gain * mean
        if self.betas[0] != self.betas[1]:
            var = ops.clip(var, 0.0, None)
        std = ops.sqrt(var + self.eps if self.eps else var)
        limit = ops.add_scaled(mean, std, self.num_stddev)
        is_limiting = state.count >= self.observe if self.is_auto else None
        if not self.signed:
            is_limiting = limit > 0 if is_limiting is None else is_limiting & (limit > 0)
        ceiling = limit if is_limiting is None else ops.where(is_limiting, limit, LARGEST_LOSS)
        if self.num_stddev_below is None:
            return ceiling, None, std
        floor = ops.add_scaled(mean, std, -self.num_stddev_below)
        return ceiling, floor if is_limiting is None else ops.where(is_limiting, floor, -LARGEST_LOSS), std
