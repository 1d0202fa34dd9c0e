"""Wrap what acts on gradients and on whole updates: it is given parameters with gradients of wanted norms."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alrc.conformance import Make, Outcome, Traits
from alrc.torch.conformance.wrapped import Wrapped

__all__ = ["wrap_gradient_clipper", "wrap_step_skipper"]


def wrap_gradient_clipper(
    make: Callable[[list[Tensor]], Any],
    clip: Callable[[Any, list[Tensor]], object] = lambda clipper, parameters: clipper(),
    *,
    granularity: Any = "all",
    dtypes: Sequence[str] = ("float32",),
    weight_norm: float = 1.0,
    limit: Callable[[Any], float] | None = None,
) -> Make:
    """Wrap what scales gradients in place.

    The parameters are a row of 24 and a vector of 8, or the row alone where rows or tensors have factors of their own.
    Micro-batches add up to one gradient before the clipper sees it. `state_dict` is used if the clipper has one.

    Args:
        make: Makes a fresh clipper for a list of parameters.
        clip: Clips the gradients of the parameters; by default calls the clipper without arguments.
        granularity: What gets a factor of its own.
        dtypes: Precisions of parameters to try.
        weight_norm: Norm of the parameters, for clippers that look at it.
        limit: Returns the threshold of a clipper; None finds it out on a deep copy.

    Returns:
        What `alrc.conformance.run` takes.

    Example:
        >>> from functools import partial
        >>> from torch.nn.utils import clip_grad_norm_
        >>> stabiliser = wrap_gradient_clipper(lambda parameters: partial(clip_grad_norm_, parameters, 1.5))("float32")
        >>> print(stabiliser.step([np.array([2.0])])[0].factor.round(3))
        [0.75]
    """
    traits = Traits("gradient", granularity, tuple(dtypes))
    return lambda dtype: _Gradients(make, clip, traits, dtype, weight_norm, limit)


def wrap_step_skipper(
    make: Callable[[list[Tensor]], Any],
    step: Callable[[Any, Tensor], object],
    *,
    dtypes: Sequence[str] = ("float32",),
    limit: Callable[[Any], float] | None = None,
) -> Make:
    """Wrap what decides whether an update is made.

    The gradient norm of a step and its loss are the same number here. Weights are put back after each step, so that a
    NaN in them is counted once.

    Args:
        make: Makes a fresh skipper for a list of parameters, with `torch.optim.SGD(parameters, lr=1.0)` inside.
        step: Makes or refuses the update; takes the skipper and the 0-d loss, finds the gradients in `.grad`.
        dtypes: Precisions of parameters to try.
        limit: Returns the threshold of a skipper; None finds it out on deep copies, by bisection.

    Returns:
        What `alrc.conformance.run` takes.

    Example:
        >>> make = lambda parameters: torch.optim.SGD(parameters, lr=1.0)
        >>> stabiliser = wrap_step_skipper(make, lambda optimizer, loss: optimizer.step())("float32")
        >>> print(stabiliser.step([np.array([2.0])])[0].factor.round(3))
        [1.]
    """
    traits = Traits("step", "all", tuple(dtypes))
    return lambda dtype: _Steps(make, step, traits, dtype, limit)


class _OnParameters(Wrapped):
    """Make gradients of wanted norms on a few parameters."""

    def __init__(
        self,
        make: Callable[[list[Tensor]], Any],
        traits: Traits,
        dtype: str,
        weight_norm: float,
        read_limit: Callable[[Any], float] | None,
        device: str = "cpu",
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        shapes = [(1, 24), (8,)] if traits.granularity == "all" else [(1, 24)]
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        norm = math.sqrt(sum(float(part.square().sum()) for part in drawn))
        self.direction = [(part / norm).to(device) for part in drawn]
        own: torch.dtype = getattr(torch, dtype)
        self.parameters: list[Tensor] = [torch.nn.Parameter((weight_norm * part).to(own)) for part in self.direction]
        super().__init__(make(self.parameters), traits, dtype)
        self.read_limit = read_limit

    def limit(self) -> float:
        """Read the threshold, or find it out on a copy."""
        return self.probe() if self.read_limit is None else float(self.read_limit(self.thing))

    def evaluate(self, batch: NDArray[Any], /) -> None:
        """Leave gradients alone: there are none in validation."""

    def give(self, micro_batches: Sequence[NDArray[Any]]) -> float:
        """Add up the gradients of the micro-batches of a mean loss; return the mean magnitude."""
        number = sum(len(batch) for batch in micro_batches)
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        for batch in micro_batches:
            share = float(np.sum(batch)) / number
            for parameter, part in zip(self.parameters, self.direction, strict=True):
                assert parameter.grad is not None
                parameter.grad += (share * part).to(self.dtype)
        return sum(float(np.sum(batch)) for batch in micro_batches) / number

    def outcomes(
        self, micro_batches: Sequence[NDArray[Any]], before: NDArray[Any], after: NDArray[Any]
    ) -> list[Outcome]:
        """Compare two flat gradients."""
        size, out = float(np.linalg.norm(before)), float(np.linalg.norm(after))
        if not np.isfinite(after).all():
            factor, cosine = math.nan, math.nan
        elif out == 0 or not np.isfinite(before).all():
            factor, cosine = (1.0 if size == 0 else 0.0), 1.0
        else:
            is_same = np.array_equal(before, after)
            factor, cosine = (1.0 if is_same else out / size), float(before @ after) / (size * out)
        return [Outcome(np.full(len(b), np.nan), np.full(len(b), factor), cosine) for b in micro_batches]

    def flat(self, tensors: Sequence[Tensor | None]) -> NDArray[Any]:
        """Return tensors as one vector in float64."""
        return np.concatenate([t.detach().double().numpy().ravel() for t in tensors if t is not None])


class _Gradients(_OnParameters):
    """Drive a gradient clipper; the factors come from the gradients before and after."""

    def __init__(
        self,
        make: Any,
        clip: Callable[[Any, list[Tensor]], object],
        traits: Traits,
        dtype: str,
        weight_norm: float,
        limit: Any,
        device: str = "cpu",
    ) -> None:
        super().__init__(make, traits, dtype, weight_norm, limit, device)
        self.clip = clip
        self.make_elsewhere = lambda: _Gradients(make, clip, traits, dtype, weight_norm, limit, "meta")

    def elsewhere(self) -> Wrapped | None:
        return self.make_elsewhere()

    def act(self, micro_batches: Sequence[NDArray[Any]]) -> list[Outcome]:
        self.give(micro_batches)
        before = self.flat([parameter.grad for parameter in self.parameters])
        with self.watch():
            self.clip(self.thing, self.parameters)
        return self.outcomes(micro_batches, before, self.flat([parameter.grad for parameter in self.parameters]))

    def once(self, call: Callable[..., Any]) -> object:
        self.give([np.array([3.0])])
        return call(self.thing, self.parameters)

    def thing_to_compile(self) -> Callable[..., Any]:
        return self.clip


class _Steps(_OnParameters):
    """Drive a step skipper; the factors come from the weights before and after."""

    def __init__(self, make: Any, step: Any, traits: Traits, dtype: str, limit: Any) -> None:
        super().__init__(make, traits, dtype, 1.0, limit)
        self.make_step: Callable[[Any, Tensor], object] = step

    def act(self, micro_batches: Sequence[NDArray[Any]]) -> list[Outcome]:
        weights = [parameter.detach().clone() for parameter in self.parameters]
        # From zero, a weight after the step is the step, without rounding.
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.zero_()
        loss = torch.tensor(self.give(micro_batches), dtype=self.dtype)
        gradient = self.flat([parameter.grad for parameter in self.parameters])
        with self.watch():
            self.make_step(self.thing, loss)
        moved = -self.flat(self.parameters)
        with torch.no_grad():
            for parameter, weight in zip(self.parameters, weights, strict=True):
                parameter.copy_(weight)
        return self.outcomes(micro_batches, gradient, moved)

    def probe(self) -> float:
        """Bisect between the last magnitude and a million times it, on copies."""

        def is_made(magnitude: float) -> bool:
            return float(copy.deepcopy(self).act([np.array([magnitude])])[0].factor[0]) > 0.5

        low, high = 1e-3 * self.level, 1e6 * self.level
        if is_made(high):
            return math.inf
        while high / low > 1 + 1e-3:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if is_made(middle) else (low, middle)
        return low

    def once(self, call: Callable[..., Any]) -> object:
        loss = torch.tensor(self.give([np.array([1.0])]), dtype=self.dtype)
        return call(self.thing, loss)

    def thing_to_compile(self) -> Callable[..., Any]:
        return self.make_step
