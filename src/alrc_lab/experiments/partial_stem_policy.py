"""What partial-STEM minimises and how fast: losses against blurred targets, and Adam's rates by iteration.

A rate is a function of the iteration alone, so a run can be resumed anywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from alrc_lab.experiments.partial_stem_networks import Completion, CompletionNetwork

LOSS_SCALE = 200.0
"""Factor on mean squared errors, both at half and at full size."""

BLUR_STDDEV = 2.5
"""Standard deviation in pixels of the Gaussian that targets are blurred with; the kernel is cut at 5×5."""

_BLUR_REACH = 2


@dataclass(frozen=True)
class Rates:
    """Hold what one update uses."""

    learning_rate: float
    """Adam's step size for the generators."""
    beta1: float
    """Adam's decay rate of the mean gradient."""
    is_frozen: bool
    """Whether running means are frozen: see `partial_stem_layers.freeze`."""


@dataclass(frozen=True)
class Policy:
    """Say how fast to learn: constant for half of the run, then in equal stages.

    Example:
        >>> policy = Policy(iterations=500_000)
        >>> policy.at(249_999).learning_rate, policy.at(499_999).learning_rate
        (0.0003, 3.75e-05)
    """

    iterations: int
    """Number of updates N."""
    learning_rate: float = 3e-4
    """Step size of the first half."""
    stages: int = 8
    """Stages of the second half; in stage s of S both rates below have fallen by s / S."""
    beta1: float = 0.9
    """Decay rate of the mean gradient in the first half."""
    beta1_fall: float = 0.4
    """How far beta1 falls in all; the authors' code never applied it."""
    beta2: float = 0.999
    """Decay rate of the mean squared gradient."""
    eps: float = 1e-8
    """Adam's term in the denominator."""
    trainer_factor: float = 2.0
    """Factor for the auxiliary trainer."""
    trainer_factor_on: Literal["rate", "loss"] = "rate"
    """What the factor multiplies: the learning rate, or as in the authors' code the loss, which Adam ignores."""

    def __post_init__(self) -> None:
        for name in ("iterations", "stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("learning_rate", "trainer_factor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        if not 0 <= self.beta1_fall <= self.beta1 < 1:
            raise ValueError(f"need 0 ≤ beta1_fall ≤ beta1 < 1, got beta1_fall {self.beta1_fall}, beta1 {self.beta1}.")

    @classmethod
    def code43(cls, iterations: int) -> Self:
        """Return the policy of the authors' script 43: constant beta1, the trainer's factor on its loss."""
        return cls(iterations, beta1_fall=0.0, trainer_factor_on="loss")

    def at(self, iteration: int) -> Rates:
        """Return the rates of an update.

        Args:
            iteration: Number of updates before this one, from 0 to `iterations` - 1.

        Returns:
            The rates.

        Raises:
            ValueError: If the run has no such update.
        """
        if not 0 <= iteration < self.iterations:
            raise ValueError(f"iteration must be from 0 to {self.iterations - 1}, got {iteration}.")
        half = self.iterations // 2
        stage = max(0, self.stages * (iteration - half) // (self.iterations - half))
        rest = 1 - stage / self.stages
        beta1 = self.beta1 - self.beta1_fall * stage / self.stages
        return Rates(self.learning_rate * rest, beta1, iteration >= half)

    def boundaries(self) -> list[tuple[int, Rates]]:
        """List the first update of the run and of each stage, with the rates that hold from there on."""
        half = self.iterations // 2
        second = self.iterations - half
        firsts = [0] * (half > 0) + [half + math.ceil(s * second / self.stages) for s in range(self.stages)]
        return [(first, self.at(first)) for first in dict.fromkeys(firsts) if first < self.iterations]

    def parameter_groups(
        self, network: CompletionNetwork, tensors_on: torch.device | str | None = None
    ) -> list[dict[str, Any]]:
        """Divide the weights into the generators' and the trainer's, for an optimiser.

        Args:
            network: The networks.
            tensors_on: Device on which learning rates and betas are tensors, as a step in a CUDA graph needs them (with
                `capturable=True`; a fused Adam reads betas as numbers all the same); none makes them numbers.

        Returns:
            Two parameter groups; their `rate_factor` is read by `set_rates` and kept in the optimiser's `state_dict`.
        """
        rates, factor = self.at(0), self.trainer_factor if self.trainer_factor_on == "rate" else 1.0
        generators = [*network.inner.parameters(), *network.outer.parameters()]
        groups: list[dict[str, Any]] = []
        for params, scale in ((generators, 1.0), (list(network.trainer.parameters()), factor)):
            numbers = [scale * rates.learning_rate, rates.beta1, self.beta2]
            lr, *betas = numbers if tensors_on is None else [torch.tensor(x, device=tensors_on) for x in numbers]
            groups.append({"params": params, "lr": lr, "betas": tuple(betas), "eps": self.eps, "rate_factor": scale})
        return groups

    def weigh_gradients_(self, network: CompletionNetwork) -> None:
        """Multiply the trainer's gradients by its factor, if it is on the loss; call after each backward pass.

        The sum of both losses is what is differentiated, so the trainer's own factor has no place in it.
        """
        if self.trainer_factor_on == "loss":
            for parameter in network.trainer.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(self.trainer_factor)


def set_rates(optimizer: torch.optim.Optimizer, rates: Rates) -> None:
    """Write the rates of an update into an Adam or AdamW; nothing is built anew, no state is touched.

    A learning rate or beta that is a tensor, as graphs on a GPU need it, is overwritten in place.

    Args:
        optimizer: Made from `Policy.parameter_groups`; in other groups the factor on the learning rate is 1.
        rates: What `Policy.at` says.
    """
    for group in optimizer.param_groups:
        learning_rate = rates.learning_rate * group.get("rate_factor", 1.0)
        beta1, beta2 = group["betas"]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate
        if isinstance(beta1, Tensor):
            beta1.fill_(rates.beta1)
        else:
            group["betas"] = (rates.beta1, beta2)


def blur_target(images: Tensor) -> Tensor:
    """Blur with a Gaussian of 2.5 pixels, cut at 5×5, its weights adding up to 1; borders are reflected.

    Args:
        images: Floating point, shape (..., height, width), sides at least 3.

    Returns:
        Same shape and dtype.

    Raises:
        ValueError: If a side is too short to be reflected.
    """
    height, width = images.shape[-2:]
    if min(height, width) <= _BLUR_REACH:
        raise ValueError(f"sides must be longer than {_BLUR_REACH} pixels to be blurred, got {height}×{width}.")
    density = [math.exp(-0.5 * (k / BLUR_STDDEV) ** 2) for k in range(-_BLUR_REACH, _BLUR_REACH + 1)]
    weights = [value / sum(density) for value in density]
    x = nn.functional.pad(images.reshape(-1, 1, height, width), (_BLUR_REACH,) * 4, mode="reflect")
    # Sums of shifted pictures instead of a convolution, which autocast would do in half precision.
    x = torch.stack([weight * x[..., k : k + height, :] for k, weight in enumerate(weights)]).sum(0)
    x = torch.stack([weight * x[..., k : k + width] for k, weight in enumerate(weights)]).sum(0)
    return x.reshape(images.shape)


class Targets(NamedTuple):
    """Hold what completions are compared with."""

    half: Tensor
    """Every second pixel, then blurred."""
    full: Tensor
    """Blurred."""


def targets_of(truth: Tensor) -> Targets:
    """Make the targets of both completions.

    Args:
        truth: Whole micrographs in [-1, 1], shape (batch, 1, height, width).

    Returns:
        Both targets.
    """
    return Targets(blur_target(truth[..., ::2, ::2]), blur_target(truth))


class CompletionLosses(NamedTuple):
    """Hold the losses of both completions, before anything limits them."""

    inner: Tensor
    """200 times the mean squared error at half size, shape (batch,): what ALRC is given for the inner loss."""
    outer: Tensor
    """The same at full size."""


def losses_of(completion: Completion, targets: Targets) -> CompletionLosses:
    """Compare both completions with their targets.

    Args:
        completion: What the networks gave, in any precision.
        targets: Of the same shapes.

    Returns:
        Both losses, in the targets' precision, of each example. The sum of both, limited, is what is differentiated.
    """

    def compare(output: Tensor, target: Tensor) -> Tensor:
        if output.shape != target.shape:
            raise ValueError(
                f"a completion of shape {tuple(output.shape)} has a target of shape {tuple(target.shape)}."
            )
        return LOSS_SCALE * (output.to(target.dtype) - target).square().mean((1, 2, 3))

    return CompletionLosses(*(compare(*pair) for pair in zip(completion, targets, strict=True)))


def rms_error_percent(losses: Tensor) -> Tensor:
    """Convert losses into root mean squared errors of intensity, in percent of the full range.

    Args:
        losses: 200 times mean squared errors of images in [-1, 1]; any shape.

    Returns:
        Same shape, in percent.

    Example:
        >>> rms_error_percent(torch.tensor(2.0))
        tensor(5.)
    """
    return 50 * (losses / LOSS_SCALE).sqrt()
