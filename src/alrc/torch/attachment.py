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
        self._is_stepping = self._is_closed = False
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

    def begin(self) -> None:
        """Note that losses are about to be limited, and forget batches whose gradients were thrown away."""
        if not self._pending:
            return
        if self._is_stepping:
            # A closure evaluates again: only its first evaluation is at the weights that the step started from.
            self._is_closed = True
        elif all(parameter.grad is None for parameter in self._parameters):
            self._pending.clear()

    def observe(self, batch: Batch) -> None:
        """Keep a batch whose gradient has flowed."""
        if not self._is_closed:
            self._pending.append(batch)

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Take what a closure will do for evaluations of this step."""
        self._is_stepping, self._is_closed = True, bool(self._pending)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Commit what was observed, once."""
        self._is_stepping = self._is_closed = False
        pending, self._pending = self._pending, []
        self._commit(pending, getattr(optimizer, "found_inf", None))
