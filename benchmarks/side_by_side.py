"""Time callables side by side in one process: alternating rounds, so that a busy machine slows all alike."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch


def time_rounds(
    calls: dict[str, Callable[[], object]], rounds: int = 15, round_s: float = 0.05
) -> dict[str, np.ndarray]:
    """Time each callable once per round, in turn.

    Args:
        calls: What to time, by name.
        rounds: Number of rounds.
        round_s: Seconds that each callable gets in a round.

    Returns:
        Microseconds per call, shape (rounds,), by name.
    """
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        call()
        started = time.perf_counter()
        call()
        repeats[name] = max(1, int(round_s / max(time.perf_counter() - started, 1e-7)))
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            spent[name].append(1e6 * (time.perf_counter() - started) / repeats[name])
    return {name: np.array(values) for name, values in spent.items()}


def describe_ratio(ratios: np.ndarray) -> str:
    """Print a ratio as its median over the rounds, with the quartiles."""
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def header(title: str) -> str:
    """Say what is measured, on what."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((s.split(":")[1].strip() for s in info.read_text().splitlines() if "model name" in s), cpu)
    return (
        f"{title}\n{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s), load "
        f"{os.getloadavg()[0]:.1f}; Python {platform.python_version()}, torch {torch.__version__}\n"
        "medians over alternating rounds, quartiles in brackets"
    )
