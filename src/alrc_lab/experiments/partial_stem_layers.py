"""One layer for all networks of partial-STEM: weight-normalised convolution, mean-only normalisation, activation.

TensorFlow's padding and the two ways in which the authors' code and paper normalise are decided here and nowhere else.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MeanForm = Literal["image", "frozen", "running", "none"]
"""Which mean a layer subtracts; see `MeanOnlyNorm`."""

WeightNorm = Literal["output", "input", "none"]
"""Whose norm the weights are divided by: each output channel's, each input channel's (authors' code), or nobody's."""

INITIAL_STDDEV = 0.05
"""Standard deviation of the directions V at the start."""

DECAY = 0.99
"""Decay rate of the running channel means."""


class MeanOnlyNorm(nn.Module):
    """Subtract each channel's mean over the picture, and nothing else.

    With `image` the mean is always that of the picture at hand, and gradients flow through it. `frozen` does the same
    while it tracks the running mean, and subtracts the running mean, as a constant, once `freeze` was called, and in
    eval mode. `running` always subtracts the running mean, as the paper can be read: nothing then holds the activations
    near zero, because the mean that is subtracted is that of other weights, and training diverges. Each step's update
    is mean ← 0.99 mean + 0.01 (mean over the batch), before it is subtracted.

    Args:
        channels: Number of channels.
        form: `image`, `frozen` or `running`.

    Example:
        >>> norm = MeanOnlyNorm(1, "image")
        >>> print(norm(torch.tensor([[[[1.0, 3.0]]]])))
        tensor([[[[-1.,  1.]]]])
    """

    mean: Tensor | None

    def __init__(self, channels: int, form: Literal["image", "frozen", "running"]) -> None:
        super().__init__()
        self.form = form
        self.is_frozen = False
        # The authors' code tracks the mean under "image" too, and never reads it.
        self.register_buffer("mean", None if form == "image" else torch.zeros(channels))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Subtract the mean and add the bias.

        Args:
            x: Shape (batch, channels, height, width).
            bias: Shape (channels,), or none.

        Returns:
            Same shape and dtype; the mean is taken in float32 at least.
        """
        shift = -self._mean_of(x)
        if bias is not None:
            shift = shift + bias
        return x + shift[..., None, None].to(x.dtype)

    def _mean_of(self, x: Tensor) -> Tensor:
        """Return the mean to subtract, of shape (batch, channels) or (channels,), and track."""
        is_tracking = self.mean is not None and self.training and not self.is_frozen
        if self.mean is not None and not is_tracking:
            return self.mean
        mean = x.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))
        if self.mean is not None:
            self.mean.lerp_(mean.detach().mean(0), 1 - DECAY)
            if self.form == "running":
                return self.mean
        return mean


class NormalisedConvolution(nn.Module):
    """Convolve, or convolve transposed, with direction and length of the weights apart; then normalise and activate.

    Weights are W = g V / ‖V‖, the norm taken over all but the output channel. The padding is TensorFlow's `SAME`: with
    stride 2 one row below and one column to the right. The transposed layer is the adjoint of the layer that halves.

    Args:
        channels_in: Channels of the input.
        channels_out: Channels of the output.
        kernel: Height and width of the kernel, odd.
        stride: 1, or 2 to halve (transposed: double) the size; the kernel is then 3.
        transposed: Whether to double instead of halve.
        weight_norm: Whose norm to divide by; without one the weights are V.
        has_bias: Whether a bias is added, after the normalisation.
        mean_form: Which mean is subtracted.
        slope: Slope of the leaky ReLU, 0 for ReLU, none for a linear layer.
        generator: Source of the initial directions; none takes torch's own.

    Raises:
        ValueError: If kernel, stride, `transposed` and `weight_norm` do not go together.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int = 3,
        stride: int = 1,
        *,
        transposed: bool = False,
        weight_norm: WeightNorm = "output",
        has_bias: bool = True,
        mean_form: MeanForm = "image",
        slope: float | None = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if kernel % 2 == 0 or ((stride, kernel) != (2, 3) and (stride != 1 or transposed)):
            raise ValueError(
                f"no layer has kernel {kernel}, stride {stride}, transposed {transposed}: take an odd kernel with "
                "stride 1, or kernel 3 with stride 2, which alone can be transposed."
            )
        if weight_norm == "input" and not transposed:
            raise ValueError("weight_norm 'input' exists for transposed layers only; take 'output' or 'none'.")
        self.stride, self.transposed, self.weight_norm, self.slope = stride, transposed, weight_norm, slope
        channels = (channels_in, channels_out) if transposed else (channels_out, channels_in)
        self.direction = nn.Parameter(torch.empty(*channels, kernel, kernel))
        nn.init.normal_(self.direction, std=INITIAL_STDDEV, generator=generator)
        self.gain = nn.Parameter(torch.ones(channels_out)) if weight_norm != "none" else None
        self.bias = nn.Parameter(torch.zeros(channels_out)) if has_bias else None
        self.norm = None if mean_form == "none" else MeanOnlyNorm(channels_out, mean_form)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: Shape (batch, channels_in, height, width); sides are even where the size is halved.

        Returns:
            Shape (batch, channels_out, height, width) / stride, or × stride if transposed.
        """
        y = self.respond(x, self.gain)
        if self.norm is not None:
            y = self.norm(y, self.bias)
        elif self.bias is not None:
            y = y + self.bias[:, None, None].to(y.dtype)
        if self.slope is None:
            return y
        return F.leaky_relu_(y, self.slope) if self.slope else F.relu_(y)

    def respond(self, x: Tensor, gain: Tensor | None) -> Tensor:
        """Convolve with filters of length `gain`, and nothing more.

        Args:
            x: Shape (batch, channels_in, height, width).
            gain: Length of each output channel's filter, shape (channels_out,); none takes V as it is.

        Returns:
            What the layer has before it subtracts means, adds biases and activates.
        """
        v = self.direction
        if gain is None:
            return self._convolve(x, v)
        if self.weight_norm == "input":
            norm = torch.linalg.vector_norm(v, dim=(1, 2, 3), keepdim=True)
            return self._convolve(x, v * (gain[:, None, None] / norm))
        length = gain / torch.linalg.vector_norm(v, dim=(0, 2, 3) if self.transposed else (1, 2, 3))
        # Whichever is smaller is scaled: most weights belong to layers of few pixels, and need not be written again.
        pixels = x.shape[0] * x.shape[2] * x.shape[3]
        pixels = 4 * pixels if self.transposed else pixels // self.stride**2
        if v.numel() > pixels * gain.numel():
            return self._convolve(x, v) * length[:, None, None]
        return self._convolve(x, v * (length[:, None, None] if self.transposed else length[:, None, None, None]))

    def _convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """Convolve with TensorFlow's `SAME` padding."""
        if self.transposed:
            return F.conv_transpose2d(x, weight, stride=2)[..., :-1, :-1]
        if self.stride == 2:
            return F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, stride=2)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2)


def freeze(network: nn.Module, is_frozen: bool = True) -> None:
    """Stop, or go on, tracking the running means of all layers below, for the second half of training.

    Layers of form `frozen` then subtract their running mean. Whether a network is frozen is no part of its
    `state_dict`: it follows from the iteration. A compiled network is compiled anew, once.

    Args:
        network: Any module.
        is_frozen: False to thaw.
    """
    for module in network.modules():
        if isinstance(module, MeanOnlyNorm):
            module.is_frozen = is_frozen


@torch.no_grad()
def initialise_by_data(network: nn.Module, inputs: Tensor, *, centre: bool = False) -> None:
    """Choose gains so that every layer's response to the inputs has unit variance: Salimans and Kingma's first pass.

    Layer after layer, with what the layers before it give once they are initialised: g = 1 / σ, where σ is the standard
    deviation of a channel's response to filters of unit length; 1 where there is no spread. Running means start at that
    response's mean, so that freezing after few iterations does not freeze a start at zero.

    Args:
        network: Module that holds the layers and takes `inputs`.
        inputs: Its first real example.
        centre: Also start the biases at -mean / σ, in layers that subtract no mean; else they start at 0.

    References:
        Salimans & Kingma 2016, "Weight Normalization", section 3.
    """

    def initialise(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, NormalisedConvolution)
        if layer.gain is None:
            return
        response = layer.respond(args[0], torch.ones_like(layer.gain))
        std, mean = torch.std_mean(response, (0, 2, 3), correction=0)
        gain = torch.where(std > 0, 1 / std, 1.0)
        layer.gain.copy_(gain)
        if layer.norm is not None and layer.norm.mean is not None:
            layer.norm.mean.copy_(mean * gain)
        if layer.bias is not None:
            layer.bias.copy_(-mean * gain if centre and layer.norm is None else torch.zeros_like(gain))

    layers = [module for module in network.modules() if isinstance(module, NormalisedConvolution)]
    hooks = [layer.register_forward_pre_hook(initialise) for layer in layers]
    was_training = network.training
    try:
        network.eval()(inputs)  # a layer's running mean is the picture's mean now; tracking would only count it twice
    finally:
        network.train(was_training)
        for hook in hooks:
            hook.remove()
