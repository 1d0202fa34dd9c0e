"""Limit losses under Lightning's `Trainer`: wiring, no arithmetic on losses.

Exists because the losses that Lightning's own hooks show have been divided by the number of accumulated batches and
multiplied by the loss scale. The true loss is what `training_step` returns, so that is where it is taken.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from types import MethodType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from alrc.torch import ALRC, Monitor

__all__ = ["LimitLoss"]

_LOGGED = ("limit", "fraction_limited", "nonfinite")


class LimitLoss(Callback):
    """Limit the loss that `training_step` returns, or look after the limiters that a LightningModule has.

    `Trainer(callbacks=[LimitLoss()])` limits the returned loss, or its "loss" entry, before Lightning divides or scales
    it; a batch skipped by None stays skipped. A module with an `ALRC` of its own limits by itself, best each loss of
    a batch: `loss = self.limit(losses).mean()`. Then nothing is limited a second time. Either way the limiters are
    attached to the optimiser, so that k accumulated batches are one update and steps that a loss scaler skips are none
    (SPEC S23), and `alrc/limit`, `alrc/fraction_limited` and `alrc/nonfinite` are logged: see `Monitor`. Validation and
    test steps are left alone. The state is in the checkpoints. Use a new LimitLoss for a new model.

    Args:
        limit: Limiter of the returned loss; None makes an `ALRC(sync=True)`, which learns from the losses of all
            processes, unless the module has limiters. It cannot be given where it has.
        log_every_n_steps: Number of optimiser steps that a logged value covers; None for the Trainer's, 0 for no logs.

    Raises:
        ValueError: If `log_every_n_steps` is negative; when training starts, if a loss would be limited twice, or the
            module optimises by hand and has no limiter, or has several optimisers and limiters without one.

    Example:
        >>> import lightning.pytorch as L
        >>> trainer = L.Trainer(callbacks=[LimitLoss(ALRC(num_stddev=4.0))], logger=False, enable_progress_bar=False)
    """

    def __init__(self, limit: ALRC | None = None, *, log_every_n_steps: int | None = None) -> None:
        if log_every_n_steps is not None and log_every_n_steps < 0:
            raise ValueError(f"log_every_n_steps must be ≥ 0, got {log_every_n_steps}; 0 logs nothing.")
        self.limit, self.log_every_n_steps = limit, log_every_n_steps
        self._limiters: dict[str, ALRC] = {}
        self._monitor: Monitor | None = None
        self._monitored: dict[str, Any] | None = None
        self._step = 0
        self._undo = ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the loss where `training_step` returns it, or find the module's limiters; attach and follow them."""
        self._undo.close()
        if sum(isinstance(callback, LimitLoss) for callback in getattr(trainer, "callbacks", ())) > 1:
            raise ValueError("the Trainer has several LimitLoss, each of which would limit the loss; keep one.")
        self._limiters = self._find(pl_module)
        self._undo.callback(self._limiters.clear)
        if self.limit is not None:
            self.limit.to(pl_module.device)
            self._wrap(trainer, pl_module)
        self._attach(trainer.optimizers)
        every = trainer.log_every_n_steps if self.log_every_n_steps is None else self.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        if every and not trainer.barebones:
            self._follow(every)
        self._step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Forget the losses of a step that a loss scaler did not make, where the gradients do not tell."""
        if pl_module.automatic_optimization and batch_idx % trainer.accumulate_grad_batches == 0:
            for limiter in self._limiters.values():
                limiter.discard()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a step of the optimiser, and log what has arrived."""
        if self._monitor is None or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        before = self._monitor.latest
        self._monitor.update()
        report = self._monitor.latest
        if report is None or report is before:
            return
        logged = {}
        for name in self._limiters:
            prefix, place = (f"{name}/limit", f"alrc/{name}") if len(self._limiters) > 1 else ("limit", "alrc")
            # Tensors on the host: Lightning would copy plain numbers to the device, and wait.
            logged |= {f"{place}/{key}": torch.tensor(float(report[f"{prefix}/{key}"])) for key in _LOGGED}
        pl_module.log_dict(logged, on_step=True, on_epoch=False, batch_size=1)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        self._undo.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the module as it was."""
        self._undo.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the limiter's state, unless it is part of the module's, and that of the logs."""
        state: dict[str, Any] = {}
        if self.limit is not None:
            state["limit"] = {name: tensor.clone() for name, tensor in self.limit.state_dict().items()}
        if self._monitor is not None:
            self._monitored = self._monitor.state_dict()
        if self._monitored is not None:
            state["monitor"] = self._monitored
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another LimitLoss was; called by the Trainer, before training starts."""
        if "limit" in state_dict:
            self.limit = ALRC(sync=True) if self.limit is None else self.limit
            self.limit.load_state_dict(state_dict["limit"])
        self._monitored = state_dict.get("monitor")
        if self._monitor is not None and self._monitored is not None:
            self._monitor.load_state_dict(self._monitored)

    def _find(self, module: LightningModule) -> dict[str, ALRC]:
        """Return the limiters to look after, by name: those of the module, else our own."""
        found = {
            name.replace("._orig_mod", ""): part for name, part in module.named_modules() if isinstance(part, ALRC)
        }
        names = ", ".join(f"self.{name}" for name in found)
        if found and self.limit is not None:
            raise ValueError(
                f"LimitLoss has an ALRC and {type(module).__name__} has {names}: the loss would be limited twice. "
                "Leave limit= out to have those of the module attached and logged, or take them out of the module."
            )
        if found:
            return found
        if not module.automatic_optimization:
            raise ValueError(
                f"{type(module).__name__} optimises by hand (automatic_optimization=False), so its losses have flowed "
                "back before LimitLoss sees them. Give it self.limit = ALRC(), call self.manual_backward("
                "self.limit(loss)), and use LimitLoss() to have it attached and logged."
            )
        self.limit = ALRC(sync=True) if self.limit is None else self.limit
        return {"loss": self.limit}

    def _wrap(self, trainer: Trainer, module: LightningModule) -> None:
        """Put a `training_step` before the module's own that limits what it returns; Lightning looks there first."""
        own = vars(module).get("training_step")  # a compiled module has one

        @functools.wraps(inspect.unwrap(module.training_step))
        def training_step(module: LightningModule, *args: Any, **kwargs: Any) -> Any:
            output = type(module).training_step(module, *args, **kwargs) if own is None else own(*args, **kwargs)
            return self._limited(output) if trainer.training else output

        def restore() -> None:
            del module.training_step
            if own is not None:
                module.training_step = own

        # A bound method: copies of the module get it bound to themselves.
        module.training_step = MethodType(training_step, module)
        self._undo.callback(restore)

    def _limited(self, output: Any) -> Any:
        """Limit the loss in what `training_step` returned; leave to Lightning what holds none."""
        assert self.limit is not None
        if isinstance(output, Tensor):
            return self.limit(output)
        if isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
            return {**output, "loss": self.limit(output["loss"])}
        return output

    def _attach(self, optimizers: list[Any]) -> None:
        """Attach the limiters that follow no optimiser yet."""
        loose = [limiter for limiter in self._limiters.values() if limiter._attachment is None]
        if not loose:
            return
        if len(optimizers) != 1:
            raise ValueError(
                f"LimitLoss cannot tell which of {len(optimizers)} optimisers steps on which loss; "
                "call self.limit.attach(optimizer) for each ALRC in configure_optimizers."
            )
        if not isinstance(optimizers[0], torch.optim.Optimizer):
            raise TypeError(
                f"LimitLoss follows a torch.optim.Optimizer, but the strategy has a {type(optimizers[0]).__name__}, "
                "which does not say when it steps; use another strategy."
            )
        for limiter in loose:
            limiter.attach(optimizers[0])
            self._undo.callback(limiter.detach)

    def _follow(self, every: int) -> None:
        """Gather what is logged, from where the last run stopped."""
        limiters = self._limiters
        monitor = Monitor(limiters if len(limiters) > 1 else next(iter(limiters.values())), every=every)
        self._monitor = monitor

        def leave() -> None:
            self._monitor, self._monitored = None, monitor.state_dict()
            monitor.close()

        self._undo.callback(leave)
        if self._monitored is not None:
            monitor.load_state_dict(self._monitored)
