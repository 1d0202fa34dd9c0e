"""Plan the paper's Table 1: error, batch size and threshold n, several seeds each, compared with n = ∞."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from alrc_lab import experiments
from alrc_lab.data import load_cifar10
from alrc_lab.experiments import supersampling_study as study
from alrc_lab.experiments.cifar10_supersampling import Config
from alrc_lab.experiments.plan import Plan

PRESETS = experiments.PRESETS["table1"]
"""Presets and what each costs."""

PUBLISHED: dict[tuple[str, int], dict[float, tuple[float, float]]] = {
    ("squared", 1): {2: (5.55, 0.048), 3: (5.52, 0.054), 4: (5.56, 0.048), math.inf: (5.55, 0.041)},
    ("squared", 4): {2: (4.96, 0.016), 3: (4.96, 0.029), 4: (4.97, 0.017), math.inf: (4.98, 0.017)},
    ("squared", 16): {2: (4.58, 0.010), 3: (4.58, 0.004), 4: (4.58, 0.007), math.inf: (4.59, 0.006)},
    ("squared", 64): {3: (3.90, 0.013), 4: (3.89, 0.016), math.inf: (3.89, 0.014)},
    ("quartic", 1): {2: (3.54, 0.084), 3: (3.59, 0.055), 4: (3.61, 0.054), math.inf: (3.88, 0.108)},
    ("quartic", 4): {2: (3.02, 0.023), 3: (3.08, 0.024), 4: (3.13, 0.023), math.inf: (3.32, 0.037)},
    ("quartic", 16): {2: (2.60, 0.012), 3: (2.61, 0.014), 4: (2.64, 0.016), math.inf: (2.74, 0.020)},
    ("quartic", 64): {2: (1.65, 0.011), 3: (1.58, 0.016), 4: (1.57, 0.016), math.inf: (1.61, 0.008)},
}
"""Table 1 of Ede & Beanland 2020: errors × 100, mean and standard deviation of ten runs, by error, batch size and n."""


class Arm(NamedTuple):
    """Name what distinguishes one cell of the table."""

    error: str
    """Error that is minimised, squared or quartic."""
    batch_size: int
    """Images per update."""
    num_stddev: float
    """Threshold n; infinite for none."""
    variant: Literal["reference", "auto"] = "reference"
    """Which ALRC: the authors' library, or `ALRC()`."""

    @property
    def id(self) -> str:
        """Identifier of the cell."""
        n = "inf" if math.isinf(self.num_stddev) else f"{self.num_stddev:g}"
        return f"{self.error}-b{self.batch_size}-n{n}{'-auto' * (self.variant == 'auto')}"

    @property
    def row(self) -> str:
        """Threshold as the table prints it."""
        n = study.threshold(self.num_stddev)
        return f"n = {n}, ALRC()" if self.variant == "auto" else n

    @property
    def baseline(self) -> str | None:
        """Identifier of the cell that this one is compared with: no ALRC, or for `ALRC()` the authors' library."""
        if self.variant == "auto":
            return self._replace(variant="reference").id
        return None if math.isinf(self.num_stddev) else self._replace(num_stddev=math.inf).id


QUICK_CELLS = [Arm("quartic", 1, n) for n in (math.inf, 3.0, 2.0)] + [Arm("squared", 1, n) for n in (math.inf, 3.0)]
VARIANT_CELLS = [
    arm
    for error in ("quartic", "squared")
    for arm in (Arm(error, 1, math.inf), Arm(error, 1, 3.0), Arm(error, 1, 3.0, "auto"))
]
ALL_CELLS = [
    Arm(error, batch, n) for (error, batch), row in PUBLISHED.items() for n in (math.inf, 4.0, 3.0, 2.0) if n in row
]


@dataclass(frozen=True)
class _Preset:
    """Hold what a preset changes."""

    cells: list[Arm]
    seeds: int
    config: Config
    boxcar: int
    more_seeds: Mapping[int, int] = field(default_factory=dict)

    def seeds_of(self, arm: Arm) -> int:
        """Return how often a cell is repeated; cells of small batches cost little and may have more."""
        return self.more_seeds.get(arm.batch_size, self.seeds)


def _preset(name: str) -> _Preset:
    """Return the cells, seeds and common settings of a preset."""
    if name == "smoke":
        return _Preset(QUICK_CELLS, 2, Config(width=4, iterations=384, final_window=128), 32)
    if name == "quick":
        return _Preset(QUICK_CELLS, 4, Config(width=8, iterations=9_000, final_window=1_800), 250)
    if name == "variants":
        return _Preset(VARIANT_CELLS, 8, Config(width=8, iterations=9_000, final_window=1_800), 250)
    if name == "medium":
        config = Config(width=16, iterations=10_000, final_window=2_000, precision="bfloat16")
        return _Preset(ALL_CELLS, 3, config, 250, {1: 8, 4: 4})
    if name == "paper":
        return _Preset(ALL_CELLS, 10, Config(), 500)
    raise ValueError(f"table1 has no preset {name!r}; choose one of {', '.join(PRESETS)}.")


def _differences(chosen: _Preset, description: dict[str, Any]) -> list[str]:
    """Say where this protocol is not the paper's."""
    found = study.differences(chosen.config, description)
    numbers = {arm.batch_size: chosen.seeds_of(arm) for arm in chosen.cells}
    if set(numbers.values()) != {10}:
        several = ", ".join(f"{number} at batch {batch}" for batch, number in numbers.items())
        is_one = len(set(numbers.values())) == 1
        told = f"{chosen.seeds_of(chosen.cells[0])} seeds" if is_one else f"Seeds: {several}"
        found.append(f"{told} in each cell instead of 10.")
    if len(chosen.cells) < 31:
        number = sum(arm.variant == "reference" for arm in chosen.cells)
        found.append(f"{number} of the table's 31 cells.")
    return found


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
    chosen = _preset(preset)
    study.check_seeds(seeds)
    if seeds is not None:
        chosen = replace(chosen, seeds=seeds, more_seeds={})
    description = load_cifar10(data).describe()
    order = sorted(chosen.cells, key=lambda arm: arm.error != "quartic")  # the unstable error first
    runs: list[dict[str, Any]] = []
    cells: list[dict[str, Any]] = []
    for arm in order:
        mean, std = PUBLISHED[arm.error, arm.batch_size][arm.num_stddev]
        cells.append(
            {
                "id": arm.id,
                "panel": arm.error,
                "row": arm.row,
                "column": f"batch {arm.batch_size}",
                "baseline": arm.baseline,
                "published": {"mean": mean, "std": std, "n": 10} if arm.variant == "reference" else None,
            }
        )
        configs = [_configure(chosen.config, arm, seed, data) for seed in range(chosen.seeds_of(arm))]
        runs += [study.run_of(config, arm.id, description) for config in configs]
    runs.sort(key=lambda run: run["config"]["batch_size"])  # cheap ones first, so that a night cut short has columns
    panels = [
        {"id": error, "title": f"{error.capitalize()} error"} for error in dict.fromkeys(arm.error for arm in order)
    ]
    notes = (
        []
        if preset != "variants"
        else [
            "Rows marked ALRC() use the default rule of this library, which starts without knobs and tells spikes from "
            "shifts; they are compared with the row of the authors' library."
        ]
    )
    content = {
        "schema": 1,
        "study": "table1",
        "preset": preset,
        "title": "CIFAR-10 supersampling with and without ALRC",
        "question": (
            "Does limiting losses to n running standard deviations above their mean lower the error where training is "
            "unstable (quartic), and leave it alone where it is stable (squared)?"
        ),
        "data": description,
        "metric": {"key": "final_error", "label": "error × 100", "factor": 100, "better": "lower"},
        "curve": {"column": "error", "factor": 100, "label": "unlimited error × 100", "boxcar": chosen.boxcar},
        "stream": {"loss": "loss_max", "limit": "limit"},
        "panels": panels,
        "cells": cells,
        "differences": _differences(chosen, description),
        "notes": [
            "ALRC is the variant that the published runs of quartic errors used: the authors' library "
            "(ALRC.reference: start μ1 = 25, μ2 = 900, decay 0.999, moments from the limited losses).",
            "The published squared-error runs used scripts whose moments settle at a third of the truth; "
            "`--variant scripts` of the experiment reproduces them.",
            *notes,
        ],
    }
    return Plan(content, runs, f"results/table1-{preset}-{description['slug']}", study.measure)


def _configure(base: Config, arm: Arm, seed: int, data: str | None) -> Config:
    """Return the configuration of one run."""
    kind: Literal["squared", "quartic"] = "squared" if arm.error == "squared" else "quartic"
    num_stddev = None if math.isinf(arm.num_stddev) else arm.num_stddev
    config = replace(base, error=kind, batch_size=arm.batch_size, num_stddev=num_stddev, variant=arm.variant)
    if arm.batch_size == 64:
        config = replace(config, drop_at=round(0.54687 * config.iterations))
    return replace(config, seed=seed, data=data)
