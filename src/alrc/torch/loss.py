"""ALRC for PyTorch: measure the losses, let `alrc.rules` decide, scale their gradients.

On a CPU the rule runs on what numpy sees of the tensors, which costs a tenth to a fifth of running it on the tensors;
everywhere else it runs on the tensors, and nothing waits for the device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from alrc import rules
from alrc.ops import Ops
from alrc.rules import Batch
from alrc.rules.presets import Presets
from alrc.torch.autograd import Limit, ScaleGradient
from alrc.torch.host import FINITE_HOST, FINITE_NUMPY, HOST, MANY, as_tensor, extremes, is_on_host, number_of
from alrc.torch.learner import Learner, quiet
from alrc.torch.ops import EAGER, TRACED, is_transforming

__all__ = ["ALRC", "Telemetry"]


class Telemetry(NamedTuple):
    """Say what happened to the last losses, as tensors on their device.

    Reading them does not wait for the device; converting one to a Python number does.
    """

    limit: Tensor
    """L_max the losses were held against, 0-d; inf where nothing is limited."""
    scale: Tensor
    """Gradient factor of every loss, in [0, 1], shape of the losses; 0 where masked or not finite."""
    fraction_limited: Tensor
    """Share of the finite losses that were limited, 0-d, in [0, 1]."""
    nonfinite: Tensor
    """Number of losses that were NaN or infinite, 0-d integer; masked ones do not count."""
    nonpositive: Tensor
    """Number of losses ≤ 0, 0-d integer: a rule that is not `signed` never limits them (S7)."""
    largest: Tensor
    """Largest finite loss before it was limited, 0-d; -inf if there was none."""


class Seen(NamedTuple):
    """Hold what telemetry is made from, should anybody ask."""

    losses: Tensor
    scale: Tensor | None
    """None where it is plain that nothing was limited."""
    ceiling: Any
    mask: Tensor | None
    known: tuple[Any, Any, Any] | None = None
    """Lowest and largest loss and the sum of all, where these were looked at anyway."""


class ALRC(Presets, Learner):
    """Limit losses to a number of running standard deviations above their running mean.

    Call it on the losses before they are averaged. A loss above L_max = mean + num_stddev · std gets the value L_max
    and the gradient (L_max / L) · ∇L; every other loss passes unchanged (SPEC S5, S6). In train mode each call updates
    the moments once, or each step of the optimiser it is attached to; in eval mode losses pass through.

    Args:
        num_stddev: Standard deviations n above the mean, > 0.
        betas: Decay rates of the running first and second moment, each in [0, 1).
        start: `"auto"` learns the loss scale and its shifts; or raw moments `(mu1, mu2)`, followed as published.
        feed: Which losses the moments see, `"limited"` or `"unlimited"`.
        second_moment: `"elements"` averages squared elements of a batch, `"mean"` squares their mean.
        eps: Added to the variance under the root.
        gain: Factor on both raw moments when the limit is made; 1 except in `ALRC.cifar_scripts`.
        observe: Updates before the first limit when `start="auto"`, 4 to 256.
        signed: Whether losses may be of either sign.
        num_stddev_below: Standard deviations below the mean under which losses are limited too; None for none.
        sync: True, or a process group, to learn from the losses of all processes (S24).

    Raises:
        ValueError: If a setting is outside its range; the message names the value.

    Example:
        >>> limit = ALRC(start=(1.0, 1.04))
        >>> losses = torch.tensor([0.5, 2.0, 4.0], requires_grad=True)
        >>> limit(losses).sum().backward()
        >>> print(losses.grad)
        tensor([1.0000, 0.8000, 0.4000])

    References:
        Ede & Beanland 2020, "Adaptive learning rate clipping stabilizes learning", Algorithm 1.
    """

    _has_warned = False
    _followers: tuple[Callable[[Seen, Any], None], ...] = ()

    def __init__(
        self,
        num_stddev: float = 3.0,
        *,
        betas: tuple[float, float] = (0.999, 0.999),
        start: Literal["auto"] | tuple[float, float] = "auto",
        feed: Literal["limited", "unlimited"] = "limited",
        second_moment: Literal["elements", "mean"] = "elements",
        eps: float = 0.0,
        gain: float = 1.0,
        observe: int = 32,
        signed: bool = False,
        num_stddev_below: float | None = None,
        sync: Any = False,
    ) -> None:
        others: dict[str, Any] = {"second_moment": second_moment, "eps": eps, "gain": gain, "observe": observe}
        others |= {"signed": signed, "num_stddev_below": num_stddev_below}
        super().__init__(rules.ALRC(num_stddev, betas=betas, start=start, feed=feed, **others), sync)

    @classmethod
    def from_rule(cls, rule: rules.ALRC, sync: Any = False) -> Self:
        """Make the module that applies a pure rule.

        Args:
            rule: Any `alrc.rules.ALRC`.
            sync: True, or a process group, to learn from the losses of all processes.

        Returns:
            A module in train mode with the rule's initial state.
        """
        module = cls.__new__(cls)
        Learner.__init__(module, rule, sync)
        return module

    def forward(self, losses: Tensor, mask: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        """Limit `losses` and, in train mode, learn from them.

        Args:
            losses: Floating-point losses of any shape and dtype: one loss, a batch, or summands such as pixels.
            mask: Boolean, broadcasts to `losses`; false where there is no loss (padding). Such elements get value and
                gradient 0, whatever they hold, and are not learned from; if nothing is left the state stays.
            weight: How much each loss counts in the moments, ≥ 0, broadcasts to `losses`. The result is not multiplied.

        Returns:
            Limited losses, same shape, dtype and device; their gradient is that of `losses` times `last.scale`.

        Raises:
            TypeError: If `losses` or `weight` is not floating point, or `mask` not boolean.
            ValueError: If `mask` or `weight` does not broadcast to `losses`.
        """
        if not losses.is_floating_point():
            raise TypeError(f"losses must be a floating-point tensor, got {losses.dtype}; average or cast them first.")
        if mask is not None and mask.dtype != torch.bool:
            raise TypeError(f"mask must be a boolean tensor, got {mask.dtype}; use mask != 0, or weight= for weights.")
        if weight is not None and not weight.is_floating_point():
            raise TypeError(f"weight must be a floating-point tensor, got {weight.dtype}; use weight.float().")
        for name, part in (("mask", mask), ("weight", weight)):
            if part is not None and not _broadcasts(part, losses):
                raise ValueError(
                    f"{name} of shape {tuple(part.shape)} does not broadcast to losses of shape {tuple(losses.shape)}; "
                    "give it their shape, or axes of length 1."
                )
        if not self.training:
            return losses
        is_compiling = torch.compiler.is_compiling()
        if not is_compiling and not is_transforming():
            limited, scale, when_used = self._judge(losses.detach(), mask, weight)
            if scale is None and when_used is None:
                return losses.clone()
            return Limit.apply(losses, (limited, scale), when_used)  # pyright: ignore[reportReturnType]
        if self._group is not None:
            raise RuntimeError("sync=True does not work inside torch.compile or torch.func; call this ALRC outside.")
        with torch.no_grad():
            state = self._state(False)
            decision, batch = self._measure(losses.detach(), mask, weight, state, TRACED, _held(state))
            if is_compiling and self._followers:
                self._tell(Seen(losses.detach(), decision.scale, decision.ceiling, mask), state)
            if self._attachment is None:
                self._write(self.rule.commit(batch, state, TRACED), False)
            else:
                self._attachment.observe(batch)
        # Tensors of a transform are dead outside of it.
        self._seen[0] = Seen(losses.detach(), decision.scale, decision.ceiling, mask) if is_compiling else None
        return ScaleGradient.apply(losses, decision.limited, decision.scale)  # pyright: ignore[reportReturnType]

    @property
    def last(self) -> Telemetry | None:
        """What happened to the losses of the last call in train mode; None before the first."""
        if self._seen[0] is None:
            return None
        losses, scale, ceiling, mask, _ = self._seen[0]
        with torch.no_grad():
            if scale is None:
                scale = torch.ones_like(losses, dtype=torch.promote_types(losses.dtype, torch.float32))
            ceiling = torch.as_tensor(ceiling, dtype=scale.dtype)
            is_finite = scale > 0
            number = is_finite.sum()
            masked = 0 if mask is None else (~mask).expand(scale.shape).sum()
            largest = torch.where(is_finite, losses.to(scale.dtype), -torch.inf)
            return Telemetry(
                limit=torch.where(ceiling < rules.LARGEST_LOSS, ceiling, torch.inf),
                scale=scale,
                fraction_limited=((scale < 1) & is_finite).sum() / number.clamp(min=1),
                nonfinite=scale.numel() - number - masked,
                nonpositive=((losses <= 0) & is_finite).sum(),
                largest=largest.max() if largest.numel() else largest.new_full((), -torch.inf),
            )

    def follow(self, follower: Callable[[Seen, Any], None]) -> Callable[[], None]:
        """Tell a function about each call in train mode, before its losses are learned from.

        What activation checkpointing repeats is left out, and so is what happens under `torch.func`. Copies and pickles
        of this module have no followers.

        Args:
            follower: Called with what was seen of the losses and the state they were held against: tensors, which may
                be overwritten later, or numpy numbers on a CPU. It must not read a tensor's value.

        Returns:
            A function that undoes it.
        """
        self._followers = (*self._followers, follower)

        def leave() -> None:
            self._followers = tuple(other for other in self._followers if other is not follower)

        return leave

    def extra_repr(self) -> str:
        """Show the settings that differ from the defaults."""
        default = rules.ALRC()
        shown = [f"{name}={value!r}" for name, value in vars(self.rule).items() if value != getattr(default, name)]
        return ", ".join(shown + ["sync=True"] * (self._sync is not False))

    def __getstate__(self) -> dict[str, Any]:
        """Leave the followers out of copies and pickles."""
        return {**super().__getstate__(), "_followers": ()}

    def _tell(self, seen: Seen, state: Any) -> None:
        """Tell the followers about a call."""
        for follower in self._followers:
            follower(seen, state)

    def _measure(
        self, losses: Any, mask: Any, weight: Any, state: Any, ops: Ops, held: Any = None
    ) -> tuple[rules.Decision, Batch]:
        """Decide about losses, by the state as it is held for that, and say what they tell."""
        if losses.dtype != state.mean.dtype and losses.dtype.itemsize < state.mean.dtype.itemsize:
            losses = losses.to(state.mean.dtype)
        if mask is not None:
            losses = losses.masked_fill(~mask, torch.nan)
        if weight is not None:
            weight = weight.detach().to(losses.dtype).expand(losses.shape)
        decision = self.rule.decide(losses, state if held is None else held, ops)
        return decision, self.rule.measure(losses, decision, state, ops, weight)

    def _judge(self, losses: Tensor, mask: Any, weight: Any) -> tuple[Tensor, Tensor | None, Callable[[], None] | None]:
        """Limit detached losses; return values, factors (None: all 1), what to do when their gradient has flowed."""
        self._settle()
        attachment = self._attachment
        on_host = is_on_host(losses) and self._is_on_host
        state, seen = self._state(on_host), self._seen[0]
        with quiet():
            if on_host:
                limited, scale, batch = self._judge_on_host(losses, mask, weight, state)
            else:
                decision, batch = self._measure(losses, mask, weight, state, EAGER)
                limited, scale = decision.limited, decision.scale
                self._seen[0] = Seen(losses, scale, decision.ceiling, mask)
            if self._followers and torch._C._current_graph_task_id() == -1:
                self._tell(self._seen[0], state)
            if attachment is not None:
                return limited, scale, lambda: attachment.observe_gradient(batch)
            if torch._C._current_graph_task_id() == -1:
                self._take(batch, state, on_host, None)
            else:  # A forward pass inside a backward pass is checkpointing at work: these have been learned from.
                self._seen[0] = seen
        return limited, scale, None

    def _judge_on_host(self, losses: Tensor, mask: Any, weight: Any, state: Any) -> tuple[Tensor, Tensor | None, Batch]:
        """Decide about losses in the host's memory, where looking at them is free and most steps have nothing to do."""
        rule, wide = self.rule, losses
        if losses.dtype.itemsize < state.mean.dtype.itemsize:
            wide = losses.to(self._buffers["mean"].dtype)  # pyright: ignore[reportOptionalMemberAccess]
        if mask is None and weight is None and losses.numel() > 0:
            # numpy takes half of torch's time for each operation on a few losses; torch has threads for many.
            is_small = wide.numel() <= MANY
            values: Any = wide.numpy() if is_small else wide
            ops: Ops = FINITE_NUMPY if is_small else FINITE_HOST
            lowest, largest = extremes(values)
            # NaN makes both NaN, and NaN is never between two numbers.
            if -np.inf < lowest <= largest < np.inf:
                if lowest <= 0:
                    self._warn_of_sign(lowest)
                if type(rule) is rules.ALRC:
                    batch, ceiling = rule.calm(values, largest, state, ops)
                    if batch is not None:
                        self._seen[0] = Seen(losses, None, ceiling, None, (lowest, largest, batch.number * batch.mean))
                        return losses, None, batch
                decision = rule.decide(values, state, ops)
                batch = rule.measure(values, decision, state, ops)
                limited, scale = as_tensor(decision.limited), as_tensor(decision.scale)
                self._seen[0] = Seen(losses, scale, decision.ceiling, None)
                return limited, scale, batch
        decision, batch = self._measure(wide, mask, weight, state, HOST)
        self._seen[0] = Seen(losses, decision.scale, decision.ceiling, mask)
        if losses.numel():
            self._warn_of_sign(number_of(torch.where(decision.scale > 0, decision.limited, torch.inf).min()))
        return decision.limited, decision.scale, batch

    def _warn_of_sign(self, lowest: Any) -> None:
        """Say once that losses ≤ 0 are not limited; on a CPU only, where looking costs next to nothing."""
        if lowest <= 0 and not (self._has_warned or self.rule.signed):
            self._warn(f"the lowest is {lowest:g}", 8)

    def _warn(self, detail: str, stacklevel: int) -> None:
        """Say that losses ≤ 0 are not limited."""
        self._has_warned = True
        warnings.warn(
            f"ALRC met losses ≤ 0 ({detail}) and does not limit such: pass signed=True if losses may be negative, or "
            "mask= if zeros stand for padding.",
            stacklevel=stacklevel,
        )


def _held(state: Any) -> Any:
    """Return the state with copies of what decisions depend on, which a compiler keeps for the backward pass.

    It may compute the factors there again, from buffers that have been overwritten meanwhile. What `stack` returns it
    does not compute again.
    """
    mean, var, count = torch.stack((state.mean, state.var, state.count.to(state.mean.dtype))).unbind()
    return state._replace(mean=mean, var=var, count=count)


def _broadcasts(part: Tensor, losses: Tensor) -> bool:
    """Return whether a tensor can be expanded to the shape of the losses."""
    sizes = zip(reversed(part.shape), reversed(losses.shape), strict=False)
    return part.ndim <= losses.ndim and all(size in (1, wanted) for size, wanted in sizes)
