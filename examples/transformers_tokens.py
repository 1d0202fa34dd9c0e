"""Limit the loss of each token in a Hugging Face Trainer: one object, given twice.

A small GPT-2 learns the bytes of Python's own help texts. At four steps half of the texts are random bytes, as if
files had been damaged. Needs `pip install "alrc[transformers]"`; runs in half a minute on a CPU, without a download.
One seed: it shows how to do it, and proves nothing. So small a model, with Adam and the Trainer's clipping of gradient
norms, gets over four bad steps with limits and without.
"""

from __future__ import annotations

import os
import tempfile
from pydoc_data.topics import topics
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainingArguments
from transformers.utils import logging

from alrc.integrations.transformers import LimitTokens

LONGEST, BATCH, MICRO_BATCHES, STEPS = 48, 8, 2, 80
DAMAGED = (44, 54, 64, 74)
"""The steps, counted from 1, whose first micro-batch is random bytes."""


def read() -> tuple[list[bytes], list[bytes]]:
    """Return texts to train on, in the order in which they are used, and texts to evaluate on."""
    pieces = [
        " ".join(piece.split()).encode()[:LONGEST] for name in sorted(topics) for piece in topics[name].split("\n\n")
    ]
    pieces = [piece for piece in pieces if len(piece) > 8]
    number = STEPS * BATCH * MICRO_BATCHES
    train = [pieces[i * 389 % len(pieces)] for i in range(number)]
    generator = torch.Generator().manual_seed(0)
    for step in DAMAGED:
        for i in range(BATCH):
            noise = torch.randint(256, (LONGEST,), generator=generator).tolist()
            train[(step - 1) * BATCH * MICRO_BATCHES + i] = bytes(noise)
    return train, pieces[:: len(pieces) // 200]


def collate(texts: list[bytes]) -> dict[str, Tensor]:
    """Make a batch; what fills it up is no label (-100), so it is neither a loss nor learned from."""
    labels = torch.full((len(texts), max(map(len, texts))), -100)
    for row, text in zip(labels, texts, strict=True):
        row[: len(text)] = torch.tensor(list(text))
    return {"input_ids": labels.clamp(min=0), "attention_mask": (labels >= 0).long(), "labels": labels}


def train(folder: str, **limiting: Any) -> tuple[float, list[dict[str, float]]]:
    """Train a new model; return its loss on texts without damage, and the Trainer's logs."""
    torch.manual_seed(0)
    texts, unseen = read()
    config = GPT2Config(
        vocab_size=256, n_positions=LONGEST, n_embd=64, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    arguments = TrainingArguments(
        output_dir=folder, per_device_train_batch_size=BATCH, gradient_accumulation_steps=MICRO_BATCHES,
        max_steps=STEPS, learning_rate=3e-3, lr_scheduler_type="constant", train_sampling_strategy="sequential",
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(
        GPT2LMHeadModel(config), arguments, train_dataset=texts, eval_dataset=unseen, data_collator=collate, **limiting
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return trainer.evaluate()["eval_loss"], logs


def main() -> None:
    """Train without and with ALRC, and say what was limited."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        plain, _ = train(folder)
        limit_tokens = LimitTokens()
        limited, logs = train(folder, compute_loss_func=limit_tokens, callbacks=[limit_tokens])
    shares = {int(log["step"]): log["alrc/fraction_limited"] for log in logs}
    print(f"Half of the texts at steps {DAMAGED} are random bytes:")
    for log in logs:
        if log["step"] in DAMAGED:
            print(
                f"  step {log['step']}: {shares[log['step']]:.1%} of the tokens limited, limit {log['alrc/limit']:.2f}"
            )
    damaged = sum(shares.pop(step) for step in DAMAGED) / len(DAMAGED)
    others = sum(shares.values()) / len(shares)
    print(f"Loss of a token in texts without damage: {plain:.3f} without limiting, {limited:.3f} with")
    print(f"Tokens limited: {damaged:.1%} in damaged steps, {others:.1%} in others")


if __name__ == "__main__":
    main()
