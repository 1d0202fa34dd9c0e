"""Limit the loss of each token in two processes under accelerate: one `sync=True`, one `attach`, one line in the loop.

A small Llama learns the bytes of Python's own help texts; one process gets a damaged batch now and then. Both learn
from the tokens of both, so they hold the same limit, bit for bit; half way everything is stored, and loaded into new
objects. Needs `pip install "alrc[transformers]"`. Run it with python alone, which makes two processes on the CPU and
takes half a minute, or let `accelerate launch` or `torchrun` start the processes.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration, debug_launcher
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from alrc.torch import ALRC

LONGEST, BATCH, MICRO_BATCHES, EPOCHS = 48, 16, 2, 6
TEXTS = 25 * BATCH - 3
"""The last batch of an epoch is shorter: 8 texts for the first process, 5 for the second."""
DAMAGED = (9, 18)
"""The batches of an epoch, counted from 0, whose second half is random bytes."""


def read() -> list[bytes]:
    """Return the texts, in the order in which they are used."""
    pieces = [" ".join(piece.split()).encode() for name in sorted(topics) for piece in topics[name].split("\n\n")]
    texts = [piece[:LONGEST] for piece in pieces if len(piece) > 8][:TEXTS]
    generator = torch.Generator().manual_seed(0)
    for batch in DAMAGED:
        for i in range(BATCH // 2):
            noise = torch.randint(256, (LONGEST,), generator=generator).tolist()
            texts[batch * BATCH + BATCH // 2 + i] = bytes(noise)
    return texts


def collate(texts: list[bytes]) -> Tensor:
    """Make a batch of bytes, filled up with -1."""
    rows = torch.full((len(texts), max(map(len, texts))), -1)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = torch.tensor(list(text))
    return rows


def prepare(seed: int) -> tuple[Accelerator, Any, Any, Any, ALRC]:
    """Make everything that a training needs."""
    # Without even_batches the last batch is split as it is, and no text is seen twice.
    config = DataLoaderConfiguration(split_batches=True, even_batches=False)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), dataloader_config=config)
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    # Before accelerate wraps the optimiser: what it wraps steps only when all micro-batches have been seen.
    limit = ALRC(sync=True).to(accelerator.device).attach(optimizer)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(read(), BATCH, collate_fn=collate))
    accelerator.register_for_checkpointing(limit)
    return accelerator, model, optimizer, loader, limit


def token_losses(model: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of every byte but the first, and a mask that is false where there is none."""
    logits = model(input_ids=rows[:, :-1].clamp(min=0)).logits
    losses = F.cross_entropy(logits.transpose(1, 2), rows[:, 1:].clamp(min=0), reduction="none")
    return losses, rows[:, 1:] >= 0


def train(parts: tuple[Accelerator, Any, Any, Any, ALRC], epochs: range) -> Iterator[tuple[int, Tensor]]:
    """Train, and yield the share of tokens that was limited in each micro-batch of each epoch."""
    accelerator, model, optimizer, loader, limit = parts
    for epoch in epochs:
        shares: list[Tensor] = []
        batches = iter(loader)
        while micro_batches := list(islice(batches, MICRO_BATCHES)):
            # The tokens of all micro-batches of all processes: each counts the same, wherever it is.
            number = torch.stack([(rows[:, 1:] >= 0).sum() for rows in micro_batches]).sum()
            number = accelerator.reduce(number, "sum")
            for i, rows in enumerate(micro_batches):
                is_last = i + 1 == len(micro_batches)
                with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
                    losses, mask = token_losses(model, rows)
                    loss = limit(losses, mask=mask).sum() / number
                    accelerator.backward(loss * accelerator.num_processes)  # gradients are averaged over processes
                assert limit.last is not None
                shares.append(limit.last.fraction_limited)
            optimizer.step()
            optimizer.zero_grad()
        yield epoch, torch.stack(shares)


def run(folder: str) -> None:
    """Train, and store everything half way; then load it into new objects and train the second half again."""
    parts = prepare(seed=0)
    accelerator, *_, limit = parts
    for epoch, shares in train(parts, range(EPOCHS)):
        seen = accelerator.gather(shares.unsqueeze(0))
        limits = accelerator.gather(limit.limit.unsqueeze(0))
        if accelerator.is_main_process:
            print(f"epoch {epoch}: limits {', '.join(f'{one:.6f}' for one in limits)}; of the tokens, limited ", end="")
            print(f"{seen[0].mean():.1%} in the first process, {seen[-1, list(DAMAGED)].mean():.1%} in damaged batches")
        if epoch + 1 == EPOCHS // 2:
            accelerator.save_state(folder)
            accelerator.wait_for_everyone()
    resumed = prepare(seed=1)
    resumed[0].load_state(folder)
    for _ in train(resumed, range(EPOCHS // 2, EPOCHS)):
        pass
    state, other = limit.state_dict(), resumed[-1].state_dict()
    is_same = all(torch.equal(state[name], other[name]) for name in state)
    if accelerator.is_main_process:
        print(f"{int(limit.count)} updates in each of {accelerator.num_processes} processes; limits equal: ", end="")
        print(f"{bool((limits == limits[0]).all())}; resumed half way, same moments bit for bit: {is_same}")
    accelerator.end_training()


def main() -> None:
    """Start two processes on the CPU, unless whoever started this one has done so."""
    if "WORLD_SIZE" in os.environ:
        run(str(Path(tempfile.gettempdir(), "alrc_accelerate_state")))
        return
    with tempfile.TemporaryDirectory() as folder:
        debug_launcher(run, (folder,), num_processes=2)


if __name__ == "__main__":
    main()
