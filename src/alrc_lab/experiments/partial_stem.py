"""Complete micrographs from a twentieth of their pixels, with and without ALRC.

The second experiment of the ALRC paper (Ede & Beanland 2020, section IV): a large network is trained on one micrograph
at a time, so that hard ones make spikes of the loss. Four conditions: squared errors, the same Huberised, and each with
ALRC. Read this file top to bottom: configuration, one training step, the loop. Examples, layers, networks, the learning
policy and what a run ends with are in the files `partial_stem_*` beside it.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn

from alrc.torch import ALRC, Huber
from alrc_lab.data.scan import COVERAGE
from alrc_lab.data.stem import MicrographSet, load_micrographs
from alrc_lab.experiments.partial_stem_examples import Stream
from alrc_lab.experiments.partial_stem_layers import freeze
from alrc_lab.experiments.partial_stem_networks import (
    Completion,
    NetworkShape,
    build_network,
    check_side,
    layer_table,
)
from alrc_lab.experiments.partial_stem_policy import (
    CompletionLosses,
    Policy,
    Targets,
    losses_of,
    set_rates,
)
from alrc_lab.experiments.partial_stem_results import HeldOut, collect_held_out, keep_results, summarise
from alrc_lab.experiments.recorder import Recorder

ENTRY = "alrc_lab.experiments.partial_stem:run"
EXCLUDED = ("data",)
"""Fields that cannot change a number; the data set's checksum is part of a run's identity instead of its path."""

HUBER = 1.0
"""Loss above which the Huberised conditions take the square root."""

WIDTHS: dict[str, NetworkShape] = {
    "full": NetworkShape.full(),
    "quarter-6-3": NetworkShape.quarter(6, 3),
    "quarter-3-2": NetworkShape.quarter(3, 2),
    "eighth-2-1": NetworkShape.eighth(2, 1),
    "eighth-1-1": NetworkShape.eighth(1, 1),
}


@dataclass(frozen=True)
class Config:
    """Settings of one partial-STEM run; the defaults are the published size, squared errors, without ALRC."""

    crop_size: int = 512
    """Side of a crop in pixels, a multiple of 32."""
    widths: Literal["full", "quarter-6-3", "quarter-3-2", "eighth-2-1", "eighth-1-1"] = "full"
    """Share of the published widths, blocks of the inner and of the outer generator; full has 6 and 3."""
    iterations: int = 500_000
    """Number of updates, one crop each; the second half has the falling rates, and frozen means if there are any."""
    loss: Literal["mse", "huber"] = "mse"
    """What is minimised: 200 times the mean squared error, or above 1 the square root of that."""
    limit: Literal["none", "alrc", "paper", "auto"] = "none"
    """Which ALRC limits each of both losses, before it is Huberised: the authors' code (n = 3, decay 0.999, start 25
    and 900), the paper's Algorithm 1 with the same numbers, whose moments see unlimited losses, or `ALRC()`."""
    variant: Literal["paper", "code43"] = "paper"
    """The paper's networks and policy or those of the authors' script 43, which has biases, leaky ReLU, constant beta1,
    the trainer's factor on its loss, means in transposed layers alone, and no data-dependent start."""
    mean_form: Literal["frozen", "image", "running"] | None = None
    """Mean that layers subtract: the picture's, then a frozen running one; always the picture's; or always a running
    one, which diverges. None takes the variant's: frozen for the paper, image for the script."""
    coverage: float = COVERAGE
    """Nominal share of pixels on the spiral; its reciprocal is the pitch in pixels."""
    final_window: int | None = None
    """Losses at the end that make the final losses; none takes a twentieth of the run."""
    held_out_crops: int = 200
    """Largest number of test crops that are completed at the end, spread evenly over all."""
    diverged_above: float = 1e6
    """A block of updates whose median loss, inner or outer, exceeds this ends the run as diverged; zeros have 18."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the convolutions; losses, means, moments and weights are float32 always."""
    device: str = "cpu"
    """Device that trains, as torch names it: cpu, cuda, cuda:1."""
    seed: int = 0
    """Seed of weights, crops, orientations and noise; runs that share it differ in nothing else."""
    data: str | None = None
    """Folder of micrographs, or "embedded" for simulated ones; none searches ALRC_DATA, then takes the simulated."""

    def __post_init__(self) -> None:
        check_side(self.crop_size)
        for name, hint in get_type_hints(Config).items():
            words = [word for part in (hint, *get_args(hint)) for word in get_args(part) if isinstance(word, str)]
            value = getattr(self, name)
            if words and value not in words and (value is not None or type(None) not in get_args(hint)):
                raise ValueError(f"{name} must be one of {', '.join(words)}, got {value!r}.")
        for name in ("iterations", "held_out_crops"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 < self.coverage <= 1:
            raise ValueError(f"coverage must be above 0 and at most 1, such as 1/20, got {self.coverage}.")
        if self.final_window is not None and not 1 <= self.final_window <= self.iterations:
            raise ValueError(f"final_window must be from 1 to iterations = {self.iterations}, got {self.final_window}.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to 2³² - 1, got {self.seed}.")


PRESETS: dict[str, Config] = {
    "smoke": Config(64, "eighth-1-1", 100, held_out_crops=20),
    "stem-96": Config(96, "quarter-3-2", 10_000, final_window=1_000, held_out_crops=1_000),
    "stem-128": Config(128, "quarter-6-3", 20_000, final_window=2_000, held_out_crops=1_000),
    "stem-256": Config(256, "full", 50_000),
    "stem-512-paper": Config(512, "full", 500_000, held_out_crops=20_000),
}
"""Sizes of run: seconds; minutes and a quarter of an hour on two cores; for a GPU; as published."""


def name_of(config: Config) -> str:
    """Name a run for people."""
    condition = config.loss + f"-{config.limit}" * (config.limit != "none")
    condition += f"-{config.variant}" * (config.variant != "paper") + f"-{config.mean_form}" * bool(config.mean_form)
    return f"stem{config.crop_size}-{condition}-s{config.seed}"


def resolve(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fill in every default and find the data.

    Returns:
        The configuration and the description of the data set, both ready for JSON.
    """
    return resolve_config(config), load_micrographs(config.data, crop_size=config.crop_size).describe()


def resolve_config(config: Config) -> dict[str, Any]:
    """Fill in every default, ready for JSON."""
    window = config.final_window or default_window(config)
    return asdict(replace(config, mean_form=shape_of(config).mean_form, final_window=window))


def default_window(config: Config) -> int:
    """Return how many losses at the end make the final ones: a twentieth of the run."""
    return max(1, config.iterations // 20)


def layers_of(config: Config) -> list[dict[str, Any]]:
    """List the layers that a configuration trains, ready for JSON; fields as in `LayerRow`."""
    return [row._asdict() for row in layer_table(shape_of(config), config.crop_size)]


def shape_of(config: Config) -> NetworkShape:
    """Return the shape of the networks that a configuration asks for."""
    shape = WIDTHS[config.widths]
    shape = shape.as_code43() if config.variant == "code43" else shape
    return shape if config.mean_form is None else replace(shape, mean_form=config.mean_form)


def make_limiters(config: Config) -> nn.ModuleDict:
    """Make the ALRC of each loss, by name; empty without ALRC."""
    if config.limit == "none":
        return nn.ModuleDict()
    make = {"alrc": ALRC.reference, "paper": ALRC.paper, "auto": ALRC}[config.limit]
    return nn.ModuleDict({name: make() for name in ("inner", "outer")})


class Trainer:
    """Hold everything that training changes, and take one block of updates at a time.

    There is no random state among it: see `Stream`.

    Args:
        config: Settings of the run.
        micrographs: Micrographs with crops of `crop_size`.
    """

    measured = ("loss_inner", "loss_outer", "limit_inner", "limit_outer", "limited_inner", "limited_outer")
    rates = ("learning_rate", "beta1")
    """What is recorded of every update: raw losses, what ALRC held them against, if it limited them; and its rates."""

    def __init__(self, config: Config, micrographs: MicrographSet) -> None:
        self.config = config
        self.stream = Stream(config, micrographs)
        is_code = config.variant == "code43"
        self.policy = (Policy.code43 if is_code else Policy)(config.iterations)
        example = None if is_code else self.stream.block(0).inputs[:1].cpu()
        self.network = build_network(shape_of(config), config.seed, example).to(config.device)
        self.optimizer = torch.optim.Adam(self.policy.parameter_groups(self.network), fused=True)
        self.limiters = make_limiters(config).to(config.device)
        self.huber = Huber(HUBER) if config.loss == "huber" else None
        self.step = 0
        self.rows = np.zeros((config.iterations, len(self.measured + self.rates)), np.float32)

    def complete(self, inputs: Tensor) -> Completion:
        """Complete scans at half and full size, in the precision of the run."""
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            return self.network(inputs)

    def losses_of(self, inputs: Tensor, targets: Targets) -> CompletionLosses:
        """Return both raw losses, before ALRC and Huber, each of shape (batch,)."""
        return losses_of(self.complete(inputs), targets)

    def limit(self, losses: CompletionLosses) -> CompletionLosses:
        """Return what is minimised: each loss limited by its own ALRC, then Huberised."""
        if self.limiters:
            losses = CompletionLosses(self.limiters["inner"](losses.inner), self.limiters["outer"](losses.outer))
        return losses if self.huber is None else CompletionLosses(*map(self.huber, losses))

    def update(self, inputs: Tensor, targets: Targets, record: Tensor) -> None:
        """Take one optimiser step and write `measured` into `record`, without waiting for the device."""
        losses = self.losses_of(inputs, targets)
        inner, outer = self.limit(losses)
        self.optimizer.zero_grad(set_to_none=True)
        (inner + outer).mean().backward()
        self.policy.weigh_gradients_(self.network)
        self.optimizer.step()
        record[0], record[1] = losses.inner.detach().mean(), losses.outer.detach().mean()
        for place, limiter in enumerate(self.limiters.values()):
            assert isinstance(limiter, ALRC)
            last = limiter.last
            assert last is not None
            record[2 + place], record[4 + place] = last.limit, last.fraction_limited

    def train_block(self) -> dict[str, np.ndarray]:
        """Train to the end of the current block of examples, or of the run.

        Returns:
            `step`, `measured` and `rates`, one row per update; cut after the first row whose losses are not finite.
        """
        index, first = divmod(self.step, self.stream.updates_per_block)
        inputs, targets = self.stream.block(index)
        number = min(self.stream.updates_per_block - first, self.config.iterations - self.step)
        records = torch.zeros(number, len(self.measured), device=inputs.device)
        records[:, 2:4] = torch.inf
        used = np.zeros((number, len(self.rates)), np.float32)
        for i in range(number):
            rates = self.policy.at(self.step + i)
            set_rates(self.optimizer, rates)
            freeze(self.network, rates.is_frozen)  # it is no state of the network, so a resumed run needs no more
            group = self.optimizer.param_groups[0]
            used[i] = group["lr"], group["betas"][0]
            place = slice(first + i, first + i + 1)
            self.update(inputs[place], Targets(*(target[place] for target in targets)), records[i])
        rows = np.hstack([records.cpu().numpy(), used])
        bad = np.flatnonzero(~np.isfinite(rows[:, :2]).all(1))
        rows = rows[: bad[0] + 1] if len(bad) else rows
        self.rows[self.step : self.step + len(rows)] = rows
        steps = np.arange(self.step + 1, self.step + len(rows) + 1)
        self.step += len(rows)
        return {"step": steps, **dict(zip(self.measured + self.rates, rows.T.copy(), strict=True))}

    def save(self, path: Path) -> None:
        """Write everything that training changed."""
        state = {name: getattr(self, name).state_dict() for name in ("network", "optimizer", "limiters")}
        torch.save({"step": self.step, "rows": torch.from_numpy(self.rows), **state}, path)

    def load(self, path: Path) -> None:
        """Go back to what `save` wrote."""
        state = torch.load(path, map_location=self.config.device, weights_only=True)
        for name in ("network", "optimizer", "limiters"):
            getattr(self, name).load_state_dict(state[name])
        self.step, self.rows = state["step"], state["rows"].cpu().numpy()

    def complete_held_out(self) -> HeldOut:
        """Complete scans of held-out crops: the same scans whatever the seed."""
        self.network.eval()
        found = collect_held_out(self.complete, self.stream.held_out())
        self.network.train()
        return found


def is_diverged(losses: np.ndarray, bound: float) -> bool:
    """Whether a block of losses (updates, 2) says that training is lost: not finite, or a median above the bound."""
    return not np.isfinite(losses).all() or float(np.median(losses, 0).max()) > bound


def load_images(crop_size: int, inputs: dict[str, Any]) -> MicrographSet:
    """Load the very micrographs that `resolve` described, or say that they changed."""
    micrographs = load_micrographs(inputs["path"], crop_size=crop_size)
    if micrographs.sha256 != inputs["sha256"]:
        raise ValueError(
            f"the micrographs at {inputs['path']} have SHA-256 {micrographs.sha256[:12]}…, the run was planned with "
            f"{inputs['sha256'][:12]}…; plan it again, or bring the old data back."
        )
    return micrographs


def run(config: dict[str, Any], recorder: Recorder) -> dict[str, Any]:
    """Train the networks, record every update, and complete held-out scans at the end.

    Args:
        config: A resolved `Config` as a dictionary.
        recorder: Where rows, checkpoints and progress go; its `inputs` name the data.

    Returns:
        `diverged_at`, the update at which training was lost or none, and `summary`: what `summarise` says of the
        losses, and unless diverged what `HeldOut.summary` says of held-out crops. Unless diverged it keeps pictures of
        some of these, the weights, and a card that describes them.
    """
    settings = Config(**config)
    trainer = Trainer(settings, load_images(settings.crop_size, recorder.inputs))
    resumed = recorder.resume()
    if resumed is not None:
        trainer.load(resumed[1])
    diverged_at = None
    while trainer.step < settings.iterations and diverged_at is None:
        first = trainer.step
        recorder.log(trainer.train_block())
        if is_diverged(trainer.rows[first : trainer.step, :2], settings.diverged_above):
            diverged_at = trainer.step
        recorder.progress(trainer.step, settings.iterations)
        if diverged_at is None and trainer.step < settings.iterations and recorder.is_checkpoint_due():
            recorder.checkpoint(trainer.step, trainer.save)
    rows = trainer.rows[: trainer.step].astype(np.float64)
    summary = summarise(rows, settings.final_window or default_window(settings), diverged_at is not None)
    if diverged_at is None:
        held_out = trainer.complete_held_out()
        summary |= held_out.summary()
        description = {"config": config, "data": recorder.inputs, "summary": summary, "step": trainer.step}
        keep_results(recorder, trainer.network, held_out, description)
    return {"diverged_at": diverged_at, "summary": summary}


def measure_step_s(config: Config, micrographs: MicrographSet, budget_s: float = 1.0) -> float:
    """Time one update on this machine, in seconds, without the making of examples; the first is not counted.

    Args:
        config: Settings of the run to be timed.
        micrographs: Micrographs with crops of `crop_size`.
        budget_s: Seconds to spend; two updates at least.
    """
    trainer = Trainer(config, micrographs)
    inputs, targets = trainer.stream.block(0)
    record = torch.zeros(len(Trainer.measured), device=inputs.device)
    times = [time.perf_counter()]
    while len(times) < 3 or times[-1] - times[1] < budget_s:
        trainer.update(inputs[:1], Targets(*(target[:1] for target in targets)), record)
        record.cpu()
        times.append(time.perf_counter())
    return (times[-1] - times[1]) / (len(times) - 2)
