"""Plan the paper's Table 1: error, batch size and threshold n, several seeds each, compared with n = ∞.

A study only plans: it lists configurations and says how they belong together. Whoever runs them and whoever reports
them need not import it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from alrc_lab import experiments
from alrc_lab.data import load_cifar10
from alrc_lab.experiments import cifar10_supersampling as supersampling
from alrc_lab.experiments.cifar10_supersampling import Config
from alrc_lab.experiments.plan import Cost, Plan

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
        n = "∞" if math.isinf(self.num_stddev) else f"{self.num_stddev:g}"
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


@dataclass(frozen=True)
class _Preset:
    """Hold what a preset changes."""

    cells: list[Arm]
    seeds: int
    config: Config
    boxcar: int


def _preset(name: str) -> _Preset:
    """Return the cells, seeds and common settings of a preset."""
    if name == "smoke":
        return _Preset(QUICK_CELLS, 2, Config(width=4, iterations=384, final_window=128), 32)
    if name == "quick":
        return _Preset(QUICK_CELLS, 4, Config(width=8, iterations=9_000, final_window=1_800), 250)
    if name == "variants":
        return _Preset(VARIANT_CELLS, 8, Config(width=8, iterations=9_000, final_window=1_800), 250)
    if name == "paper":
        order = [math.inf, 4.0, 3.0, 2.0]
        cells = [Arm(error, batch, n) for (error, batch), row in PUBLISHED.items() for n in order if n in row]
        return _Preset(cells, 10, Config(), 500)
    raise ValueError(f"table1 has no preset {name!r}; choose one of {', '.join(PRESETS)}.")


def _measure(runs: Sequence[dict[str, Any]]) -> list[Cost]:
    """Time a few updates of each shape of run."""
    shapes: Counter[Config] = Counter()
    for run in runs:
        config = Config(**run["config"])
        shape = replace(config, error="squared", num_stddev=3.0, seed=0, drop_at=None, iterations=1, final_window=1)
        shapes[shape] += config.iterations
    costs = list[Cost]()
    for shape, updates in shapes.items():
        step_s = supersampling.measure_step_s(shape)
        what = f"width {shape.width}, batch {shape.batch_size}, {shape.precision}"
        costs.append(Cost(f"{what}: {1e3 * step_s:.1f} ms an update × {updates:,} updates", step_s * updates))
    return costs


def _differences(config: Config, preset: _Preset, description: dict[str, Any]) -> list[str]:
    """Say where this protocol is not the paper's."""
    found: list[str] = []
    if description["source"] == "embedded":
        found.append(f"Data: {description['images']:,} patches of photographs instead of CIFAR-10's 50,000 images.")
    elif description["images"] != 50_000:
        found.append(f"Data: {description['images']:,} images of CIFAR-10 instead of its 50,000.")
    if config.width != 64:
        found.append(f"Width {config.width} instead of 64: a network of fewer parameters, with higher errors.")
    if config.iterations != 100_000:
        found.append(
            f"{config.iterations:,} iterations instead of 100,000; the error is the mean of the last "
            f"{config.final_window:,} instead of 5,000."
        )
    if preset.seeds != 10:
        found.append(f"{preset.seeds} seeds in each cell instead of 10.")
    if len(preset.cells) < 31:
        number = sum(arm.variant == "reference" for arm in preset.cells)
        found.append(f"{number} of the table's 31 cells.")
    if config.precision != "float32":
        found.append(f"Convolutions in {config.precision} instead of float32.")
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
    if seeds is not None:
        if seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {seeds}.")
        chosen = replace(chosen, seeds=seeds)
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
        for seed in range(chosen.seeds):
            config = _configure(chosen.config, arm, seed, data)
            runs.append(
                {
                    "entry": supersampling.ENTRY,
                    "config": supersampling.resolve_config(config),
                    "inputs": description,
                    "excluded": supersampling.EXCLUDED,
                    "name": supersampling.name_of(config),
                    "cell": arm.id,
                    "seed": seed,
                }
            )
    final = Config(**runs[0]["config"])
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
    study = {
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
        "differences": _differences(final, chosen, description),
        "notes": [
            "ALRC is the variant that the published runs of quartic errors used: the authors' library "
            "(ALRC.reference: start μ1 = 25, μ2 = 900, decay 0.999, moments from the limited losses).",
            "The published squared-error runs used scripts whose moments settle at a third of the truth; "
            "`--variant scripts` of the experiment reproduces them.",
            *notes,
        ],
    }
    return Plan(study, runs, f"results/table1-{preset}-{description['slug']}", _measure)


def _configure(base: Config, arm: Arm, seed: int, data: str | None) -> Config:
    """Return the configuration of one run."""
    kind: Literal["squared", "quartic"] = "squared" if arm.error == "squared" else "quartic"
    num_stddev = None if math.isinf(arm.num_stddev) else arm.num_stddev
    config = replace(base, error=kind, batch_size=arm.batch_size, num_stddev=num_stddev, variant=arm.variant)
    if arm.batch_size == 64:
        config = replace(config, drop_at=round(0.54687 * config.iterations))
    return replace(config, seed=seed, data=data)
