"""Observe losses as their gradients flow, commit them when the optimiser steps: one update of the moments a step.

Exists because a forward pass is no update: gradient accumulation makes several of one, activation checkpointing repeats
one, closures evaluate many, loss scalers skip some (SPEC S23).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from alrc.rules import Batch

__all__ = ["Attachment"]


class Attachment:
    """Keep the batches whose gradients wait in the parameters of one optimiser.

    Args:
        optimizer: The optimiser whose steps commit.
        commit: Called after every step with the batches of the step and its `found_inf`: a tensor that is not 0 where
            the step was skipped on the device, or None.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, commit: Callable[[list[Batch], Any], None]) -> None:
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._commit = commit
        self._pending: list[Batch] = []
        self._is_closed = self._had_gradients = False
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def remove(self) -> None:
        """Forget what is pending and no longer follow the optimiser."""
        self.discard()
        for handle in self._handles:
            handle.remove()

    def discard(self) -> None:
        """Forget the batches that were observed since the last step."""
        self._pending.clear()

    def observe(self, batch: Batch) -> None:
        """Keep a batch whose gradient will flow; for compiled code, which cannot tell when it does."""
        if not self._is_closed:
            self._pending.append(batch)

    def observe_gradient(self, batch: Batch) -> None:
        """Keep a batch whose gradient flows right now."""
        if self._is_closed:
            return
        self._forget_thrown_away()
        self._pending.append(batch)
        torch.autograd.Variable._execution_engine.queue_callback(self._look)  # pyright: ignore[reportAttributeAccessIssue]

    def _look(self) -> None:
        """Note, at the end of a backward pass, whether gradients wait in the parameters.

        They need not: sharding keeps them elsewhere between micro-batches, and so may whoever calls `autograd.grad`.
        """
        self._had_gradients = any(parameter.grad is not None for parameter in self._parameters)

    def _forget_thrown_away(self) -> None:
        """Forget the batches whose gradients were there and are no more: the step they were for was skipped."""
        if self._had_gradients and all(parameter.grad is None for parameter in self._parameters):
            self._pending.clear()
            self._had_gradients = False

    def _before_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """Let the first evaluation of a closure count: it alone is at the weights that the step starts from."""
        self._is_closed = False
        self._forget_thrown_away()
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            return None

        def evaluate() -> Any:
            try:
                value = closure()
            except BaseException:  # there will be no step
                self._is_closed = False
                self.discard()
                raise
            self._is_closed = True
            return value

        if "closure" in kwargs:
            return args, {**kwargs, "closure": evaluate}
        return (*args[:1], evaluate, *args[2:]), kwargs

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Commit what was observed, once."""
        self._is_closed = self._had_gradients = False
        pending, self._pending = self._pending, []
        self._commit(pending, getattr(optimizer, "found_inf", None))
