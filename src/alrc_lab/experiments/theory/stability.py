"""E1: whether clipped training stays bounded where plain gradient descent does not.

A ReLU network of 4 inputs, 8 hidden units and one output learns a linear map from single examples, with inputs and
noise of Student's t distribution; the fewer degrees of freedom, the heavier the tails. A run fails when a weight is not
finite or the norm of all weights passes a bound. The bound is far below what the steps could add up to, so that a
finite horizon proves nothing by itself; and the loss is told, because frozen weights are stable too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from alrc_lab.experiments.recorder import Recorder
from alrc_lab.experiments.theory import evidence, methods
from alrc_lab.experiments.theory.criteria import Claim, Criterion, estimate
from alrc_lab.experiments.theory.keeping import Kept
from alrc_lab.experiments.theory.methods import Method, written
from alrc_lab.experiments.theory.perceptron import Perceptron, norm_of

ENTRY = "alrc_lab.experiments.theory.stability:run"
EXCLUDED = ()
STREAM = 1
TEACHER = np.array([1.0, -1.0, 0.5, 0.5])
"""The linear map to be learned."""
BLOCK = 50


@dataclass(frozen=True)
class Config:
    """Settings and criteria of E1."""

    methods: tuple[str, ...] = ("none", "norm", "agc", "agc_last", "alrc")
    """Methods."""
    thresholds: tuple[float, ...] = (0.0, 5.0, 0.1, 0.1, 3.0)
    """Their λ, or n of ALRC; nothing is made of the first."""
    degrees: tuple[float | None, ...] = (None, 3.0, 1.5)
    """Degrees of freedom of inputs and noise; none is normal."""
    seeds: int = 500
    """Runs of each method and law: no failure among 500 has an upper bound of 0.74 %."""
    steps: int = 5_000
    """Number of updates N."""
    gain: float = 1.0
    """γ_0."""
    exponent: float = 0.6
    """p in γ_n = γ_0 / (n + 1)^p."""
    noise: float = 0.5
    """Factor on the noise of the targets."""
    bound: float = 30.0
    """Norm of all weights beyond which a run has failed."""
    stable_below: float = 0.01
    """Share of failures that still counts as stable with high probability."""
    growth: float = 1.25
    """Ratio of the median largest norms at N and N/10 up to which the norm counts as flat."""
    alpha: float = 0.05
    """Level of the paired tests, after Holm's correction."""
    points: int = 60
    """Steps that are logged."""

    def __post_init__(self) -> None:
        envelope = (
            self.thresholds[self.methods.index("norm")] * methods.steps(self.gain, self.exponent, self.steps).sum()
        )
        if envelope < 2 * self.bound:
            raise ValueError(
                f"steps of Norm add up to {envelope:g}, less than twice the bound {self.bound:g}: no run could fail. "
                "Take more steps, a larger threshold or a smaller bound."
            )

    seed: int = 2026
    """Seed of every random stream. Pilots used others, so that criteria were fixed before these numbers were seen."""


def law_name(degrees: float | None) -> str:
    """Name a law in columns and summaries."""
    return f"df{written(math.inf if degrees is None else degrees)}"


def train(method: Method, config: Config) -> dict[str, np.ndarray]:
    """Train all runs of one method.

    Args:
        method: The method.
        config: Settings.

    Returns:
        Arrays over (logged steps, laws, seeds): `step` (steps alone), `largest` (largest norm so far, inf after a
        failure) and `residual` (|r| of the last example, NaN after a failure).
    """
    network = Perceptron(len(TEACHER), 8, "relu")
    laws, seeds = len(config.degrees), config.seeds
    first = network.start(seeds, np.random.default_rng([STREAM, config.seed, 0]))
    weights = {name: np.concatenate([array] * laws) for name, array in first.items()}
    generators = [np.random.default_rng([STREAM, config.seed, 1, i]) for i in range(laws)]
    state = method.start(laws * seeds)
    gamma = methods.steps(config.gain, config.exponent, config.steps)
    wanted = methods.log_spaced(config.steps, config.points)
    wanted = np.unique([*wanted, config.steps // 10])
    largest, is_lost = norm_of(weights), np.zeros(laws * seeds, bool)
    x = y = np.empty(0)
    told: dict[str, list[np.ndarray]] = {"largest": [], "residual": []}
    for n in range(config.steps):
        if n % BLOCK == 0:
            drawn = [
                _draw(degrees, (BLOCK, seeds, len(TEACHER) + 1), generator)
                for degrees, generator in zip(config.degrees, generators, strict=True)
            ]
            x = np.concatenate([block[..., :-1] for block in drawn], 1)
            y = x @ TEACHER + config.noise * np.concatenate([block[..., -1] for block in drawn], 1)
        now = x[n % BLOCK][:, None]
        done = network.forward(weights, now, y[n % BLOCK][:, None])
        scale, state = method.weigh(0.5 * done.residual**2, state)
        gradients = method.clip(network.mean_gradient(weights, now, done, scale), weights)
        weights = {name: array - gamma[n] * gradients[name] for name, array in weights.items()}
        size = norm_of(weights)
        is_lost |= ~(size <= config.bound)
        largest = np.where(is_lost, math.inf, np.maximum(largest, size))
        if is_lost.any():  # what is lost is frozen at zero, so that it does not overflow
            for array in weights.values():
                array[is_lost] = 0.0
        if n + 1 in wanted:
            told["largest"].append(largest.reshape(laws, seeds))
            told["residual"].append(np.where(is_lost, math.nan, np.abs(done.residual[:, 0])).reshape(laws, seeds))
    return {"step": wanted, **{name: np.stack(arrays) for name, arrays in told.items()}}


def _draw(degrees: float | None, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Draw from Student's t, or the normal distribution."""
    return generator.standard_normal(shape) if degrees is None else generator.standard_t(degrees, shape)


def _median(x: np.ndarray) -> np.ndarray:
    """Return the median over seeds of those that are left; NaN where none is."""
    kept = np.where(np.isfinite(x), x, math.nan)
    is_empty = np.all(np.isnan(kept), axis=-1)
    return np.where(is_empty, math.nan, np.nanmedian(np.where(is_empty[..., None], 0.0, kept), -1))


def run(config: dict[str, Any], recorder: Recorder) -> dict[str, Any]:
    """Train every method on every law.

    Args:
        config: A `Config` as a dictionary.
        recorder: Where rows and progress go.

    Returns:
        `diverged_at`, always None, and the `summary` that the claims name.
    """
    settings = Config(**{key: value for key, value in config.items() if key != "criteria"})
    gamma = np.cumsum(methods.steps(settings.gain, settings.exponent, settings.steps))
    table: dict[str, np.ndarray] = {}
    told: dict[str, float] = {}
    lost: dict[str, np.ndarray] = {}
    kept = Kept(recorder, len(settings.methods))
    for key, threshold in zip(settings.methods, settings.thresholds, strict=True):
        runs = kept.part(key, lambda key=key, threshold=threshold: train(methods.make(key, threshold), settings))
        envelope = settings.thresholds[settings.methods.index("norm")] * gamma[runs["step"] - 1]
        table |= {"step": runs["step"], "envelope": envelope}
        tenth = int(np.searchsorted(runs["step"], settings.steps // 10))
        for i, degrees in enumerate(settings.degrees):
            name = f"{key}_{law_name(degrees)}"
            largest, residual = runs["largest"][:, i], runs["residual"][:, i]
            typical = _median(largest)
            table[f"max_norm_{name}"] = typical
            table[f"failed_{name}"] = np.mean(np.isinf(largest), -1)
            table[f"residual_{name}"] = _median(residual)
            lost[name] = np.isinf(largest[-1])
            told |= {
                f"failed_{part}_{name}": v for part, v in evidence.share_of(lost[name].sum(), settings.seeds).items()
            }
            told[f"failures_{name}"] = int(lost[name].sum())
            told[f"n_{name}"] = settings.seeds
            capped = np.median(np.minimum(largest, settings.bound), -1)  # a number also where no run is left
            told[f"growth_{name}"] = float(capped[-1] / capped[tenth])
            told[f"max_norm_{name}"] = float(typical[-1])
            last = residual[runs["step"] > settings.steps // 10]
            told[f"residual_{name}"] = float(_median(last.reshape(-1)))
    told["envelope"] = float(table["envelope"][-1])
    pairs = {f"paired_p_{name}": pair for name, pair in _pairs(settings, lost).items()}
    told |= {key: evidence.paired_p(*pair) for key, pair in pairs.items()}
    told |= {f"fewer_{key[9:]}": float(np.mean(a) - np.mean(b)) for key, (a, b) in pairs.items()}
    told |= evidence.holm({key: told[key] for key in pairs})
    recorder.log(table)
    return {"diverged_at": None, "summary": told}


def _pairs(config: Config, lost: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the failures of no method beside those of every method, on the same seeds and examples."""
    return {
        f"{key}_{law_name(degrees)}": (lost[f"none_{law_name(degrees)}"], lost[f"{key}_{law_name(degrees)}"])
        for key in config.methods
        if key != "none"
        for degrees in config.degrees
    }


_SENTENCES = {
    "none": "Gradient descent without clipping is numerically stable with high probability.",
    "norm": "Gradient descent with norm-based clipping is numerically stable with high probability.",
    "agc": "Gradient descent with adaptive clipping is numerically stable with high probability.",
    "agc_last": "Adaptive clipping that leaves out the last layer is numerically stable with high probability.",
    "alrc": "Gradient descent with limited losses is numerically stable with high probability.",
}


def claims(config: Config) -> list[dict[str, Any]]:
    """Return the claims of E1 as study.json holds them."""
    found: list[Claim] = []
    for key, threshold in zip(config.methods, config.thresholds, strict=True):
        for degrees in config.degrees:
            name = f"{key}_{law_name(degrees)}"
            law = "normal inputs and noise" if degrees is None else f"Student's t, {degrees:g} degrees of freedom"
            keys = [f"failed_{part}_{name}" for part in ("share", "low", "high")]
            flat = [] if key == "none" else [Criterion(f"growth_{name}", "<=", config.growth)]
            p_value = None if key == "none" else f"paired_p_{name}_holm"
            found.append(
                Claim(
                    f"E1-{name}",
                    key,
                    _SENTENCES[key],
                    estimate("share of failed runs", keys, f"n_{name}", p=p_value),
                    [Criterion(f"failed_high_{name}", "<", config.stable_below), *flat],
                    [Criterion(f"failed_low_{name}", ">", config.stable_below)],
                    "inference" if key in ("none", "alrc") else "read",
                    "" if key in ("none", "alrc") else "abstract",
                    f"{'' if key == 'none' else f'threshold {threshold:g}, '}{law}",
                    key in ("none", "norm", "agc"),
                    "must contradict" if key == "none" and degrees is not None else None,
                    {
                        "agc_last": "the last layer is not clipped, so no clipping holds it",
                        "alrc": "limits are relative to earlier losses",
                    }.get(key, ""),
                )
            )
    return [claim.to_json("E1") for claim in found]
