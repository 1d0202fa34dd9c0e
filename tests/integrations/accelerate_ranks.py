"""Train a tiny language model through accelerate in one or two processes and write down what each has learned.

Started by `test_accelerate.py` as `accelerate_ranks.py FOLDER PROCESSES`. Batches of 8 texts are split over the
processes; the last one has 6, so that the second of two processes gets 2 of them. Two batches make an update.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from alrc.torch import ALRC

# Whoever collects tests looks into this file, too.
pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("accelerate", reason="needs accelerate")

import transformers
from accelerate import Accelerator, DataLoaderConfiguration, PartialState, debug_launcher

from alrc.integrations.transformers import LimitTokens

ACCUMULATED = 2
TEXTS = 46
SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def texts() -> list[bytes]:
    """Cut the topics of Python's own help into pieces of different lengths; two are garbled."""
    corpus = "".join(topics.values()).encode("ascii", "replace")
    pieces = [corpus[100 * i : 100 * i + 5 + i * 7 % 12] for i in range(TEXTS)]
    return [bytes(range(127, 115, -1)) if i in (19, 44) else piece for i, piece in enumerate(pieces)]


def padded(pieces: list[bytes]) -> Tensor:
    width = max(map(len, pieces))
    return torch.tensor([[*piece, *[-100] * (width - len(piece))] for piece in pieces])


def make_model(seed: int) -> Any:
    torch.manual_seed(seed)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=128, initializer_range=0.2, **SHAPE, **ids)
    )


def run(limit: ALRC, seed: int, epochs: range, save: Path | None = None, load: Path | None = None) -> dict[str, Any]:
    """Train, and return the limiter's states after each update, the last weights, and how much was limited."""
    accelerator = Accelerator(
        cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=True, even_batches=False)
    )
    model = make_model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    limit.attach(optimizer)
    model, optimizer, loader = accelerator.prepare(
        model, optimizer, DataLoader(texts(), batch_size=8, collate_fn=padded)
    )
    accelerator.register_for_checkpointing(limit)
    if load is not None:
        accelerator.load_state(str(load))
    states, shares = [], []
    for epoch in epochs:
        batches = iter(loader)
        while micro_batches := list(itertools.islice(batches, ACCUMULATED)):
            number = torch.stack([(ids[:, 1:] >= 0).sum() for ids in micro_batches]).sum()
            number = accelerator.reduce(number, "sum")
            for i, ids in enumerate(micro_batches):
                is_last = i + 1 == len(micro_batches)
                with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
                    labels, mask = ids[:, 1:].clamp(min=0), ids[:, 1:] >= 0
                    logits = model(input_ids=ids.clamp(min=0)[:, :-1]).logits
                    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
                    loss = limit(losses, mask=mask).sum() / number
                    accelerator.backward(accelerator.num_processes * loss)
                assert limit.last is not None
                shares.append(limit.last.fraction_limited)
            optimizer.step()
            optimizer.zero_grad()
            states.append({name: tensor.clone() for name, tensor in limit.state_dict().items()})
        if save is not None and epoch == 1:
            accelerator.save_state(str(save))
            accelerator.wait_for_everyone()
    weights = {name: tensor.clone() for name, tensor in accelerator.unwrap_model(model).state_dict().items()}
    return {"states": states, "weights": weights, "shares": shares}


def run_trainer(folder: Path, limit: ALRC, processes: int) -> dict[str, Any]:
    """Do the same with a Trainer, to which every process brings its part of 8 texts."""
    limit_tokens = LimitTokens(limit)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / f"trainer-{processes}"),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        max_steps=8,
        learning_rate=0.003,
        per_device_train_batch_size=8 // processes,
        gradient_accumulation_steps=ACCUMULATED,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_steps=1,
    )
    trainer = transformers.Trainer(
        make_model(1),
        arguments,
        train_dataset=texts()[:40],
        data_collator=lambda pieces: {"labels": (ids := padded(pieces)), "input_ids": ids.clamp(min=0)},
        compute_loss_func=limit_tokens,
        callbacks=[limit_tokens],
    )
    trainer.train()
    shares = [log["alrc/fraction_limited"] for log in trainer.state.log_history if "loss" in log]
    return {"states": [limit.state_dict()], "weights": trainer.model.state_dict(), "shares": shares}


def tell(folder: Path, processes: int) -> None:
    """Run all cases in this process and write down the outcome."""
    torch.set_num_threads(1)
    rule, place = {"observe": 4, "num_stddev": 1.0}, folder / f"state-{processes}"
    told = {
        "whole": run(ALRC(**rule, sync=True), 1, range(4), save=place),
        "resumed": run(ALRC(**rule, sync=True), 2, range(2, 4), load=place),
        "not synchronised": run(ALRC(**rule), 1, range(4)),
        "trainer": run_trainer(folder, ALRC(**rule, sync=True), processes),
        "trainer not synchronised": run_trainer(folder, ALRC(**rule), processes),
    }
    state = PartialState()
    assert state.num_processes == processes
    torch.save(told, folder / f"told-{processes}-{state.process_index}.pt")
    state.destroy_process_group()


if __name__ == "__main__":
    where, size = Path(sys.argv[1]), int(sys.argv[2])
    if size == 1:  # without a process group, which is the oracle
        tell(where, 1)
    else:
        debug_launcher(tell, (where, size), num_processes=size)
