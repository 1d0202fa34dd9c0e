"""What the studies of the supersampling experiment share: their runs, what they cost, how they differ from the paper.

A study only plans: it lists configurations and says how they belong together. Whoever runs them and whoever reports
them need not import it.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from alrc_lab.experiments import cifar10_supersampling as supersampling
from alrc_lab.experiments.cifar10_supersampling import Config, Trainer
from alrc_lab.experiments.plan import Cost


def check_seeds(seeds: int | None) -> None:
    """Refuse a number of seeds below one; none is the preset's.

    Raises:
        ValueError: If `seeds` < 1.
    """
    if seeds is not None and seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}.")


def run_of(config: Config, cell: str, description: dict[str, Any]) -> dict[str, Any]:
    """Describe a run as its folder will.

    Args:
        config: Settings of the run.
        cell: Identifier of the cell it belongs to.
        description: The data set's.
    """
    return {
        "entry": supersampling.ENTRY,
        "config": supersampling.resolve_config(config),
        "inputs": description,
        "excluded": supersampling.EXCLUDED,
        "name": supersampling.name_of(config),
        "cell": cell,
        "seed": config.seed,
    }


def threshold(num_stddev: float) -> str:
    """Write a threshold n as the tables do."""
    return "∞" if math.isinf(num_stddev) else f"{num_stddev:g}"


def differences(config: Config, description: dict[str, Any]) -> list[str]:
    """Say where data, network, length and precision are not the paper's.

    Args:
        config: Settings of one of the runs.
        description: The data set's.
    """
    found: list[str] = []
    if description["source"] == "embedded":
        found.append(f"Data: {description['images']:,} patches of photographs instead of CIFAR-10's 50,000 images.")
    elif description["images"] != 50_000:
        found.append(f"Data: {description['images']:,} images of CIFAR-10 instead of its 50,000.")
    if config.width != 64:
        found.append(f"Width {config.width} instead of 64: a network of fewer parameters, with higher errors.")
    if config.iterations != 100_000:
        window = config.final_window or max(1, config.iterations // 20)
        found.append(
            f"{config.iterations:,} iterations instead of 100,000; the error is the mean of the last {window:,} "
            "instead of 5,000."
        )
    if config.precision != "float32":
        found.append(f"Convolutions in {config.precision} instead of float32.")
    return found


def measure(runs: Sequence[dict[str, Any]]) -> list[Cost]:
    """Time a few updates of each shape of run."""
    shapes: Counter[Config] = Counter()
    for run in runs:
        config = Config(**run["config"])
        shape = replace(config, error="squared", num_stddev=3.0, seed=0, drop_at=None, learning_rate=1e-3)
        shapes[replace(shape, iterations=1, final_window=1)] += config.iterations
    costs = list[Cost]()
    for shape, updates in shapes.items():
        step_s = measure_step_s(shape)
        what = f"width {shape.width}, batch {shape.batch_size}, {shape.precision}"
        what += f", {shape.optimizer}" * (len({key.optimizer for key in shapes}) > 1)
        costs.append(Cost(f"{what}: {1e3 * step_s:.1f} ms an update × {updates:,} updates", step_s * updates))
    return costs


def measure_step_s(config: Config, budget_s: float = 1.0) -> float:
    """Time one update on this machine, in seconds, on random images, without the data pipeline.

    Args:
        config: Settings of the run to be timed.
        budget_s: Seconds to spend; two updates at least.
    """
    images = np.random.default_rng(0).integers(0, 256, (256, 3, 32, 32), np.uint8)
    trainer = Trainer(config, images)
    inputs, targets = trainer.stream.block(0)
    record = torch.zeros(len(Trainer.columns), device=inputs.device)
    trainer.update(inputs[0], targets[0], record)
    record.cpu()
    started, number = time.perf_counter(), 0
    while number < 1 or time.perf_counter() - started < budget_s:
        trainer.update(inputs[number % len(inputs)], targets[number % len(inputs)], record)
        record.cpu()
        number += 1
    return (time.perf_counter() - started) / number
