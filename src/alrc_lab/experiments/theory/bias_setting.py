"""What E3 is asked: its settings and criteria, the laws of the examples, and the roots that theory predicts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from alrc_lab.experiments.theory import methods
from alrc_lab.experiments.theory.methods import written

LAWS = ("rare", "normal", "cauchy", "exponential", "lognormal")
MEAN = 1.0
"""Mean of every law that has one, and its minimiser; the centre of Cauchy's."""
DEVIATION = {"normal": 1.0, "exponential": 1.0, "lognormal": math.sqrt(math.e - 1)}
"""Standard deviation of the laws of the matched comparison."""


@dataclass(frozen=True)
class Config:
    """Settings and criteria of E3."""

    methods: tuple[str, ...] = ("none", "norm", "agc", "alrc")
    """Methods; `method_index` counts in this order. One number has no last layer to leave out."""
    seeds: int = 1_000
    """Independent runs of every setting."""
    steps: int = 20_000
    """Number of updates N."""
    gain: float = 1.0
    """γ_0."""
    exponent: float = 0.75
    """p in γ_n = γ_0 / (n + 1)^p."""
    start: float = 2.0
    """θ_0."""
    rare: float = 0.1
    """Probability q of a large x."""
    height: float = 10.0
    """The large x, K."""
    norm_thresholds: tuple[float, ...] = (0.5, 1.0, 3.0)
    """λ of Norm; λ ≤ K - θ*, or the root is another."""
    agc_thresholds: tuple[float, ...] = (0.1, 0.5)
    """λ of AGC."""
    alrc_thresholds: tuple[float, ...] = (2.0, 3.0)
    """n of ALRC."""
    margin: float = 0.01
    """Margin of the equivalence tests, in units of θ."""
    alpha: float = 0.05
    """Level of all tests, after Holm's correction in each family."""
    ratio: float = 0.05
    """How far AGC's median may lie from its root, as a share of it; and how much it may still move between N/2 and N
    to count as arrived."""
    stable_below: float = 0.01
    """Share of lost runs that still counts as stable with high probability."""
    matched_seeds: int = 400
    """Independent runs of every setting of the matched comparison."""
    matched_steps: int = 5_000
    """Number of updates there."""
    matched_laws: tuple[str, ...] = ("exponential", "lognormal", "normal")
    """Laws there, each of mean 1."""
    matched_fractions: tuple[float, ...] = (0.01, 0.05, 0.1)
    """Shares of limited examples at which biases are compared."""
    matched_gradient_thresholds: tuple[float, ...] = (8.0, 5.0, 3.5, 2.5, 1.8, 1.3, 0.9, 0.6)
    """λ of Norm and AGC whose biases are interpolated between."""
    matched_alrc_thresholds: tuple[float, ...] = (16.0, 8.0, 5.0, 3.5, 2.5, 1.8, 1.2, 0.8)
    """n of ALRC likewise."""
    seed: int = 2026
    """Seed of every random stream. Pilots used others, so that criteria were fixed before these numbers were seen."""


def thresholds_of(config: Config, method: str) -> tuple[float | None, ...]:
    """Return the settings of a method in the main part."""
    return {
        "none": (None,),
        "norm": config.norm_thresholds,
        "agc": config.agc_thresholds,
        "alrc": config.alrc_thresholds,
    }[method]


def predicted_root(config: Config, method: str, threshold: float | None, law: str) -> float:
    """Return the θ at which E[g/c] = 0; NaN where no formula is at hand, or no expectation exists."""
    if law in ("normal", "cauchy"):
        return MEAN if method == "norm" or (law == "normal" and method in ("none", "agc")) else math.nan
    odds = config.rare / (1 - config.rare)
    if method == "none":
        return config.rare * config.height
    if threshold is None or method == "alrc":
        return math.nan
    return threshold * odds * (1.0 if method == "norm" else methods.make("agc", threshold).rule.eps)


def draw(law: str, shape: tuple[int, int], config: Config, generator: np.random.Generator) -> np.ndarray:
    """Draw examples x of a law."""
    if law == "rare":
        return np.where(generator.random(shape) < config.rare, config.height, 0.0)
    if law == "normal":
        return MEAN + generator.standard_normal(shape)
    if law == "cauchy":
        return MEAN + generator.standard_cauchy(shape)
    if law == "exponential":
        return generator.exponential(MEAN, shape)
    return np.exp(generator.standard_normal(shape) - 0.5)


def name_of(key: str, threshold: float | None, law: str) -> str:
    """Name a setting."""
    return "_".join([key, *([] if threshold is None else [written(threshold)]), law])


def families(config: Config) -> dict[str, list[str]]:
    """Return the p-values that are corrected together, by the name of their family."""
    settings = [("none", None), *(("norm", threshold) for threshold in config.norm_thresholds)]
    names = [name_of(key, threshold, law) for law in ("rare", "normal") for key, threshold in settings]
    matched = [
        f"{key}_{law}_{written(wanted)}"
        for law in config.matched_laws
        for wanted in config.matched_fractions
        for key in ("norm", "agc", "alrc")
    ]
    return {
        "E3 bias at matched shares": [f"bias_zero_p_{name}" for name in matched],
        "E3 root": [f"equivalence_p_{name}" for name in names],
        "E3 mean gradient": [f"gradient_differs_p_{name}" for name in names],
        "E3 mean gradient is zero": [f"gradient_zero_p_{name}" for name in names],
    }
