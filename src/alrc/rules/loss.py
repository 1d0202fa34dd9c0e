"""The rules that measure losses: ALRC, and the Huberisation it is compared with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from alrc.ops import NUMPY, Ops

__all__ = ["LARGEST_LOSS", "Decision", "Huber", "Rule"]

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
    floor: Any = None
    """The 0-d lower limit that was applied (S22); None for a rule without one."""


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
