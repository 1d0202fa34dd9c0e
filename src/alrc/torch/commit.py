"""Let an optimiser step, or leave it as if it had not: on the device where that is possible, else on the host.

Exists apart from `guard.py` because what an optimiser keeps, and where, is a subject of its own. It is told a verdict
and knows nothing of how one is reached.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

__all__ = ["Committer", "Mode", "gradients_of"]

Mode = Literal["fused", "select", "host"]

_FUSED = (Adam, AdamW, SGD, Adagrad)


def _local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor, in the same memory and outside of autograd."""
    tensor = tensor.detach()
    to_local = getattr(tensor, "to_local", None)  # DTensor, whose module is costly to import
    return tensor if to_local is None else to_local()


def gradients_of(optimizer: Optimizer) -> list[Tensor]:
    """Return the gradients that the next step would use."""
    return [parameter.grad for parameter in _moved(optimizer)]


def _moved(optimizer: Optimizer) -> list[Any]:
    """Return the parameters that a step would move."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


class Committer:
    """Step an optimiser where a verdict on the device allows it.

    `fused` hands the verdict to the optimiser's own kernel. `select` lets it step and takes the old values back. `host`
    reads the verdict and does not call the optimiser, which is right whatever it keeps.
    """

    def __init__(self, optimizer: Optimizer, mode: Literal["auto"] | Mode) -> None:
        if mode not in ("auto", *get_args(Mode)):
            raise ValueError(f"mode must be 'auto', 'fused', 'select' or 'host', got {mode!r}.")
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}.")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError("LBFGS evaluates its closure several times a step, which cannot be judged as one update.")
        self.optimizer = optimizer
        self.wanted: Literal["auto"] | Mode = mode
        if mode == "fused" and not getattr(optimizer, "_step_supports_amp_scaling", False):
            raise ValueError(
                f"mode='fused' needs an optimiser that reads found_inf, and this {type(optimizer).__name__} does not; "
                "make it with fused=True, or use mode='select'."
            )
        self._has_hidden_state = False
        self._settled: set[Tensor] = set()
        self._flag: Tensor | None = None
        self._is_bad = torch.zeros((), dtype=torch.bool)
        self._answer = torch.zeros((), dtype=torch.bool)
        self._answer_view = self._answer.numpy()
        self._places: list[tuple[dict[Any, Any] | None, Any, Tensor]] = []
        self._saved: list[Tensor] = []
        self._saved_of: list[Tensor] = []
        # Before all others, so that they find the state committed and the verdict beside it.
        hooks = optimizer._optimizer_step_post_hooks
        others = dict(hooks)
        hooks.clear()
        optimizer.register_step_post_hook(self._finish)
        hooks.update(others)
        self.mode: Mode = self._choose(next(iter(optimizer.param_groups[0]["params"])).device)

    def step(self, is_bad: Tensor) -> None:
        """Step unless the 0-d boolean `is_bad` holds; show it as `optimizer.found_inf` to the hooks of the step."""
        optimizer = self.optimizer
        self.mode = self._choose(is_bad.device)
        flag = is_bad.to(torch.float32)
        is_lazy = self.mode == "host"
        if is_lazy and self._read(is_bad):
            optimizer._opt_called = True  # pyright: ignore[reportAttributeAccessIssue] - or schedulers warn
            return
        numbers = self._numbers()
        if self.mode == "fused":
            optimizer.grad_scale, optimizer.found_inf = None, flag  # pyright: ignore[reportAttributeAccessIssue]
        else:
            # Kernels that are not fused refuse to run where there is a found_inf; the hook sets it behind them.
            self._flag = flag
            if self.mode == "select":
                self._save(is_bad)
        try:
            optimizer.step()
        finally:
            self._flag, self._places = None, []
            for name in ("grad_scale", "found_inf"):
                vars(optimizer).pop(name, None)
        self._settled.update(_moved(optimizer))
        if self.mode != "fused" and numbers != self._numbers():
            self._has_hidden_state = True
            if not is_lazy and self._read(is_bad):
                self._set_numbers(numbers)

    def _choose(self, device: torch.device) -> Mode:
        """Return how the next step can be decided; only one that was asked for can be refused."""
        optimizer, wanted = self.optimizer, self.wanted
        is_fused = type(optimizer) in _FUSED and getattr(optimizer, "_step_supports_amp_scaling", False)
        if wanted == "fused" or (
            wanted == "auto" and is_fused and all(group.get("fused") for group in optimizer.param_groups)
        ):
            return "fused" if self._make_momentum() else "host"
        if wanted == "host" or (wanted == "auto" and device.type == "cpu"):
            return "host"  # where the verdict lies in memory already, there is nothing to wait for
        if any(p not in self._settled and not optimizer.state.get(p) for p in _moved(optimizer)):
            return "host"  # the step that makes the state of a parameter: there is no old state to select
        obstacle = self._obstacle(device)
        if obstacle and wanted == "select":
            raise RuntimeError(
                f"mode='select' cannot undo what {type(optimizer).__name__} changes: {obstacle}. Use mode='auto', "
                "which waits for the device once a step, or keep it on the device (capturable=True or fused=True)."
            )
        return "host" if obstacle else "select"

    def _obstacle(self, device: torch.device) -> str:
        """Name the first thing the optimiser keeps that a select on the device cannot undo."""
        if self._has_hidden_state:
            return "Python numbers in its groups or attributes"
        for holder, name, value in self._kept():
            if holder is None:
                continue
            if not isinstance(value, Tensor):
                return f"the {type(value).__name__} {name!r} in its state"
            if value.device.type != device.type:
                return f"{name!r}, on {value.device.type} beside parameters on {device.type}"
        return ""

    def _kept(self) -> Iterator[tuple[dict[Any, Any] | None, Any, Any]]:
        """Yield everything a step may change: whose it is, its name, its value."""
        optimizer = self.optimizer
        for parameter in _moved(optimizer):
            yield None, "parameter", parameter
        for owner, state in optimizer.state.items():
            if isinstance(owner, Tensor) and owner.grad is None:
                continue
            for name, value in state.items() if isinstance(state, dict) else ((owner, state),):
                if not (value is None or isinstance(value, str)):
                    yield state if isinstance(state, dict) else optimizer.state, name, value
        for group in optimizer.param_groups:
            for name, value in group.items():
                if isinstance(value, Tensor):
                    yield group, name, value

    def _read(self, is_bad: Tensor) -> bool:
        """Read a verdict through memory of the host: waits for its device, unless that is the CPU."""
        self._answer.copy_(is_bad)
        return bool(self._answer_view)

    def _save(self, is_bad: Tensor) -> None:
        """Copy everything a step may change, and keep gradients that would be refused from optimisers that look."""
        self._places = list(self._kept())
        tensors = [value for _, _, value in self._places]
        now = [_local(tensor) for tensor in tensors]
        if len(now) != len(self._saved) or any(a is not b for a, b in zip(tensors, self._saved_of, strict=True)):
            self._saved, self._saved_of = [torch.empty_like(tensor) for tensor in now], tensors
        torch._foreach_copy_(self._saved, now)  # pyright: ignore[reportPrivateImportUsage]
        self._is_bad = is_bad
        if not type(self.optimizer).__module__.startswith("torch.optim."):
            for gradient in gradients_of(self.optimizer):
                if not gradient.is_sparse:
                    _local(gradient).masked_fill_(is_bad, 0.0)

    def _finish(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Take the old values back where the verdict says so, before other hooks of the step run."""
        if self._flag is None:
            return
        if self._places:
            self._take_back()
        optimizer.found_inf = self._flag  # pyright: ignore[reportAttributeAccessIssue]

    def _take_back(self) -> None:
        """Select the old values."""
        after = list(self._kept())
        is_same = len(after) == len(self._places) and all(
            new[0] is old[0] and new[1] == old[1] and new[2].shape == old[2].shape and new[2].dtype == old[2].dtype
            for new, old in zip(after, self._places, strict=True)
        )
        if is_same:
            verdicts: dict[torch.device, Tensor] = {}
            for (_, _, tensor), saved in zip(after, self._saved, strict=True):
                now = _local(tensor)
                if now.device not in verdicts:
                    verdicts[now.device] = self._is_bad.to(now.device, non_blocking=True)
                torch.where(verdicts[now.device], saved, now, out=now)
        elif self._read(self._is_bad):  # state appeared or vanished: only Python can put that right
            for holder, name, _ in after:
                if holder is not None:
                    del holder[name]
            for (holder, name, tensor), saved in zip(self._places, self._saved, strict=True):
                _local(tensor).copy_(saved)
                if holder is not None:
                    holder[name] = tensor

    def _make_momentum(self) -> bool:
        """Make the momentum that fused SGD would leave uninitialised if its first step were skipped; tell if it can be.

        Zero is right as long as the first step weighs the gradient like every other, which dampening forbids.
        """
        if not isinstance(self.optimizer, SGD):
            return True
        lacking = [
            (group, p)
            for group in self.optimizer.param_groups
            for p in group["params"]
            if group["momentum"]
            and p.grad is not None
            and self.optimizer.state.get(p, {}).get("momentum_buffer") is None
        ]
        if any(group["dampening"] for group, _ in lacking):
            return False
        for _, parameter in lacking:
            self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return True

    def _numbers(self) -> list[dict[str, float]]:
        """Return the Python numbers that optimisers count in, outside of their state."""
        return [
            {name: value for name, value in held.items() if type(value) in (int, float)}
            for held in (vars(self.optimizer), *self.optimizer.param_groups)
        ]

    def _set_numbers(self, numbers: list[dict[str, float]]) -> None:
        """Put back what `_numbers` returned."""
        for held, old in zip((vars(self.optimizer), *self.optimizer.param_groups), numbers, strict=True):
            held.update(old)
