"""Plan the study of unstable learning rates: Adam and SGD, a stable and an unstable rate each, with and without ALRC.

The authors' README shows one run of each as a figure (Ede & Beanland 2020, squared errors at batch size 1): at unstable
rates the error leaps up now and then, and less so with ALRC at n = 2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from alrc_lab import experiments
from alrc_lab.data import load_cifar10
from alrc_lab.experiments import supersampling_study as study
from alrc_lab.experiments.cifar10_supersampling import Config
from alrc_lab.experiments.plan import Plan

PRESETS = experiments.PRESETS["unstable-lr"]
"""Presets and what each costs."""

RATES: dict[Literal["adam", "sgd"], tuple[float, float]] = {"adam": (1e-4, 2e-3), "sgd": (1e-4, 3e-3)}
"""The stable and the unstable learning rate of each optimiser."""

LIMITS: dict[str, tuple[float | None, Literal["scripts", "auto"]]] = {
    "∞": (None, "scripts"),
    "n = 2, scripts": (2.0, "scripts"),
    "n = 2, ALRC()": (2.0, "auto"),
}
"""Label of each limit: none, that of the authors' scripts, which made the figure, and this library's default rule."""

METRICS = [
    {"key": "final_error", "label": "error × 100", "factor": 100, "better": "lower"},
    {"key": "worst_stretch", "label": "highest mean error of a stretch × 100", "factor": 100, "better": "lower"},
    {"key": "num_spikes", "label": "spikes", "factor": 1, "better": "lower"},
    {"key": "fraction_limited", "label": "share of losses limited, %", "factor": 100, "better": None},
]
"""A stretch is a two-hundredth of a run, the first tenth left out; a spike is one or more in a row above 1.5 times
their median."""


class Arm(NamedTuple):
    """Name what distinguishes one cell."""

    optimizer: Literal["adam", "sgd"]
    """What takes the steps."""
    learning_rate: float
    """Its rate."""
    limit: str
    """A key of `LIMITS`."""

    @property
    def id(self) -> str:
        """Identifier of the cell."""
        return f"{self.optimizer}-{self.learning_rate:g}-{('none', 'n2', 'auto')[list(LIMITS).index(self.limit)]}"

    @property
    def column(self) -> str:
        """What its column is called."""
        return "unstable rate" if self.learning_rate == RATES[self.optimizer][1] else "stable rate"

    @property
    def baseline(self) -> str | None:
        """Identifier of the cell that this one is compared with: the same without a limit."""
        return None if self.limit == "∞" else self._replace(limit="∞").id


@dataclass(frozen=True)
class _Preset:
    """Hold what a preset changes."""

    seeds: int
    config: Config


_PRESETS = {
    "smoke": _Preset(2, Config(width=4, iterations=400, final_window=100)),
    "quick": _Preset(5, Config(width=16, iterations=20_000, final_window=2_000, precision="bfloat16")),
    "paper": _Preset(5, Config()),
}


def plan(preset: str, *, data: str | None = None, seeds: int | None = None) -> Plan:
    """List the runs of the study.

    Args:
        preset: One of `PRESETS`.
        data: Folder of CIFAR-10's binary batches; none searches.
        seeds: Seeds in each cell, from 0; none takes the preset's.

    Returns:
        The plan; nothing has been started.

    Raises:
        ValueError: If there is no such preset, or `seeds` < 1.
    """
    chosen: _Preset = study.choose("unstable-lr", _PRESETS, preset, seeds)
    seeds = seeds or chosen.seeds
    description = load_cifar10(data).describe()
    arms = [Arm(optimizer, rate, limit) for optimizer, rates in RATES.items() for rate in rates for limit in LIMITS]
    cells: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    for arm in arms:
        names = {"id": arm.id, "panel": arm.optimizer, "row": arm.limit, "column": arm.column}
        cells.append(names | {"baseline": arm.baseline, "published": None})
        num_stddev, variant = LIMITS[arm.limit]
        how = {"optimizer": arm.optimizer, "learning_rate": arm.learning_rate}
        config = replace(chosen.config, error="squared", num_stddev=num_stddev, variant=variant, data=data, **how)
        runs += [study.run_of(replace(config, seed=seed), arm.id, description) for seed in range(seeds)]
    titles = {"adam": "Adam", "sgd": "SGD"}
    content = {
        "schema": 1,
        "study": "unstable-lr",
        "preset": preset,
        "title": "Unstable learning rates with and without ALRC",
        "question": (
            "At learning rates so high that the squared error leaps up now and then: does ALRC make the leaps fewer "
            "and lower, and what does it do where training is stable?"
        ),
        "data": description,
        "metric": METRICS[0],
        "metrics": METRICS[1:],
        "curve": {
            "column": "error",
            "factor": 100,
            "label": "unlimited error × 100",
            "boxcar": max(1, chosen.config.iterations // 200),
        },
        "stream": {"loss": "loss_max", "limit": "limit"},
        "side_by_side": {
            "seed": 0,
            "column": "error",
            "factor": 25,
            "label": "25 × unlimited error",
            "boxcar": max(1, chosen.config.iterations // 200),
        },
        "panels": [
            {"id": optimizer, "title": f"{titles[optimizer]} at {low:g} and {high:g}"}
            for optimizer, (low, high) in RATES.items()
        ],
        "cells": cells,
        "differences": [
            *study.differences(chosen.config, description),
            f"{seeds} seeds of each cell; the authors' figure shows one run of each.",
        ],
        "notes": [
            "A stretch is a two-hundredth of a run; the first tenth of the run is left out. A spike is one or more "
            "stretches in a row whose mean error exceeds 1.5 times the median of all.",
            "The authors' figure was made by scripts whose moments settle at a third of the truth, and so is the row "
            "called scripts: it limits losses above 1.3 times their running mean, however little they vary.",
            "The authors called these rates stable and unstable for the network of width 64.",
        ],
    }
    return Plan(content, runs, f"results/unstable-lr-{preset}-{description['slug']}", study.measure)
