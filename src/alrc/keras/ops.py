"""The primitives of `alrc.ops` in keras.ops, for every backend of Keras at once.

Exists apart from the modules that use it because every one of them needs it. Imports no backend. TensorFlow is the
strictest of them: it mixes no dtypes, and does not know the number of elements while it traces.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import keras

__all__ = ["KERAS", "KerasOps"]

ops: Any = keras.ops  # Keras declares no types

UNKNOWN = 2
"""Stands for a number of elements that is not known while a graph is traced: it may be more than one."""


class KerasOps:
    """Implement `alrc.ops.Ops` with keras.ops. Nothing is overwritten and no value is looked at.

    Args:
        dtype: What whole numbers become where they meet real ones, a name such as `"float32"`.
    """

    is_finite = False

    sqrt: Any = staticmethod(ops.sqrt)
    ceil: Any = staticmethod(ops.ceil)
    total: Any = staticmethod(ops.sum)
    stack: Any = staticmethod(ops.stack)

    def __init__(self, dtype: str = "float32") -> None:
        self.dtype = dtype

    def clip(self, x: Any, low: Any, high: Any, /) -> Any:
        """Return `x` with every element moved into [low, high]."""
        x = x if low is None else self.floor(x, low)
        return x if high is None else self.cap(x, high)

    def where(self, condition: Any, x: Any, y: Any, /) -> Any:
        """Select `x` where the condition holds, else `y`; numbers become the type of the moments, not float32."""
        parts = [ops.convert_to_tensor(part, self.dtype) if isinstance(part, float) else part for part in (x, y)]
        return ops.where(condition, *parts)

    def real(self, x: Any, like: Any, /) -> Any:
        """Return whole numbers in the type of the moments."""
        return ops.cast(x, self.dtype)

    # Keras' own minimum and maximum make float32 of float64 on torch.

    def cap(self, x: Any, y: Any, /) -> Any:
        """Return the element-wise minimum of `x` and `y`; what is NaN stays so."""
        return self.where(x > y, y, x)

    def floor(self, x: Any, y: Any, /) -> Any:
        """Return the element-wise maximum of `x` and `y`; what is NaN stays so."""
        return self.where(x < y, y, x)

    def divide(self, x: Any, y: Any, /) -> Any:
        """Return `x` divided by every element of `y`."""
        return x / y

    def row_total(self, x: Any, /) -> Any:
        """Return the sum along the last axis."""
        return ops.sum(x, axis=-1)

    def total_square(self, x: Any, /) -> Any:
        """Return the sum of squares."""
        return ops.sum(x * x)

    def dot(self, x: Any, y: Any, /) -> Any:
        """Return the sum of x · y over all elements."""
        return ops.sum(x * y)

    def count_nonzero(self, x: Any, /) -> Any:
        """Return the number of elements that are not 0."""
        return ops.sum(ops.cast(x != 0, x.dtype))

    def replace_nonfinite(self, x: Any, value: float, /) -> Any:
        """Return a copy with NaN, inf and -inf replaced by `value`."""
        return self.where(ops.isfinite(x), x, value)

    def shift(self, x: Any, y: Any, /) -> Any:
        """Return x + y."""
        return x + y

    def gap(self, x: Any, y: Any, /) -> Any:
        """Return x - y, with a select that no compiler can see through."""
        return self.where(x == y, 0.0, x - y)

    def add_scaled(self, x: Any, y: Any, factor: float, /) -> Any:
        """Return x + factor · y."""
        return x + factor * y

    def size(self, x: Any, /) -> int:
        """Return the number of elements; 2, which stands for many, where it is not known yet."""
        return UNKNOWN if any(length is None for length in x.shape) else math.prod(x.shape)

    def scalar(self, x: Any, /) -> Any:
        """Return an array of one element without its axes, and any other array as it is."""
        return ops.reshape(x, ()) if len(x.shape) and self.size(x) == 1 else x

    def sort(self, x: Any, /) -> Any:
        """Return a copy sorted along the last axis."""
        return ops.sort(x, axis=-1)

    def put(self, x: Any, index: Any, value: Any, /) -> Any:
        """Return a copy of `x` with `value` at the integer `index` of the last axis, one index for each row."""
        places = ops.arange(x.shape[-1], dtype="int32") == ops.expand_dims(ops.cast(index, "int32"), -1)
        return ops.where(places, ops.expand_dims(value, -1), x)

    def take(self, x: Any, index: Any, /) -> Any:
        """Return the element at `index` of the last axis, one index for each row."""
        index = ops.expand_dims(ops.cast(index, "int32"), -1)
        return ops.squeeze(ops.take_along_axis(x, index, axis=-1), -1)

    def push(self, x: Any, value: Any, /) -> Any:
        """Return `x` without the first and with `value` as the last element of the last axis."""
        return ops.concatenate((x[..., 1:], ops.expand_dims(value, -1)), axis=-1)

    def select(
        self, condition: Any, make: Callable[[], tuple[Any, ...]], others: tuple[Any, ...], /
    ) -> tuple[Any, ...]:
        """Return what `make` returns where the condition holds, else `others`."""
        return tuple(ops.where(condition, x, y) for x, y in zip(make(), others, strict=True))


KERAS = KerasOps()
"""The one for moments in float32."""
