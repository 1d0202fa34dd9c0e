"""Plan the study `theory`: the eight experiments, each one run, with every claim and criterion written down first."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from alrc_lab import experiments
from alrc_lab.experiments.plan import Cost, Pack, Plan
from alrc_lab.experiments.theory import (
    bias,
    bias_setting,
    invariants,
    network,
    noise,
    scaled_loss,
    scope,
    small_weights,
    stability,
)
from alrc_lab.experiments.theory.criteria import essence

PRESETS = experiments.PRESETS["theory"]
"""Presets and what each costs."""

DATA: dict[str, Any] = {
    "name": "synthetic",
    "source": "computed",
    "path": "",
    "images": 0,
    "sha256": hashlib.sha256(b"synthetic").hexdigest(),
}
"""What stands where other studies have a data set: every example is drawn from seeded generators."""


class _Part(NamedTuple):
    """Say what an experiment is."""

    id: str
    module: Any
    title: str
    protocol: str
    figure: str


PARTS = [
    _Part(
        "E0",
        invariants,
        "What the rules must always do",
        "Random gradients and weights over twelve decades, walks along clipped gradients, zeros and infinities; every "
        "violation of a cap, an envelope or an identity counts.",
        "",
    ),
    _Part(
        "E1",
        stability,
        "Numerical stability",
        "A ReLU network learns a linear map from single examples with heavy-tailed inputs and noise; a run fails when "
        "its weights pass a bound that the steps could reach many times over. Exact intervals, paired McNemar tests.",
        "stability",
    ),
    _Part(
        "E2",
        noise,
        "Does the noise of the steps die out?",
        "Supremum of the summed noise after step m, with the mean gradient known exactly, beside Azuma's bound; steps "
        "whose squares do not add up are the control.",
        "noise",
    ),
    _Part(
        "E3",
        bias,
        "Where clipped gradient descent ends",
        "The mean of a skewed law is learned by ½ (θ − x)²; equivalence tests against the predicted root of E[g/c], "
        "intervals of E[g] there, and the bias of every rule at the same share of limited examples.",
        "bias",
    ),
    _Part(
        "E4",
        network,
        "Convergence in a network",
        "A tanh network on one fixed sample, so that every expectation is an exact sum: does E[g/c] vanish, and does "
        "E[g], paired with training without clipping from the same weights.",
        "network",
    ),
    _Part(
        "E5",
        small_weights,
        "Small weights, vanishing gradients",
        "Absolute and relative steps of a clipped unit while its weights shrink over six decades; and steps to half "
        "the loss of deep tanh networks with small first weights.",
        "small_weights",
    ),
    _Part(
        "E6",
        scaled_loss,
        "Is a scaled loss minimised?",
        "The curl of the field E[g/c] of a two-parameter network, by central differences of three widths; curvature, "
        "stability and the slope of E[ℓ/c] at the endpoints of E4.",
        "scaled_loss",
    ),
    _Part(
        "E7",
        scope,
        "At the edge of the theory",
        "Separable logistic regression, whose loss has no minimiser, and constant steps.",
        "scope",
    ),
]
"""The experiments in order."""


def configs(preset: str) -> dict[str, Any]:
    """Return the settings of every experiment.

    Args:
        preset: One of `PRESETS`.

    Returns:
        A `Config` of its module for each experiment's identifier.

    Raises:
        ValueError: If there is no such preset.
    """
    if preset == "quick":
        return {part.id: part.module.Config() for part in PARTS}
    if preset == "smoke":
        return {
            "E0": invariants.Config(examples=500, walks=40, steps=100),
            "E1": stability.Config(seeds=10, steps=600, bound=15.0),
            "E2": noise.Config(seeds=(200, 200, 200, 20), steps=400, starts=(0, 10, 100)),
            "E3": bias_setting.Config(seeds=60, steps=1_000, matched_seeds=20, matched_steps=300),
            "E4": network.Config(seeds=5, steps=400, batches=(8,), batch_steps=200),
            "E5": small_weights.Config(seeds=5, steps=300),
            "E6": scaled_loss.Config(points=60, grid=9),
            "E7": scope.Config(seeds=10, steps=1_000, floor_steps=500),
        }
    if preset == "full":
        return {
            "E0": invariants.Config(examples=200_000, walks=2_000, steps=1_000),
            "E1": stability.Config(seeds=3_000),
            "E2": noise.Config(seeds=(20_000, 20_000, 20_000, 4_000), steps=20_000),
            "E3": bias_setting.Config(seeds=4_000, steps=100_000, matched_seeds=2_000, matched_steps=20_000),
            "E4": network.Config(steps=400_000, batch_steps=40_000),
            "E5": small_weights.Config(seeds=500, steps=8_000),
            "E6": scaled_loss.Config(points=4_000, grid=61),
            "E7": scope.Config(seeds=500, steps=1_000_000, floor_steps=100_000),
        }
    raise ValueError(f"theory has no preset {preset!r}; choose one of {', '.join(PRESETS)}.")


SECONDS = {"E0": 1.0, "E1": 30.0, "E2": 6.5, "E3": 45.0, "E4": 65.0, "E5": 6.0, "E6": 0.2, "E7": 24.0}
"""CPU seconds that each experiment of the quick preset took on one core of a two-core EPYC server."""


def _work(config: Any) -> float:
    """Return a number that grows as the time of an experiment does: steps of rows, with a toll for every step."""
    seeds = getattr(config, "seeds", getattr(config, "points", getattr(config, "walks", 1)))
    steps = getattr(config, "steps", 1)
    return steps * (500.0 + (sum(seeds) if isinstance(seeds, tuple | list) else seeds))


def _with_seeds(config: Any, seeds: int) -> Any:
    """Return settings with this many seeds, where there are seeds."""
    if isinstance(config, noise.Config):
        return replace(config, seeds=(seeds,) * len(config.methods))
    if isinstance(config, bias_setting.Config):
        return replace(config, seeds=seeds, matched_seeds=seeds)
    return replace(config, seeds=seeds) if hasattr(config, "seeds") else config


def _measure(packs: Sequence[Pack]) -> list[Cost]:
    """Time a fixed piece of work, and scale what the quick preset took with it and with the sizes of the runs."""
    import time

    started = time.perf_counter()
    bias.descend(bias.methods.make("norm", 1.0), ("normal",), 500, 1_000, bias_setting.Config())
    pace = (time.perf_counter() - started) / _REFERENCE_S
    costs: list[Cost] = []
    for place, run in (member for pack in packs for member in pack.items()):
        part = next(part for part in PARTS if part.id == run["cell"])
        own = part.module.Config(**{key: value for key, value in run["config"].items() if key != "criteria"})
        seconds = SECONDS[part.id] * pace * _work(own) / _work(part.module.Config())
        costs.append(Cost(f"{part.id}, {part.title}: about {seconds:.0f} s", {place: seconds}))
    return costs


_REFERENCE_S = 0.027
"""Seconds of that piece of work where `SECONDS` were measured."""


def plan(preset: str, *, data: str | None = None, seeds: int | None = None) -> Plan:
    """List the runs of the study.

    Args:
        preset: One of `PRESETS`.
        data: Ignored: nothing is read.
        seeds: Runs of every setting in all experiments; none takes the preset's.

    Returns:
        The plan; nothing has been started.

    Raises:
        ValueError: If there is no such preset, or `seeds` < 2.
    """
    if seeds is not None and seeds < 2:
        raise ValueError(f"seeds must be at least 2, for an interval, got {seeds}.")
    chosen = configs(preset)
    if seeds is not None:
        chosen = {key: _with_seeds(config, seeds) for key, config in chosen.items()}
    claims = [claim for part in PARTS for claim in part.module.claims(chosen[part.id])]
    runs: list[dict[str, Any]] = []
    for part in PARTS:
        own = [essence(claim) for claim in claims if claim["run"] == part.id]
        runs.append(
            {
                "entry": part.module.ENTRY,
                "config": {**asdict(chosen[part.id]), "criteria": own},
                "inputs": DATA,
                "excluded": part.module.EXCLUDED,
                "name": f"theory-{part.id}-{preset}",
                "cell": part.id,
                "seed": 0,
            }
        )
    families = {**bias_setting.families(chosen["E3"]), **network.families(chosen["E4"])}
    study = {
        "schema": 1,
        "study": "theory",
        "preset": preset,
        "kind": "claims",
        "title": "The theory of clipping on trial",
        "question": (
            "Is clipped gradient descent stable, does it converge to where the scaled mean gradient is zero, and what "
            "does that do to the solution?"
        ),
        "data": DATA,
        "claims": claims,
        "experiments": [
            {"id": part.id, "title": part.title, "protocol": part.protocol, "figure": part.figure} for part in PARTS
        ],
        "panels": [{"id": "theory", "title": "Theory of clipping"}],
        "cells": [
            {"id": part.id, "panel": "theory", "row": part.id, "column": part.title, "baseline": None} for part in PARTS
        ],
        "holm": {
            "families": [
                {
                    "name": name,
                    "alpha": 0.05,
                    "claims": [claim["id"] for claim in claims if _is_tested_by(claim, keys)],
                }
                for name, keys in _all_families(chosen, families).items()
            ]
        },
        "differences": _differences(preset),
        "notes": [
            "The theory is that of Ramaswamy 2023 (ICPRAM). Its definition of c, its thresholds, its step sizes and "
            "its assumptions could not be read: the set-up is ours, and so is every inference marked as one.",
            "Every rule is that of `alrc.rules`, asked through its NumPy primitives for all seeds at once.",
            "ALRC limits single losses and so scales gradients of single examples; the theory does not cover it. The "
            "same numbers are shown for it, with the verdict `outside scope`.",
            "Without clipping, c = 1: those rows are controls.",
        ],
    }
    return Plan(study, runs, f"results/theory-{preset}", _measure)


def _all_families(chosen: dict[str, Any], families: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return the p-values that are corrected together in all experiments."""
    e1, e5 = chosen["E1"], chosen["E5"]
    pairs = [
        f"paired_p_{key}_{stability.law_name(degrees)}" for key in e1.methods if key != "none" for degrees in e1.degrees
    ]
    times = [f"log_time_p_{key}" for key in e5.methods if key != "none"]
    return {"E1 paired failures": pairs, **families, "E5 steps to half the loss": times}


def _is_tested_by(claim: dict[str, Any], keys: list[str]) -> bool:
    """Return whether a claim names one of these p-values."""
    named = {claim["statistic"]["p"], *(c["key"] for c in [*claim["consistent"], *claim["contradicts"]])}
    return any(f"{key}_holm" in named for key in keys)


def _differences(preset: str) -> list[str]:
    """Say where this study departs from the protocol, and what was set in pilots."""
    found = [
        "The margins 0.01 (E3), 1 % (E1), 0.05 (E4) and δ = 0.01 (E2) are the protocol's; the others are ours.",
        "Network, thresholds, step sizes and sample of E4, its tolerance of curvature (E6), points and noise of E6, "
        "depth and thresholds of E5 and the inputs of E7 were set in pilots; all random streams of this study have "
        "another seed than those.",
        "AGC leaves out the last layer only where there is one: E1 and E4.",
        "The noise of E2 is that of E3's two-valued examples: one number, not a vector; Pinelis' bound is not tried.",
    ]
    if preset == "smoke":
        return ["A handful of seeds and steps, to see that everything works: no verdict means anything.", *found]
    return found
