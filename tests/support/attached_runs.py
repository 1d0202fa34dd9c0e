"""Limiters, losses and a network of one weight, for the tests of limiters that follow an optimiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alrc.torch import ALRC

START = (1.0, 1.04)
"""Mean 1, standard deviation 0.2: the limit is 1.6."""

Make = Callable[[], ALRC]
MAKES: dict[str, Make] = {
    "default": ALRC,
    "spikes": lambda: ALRC(observe=4),
    "both sides": lambda: ALRC(observe=4, signed=True, num_stddev_below=2.0),
    "start": lambda: ALRC(start=START, betas=(0.9, 0.9)),
    "paper": lambda: ALRC.paper(2.0, (0.9, 0.9), *START),
    "reference": lambda: ALRC.reference(2.0, 0.9, *START),
}
makes = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
Attach = Callable[[ALRC, torch.optim.Optimizer], Any]


def attached(limit: ALRC, optimizer: torch.optim.Optimizer) -> None:
    limit.attach(optimizer)


def not_attached(limit: ALRC, optimizer: torch.optim.Optimizer) -> None:
    """Learn from every call."""


def spiky(steps: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Make positive losses around 1 of which about a tenth are far out."""
    losses = torch.randn(steps, *shape, dtype=torch.float64).mul(0.3).exp()
    return (losses * torch.where(torch.rand(steps, *shape) < 0.1, 20, 1)).to(dtype)


def close_states(one: ALRC, other: ALRC, rtol: float = 1e-6) -> None:
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=rtol, atol=rtol / 10)


class Weighted(nn.Module):
    """Give as many losses as it is told, all of them in proportion to one weight that is 1 and stays so."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=dtype))

    def forward(self, losses: Tensor) -> Tensor:
        return self.weight * losses


def run(limit: ALRC, attach: Attach = attached, lr: float = 0.0) -> tuple[Weighted, torch.optim.Optimizer]:
    """Make a network and an optimiser, and attach the limiter to it."""
    model = Weighted()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    attach(limit, optimizer)
    return model, optimizer
