"""E6 at the endpoints of E4: are they minima of the loss, are they stable, and is the scaled loss stationary there?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from alrc_lab.experiments.theory import evidence, methods
from alrc_lab.experiments.theory.methods import Arrays, Method
from alrc_lab.experiments.theory.network_setting import KINDS, Config, Sample, Setting
from alrc_lab.experiments.theory.perceptron import Perceptron, to_vectors

Fields = Callable[[Perceptron, Method, Arrays, Any, Sample], tuple[np.ndarray, np.ndarray, np.ndarray]]


def look_at(
    setting: Setting,
    config: Config,
    network: Perceptron,
    weights: Arrays,
    state: Any,
    sample: Sample,
    fields: Fields,
) -> dict[str, float]:
    """Return the numbers of the endpoints of one setting, named for the summary.

    Args:
        setting: The setting.
        config: Settings of E4.
        network: The network.
        weights: θ_N.
        state: The method's last state.
        sample: The sample.
        fields: Computes H and E[g].

    Returns:
        `saddles_*`, share of endpoints at which the Hessian of the mean loss has a negative eigenvalue, `unstable_*`,
        the same of the real parts of the Jacobian of H, and for Norm `scaled_slope_*`, ‖∇E[ℓ/c]‖ ÷ ‖E[g]‖ at the start.
    """
    method = methods.make(setting.key, setting.threshold)
    vectors = to_vectors(weights)
    jacobian, hessian, scaled = [], [], []
    for i in range(vectors.shape[1]):
        ends = []
        for sign in (1, -1):
            moved = vectors.copy()
            moved[:, i] += sign * config.width
            at = from_vectors(moved, weights)
            field, slope, _ = fields(network, method, at, state, sample)
            ends.append((field, slope, scaled_loss(network, method, at, sample)))
        jacobian.append((ends[0][0] - ends[1][0]) / (2 * config.width))
        hessian.append((ends[0][1] - ends[1][1]) / (2 * config.width))
        scaled.append((ends[0][2] - ends[1][2]) / (2 * config.width))
    second = np.stack(hessian, -1)
    curvatures = np.linalg.eigvalsh((second + second.transpose(0, 2, 1)) / 2)
    rates = np.linalg.eigvals(np.stack(jacobian, -1)).real
    told: dict[str, float] = {}
    for what, values in (("saddles", curvatures), ("unstable", rates)):
        is_bad = values.min(1) < -config.curvature * np.abs(values).max(1)
        for kind, own in zip(KINDS, np.split(is_bad, len(KINDS)), strict=True):
            share = evidence.share_of(int(own.sum()), len(own))
            told |= {f"{what}_{part}_{setting.name}_{kind}": value for part, value in share.items()}
    if setting.key in ("none", "norm"):
        first = network.start(config.seeds, np.random.default_rng([4, config.seed, 1]))
        first = {name: np.concatenate([array] * len(KINDS)) for name, array in first.items()}
        size = np.linalg.norm(fields(network, method, first, state, sample)[0], axis=1)
        ratio = np.linalg.norm(np.stack(scaled, -1), axis=1) / size
        for kind, own in zip(KINDS, np.split(ratio, len(KINDS)), strict=True):
            middle = evidence.median_of(own)
            told |= {f"scaled_slope_{part}_{setting.name}_{kind}": value for part, value in middle.items()}
    return told


def scaled_loss(network: Perceptron, method: Method, weights: Arrays, sample: Sample) -> np.ndarray:
    """Return E[ℓ/c] of each row, for a method with one c for each example; ℓ itself for others."""
    done = network.forward(weights, sample.x, sample.y)
    losses = 0.5 * done.residual**2
    if method.key != "norm":
        return losses.mean(1)
    each = network.gradients(weights, sample.x, done)
    factors = method.factors(each, {name: array[:, None] for name, array in weights.items()}, lead=2)
    factor = factors["last.bias"].reshape(losses.shape)
    return (losses * factor).mean(1)


def from_vectors(vectors: np.ndarray, like: Arrays) -> Arrays:
    """Return what `to_vectors` made vectors of."""
    found: Arrays = {}
    place = 0
    for name, array in like.items():
        size = array[0].size
        found[name] = vectors[:, place : place + size].reshape(array.shape)
        place += size
    return found
