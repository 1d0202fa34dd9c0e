"""Plan the study of partial-STEM: squared errors, Huberised ones, and both with ALRC, several seeds each.

The paper says of these four conditions that ALRC and Huberisation stabilise training and lower losses; it prints no
number. Beside them stand completions without a network, of the same scans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from alrc_lab import experiments
from alrc_lab.data.stem import load_micrographs
from alrc_lab.experiments import partial_stem, partial_stem_baselines
from alrc_lab.experiments.partial_stem import Config
from alrc_lab.experiments.partial_stem_results import COMPLETIONS
from alrc_lab.experiments.plan import Cost, Pack, Plan

PRESETS = experiments.PRESETS["partial-stem"]
"""Presets and what each costs."""


class Condition(NamedTuple):
    """Name what distinguishes one condition."""

    loss: Literal["mse", "huber"]
    """What is minimised."""
    limit: Literal["none", "alrc"]
    """Whether ALRC limits it."""

    @property
    def id(self) -> str:
        """Identifier of the condition."""
        return self.loss + "-alrc" * (self.limit == "alrc")

    @property
    def label(self) -> str:
        """What tables call it."""
        return {"mse": "MSE", "huber": "Huber"}[self.loss] + " + ALRC" * (self.limit == "alrc")

    @property
    def baseline(self) -> str | None:
        """Identifier of the condition that this one is compared with: the same without ALRC, or plain MSE."""
        if self.limit == "alrc":
            return self._replace(limit="none").id
        return "mse" if self.loss == "huber" else None


CONDITIONS = [Condition(loss, limit) for loss in ("mse", "huber") for limit in ("none", "alrc")]

METRICS = [
    {"key": "final_outer", "label": "loss L_out at the end", "factor": 1, "better": "lower"},
    {"key": "final_inner", "label": "loss L_in at the end", "factor": 1, "better": "lower"},
    {"key": "held_out_rms_percent", "label": "RMS error, held out, %", "factor": 1, "better": "lower"},
    {
        "key": "held_out_fitted_rms_percent",
        "label": "RMS error, held out, up to brightness and contrast, %",
        "factor": 1,
        "better": "lower",
    },
    {"key": "late_max_outer", "label": "largest L_out of the second half", "factor": 1, "better": "lower"},
    {"key": "spike_share_outer", "label": "share of L_out above ALRC's limit, %", "factor": 100, "better": "lower"},
    {"key": "fraction_limited_outer", "label": "share of L_out limited, %", "factor": 100, "better": None},
    {"key": "fraction_limited_inner", "label": "share of L_in limited, %", "factor": 100, "better": None},
]
"""The first is what conditions are judged by, those without `better` only describe; losses are raw, before ALRC and
Huber."""


REFERENCES = {
    "title": "without a network",
    "methods": [
        {"key": "constant", "label": "best constant"},
        {"key": "linear", "label": "linear interpolation"},
        {"key": "biharmonic", "label": "biharmonic inpainting"},
    ],
    "metrics": {
        "held_out_rms_percent": "{key}_rms_percent",
        "held_out_fitted_rms_percent": "{key}_fitted_rms_percent",
    },
}
"""What the run that belongs to no condition found, and which metrics it can stand beside."""

MOST_BASELINE_CROPS = 500
"""Of thousands of large crops the baselines complete some, evenly spread: they are slower than a network."""


@dataclass(frozen=True)
class _Preset:
    """Hold what a preset changes."""

    config: Config
    seeds: int


_PRESETS = {
    "smoke": _Preset(partial_stem.PRESETS["smoke"], 2),
    "quick": _Preset(partial_stem.PRESETS["stem-96"], 5),
    "stem-128": _Preset(partial_stem.PRESETS["stem-128"], 5),
    "stem-256": _Preset(partial_stem.PRESETS["stem-256"], 5),
    "paper": _Preset(partial_stem.PRESETS["stem-512-paper"], 5),
}


def plan(preset: str, *, data: str | None = None, seeds: int | None = None) -> Plan:
    """List the runs of the study, all conditions of a seed together, so that a part of it has pairs.

    Args:
        preset: One of `PRESETS`.
        data: Folder of micrographs, or "embedded" for simulated ones; none searches.
        seeds: Seeds of each condition, from 0; none takes the preset's.

    Returns:
        The plan; nothing has been started.

    Raises:
        ValueError: If there is no such preset, or `seeds` < 1.
    """
    if preset not in _PRESETS:
        raise ValueError(f"partial-stem has no preset {preset!r}; choose one of {', '.join(_PRESETS)}.")
    chosen = _PRESETS[preset]
    if seeds is not None and seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}.")
    seeds = seeds or chosen.seeds
    base = replace(chosen.config, data=data)
    description = load_micrographs(data, crop_size=base.crop_size).describe()
    few = min(base.held_out_crops, MOST_BASELINE_CROPS)
    baselines = partial_stem_baselines.Config(base.crop_size, base.coverage, few, data)
    resolved = partial_stem_baselines.resolve_config(baselines)
    runs = [_run(partial_stem_baselines, resolved, description, partial_stem_baselines.name_of(baselines), None, 0)]
    for seed in range(seeds):
        for condition in CONDITIONS:
            config = replace(base, loss=condition.loss, limit=condition.limit, seed=seed)
            resolved = partial_stem.resolve_config(config)
            name = partial_stem.name_of(config)
            runs.append(_run(partial_stem, resolved, description, name, condition.id, seed))
    config = Config(**runs[-1]["config"])
    boxcar = max(1, config.iterations // 40)
    study = {
        "schema": 1,
        "study": "partial-stem",
        "preset": preset,
        "title": "Completing micrographs from a spiral scan, with and without ALRC",
        "question": (
            "Do ALRC and Huberisation stabilise training on one micrograph at a time, and do they lower the losses, "
            "together or each alone?"
        ),
        "data": description,
        "metric": METRICS[0],
        "metrics": METRICS[1:],
        "curve": {"column": "loss_outer", "factor": 1, "label": "raw loss L_out", "boxcar": boxcar},
        "curves": [{"column": "loss_inner", "factor": 1, "label": "raw loss L_in", "boxcar": boxcar}],
        "stream": {"loss": "loss_outer", "limit": "limit_outer"},
        "panels": [{"id": "stem", "title": "Losses"}],
        "cells": [
            {
                "id": condition.id,
                "panel": "stem",
                "row": condition.label,
                "column": "",
                "baseline": condition.baseline,
                "published": None,
            }
            for condition in CONDITIONS
        ],
        "completions": {"file": COMPLETIONS, "seed": 0},
        "references": REFERENCES,
        "differences": _differences(config, seeds, description),
        "notes": [
            "Losses are 200 times mean squared errors of images in [-1, 1] against blurred truth, recorded before ALRC "
            "and Huber in every condition. The authors' logs hold them after both, so their curves cannot show spikes.",
            "Held-out crops come from images that no run was trained on, split by file order as the authors did. The "
            "scan does not tell the range of the whole crop, so errors are also given after the best change of "
            "brightness and contrast of each completion.",
            "Baselines get the same scans, and an estimate of intensities along the spiral that is smoothed like the "
            "target. The best constant is told the truth's mean.",
            "The share of losses above ALRC's limit is that of a rule (25, 900, 0.999, n = 3) that watches the run; in "
            "conditions with ALRC it also acts.",
        ],
    }
    return Plan(study, runs, f"results/partial-stem-{preset}-{description['slug']}", _measure)


def _run(
    experiment: Any, config: dict[str, Any], inputs: dict[str, Any], name: str, cell: str | None, seed: int
) -> dict[str, Any]:
    """Describe a run as its folder will; one without a cell is the study's reference."""
    return {
        "entry": experiment.ENTRY,
        "config": config,
        "inputs": inputs,
        "excluded": experiment.EXCLUDED,
        "name": name,
        "cell": cell,
        "seed": seed,
    }


def _differences(config: Config, seeds: int, description: dict[str, Any]) -> list[str]:
    """Say where this protocol is not the paper's."""
    found = [f"{seeds} seeds of each condition; the paper shows one run of each."]
    images = description["images"]
    if description["source"] == "embedded":
        found.append(f"Data: {images:,} simulated micrographs instead of 16,227 real ones.")
    elif images != 16_227:
        found.append(f"Data: {images:,} micrographs instead of 16,227.")
    if config.crop_size != 512:
        found.append(
            f"Crops of {config.crop_size}×{config.crop_size} instead of 512×512, the same pitch of the spiral."
        )
    if config.widths != "full":
        share, inner, outer = config.widths.split("-")
        found.append(f"Networks of {share} width, {inner} inner and {outer} outer blocks instead of 6 and 3.")
    if config.iterations != 500_000:
        found.append(f"{config.iterations:,} iterations instead of 500,000.")
    found.append("No replay of hard examples, which the paper does not mention: it would break the pairs of runs.")
    return found


def _measure(packs: Sequence[Pack]) -> list[Cost]:
    """Time a few updates; conditions cost the same."""
    shapes = dict[Config, dict[int, int]]()
    for place, run in (member for pack in packs for member in pack.items()):
        if run["cell"] is None:
            continue  # seconds
        config = Config(**run["config"])
        shape = replace(config, loss="huber", limit="alrc", seed=0)
        shapes.setdefault(shape, {})[place] = config.iterations - run["step"]
    costs = list[Cost]()
    for config, left in shapes.items():
        micrographs = load_micrographs(config.data, crop_size=config.crop_size)
        step_s = partial_stem.measure_step_s(config, micrographs)
        what = f"{config.crop_size}×{config.crop_size}, {config.widths}, {config.precision}"
        label = f"{what}: {1e3 * step_s:.0f} ms an update × {sum(left.values()):,} updates"
        costs.append(Cost(label, {place: step_s * updates for place, updates in left.items()}))
    return costs
