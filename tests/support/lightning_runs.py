"""LightningModules of one weight, a Trainer that says nothing, and the same training by hand.

A module of its own because two files of tests share it. Skips them where lightning is not installed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from alrc.reference import Trace, alrc_trace
from alrc.torch import ALRC
from attached_runs import START

pytest.importorskip("lightning.pytorch", reason="the Lightning integration needs lightning")

from lightning.pytorch import LightningModule, Trainer

# What Lightning says of settings that are meant here, and what torch says of Lightning's code.
QUIET = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "The '(train|val|test)_dataloader' does not have many workers",
        "`training_step` returned `None`",
        ".isinstance.treespec, LeafSpec.. is deprecated:FutureWarning",
        "You are using the .dataloader_iter. step flavor",
        "Found .dataloader_iter. argument in the .training_step.",
    )
]
RATE = 0.004
SETTINGS = {"start": START, "betas": (0.9, 0.9)}


class Scalar(LightningModule):
    """Return one loss a batch, in proportion to a weight that starts at 1; knows nothing of limiting."""

    def __init__(self, rate: float = RATE) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.rate = rate

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return (self.weight * batch[0]).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.rate)


class Each(Scalar):
    """Limit each loss of a batch, in one line."""

    def __init__(self, limit: ALRC, rate: float = RATE) -> None:
        super().__init__(rate)
        self.limit = limit

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return self.limit(self.weight * batch[0]).mean()


def fit(
    module: Any, callbacks: Any, inputs: Tensor, batch_size: int = 1, ckpt_path: Any = None, **settings: Any
) -> Trainer:
    """Train a module with callbacks on inputs, `batch_size` a batch, and return the trainer; writes no file."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    quiet |= {"enable_checkpointing": False, "max_epochs": 1, "log_every_n_steps": 1}
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    trainer = Trainer(callbacks=callbacks, **(quiet | settings))
    trainer.fit(module, DataLoader(TensorDataset(inputs), batch_size=batch_size), ckpt_path=ckpt_path)
    return trainer


def by_hand(windows: Any, rate: float = RATE, **settings: Any) -> tuple[float, Trace]:
    """Train the weight on windows of inputs, each an update, by the slow reference; return it and the trace."""
    weight, stream = 1.0, []
    trace = alrc_trace([], **settings)
    for inputs in np.asarray(windows, dtype=np.float64):
        stream.append(weight * inputs)
        trace = alrc_trace(stream, **settings)
        weight -= rate * float(np.mean(trace.scale[-1] * inputs))
    return weight, trace


def check(module: Scalar, limit: ALRC, wanted: tuple[float, Trace], rtol: float = 1e-5) -> None:
    """Compare a weight and moments with those of the loop by hand."""
    weight, trace = wanted
    assert sum(int((scale < 1).sum()) for scale in trace.scale) > 0, "the stream limits nothing"
    assert int(limit.count) > 0, "nothing was learned"
    np.testing.assert_allclose(module.weight.item(), weight, rtol=rtol)
    np.testing.assert_allclose([float(limit.mu1), float(limit.mu2)], [trace.mu1[-1], trace.mu2[-1]], rtol=rtol)
