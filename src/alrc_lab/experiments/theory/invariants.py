"""E0: what the rules must do whatever the data: caps, envelopes, identity below the threshold, and edge cases.

Every check counts how often it was made and how often it was violated. Nothing here is statistical.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from alrc_lab.experiments.recorder import Recorder
from alrc_lab.experiments.theory import methods
from alrc_lab.experiments.theory.criteria import Claim, Criterion, Statistic
from alrc_lab.experiments.theory.methods import Arrays, Method

ENTRY = "alrc_lab.experiments.theory.invariants:run"
EXCLUDED = ()
STREAM = 0
SHAPES = {"first.weight": (5, 3), "first.bias": (5,), "last.weight": (1, 5), "last.bias": (1,)}
"""A network's parameters."""


@dataclass(frozen=True)
class Config:
    """Settings and criteria of E0."""

    methods: tuple[str, ...] = ("none", "norm", "agc", "agc_last", "alrc")
    """Methods."""
    thresholds: tuple[float, ...] = (0.0, 0.5, 0.1, 0.1, 3.0)
    """Their λ, or n of ALRC; nothing is made of the first."""
    examples: int = 20_000
    """Random gradients and weights, with sizes over twelve decades."""
    walks: int = 500
    """Walks of steps along random gradients."""
    steps: int = 300
    """Steps of a walk."""
    gain: float = 1.0
    """γ_0."""
    exponent: float = 0.6
    """p in γ_n = γ_0 / (n + 1)^p."""
    tolerance: float = 1e-12
    """Relative rounding that is no violation."""
    most_violations: int = 0
    """Violations that still count as none."""
    seed: int = 2026
    """Seed of every random stream. Pilots used others, so that criteria were fixed before these numbers were seen."""


Check = tuple[int, int]


def _count(is_violated: np.ndarray) -> Check:
    """Return the number of violations and of checks."""
    return int(np.sum(is_violated)), int(np.size(is_violated))


def draw(rows: int, generator: np.random.Generator) -> tuple[Arrays, Arrays]:
    """Draw gradients and weights of one network per row, with sizes from 1e-6 to 1e6 that vary by parameter."""

    def some() -> Arrays:
        return {
            name: generator.standard_normal((rows, *shape))
            * 10 ** generator.uniform(-6, 6, (rows, *(1 for _ in shape)))
            for name, shape in SHAPES.items()
        }

    return some(), some()


def _units(arrays: Arrays) -> dict[str, np.ndarray]:
    """Return the norm of every output unit; vectors are one."""
    return {
        name: np.sqrt(np.sum(array**2, tuple(range(1 + (array.ndim > 2), array.ndim))))
        for name, array in arrays.items()
    }


def _whole(arrays: Arrays) -> np.ndarray:
    """Return the norm over all parameters of each row."""
    return np.sqrt(sum(np.sum(array.reshape(len(array), -1) ** 2, 1) for array in arrays.values()))


def _full(method: Method, gradients: Arrays, weights: Arrays) -> Arrays:
    """Return the factor of every element."""
    factors = method.factors(gradients, weights)
    return {name: np.broadcast_to(factors.get(name, np.ones(1)), array.shape) for name, array in gradients.items()}


def check_gradients(method: Method, config: Config) -> dict[str, Check]:
    """Check a rule of gradients on random gradients, and on zeros and infinities."""
    threshold = config.thresholds[config.methods.index(method.key)]
    gradients, weights = draw(config.examples, np.random.default_rng([STREAM, config.seed, 0]))
    clipped, factors = method.clip(gradients, weights), _full(method, gradients, weights)
    slack = 1 + config.tolerance
    kept = [name for name in SHAPES if not (method.key == "agc_last" and name.startswith("last."))]
    found = {
        "factor": _count(np.concatenate([((f > 1) | (f < 0)).ravel() for f in factors.values()])),
        "finite": _count(np.concatenate([~np.isfinite(g).ravel() for g in clipped.values()])),
    }
    if method.key == "norm":
        before, after = _whole(gradients), _whole(clipped)
        below = {"all": before <= threshold}
        found["cap"] = _count(after > threshold * slack)
    else:
        sizes, caps = _units(gradients), _units(weights)
        caps = {name: threshold * np.maximum(cap, 1e-3) for name, cap in caps.items()}
        after = _units(clipped)
        found["cap"] = _count(np.concatenate([(after[name] > caps[name] * slack).ravel() for name in kept]))
        below = {name: sizes[name] <= caps[name] * (1 - 1e-12) for name in kept}
    changed = []
    for name in kept:
        is_below = below.get("all", below.get(name))
        assert is_below is not None
        shape = is_below.shape + (1,) * (gradients[name].ndim - is_below.ndim)
        changed.append((is_below.reshape(shape) & (clipped[name] != gradients[name])).ravel())
    found["identity"] = _count(np.concatenate(changed))
    nothing = {name: np.zeros_like(array[:100]) for name, array in gradients.items()}
    some = {name: array[:100] for name, array in weights.items()}
    still = method.clip(nothing, some)
    found["zero"] = _count(np.concatenate([(array != 0).ravel() for array in still.values()]))  # NaN ≠ 0 too
    return found


def count_infinite(method: Method, config: Config) -> dict[str, int]:
    """Count what becomes of gradients with an infinite element: passed on as they are, or turned into NaN."""
    gradients, weights = draw(100, np.random.default_rng([STREAM, config.seed, 1]))
    gradients["first.weight"][:, 0, 0] = np.inf
    with np.errstate(invalid="ignore"):
        clipped = method.clip(gradients, weights)["first.weight"][:, 0, 0]
    return {"infinite_passed": int(np.sum(np.isinf(clipped))), "infinite_to_nan": int(np.sum(np.isnan(clipped)))}


def check_walk(method: Method, config: Config) -> dict[str, Check]:
    """Check how far weights go along random gradients: λ Σγ for Norm, the product of 1 + γλ for AGC."""
    threshold = config.thresholds[config.methods.index(method.key)]
    generator = np.random.default_rng([STREAM, config.seed, 2])
    _, weights = draw(config.walks, generator)
    start, gone = {**weights}, 0.0
    far, grown = [], []
    slack = 1 + config.tolerance
    for gamma in methods.steps(config.gain, config.exponent, config.steps):
        gradients, _ = draw(config.walks, generator)
        clipped = method.clip(gradients, weights)
        before = _units(weights)
        weights = {name: array - gamma * clipped[name] for name, array in weights.items()}
        if method.key == "norm":
            gone += gamma * threshold
            moved = _whole({name: array - start[name] for name, array in weights.items()})
            # The difference of large weights is rounded to their last digit.
            far.append(moved > gone * slack + 1e-15 * _whole(weights) * config.steps)
        else:
            after = _units(weights)
            kept = [name for name in SHAPES if not (method.key == "agc_last" and name.startswith("last."))]
            grown += [
                (after[name] > (1 + gamma * threshold) * np.maximum(before[name], 1e-3) * slack).ravel()
                for name in kept
            ]
    return {"envelope": _count(np.concatenate(far))} if far else {"growth": _count(np.concatenate(grown))}


def check_losses(method: Method, config: Config) -> dict[str, Check]:
    """Check ALRC on random losses with spikes, zeros and infinities among them."""
    generator = np.random.default_rng([STREAM, config.seed, 3])
    state = method.start(config.walks)
    outside, unlike, raised, bad = [], [], [], []
    for n in range(config.steps):
        losses = np.exp(generator.standard_normal((config.walks, 1)))
        losses[generator.random(losses.shape) < 0.02] *= 1e6
        if n % 50 == 7:
            losses[:5] = [[np.inf], [np.nan], [0.0], [-1.0], [1e300]]
        decision = method.rule.decide(losses, state, methods.RowOps())
        scale, state = method.weigh(losses, state)
        ok = np.isfinite(losses)
        outside.append(((scale < 0) | (scale > 1)).ravel())
        bad.append((~ok & (scale != 0)).ravel())
        is_below = ok & (losses <= decision.ceiling)
        unlike.append((is_below & ((scale != 1) | (decision.limited != losses))).ravel())
        raised.append((ok & (decision.limited > decision.ceiling * (1 + config.tolerance))).ravel())
    return {
        "factor": _count(np.concatenate(outside)),
        "cap": _count(np.concatenate(raised)),
        "identity": _count(np.concatenate(unlike)),
        "nonfinite": _count(np.concatenate(bad)),
    }


def run(config: dict[str, Any], recorder: Recorder) -> dict[str, Any]:
    """Make every check for every method.

    Args:
        config: A `Config` as a dictionary.
        recorder: Where rows and progress go.

    Returns:
        `diverged_at`, always None, and the `summary` that the claims name.
    """
    settings = Config(**{key: value for key, value in config.items() if key != "criteria"})
    told: dict[str, float] = {}
    for done, (key, threshold) in enumerate(zip(settings.methods, settings.thresholds, strict=True)):
        method = methods.make(key, threshold)
        found: dict[str, Check] = {}
        if key == "alrc":
            found = check_losses(method, settings)
        elif key != "none":
            found = check_gradients(method, settings) | check_walk(method, settings)
            told |= {f"{what}_{key}": number for what, number in count_infinite(method, settings).items()}
        for check, (violations, number) in found.items():
            told |= {f"violations_{check}_{key}": violations, f"checked_{check}_{key}": number}
        recorder.progress(done + 1, len(settings.methods))
    names = list(told)
    recorder.log({"step": np.arange(1, len(names) + 1), "count": np.array([float(told[name]) for name in names])})
    return {"diverged_at": None, "summary": told}


_CHECKS: dict[str, str] = {
    "factor": "Clipping multiplies a gradient by a factor in [0, 1]: c ≥ 1, nothing is enlarged or turned.",
    "cap": "What is clipped does not exceed its cap.",
    "identity": "Below the threshold nothing changes, not a bit.",
    "zero": "A zero gradient stays zero.",
    "finite": "Finite gradients stay finite.",
    "envelope": "After n steps the weights are no further from where they began than λ Σγ.",
    "growth": "A step makes a unit's norm at most (1 + γλ) max(‖W‖, ε).",
    "nonfinite": "A loss that is not finite has the factor 0.",
}
_OF: dict[str, Callable[[str], bool]] = {
    "envelope": lambda key: key == "norm",
    "growth": lambda key: key in ("agc", "agc_last"),
    "nonfinite": lambda key: key == "alrc",
    "zero": lambda key: key != "alrc",
    "finite": lambda key: key != "alrc",
}


def claims(config: Config) -> list[dict[str, Any]]:
    """Return the claims of E0 as study.json holds them."""
    found: list[Claim] = []
    for key, threshold in zip(config.methods, config.thresholds, strict=True):
        for check, sentence in _CHECKS.items():
            if key == "none" or not _OF.get(check, bool)(key):
                continue
            number = f"violations_{check}_{key}"
            found.append(
                Claim(
                    f"E0-{check}-{key}",
                    key,
                    sentence,
                    Statistic("violations", number, n=f"checked_{check}_{key}", places=0),
                    [Criterion(number, "<=", config.most_violations)],
                    [Criterion(number, ">", config.most_violations)],
                    "inference" if key == "alrc" else "source",
                    "",
                    f"{'n' if key == 'alrc' else 'λ'} = {threshold:g}",
                    key != "alrc",
                    reading="what the specification of ALRC says of it" if key == "alrc" else "",
                )
            )
    return [claim.to_json("E0") for claim in found]
