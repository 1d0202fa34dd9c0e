"""Plan the study of batch sizes: does ALRC help less, the more examples an update averages?

The paper's Table 1 has four batch sizes and the authors' rule. This study asks it of `ALRC()` for every power of two,
for the same number of updates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from alrc_lab import experiments
from alrc_lab.data import load_cifar10
from alrc_lab.experiments import supersampling_study as study
from alrc_lab.experiments.cifar10_supersampling import Config
from alrc_lab.experiments.plan import Plan

PRESETS = experiments.PRESETS["batch-size"]
"""Presets and what each costs."""

NUM_STDDEV = 3.0
"""Threshold of `ALRC()`: its default."""


@dataclass(frozen=True)
class _Preset:
    """Hold what a preset changes."""

    batch_sizes: tuple[int, ...]
    seeds: int
    config: Config


_PRESETS = {
    "smoke": _Preset((1, 4), 2, Config(width=4, iterations=200, final_window=50)),
    "quick": _Preset((1, 2, 4, 8, 16), 5, Config(width=8, iterations=6_000, final_window=1_200, precision="bfloat16")),
    "full": _Preset((1, 2, 4, 8, 16, 32, 64), 10, Config(precision="bfloat16")),
}

METRICS = [
    {"key": "final_error", "label": "error × 100", "factor": 100, "better": "lower"},
    {"key": "worst_stretch", "label": "highest mean error of a stretch × 100", "factor": 100, "better": "lower"},
    {"key": "fraction_limited", "label": "share of losses limited, %", "factor": 100, "better": None},
]
"""A stretch is a two-hundredth of a run, the first tenth left out."""


def plan(preset: str, *, data: str | None = None, seeds: int | None = None) -> Plan:
    """List the runs of the study, those of small batches first.

    Args:
        preset: One of `PRESETS`.
        data: Folder of CIFAR-10's binary batches; none searches.
        seeds: Seeds in each cell, from 0; none takes the preset's.

    Returns:
        The plan; nothing has been started.

    Raises:
        ValueError: If there is no such preset, or `seeds` < 1.
    """
    chosen: _Preset = study.choose("batch-size", _PRESETS, preset, seeds)
    seeds = seeds or chosen.seeds
    description = load_cifar10(data).describe()
    cells: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    for batch_size in chosen.batch_sizes:
        for num_stddev in (None, NUM_STDDEV):
            names = {"panel": "quartic", "column": f"batch {batch_size}", "published": None}
            plain = f"b{batch_size}-none"
            cell = plain if num_stddev is None else f"b{batch_size}-auto"
            row = "∞" if num_stddev is None else "n = 3, ALRC()"
            cells.append({"id": cell, "row": row, "baseline": None if cell == plain else plain} | names)
            config = replace(chosen.config, batch_size=batch_size, num_stddev=num_stddev, variant="auto", data=data)
            runs += [study.run_of(replace(config, seed=seed), cell, description) for seed in range(seeds)]
    content = {
        "schema": 1,
        "study": "batch-size",
        "preset": preset,
        "title": "ALRC by batch size",
        "question": "Does limiting the loss of each example lower the quartic error less, the larger the batch is?",
        "data": description,
        "metric": METRICS[0],
        "metrics": METRICS[1:],
        "curve": {
            "column": "error",
            "factor": 100,
            "label": "unlimited error × 100",
            "boxcar": max(1, chosen.config.iterations // 40),
        },
        "stream": {"loss": "loss_max", "limit": "limit"},
        "panels": [{"id": "quartic", "title": "Quartic error"}],
        "cells": cells,
        "differences": [
            *study.differences(chosen.config, description),
            f"{seeds} seeds in each cell, the default rule of this library, and other batch sizes than the paper's.",
            "The learning rate is constant and the same for every batch size.",
        ],
        "notes": [
            "Every run has as many updates as the others, as in the paper's Table 1: larger batches see more images.",
            "A stretch is a two-hundredth of a run; the first tenth of the run is left out.",
        ],
    }
    return Plan(content, runs, f"results/batch-size-{preset}-{description['slug']}", study.measure)
