"""What the studies of the supersampling experiment share: their runs, what they cost, how they differ from the paper.

A study only plans: it lists configurations and says how they belong together. Whoever runs them and whoever reports
them need not import it.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from alrc_lab.experiments import cifar10_supersampling as supersampling
from alrc_lab.experiments import supersampling_replicas
from alrc_lab.experiments.cifar10_supersampling import Config, Trainer
from alrc_lab.experiments.plan import Cost, Pack
from alrc_lab.experiments.replicas_network import side_by_side


def check_seeds(seeds: int | None) -> None:
    """Refuse a number of seeds below one; none is the preset's.

    Raises:
        ValueError: If `seeds` < 1.
    """
    if seeds is not None and seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}.")


def choose(study: str, presets: Mapping[str, Any], preset: str, seeds: int | None) -> Any:
    """Return what a preset stands for.

    Args:
        study: Name of the study.
        presets: Its presets.
        preset: The name asked for.
        seeds: The number of seeds asked for, or none.

    Raises:
        ValueError: If there is no such preset, or `seeds` < 1.
    """
    if preset not in presets:
        raise ValueError(f"{study} has no preset {preset!r}; choose one of {', '.join(presets)}.")
    check_seeds(seeds)
    return presets[preset]


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


def measure(packs: Sequence[Pack]) -> list[Cost]:
    """Time a few updates of each shape of run and pack, as far as the shape decides what an update costs."""
    updates = dict[tuple[Config, bool], dict[int, int]]()
    sizes: Counter[tuple[Config, bool]] = Counter()
    for members in packs:
        for place, run in members.items():
            config = Config(**run["config"])
            shape = Config(num_stddev=3.0, iterations=1, **{name: getattr(config, name) for name in _SHAPE})
            kind = shape, len(members) > 1
            updates.setdefault(kind, {})[place] = config.iterations - run["step"]
            sizes[kind] = max(sizes[kind], len(members))
    costs = list[Cost]()
    for kind, left in updates.items():
        shape, size = kind[0], sizes[kind]
        step_s = measure_step_s(shape, size)
        what = f"width {shape.width}, batch {shape.batch_size}, {shape.precision}"
        what += f", {shape.optimizer}" * (len({other.optimizer for other, _ in updates}) > 1)
        each = "an update" if size == 1 else f"a run's update in packs of {size}"
        label = f"{what}: {1e3 * step_s:.1f} ms {each} × {sum(left.values()):,} updates"
        costs.append(Cost(label, {place: step_s * number for place, number in left.items()}))
    return costs


_SHAPE = ("width", "batch_size", "precision", "optimizer", "device")
"""Fields that decide what an update costs; thresholds, variants and errors differ by a few hundredths."""


def measure_step_s(config: Config, replicas: int = 1, budget_s: float = 1.0) -> float:
    """Time a run's update on this machine, in seconds, on random images, with its share of the data pipeline.

    On one thread it is CPU time, as if nothing else were running.

    Args:
        config: Settings of the run to be timed.
        replicas: Runs that train together; the time is divided by them.
        budget_s: Seconds to spend; two updates at least, one if it takes longer.
    """
    images = np.random.default_rng(0).integers(0, 256, (256, 3, 32, 32), np.uint8)
    trainers = [Trainer(replace(config, seed=seed), images) for seed in range(replicas)]
    stream = trainers[0].stream
    inputs, targets = stream.block(0)
    update, shape = trainers[0].update, (len(Trainer.columns),)
    if replicas > 1:
        update, shape = supersampling_replicas.Pack(trainers).update, (replicas, *shape)
        inputs, targets = (side_by_side([side[0]] * replicas)[None] for side in (inputs, targets))
    record = torch.zeros(shape, device=inputs.device)
    is_alone = torch.get_num_threads() == 1 and inputs.device.type == "cpu"
    clock = time.process_time if is_alone else time.perf_counter
    started = clock()
    stream.block(1)
    block_s = clock() - started
    spent = list[float]()
    begin = time.perf_counter()
    while len(spent) < 2 or time.perf_counter() - begin < budget_s:
        started, place = clock(), len(spent) % len(inputs)
        update(inputs[place], targets[place], record)
        record.cpu()
        spent.append(clock() - started)
        if spent[0] > budget_s:
            break
    later = spent[1:] or spent  # the first prepares what the others use
    return sum(later) / len(later) / replicas + block_s / stream.steps_per_block
