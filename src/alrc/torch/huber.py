"""What stands beside ALRC and has no state: Huberisation, and an estimate of a start for the published presets."""

from __future__ import annotations

from torch import Tensor, nn

from alrc import rules
from alrc.moments import estimate_start as estimate_start_of_array
from alrc.torch.ops import TRACED

__all__ = ["Huber", "estimate_start"]


class Huber(nn.Module):
    """Replace losses above `h` by √(h·L), the Huberisation the paper compares with (SPEC S13).

    Args:
        h: Loss above which the root sets in, > 0.

    Example:
        >>> import torch
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
        >>> import torch
        >>> from alrc.torch import ALRC
        >>> mu1, mu2 = estimate_start(torch.tensor([1.0, 3.0]))
        >>> ALRC.paper(mu1=mu1, mu2=mu2).limit
        tensor(15.)

    References:
        Ede & Beanland 2020, section II, and the README of their published code.
    """
    return estimate_start_of_array(losses.detach().double().cpu().numpy(), overestimate)
