"""Drive `alrc.jax.ALRC` as `drivers.py` drives the others: eager, and compiled."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest

from alrc import rules
from drivers import Driver, Step


def _step(rule: Any, losses: Any, state: Any) -> tuple[Any, Any, Any]:
    """Return the limited losses, the derivative of their sum, and the next state."""
    import jax

    def total(losses: Any) -> tuple[Any, tuple[Any, Any]]:
        limited, after = rule(losses, state)
        return limited.sum(), (limited, after)

    (_, (limited, after)), gradient = jax.value_and_grad(total, has_aux=True)(losses)
    return limited, gradient, after


class JaxDriver:
    """Step a pure function; its gradient comes back through `jax.grad`."""

    def __init__(self, rule: rules.ALRC, *, compiled: bool = False, double: bool = False) -> None:
        jax = pytest.importorskip("jax", reason="needs jax")
        from alrc.jax import ALRC

        self.scope: Callable[[], AbstractContextManager[Any]] = partial(jax.enable_x64, True) if double else nullcontext
        self.dtype: Any = np.float64 if double else np.float32
        self.call = jax.jit(_step, static_argnums=0) if compiled else _step
        self.rule = ALRC.from_rule(rule)
        with self.scope():
            self.state = self.rule.init(self.dtype)

    def step(self, losses: Any, narrow: bool = False) -> Step:
        import jax.numpy as jnp

        with self.scope():
            losses = jnp.asarray(np.asarray(losses, dtype=self.dtype), dtype=jnp.bfloat16 if narrow else self.dtype)
            limited, gradient, self.state = self.call(self.rule, losses, self.state)
            assert limited.dtype == gradient.dtype == losses.dtype
            return Step(np.asarray(limited, dtype=self.dtype), np.asarray(gradient, dtype=self.dtype))

    def read(self) -> tuple[float, float, float]:
        with self.scope():
            return float(self.state.mu1), float(self.state.mu2), float(self.rule.limit(self.state))

    def state_dict(self) -> dict[str, Any]:
        return self.rule.state_dict(self.state)

    def load_state_dict(self, stored: dict[str, Any]) -> None:
        self.state = self.rule.load_state_dict(stored, self.dtype)


def drive_jax(rule: rules.ALRC) -> Driver:
    """Drive the rule operation by operation, in float32."""
    return JaxDriver(rule)


def drive_jax_jit(rule: rules.ALRC) -> Driver:
    """Drive the compiled rule in float32."""
    return JaxDriver(rule, compiled=True)


def drive_jax64(rule: rules.ALRC) -> Driver:
    """Drive the compiled rule in float64."""
    return JaxDriver(rule, compiled=True, double=True)
