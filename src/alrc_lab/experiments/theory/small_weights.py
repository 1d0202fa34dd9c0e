"""E5: whether very small weights are updated with larger steps, and whether that helps where gradients vanish.

One part takes a unit whose gradient is far above every cap and lets its weights shrink over six decades: how do the
absolute and the relative step depend on ‖W‖? `hypothetical` amplifies (c < 1) and is no rule of this library; it shows
what the sentence would need. The other part trains deep tanh networks that begin with small weights, and counts the
steps until the loss has halved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from alrc.rules import AGC, ALRC
from alrc_lab.experiments.recorder import Recorder
from alrc_lab.experiments.theory import evidence, methods
from alrc_lab.experiments.theory.criteria import Claim, Criterion, Statistic, estimate
from alrc_lab.experiments.theory.methods import Arrays, Method

ENTRY = "alrc_lab.experiments.theory.small_weights:run"
EXCLUDED = ()
STREAM = 5
FLOOR = AGC().eps
"""ε, the floor of AGC's weight norms."""


@dataclass(frozen=True)
class Config:
    """Settings and criteria of E5."""

    variants: tuple[str, ...] = ("agc", "norm", "alrc", "hypothetical")
    """What is measured on single units."""
    thresholds: tuple[float, ...] = (0.1, 0.1, 3.0, 0.1)
    """Their λ, or n of ALRC."""
    sizes: int = 61
    """Weight norms from 1e-6 to 1, evenly spaced on a logarithmic axis."""
    gradient: float = 10.0
    """Norm of every gradient; above all caps."""
    slope_margin: float = 0.01
    """How far a fitted exponent may lie from the predicted one."""
    methods: tuple[str, ...] = ("none", "norm", "agc", "alrc")
    """Methods that train deep networks."""
    training_thresholds: tuple[float, ...] = (0.0, 0.1, 0.01, 3.0)
    """Their λ, or n of ALRC."""
    depth: int = 8
    """Layers of the deep network."""
    width: int = 4
    """Units of a hidden layer."""
    shrink: float = 0.4
    """Factor on the usual size of the first weights."""
    rate: float = 0.3
    """Step size γ, constant."""
    examples: int = 16
    """Examples of the fixed sample, all used in every step."""
    seeds: int = 50
    """Runs of each method."""
    steps: int = 4_000
    """Number of updates; a run that has not halved its loss by then counts with this many."""
    target: float = 0.5
    """Share of the first loss that is to be reached."""
    alpha: float = 0.05
    """Level of the tests."""
    seed: int = 2026
    """Seed of every random stream. Pilots used others, so that criteria were fixed before these numbers were seen."""


def step_sizes(variant: str, threshold: float, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Return weight norms, and the norms of the clipped gradients of units of these weights."""
    sizes = np.geomspace(1e-6, 1, config.sizes)
    weights = {"first.weight": np.stack([sizes, np.zeros_like(sizes)], -1)[None]}
    gradients = {"first.weight": np.full_like(weights["first.weight"], config.gradient / math.sqrt(2))}
    if variant == "hypothetical":
        floored = np.maximum(sizes, FLOOR)
        return sizes, config.gradient * threshold / floored  # c = max(‖W‖, ε) / λ: below 1 for small weights
    if variant == "alrc":
        rule = ALRC(threshold, start=(1.0, 2.0))
        loss = np.full((len(sizes), 1), 100.0)  # a spike: mean 1, deviation 1
        scale, _ = Method("alrc", rule).weigh(loss, rule.init(), is_learning=False)
        return sizes, config.gradient * scale[:, 0]
    method = methods.make(variant, threshold)
    if variant == "norm":
        lone = {name: array[0][:, None, :] for name, array in gradients.items()}
        clipped = method.clip(lone, {name: array[0][:, None, :] for name, array in weights.items()})
        return sizes, np.sqrt(np.sum(clipped["first.weight"][:, 0] ** 2, -1))
    clipped = method.clip(gradients, weights)["first.weight"][0]
    return sizes, np.sqrt(np.sum(clipped**2, -1))


def deep_losses(method: Method, config: Config) -> np.ndarray:
    """Train deep tanh networks on all examples of a fixed sample; returns losses, shape (steps + 1, seeds)."""
    generator = np.random.default_rng([STREAM, config.seed, 0])
    shapes = [(config.width, config.width)] * (config.depth - 1) + [(1, config.width)]
    weights: Arrays = {
        ("last" if i == config.depth - 1 else f"layer{i}") + ".weight": config.shrink
        * generator.standard_normal((config.seeds, *shape))
        / math.sqrt(config.width)
        for i, shape in enumerate(shapes)
    }
    x = generator.standard_normal((config.seeds, config.examples, config.width))
    y = np.tanh(x @ generator.standard_normal((config.seeds, config.width, 1)))[..., 0]
    state, told = method.start(config.seeds), []
    for n in range(config.steps + 1):
        layers = [x]
        for array in weights.values():
            layers.append(np.tanh(layers[-1] @ array.transpose(0, 2, 1)))
        residual = layers[-1][..., 0] - y
        told.append(0.5 * np.mean(residual**2, 1))
        if n == config.steps:
            break
        scale, state = method.weigh(0.5 * residual**2, state)
        inner = (scale * residual / config.examples)[..., None] * (1 - layers[-1] ** 2)
        gradients: Arrays = {}
        for i, (name, array) in reversed(list(enumerate(weights.items()))):
            gradients[name] = inner.transpose(0, 2, 1) @ layers[i]
            inner = (inner @ array) * (1 - layers[i] ** 2)
        clipped = method.clip(gradients, weights)
        weights = {name: array - config.rate * clipped[name] for name, array in weights.items()}
    return np.stack(told)


def _slope(sizes: np.ndarray, steps: np.ndarray) -> float:
    """Return the exponent of a power law fitted to the points."""
    line: Any = stats.linregress(np.log(sizes), np.log(steps))
    return float(line.slope)


def run(config: dict[str, Any], recorder: Recorder) -> dict[str, Any]:
    """Measure single units, and train deep networks.

    Args:
        config: A `Config` as a dictionary.
        recorder: Where rows and progress go.

    Returns:
        `diverged_at`, always None, and the `summary` that the claims name.
    """
    settings = Config(**{key: value for key, value in config.items() if key != "criteria"})
    total = len(settings.variants) + len(settings.methods)
    told: dict[str, float] = {}
    table: dict[str, np.ndarray] = {"step": np.arange(1, settings.sizes + 1)}
    for done, (variant, threshold) in enumerate(zip(settings.variants, settings.thresholds, strict=True)):
        sizes, clipped = step_sizes(variant, threshold, settings)
        ratio = clipped / settings.gradient
        table |= {"weight_norm": sizes, f"absolute_{variant}": clipped}
        table |= {f"relative_{variant}": clipped / sizes, f"ratio_{variant}": ratio}
        parts = {"below": sizes <= FLOOR, "above": sizes >= FLOOR}
        for part, chosen in parts.items():
            told[f"absolute_{part}_{variant}"] = _slope(sizes[chosen], clipped[chosen])
            told[f"relative_{part}_{variant}"] = _slope(sizes[chosen], (clipped / sizes)[chosen])
        wanted = {"absolute_below": 0, "absolute_above": 1, "relative_below": -1, "relative_above": 0}
        if variant == "agc":
            told["slope_error_agc"] = max(abs(told[f"{name}_agc"] - slope) for name, slope in wanted.items())
        told |= {
            f"amplified_{part}_{variant}": v for part, v in evidence.share_of(np.sum(ratio > 1), len(ratio)).items()
        }
        told[f"n_units_{variant}"] = len(sizes)
        recorder.progress(done + 1, total)
    times: dict[str, np.ndarray] = {}
    for done, (key, threshold) in enumerate(zip(settings.methods, settings.training_thresholds, strict=True)):
        losses = deep_losses(methods.make(key, threshold), settings)
        is_there = losses <= settings.target * losses[0]
        times[key] = np.where(is_there.any(0), np.argmax(is_there, 0), settings.steps).astype(float)
        told |= {f"unreached_{key}": int(np.sum(~is_there.any(0))), f"n_{key}": settings.seeds}
        told |= {f"time_{part}_{key}": value for part, value in evidence.median_of(times[key]).items()}
        if key != "none":
            logs = np.log(times[key] / times["none"])
            told |= {f"log_time_{part}_{key}": value for part, value in evidence.mean_of(logs).items()}
            told[f"log_time_p_{key}"] = evidence.difference_p(logs)
        recorder.progress(len(settings.variants) + done + 1, total)
    told |= evidence.holm({f"log_time_p_{key}": told[f"log_time_p_{key}"] for key in settings.methods if key != "none"})
    recorder.log(table)
    return {"diverged_at": None, "summary": told}


def claims(config: Config) -> list[dict[str, Any]]:
    """Return the claims of E5 as study.json holds them."""
    amplified = "Very small weights are updated with larger step sizes: a gradient comes out larger than it went in."
    found = [
        Claim(
            "E5-relative-agc",
            "agc",
            "Below the floor ε, the relative step of small weights grows as they shrink; above, it is constant.",
            Statistic("largest error of four fitted exponents", "slope_error_agc", n="n_units_agc"),
            [Criterion("slope_error_agc", "<=", config.slope_margin)],
            [Criterion("slope_error_agc", ">", config.slope_margin)],
            "inference",
            "one reading of the abstract",
            "exponents of absolute and relative step in ‖W‖: 0 and −1 below ε, 1 and 0 above",
        )
    ]
    for variant, threshold in zip(config.variants, config.thresholds, strict=True):
        is_real = variant != "hypothetical"
        words = f"{'n' if variant == 'alrc' else 'λ'} = {threshold:g}"
        found.append(
            Claim(
                f"E5-amplified-{variant}",
                variant if is_real else "agc",
                amplified,
                estimate(
                    "share of units whose gradient is enlarged",
                    [f"amplified_{part}_{variant}" for part in ("share", "low", "high")],
                    f"n_units_{variant}",
                ),
                [Criterion(f"amplified_low_{variant}", ">", 0.0)],
                [Criterion(f"amplified_share_{variant}", "<=", 0.0)],
                "read",
                "abstract, taken literally",
                words if is_real else f"hypothetical c = max(‖W‖, ε) ÷ λ, {words}",
                is_real and variant != "alrc",
                None if is_real else "must be consistent",
                "" if is_real else "what the sentence would need; no rule that is in use",
            )
        )
    for key, threshold in zip(config.methods, config.training_thresholds, strict=True):
        if key == "none":
            continue
        found.append(
            Claim(
                f"E5-time-{key}",
                key,
                "Gradient clipping combats vanishing gradients.",
                estimate(
                    "mean log ratio of steps to half the loss, with ÷ without clipping",
                    [f"log_time_{part}_{key}" for part in ("mean", "low", "high")],
                    f"n_{key}",
                    p=f"log_time_p_{key}_holm",
                    places=3,
                ),
                [Criterion(f"log_time_high_{key}", "<", 0.0), Criterion(f"log_time_p_{key}_holm", "<", config.alpha)],
                [Criterion(f"log_time_low_{key}", ">", 0.0), Criterion(f"log_time_p_{key}_holm", "<", config.alpha)],
                "inference" if key == "alrc" else "read",
                "" if key == "alrc" else "abstract",
                f"{'n' if key == 'alrc' else 'λ'} = {threshold:g}, deep tanh network, small first weights",
                key != "alrc",
                reading="slower where above 0" if key == "alrc" else "",
            )
        )
    return [claim.to_json("E5") for claim in found]
