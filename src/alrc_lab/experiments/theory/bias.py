"""E3: where clipped gradient descent ends, E[g/c] = 0, and whether E[g] = 0 there.

The loss is ½ (θ - x)², so its minimiser is E[x] and everything is known. For x = K with probability q, else 0, a norm
clipped at λ has the root θ* = λ q / (1 - q), and AGC, whose cap is λ max(|θ|, ε), has λ ε q / (1 - q). On symmetric x
both roots are E[x]. Then the question of users: at the same share of limited examples, how far does each rule move the
solution? Every method sees the same examples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from alrc_lab.experiments.recorder import Recorder
from alrc_lab.experiments.theory import evidence, methods
from alrc_lab.experiments.theory.bias_claims import claims
from alrc_lab.experiments.theory.bias_setting import (
    DEVIATION,
    LAWS,
    MEAN,
    Config,
    draw,
    families,
    name_of,
    predicted_root,
    thresholds_of,
)
from alrc_lab.experiments.theory.keeping import Kept
from alrc_lab.experiments.theory.methods import Method, written

__all__ = ["ENTRY", "EXCLUDED", "Config", "Ending", "claims", "descend", "run"]

ENTRY = "alrc_lab.experiments.theory.bias:run"
EXCLUDED = ()
STREAM = 3
"""First number of the seeds of this experiment's random streams; the second is the law's place in `LAWS`."""

BLOCK = 250


@dataclass(frozen=True)
class Ending:
    """Where the runs of one setting ended, and how often they were limited."""

    theta: np.ndarray
    """θ_N, shape (seeds,)."""
    halfway: np.ndarray
    """θ_{N/2}."""
    largest: np.ndarray
    """max |θ_n|."""
    fraction: np.ndarray
    """Share of examples limited in the second half."""


def descend(method: Method, laws: tuple[str, ...], seeds: int, number: int, config: Config) -> dict[str, Ending]:
    """Run stochastic gradient descent on one number, for all laws and seeds at once.

    Args:
        method: The method.
        laws: Laws of x; every method sees the same examples.
        seeds: Runs for each law.
        number: Updates.
        config: Settings of the descent.

    Returns:
        The ending for each law.
    """
    generators = [np.random.default_rng([STREAM, config.seed, LAWS.index(law), seeds, number]) for law in laws]
    theta = np.full(len(laws) * seeds, config.start)
    halfway, largest, hits = theta.copy(), np.abs(theta), np.zeros_like(theta)
    state = method.start(len(theta))
    gamma = methods.steps(config.gain, config.exponent, number)
    for first in range(0, number, BLOCK):
        size = min(BLOCK, number - first)
        x = np.concatenate([draw(law, (size, seeds), config, g) for law, g in zip(laws, generators, strict=True)], 1)
        for n in range(first, first + size):
            raw = theta - x[n - first]
            if method.is_of_losses:
                scale, state = method.weigh(0.5 * (raw * raw)[:, None], state)
                scale = scale[:, 0]
            else:
                scale = method.factors({"theta": raw}, {"theta": theta}).get("theta", np.ones(1))
            theta = theta - gamma[n] * (scale * raw)
            np.maximum(largest, np.abs(theta), out=largest)
            if n == number // 2:
                halfway = theta
            if n >= number // 2:
                hits += scale != 1
    hits /= number - number // 2
    return {
        law: Ending(*(field[i * seeds : (i + 1) * seeds] for field in (theta, halfway, largest, hits)))
        for i, law in enumerate(laws)
    }


def _descend_once(
    kept: Kept, key: str, threshold: float | None, laws: tuple[str, ...], seeds: int, number: int, config: Config
) -> dict[str, Ending]:
    """Return what `descend` does, from the checkpoint if it is there."""

    def make() -> dict[str, np.ndarray]:
        endings = descend(methods.make(key, threshold), laws, seeds, number, config)
        return {f"{law} {field}": array for law, ending in endings.items() for field, array in vars(ending).items()}

    made = kept.part(f"{key} {threshold} {seeds} {number} {' '.join(laws)}", make)
    names = [field.name for field in fields(Ending)]
    return {law: Ending(**{name: made[f"{law} {name}"] for name in names}) for law in laws}


def _row(config: Config, key: str, threshold: float | None, law: str, ending: Ending) -> dict[str, float]:
    """Return one row of the metrics."""
    root = evidence.mean_of(ending.theta)
    has_mean = law != "cauchy"
    shift = MEAN if has_mean else math.nan
    return {
        "method_index": float(config.methods.index(key)),
        "law_index": float(LAWS.index(law)),
        "threshold": math.inf if threshold is None else threshold,
        "root_predicted": predicted_root(config, key, threshold, law) if law in LAWS[:3] else math.nan,
        "root_mean": root["mean"],
        "root_low": root["low"],
        "root_high": root["high"],
        "root_median": float(np.median(ending.theta)),
        "gradient_mean": root["mean"] - shift,
        "gradient_low": root["low"] - shift,
        "gradient_high": root["high"] - shift,
        "fraction_clipped": float(np.mean(ending.fraction)),
        "bias": root["mean"] - shift,
        "bias_in_deviations": (root["mean"] - shift) / DEVIATION.get(law, math.nan),
        "symmetric": float(law in ("normal", "cauchy")),
        "matched": 0.0,
    }


def _tell_main(config: Config, key: str, threshold: float | None, law: str, ending: Ending) -> dict[str, float]:
    """Return the numbers of one setting of the main part, named for the summary."""
    name = name_of(key, threshold, law)
    told: dict[str, float] = {f"n_{name}": len(ending.theta)}
    told[f"fraction_{name}"] = float(np.mean(ending.fraction))
    middle = evidence.median_of(ending.theta)
    told |= {f"theta_{part}_{name}": value for part, value in middle.items()}
    if law == "cauchy":
        quartiles = np.quantile(ending.theta, [0.25, 0.75])
        told[f"iqr_{name}"] = float(quartiles[1] - quartiles[0])
        lost = evidence.share_of(int(np.sum(ending.largest > 1e3)), len(ending.theta))
        return told | {f"beyond_1000_{part}_{name}": value for part, value in lost.items()}
    told |= {f"root_{part}_{name}": value for part, value in evidence.mean_of(ending.theta).items()}
    slope = evidence.mean_of(ending.theta - MEAN)
    told |= {f"gradient_{part}_{name}": value for part, value in slope.items()}
    told[f"gradient_distance_{name}"] = evidence.least_distance(slope["low"], slope["high"])
    told[f"gradient_zero_p_{name}"] = evidence.equivalence_p(ending.theta, MEAN, config.margin)
    told[f"gradient_differs_p_{name}"] = evidence.difference_p(ending.theta, MEAN)
    root = predicted_root(config, key, threshold, law)
    if math.isnan(root):
        return told
    gap = evidence.mean_of(ending.theta - root)
    told |= {f"gap_{part}_{name}": value for part, value in gap.items()}
    told[f"gap_distance_{name}"] = evidence.least_distance(gap["low"], gap["high"])
    told[f"predicted_{name}"] = root
    told[f"equivalence_p_{name}"] = evidence.equivalence_p(ending.theta, root, config.margin)
    told |= {f"ratio_{part}_{name}": value / root for part, value in middle.items()}
    told[f"ratio_off_{name}"] = evidence.least_distance(told[f"ratio_low_{name}"] - 1, told[f"ratio_high_{name}"] - 1)
    late = float(np.median(ending.halfway))
    told[f"moving_{name}"] = abs(middle["median"] - late) / max(abs(late), 1e-300)
    return told


def _at_fraction(fractions: np.ndarray, samples: np.ndarray, wanted: float) -> np.ndarray | None:
    """Interpolate samples, linearly in the share of limited examples; None if it was not reached on both sides."""
    order = np.argsort(fractions)
    fractions, samples = fractions[order], samples[order]
    above = int(np.searchsorted(fractions, wanted))
    if above in (0, len(fractions)):
        return None
    weight = (wanted - fractions[above - 1]) / (fractions[above] - fractions[above - 1])
    return (1 - weight) * samples[above - 1] + weight * samples[above]


def _compare_matched(config: Config, kept: Kept) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Run the matched comparison; returns its rows and its part of the summary."""
    rows: list[dict[str, float]] = []
    told: dict[str, float] = {}
    biases: dict[tuple[str, str], dict[float, np.ndarray]] = {}
    for key in ("norm", "agc", "alrc"):
        grid = config.matched_alrc_thresholds if key == "alrc" else config.matched_gradient_thresholds
        runs = [
            _descend_once(kept, key, threshold, config.matched_laws, config.matched_seeds, config.matched_steps, config)
            for threshold in grid
        ]
        for law in config.matched_laws:
            for threshold, endings in zip(grid, runs, strict=True):
                rows.append({**_row(config, key, threshold, law, endings[law]), "matched": 1.0})
            fractions = np.array([np.mean(endings[law].fraction) for endings in runs])
            samples = np.stack([(endings[law].theta - MEAN) / DEVIATION[law] for endings in runs])
            found = {wanted: _at_fraction(fractions, samples, wanted) for wanted in config.matched_fractions}
            biases[key, law] = {wanted: sample for wanted, sample in found.items() if sample is not None}
    for (key, law), found in biases.items():
        for wanted, sample in found.items():
            name = f"{key}_{law}_{written(wanted)}"
            told |= {f"bias_{part}_{name}": value for part, value in evidence.mean_of(sample).items()}
            told[f"bias_distance_{name}"] = evidence.least_distance(told[f"bias_low_{name}"], told[f"bias_high_{name}"])
            told[f"bias_zero_p_{name}"] = evidence.equivalence_p(sample, 0.0, config.margin)
            told[f"n_bias_{name}"] = len(sample)
            rival = biases["norm", law].get(wanted)
            if key != "norm" and rival is not None:
                more = np.sign(sample.mean()) * sample - np.sign(rival.mean()) * rival
                told |= {f"more_than_norm_{part}_{name}": value for part, value in evidence.mean_of(more).items()}
    return rows, told


def run(config: dict[str, Any], recorder: Recorder) -> dict[str, Any]:
    """Run every setting of E3.

    Args:
        config: A `Config` as a dictionary.
        recorder: Where rows and progress go.

    Returns:
        `diverged_at`, always None, and the `summary` that the claims name.
    """
    settings = Config(**{key: value for key, value in config.items() if key != "criteria"})
    todo = [(key, threshold) for key in settings.methods for threshold in thresholds_of(settings, key)]
    rows: list[dict[str, float]] = []
    told: dict[str, float] = {}
    matched = 2 * len(settings.matched_gradient_thresholds) + len(settings.matched_alrc_thresholds)
    kept = Kept(recorder, len(todo) + matched)
    for key, threshold in todo:
        laws = LAWS[:3] if key != "agc" else LAWS[:2]
        endings = _descend_once(kept, key, threshold, laws, settings.seeds, settings.steps, settings)
        for law, ending in endings.items():
            rows.append(_row(settings, key, threshold, law, ending))
            told |= _tell_main(settings, key, threshold, law, ending)
    more_rows, more = _compare_matched(settings, kept)
    rows, told = rows + more_rows, told | more
    for members in families(settings).values():
        told |= evidence.holm({key: told[key] for key in members if key in told})
    table = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    recorder.log({"step": np.arange(1, len(rows) + 1), **table})
    return {"diverged_at": None, "summary": told}
