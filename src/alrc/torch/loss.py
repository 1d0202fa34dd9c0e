"""ALRC for PyTorch: measure the losses, let `alrc.rules` decide, scale their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from alrc import rules
from alrc.moments import Moments
from alrc.moments import estimate_start as estimate_start_of_array
from alrc.ops import Ops
from alrc.torch.ops import EAGER, TRACED, is_transforming

__all__ = ["ALRC", "Huber", "Telemetry", "estimate_start"]

_STATE_VERSION = 1


class _Limit(torch.autograd.Function):
    """Limit losses and learn from them, with a gradient that is scaled by a constant.

    Gradients are off inside `forward`. The form below works everywhere; this one costs a third of it per call.
    """

    @staticmethod
    def forward(ctx: Any, losses: Tensor, module: ALRC) -> Tensor:
        """Return the limited values."""
        limited, scale, ceiling = module._learn(losses, EAGER)
        module._seen[0] = scale, ceiling
        ctx.save_for_backward(scale)
        return limited if limited.dtype == losses.dtype else limited.to(losses.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None]:
        """Scale the gradient of each loss."""
        (scale,) = ctx.saved_tensors
        (gradient,) = grad_outputs
        scaled = gradient * scale
        return scaled if scaled.dtype == gradient.dtype else scaled.to(gradient.dtype), None


class _ScaleGradient(torch.autograd.Function):
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


class Telemetry(NamedTuple):
    """Say what happened to the last losses, as tensors on their device.

    Reading them does not wait for the device; converting one to a Python number does.
    """

    limit: Tensor
    """L_max the losses were held against, 0-d; inf where nothing is limited."""
    scale: Tensor
    """Gradient factor of every loss, in [0, 1], shape of the losses."""
    fraction_limited: Tensor
    """Share of the finite losses that were limited, 0-d, in [0, 1]."""
    nonfinite: Tensor
    """Number of losses that were NaN or infinite, 0-d integer."""


class ALRC(nn.Module):
    """Limit losses to a number of running standard deviations above their running mean.

    Call it on the losses before they are averaged. A loss above L_max = mean + num_stddev · std gets the value L_max
    and the gradient (L_max / L) · ∇L; every other loss passes unchanged (SPEC S5, S6). In train mode each call updates
    the moments once; in eval mode losses pass through and nothing is learned. State is float32 or better.

    Args:
        num_stddev: Standard deviations n above the mean, > 0.
        betas: Decay rates of the running first and second moment, each in [0, 1).
        start: `"auto"` learns the loss scale in the first `observe` updates; or raw moments `(mu1, mu2)`.
        feed: Which losses the moments see, `"limited"` or `"unlimited"`.
        second_moment: `"elements"` averages squared elements of a batch, `"mean"` squares their mean.
        eps: Added to the variance under the root.
        gain: Factor on both raw moments when the limit is made; 1 except in `ALRC.cifar_scripts`.
        observe: Updates before the first limit when `start="auto"`, 1 to 32.

    Raises:
        ValueError: If a setting is outside its range; the message names the value.

    Example:
        >>> limit = ALRC(start=(1.0, 1.04))
        >>> losses = torch.tensor([0.5, 2.0, 4.0], requires_grad=True)
        >>> limited = limit(losses)
        >>> limited.sum().backward()
        >>> print(limited.detach(), losses.grad)
        tensor([0.5000, 1.6000, 1.6000]) tensor([1.0000, 0.8000, 0.4000])

    References:
        Ede & Beanland 2020, "Adaptive learning rate clipping stabilizes learning", Algorithm 1.
    """

    mean: Tensor
    var: Tensor
    count: Tensor
    version: Tensor

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
    ) -> None:
        super().__init__()
        others = {"second_moment": second_moment, "eps": eps, "gain": gain, "observe": observe}
        self._hold(rules.ALRC(num_stddev, betas=betas, start=start, feed=feed, **others))

    @classmethod
    def from_rule(cls, rule: rules.ALRC) -> Self:
        """Make the module that applies a pure rule.

        Args:
            rule: Any `alrc.rules.ALRC`.

        Returns:
            A module in train mode with the rule's initial state.
        """
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module._hold(rule)
        return module

    @classmethod
    def paper(
        cls,
        num_stddev: float = 3.0,
        betas: tuple[float, float] = (0.999, 0.999),
        mu1: float = 25.0,
        mu2: float = 900.0,
    ) -> Self:
        """Follow Algorithm 1 of the paper to the letter; see `alrc.rules.ALRC.paper`."""
        return cls.from_rule(rules.ALRC.paper(num_stddev, betas, mu1, mu2))

    @classmethod
    def reference(
        cls,
        num_stddev: float = 3.0,
        decay: float = 0.999,
        mu1_start: float = 25.0,
        mu2_start: float = 900.0,
    ) -> Self:
        """Follow the code the authors published; see `alrc.rules.ALRC.reference`."""
        return cls.from_rule(rules.ALRC.reference(num_stddev, decay, mu1_start, mu2_start))

    @classmethod
    def cifar_scripts(cls, num_stddev: float = 3.0) -> Self:
        """Follow the authors' squared-error CIFAR-10 scripts; see `alrc.rules.ALRC.cifar_scripts`."""
        return cls.from_rule(rules.ALRC.cifar_scripts(num_stddev))

    def forward(self, losses: Tensor) -> Tensor:
        """Limit `losses` and, in train mode, learn from them.

        Args:
            losses: Floating-point losses of any shape and dtype: one loss, a batch, or summands such as pixels.

        Returns:
            Limited losses, same shape, dtype and device; their gradient is that of `losses` times `last.scale`.

        Raises:
            TypeError: If `losses` is not a floating-point tensor.
        """
        if not losses.is_floating_point():
            raise TypeError(f"losses must be a floating-point tensor, got {losses.dtype}; average or cast them first.")
        if not self.training:
            return losses
        is_compiling = torch.compiler.is_compiling()
        if not is_compiling and not is_transforming():
            return _Limit.apply(losses, self)  # pyright: ignore[reportReturnType]
        with torch.no_grad():
            limited, scale, ceiling = self._learn(losses.detach(), TRACED)
        # Tensors of a transform are dead outside of it.
        self._seen[0] = (scale, ceiling) if is_compiling else None
        return _ScaleGradient.apply(losses, limited, scale)  # pyright: ignore[reportReturnType]

    @property
    def limit(self) -> Tensor:
        """L_max for the next losses, 0-d; inf while nothing can be limited."""
        with torch.no_grad():
            return self.rule.limit(Moments(self.mean, self.var, self.count), EAGER)

    @property
    def mu1(self) -> Tensor:
        """Running mean of the losses, 0-d."""
        return self.mean.clone()

    @property
    def mu2(self) -> Tensor:
        """Running mean of the squared losses, 0-d."""
        return Moments(self.mean, self.var, self.count).mu2

    @property
    def last(self) -> Telemetry | None:
        """What happened to the losses of the last call in train mode; None before the first."""
        if self._seen[0] is None:
            return None
        scale, ceiling = self._seen[0]
        with torch.no_grad():
            nonfinite = (scale == 0).sum()
            return Telemetry(
                limit=torch.where(ceiling < rules.LARGEST_LOSS, ceiling, torch.inf),
                scale=scale,
                fraction_limited=((scale < 1).sum() - nonfinite) / (scale.numel() - nonfinite).clamp(min=1),
                nonfinite=nonfinite,
            )

    def extra_repr(self) -> str:
        """Show the settings that differ from the defaults."""
        default = rules.ALRC()
        shown = [f"{name}={value!r}" for name, value in vars(self.rule).items() if value != getattr(default, name)]
        return ", ".join(shown)

    def _hold(self, rule: rules.ALRC) -> None:
        """Take a rule and make its state."""
        self.rule = rule
        self._seen: list[tuple[Tensor, Tensor] | None] = [None]
        start = rule.init()
        self.register_buffer("mean", torch.tensor(start.mean, dtype=torch.float32))
        self.register_buffer("var", torch.tensor(start.var, dtype=torch.float32))
        self.register_buffer("count", torch.tensor(start.count, dtype=torch.int64))
        # A buffer, not module metadata: it survives every checkpoint format that stores tensors.
        self.register_buffer("version", torch.tensor(_STATE_VERSION, dtype=torch.int64))

    def _learn(self, losses: Tensor, ops: Ops) -> rules.Decision:
        """Decide about detached losses and take them into the moments."""
        buffers = self._buffers
        state = Moments(buffers["mean"], buffers["var"], buffers["count"])
        if losses.dtype != state.mean.dtype and losses.dtype.itemsize < state.mean.dtype.itemsize:
            losses = losses.to(state.mean.dtype)
        decision = self.rule.decide(losses, state, ops)
        for old, new in zip(state, self.rule.update(losses, decision, state, ops), strict=True):
            old.copy_(new)
        return decision

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the state as asked, but never into less than float32: `model.half()` must not ruin the variance."""
        moments = self.mean, self.var
        super()._apply(fn, recurse)
        for name, before in zip(("mean", "var"), moments, strict=True):
            if getattr(self, name).dtype.itemsize < torch.float32.itemsize:
                setattr(self, name, before.to(getattr(self, name).device))
        self._seen[0] = None
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any, **others: Any) -> None:
        """Refuse a state that another version of the rule wrote."""
        version = state_dict.get(f"{prefix}version")
        if version is not None and int(version) != _STATE_VERSION:
            raise RuntimeError(
                f"the ALRC state under '{prefix}' has version {int(version)}, but this alrc reads version "
                f"{_STATE_VERSION}; load it with the alrc that wrote it, or leave its four entries out to start afresh."
            )
        super()._load_from_state_dict(state_dict, prefix, *rest, **others)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the last losses out of copies and pickles."""
        return {**super().__getstate__(), "_seen": [None]}


class Huber(nn.Module):
    """Replace losses above `h` by √(h·L), the Huberisation the paper compares with (SPEC S13).

    Args:
        h: Loss above which the root sets in, > 0.

    Example:
        >>> losses = torch.tensor([0.25, 4.0], requires_grad=True)
        >>> Huber(h=1.0)(losses).sum().backward()
        >>> print(losses.grad)
        tensor([1.0000, 0.2500])

    References:
        Ede & Beanland 2020, section I.
    """

    def __init__(self, h: float = 1.0) -> None:
        super().__init__()
        self.rule = rules.Huber(h)

    def forward(self, losses: Tensor) -> Tensor:
        """Map `losses` of any shape; differentiable to every order, in train and eval mode alike."""
        return self.rule.decide(losses, None, TRACED).limited


def estimate_start(losses: Tensor, overestimate: float = 3.0) -> tuple[float, float]:
    """Estimate `start=(mu1, mu2)` for the published presets from some losses of the untrained network.

    Waits for the device, once. `ALRC()` needs no estimate.

    Args:
        losses: Losses of any shape, dtype and device; non-finite ones are ignored. At least two different values.
        overestimate: Factor on the loss scale, ≥ 1.

    Returns:
        `(mu1, mu2)` with `mu2 > mu1²`.

    Raises:
        ValueError: If `overestimate` < 1, or the losses have no spread.

    Example:
        >>> mu1, mu2 = estimate_start(torch.tensor([1.0, 3.0]))
        >>> ALRC.paper(mu1=mu1, mu2=mu2).limit
        tensor(15.)

    References:
        Ede & Beanland 2020, section II, and the README of their published code.
    """
    return estimate_start_of_array(losses.detach().double().cpu().numpy(), overestimate)
