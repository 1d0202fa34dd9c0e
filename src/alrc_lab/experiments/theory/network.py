"""E4: where clipped training of a small network ends, on one fixed sample that is the whole law of the data.

A tanh network learns from single examples of the sample, or from batches of them, and every expectation is an exact sum
over it: the scaled mean gradient H(θ) = E[g/c] that should vanish, and the mean gradient E[g] that need not. The noise
of the targets is skewed (rarely large, on one side) or symmetric. At the endpoints E6 asks whether they are minima.
"""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import fields as fields_of
from typing import Any

import numpy as np

from alrc_lab.experiments.recorder import Recorder
from alrc_lab.experiments.theory import evidence, methods
from alrc_lab.experiments.theory.endpoints import look_at
from alrc_lab.experiments.theory.keeping import Kept
from alrc_lab.experiments.theory.methods import Arrays, Method
from alrc_lab.experiments.theory.network_claims import claims
from alrc_lab.experiments.theory.network_setting import (
    KINDS,
    Config,
    Sample,
    Setting,
    doublings,
    draw_sample,
    families,
    settings_of,
)
from alrc_lab.experiments.theory.perceptron import Perceptron, norm_of, to_vectors

__all__ = ["ENTRY", "EXCLUDED", "Config", "Training", "claims", "run", "train"]

ENTRY = "alrc_lab.experiments.theory.network:run"
EXCLUDED = ()
STREAM = 4
BLOCK = 500


@dataclass(frozen=True)
class Training:
    """What training of one setting left: arrays over (logged steps, kinds of noise, seeds)."""

    step: np.ndarray
    """Logged steps, 0 first."""
    field: np.ndarray
    """‖H‖ ÷ its first value."""
    gradient: np.ndarray
    """‖E[g]‖ ÷ its first value."""
    slope: np.ndarray
    """‖E[g]‖ itself."""
    loss: np.ndarray
    """Mean loss over the sample."""
    moved: np.ndarray
    """‖θ_N - θ_{N/2}‖ ÷ ‖θ_N‖, shape (kinds, seeds)."""
    fraction: np.ndarray
    """Share of updates of the second half in which something was limited, shape (kinds, seeds)."""


def logged(setting: Setting, config: Config) -> np.ndarray:
    """Return the steps of a setting that are logged, 0 among them."""
    return np.unique([0, *methods.log_spaced(setting.steps, config.points), *doublings(setting.steps)])


def train(setting: Setting, config: Config, sample: Sample) -> tuple[Training, Arrays, Any]:
    """Train one setting for all kinds of noise and seeds at once.

    Args:
        setting: Method, threshold and batch size.
        config: Settings of the training.
        sample: Examples, rows are kinds × seeds.

    Returns:
        What is left; θ_N, rows are kinds × seeds; and the method's last state.
    """
    method = methods.make(setting.key, setting.threshold)
    network = Perceptron(config.inputs, config.hidden, "tanh")
    first = network.start(config.seeds, np.random.default_rng([STREAM, config.seed, 1]))
    weights = {name: np.concatenate([array] * len(KINDS)) for name, array in first.items()}
    rows = len(sample.y)
    orders = np.random.default_rng([STREAM, config.seed, 2, setting.batch])  # the same examples for every method
    state = method.start(rows)
    gamma = methods.steps(config.gain, config.exponent, setting.steps)
    wanted = logged(setting, config)
    marks = {int(step) for step in wanted}
    told: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    halfway, hits, chosen = weights, np.zeros(rows), np.empty(0, int)
    every = np.arange(rows)[:, None]
    for n in range(setting.steps + 1):
        if n in marks:
            told.append(_look(network, method, weights, state, sample))
        if n == setting.steps:
            break
        if n % BLOCK == 0:
            chosen = orders.integers(0, config.examples, (BLOCK, config.seeds, setting.batch))
        own = np.concatenate([chosen[n % BLOCK]] * len(KINDS))
        x, y = sample.x[every, own], sample.y[every, own]
        done = network.forward(weights, x, y)
        scale, state = method.weigh(0.5 * done.residual**2, state)
        gradients = network.mean_gradient(weights, x, done, scale)
        factors = method.factors(gradients, weights)
        if n >= setting.steps // 2:
            hits += _is_limited(scale, factors, rows)
        weights = {
            name: array - gamma[n] * (gradients[name] * factors[name] if factors else gradients[name])
            for name, array in weights.items()
        }
        if n + 1 == setting.steps // 2:
            halfway = weights
    shape = (len(KINDS), config.seeds)
    field, slope, loss = (np.stack(column).reshape(len(wanted), *shape) for column in zip(*told, strict=True))
    moved = norm_of({name: array - halfway[name] for name, array in weights.items()}) / norm_of(weights)
    training = Training(
        step=wanted,
        field=field / field[0],
        gradient=slope / slope[0],
        slope=slope,
        loss=loss,
        moved=moved.reshape(shape),
        fraction=(hits / (setting.steps - setting.steps // 2)).reshape(shape),
    )
    return training, weights, state


def _make(setting: Setting, config: Config, sample: Sample) -> dict[str, np.ndarray]:
    """Train one setting, and look at its endpoints if they are asked for; returns arrays and numbers by name."""
    training, weights, state = train(setting, config, sample)
    made = {field.name: getattr(training, field.name) for field in fields_of(Training)}
    if setting.batch == 1 and setting.is_first:
        network = Perceptron(config.inputs, config.hidden, "tanh")
        seen = look_at(setting, config, network, weights, state, sample, fields)
        made |= {key: np.asarray(value) for key, value in seen.items()}
    return made


def _is_limited(scale: Any, factors: Arrays, rows: int) -> np.ndarray:
    """Return in which rows a loss or a gradient was limited."""
    found = np.zeros(rows, bool)
    for factor in [np.asarray(scale), *factors.values()]:
        found |= np.any(factor.reshape(len(factor) if factor.ndim else 1, -1) != 1, 1)
    return found


def fields(
    network: Perceptron, method: Method, weights: Arrays, state: Any, sample: Sample
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return H and E[g] as vectors, shape (rows, parameters), and the mean loss, exact sums over the sample."""
    done = network.forward(weights, sample.x, sample.y)
    losses = 0.5 * done.residual**2
    each = network.gradients(weights, sample.x, done)
    plain = {name: array.mean(1) for name, array in each.items()}
    if method.is_of_losses:
        scale, _ = method.weigh(losses, state, is_learning=False)
        scaled = {
            name: (array * scale.reshape(*scale.shape, *(1,) * (array.ndim - 2))).mean(1)
            for name, array in each.items()
        }
    else:
        clipped = method.clip(each, {name: array[:, None] for name, array in weights.items()}, lead=2)
        scaled = {name: array.mean(1) for name, array in clipped.items()}
    return to_vectors(scaled), to_vectors(plain), losses.mean(1)


def _look(
    network: Perceptron, method: Method, weights: Arrays, state: Any, sample: Sample
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ‖H‖, ‖E[g]‖ and the mean loss of every row."""
    scaled, plain, loss = fields(network, method, weights, state, sample)
    return np.linalg.norm(scaled, axis=1), np.linalg.norm(plain, axis=1), loss


def run(config: dict[str, Any], recorder: Recorder) -> dict[str, Any]:
    """Train every setting, and look at the endpoints.

    Args:
        config: A `Config` as a dictionary.
        recorder: Where rows and progress go.

    Returns:
        `diverged_at`, always None, and the `summary` that the claims of E4 and of E6's endpoints name.
    """
    settings = Config(**{key: value for key, value in config.items() if key != "criteria"})
    sample = draw_sample(settings, np.random.default_rng([STREAM, settings.seed, 0]))
    told: dict[str, float] = {"steps": settings.steps}
    todo = settings_of(settings)
    steps = np.unique([step for setting in todo for step in logged(setting, settings)])[1:]
    table: dict[str, np.ndarray] = {"step": steps}
    plain: dict[tuple[int, str], np.ndarray] = {}
    kept = Kept(recorder, len(todo))
    for setting in todo:
        made = kept.part(setting.name, lambda setting=setting: _make(setting, settings, sample))
        training = Training(**{field.name: made.pop(field.name) for field in fields_of(Training)})
        told |= {key: float(value) for key, value in made.items()}
        for i, kind in enumerate(KINDS):
            name = f"{setting.name}_{kind}"
            for what in ("field", "gradient", "loss"):
                column = np.full(len(steps), np.nan)
                column[np.searchsorted(steps, training.step[1:])] = np.median(getattr(training, what)[1:, i], -1)
                table[f"{what}_{name}"] = column
            last = training.slope[-1, i]
            if setting.key == "none":
                plain[setting.batch, kind] = last
            else:
                told[f"paired_p_{name}"] = evidence.greater_p(np.log(last) - np.log(plain[setting.batch, kind]))
                told[f"times_{name}"] = float(np.median(last / plain[setting.batch, kind]))
            told |= _tell(name, i, training, settings)
    told |= evidence.holm({key: told[key] for key in families(settings)["E4 mean gradient"]})
    recorder.log(table)
    return {"diverged_at": None, "summary": told}


def _tell(name: str, i: int, training: Training, config: Config) -> dict[str, float]:
    """Return the numbers of one setting and kind of noise, named for the summary."""
    told: dict[str, float] = {f"n_{name}": config.seeds}
    for what in ("field", "gradient"):
        sample = getattr(training, what)[-1, i]
        ends = evidence.bootstrap([sample], np.median, [STREAM, config.seed, 3])
        told |= {f"{what}_median_{name}": float(np.median(sample))}
        told |= {f"{what}_{part}_{name}": value for part, value in ends.items()}
    places = np.searchsorted(training.step, doublings(int(training.step[-1])))
    medians = np.median(training.field[places, i], -1)
    told[f"doubling_{name}"] = float(np.max(medians[1:] / medians[:-1]))
    told[f"moved_{name}"] = float(np.median(training.moved[i]))
    told[f"loss_{name}"] = float(np.median(training.loss[-1, i]))
    told[f"fraction_{name}"] = float(np.mean(training.fraction[i]))
    return told
