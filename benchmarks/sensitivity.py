"""What each constant of the default rule buys: one is changed at a time, everything else stays.

Not a timing: all numbers are decisions of the pure rule on seeded streams, and the same on every machine. Run with
`python benchmarks/sensitivity.py` (two minutes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from alrc.rules import ALRC, shift

SEEDS = range(8)
VARIANTS: list[tuple[str, dict[str, float], dict[str, Any]]] = [
    ("default", {}, {}),
    ("rate weight 1/16", {"RATE_WEIGHT": 1 / 16}, {}),
    ("rate weight 1/64", {"RATE_WEIGHT": 1 / 64}, {}),
    ("alarm margin 1/6", {"ALARM_MARGIN": 1 / 6}, {}),
    ("alarm margin 1/2", {"ALARM_MARGIN": 1 / 2}, {}),
    ("alarm margin 1 (no alarm)", {"ALARM_MARGIN": 1.0}, {}),
    ("winsor 2", {"WINSOR": 2.0}, {}),
    ("winsor 8", {"WINSOR": 8.0}, {}),
    ("recency 0 (plain average)", {"RECENCY": 0}, {}),
    ("recency 1", {"RECENCY": 1}, {}),
    ("recency 7", {"RECENCY": 7}, {}),
    ("observe 16", {}, {"observe": 16}),
    ("observe 64", {}, {"observe": 64}),
    ("n = 2", {}, {"num_stddev": 2.0}),
    ("n = 1", {}, {"num_stddev": 1.0}),
]


@contextmanager
def constants(**values: float) -> Iterator[None]:
    """Set constants of the rule for a while."""
    before = {name: getattr(shift, name) for name in values}
    try:
        for name, value in values.items():
            setattr(shift, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(shift, name, value)


def follow(rule: ALRC, stream: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Run a stream of single losses; return limits, whether each was limited, and how often the level was relearned."""
    state: Any = rule.init()
    limits, is_limited, alarms = np.empty(len(stream)), np.zeros(len(stream), bool), 0
    for i, loss in enumerate(stream):
        decision = rule.decide(loss, state)
        after: Any = rule.update(loss, decision, state)
        limits[i], is_limited[i] = decision.ceiling, decision.scale < 1
        alarms += after.count <= state.count and state.count >= rule.observe
        state = after
    return limits, is_limited, alarms


def lognormal(seed: int, steps: int, sigma: float = 0.2) -> np.ndarray:
    """Return positive losses with median 1."""
    return np.random.default_rng(seed).lognormal(0, sigma, steps)


def correlated(seed: int, steps: int) -> np.ndarray:
    """Return lognormal losses with sigma 0.5 whose logarithms are correlated over about ten updates."""
    noise = np.random.default_rng(seed).normal(0, 0.5 * np.sqrt(1 - 0.9**2), steps)
    logs = np.zeros(steps)
    for i in range(1, steps):
        logs[i] = 0.9 * logs[i - 1] + noise[i]
    return np.exp(logs)


QUIET: dict[str, Callable[[int, int], np.ndarray]] = {
    "normal": lambda seed, steps: np.random.default_rng(seed).normal(1, 0.2, steps),
    "exponential": lambda seed, steps: np.random.default_rng(seed).exponential(1, steps),
    "lognormal 1": lambda seed, steps: lognormal(seed, steps, 1.0),
    "correlated": correlated,
}


def measure(rule: ALRC) -> list[str]:
    """Return the cells of one row."""
    rises, ratios, spikes, bursts, starts = [], [], [], [], []
    for seed in SEEDS:
        for factor, found in ((10, rises), (1.5, ratios)):
            stream = lognormal(seed, 1400, 0.05 if factor == 1.5 else 0.2)
            stream[1000:] *= factor
            _, is_limited, _ = follow(rule, stream)
            # Accepted: from here on, twenty updates are limited no more often than Cantelli allows.
            late = np.convolve(is_limited[1000:], np.ones(20), "valid") <= max(2, 20 / (1 + rule.num_stddev**2))
            found.append(int(np.argmax(late)) if late.any() else 400)
        stream = lognormal(seed, 400)
        calm, _, _ = follow(rule, stream)
        for number, found in ((1, spikes), (8, bursts)):
            spiky = stream.copy()
            spiky[300 : 300 + number] *= 1000
            disturbed, _, _ = follow(rule, spiky)
            found.append(100 * abs(disturbed[300 + number] / calm[300 + number] - 1))
        start = lognormal(seed, rule.observe + 1)
        calm, _, _ = follow(rule, start)
        start[np.random.default_rng(seed).choice(rule.observe, rule.observe // 6, replace=False)] *= 1000
        poisoned, _, _ = follow(rule, start)
        starts.append(poisoned[-1] / calm[-1])
    fall = np.maximum(100 * np.exp(-np.arange(2000) / 50), 1) * lognormal(0, 2000)
    limits, _, _ = follow(rule, fall)
    alarms, shares = [], []
    for make in QUIET.values():
        runs = [follow(rule, make(seed, 5000)) for seed in SEEDS]
        alarms.append(sum(run[2] for run in runs))
        shares.append(100 * np.mean([run[1][1000:].mean() for run in runs]))
    return [
        f"{np.median(rises):.0f} ({max(rises)})",
        f"{np.median(ratios):.0f} ({max(ratios)})",
        f"{np.median(spikes):.2g} ({max(spikes):.2g})",
        f"{np.median(bursts):.2g} ({max(bursts):.2g})",
        f"{np.median(starts):.1f} ({max(starts):.1f})",
        f"{np.median(limits[500:600]):.1f}",
        " / ".join(f"{number}" for number in alarms),
        " / ".join(f"{share:.1f}" for share in shares),
    ]


def main() -> None:
    columns = ["setting", "10x rise", "1.5x rise", "spike, %", "8 spikes, %", "poisoned start", "after a fall"]
    columns += ["alarms", "limited, %"]
    print(f"{len(SEEDS)} seeds; median (worst); quiet streams: {', '.join(QUIET)}, {len(SEEDS)} x 5,000 updates each\n")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name, values, settings in VARIANTS:
        with constants(**values):
            print(f"| {name} | {' | '.join(measure(ALRC(**settings)))} |", flush=True)


if __name__ == "__main__":
    main()
