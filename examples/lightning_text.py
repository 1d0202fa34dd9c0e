"""Limit losses under Lightning: one callback for the loss of a batch, one line for each loss of a batch.

A small network predicts the next character of Python's own help texts. The targets of four batches are random, as if a
file had been damaged. Needs `pip install "alrc[lightning]"`; runs in a few seconds on a CPU. With its one seed it shows
how to do it, and proves nothing.
"""

from __future__ import annotations

import logging
import warnings
from pydoc_data.topics import topics

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from alrc.integrations.lightning import LimitLoss
from alrc.torch import ALRC

CONTEXT, BATCH, STEPS = 8, 64, 240
DAMAGED = (100, 140, 180, 220)
"""The batches whose targets are random."""


class Text(L.LightningModule):
    """Predict the next character from the last few; an ordinary LightningModule that knows nothing of ALRC."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Embedding(characters, 16),
            nn.Flatten(),
            nn.Linear(16 * CONTEXT, 128),
            nn.ReLU(),
            nn.Linear(128, characters),
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss of a batch."""
        x, y = batch
        return F.cross_entropy(self.network(x), y)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the loss, which nothing limits."""
        x, y = batch
        self.log("loss", F.cross_entropy(self.network(x), y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Use Adam."""
        return torch.optim.Adam(self.parameters(), lr=0.01)


class TextEach(Text):
    """Limit the loss of each character: the module has an ALRC, and one line of `training_step` is another."""

    def __init__(self, characters: int) -> None:
        super().__init__(characters)
        self.limit = ALRC()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the mean of the limited losses."""
        x, y = batch
        return self.limit(F.cross_entropy(self.network(x), y, reduction="none")).mean()


class Watch(L.Callback):
    """Note what LimitLoss logs; stands after it in the list of callbacks."""

    def __init__(self) -> None:
        self.shares: dict[int, float] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs, batch, batch_idx) -> None:
        """Keep the share of limited losses; print it where it is large."""
        logged = trainer.callback_metrics
        share = float(logged.get("alrc/fraction_limited", 0.0))
        if share > 0.2:
            print(
                f"  batch {batch_idx}: {share:4.0%} of the losses were limited; the limit is {logged['alrc/limit']:.2f}"
            )
        self.shares[batch_idx] = share


def read() -> tuple[TensorDataset, TensorDataset, int]:
    """Return damaged batches to train on, text to validate on, and the number of characters."""
    text = "".join(topics[name] for name in sorted(topics))
    characters = sorted(set(text))
    codes = torch.tensor([characters.index(character) for character in text[: 2 * STEPS * BATCH]])
    order = torch.randperm(len(codes) - CONTEXT)
    x, y = codes.unfold(0, CONTEXT, 1)[order], codes[order + CONTEXT]
    number = STEPS * BATCH
    for batch in DAMAGED:
        y[batch * BATCH : (batch + 1) * BATCH] = torch.randint(len(characters), (BATCH,))
    return TensorDataset(x[:number], y[:number]), TensorDataset(x[number:], y[number:]), len(characters)


def train(kind: type[Text], *callbacks: L.Callback) -> float:
    """Train a new network and return its loss on text it has not seen."""
    torch.manual_seed(0)
    data, unseen, characters = read()
    trainer = L.Trainer(
        callbacks=list(callbacks), max_epochs=1, accelerator="cpu", log_every_n_steps=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(kind(characters), DataLoader(data, BATCH), DataLoader(unseen, 1024))
    return float(trainer.callback_metrics["loss"])


def main() -> None:
    """Train without ALRC, with the callback, and with the callback and one line."""
    torch.set_num_threads(1)  # too small a network to share
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    plain = train(Text)
    seen = {}
    for title, kind in (("the loss of a batch", Text), ("each loss of a batch", TextEach)):
        print(f"\nLimiting {title}; the targets of batches {DAMAGED} are random:")
        watch = Watch()
        seen[title] = train(kind, LimitLoss(log_every_n_steps=1), watch), watch.shares
    print("\nLoss on unseen text:")
    print(f"  without limiting: {plain:.3f}")
    for title, (loss, shares) in seen.items():
        damaged = sum(shares.pop(batch) for batch in DAMAGED) / len(DAMAGED)
        others = sum(shares.values()) / len(shares)
        print(f"  limiting {title}: {loss:.3f}; limited {damaged:.0%} in damaged batches, {others:.1%} in others")


if __name__ == "__main__":
    main()
