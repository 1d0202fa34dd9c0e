"""The step guard for PyTorch: judge an update before it is made, and make it or leave everything as it was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import torch
from torch import Tensor
from torch.optim import Optimizer

from alrc.rules.step import SkipStep, StepState
from alrc.torch.commit import Committer, Mode, gradients_of
from alrc.torch.norms import join, norms_of
from alrc.torch.ops import EAGER
from alrc.torch.skips import CONSECUTIVE, STEPS, TOTAL, SkipLedger

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["StepGuard", "StepTelemetry"]

_STATE_VERSION = 1


class StepTelemetry(NamedTuple):
    """Say what happened to the last update, as 0-d tensors on their device.

    Reading them does not wait for the device; converting one to a Python number does.
    """

    is_skipped: Tensor
    """Whether it was skipped, boolean."""
    norm: Tensor
    """Norm of all gradients, float32 or better; inf where it overflows."""
    consecutive: Tensor
    """Number of updates skipped in a row, this one included; 0 if it was made."""
    total_skipped: Tensor
    """Number of updates skipped since the guard was made."""
    step: Tensor
    """Number of this update, counted from 0."""


class StepGuard:
    """Make an update only if its gradients are finite and a rule does not reject it.

    Call `guard.step()` instead of `optimizer.step()`. A skipped update commits nothing: weights, moments and step
    counters of the optimiser stay bit for bit. Nothing waits for the device in the modes "fused" and "select"; see
    `docs/design/0007-step-guard.md` for what each mode costs. Learning-rate schedulers are yours to step or not.

    Args:
        optimizer: The optimiser, made; not LBFGS.
        rule: Judges loss and gradient norm; None only asks whether the square of the norm is finite.
        max_consecutive_skips: Skipped updates in a row after which `TooManySkips` is raised; None for no such budget.
        mode: "fused", "select", "host", or "auto" for the cheapest of them that is right at each step.
        group: Process group over which loss and norm are averaged before they are judged, where its ranks hold
            different gradients or losses. Gradients that are DTensors are measured whole without it.

    Raises:
        TypeError: If `optimizer` cannot be guarded.
        ValueError: If a setting is outside its range; the message names the value.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> guard = StepGuard(torch.optim.SGD([weight], lr=0.1))
        >>> weight.grad = torch.tensor([1.0, torch.nan])
        >>> guard.step()
        >>> print(weight.data, guard.last.is_skipped)
        tensor([1., 1.]) tensor(True)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rule: SkipStep | None = None,
        *,
        max_consecutive_skips: int | None = 20,
        mode: Literal["auto"] | Mode = "auto",
        group: ProcessGroup | None = None,
    ) -> None:
        if max_consecutive_skips is not None and (max_consecutive_skips < 1 or max_consecutive_skips % 1):
            raise ValueError(f"max_consecutive_skips must be a whole number ≥ 1, or None, got {max_consecutive_skips}.")
        self.rule = rule
        self._committer = Committer(optimizer, mode)
        self._group = group
        self._has_loss: bool | None = None
        self._steps = 0
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        device = parameters[0].device
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
        self._ledger = SkipLedger(max_consecutive_skips, device)
        self._state: tuple[Tensor, ...] = ()
        if rule is not None:
            arrays = [torch.from_numpy(array) for array in rule.init()]
            self._state = tuple(a.to(device, dtype if a.is_floating_point() else a.dtype) for a in arrays)
        self._is_bad = torch.zeros((), dtype=torch.bool, device=device)
        self._norm = torch.zeros((), dtype=dtype, device=device)
        self._unknown = torch.full((), torch.nan, dtype=dtype, device=device)

    @property
    def optimizer(self) -> Optimizer:
        """The optimiser that is guarded."""
        return self._committer.optimizer

    @property
    def mode(self) -> Mode:
        """How the last update was decided; before the first, how one would be without gradients."""
        return self._committer.mode

    @property
    def last(self) -> StepTelemetry:
        """What happened to the last update."""
        counters = self._ledger.counters.to(torch.int64)
        step = (counters[STEPS] - 1).clamp(min=0)
        return StepTelemetry(self._is_bad, self._norm, counters[CONSECUTIVE], counters[TOTAL], step)

    @torch.no_grad()
    def step(
        self, *, loss: Tensor | None = None, norm: Tensor | None = None, scaler: Any = None, ids: Any = None
    ) -> None:
        """Judge the update that the gradients would make, and make it or not.

        Args:
            loss: Loss of the update, 0-d: unscaled, and before any limit. The rule judges it; without a rule it is
                evidence only. Give it in every step or in none.
            norm: Norm of all gradients before clipping, 0-d, as a clipper returns it. It is trusted: if it is finite,
                so must the gradients be. None measures it.
            scaler: The GradScaler, if there is one; its `unscale_` is called where you have not. Call `update` after.
            ids: Names the samples of the update, for the evidence; any object or tensor, kept and not read.

        Raises:
            TooManySkips: If the budget of consecutive skips is spent; on CUDA it may come some steps late.
            ValueError: If the rule was given a loss in some steps and none in others, or `loss` is not one number.
        """
        if scaler is not None:
            self._unscale(scaler)
        device, dtype = self._norm.device, self._norm.dtype
        if norm is None:
            norm = measure_norm(gradients_of(self.optimizer), dtype, device)
        else:
            norm = _whole(norm.detach()).reshape(()).to(device, dtype)
        if loss is not None:
            if loss.numel() != 1:
                raise ValueError(f"loss must be one number, got shape {tuple(loss.shape)}; pass its mean.")
            loss = _whole(loss.detach()).reshape(()).to(device, dtype)
        if self._group is not None:
            loss, norm = self._average(loss, norm)
        self._norm, self._is_bad = norm, self._judge(loss, norm)
        if ids is not None:
            self._ledger.ids.append((self._steps, ids))
        self._steps += 1
        self._ledger.record(self._is_bad, self._unknown if loss is None else loss, norm)
        self._committer.step(self._is_bad)
        self._ledger.check()

    def state_dict(self) -> dict[str, Any]:
        """Return the counters, the evidence and the state of the rule, as tensors and plain numbers."""
        names = StepState._fields if self._state else ()
        return {
            "version": _STATE_VERSION,
            "steps": self._steps,
            "has_loss": self._has_loss,
            "counters": self._ledger.counters.clone(),
            "evidence": self._ledger.evidence.clone(),
            "rule": {name: tensor.clone() for name, tensor in zip(names, self._state, strict=True)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of another guard with the same settings.

        Args:
            state: What `state_dict` returned.

        Raises:
            ValueError: If it was written by another version, or by a guard with other settings.
        """
        if state["version"] != _STATE_VERSION:
            raise ValueError(
                f"the state of this StepGuard has version {state['version']}, but this alrc reads version "
                f"{_STATE_VERSION}; load it with the alrc that wrote it, or leave it out to start afresh."
            )
        names = StepState._fields if self._state else ()
        ours = [self._ledger.counters, self._ledger.evidence, *self._state]
        if set(state["rule"]) != set(names):
            raise ValueError(f"the state is that of a guard {'without' if names else 'with'} a rule, unlike this one.")
        theirs = [state["counters"], state["evidence"], *(state["rule"][name] for name in names)]
        for name, old, new in zip(("counters", "evidence", *names), ours, theirs, strict=True):
            if old.shape != new.shape:
                raise ValueError(
                    f"{name} has shape {tuple(new.shape)} in the state and {tuple(old.shape)} in this StepGuard; make "
                    "it with the same window and max_consecutive_skips."
                )
        for old, new in zip(ours, theirs, strict=True):
            old.copy_(new)
        self._steps, self._has_loss = state["steps"], state["has_loss"]

    def __copy__(self, memo: Any = None) -> Self:
        """Refuse: a copy would hang on the optimiser of the original."""
        raise TypeError("a StepGuard cannot be copied; make one for the other optimiser, and load_state_dict into it.")

    __deepcopy__ = __copy__

    def __getstate__(self) -> Any:
        """Refuse to be pickled, for the same reason."""
        raise TypeError("a StepGuard cannot be pickled; save its state_dict() instead.")

    def _judge(self, loss: Tensor | None, norm: Tensor) -> Tensor:
        """Return whether the update is to be skipped, and let the rule learn from it."""
        if self.rule is None:
            # Where its square is not, the moments of the optimiser would not be finite either.
            return (norm * norm < torch.inf).logical_not()
        if self._has_loss is None:
            self._has_loss = loss is not None
        if self._has_loss != (loss is not None):
            raise ValueError(
                f"step {self._steps} was given {'no' if self._has_loss else 'a'} loss, unlike the steps before; the "
                "rule compares like with like, so give loss= in every step or in none."
            )
        state = StepState(*self._state)
        verdict = self.rule.decide((loss, norm), state, EAGER)
        for old, new in zip(state, self.rule.update((loss, norm), verdict, state, EAGER), strict=True):
            old.copy_(new)
        return verdict.is_skipped

    def _average(self, loss: Tensor | None, norm: Tensor) -> tuple[Tensor | None, Tensor]:
        """Average loss and norm over the processes; one that is not finite makes the average infinite everywhere."""
        values = torch.stack([norm] if loss is None else [norm, loss])
        # Every reduction agrees about inf + finite, not every one about NaN.
        values = torch.where(torch.isfinite(values), values, torch.inf)
        torch.distributed.all_reduce(values, group=self._group)
        values = values / torch.distributed.get_world_size(self._group)
        return (None if loss is None else values[1]), values[0]

    def _unscale(self, scaler: Any) -> None:
        """Take the loss scale out of the gradients, unless that was done."""
        try:
            scaler.unscale_(self.optimizer)
        except RuntimeError as error:
            if "already been called" not in str(error):
                raise


def measure_norm(gradients: list[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the norm of all gradients, over all shards where they are DTensors; 0-d."""
    if not gradients:
        return torch.zeros((), dtype=dtype, device=device)
    gradients = [gradient.coalesce().values() if gradient.is_sparse else gradient for gradient in gradients]
    return join(norms_of(gradients, 2.0, dtype, device), 2.0)


def _whole(tensor: Tensor) -> Tensor:
    """Return the value that all processes share, of a DTensor; any other tensor as it is."""
    full_tensor = getattr(tensor, "full_tensor", None)
    return tensor if full_tensor is None else full_tensor()
