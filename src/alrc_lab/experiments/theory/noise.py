"""E2: whether the noise that the steps add up dies out.

S_m = sup over k > m of |Σ_{n=m}^{k} γ_n M_{n+1}|, where M is the clipped gradient minus its mean. The examples are
those of E3 (x = K with probability q, else 0), so the mean is a sum of two terms, both asked of the rule itself: it is
exact, also for ALRC in its present state. Where Σγ² is finite S_m must fall as m grows, for Norm under the bound of
Azuma and Hoeffding; for p = 0.4 it is not, nothing promises a fall, and the same criterion must reject it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from alrc_lab.experiments.recorder import Recorder
from alrc_lab.experiments.theory import evidence, methods
from alrc_lab.experiments.theory.criteria import Claim, Criterion, estimate
from alrc_lab.experiments.theory.methods import Method

ENTRY = "alrc_lab.experiments.theory.noise:run"
EXCLUDED = ()
STREAM = 2
BLOCK = 250


@dataclass(frozen=True)
class Config:
    """Settings and criteria of E2."""

    methods: tuple[str, ...] = ("norm", "none", "agc", "alrc")
    """Methods; columns of the first have no suffix."""
    thresholds: tuple[float, ...] = (1.0, 0.0, 0.5, 3.0)
    """Their λ, or n of ALRC; nothing is made of that of `none`."""
    exponents: tuple[float, ...] = (0.75, 0.4)
    """p in γ_n = 1 / (n + 1)^p; the last, with Σγ² infinite, is the control."""
    seeds: tuple[int, ...] = (4_000, 4_000, 4_000, 500)
    """Runs of each method."""
    steps: int = 5_000
    """Number of updates N."""
    starts: tuple[int, ...] = (0, 10, 100, 1_000)
    """m."""
    start: float = 2.0
    """θ_0."""
    rare: float = 0.1
    """Probability q of a large x."""
    height: float = 10.0
    """The large x, K."""
    delta: float = 0.01
    """Probability with which the bound may be passed."""
    fall: float = 0.2
    """Ratio of the 99 % quantiles of S at the last and the first m below which the noise counts as dying out."""
    seed: int = 2026
    """Seed of every random stream. Pilots used others, so that criteria were fixed before these numbers were seen."""


def pile_up(method: Method, exponent: float, seeds: int, config: Config) -> np.ndarray:
    """Run gradient descent and follow its noise.

    Args:
        method: The method.
        exponent: p.
        seeds: Runs.
        config: Settings.

    Returns:
        S_m, shape (starts, seeds).
    """
    generator = np.random.default_rng(
        [STREAM, config.seed, seeds]
    )  # the same examples for every method of so many seeds
    theta = np.full(seeds, config.start)
    state = method.start(seeds)
    gamma = methods.steps(1.0, exponent, config.steps)
    atoms = np.array([0.0, config.height])[:, None]
    chances = np.array([1 - config.rare, config.rare])[:, None]
    total, is_large = np.zeros(seeds), np.empty(0)
    before = np.zeros((len(config.starts), seeds))
    largest = np.zeros((len(config.starts), seeds))
    for n in range(config.steps):
        if n % BLOCK == 0:
            is_large = generator.random((BLOCK, seeds)) < config.rare
        raw = theta - atoms
        if method.is_of_losses:
            scale = np.stack([method.weigh(0.5 * (r * r)[:, None], state, is_learning=False)[0][:, 0] for r in raw])
            clipped = scale * raw
        else:
            both = np.broadcast_to(theta, raw.shape)
            clipped = method.clip({"theta": raw}, {"theta": both}, lead=2)["theta"]
        chosen = is_large[n % BLOCK]
        step = np.where(chosen, clipped[1], clipped[0])
        noise = step - np.sum(chances * clipped, 0)
        if method.is_of_losses:
            own = np.where(chosen, raw[1], raw[0])
            state = method.weigh(0.5 * (own * own)[:, None], state)[1]
        for i, first in enumerate(config.starts):
            if n == first:
                before[i] = total
        total = total + gamma[n] * noise
        active = sum(first <= n for first in config.starts)
        np.maximum(largest[:active], np.abs(total - before[:active]), out=largest[:active])
        theta = theta - gamma[n] * step
    return largest


def bound(threshold: float, gamma: np.ndarray, first: int, delta: float) -> float:
    """Return what |Σ γ_n M_{n+1}| passes with probability δ at most: |g/c| ≤ λ, Azuma and Hoeffding."""
    return threshold * math.sqrt(2 * float(np.sum(gamma[first:] ** 2)) * math.log(2 / delta))


def run(config: dict[str, Any], recorder: Recorder) -> dict[str, Any]:
    """Follow the noise of every method and exponent.

    Args:
        config: A `Config` as a dictionary.
        recorder: Where rows and progress go.

    Returns:
        `diverged_at`, always None, and the `summary` that the claims name.
    """
    settings = Config(**{key: value for key, value in config.items() if key != "criteria"})
    told: dict[str, float] = {}
    table = {"step": np.arange(1, len(settings.starts) + 1), "m": np.array(settings.starts, float)}
    number = len(settings.methods) * len(settings.exponents)
    for place, (key, threshold, seeds) in enumerate(
        zip(settings.methods, settings.thresholds, settings.seeds, strict=True)
    ):
        for turn, exponent in enumerate(settings.exponents):
            found = pile_up(methods.make(key, threshold), exponent, seeds, settings)
            suffix = f"p{round(100 * exponent):02d}" + (f"_{key}" if place else "")
            for percent in (50, 90, 99):
                table[f"q{percent}_{suffix}"] = np.quantile(found, percent / 100, axis=1)
            name = f"{key}_{suffix[:3]}"
            ratio = evidence.bootstrap([found[-1], found[0]], _ratio, [STREAM, settings.seed, place, turn, 1])
            told |= {f"fall_{part}_{name}": value for part, value in ratio.items()}
            told |= {f"fall_{name}": float(_ratio(found[-1], found[0])), f"n_{name}": seeds}
            told |= {
                f"q99_{first}_{name}": float(q)
                for first, q in zip(settings.starts, table[f"q99_{suffix}"], strict=True)
            }
            if key == "norm":
                gamma = methods.steps(1.0, exponent, settings.steps)
                bounds = [bound(threshold, gamma, first, settings.delta) for first in settings.starts]
                table[f"bound_{suffix}"] = np.array(bounds)
                told |= {f"bound_{first}_{name}": t for first, t in zip(settings.starts, bounds, strict=True)}
                beyond = [evidence.share_of(int(np.sum(s > t)), seeds) for s, t in zip(found, bounds, strict=True)]
                worst = max(beyond, key=lambda share: share["share"])
                told |= {f"beyond_{part}_{name}": value for part, value in worst.items()}
            recorder.progress(place * len(settings.exponents) + turn + 1, number)
    recorder.log(table)
    return {"diverged_at": None, "summary": told}


def _ratio(late: np.ndarray, early: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return the ratio of the 99 % quantiles."""
    return np.quantile(late, 0.99, axis=axis) / np.quantile(early, 0.99, axis=axis)


def claims(config: Config) -> list[dict[str, Any]]:
    """Return the claims of E2 as study.json holds them."""
    found: list[Claim] = []
    for key, threshold in zip(config.methods, config.thresholds, strict=True):
        for exponent in config.exponents:
            name = f"{key}_p{round(100 * exponent):02d}"
            words = ("" if key == "none" else f"threshold {threshold:g}, ") + f"γ_n = (n + 1)^−{exponent:g}"
            is_control = exponent <= 0.5
            keys = (f"fall_{name}", f"fall_low_{name}", f"fall_high_{name}")
            found.append(
                Claim(
                    f"E2-fall-{name}",
                    key,
                    "The martingale noise of clipped gradients vanishes asymptotically.",
                    estimate(f"99 % quantile of S_m, m = {config.starts[-1]:,}, ÷ that of S_0", keys, f"n_{name}"),
                    [Criterion(f"fall_high_{name}", "<", config.fall)],
                    [Criterion(f"fall_low_{name}", ">=", config.fall)],
                    "inference" if key in ("none", "alrc") else "read",
                    "" if key in ("none", "alrc") else "Lemma 3",
                    words,
                    key in ("norm", "agc") or (key == "none" and is_control),
                    "must contradict" if is_control and key in ("norm", "none") else None,
                    {
                        "none": "examples of finite variance need no clipping for this",
                        "alrc": "the same, with ALRC",
                    }.get(key, ""),
                )
            )
            if key == "norm":
                keys = (f"beyond_share_{name}", f"beyond_low_{name}", f"beyond_high_{name}")
                found.append(
                    Claim(
                        f"E2-bound-{name}",
                        key,
                        f"The noise stays under Azuma's bound with probability {1 - config.delta:g}.",
                        estimate("largest share of runs beyond the bound, over m", keys, f"n_{name}"),
                        [Criterion(f"beyond_low_{name}", "<=", config.delta)],
                        [Criterion(f"beyond_low_{name}", ">", config.delta)],
                        "inference",
                        "",
                        words,
                    )
                )
    return [claim.to_json("E2") for claim in found]
