"""Compare states bit for bit; shared by the tests of everything that must leave no trace or resume exactly."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def same(one: Any, other: Any) -> bool:
    """Compare everything in two states, bit for bit; NaN equals NaN."""
    if isinstance(one, Tensor):
        if not isinstance(other, Tensor) or (one.shape, one.dtype) != (other.shape, other.dtype):
            return False
        return bool(((one == other) | ((one != one) & (other != other))).all())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)
