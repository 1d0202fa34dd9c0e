"""The primitives of `alrc.ops` in torch, for eager mode and for tracing.

Exists apart from the modules that use it because every one of them needs it. Imports no other framework.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["EAGER", "TRACED", "TorchOps", "TracedOps", "is_transforming"]


class TorchOps:
    """Implement `alrc.ops.Ops` with torch, by the fastest primitive of each kind on CPU."""

    is_finite = False

    # Bound without a wrapper: a step makes some thirty calls of a microsecond each.
    sqrt: Any = staticmethod(torch.sqrt)
    where: Any = staticmethod(torch.where)
    clip: Any = staticmethod(torch.clamp)
    ceil: Any = staticmethod(torch.ceil)
    divide: Any = staticmethod(torch.true_divide)
    shift: Any = staticmethod(torch.add)
    total: Any = staticmethod(torch.sum)
    gap: Any = staticmethod(torch.sub)
    real: Any = staticmethod(lambda x, like: x.to(like.dtype))

    def cap(self, x: Tensor, y: Tensor, /) -> Tensor:
        """Return the element-wise minimum, in place of `x`."""
        return x.clamp_(max=y)

    def floor(self, x: Tensor, y: Tensor, /) -> Tensor:
        """Return the element-wise maximum, in place of `x`."""
        return x.clamp_(min=y)

    def row_total(self, x: Tensor, /) -> Tensor:
        """Return the sum along the last axis."""
        return x.sum(-1)

    def total_square(self, x: Tensor, /) -> Tensor:
        """Return the sum of squares."""
        flat = x.reshape(-1)
        return torch.dot(flat, flat)

    def dot(self, x: Tensor, y: Tensor, /) -> Tensor:
        """Return the sum of x · y over all elements."""
        return torch.dot(x.reshape(-1), y.reshape(-1))

    def count_nonzero(self, x: Tensor, /) -> Tensor:
        """Return the number of elements that are not 0."""
        return torch.count_nonzero(x).to(x.dtype)

    def replace_nonfinite(self, x: Tensor, value: float, /) -> Tensor:
        """Return a copy with NaN, inf and -inf replaced by `value`."""
        return torch.nan_to_num(x, nan=value, posinf=value, neginf=value)

    def add_scaled(self, x: Tensor, y: Tensor, factor: float, /) -> Tensor:
        """Return x + factor · y."""
        return torch.add(x, y, alpha=factor)

    def size(self, x: Tensor, /) -> int:
        """Return the number of elements."""
        return x.numel()

    def scalar(self, x: Tensor, /) -> Tensor:
        """Return a tensor of one element without its axes, and any other tensor as it is."""
        return x.reshape(()) if x.numel() == 1 and x.ndim else x

    def stack(self, xs: Sequence[Tensor], /) -> Tensor:
        """Return 0-d tensors as one tensor of shape (number,)."""
        return torch.stack(tuple(xs))

    def sort(self, x: Tensor, /) -> Tensor:
        """Return a copy sorted along the last axis."""
        return torch.sort(x)[0]

    def put(self, x: Tensor, index: Tensor, value: Tensor, /) -> Tensor:
        """Return a copy of `x` with `value` at the integer `index` of the last axis, one index for each row."""
        return x.scatter(-1, index.unsqueeze(-1), value.unsqueeze(-1))

    def take(self, x: Tensor, index: Tensor, /) -> Tensor:
        """Return the element at `index` of the last axis, one index for each row."""
        return x.gather(-1, index.long().unsqueeze(-1)).squeeze(-1)

    def push(self, x: Tensor, value: Tensor, /) -> Tensor:
        """Return `x` without the first and with `value` as the last element of the last axis."""
        return torch.cat((x[..., 1:], value.unsqueeze(-1)), -1)

    def select(
        self, condition: Tensor, make: Callable[[], tuple[Tensor, ...]], others: tuple[Tensor, ...], /
    ) -> tuple[Tensor, ...]:
        """Return what `make` returns where the condition holds, else `others`."""
        return tuple(torch.where(condition, x, y) for x, y in zip(make(), others, strict=True))


class TracedOps(TorchOps):
    """Do the same under `torch.func` transforms and `torch.compile`, which must not see memory overwritten."""

    def cap(self, x: Tensor, y: Tensor, /) -> Tensor:
        """Return the element-wise minimum."""
        return torch.minimum(x, y)

    def floor(self, x: Tensor, y: Tensor, /) -> Tensor:
        """Return the element-wise maximum."""
        return torch.maximum(x, y)

    def gap(self, x: Tensor, y: Tensor, /) -> Tensor:
        """Return x - y, with a select that no compiler can see through."""
        return torch.where(x == y, 0.0, x - y)


EAGER, TRACED = TorchOps(), TracedOps()
"""The one to use where nothing traces, and the one to use where something does."""

is_transforming = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
