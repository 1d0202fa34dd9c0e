"""Stack networks of one shape into one that computes all of them at once, each on its own channels.

A convolution of R networks is one convolution with R groups: the channels of replica r are the r-th share of the
channels, and no sum ever crosses from one share to another. docs/design/0011-replicas.md has the measurements.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def stack_networks(networks: Sequence[nn.Sequential]) -> nn.Sequential:
    """Stack networks whose layers with parameters are convolutions.

    Args:
        networks: R networks of one shape, from (batch, c, h, w) to (batch, d, h, w), in channels-last layout.

    Returns:
        One network from (batch, R · c, h, w) to (batch, R · d, h, w). Its parameters have the names of the single
        ones and R times their first axis; rows of replica r are copies of that network's.
    """
    stacked = copy.deepcopy(networks[0])
    members = [dict(network.named_modules()) for network in networks]
    for name, module in stacked.named_modules():
        if isinstance(module, nn.Conv2d):
            own: list[Any] = [member[name] for member in members]
            module.groups = len(networks)
            module.in_channels *= len(networks)
            module.out_channels *= len(networks)
            weight = torch.cat([one.weight.detach() for one in own])
            module.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last))
            module.bias = nn.Parameter(torch.cat([one.bias.detach() for one in own]))
    return stacked


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
