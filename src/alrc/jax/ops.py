"""The primitives of `alrc.ops` in JAX: pure, so that they trace under every transformation.

Exists apart from the modules that use it because every one of them needs it. Imports no other framework.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

__all__ = ["JAX", "JaxOps"]


class JaxOps:
    """Implement `alrc.ops.Ops` with jax.numpy. Nothing is overwritten and no value is looked at."""

    is_finite = False

    sqrt: Any = staticmethod(jnp.sqrt)
    where: Any = staticmethod(jnp.where)
    ceil: Any = staticmethod(jnp.ceil)
    cap: Any = staticmethod(jnp.minimum)
    floor: Any = staticmethod(jnp.maximum)
    divide: Any = staticmethod(jnp.divide)
    shift: Any = staticmethod(jnp.add)
    total: Any = staticmethod(jnp.sum)
    stack: Any = staticmethod(jnp.stack)

    def clip(self, x: Any, low: Any, high: Any, /) -> Any:
        """Return `x` with every element moved into [low, high]."""
        return jnp.clip(x, low, high)

    def real(self, x: Any, like: Any, /) -> Any:
        """Return whole numbers as floating point that takes the type of what it meets; else they bring float32."""
        return lax.convert_element_type(x, float)

    def row_total(self, x: Any, /) -> Any:
        """Return the sum along the last axis."""
        return jnp.sum(x, axis=-1)

    def total_square(self, x: Any, /) -> Any:
        """Return the sum of squares."""
        return jnp.sum(x * x)

    def dot(self, x: Any, y: Any, /) -> Any:
        """Return the sum of x · y over all elements."""
        return jnp.sum(x * y)

    def count_nonzero(self, x: Any, /) -> Any:
        """Return the number of elements that are not 0."""
        return jnp.sum(x != 0, dtype=x.dtype)

    def replace_nonfinite(self, x: Any, value: float, /) -> Any:
        """Return a copy with NaN, inf and -inf replaced by `value`."""
        return jnp.where(jnp.isfinite(x), x, value)

    def gap(self, x: Any, y: Any, /) -> Any:
        """Return x - y, with a select that no compiler can see through."""
        return jnp.where(x == y, 0.0, x - y)

    def add_scaled(self, x: Any, y: Any, factor: float, /) -> Any:
        """Return x + factor · y."""
        return x + factor * y

    def size(self, x: Any, /) -> int:
        """Return the number of elements."""
        return jnp.size(x)

    def scalar(self, x: Any, /) -> Any:
        """Return an array of one element without its axes, and any other array as it is."""
        return jnp.reshape(x, ()) if jnp.size(x) == 1 else x

    def sort(self, x: Any, /) -> Any:
        """Return a copy sorted along the last axis."""
        return jnp.sort(x, axis=-1)

    def put(self, x: Any, index: Any, value: Any, /) -> Any:
        """Return a copy of `x` with `value` at the integer `index` of the last axis, one index for each row."""
        places = jnp.arange(x.shape[-1]) == jnp.asarray(index)[..., None]
        return jnp.where(places, jnp.asarray(value)[..., None], x)

    def take(self, x: Any, index: Any, /) -> Any:
        """Return the element at `index` of the last axis, one index for each row."""
        return jnp.take_along_axis(x, jnp.asarray(index).astype(jnp.int32)[..., None], axis=-1)[..., 0]

    def push(self, x: Any, value: Any, /) -> Any:
        """Return `x` without the first and with `value` as the last element of the last axis."""
        return jnp.concatenate((x[..., 1:], jnp.asarray(value)[..., None]), -1)

    def select(
        self, condition: Any, make: Callable[[], tuple[Any, ...]], others: tuple[Any, ...], /
    ) -> tuple[Any, ...]:
        """Return what `make` returns where the condition holds, else `others`."""
        return tuple(jnp.where(condition, x, y) for x, y in zip(make(), others, strict=True))


JAX = JaxOps()
"""The one instance; it has no state."""
