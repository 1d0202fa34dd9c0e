"""The primitives in which frameworks differ, and their numpy implementation.

Exists so that a rule can be written once, by operators and these. This file must import no framework but numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np

__all__ = ["NUMPY", "NumpyOps", "Ops"]


@runtime_checkable
class Ops(Protocol):
    """Name the primitives that differ between frameworks; everything else is operators.

    Arrays are floating point and broadcast as in numpy. `NumpyOps` is the reference implementation.
    """

    is_finite: bool
    """Whether every element of every array is known to be finite, which spares looking for those that are not."""

    def sqrt(self, x: Any, /) -> Any:
        """Return the element-wise square root."""
        ...

    def clip(self, x: Any, low: Any, high: Any, /) -> Any:
        """Return `x` with every element moved into [low, high]: both numbers, or both arrays; None is no bound."""
        ...

    def where(self, condition: Any, x: Any, y: Any, /) -> Any:
        """Select `x` where the condition holds, else `y`; either may be a number."""
        ...

    def real(self, x: Any, like: Any, /) -> Any:
        """Return whole numbers in the type of `like`, where the framework does not divide them into it itself."""
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

    def divide(self, x: Any, y: Any, /) -> Any:
        """Return a 0-d `x` divided by every element of `y`, correctly rounded."""
        ...

    def total(self, x: Any, /) -> Any:
        """Return the sum over all elements as a 0-d array."""
        ...

    def row_total(self, x: Any, /) -> Any:
        """Return the sum along the last axis."""
        ...

    def total_square(self, x: Any, /) -> Any:
        """Return the sum of squares over all elements as a 0-d array."""
        ...

    def dot(self, x: Any, y: Any, /) -> Any:
        """Return the sum of x · y over all elements of two arrays of one shape as a 0-d array."""
        ...

    def count_nonzero(self, x: Any, /) -> Any:
        """Return the number of elements that are not 0 as a 0-d array in the dtype of `x`."""
        ...

    def replace_nonfinite(self, x: Any, value: float, /) -> Any:
        """Return a copy with NaN, inf and -inf replaced by `value`."""
        ...

    def shift(self, x: Any, y: Any, /) -> Any:
        """Return x + y for a 0-d `y`."""
        ...

    def gap(self, x: Any, y: Any, /) -> Any:
        """Return x - y; 0 where they are equal, even if a compiler merges the subtraction with what made `x`."""
        ...

    def add_scaled(self, x: Any, y: Any, factor: float, /) -> Any:
        """Return x + factor · y."""
        ...

    def size(self, x: Any, /) -> int:
        """Return the number of elements, a Python integer; any above 1 where a compiler does not know it yet."""
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
        """Return a copy of `x` with `value` at the integer `index` of the last axis, one index for each row."""
        ...

    def take(self, x: Any, index: Any, /) -> Any:
        """Return the element at a whole-numbered `index` of the last axis, one index for each row; of any dtype."""
        ...

    def push(self, x: Any, value: Any, /) -> Any:
        """Return `x` without the first and with `value` as the last element of the last axis."""
        ...

    def select(
        self, condition: Any, make: Callable[[], tuple[Any, ...]], others: tuple[Any, ...], /
    ) -> tuple[Any, ...]:
        """Return what `make` returns where the 0-d condition holds, else `others`; `make` may be left uncalled."""
        ...


def _is_array(x: Any) -> bool:
    """Return whether `x` is an array and not a single number."""
    return isinstance(x, np.ndarray)


class NumpyOps:
    """Implement `Ops` with numpy, in the dtype of the input (float64 for Python numbers)."""

    is_finite = False

    def sqrt(self, x: Any, /) -> Any:
        """Return the element-wise square root."""
        return np.sqrt(x)

    def clip(self, x: Any, low: Any, high: Any, /) -> Any:
        """Return `x` with every element moved into [low, high]."""
        if _is_array(x):
            x = x if low is None else np.maximum(x, low)
            return x if high is None else np.minimum(x, high)
        # Fifty times as fast for single numbers, of which a rule is full; NaN stays NaN.
        if low is not None and x < low:
            return type(x)(low)
        return type(x)(high) if high is not None and x > high else x

    def where(self, condition: Any, x: Any, y: Any, /) -> Any:
        """Select `x` where the condition holds, else `y`."""
        if not _is_array(condition) and _is_array(x) == _is_array(y):
            return x if condition else y
        selected = cast(Any, np.where(condition, x, y))
        return selected[()]

    def real(self, x: Any, like: Any, /) -> Any:
        """Return `x` itself: numpy divides whole numbers."""
        return x

    def ceil(self, x: Any, /) -> Any:
        """Return the smallest whole number that is not smaller."""
        return np.ceil(x)

    def cap(self, x: Any, y: Any, /) -> Any:
        """Return the element-wise minimum of `x` and a 0-d `y`."""
        return np.minimum(x, y)

    def floor(self, x: Any, y: Any, /) -> Any:
        """Return the element-wise maximum of `x` and a 0-d `y`."""
        return np.maximum(x, y)

    def divide(self, x: Any, y: Any, /) -> Any:
        """Return `x` divided by every element of `y`."""
        return x / y

    def total(self, x: Any, /) -> Any:
        """Return the sum over all elements."""
        return np.add.reduce(x, axis=None)

    def row_total(self, x: Any, /) -> Any:
        """Return the sum along the last axis."""
        return np.sum(x, axis=-1)

    def total_square(self, x: Any, /) -> Any:
        """Return the sum of squares over all elements."""
        flat = np.ravel(x)
        return np.dot(flat, flat)

    def dot(self, x: Any, y: Any, /) -> Any:
        """Return the sum of x · y over all elements."""
        return np.dot(np.ravel(x), np.ravel(y))

    def count_nonzero(self, x: Any, /) -> Any:
        """Return the number of elements that are not 0."""
        return np.result_type(x).type(np.count_nonzero(x))

    def replace_nonfinite(self, x: Any, value: float, /) -> Any:
        """Return a copy with NaN, inf and -inf replaced by `value`."""
        is_finite = np.isfinite(x)
        if not _is_array(is_finite):
            return x if is_finite else np.result_type(x).type(value)
        if is_finite.all():
            return x.copy()
        return self.where(is_finite, x, np.result_type(x).type(value))

    def shift(self, x: Any, y: Any, /) -> Any:
        """Return x + y."""
        return x + y

    def gap(self, x: Any, y: Any, /) -> Any:
        """Return x - y."""
        return x - y

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
        """Return a copy of `x` with `value` at the integer `index` of the last axis, one index for each row."""
        copy = np.array(x)
        np.put_along_axis(copy, np.asarray(index)[..., None], np.asarray(value)[..., None], axis=-1)
        return copy

    def take(self, x: Any, index: Any, /) -> Any:
        """Return the element at `index` of the last axis, one index for each row."""
        return np.take_along_axis(x, np.asarray(index, dtype=np.intp)[..., None], axis=-1)[..., 0]

    def push(self, x: Any, value: Any, /) -> Any:
        """Return `x` without the first and with `value` as the last element of the last axis."""
        return np.concatenate((x[..., 1:], np.asarray(value)[..., None]), -1)

    def select(
        self, condition: Any, make: Callable[[], tuple[Any, ...]], others: tuple[Any, ...], /
    ) -> tuple[Any, ...]:
        """Return what `make` returns if the condition holds, else `others`."""
        return make() if condition else others


NUMPY = NumpyOps()
"""The numpy implementation of `Ops`, the default everywhere in the core."""
