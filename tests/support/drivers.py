"""Give every backend one face: numpy losses in; values, gradients and state out.

A test body written against `Driver` holds any implementation against the same oracle, a mutant exactly as the true one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from alrc import rules
from alrc.torch import ALRC


class Step(NamedTuple):
    """What one call did."""

    limited: NDArray[Any]
    """Values after the rule."""
    gradient: NDArray[Any]
    """Derivative of the sum of the values by each loss."""


class Driver(Protocol):
    """An implementation under test, with its state."""

    dtype: Any
    """Numpy type of losses and state."""

    def step(self, losses: Any, narrow: bool = False) -> Step:
        """Limit the losses, find their gradients, update the state; `narrow` hands the losses over in bfloat16."""
        ...

    def read(self) -> tuple[float, float, float]:
        """Return mu1, mu2 and the limit for the next losses."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state as it is stored."""
        ...

    def load_state_dict(self, stored: dict[str, Any]) -> None:
        """Go on from a stored state, whichever framework wrote it."""
        ...


Make = Callable[[rules.ALRC], Driver]


class NumpyDriver:
    """Step the pure rule; its gradient is the scale it decides."""

    def __init__(self, rule: rules.ALRC, dtype: Any = np.float64) -> None:
        self.rule = rule
        self.dtype: Any = dtype
        self.state = self._rounded(rule.init())

    def step(self, losses: Any, narrow: bool = False) -> Step:
        assert not narrow, "numpy has no bfloat16"
        losses = np.asarray(losses, dtype=self.dtype)
        decision = self.rule.decide(losses, self.state)
        self.state = self._rounded(self.rule.update(losses, decision, self.state))
        return Step(np.asarray(decision.limited), np.asarray(decision.scale))

    def read(self) -> tuple[float, float, float]:
        return float(self.state.mu1), float(self.state.mu2), float(self.rule.limit(self.state))

    def state_dict(self) -> dict[str, Any]:
        return self.rule.state_dict(self.state)

    def load_state_dict(self, stored: dict[str, Any]) -> None:
        self.state = self._rounded(self.rule.load_state_dict(stored))

    def _rounded(self, state: Any) -> Any:
        """Hold the state in the precision under test."""
        return type(state)(*(part if isinstance(part, int | np.integer) else self.dtype(part) for part in state))


class TorchDriver:
    """Step a torch module; its gradient comes back through autograd."""

    def __init__(self, module: ALRC, call: Callable[..., Any] | None = None, double: bool = False) -> None:
        self.module, self.call = module, module if call is None else call
        self.dtype: Any = np.float64 if double else np.float32

    def step(self, losses: Any, narrow: bool = False) -> Step:
        leaf = torch.tensor(np.asarray(losses, dtype=self.dtype))
        leaf = (leaf.bfloat16() if narrow else leaf).requires_grad_()
        limited = self.call(leaf)
        limited.backward(torch.ones_like(limited))
        assert leaf.grad is not None
        assert limited.dtype == leaf.dtype
        wide = torch.float64 if self.dtype is np.float64 else torch.float32
        return Step(limited.detach().to(wide).numpy(), leaf.grad.to(wide).numpy())

    def read(self) -> tuple[float, float, float]:
        return float(self.module.mu1), float(self.module.mu2), float(self.module.limit)

    def state_dict(self) -> dict[str, Any]:
        return self.module.state_dict()

    def load_state_dict(self, stored: dict[str, Any]) -> None:
        self.module.load_state_dict(stored)


def drive_numpy(rule: rules.ALRC) -> Driver:
    """Drive the pure rule in float64."""
    return NumpyDriver(rule)


def drive_numpy32(rule: rules.ALRC) -> Driver:
    """Drive the pure rule with float32 losses and a float32 state."""
    return NumpyDriver(rule, np.float32)


def drive_torch(rule: rules.ALRC) -> Driver:
    """Drive the module in float32."""
    return TorchDriver(ALRC.from_rule(rule))


def drive_torch64(rule: rules.ALRC) -> Driver:
    """Drive the module in float64."""
    return TorchDriver(ALRC.from_rule(rule).double(), double=True)


def drive_compiled(rule: rules.ALRC) -> Driver:
    """Drive the module through the tracing compiler, which needs no C++ compiler with this backend."""
    torch._dynamo.reset()  # Each instance costs one entry of a small cache.
    module = ALRC.from_rule(rule)
    return TorchDriver(module, torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=False))


def drive_class(module: type[ALRC]) -> Make:
    """Drive another class with the interface of `alrc.torch.ALRC`, such as a mutant."""
    return lambda rule: TorchDriver(module.from_rule(rule))
