"""Stack networks of one shape into one that computes all of them at once, each on its own channels.

A convolution of R networks is one convolution with R groups: the channels of replica r are the r-th share of the
channels, and no sum ever crosses from one share to another. `WAYS` are ways to compute that, with the same parameters;
docs/design/0011-replicas.md has the measurements.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

FEW = 8
"""Outputs of a layer that leave the vectors of a CPU half empty."""


def stack_networks(networks: Sequence[nn.Sequential], way: str = "grouped") -> nn.Sequential:
    """Stack networks whose layers with parameters are convolutions of stride 1 that keep the size of images.

    Args:
        networks: R networks of one shape, from (batch, c, h, w) to (batch, d, h, w), in channels-last layout.
        way: How to convolve, one of `WAYS`.

    Returns:
        One network from (batch, R · c, h, w) to (batch, R · d, h, w). Its parameters have the names of the single
        ones and R times their first axis; rows of replica r are copies of that network's.
    """
    stacked = copy.deepcopy(networks[0])
    members = [dict(network.named_modules()) for network in networks]
    for name, module in list(stacked.named_modules()):
        if isinstance(module, nn.Conv2d):
            parent, _, own_name = name.rpartition(".")
            setattr(stacked.get_submodule(parent), own_name, ReplicaConv2d([member[name] for member in members], way))
    return stacked


class ReplicaConv2d(nn.Module):
    """Convolve the images of R replicas, which lie side by side on the channels, each with its own weights.

    Args:
        own: The layer of each replica.
        way: How to convolve, one of `WAYS`.
    """

    def __init__(self, own: Sequence[Any], way: str) -> None:
        super().__init__()
        self.replicas, self.way = len(own), way
        weight = torch.cat([layer.weight.detach() for layer in own])
        self.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last))
        self.bias = nn.Parameter(torch.cat([layer.bias.detach() for layer in own]))

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, R · c, height, width) to (batch, R · d, height, width)."""
        return WAYS[self.way](x, self.weight, self.bias, self.replicas)


def rows_of(stacked: Tensor, replica: int, replicas: int) -> Tensor:
    """Return what belongs to one replica of a stacked tensor, as a view."""
    return stacked.unflatten(0, (replicas, -1))[replica]


def side_by_side(images: Sequence[Tensor]) -> Tensor:
    """Put the images of all replicas on channels of their own.

    Args:
        images: For each of R replicas, shape (batch, channels, height, width).

    Returns:
        Shape (batch, R · channels, height, width), channels last.
    """
    return torch.cat(list(images), 1).contiguous(memory_format=torch.channels_last)


# --- ways to convolve: images (batch, R · c, h, w), weights (R · d, c, k, k), biases (R · d,) ---


def _grouped(x: Tensor, weight: Tensor, bias: Tensor, replicas: int) -> Tensor:
    """Leave it to the convolution with groups.

    On a CPU a layer with fewer outputs than a vector has places is the transposed convolution that it equals: its
    passes are then those of a layer with few inputs, of which the one for the weights takes a third of the time.
    """
    padding, outputs = weight.shape[-1] // 2, len(weight) // replicas
    if x.device.type == "cpu" and outputs < FEW:
        turned = weight.unflatten(0, (replicas, outputs)).transpose(1, 2).flatten(0, 1).flip(2, 3)
        return F.conv_transpose2d(x, turned, bias, padding=padding, groups=replicas)
    return F.conv2d(x, weight, bias, padding=padding, groups=replicas)


def _each(x: Tensor, weight: Tensor, bias: Tensor, replicas: int) -> Tensor:
    """Convolve one replica after the other; in a graph that costs the host nothing."""
    parts = zip(x.chunk(replicas, 1), weight.chunk(replicas), bias.chunk(replicas), strict=True)
    return torch.cat([F.conv2d(part, w, b, padding=w.shape[-1] // 2) for part, w, b in parts], 1)


def _bmm(x: Tensor, weight: Tensor, bias: Tensor, replicas: int) -> Tensor:
    """Copy what each output sees into a row, and multiply the matrices of all replicas at once (im2col)."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):  # autocast knows convolutions, but no function of ours
        dtype = torch.get_autocast_dtype(kind)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    images = x.permute(0, 2, 3, 1).unflatten(-1, (replicas, -1))
    filters = weight.unflatten(0, (replicas, -1)).permute(0, 3, 4, 2, 1)
    convolved: Any = _Convolve.apply(images, filters)
    # A new tensor, no view: what follows works in place.
    return convolved.flatten(3).permute(0, 3, 1, 2) + bias[:, None, None]


WAYS = {"grouped": _grouped, "bmm": _bmm, "each": _each}
"""Ways to convolve, by name; a CPU always takes the first."""


class _Convolve(torch.autograd.Function):
    """Convolve (batch, h, w, R, c) by (R, k, k, c, d) to (batch, h, w, R, d).

    Its gradients are of the same kind, so that every sum is taken inside a product of matrices, in its precision.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, filters: Tensor) -> Tensor:
        ctx.save_for_backward(images, filters)
        return _product(images, filters)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        images, filters = ctx.saved_tensors
        of_images = None
        if ctx.needs_input_grad[0]:
            of_images = _product(gradient, filters.flip(1, 2).transpose(3, 4))
        outputs = gradient.flatten(0, 2).transpose(0, 1)
        of_filters = torch.bmm(_patches(images, filters.shape[1]).mT, outputs).view(filters.shape)
        return of_images, of_filters


def _product(images: Tensor, filters: Tensor) -> Tensor:
    """Multiply patches and filters."""
    replicas, size, outputs = filters.shape[0], filters.shape[1], filters.shape[-1]
    product = torch.bmm(_patches(images, size), filters.reshape(replicas, -1, outputs))
    return product.transpose(0, 1).reshape(*images.shape[:4], outputs)


def _patches(images: Tensor, size: int) -> Tensor:
    """Return what each output sees, shape (R, batch · h · w, size² · c): a view of one copy, replicas side by side."""
    half = size // 2
    padded = F.pad(images, (0, 0, 0, 0, half, half, half, half))
    seen = padded.unfold(1, size, 1).unfold(2, size, 1).permute(0, 1, 2, 3, 5, 6, 4)
    return seen.reshape(-1, images.shape[3], size * size * images.shape[4]).transpose(0, 1)
