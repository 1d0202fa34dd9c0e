"""E6: whether clipping minimises anything: the curl of the field E[g/c].

A field that is the gradient of some function has a symmetric Jacobian. The clipped mean gradient of the network
v tanh(w x), on a fixed sample, is asked at random points by central differences with three step widths; a step across
the kink of a clipped example falsifies one difference, so the widths must agree. Without clipping the curl is rounding.
Whether endpoints of training are minima is asked in E4, where the endpoints are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from alrc.moments import Moments
from alrc.rules import ALRC
from alrc_lab.experiments.recorder import Recorder
from alrc_lab.experiments.theory import evidence, methods
from alrc_lab.experiments.theory.criteria import Claim, Criterion, estimate
from alrc_lab.experiments.theory.methods import Method, written

ENTRY = "alrc_lab.experiments.theory.scaled_loss:run"
EXCLUDED = ()
STREAM = 6


@dataclass(frozen=True)
class Config:
    """Settings and criteria of E6."""

    thresholds: tuple[float, ...] = (0.1, 0.5)
    """λ of Norm."""
    agc_thresholds: tuple[float, ...] = (0.1,)
    """λ of AGC; both parameters are units of their own."""
    alrc_limit: float = 1.0
    """Standard deviations n of ALRC above the mean of the sample's losses at each point: its moments, settled."""
    points: int = 400
    """Random points (w, v) at which the curl is measured."""
    low: float = 0.5
    """They lie in [low, high]², around the network (1, 1) that made the targets."""
    high: float = 1.5
    """Upper end."""
    examples: int = 200
    """Examples of the fixed sample: x normal, y = tanh(x) + noise."""
    noise: float = 0.7
    """Deviation of the noise."""
    widths: tuple[float, ...] = (1e-4, 1e-5, 1e-6)
    """Steps of the central differences; the middle one counts."""
    side: float = 3.0
    """The map covers [-side, side]²."""
    grid: int = 21
    """Points of the map along each axis."""
    rotational: float = 1e-3
    """Relative curl above which a field has no potential, and below which it may have one."""
    seed: int = 2026
    """Seed of every random stream. Pilots used others, so that criteria were fixed before these numbers were seen."""


@dataclass(frozen=True)
class Sample:
    """Hold the fixed sample and compute clipped mean gradients on it."""

    x: np.ndarray
    """Inputs."""
    y: np.ndarray
    """Targets."""

    def losses(self, w: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Return the loss of each example, shape (points, examples)."""
        return 0.5 * (v[:, None] * np.tanh(w[:, None] * self.x) - self.y) ** 2

    def field(self, method: Method, w: np.ndarray, v: np.ndarray, moments: Any = None) -> np.ndarray:
        """Compute the mean over the sample of the clipped gradients.

        Args:
            method: The method.
            w: Inner weights, shape (points,).
            v: Outer weights, shape (points,).
            moments: State of ALRC, rows are points; None takes what moments settle at if the weights stay here.

        Returns:
            The field, shape (points, 2).
        """
        hidden = np.tanh(w[:, None] * self.x)
        residual = v[:, None] * hidden - self.y
        scale: Any = 1.0
        if method.is_of_losses:
            scale, _ = method.weigh(
                0.5 * residual**2, self.settled(w, v) if moments is None else moments, is_learning=False
            )
        gradients = {
            "first": scale * residual * v[:, None] * (1 - hidden**2) * self.x,
            "last": scale * residual * hidden,
        }
        clipped = method.clip(gradients, {"first": w[:, None], "last": v[:, None]}, lead=2)
        return np.stack([clipped["first"].mean(1), clipped["last"].mean(1)], -1)

    def settled(self, w: np.ndarray, v: np.ndarray) -> Moments:
        """Return the moments of the losses at each point."""
        losses = self.losses(w, v)
        mean = losses.mean(1, keepdims=True)
        return Moments(mean, losses.var(1, keepdims=True), np.ones_like(mean))

    def curl(self, variant: Variant, w: np.ndarray, v: np.ndarray, width: float) -> np.ndarray:
        """Return ‖J − Jᵀ‖ / ‖J‖ at every point, by central differences of this width."""
        held = self.settled(w, v) if variant.is_held else None

        def ask(dw: float, dv: float) -> np.ndarray:
            return self.field(variant.method, w + dw, v + dv, held)

        by_w = (ask(width, 0.0) - ask(-width, 0.0)) / (2 * width)
        by_v = (ask(0.0, width) - ask(0.0, -width)) / (2 * width)
        size = np.sqrt(np.sum(by_w**2 + by_v**2, -1))
        return math.sqrt(2) * np.abs(by_w[:, 1] - by_v[:, 0]) / size


class Variant(NamedTuple):
    """Name what is measured."""

    key: str
    """Key of the method."""
    name: str
    """Name in columns and summaries."""
    words: str
    """Setting, for people."""
    method: Method
    """The method."""
    is_held: bool = False
    """Whether ALRC's moments stay those of the point while the weights move."""


def _variants(config: Config) -> list[Variant]:
    """Return everything that is measured."""
    found = [Variant("none", "none", "two-parameter tanh network", methods.make("none"))]
    for threshold in config.thresholds:
        found.append(Variant("norm", written(threshold), f"λ = {threshold:g}", methods.make("norm", threshold)))
    for threshold in config.agc_thresholds:
        found.append(Variant("agc", f"agc_{written(threshold)}", f"λ = {threshold:g}", methods.make("agc", threshold)))
    # With given moments (S4): the moments are set here, so what they start from does not matter.
    limiter = Method("alrc", ALRC(config.alrc_limit, start=(1.0, 2.0)))
    words = f"n = {config.alrc_limit:g}, moments "
    found.append(Variant("alrc", "alrc", f"{words}follow the weights", limiter))
    return [*found, Variant("alrc", "alrc_held", f"{words}held", limiter, is_held=True)]


def run(config: dict[str, Any], recorder: Recorder) -> dict[str, Any]:
    """Measure the curl of every field, and map the fields.

    Args:
        config: A `Config` as a dictionary.
        recorder: Where rows and progress go.

    Returns:
        `diverged_at`, always None, and the `summary` that the claims name.
    """
    settings = Config(**{key: value for key, value in config.items() if key != "criteria"})
    generator = np.random.default_rng([STREAM, settings.seed, 0])
    x = generator.standard_normal(settings.examples)
    sample = Sample(x, np.tanh(x) + settings.noise * generator.standard_normal(settings.examples))
    w, v = generator.uniform(settings.low, settings.high, (2, settings.points))
    axis = np.linspace(-settings.side, settings.side, settings.grid)
    maps = [part.ravel() for part in np.meshgrid(axis, axis, indexing="ij")]
    table: dict[str, np.ndarray] = {"step": np.arange(1, len(maps[0]) + 1), "w": maps[0], "v": maps[1]}
    told: dict[str, float] = {"n": settings.points}
    variants = _variants(settings)
    middle = settings.widths[len(settings.widths) // 2]
    for done, variant in enumerate(variants):
        measured = {width: sample.curl(variant, w, v, width) for width in settings.widths}
        name = variant.name
        told |= {f"curl_{part}_{name}": value for part, value in evidence.median_of(measured[middle]).items()}
        medians = {width: float(np.median(found)) for width, found in measured.items()}
        told |= {f"curl_median_{name}_width_{width:.0e}": median for width, median in medians.items()}
        told[f"width_ratio_{name}"] = max(medians.values()) / max(min(medians.values()), 1e-300)
        flow = sample.field(variant.method, maps[0], maps[1])
        table |= {f"field_w_{name}": flow[:, 0], f"field_v_{name}": flow[:, 1]}
        table[f"curl_{name}"] = sample.curl(variant, maps[0], maps[1], middle)
        recorder.progress(done + 1, len(variants))
    recorder.log(table)
    return {"diverged_at": None, "summary": told}


_READINGS = {
    "alrc": "above 0, by way of the moments alone",
    "alrc_held": "0 up to rounding: with its limit c held, ALRC follows the gradient of min(L, c (1 + ln(L / c)))",
}


def claims(config: Config) -> list[dict[str, Any]]:
    """Return the claims of E6 as study.json holds them; those about endpoints are E4's."""
    found: list[Claim] = []
    for key, name, words, *_ in _variants(config):
        found.append(
            Claim(
                f"E6-curl-{name}",
                key,
                "Clipped gradient descent minimises the average scaled loss.",
                estimate(
                    "median ‖J − Jᵀ‖ ÷ ‖J‖ of E[g/c]",
                    [f"curl_{part}_{name}" for part in ("median", "low", "high")],
                    "n",
                ),
                [Criterion(f"curl_high_{name}", "<", config.rotational)],
                [Criterion(f"curl_low_{name}", ">", config.rotational)],
                "inference" if key in ("none", "alrc") else "read",
                "" if key in ("none", "alrc") else "abstract",
                words,
                key != "alrc",
                "must be consistent" if key == "none" else None,
                _READINGS.get(name, ""),
            )
        )
    return [claim.to_json("E6") for claim in found]
