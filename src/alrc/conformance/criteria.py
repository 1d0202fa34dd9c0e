"""Every threshold of the kit in one place, and the streams they are about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["CRITERIA", "Criteria", "ordinary"]


@dataclass(frozen=True)
class Criteria:
    """Hold the numbers that a verdict depends on.

    The defaults are those of the published table. A *spike* is one element that is many times its neighbours; it is
    *caught* when its gradient factor is small; *ordinary* elements follow the noise of the stream and should pass.
    """

    seed: int = 20
    """Seed of every stream."""
    warm_up: int = 500
    """Ordinary steps before a late event; more than any peer's warm-up."""
    good: int = 200
    """Ordinary steps after a poison that must be treated as if there had been none."""
    spike: float = 1000.0
    """Factor of the first spike."""
    second_spike: float = 100.0
    """Factor of the spikes that must be caught, among them one ten steps after the first."""
    caught: float = 0.1
    """Largest gradient factor of a caught spike; the ideal is about 0.016."""
    moved: float = 0.01
    """Largest relative change of the limit by the first spike, against a twin that never saw it."""
    shift: float = 10.0
    """Factor of the permanent rise of the level."""
    shift_steps: int = 50
    """Steps after which the rise must be accepted; its last ten are looked at."""
    accepted: float = 0.8
    """Smallest mean factor after the rise, and after a poison, as a share of the mean factor before."""
    passing: float = 0.5
    """Smallest mean factor of ordinary elements: who scales more away is no limiter of spikes."""
    decay_steps: int = 5000
    """Steps in which the level falls by `shift` again."""
    loose: float = 10.0
    """Largest limit during that fall, as a multiple of the level."""
    same: float = 1e-3
    """Largest difference of factors that counts as the same decision when all magnitudes are multiplied."""
    added: float = 1e-4
    """Relative error of limits and factors that adding up micro-batches in float32 may cause."""
    exact: float = 1e-5
    """Relative error of values and factors in float32."""


CRITERIA = Criteria()
"""The thresholds of the published table."""


def ordinary(rng: np.random.Generator, steps: int, size: int = 1, noise: str = "lognormal") -> NDArray[Any]:
    """Draw ordinary magnitudes around 1, shape (steps, size): lognormal with σ = 0.2, or normal with σ = 0.05."""
    normal = rng.normal(0.0, 1.0, (steps, size))
    return np.exp(0.2 * normal) if noise == "lognormal" else 1 + 0.05 * normal
