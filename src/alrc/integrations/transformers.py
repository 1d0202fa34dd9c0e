"""Limit the loss of every token in a Hugging Face Trainer: one object that is its loss function and its callback.

Wiring only: measures tokens, lets `alrc.torch.ALRC` limit them, divides as the Trainer wants it. Loads nothing of
transformers but the class of a callback; the rest is there when a Trainer is.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.trainer_callback import TrainerCallback

from alrc.torch import ALRC, Monitor

__all__ = ["LimitTokens"]

LOGGED = ("limit", "fraction_limited", "nonfinite")
"""Numbers of a `Monitor` that go into the Trainer's logs."""
_ENTRY = "alrc"
"""Where the moments are in the Trainer's state; no class's name, or the Trainer would make a new callback of it."""


class LimitTokens(TrainerCallback):
    """Limit the loss of every token in a `transformers.Trainer`.

    Give one object as `compute_loss_func` and among `callbacks`, or call `attach(trainer)`. Each token's cross entropy
    is limited by an ALRC, padding excluded, and their sum divided by the tokens of all micro-batches (S23, S25). The
    moments are in every checkpoint; where no gradient is wanted, as in evaluation, nothing is limited or learned.

    Args:
        limit: What limits the tokens; None for `ALRC(sync=True)`, which learns from the tokens of all processes.
        shift: Whether position i is to predict label i + 1; None to ask the Trainer's model: causal language models do.
        ignore_index: Label of tokens that are no loss, such as padding.
        loss_function: Makes losses, shape (tokens,), of logits, (tokens, classes), float32 or better, and labels,
            (tokens,), 0 where ignored; None for cross entropy, with the Trainer's `label_smoothing_factor`.

    Raises:
        TypeError: If `limit` is no `alrc.torch.ALRC`.

    Example:
        >>> limit_tokens = LimitTokens(ALRC(start=(1.0, 1.04)), shift=False)
        >>> logits = torch.tensor([[[0.0, 0.0], [4.0, 0.0], [9.0, 0.0]]], requires_grad=True)
        >>> loss = limit_tokens({"logits": logits}, labels=torch.tensor([[0, 1, -100]]))
        >>> print(limit_tokens.limit.last.limit, loss.detach())  # the mean of 0.69 and 4.02, which is limited
        tensor(1.6000) tensor(1.1466)
    """

    def __init__(
        self,
        limit: ALRC | None = None,
        *,
        shift: bool | None = None,
        ignore_index: int = -100,
        loss_function: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.limit = ALRC(sync=True) if limit is None else limit
        if not isinstance(self.limit, ALRC):
            raise TypeError(f"limit must be an ALRC, got {type(limit).__name__}; alrc.torch.ALRC(...) makes one.")
        self.ignore_index = ignore_index
        self._shift = self._shift_of_model = shift
        self._loss_function = loss_function
        if loss_function is None:
            self.limit._has_warned = True  # a cross entropy of 0 is a certain token, neither padding nor a mistake
        self._smoothing = 0.0
        self._is_used = False
        self._monitor: Monitor | None = None
        self._model: weakref.ref[nn.Module] | None = None
        self._start: dict[str, Tensor] = {}

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Return the loss of a micro-batch, in the way of `compute_loss_func`.

        Args:
            outputs: What the model returned: a mapping with `logits`, or a tuple that begins with them; shape
                (..., classes).
            labels: Integers, shape (...), as they are given to the model.
            num_items_in_batch: Number of tokens that the sum is divided by: those of all micro-batches of the step;
                None for those of this one.

        Returns:
            0-d tensor in float32 or better.

        Raises:
            ValueError: If there are no labels, or it is not known whether they are to be shifted.
            TypeError: If the labels are no integers and there is no `loss_function` for them.
        """
        if labels is None:
            raise ValueError("there are no labels to limit losses of; the data must have them under the name 'labels'.")
        if self._shift_of_model is None:
            raise ValueError(
                "it is not known whether labels are to be shifted: add this LimitTokens to the Trainer's callbacks too "
                "(or attach it to the Trainer), and it asks the model; elsewhere, pass shift=True or shift=False."
            )
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        labels = labels.to(logits.device)
        if self._shift_of_model:
            # Shorter labels would need a copy of the logits, which are far larger.
            labels = F.pad(labels, (0, 1), value=self.ignore_index)[..., 1:]
        logits, labels = logits.flatten(0, -2), labels.flatten()
        mask = labels != self.ignore_index
        losses = self._measure(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, mask)
        if losses.requires_grad:
            self._is_used = True
            if self.limit.version.device != losses.device:
                self.limit.to(losses.device)
            losses = self.limit(losses, mask=mask)
        if num_items_in_batch is None:
            number = mask.sum()
        else:
            # Under DataParallel there is one number for each replica, and their sum is what comes out right.
            number = torch.as_tensor(num_items_in_batch, device=losses.device).sum()
        return losses.sum() / torch.where(number > 0, number, 1)

    def attach(self, trainer: Any) -> Self:
        """Become the loss function and the first callback of a Trainer that exists.

        Only callbacks that come after this one see its numbers, so this is also the way to have them in TensorBoard and
        the like, which a Trainer puts before the callbacks it is given.

        Args:
            trainer: The `transformers.Trainer`, before it trains.

        Returns:
            This object.
        """
        callbacks = trainer.callback_handler.callbacks
        callbacks[:] = [self, *(callback for callback in callbacks if callback is not self)]
        trainer.compute_loss_func = self
        self.on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
        return self

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        """Learn from the Trainer what labels mean to its model."""
        self._shift_of_model = _is_shifting(model) if self._shift is None else self._shift
        self._smoothing = args.label_smoothing_factor
        if self._smoothing and self._loss_function is not None:
            raise ValueError(
                f"label_smoothing_factor={self._smoothing} means nothing to a loss_function of your own; leave it at 0 "
                "and smooth in there."
            )

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **others: Any
    ) -> None:
        """Follow the optimiser, with the moments of the checkpoint if training resumes from one."""
        saved = state.stateful_callbacks.get(_ENTRY)
        if not self._start:
            self._start = {name: tensor.clone() for name, tensor in self.limit.state_dict().items()}
        if isinstance(saved, dict):
            self._load(saved)
        elif self._model is not None and self._model() is not model:  # as in a search for hyperparameters
            self.limit.load_state_dict(self._start)
        state.stateful_callbacks[_ENTRY] = _Live(self._save)
        self._model, self._is_used = weakref.ref(model), False
        while not hasattr(optimizer, "_optimizer_step_post_hooks"):  # what accelerate wraps it in has none
            optimizer = optimizer.optimizer
        self.limit.attach(optimizer)
        self._watch()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Count the step."""
        if not self._is_used:
            raise RuntimeError(
                "no loss of this step has gone through LimitTokens: give the Trainer compute_loss_func=limit_tokens as "
                "well as callbacks=[limit_tokens], one object for both."
            )
        if self._monitor is not None:
            self._monitor.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        """Add what happened since the last log, leaving out what is not finite: there is no point to draw."""
        if self._monitor is None or "loss" not in logs:  # evaluations log, too
            return
        self._monitor.close()
        report = self._monitor.latest or {}
        self._watch()
        numbers = {f"alrc/{name}": report.get(f"limit/{name}", math.nan) for name in LOGGED}
        for log in (logs, state.log_history[-1]):
            log.update({name: number for name, number in numbers.items() if math.isfinite(number)})

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Let go of the optimiser."""
        self.limit.detach()
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out of copies and pickles what belongs to a training that runs."""
        return {**self.__dict__, "_monitor": None, "_model": None}

    def _measure(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Return the loss of every token, 0 where it is ignored."""
        labels = labels.masked_fill(~mask, 0)
        if self._loss_function is None:
            if labels.is_floating_point():
                raise TypeError(
                    f"labels must be integers, got {labels.dtype}; for anything but classes give a loss_function."
                )
            losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=self._smoothing)
        else:
            losses = self._loss_function(logits, labels)
            if losses.shape != labels.shape:
                raise ValueError(
                    f"loss_function must return one loss for each token, shape {tuple(labels.shape)}, got shape "
                    f"{tuple(losses.shape)}; it must not reduce (reduction='none')."
                )
        return losses.masked_fill(~mask, 0.0)

    def _watch(self) -> None:
        """Begin to count anew."""
        if self._monitor is not None:
            self._monitor.close()
        self._monitor = Monitor(self.limit, every=2**62)

    def _save(self) -> dict[str, Any]:
        """Return the moments as lists and numbers; JSON holds every float32 and float64 exactly."""
        return {name: tensor.tolist() for name, tensor in self.limit.state_dict().items()}

    def _load(self, saved: dict[str, Any]) -> None:
        """Set the moments to what `_save` returned."""
        dtypes = {name: tensor.dtype for name, tensor in self.limit.state_dict().items()}
        self.limit.load_state_dict({name: torch.tensor(value, dtype=dtypes.get(name)) for name, value in saved.items()})


class _Live:
    """Stand for the moments in the Trainer's state, which copies it when it is written: only then are they read."""

    def __init__(self, read: Callable[[], dict[str, Any]]) -> None:
        self._read = read

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return self._read()


def _is_shifting(model: Any) -> bool | None:
    """Return whether a model shifts its labels, as the Trainer counts them; None if there is no telling."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    loss_type = getattr(model, "loss_type", None)
    if loss_type in LOSS_MAPPING:
        return LOSS_MAPPING[loss_type] is ForCausalLMLoss
    # GPT-2 is one whose name says nothing of its loss.
    return True if type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() else None
