"""Check Huberisation in torch: its gradient is its derivative, to every order."""

from __future__ import annotations

import torch

from alrc.torch import Huber

NAN, INF = float("nan"), float("inf")


def test_huber_has_the_derivatives_of_its_formula() -> None:
    losses = torch.tensor([0.2, 0.99, 1.01, 4.0, 1e4, -2.0], dtype=torch.float64, requires_grad=True)
    huber = Huber(h=1.0)
    torch.testing.assert_close(huber(losses), torch.where(losses > 1, losses.clamp(min=0.1).sqrt(), losses))
    (gradient,) = torch.autograd.grad(huber(losses).sum(), losses)
    want = [0.5 / loss**0.5 if loss > 1 else 1 for loss in losses.tolist()]
    torch.testing.assert_close(gradient, torch.tensor(want, dtype=torch.float64))
    assert torch.autograd.gradcheck(huber, losses)
    assert torch.autograd.gradgradcheck(huber, losses)


def test_huber_passes_no_gradient_of_what_is_not_finite() -> None:
    losses = torch.tensor([NAN, INF, -INF, 4.0, 0.5], requires_grad=True)
    limited = Huber(h=1.0)(losses)
    limited.sum().backward()
    assert limited.tolist() == [0, 0, 0, 2, 0.5]
    assert losses.grad is not None
    assert losses.grad.tolist() == [0, 0, 0, 0.25, 1]
