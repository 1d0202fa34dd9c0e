"""The rules that measure gradients and keep no memory: Value, Norm and AGC. And what all gradient rules have in common.

A gradient rule says as data what it wants measured, and decides one factor for each magnitude it is given. Which tensor
a magnitude belongs to is not its business. The rules with a memory are in `history.py`.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from alrc.ops import NUMPY, Ops

__all__ = ["AGC", "GradientDecision", "GradientRule", "Measure", "Norm", "UnitNorms", "Value"]


class Measure(NamedTuple):
    """Say what a backend measures before it asks a rule.

    Example:
        >>> Norm(1.0).measures
        Measure(granularity='global', norm_type=2.0, weights=False, exclude=())
    """

    granularity: Literal["element", "unit", "parameter", "global"]
    """What has one magnitude: an element, an output unit, the gradient of a parameter, or all gradients together."""
    norm_type: float = 2.0
    """Order p of the norm ‖g‖ = (Σ |g|ᵖ)^(1/p); `math.inf` for the largest element."""
    weights: bool = False
    """Whether the norms of the weights are measured too; the rule is then given `UnitNorms`."""
    exclude: tuple[str, ...] = ()
    """Names of parameters, or glob patterns of names, that are left alone."""


class UnitNorms(NamedTuple):
    """Hold the norms of gradients and of the weights they belong to, arrays of one shape."""

    gradient: Any
    """Norms of the gradients."""
    weight: Any
    """Norms of the weights."""


class GradientDecision(NamedTuple):
    """Say what a rule does with one set of gradients.

    Where `scale` is below 1 the magnitude becomes `threshold`, and scale = threshold / magnitude.
    """

    scale: Any
    """Factor in [0, 1] for each magnitude; 1 where nothing is limited, and where the magnitude is not finite."""
    threshold: Any
    """The magnitude that is allowed at most, broadcastable to `scale`; inf where there is no limit."""
    carry: Any = None
    """What `update` would have to compute again, for the rule's own use."""


@runtime_checkable
class GradientRule(Protocol):
    """Turn measured magnitudes and a state into factors, then into the next state.

    Pure: nothing is read but the arguments, nothing is written. A magnitude that is NaN or infinite has the factor 1
    and never enters a state: making such an update harmless is the step guard's or the loss scaler's job, and both must
    be able to see it. A rule without memory has the state `None`.
    """

    @property
    def measures(self) -> Measure:
        """What is to be measured."""
        ...

    def init(self, number: int | None = None) -> Any:
        """Return the state before the first step, for `number` magnitudes in a row, or one 0-d magnitude if None."""
        ...

    def decide(self, measured: Any, state: Any, ops: Ops = NUMPY) -> GradientDecision:
        """Decide the factors of the magnitudes."""
        ...

    def update(self, measured: Any, decision: GradientDecision, state: Any, ops: Ops = NUMPY) -> Any:
        """Return the state after this step."""
        ...


def scale_to(threshold: Any, magnitude: Any, ops: Ops) -> Any:
    """Return the factor that brings a finite magnitude down to the threshold, and 1 everywhere else."""
    is_limited = (magnitude > threshold) & (magnitude < math.inf)
    return ops.where(is_limited, threshold / ops.where(is_limited, magnitude, 1.0), 1.0)


def check_positive(**settings: float) -> None:
    """Refuse settings that are not positive finite numbers."""
    for name, value in settings.items():
        if isinstance(value, bool) or not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a positive finite number, got {value}.")


def check_scope(scope: str) -> None:
    """Refuse a scope that does not exist."""
    if scope not in ("global", "parameter"):
        raise ValueError(f"scope must be 'global' or 'parameter', got {scope!r}.")


class _Memoryless:
    """Have no state."""

    def init(self, number: int | None = None) -> None:
        """Return the state, which is none."""

    def update(self, measured: Any, decision: GradientDecision, state: None = None, ops: Ops = NUMPY) -> None:
        """Return the state, which is none."""


@dataclass(frozen=True)
class Value(_Memoryless):
    """Limit the absolute value of every element of a gradient.

    Equals `torch.nn.utils.clip_grad_value_`, `optax.clip` and Keras' `clipvalue` on finite gradients. Those turn an
    infinite element into a finite one; here it stays, so that a guard still sees it.

    Args:
        threshold: Largest absolute value, > 0.

    Raises:
        ValueError: If `threshold` is not a positive finite number.

    Example:
        >>> import numpy as np
        >>> print(Value(0.5).decide(np.array([0.25, 2.0, np.inf])).scale)
        [1.   0.25 1.  ]
    """

    threshold: float

    def __post_init__(self) -> None:
        check_positive(threshold=self.threshold)

    @property
    def measures(self) -> Measure:
        """The absolute value of each element."""
        return Measure("element", math.inf)

    def decide(self, measured: Any, state: None = None, ops: Ops = NUMPY) -> GradientDecision:
        """Decide the factor of each element.

        Args:
            measured: Absolute values, any shape; or the largest one of some elements, whose threshold they share.
            state: None.
            ops: Primitives of the framework.

        Returns:
            The decision; its threshold is a number.
        """
        return GradientDecision(scale_to(self.threshold, measured, ops), self.threshold)


@dataclass(frozen=True)
class Norm(_Memoryless):
    """Limit the norm of all gradients together, or of each parameter's gradient.

    The limited norm is `max_norm` exactly, as in `optax.clip_by_global_norm` (global) and Keras' `clipnorm`
    (parameter). `torch.nn.utils.clip_grad_norm_` divides by norm + 1e-6: it agrees to 1e-6 / `max_norm`. They turn
    every gradient into NaN when one element is; here gradients stay as they are.

    Args:
        max_norm: Largest norm, > 0.
        scope: `"global"` for one norm over all parameters, `"parameter"` for one each.
        norm_type: Order of the norm, > 0; `math.inf` for the largest element.

    Raises:
        ValueError: If a setting is outside its range; the message names the value.

    Example:
        >>> import numpy as np
        >>> Norm(1.0).decide(np.float64(4.0)).scale.item()
        0.25

    References:
        Pascanu, Mikolov & Bengio 2013, "On the difficulty of training recurrent neural networks", Algorithm 1.
    """

    max_norm: float
    _: KW_ONLY
    scope: Literal["global", "parameter"] = "global"
    norm_type: float = 2.0

    def __post_init__(self) -> None:
        check_positive(max_norm=self.max_norm)
        check_scope(self.scope)
        if isinstance(self.norm_type, bool) or not self.norm_type > 0:
            raise ValueError(f"norm_type must be a number > 0 or math.inf, got {self.norm_type}.")

    @property
    def measures(self) -> Measure:
        """The norm of all gradients, or of each."""
        return Measure(self.scope, float(self.norm_type))

    def decide(self, measured: Any, state: None = None, ops: Ops = NUMPY) -> GradientDecision:
        """Decide the factor of each norm.

        Args:
            measured: Norms ≥ 0, any shape.
            state: None.
            ops: Primitives of the framework.

        Returns:
            The decision; its threshold is a number.
        """
        return GradientDecision(scale_to(self.max_norm, measured, ops), self.max_norm)


@dataclass(frozen=True)
class AGC(_Memoryless):
    """Limit the norm of each output unit's gradient to a share of the norm of its weights.

    A unit is a slice of the first dimension of a torch weight, all others reduced; a bias, a gain or a number is one
    unit as a whole. These are the axes of timm's `adaptive_clip_grad` and, in its transposed layouts, of
    `optax.adaptive_grad_clip`; pytorch_optimizer's `agc` differs for three dimensions, of which it reduces one. The
    floor `eps` under the weight norm lets zero-initialised weights move.

    Args:
        clip_factor: Largest ratio of gradient norm to weight norm, > 0.
        eps: Floor of the weight norm, > 0.
        exclude: Names of parameters, or glob patterns such as `"head.*"`, that are left alone. The paper leaves out
            the last linear layer.

    Raises:
        ValueError: If a setting is outside its range; the message names the value.

    Example:
        >>> import numpy as np
        >>> norms = UnitNorms(gradient=np.array([1.0, 1.0]), weight=np.array([200.0, 50.0]))
        >>> print(AGC(0.01).decide(norms).scale)
        [1.  0.5]

    References:
        Brock, De, Smith & Simonyan 2021, "High-performance large-scale image recognition without normalization", eq. 3.
    """

    clip_factor: float = 0.01
    _: KW_ONLY
    eps: float = 1e-3
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_positive(clip_factor=self.clip_factor, eps=self.eps)
        names: Any = self.exclude  # whatever a configuration file held
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in list[Any](self.exclude)):
            raise ValueError(f"exclude must be a tuple of names or glob patterns, got {self.exclude!r}.")
        object.__setattr__(self, "exclude", tuple(self.exclude))

    @property
    def measures(self) -> Measure:
        """The norms of each unit's gradient and weights."""
        return Measure("unit", 2.0, True, self.exclude)

    def decide(self, measured: UnitNorms, state: None = None, ops: Ops = NUMPY) -> GradientDecision:
        """Decide the factor of each unit.

        Args:
            measured: Norms of the gradients and weights of all units.
            state: None.
            ops: Primitives of the framework.

        Returns:
            The decision; its arrays have the shape of the norms.
        """
        threshold = self.clip_factor * ops.clip(measured.weight, self.eps, None)
        return GradientDecision(scale_to(threshold, measured.gradient, ops), threshold)
