"""Check that starting moments can be estimated from tensors of every dtype."""

from __future__ import annotations

import pytest
import torch

from alrc.torch import estimate_start


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_start_is_estimated_from_any_tensor(dtype: torch.dtype) -> None:
    losses = torch.tensor([[1.0, 3.0], [float("nan"), float("inf")]], dtype=dtype, requires_grad=True)
    assert estimate_start(losses) == (6.0, 45.0)
