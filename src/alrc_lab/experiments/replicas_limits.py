"""Limit the losses of many runs at once: one call of a rule of `alrc.rules` for all runs that use it.

A run is a row. `RowOps` tells a rule, in its own primitives, that a batch is one row and its state one number of each
column vector; so decisions, moments and alarms are the rule's, and no row ever sees another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alrc import rules
from alrc.torch import ALRC, Huber
from alrc.torch.ops import TorchOps


class RowOps(TorchOps):
    """Reduce along the last axis and keep it: losses have the shape (rows, batch), numbers of a state (rows, 1)."""

    def total(self, x: Tensor, /) -> Tensor:
        """Return the sum along each row."""
        return x.sum(-1, keepdim=True)

    def total_square(self, x: Tensor, /) -> Tensor:
        """Return the sum of squares along each row."""
        return (x * x).sum(-1, keepdim=True)

    def dot(self, x: Tensor, y: Tensor, /) -> Tensor:
        """Return the sum of x · y along each row."""
        return (x * y).sum(-1, keepdim=True)

    def count_nonzero(self, x: Tensor, /) -> Tensor:
        """Return the number of elements of each row that are not 0."""
        return (x != 0).sum(-1, keepdim=True).to(x.dtype)

    def size(self, x: Tensor, /) -> int:
        """Return the number of elements of a row."""
        return x.shape[-1]

    def scalar(self, x: Tensor, /) -> Tensor:
        """Return the tensor as it is: rows of one element are the numbers of their runs."""
        return x

    def push(self, x: Tensor, value: Tensor, /) -> Tensor:
        """Return `x` without the first and with `value` as the last element of the last axis."""
        return torch.cat((x[..., 1:], value), -1)

    def sort(self, x: Tensor, /) -> Tensor:
        """Return each row sorted, with rows last: the second axis is where the rule looks for quantiles (S19)."""
        return torch.sort(x)[0].mT

    def clip(self, x: Tensor, low: Any, high: Any, /) -> Tensor:
        """Return `x` with every element moved into [low, high]; quantiles come as `sort` laid them out."""
        if isinstance(low, Tensor) and low.ndim == 3:
            low, high = low.mT, high.mT
        return torch.clamp(x, low, high)

    def select(
        self, condition: Tensor, make: Callable[[], tuple[Tensor, ...]], others: tuple[Tensor, ...], /
    ) -> tuple[Tensor, ...]:
        """Return what `make` returns in the rows where the condition holds, else `others`."""
        if condition.device.type == "cpu" and not condition.any():  # looking costs less than making
            return others
        return super().select(condition, make, others)


class Limited(NamedTuple):
    """Say what becomes of the losses of all runs, before Huberisation where a run has that."""

    factor: Tensor
    """Factor of the gradient of each loss, ALRC's and the Huberisation's; shape (rows, batch)."""
    limit: Tensor
    """What the losses were held against, shape (rows,); inf where nothing is limited."""
    fraction_limited: Tensor
    """Share of each row's finite losses that ALRC limited, shape (rows,)."""


class _Group(NamedTuple):
    """Hold runs that share a rule."""

    rule: Any
    rows: Tensor
    """Their rows, where the losses are."""
    members: list[int]
    """The same as numbers, so that nobody has to ask the device."""


class Limits:
    """Hold the limiters of many runs, each with its own state.

    Args:
        limiters: The ALRC of each run, or None for a run without; their states are copied.
        hubers: The Huberisation of each run, or None.
        device: Where the losses are.
        dtype: Precision of losses and states, float32 or better.
    """

    def __init__(
        self,
        limiters: Sequence[ALRC | None],
        hubers: Sequence[Huber | None],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._groups = _grouped([None if one is None else one.rule for one in limiters], device)
        self._hubers = _grouped([None if one is None else one.rule for one in hubers], device)
        self._ops = RowOps()
        self._states = list[Any]()
        for rule, _, members in self._groups:
            kind: Any = type(rule.init())
            own = [limiters[row] for row in members]
            fields = [
                torch.stack([getattr(one, name) for one in own]).to(device, torch.int64 if name == "count" else dtype)
                for name in kind._fields
            ]
            self._states.append(kind(*(_as_rows(field) for field in fields)))

    def judge(self, losses: Tensor) -> Limited:
        """Decide about the losses of an update, and learn from them: states change in place, as a graph needs it.

        Args:
            losses: Detached losses, shape (rows, batch).

        Returns:
            Factors of the gradients, and what is recorded.
        """
        factor = torch.ones_like(losses)
        limit = losses.new_full((len(losses),), torch.inf)
        fraction = losses.new_zeros(len(losses))
        values = losses if not self._hubers else losses.clone()
        for (rule, rows, _), state in zip(self._groups, self._states, strict=True):
            own = losses[rows]
            decision = rule.decide(own, state, self._ops)
            for held, new in zip(state, rule.update(own, decision, state, self._ops), strict=True):
                held.copy_(new)
            factor[rows] = decision.scale
            ceiling = decision.ceiling[:, 0]
            limit[rows] = torch.where(ceiling < rules.LARGEST_LOSS, ceiling, torch.inf)
            is_finite = decision.scale > 0
            is_limited = is_finite & (decision.scale < 1)
            fraction[rows] = is_limited.sum(-1) / is_finite.sum(-1).clamp(min=1).to(fraction.dtype)
            if self._hubers:
                values[rows] = decision.limited
        for rule, rows, _ in self._hubers:
            factor[rows] *= rule.decide(values[rows], None, self._ops).scale
        return Limited(factor, limit, fraction)

    def tensors(self) -> list[Tensor]:
        """Return what the next update needs of this one."""
        return [field for state in self._states for field in state]

    def write_back(self, limiters: Sequence[ALRC | None]) -> None:
        """Copy every state into the limiter of its run, in the order they were given."""
        for (_, _, members), state in zip(self._groups, self._states, strict=True):
            for place, row in enumerate(members):
                limiter: Any = limiters[row]
                for name, field in zip(state._fields, state, strict=True):
                    buffer = getattr(limiter, name)
                    buffer.copy_(field[:, place] if name == "recent" else field[place, 0])


def _as_rows(field: Tensor) -> Tensor:
    """Lay a field of the states of all rows out as `RowOps` wants it: (rows, 1), or (2, rows, updates)."""
    return field.unsqueeze(1) if field.ndim == 1 else field.transpose(0, 1).contiguous()


def _grouped(found: Sequence[Any], device: torch.device) -> list[_Group]:
    """Group the rows of equal rules; rows without a rule are in no group."""
    members: dict[Any, list[int]] = {}
    for row, rule in enumerate(found):
        if rule is not None:
            members.setdefault(rule, []).append(row)
    return [_Group(rule, torch.tensor(rows, device=device), rows) for rule, rows in members.items()]
