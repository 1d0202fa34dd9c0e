"""The rules that measure losses: ALRC, and the Huberisation it is compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from alrc.moments import Moments
from alrc.ops import NUMPY, Ops

__all__ = ["ALRC", "LARGEST_LOSS", "Decision", "Huber", "Rule"]

LARGEST_LOSS = 1e15
"""Ceiling of all losses, limit or not (S8): the square of a larger one could not be summed in float32."""


class Decision(NamedTuple):
    """Say what a rule does with one set of losses.

    `scale` is the truth about the gradient: a backend multiplies d loss / dθ by it, element by element.
    """

    limited: Any
    """Forward values, shape of the losses: the loss, or its limit (S6); 0 where the loss is not finite (S8)."""
    scale: Any
    """Gradient factor in [0, 1], shape of the losses: 1 where untouched, 0 exactly where the loss is not finite."""
    ceiling: Any
    """The 0-d limit that was applied; `LARGEST_LOSS` where there was none (S7, S9)."""


@runtime_checkable
class Rule(Protocol):
    """Turn losses and a state into a decision, then into the next state.

    `init` gives the state of the first step, `decide` is a pure function of losses and state, and `update` takes the
    losses and what was decided into the state. A rule without memory has the state `None`.
    """

    def init(self) -> Any:
        """Return the state before the first loss."""
        ...

    def decide(self, losses: Any, state: Any, ops: Ops = NUMPY) -> Decision:
        """Decide the limited values and gradient factors of `losses`."""
        ...

    def update(self, losses: Any, decision: Decision, state: Any, ops: Ops = NUMPY) -> Any:
        """Return the state after these losses."""
        ...


@dataclass(frozen=True)
class ALRC:
    """Limit losses to a number of running standard deviations above their running mean.

    The pure rule; `alrc.torch.ALRC` applies it to tensors and their gradients. A loss above
    L_max = mean + num_stddev · std keeps the value L_max and the gradient (L_max / L) · ∇L (SPEC S5, S6).
    The defaults need no knowledge of the loss: the first `observe` updates only learn its scale (S9).

    Args:
        num_stddev: Standard deviations n above the mean, > 0. Around 3 works.
        betas: Decay rates β1, β2 of the running first and second moment, each in [0, 1).
        start: `"auto"`, or raw moments `(mu1, mu2)` with `mu2 > mu1²`. Over-estimates are fine, under-estimates not.
        feed: Which losses the moments see, `"limited"` or `"unlimited"` (S10).
        second_moment: `"elements"` averages the squared elements of a batch, `"mean"` squares their mean (S11).
        eps: Number ≥ 0 added to the variance under the root; in units of loss².
        gain: Factor in (0, 1] on both raw moments when the limit is made; 1 except in `ALRC.cifar_scripts` (S12).
        observe: Updates before the first limit when `start="auto"`, 1 to 32.

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

    def __post_init__(self) -> None:
        if not (math.isfinite(self.num_stddev) and self.num_stddev > 0):
            raise ValueError(
                f"num_stddev must be a positive finite number, got {self.num_stddev}; to limit nothing, leave ALRC out."
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
            if isinstance(self.observe, bool) or not 1 <= self.observe <= 32 or self.observe != int(self.observe):
                raise ValueError(f"observe must be a whole number of updates from 1 to 32, got {self.observe}.")
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

    def init(self) -> Moments:
        """Return the moments before the first loss, as Python numbers."""
        return Moments(0.0, 0.0, 0) if isinstance(self.start, str) else Moments.from_raw(*self.start)

    def limit(self, state: Moments, ops: Ops = NUMPY) -> Any:
        """Return L_max for the next losses (S5), +inf while nothing can be limited (S7, S9).

        Args:
            state: Moments from `init` or `update`.
            ops: Primitives of the framework the moments live in.

        Returns:
            0-d array in the dtype of the moments, > 0.
        """
        ceiling = self._ceiling(state, ops)
        return ops.where(ceiling < LARGEST_LOSS, ceiling, math.inf)

    def decide(self, losses: Any, state: Moments, ops: Ops = NUMPY) -> Decision:
        """Decide the limited values and gradient factors of `losses`.

        Args:
            losses: Positive losses of any shape: one loss, a batch, or summands such as pixels or tokens, in the
                precision of the moments or better. A loss ≤ 0 is never limited (S7).
            state: Moments from `init` or `update`.
            ops: Primitives of the framework the losses live in.

        Returns:
            The decision; its arrays have the shape of `losses`.
        """
        ceiling = self._ceiling(state, ops)
        # c / max(L, c) is 1 exactly up to the ceiling c, and 0 exactly at infinity: no select, no 0 · inf.
        scale = ceiling / ops.floor(ops.replace_nonfinite(losses, math.inf), ceiling)
        limited = ops.cap(ops.replace_nonfinite(losses, 0.0), ceiling)
        return Decision(limited, scale, ceiling)

    def update(self, losses: Any, decision: Decision, state: Moments, ops: Ops = NUMPY) -> Moments:
        """Return the moments after these losses (S4, S9-S11).

        Args:
            losses: What was given to `decide`.
            decision: What `decide` returned for them.
            state: Moments the decision was made with.
            ops: Primitives of the framework the losses live in.

        Returns:
            The new moments; equal to `state` when no loss was finite (S8).
        """
        valid = ops.ceil(decision.scale)
        fed = decision.limited
        if self.feed == "unlimited":
            fed = ops.replace_nonfinite(losses, 0.0)
        var = None
        if ops.size(fed) == 1:
            number = some = ops.scalar(valid)
            mean = ops.clip(ops.scalar(fed), -LARGEST_LOSS, LARGEST_LOSS)
        else:
            number = ops.total(valid)
            divisor = ops.clip(number, 1.0, None)
            some = number / divisor
            mean = ops.clip(ops.total(fed) / divisor, -LARGEST_LOSS, LARGEST_LOSS)
            if self.second_moment == "elements":
                deviation = valid  # reuse its memory: fed - mean where valid, 0 - 0 elsewhere
                deviation *= -mean
                deviation += fed
                var = ops.clip(ops.total_square(deviation) / divisor, None, LARGEST_LOSS**2)
        weight = self._weight(self.betas[0], state, some, ops)
        other = weight if self.betas[0] == self.betas[1] else self._weight(self.betas[1], state, some, ops)
        return state.updated(mean, var, (weight, other), number > 0)

    def _ceiling(self, state: Moments, ops: Ops) -> Any:
        """Return the limit, or the largest loss that ever passes (S8) where there is none."""
        mean, var = state.mean, state.var
        if self.gain != 1:
            var = self.gain * var + self.gain * (1 - self.gain) * (mean * mean)
            mean = self.gain * mean
        if self.betas[0] != self.betas[1]:
            var = ops.clip(var, 0.0, None)
        limit = ops.add_scaled(mean, ops.sqrt(var + self.eps if self.eps else var), self.num_stddev)
        is_limiting = limit > 0
        if self.is_auto:
            is_limiting = is_limiting & (state.count >= self.observe)
        return ops.where(is_limiting, limit, LARGEST_LOSS)

    def _weight(self, beta: float, state: Moments, some: Any, ops: Ops) -> Any:
        """Return the weight of a batch in a running moment: 1 - β, or 1/t while the memory fills (S9); 0 for none."""
        if self.is_auto:
            return ops.clip(some / (state.count + 1), 1 - beta, None) * some
        return (1 - beta) * some


@dataclass(frozen=True)
class Huber:
    """Replace losses above `h` by √(h·L), the Huberisation the paper compares with.

    Stateless. Unlike ALRC it is an ordinary function of the loss: its gradient factor ½·√(h / L) is its derivative
    (SPEC S13).

    Args:
        h: Loss above which the root sets in, > 0.

    Raises:
        ValueError: If `h` is not a positive finite number.

    Example:
        >>> import numpy as np
        >>> decision = Huber(h=1.0).decide(np.array([0.25, 4.0]), None)
        >>> print(decision.limited, decision.scale)
        [0.25 2.  ] [1.   0.25]

    References:
        Ede & Beanland 2020, section I: L → min(L, (h·L)^½); Huber 1964.
    """

    h: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.h) and self.h > 0):
            raise ValueError(f"h must be a positive finite number, got {self.h}.")

    def init(self) -> None:
        """Return the state, which is none."""

    def decide(self, losses: Any, state: None = None, ops: Ops = NUMPY) -> Decision:
        """Decide the limited values and gradient factors of `losses`.

        Args:
            losses: Losses of any shape; those ≤ h, and negative ones, are untouched.
            state: None.
            ops: Primitives of the framework the losses live in.

        Returns:
            The decision; its arrays have the shape of `losses`, its limit is `h`.
        """
        finite = ops.replace_nonfinite(losses, 0.0)
        large = ops.clip(finite, self.h, None)
        root = ops.sqrt(self.h / large)
        # h·L overflows where h / L does not.
        limited = ops.where(large > self.h, large * root, finite)
        scale = ops.where(large > self.h, 0.5 * root, 1.0)
        return Decision(limited, ops.where(finite == losses, scale, 0.0), self.h)

    def update(self, losses: Any, decision: Decision, state: None = None, ops: Ops = NUMPY) -> None:
        """Return the state, which is none."""
