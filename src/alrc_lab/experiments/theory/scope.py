"""E7: two settings at the edge of the theory: a loss without a minimiser, and steps that do not become smaller.

Logistic regression on separable examples, x = (y, 0.3 z) with z normal, has no finite root of E[g/c] = 0, so weights
cannot converge to one; clipping slows their growth and does not end it. With constant steps the weights reach a
neighbourhood of the root and stay noisy. Neither refutes a theorem whose assumptions may exclude it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from alrc_lab.experiments.recorder import Recorder
from alrc_lab.experiments.theory import evidence, methods
from alrc_lab.experiments.theory.criteria import Claim, Criterion, estimate
from alrc_lab.experiments.theory.keeping import Kept
from alrc_lab.experiments.theory.methods import Method

ENTRY = "alrc_lab.experiments.theory.scope:run"
EXCLUDED = ()
STREAM = 7
BLOCK = 250


@dataclass(frozen=True)
class Config:
    """Settings and criteria of E7."""

    methods: tuple[str, ...] = ("none", "norm", "agc", "alrc")
    """Methods. One layer is the last layer, so nothing can be left out."""
    thresholds: tuple[float, ...] = (0.0, 0.1, 0.1, 3.0)
    """Their λ, or n of ALRC, in logistic regression; nothing is made of the first."""
    seeds: int = 200
    """Runs of each method."""
    steps: int = 100_000
    """Number of updates N of logistic regression."""
    exponent: float = 0.75
    """p in γ_n = 1 / (n + 1)^p there."""
    spread: float = 0.3
    """Deviation of the input that tells nothing."""
    floor_thresholds: tuple[float, ...] = (0.0, 1.0, 1.0, 3.0)
    """λ or n with constant steps."""
    floor_steps: int = 10_000
    """Number of updates with constant steps."""
    constant: float = 0.1
    """The constant γ; examples there are normal with mean and minimiser 1."""
    growth: float = 0.05
    """Share by which the mean norm must still grow from N/10 to N to count as growing."""
    floor: float = 0.5
    """Ratio of the typical distances at the end and at a tenth of the steps above which a floor is reached."""
    points: int = 60
    """Steps that are logged."""
    seed: int = 2026
    """Seed of every random stream. Pilots used others, so that criteria were fixed before these numbers were seen."""


def separate(method: Method, config: Config, wanted: np.ndarray) -> np.ndarray:
    """Train logistic regression on separable examples; returns norms, shape (wanted steps, seeds)."""
    generator = np.random.default_rng([STREAM, config.seed, 0])
    weights = np.zeros((config.seeds, 2))
    state = method.start(config.seeds)
    gamma = methods.steps(1.0, config.exponent, config.steps)
    marks = {int(step) for step in wanted}
    found: list[np.ndarray] = []
    x = y = np.empty(0)
    for n in range(config.steps):
        if n % BLOCK == 0:
            y = np.where(generator.random((BLOCK, config.seeds)) < 0.5, 1.0, -1.0)
            x = np.stack([y, config.spread * generator.standard_normal(y.shape)], -1)
        sign, example = y[n % BLOCK], x[n % BLOCK]
        margin = sign * (weights[:, 0] * example[:, 0] + weights[:, 1] * example[:, 1])
        scale: Any = 1.0
        if method.is_of_losses:
            factors, state = method.weigh(np.logaddexp(0.0, -margin)[:, None], state)
            scale = factors[:, 0]
        slope = -scale * sign / (1 + np.exp(np.minimum(margin, 700.0)))
        gradient = {"last.weight": (slope[:, None] * example)[:, None, :]}
        clipped = method.clip(gradient, {"last.weight": weights[:, None, :]})["last.weight"][:, 0]
        weights = weights - gamma[n] * clipped
        if n + 1 in marks:
            found.append(np.sqrt(np.sum(weights**2, 1)))
    return np.stack(found)


def rattle(method: Method, config: Config, wanted: np.ndarray) -> np.ndarray:
    """Follow a quadratic with constant steps; returns |θ_n - 1|, shape (wanted steps, seeds)."""
    generator = np.random.default_rng([STREAM, config.seed, 1])
    theta = np.full(config.seeds, 2.0)
    state = method.start(config.seeds)
    marks = {int(step) for step in wanted}
    found: list[np.ndarray] = []
    x = np.empty(0)
    for n in range(config.floor_steps):
        if n % BLOCK == 0:
            x = 1 + generator.standard_normal((BLOCK, config.seeds))
        raw = theta - x[n % BLOCK]
        scale: Any = 1.0
        if method.is_of_losses:
            factors, state = method.weigh(0.5 * (raw * raw)[:, None], state)
            scale = factors[:, 0]
        theta = theta - config.constant * method.clip({"theta": scale * raw}, {"theta": theta})["theta"]
        if n + 1 in marks:
            found.append(np.abs(theta - 1))
    return np.stack(found)


def run(config: dict[str, Any], recorder: Recorder) -> dict[str, Any]:
    """Run both settings for every method.

    Args:
        config: A `Config` as a dictionary.
        recorder: Where rows and progress go.

    Returns:
        `diverged_at`, always None, and the `summary` that the claims name.
    """
    settings = Config(**{key: value for key, value in config.items() if key != "criteria"})
    tens = [10**power for power in range(1, 9) if 10**power <= settings.steps]
    wanted = np.unique([*methods.log_spaced(settings.steps, settings.points), settings.steps // 10, *tens])
    is_short = wanted <= settings.floor_steps
    short = np.unique([*wanted[is_short], settings.floor_steps // 10, settings.floor_steps])
    table: dict[str, np.ndarray] = {"step": wanted}
    told: dict[str, float] = {}
    kept = Kept(recorder, len(settings.methods))
    for done, (key, threshold, other) in enumerate(
        zip(settings.methods, settings.thresholds, settings.floor_thresholds, strict=True)
    ):
        made = kept.part(
            key,
            lambda key=key, threshold=threshold, other=other: {
                "norms": separate(methods.make(key, threshold), settings, wanted),
                "distances": rattle(methods.make(key, other), settings, short),
            },
        )
        norms, distances = made["norms"], made["distances"]
        table[f"norm_{key}"] = norms.mean(1)
        tenth = norms[wanted == settings.steps // 10][0]
        told |= {f"growth_{part}_{key}": v for part, v in evidence.mean_of(norms[-1] / tenth - 1).items()}
        for step in tens:
            sample = evidence.mean_of(norms[wanted == step][0])
            told |= {f"norm_{part}_{step}_{key}": value for part, value in sample.items()}
        column = np.full(len(wanted), np.nan)
        column[is_short] = np.median(distances[np.isin(short, wanted)], 1)
        table[f"noise_floor_{key}"] = column
        early = distances[short == settings.floor_steps // 10][0]
        told[f"floor_{key}"] = float(np.median(distances[-1]) / np.median(early))
        told |= {
            f"floor_{part}_{key}": value
            for part, value in evidence.bootstrap(
                [distances[-1], early], _ratio, [STREAM, settings.seed, 2, done]
            ).items()
        }
        told |= {f"distance_{part}_{key}": value for part, value in evidence.median_of(distances[-1]).items()}
        told[f"n_{key}"] = settings.seeds
    recorder.log(table)
    return {"diverged_at": None, "summary": told}


def _ratio(late: np.ndarray, early: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return the ratio of medians."""
    return np.median(late, axis=axis) / np.median(early, axis=axis)


def claims(config: Config) -> list[dict[str, Any]]:
    """Return the claims of E7 as study.json holds them."""
    found: list[Claim] = []
    for key, threshold, other in zip(config.methods, config.thresholds, config.floor_thresholds, strict=True):
        words = "" if key == "none" else f"threshold {threshold:g}, "
        found.append(
            Claim(
                f"E7-growth-{key}",
                key,
                "The weights converge to a point at which the scaled mean gradient is zero.",
                estimate(
                    f"growth of ‖θ‖ from N/10 to N = {config.steps:,}",
                    [f"growth_{part}_{key}" for part in ("mean", "low", "high")],
                    f"n_{key}",
                ),
                [Criterion(f"growth_high_{key}", "<", config.growth)],
                [Criterion(f"growth_low_{key}", ">", config.growth)],
                "inference" if key in ("none", "alrc") else "read",
                "" if key in ("none", "alrc") else "Theorem 1",
                f"{words}separable logistic regression: no finite root",
                False,
                reading="outside or untested: the assumptions, which could not be read, may exclude a loss without "
                "a minimiser",
            )
        )
        words = "" if key == "none" else f"threshold {other:g}, "
        found.append(
            Claim(
                f"E7-floor-{key}",
                key,
                "The weights converge.",
                estimate(
                    "median |θ − θ*| at the end ÷ at a tenth",
                    (f"floor_{key}", f"floor_low_{key}", f"floor_high_{key}"),
                    f"n_{key}",
                    places=2,
                ),
                [Criterion(f"floor_high_{key}", "<", config.floor)],
                [Criterion(f"floor_low_{key}", ">", config.floor)],
                "inference",
                "",
                f"{words}constant γ = {config.constant:g}",
                False,
                reading="a ratio around 1 is a noise floor: constant steps were not what a theory of vanishing ones "
                "is about",
            )
        )
    return [claim.to_json("E7") for claim in found]
