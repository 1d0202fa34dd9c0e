"""The gradient rules for PyTorch: measure the gradients, let a rule of `alrc.rules` decide, scale them."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from alrc.ops import NUMPY
from alrc.rules.gradient import GradientDecision, GradientRule, UnitNorms
from alrc.torch.host import is_on_host, number_of
from alrc.torch.norms import GRANULARITIES, join, norms_of, reason_to_refuse
from alrc.torch.ops import EAGER

__all__ = ["GradientClipper", "GradientTelemetry"]

_STATE_VERSION = 1


class GradientTelemetry(NamedTuple):
    """Say what happened to the last gradients, as tensors on their device.

    Reading them does not wait for the device; converting one to a Python number does.
    """

    norm: Tensor
    """Norm of all gradients before limiting, 0-d; of the order the rule measures with, so the largest |g| for Value."""
    threshold: Tensor
    """What each magnitude was held against, broadcastable to `scale`; inf where there was no limit."""
    scale: Tensor
    """Factor in [0, 1]: 0-d, or one for each parameter or unit in order. For Value, that of its largest element."""
    fraction_limited: Tensor
    """Share of the finite magnitudes that were limited, 0-d, in [0, 1]. For Value, of the parameters."""
    nonfinite: Tensor
    """Number of magnitudes that were NaN or infinite, 0-d integer."""


class _Seen(NamedTuple):
    """Hold what `GradientClipper.last` is made of."""

    norm: Tensor
    magnitudes: Tensor
    decision: GradientDecision
    absent: int


class GradientClipper:
    """Limit gradients by a rule, between `backward()` and `optimizer.step()`.

    With a loss scaler call it after `scaler.unscale_(optimizer)`; with accumulation, once for each optimiser step.
    Gradients whose magnitude is not finite are left as they are, and never enter the rule's state. DTensor gradients
    (FSDP2) are measured over all their shards, so every process decides alike.

    Args:
        parameters: A module, its `named_parameters()`, or parameters. Parameters without a gradient are skipped.
        rule: A rule of `alrc.rules`: `Value`, `Norm`, `AGC`, `AutoClip`, `ZClip` or your own `GradientRule`.

    Raises:
        ValueError: If there is no parameter, one comes twice, or a pattern of the rule's `exclude` fits no name.
        TypeError: If a parameter is no floating-point tensor, or the rule is not a gradient rule.

    Example:
        >>> from alrc.rules import Norm
        >>> model = nn.Linear(2, 1, bias=False)
        >>> clipper = GradientClipper(model, Norm(1.0))
        >>> model(torch.tensor([3.0, 4.0])).backward()
        >>> clipper.clip_()
        tensor(5.)
        >>> model.weight.grad
        tensor([[0.6000, 0.8000]])
    """

    def __init__(
        self, parameters: nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]], rule: GradientRule
    ) -> None:
        if not isinstance(rule, GradientRule):
            raise TypeError(f"rule must be a gradient rule such as alrc.rules.Norm(1.0), got {rule!r}.")
        self.rule = rule
        self._named = _name(parameters)
        self._weights = list(self._named.values())
        self._measure = rule.measures
        self._excluded = _excluded(self._measure.exclude, self._named)
        is_double = any(weight.dtype == torch.float64 for weight in self._weights)
        self._dtype = torch.float64 if is_double else torch.float32
        number = len(self._weights) if self._measure.granularity == "parameter" else None
        self._state = self._on_device(rule.init(number))
        self._seen: _Seen | None = None

    @torch.no_grad()
    def clip_(self) -> Tensor:
        """Scale the gradients in place by what the rule decides, and take them into its state.

        Returns:
            Norm of all gradients before limiting, 0-d, float32 or better; of the order the rule measures with. Not
            finite if a gradient is not. A tensor on the device of the first parameter: nothing has waited for it.

        Raises:
            RuntimeError: If no parameter has a gradient.
            TypeError: If a gradient is sparse, or a DTensor whose sharding the rule cannot measure right.
        """
        gradients: list[Tensor | None] = [weight.grad for weight in self._weights]
        excluded: list[Tensor] = []
        for index, (name, gradient) in enumerate(zip(self._named, gradients, strict=True)):
            if gradient is None:
                continue
            if type(gradient) is not Tensor or gradient.layout != torch.strided:
                self._check(name, gradient)
            if index in self._excluded:
                excluded.append(gradient)
                gradients[index] = None
        absent = sum(gradient is None for gradient in gradients)  # count(None) would compare tensors
        if absent == len(gradients):
            raise RuntimeError(
                "no parameter to limit has a gradient; call clip_() after backward(). If something replaced the "
                "parameters, as fully_shard does, make the clipper after it."
            )
        self._state = self._on_device(self._state)
        norm_type = self._measure.norm_type
        taken = GRANULARITIES[self._measure.granularity](gradients, self._weights, norm_type, self._dtype)
        if is_on_host(taken.norm):
            decision, is_idle = self._decide_on_host(taken.magnitudes)
        else:
            decision, is_idle = self._decide(taken.magnitudes), False
        if not is_idle:
            taken.scale_(decision)
        norm = taken.norm
        if excluded:
            others = norms_of(excluded, norm_type, self._dtype, norm.device)
            norm = join(torch.cat((norm.reshape(1), others)), norm_type)
        magnitudes = taken.magnitudes.gradient if self._measure.weights else taken.magnitudes
        self._seen = _Seen(norm, magnitudes, decision, absent if self._measure.granularity != "unit" else 0)
        return norm

    @property
    def last(self) -> GradientTelemetry | None:
        """What happened to the gradients of the last call; None before the first."""
        if self._seen is None:
            return None
        norm, magnitudes, decision, absent = self._seen
        if magnitudes.ndim == 0:
            absent = 0
        with torch.no_grad():
            nonfinite = (~torch.isfinite(magnitudes)).sum() - absent
            measured = magnitudes.numel() - absent - nonfinite
            return GradientTelemetry(
                norm=norm,
                threshold=torch.as_tensor(decision.threshold, dtype=norm.dtype, device=norm.device),
                scale=decision.scale,
                fraction_limited=(decision.scale < 1).sum() / measured.clamp(min=1),
                nonfinite=nonfinite,
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the rule's state and what it belongs to, for `torch.save` or a distributed checkpoint."""
        state = {} if self._state is None else {name: x.clone() for name, x in self._state._asdict().items()}
        names = list(self._named) if self._measure.granularity == "parameter" else []
        return {"version": _STATE_VERSION, "rule": repr(self.rule), "parameters": names, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state that `state_dict` returned. Settings stay those of this clipper's rule.

        Args:
            state_dict: What `state_dict` returned.

        Raises:
            ValueError: If another version or another rule wrote it, or its arrays belong to other parameters or to
                another window.
        """
        version, rule = state_dict.get("version"), str(state_dict.get("rule"))
        if version != _STATE_VERSION:
            raise ValueError(f"the state has version {version}, but this alrc reads version {_STATE_VERSION}.")
        if rule.partition("(")[0] != type(self.rule).__name__:
            raise ValueError(f"the state is that of {rule}, but this clipper has the rule {self.rule!r}.")
        mine = self.state_dict()
        theirs, state = state_dict["state"], mine["state"]
        if list(state_dict["parameters"]) != mine["parameters"]:
            differing = sorted(set(state_dict["parameters"]) ^ set(mine["parameters"])) or ["their order"]
            raise ValueError(f"the state belongs to other parameters; the difference is {', '.join(differing)}.")
        if {name: x.shape for name, x in theirs.items()} != {name: x.shape for name, x in state.items()}:
            raise ValueError(f"the state of {rule} has arrays of other shapes than that of {self.rule!r}.")
        for name, tensor in theirs.items():
            getattr(self._state, name).copy_(tensor)

    def __repr__(self) -> str:
        """Show the rule and how much it holds."""
        return f"{type(self).__name__}({len(self._weights)} parameters, {self.rule!r})"

    def _decide(self, magnitudes: Any) -> GradientDecision:
        """Let the rule decide, on the device."""
        decision = self.rule.decide(magnitudes, self._state, EAGER)
        if self._state is not None:
            after = self.rule.update(magnitudes, decision, self._state, EAGER)
            for old, new in zip(self._state, after, strict=True):
                old.copy_(new)
        return decision

    def _decide_on_host(self, magnitudes: Any) -> tuple[GradientDecision, bool]:
        """Let the rule decide with numpy, which is quicker for single numbers; say whether nothing is limited."""
        seen = UnitNorms(*map(number_of, magnitudes)) if self._measure.weights else number_of(magnitudes)
        held: Any = self._state
        state = None if held is None else type(held)(*map(number_of, held))
        with np.errstate(all="ignore"):
            decision = self.rule.decide(seen, state, NUMPY)
            if held is not None:
                after = self.rule.update(seen, decision, state, NUMPY)
                for old, new in zip(held, after, strict=True):
                    old.numpy()[...] = new
        scale = torch.as_tensor(decision.scale, dtype=self._dtype)
        return GradientDecision(scale, decision.threshold), not np.any(decision.scale < 1)

    def _on_device(self, state: Any) -> Any:
        """Return a rule's state as tensors, float32 or better, where the first parameter is."""
        device = self._weights[0].device
        if state is None or (isinstance(state[0], Tensor) and state[0].device == device):
            return state
        tensors = (torch.as_tensor(value) for value in state)
        return type(state)(*(x.to(device, self._dtype if x.is_floating_point() else x.dtype) for x in tensors))

    def _check(self, name: str, gradient: Tensor) -> None:
        """Refuse, by name, a gradient that cannot be measured right."""
        reason = reason_to_refuse(gradient, self._measure.granularity)
        if reason:
            raise TypeError(f"the gradient of '{name}' {reason}, or leave '{name}' out of this clipper.")


def _name(parameters: Any) -> dict[str, Tensor]:
    """Return parameters by name; by number where they have none."""
    if isinstance(parameters, nn.Module):
        parameters = parameters.named_parameters()
    entries = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    named: dict[str, Tensor] = {}
    for index, entry in enumerate(entries):
        name, parameter = entry if isinstance(entry, tuple) else (str(index), entry)
        if not isinstance(parameter, Tensor) or not parameter.is_floating_point():
            raise TypeError(f"'{name}' must be a floating-point parameter, got {parameter!r:.80}.")
        if name in named:
            raise ValueError(f"the name '{name}' comes twice.")
        named[name] = parameter
    if not named:
        raise ValueError("there is no parameter to limit; a generator that was used before is empty.")
    if len({id(parameter) for parameter in named.values()}) < len(named):
        first: dict[int, str] = {}
        for name, parameter in named.items():
            if (other := first.setdefault(id(parameter), name)) != name:
                raise ValueError(f"'{name}' and '{other}' are one parameter, which would be scaled twice.")
    return named


def _excluded(patterns: tuple[str, ...], names: Iterable[str]) -> frozenset[int]:
    """Return the places of the parameters that a rule leaves alone."""
    known = list(names)
    found: set[int] = set()
    for pattern in patterns:
        fitting = {i for i, name in enumerate(known) if name == pattern or fnmatchcase(name, pattern)}
        if not fitting:
            raise ValueError(
                f"exclude has '{pattern}', which fits none of the {len(known)} parameters, such as '{known[0]}'; "
                "names are known of a module and of named_parameters()."
            )
        found |= fitting
    return frozenset(found)
