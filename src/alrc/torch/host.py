"""The primitives of `alrc.ops` on a CPU: arrays are tensors, single numbers are numpy's.

Exists because a rule is mostly arithmetic on single numbers, which numpy does twenty times as fast as torch. A CPU
tensor's memory is the host's own: looking at it waits for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alrc.ops import NUMPY, NumpyOps

__all__ = ["FINITE_HOST", "FINITE_NUMPY", "HOST", "MANY", "HostOps", "as_tensor", "extremes", "is_on_host", "number_of"]

MANY = 2**14
"""Losses above which torch's threads and its reuse of memory make up for what each of its operations costs."""


def is_on_host(x: Any) -> bool:
    """Return whether a tensor is an ordinary one in the host's memory, and not one that a compiler follows."""
    return x.device.type == "cpu" and type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def number_of(x: Tensor) -> Any:
    """Return a CPU tensor as numpy sees it: a single number by value, an array as a view."""
    return x.numpy()[()]


def as_tensor(x: Any) -> Tensor:
    """Return a tensor, or an array or number of numpy, as a tensor on the same memory."""
    return x if isinstance(x, Tensor) else torch.from_numpy(np.asarray(x))


def extremes(x: Any) -> tuple[Any, Any]:
    """Return the smallest and the largest element of a tensor or array as numbers; both NaN if one is."""
    if isinstance(x, Tensor):
        bounds = torch.aminmax(x)
        return number_of(bounds[0]), number_of(bounds[1])
    return np.minimum.reduce(x, axis=None), np.maximum.reduce(x, axis=None)


class HostOps:
    """Implement `alrc.ops.Ops` with torch for tensors and with numpy for single numbers and the rule's own arrays."""

    is_finite = False
    sqrt: Any = staticmethod(np.sqrt)
    real: Any = staticmethod(lambda x, like: x)
    size: Any = staticmethod(lambda x: x.numel() if isinstance(x, Tensor) else np.size(x))

    def clip(self, x: Any, low: Any, high: Any, /) -> Any:
        """Return `x` with every element moved into [low, high]."""
        if isinstance(x, Tensor):
            return x.clamp(None if low is None else float(low), None if high is None else float(high))
        if isinstance(x, np.ndarray):
            return NUMPY.clip(x, low, high)
        if low is not None and x < low:
            return type(x)(low)
        return type(x)(high) if high is not None and x > high else x

    def where(self, condition: Any, x: Any, y: Any, /) -> Any:
        """Select `x` where the condition holds, else `y`."""
        if isinstance(condition, Tensor):
            return torch.where(condition, *(part if isinstance(part, Tensor) else float(part) for part in (x, y)))
        if isinstance(condition, np.ndarray):
            return NUMPY.where(condition, x, y)
        return x if condition else y

    def ceil(self, x: Any, /) -> Any:
        """Return the smallest whole number that is not smaller, element by element."""
        return x.ceil() if isinstance(x, Tensor) else np.ceil(x)

    def cap(self, x: Tensor, y: Any, /) -> Tensor:
        """Return the element-wise minimum, in place of `x`."""
        return x.clamp_(max=float(y))

    def floor(self, x: Tensor, y: Any, /) -> Tensor:
        """Return the element-wise maximum, in place of `x`."""
        return x.clamp_(min=float(y))

    def divide(self, x: Any, y: Tensor, /) -> Tensor:
        """Return `x` divided by every element of `y`; a number divided by a tensor would be rounded twice."""
        return torch.true_divide(torch.full((), float(x), dtype=y.dtype), y)

    def shift(self, x: Tensor, y: Any, /) -> Tensor:
        """Return x + y; torch takes a number of Python's three times as fast as one of numpy's."""
        return x + float(y)

    def total(self, x: Any, /) -> Any:
        """Return the sum over all elements."""
        return number_of(x.sum()) if isinstance(x, Tensor) else NUMPY.total(x)

    def row_total(self, x: Any, /) -> Any:
        """Return the sum along the last axis."""
        return NUMPY.row_total(x)

    def total_square(self, x: Any, /) -> Any:
        """Return the sum of squares over all elements."""
        return self.dot(x, x) if isinstance(x, Tensor) else NUMPY.total_square(x)

    def dot(self, x: Tensor, y: Tensor, /) -> Any:
        """Return the sum of x · y over all elements."""
        if x.ndim != 1:
            x, y = x.reshape(-1), y.reshape(-1)
        return number_of(torch.dot(x, y))

    def count_nonzero(self, x: Tensor, /) -> Any:
        """Return the number of elements that are not 0."""
        return np.float64(number_of(torch.count_nonzero(x)))

    def replace_nonfinite(self, x: Any, value: float, /) -> Any:
        """Return a copy with NaN, inf and -inf replaced by `value`."""
        if isinstance(x, Tensor):
            return torch.nan_to_num(x, nan=value, posinf=value, neginf=value)
        return NUMPY.replace_nonfinite(x, value)

    def gap(self, x: Any, y: Any, /) -> Any:
        """Return x - y."""
        return x - y

    def add_scaled(self, x: Any, y: Any, factor: float, /) -> Any:
        """Return x + factor · y."""
        return x + factor * y

    def scalar(self, x: Any, /) -> Any:
        """Return a tensor of one element as a number, and anything else as it is."""
        return number_of(x.reshape(())) if isinstance(x, Tensor) and x.numel() == 1 else x

    def stack(self, xs: Sequence[Any], /) -> Any:
        """Return numbers as one array of shape (number,)."""
        return np.array(xs)

    def sort(self, x: Any, /) -> Any:
        """Return a copy sorted along the last axis."""
        return np.sort(x)

    def push(self, x: Any, value: Any, /) -> Any:
        """Return `x` without the first and with `value` as the last element of the last axis."""
        return NUMPY.push(x, value)

    def put(self, x: Any, index: Any, value: Any, /) -> Any:
        """Return a copy of `x` with `value` at the integer `index` of the last axis."""
        return NUMPY.put(x, index, value)

    def take(self, x: Any, index: Any, /) -> Any:
        """Return the element at `index` of the last axis."""
        return NUMPY.take(x, index)

    def select(
        self, condition: Any, make: Callable[[], tuple[Any, ...]], others: tuple[Any, ...], /
    ) -> tuple[Any, ...]:
        """Return what `make` returns if the condition holds, else `others`."""
        return make() if condition else others


class FiniteHostOps(HostOps):
    """Do the same where every element is known to be finite."""

    is_finite = True

    def replace_nonfinite(self, x: Any, value: float, /) -> Any:
        """Return `x` itself."""
        return x if isinstance(x, Tensor) else NUMPY.replace_nonfinite(x, value)

    def cap(self, x: Tensor, y: Any, /) -> Tensor:
        """Return the element-wise minimum."""
        return x.clamp(max=float(y))

    def floor(self, x: Tensor, y: Any, /) -> Tensor:
        """Return the element-wise maximum."""
        return x.clamp(min=float(y))


class FiniteNumpyOps(NumpyOps):
    """Do the same on numpy arrays."""

    is_finite = True

    def replace_nonfinite(self, x: Any, value: float, /) -> Any:
        """Return an array itself."""
        return x if isinstance(x, np.ndarray) else super().replace_nonfinite(x, value)


HOST, FINITE_HOST, FINITE_NUMPY = HostOps(), FiniteHostOps(), FiniteNumpyOps()
"""The implementation for tensors in the host's memory, and those for tensors and arrays without NaN and infinity."""
