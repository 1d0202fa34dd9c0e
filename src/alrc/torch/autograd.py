"""The two autograd functions through which a limited loss passes its gradient back, scaled by a constant.

Exists apart from the module because `torch.func` transforms and the compiler ask for another form than eager mode,
in which that form costs four times as much per call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Limit", "ScaleGradient"]


class Limit(torch.autograd.Function):
    """Limit losses in eager mode. Gradients are off inside `forward`."""

    @staticmethod
    def forward(
        ctx: Any, losses: Tensor, decided: tuple[Tensor, Tensor | None], when_used: Callable[[], None] | None
    ) -> Tensor:
        """Return the limited values, the first of `decided`; `when_used` is called once their gradient has come.

        The second are the factors, None where all are 1. Both come in a tuple because an argument that is returned
        would become a view, which nobody may change in place.
        """
        limited, scale = decided
        # Not saved as autograd saves tensors: what activation checkpointing computes again, it decides by moments that
        # have moved on. These factors belong to the values that were returned.
        ctx.when_used, ctx.scale = when_used, scale
        if scale is None:
            return losses.clone()
        return limited if limited.dtype == losses.dtype else limited.to(losses.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None, None]:
        """Scale the gradient of each loss."""
        (gradient,) = grad_outputs
        if ctx.when_used is not None:
            ctx.when_used()
            ctx.when_used = None  # A graph may be used twice; its losses count once.
        if ctx.scale is not None:
            gradient = (gradient * ctx.scale).to(gradient.dtype)
        return gradient, None, None


class ScaleGradient(torch.autograd.Function):
    """Scale a gradient under `torch.func` transforms and `torch.compile`, in the form those ask for."""

    generate_vmap_rule = True

    @staticmethod
    def forward(losses: Tensor, limited: Tensor, scale: Tensor) -> Tensor:
        """Return the limited values."""
        return limited.to(losses.dtype, copy=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep the gradient factors."""
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None, None]:
        """Scale the gradient of each loss."""
        (scale,) = ctx.saved_tensors
        (gradient,) = grad_outputs
        return (gradient * scale).to(gradient.dtype), None, None
