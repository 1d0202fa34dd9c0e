"""Apply the rules of `alrc.rules` to many seeds at once: a leading axis of arrays holds one independent run per row.

Norms are measured here, decisions are the rules'. The rules of gradients are element-wise, so rows cost nothing. ALRC
keeps a state and reduces over a batch; `RowOps` tells it, in its own primitives, that a batch is one row.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from alrc.ops import NUMPY, NumpyOps
from alrc.rules import AGC, ALRC, Decision, GradientRule, Norm, UnitNorms, Watched

LABELS = {"none": "none", "norm": "Norm", "agc": "AGC", "agc_last": "AGC, last layer excluded", "alrc": "ALRC"}
"""What each method is called in a report."""
LAST_LAYER = "last.*"
"""Names of the parameters that `agc_last` leaves alone."""

Arrays = dict[str, np.ndarray]


class _RowByRowError(Exception):
    """Say that a part of a rule cannot be asked for all rows at once."""


class RowOps(NumpyOps):
    """Reduce along the last axis and keep it, so that every row is a batch of its own; states have the shape (rows, 1).

    What sorts (ALRC learning its moments anew, S19) indexes one run's memory and is left to the caller, row by row:
    `left` tells for which.
    """

    def __init__(self) -> None:
        self.left: np.ndarray | None = None

    def total(self, x: Any, /) -> Any:
        """Return the sum along each row."""
        return np.sum(x, axis=-1, keepdims=True)

    def total_square(self, x: Any, /) -> Any:
        """Return the sum of squares along each row."""
        return np.sum(x * x, axis=-1, keepdims=True)

    def dot(self, x: Any, y: Any, /) -> Any:
        """Return the sum of x · y along each row."""
        return np.sum(x * y, axis=-1, keepdims=True)

    def count_nonzero(self, x: Any, /) -> Any:
        """Return the number of elements of each row that are not 0."""
        return np.count_nonzero(x, axis=-1, keepdims=True).astype(np.float64)

    def size(self, x: Any, /) -> int:
        """Return the number of elements of a row."""
        return int(np.shape(x)[-1])

    def scalar(self, x: Any, /) -> Any:
        """Return the array as it is: rows of one element are the numbers of their runs."""
        return x

    def push(self, x: Any, value: Any, /) -> Any:
        """Return `x` without the first and with `value` as the last element of the last axis."""
        pushed = np.empty_like(x)
        pushed[..., :-1] = x[..., 1:]
        pushed[..., -1:] = value
        return pushed

    def sort(self, x: Any, /) -> Any:
        """Refuse; see the class."""
        raise _RowByRowError

    def select(
        self, condition: Any, make: Callable[[], tuple[Any, ...]], others: tuple[Any, ...], /
    ) -> tuple[Any, ...]:
        """Return what `make` returns in the rows where the condition holds, else `others`."""
        if not np.any(condition):
            return others
        try:
            made = make()
        except _RowByRowError:
            self.left = np.ravel(condition)
            return others
        return tuple(np.where(condition, x, y) for x, y in zip(made, others, strict=True))


@dataclass(frozen=True)
class Method:
    """Hold one method on trial: a rule, or none.

    Use `weigh` on the losses of a step, take the gradient of their weighted mean, and `clip` it. For a rule of
    gradients `weigh` does nothing, for ALRC `clip` does nothing, and for `none` neither does.

    Args:
        key: Name in columns and summaries.
        rule: `ALRC`, a rule of gradients without a memory, or None.
    """

    key: str
    rule: Any = None

    @property
    def is_of_losses(self) -> bool:
        """Whether the rule limits losses."""
        return isinstance(self.rule, ALRC)

    def start(self, rows: int) -> Any:
        """Return the state of every run before its first loss; None for a method without one."""
        if not self.is_of_losses:
            return None
        fields = [np.zeros((rows, 1)) + np.asarray(field) for field in self.rule.init()[:4]]
        if not self.rule.is_auto:
            return type(self.rule.init())(*fields)
        mean, var, count, rate = fields
        return Watched(mean, var, count, rate, np.zeros((2, rows, self.rule.observe)))

    def weigh(self, losses: np.ndarray, state: Any, *, is_learning: bool = True) -> tuple[Any, Any]:
        """Return the factor of every loss's gradient, and the state after these losses.

        Args:
            losses: Losses, shape (rows, batch).
            state: State from `start` or here.
            is_learning: Whether the losses are an update; else the state stays.

        Returns:
            The factors, shape (rows, batch), or 1.0 for a method that does not look at losses; and the state.
        """
        if not self.is_of_losses:
            return 1.0, state
        ops = RowOps()
        decision = self.rule.decide(losses, state, ops)
        if not is_learning:
            return decision.scale, state
        after = self.rule.update(losses, decision, state, ops)
        if ops.left is not None:
            self._learn_alone(np.flatnonzero(ops.left), losses, decision, state, after)
        return decision.scale, after

    def clip(self, gradients: Mapping[str, np.ndarray], weights: Mapping[str, np.ndarray], lead: int = 1) -> Arrays:
        """Return the gradients as the rule limits them.

        Args:
            gradients: Gradient of each parameter, shape (*lead axes, *shape of the parameter).
            weights: The parameters, broadcastable to the gradients.
            lead: Number of leading axes, along which everything is independent: rows, and examples if there are.

        Returns:
            New gradients, or those given if the method limits none.
        """
        factors = self.factors(gradients, weights, lead)
        return {name: gradient * factors[name] for name, gradient in gradients.items()} if factors else {**gradients}

    def factors(self, gradients: Mapping[str, np.ndarray], weights: Mapping[str, np.ndarray], lead: int = 1) -> Arrays:
        """Return the factor of each parameter's gradient, broadcastable to it; empty if the method limits none."""
        if self.rule is None or self.is_of_losses:
            return {}
        rule: GradientRule = self.rule
        measures = rule.measures
        if measures.granularity == "global":
            square = sum(_square(gradient, lead) for gradient in gradients.values())
            scale = rule.decide(np.sqrt(square), None, NUMPY).scale
            return {name: _spread(scale, gradient.ndim) for name, gradient in gradients.items()}
        if measures.granularity != "unit" or not measures.weights:
            raise ValueError(f"the theory's experiments measure global norms or units, not {measures}.")
        found: Arrays = {}
        for name, gradient in gradients.items():
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in measures.exclude):
                found[name] = np.ones((1,) * gradient.ndim)
                continue
            kept = lead + (gradient.ndim >= lead + 2)  # a matrix has units; a vector or a number is one
            norms = UnitNorms(np.sqrt(_square(gradient, kept)), np.sqrt(_square(weights[name], kept)))
            found[name] = _spread(rule.decide(norms, None, NUMPY).scale, gradient.ndim)
        return found

    def _learn_alone(self, rows: np.ndarray, losses: np.ndarray, decision: Decision, state: Any, after: Any) -> None:
        """Write into `after` what the rule makes of these rows, asked one by one with the plain NumPy primitives."""
        for row in rows:
            mean, var, count, rate = (field[row, 0] for field in state[:4])
            own = Watched(mean, var, count, rate, state.recent[:, row])
            ceiling = np.broadcast_to(decision.ceiling, (len(losses), 1))[row, 0]
            one = Decision(decision.limited[row], decision.scale[row], ceiling)
            learned = self.rule.update(losses[row], one, own, NUMPY)
            for field, value in zip(after[:4], learned[:4], strict=True):
                field[row, 0] = value
            after.recent[:, row] = learned.recent


def _square(x: np.ndarray, kept: int) -> np.ndarray:
    """Return the sum of squares over all axes but the first."""
    if x.ndim == kept:
        return x * x
    flat = x.reshape(*x.shape[:kept], -1)
    return np.einsum("...i,...i->...", flat, flat)


def _spread(x: np.ndarray, ndim: int) -> np.ndarray:
    """Return the array with axes of length 1 behind its own."""
    return x.reshape(*x.shape, *(1,) * (ndim - x.ndim))


def make(key: str, threshold: float | None = None) -> Method:
    """Make a method.

    Args:
        key: One of `LABELS`.
        threshold: λ of Norm and AGC, n of ALRC; nothing for `none`. ALRC is the default rule, which starts by itself.

    Returns:
        The method.

    Raises:
        ValueError: If there is no such method.
    """
    if key == "none":
        return Method(key)
    value = math.nan if threshold is None else threshold
    if key == "norm":
        return Method(key, Norm(value))
    if key == "agc":
        return Method(key, AGC(value))
    if key == "agc_last":
        return Method(key, AGC(value, exclude=(LAST_LAYER,)))
    if key == "alrc":
        return Method(key, ALRC(value))
    raise ValueError(f"there is no method {key!r}; choose one of {', '.join(LABELS)}.")


def steps(gain: float, exponent: float, number: int, first: int = 0) -> np.ndarray:
    """Return the step sizes γ_n = gain / (n + 1)^exponent for n = first, …, number - 1."""
    return gain / np.arange(first + 1, number + 1, dtype=np.float64) ** exponent


def written(number: float) -> str:
    """Write a number the way it stands in the name of a column: 0.5 as 0p5."""
    return "inf" if math.isinf(number) else f"{number:g}".replace(".", "p").replace("-", "m")


def log_spaced(last: int, number: int) -> np.ndarray:
    """Return about so many whole numbers from 1 to `last`, evenly spaced on a logarithmic axis, ends included."""
    return np.unique(np.rint(np.geomspace(1, last, number)).astype(np.int64))
