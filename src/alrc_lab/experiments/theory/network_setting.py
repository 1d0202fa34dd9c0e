"""What E4 is asked: its settings and criteria, and the sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from alrc_lab.experiments.theory.methods import written

KINDS = ("skewed", "symmetric")
"""Noise of the targets; both have the same variance."""


@dataclass(frozen=True)
class Config:
    """Settings and criteria of E4, and of E6 at the endpoints."""

    methods: tuple[str, ...] = ("none", "norm", "agc", "agc_last", "alrc")
    """Methods, all on single examples."""
    thresholds: tuple[float, ...] = (0.0, 0.3, 0.3, 0.3, 3.0)
    """Their λ, or n of ALRC; nothing is made of the first."""
    other_thresholds: tuple[float, ...] = (1.0,)
    """Further λ of Norm, on single examples."""
    batches: tuple[int, ...] = (8, 64)
    """Further batch sizes for no method, Norm and ALRC. Norm then clips the batch's gradient."""
    seeds: int = 50
    """Runs of each setting and kind of noise."""
    steps: int = 40_000
    """Number of updates N on single examples."""
    batch_steps: int = 8_000
    """Number of updates on batches."""
    gain: float = 1.0
    """γ_0."""
    exponent: float = 0.65
    """p in γ_n = γ_0 / (n + 1)^p."""
    examples: int = 64
    """Examples of the sample."""
    inputs: int = 2
    """Inputs of the network."""
    hidden: int = 2
    """Hidden units."""
    noise: float = 0.6
    """Deviation of the noise of the targets."""
    rare: float = 0.1
    """Probability that skewed noise is large; so are as many of the symmetric, half of them downwards."""
    vanished: float = 0.05
    """Ratio of a norm to its first value below which it counts as vanished."""
    patience: int = 200_000
    """Steps from which a norm that no longer falls counts against convergence; before, it is inconclusive."""
    alpha: float = 0.05
    """Level of the paired tests, after Holm's correction."""
    points: int = 40
    """Steps that are logged."""
    curvature: float = 0.02
    """An eigenvalue below minus this share of the largest is negative; chosen in a pilot, of which training without
    clipping, not quite arrived, had to pass."""
    minima: float = 0.05
    """Share of endpoints that are no minima up to which they count as minima."""
    width: float = 1e-5
    """Step of the central differences at the endpoints."""
    seed: int = 2026
    """Seed of every random stream. Pilots used others, so that criteria were fixed before these numbers were seen."""


def doublings(steps: int) -> tuple[int, ...]:
    """Return the steps from one to the next of which the field must fall."""
    return (steps // 8, steps // 4, steps // 2, steps)


class Setting(NamedTuple):
    """Name one setting."""

    key: str
    """Key of the method."""
    threshold: float
    """λ or n."""
    batch: int
    """Examples of an update."""
    steps: int
    """Number of updates."""
    name: str
    """Name in columns and summaries."""
    is_first: bool
    """Whether the method has this threshold first."""


def settings_of(config: Config) -> list[Setting]:
    """Return all settings; without a method first, for the others are compared with it."""
    main = dict(zip(config.methods, config.thresholds, strict=True))
    found = [Setting(key, threshold, 1, config.steps, key, True) for key, threshold in main.items()]
    for other in config.other_thresholds:
        found.append(Setting("norm", other, 1, config.steps, f"norm_{written(other)}", False))
    for batch in config.batches:
        for key in ("none", "norm", "alrc"):
            found.append(Setting(key, main[key], batch, config.batch_steps, f"{key}_b{batch}", False))
    return found


def families(config: Config) -> dict[str, list[str]]:
    """Return the p-values that are corrected together."""
    names = [setting.name for setting in settings_of(config) if setting.key != "none"]
    return {"E4 mean gradient": [f"paired_p_{name}_{kind}" for kind in KINDS for name in names]}


class Sample(NamedTuple):
    """Hold the sample of every row; those of one kind of noise are the same."""

    x: np.ndarray
    """Inputs, shape (rows, examples, inputs)."""
    y: np.ndarray
    """Targets, shape (rows, examples)."""


def draw_sample(config: Config, generator: np.random.Generator) -> Sample:
    """Draw one set of inputs, and for each kind of noise the targets: a smooth function of the inputs, plus noise."""
    x = generator.standard_normal((config.examples, config.inputs))
    clean = np.tanh(x.sum(1))
    is_rare = np.arange(config.examples) < round(config.rare * config.examples)
    is_rare = generator.permutation(is_rare)
    skewed = is_rare - is_rare.mean()
    sign = np.where(np.cumsum(is_rare) % 2 == 0, 1.0, -1.0)
    symmetric = is_rare * sign
    targets = [clean + config.noise * noise / noise.std() for noise in (skewed, symmetric)]
    y = np.repeat(np.stack(targets), config.seeds, 0)
    return Sample(np.broadcast_to(x, (len(y), *x.shape)), y)
