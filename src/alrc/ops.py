"""The primitives in which frameworks differ, and their numpy implementation.

Exists so that a rule can be written once, by operators and these. This file must import no framework but numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np

__all__ = ["NUMPY", "NumpyOps", "Ops"]


@runtime_checkable
class Ops(Protocol):
    """Name the primitives that differ between frameworks; everything else is operators.

    Arrays are floating point and broadcast as in numpy. `NumpyOps` is the reference implementation.
    """

    def sqrt(self, x: Any, /) -> Any:
        """Return the element-wise square root."""
        ...

    def clip(self, x: Any, low: float | None, high: float | None, /) -> Any:
        """Return `x` with every element moved into [low, high]; None is no bound."""
        ...

    def where(self, condition: Any, x: Any, y: Any, /) -> Any:
        """Select `x` where the condition holds, else `y`; either may be a number."""
        ...

    def ceil(self, x: Any, /) -> Any:
        """Return the smallest whole number that is not smaller, element by element."""
        ...

    def cap(self, x: Any, y: Any, /) -> Any:
        """Return the element-wise minimum of `x` and a 0-d `y`; may overwrite `x`."""
        ...

    def floor(self, x: Any, y: Any, /) -> Any:
        """Return the element-wise maximum of `x` and a 0-d `y`; may overwrite `x`."""
        ...

    def total(self, x: Any, /) -> Any:
        """Return the sum over all elements as a 0-d array."""
        ...

    def total_square(self, x: Any, /) -> Any:
        """Return the sum of squares over all elements as a 0-d array."""
        ...

    def replace_nonfinite(self, x: Any, value: float, /) -> Any:
        """Return a copy with NaN, inf and -inf replaced by `value`."""
        ...

    def add_scaled(self, x: Any, y: Any, factor: float, /) -> Any:
        """Return x + factor · y."""
        ...

    def size(self, x: Any, /) -> int:
        """Return the number of elements, a Python integer."""
        ...

    def scalar(self, x: Any, /) -> Any:
        """Return an array of one element without its axes, and any other array as it is."""
        ...

    def stack(self, xs: Sequence[Any], /) -> Any:
        """Return 0-d arrays as one array of shape (number,)."""
        ...

    def sort(self, x: Any, /) -> Any:
        """Return a copy sorted along the last axis, smallest first."""
        ...

    def put(self, x: Any, index: Any, value: Any, /) -> Any:
        """Return a copy of `x` with `value` at the 0-d integer `index` of the last axis."""
        ...


class NumpyOps:
    """Implement `Ops` with numpy, in the dtype of the input (float64 for Python numbers)."""

    def sqrt(self, x: Any, /) -> Any:
        """Return the element-wise square root."""
        return np.sqrt(x)

    def clip(self, x: Any, low: float | None, high: float | None, /) -> Any:
        """Return `x` with every element moved into [low, high]."""
        return np.clip(x, low, high)

    def where(self, condition: Any, x: Any, y: Any, /) -> Any:
        """Select `x` where the condition holds, else `y`."""
        selected = cast(Any, np.where(condition, x, y))
        return selected[()]

    def ceil(self, x: Any, /) -> Any:
        """Return the smallest whole number that is not smaller."""
        return np.ceil(x)

    def cap(self, x: Any, y: Any, /) -> Any:
        """Return the element-wise minimum of `x` and a 0-d `y`."""
        return np.minimum(x, y)

    def floor(self, x: Any, y: Any, /) -> Any:
        """Return the element-wise maximum of `x` and a 0-d `y`."""
        return np.maximum(x, y)

    def total(self, x: Any, /) -> Any:
        """Return the sum over all elements."""
        return np.sum(x)

    def total_square(self, x: Any, /) -> Any:
        """Return the sum of squares over all elements."""
        return np.sum(np.square(x))

    def replace_nonfinite(self, x: Any, value: float, /) -> Any:
        """Return a copy with NaN, inf and -inf replaced by `value`."""
        return self.where(np.isfinite(x), x, value)

    def add_scaled(self, x: Any, y: Any, factor: float, /) -> Any:
        """Return x + factor · y."""
        return x + factor * y

    def size(self, x: Any, /) -> int:
        """Return the number of elements."""
        return int(np.size(x))

    def scalar(self, x: Any, /) -> Any:
        """Return an array of one element without its axes, and any other array as it is."""
        return np.reshape(x, ())[()] if np.size(x) == 1 else x

    def stack(self, xs: Sequence[Any], /) -> Any:
        """Return 0-d arrays as one array of shape (number,)."""
        return np.array(xs)

    def sort(self, x: Any, /) -> Any:
        """Return a copy sorted along the last axis."""
        return np.sort(x)

    def put(self, x: Any, index: Any, value: Any, /) -> Any:
        """Return a copy of `x` with `value` at the 0-d integer `index` of the last axis."""
        copy = np.array(x)
        copy[..., index] = value
        return copy


NUMPY = NumpyOps()
"""The numpy implementation of `Ops`, the default everywhere in the core."""
