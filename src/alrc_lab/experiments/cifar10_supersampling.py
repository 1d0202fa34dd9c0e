"""Restore CIFAR-10 images from half their resolution, with and without ALRC.

The paper's first experiment (Ede & Beanland 2020, section III): a small network learns to undo a bilinear downsampling.
Squared errors train stably; quartic errors at small batch sizes spike, and that is where ALRC should help. Read this
file top to bottom: configuration, data pipeline, network, one training step, the loop.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alrc.torch import ALRC, Huber
from alrc_lab.data import ImageSet, load_cifar10
from alrc_lab.experiments.recorder import Recorder

ENTRY = "alrc_lab.experiments.cifar10_supersampling:run"
TOGETHER = "alrc_lab.experiments.supersampling_replicas"
EXCLUDED = ("data",)
"""Fields that cannot change a number; the data set's checksum is part of a run's identity instead of its path."""

LOSS_SCALE = 25.0
"""The authors' factor on both errors. Errors are reported without it, as in the paper's Table 1."""


@dataclass(frozen=True)
class Config:
    """Settings of one supersampling run; the defaults are the published batch-1 quartic run without ALRC."""

    error: Literal["squared", "quartic"] = "quartic"
    """Error that is minimised: mean((y - t)²) or mean((y - t)⁴), times 25."""
    batch_size: int = 1
    """Images per update; the paper used 1, 4, 16 and 64."""
    num_stddev: float | None = None
    """Standard deviations n above the running mean that a loss may reach; none trains without ALRC (n = ∞)."""
    variant: Literal["reference", "paper", "scripts", "auto"] = "reference"
    """Which ALRC: the authors' library, the paper's Algorithm 1, the authors' squared-error scripts, or `ALRC()`."""
    huber: float | None = None
    """Huberise the losses above this value, after ALRC; none leaves them."""
    root_above: float | None = 50.0
    """Replace per-example losses of this or more by their square root, as the published runs did; none does not."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Adam (β 0.9, 0.999, ε 1e-8) or plain SGD."""
    learning_rate: float = 1 / 1280
    """Step size."""
    drop_at: int | None = None
    """Update after which the learning rate drops; the paper's batch-64 runs drop after 54,687."""
    dropped_rate: float = 1 / 12800
    """Learning rate after the drop."""
    width: int = 64
    """Channels of the first layer; 64 is the paper's network of 1,042,819 parameters."""
    iterations: int = 100_000
    """Number of updates."""
    final_window: int | None = None
    """Errors at the end that make the final error; none takes a twentieth of the run (5,000 of 100,000)."""
    diverged_above: float = 1e3
    """A block of updates whose median error exceeds this ends the run as diverged; zero output has an error near 1."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the convolutions; losses, moments and weights are float32 always."""
    device: str = "cpu"
    """Device that trains, as torch names it: cpu, cuda, cuda:1."""
    seed: int = 0
    """Seed of weights, order of images and augmentation; runs that share it differ in nothing else."""
    data: str | None = None
    """Folder of CIFAR-10's binary batches, or "embedded"; none searches ALRC_DATA, the cache, then the embedded set."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "width", "iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}.")
        if self.final_window is not None and not 1 <= self.final_window <= self.iterations:
            raise ValueError(f"final_window must be from 1 to iterations = {self.iterations}, got {self.final_window}.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to 2³² - 1, got {self.seed}.")


def name_of(config: Config) -> str:
    """Name a run for people."""
    limit = "none" if config.num_stddev is None else f"{config.num_stddev:g}"
    limit += f"-{config.variant}" * (config.variant != "reference")
    is_usual = (config.optimizer, config.learning_rate) == (Config.optimizer, Config.learning_rate)
    how = "" if is_usual else f"-{config.optimizer}{config.learning_rate:g}"
    return f"{config.error}-b{config.batch_size}{how}-n{limit}-s{config.seed}"


def resolve(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fill in every default and find the data.

    Returns:
        The configuration and the description of the data set, both ready for JSON.
    """
    return resolve_config(config), load_cifar10(config.data).describe()


def resolve_config(config: Config) -> dict[str, Any]:
    """Fill in every default, ready for JSON."""
    return asdict(replace(config, final_window=config.final_window or max(1, config.iterations // 20)))


# --- Data: the images live on the device as uint8; a block of updates is augmented at once. ---


def _generator(seed: int, purpose: int, index: int) -> torch.Generator:
    """Make a generator from what it is for, so that any update can be reached without those before it."""
    state = np.random.SeedSequence([seed, purpose, index]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flip, brighten, change contrast, standardise: the published order.

    Args:
        images: uint8, shape (batch, 3, height, width).
        generator: CPU generator of the random choices.

    Returns:
        float32 images of zero mean and unit variance over all three channels together, same shape.
    """
    number = len(images)
    flip, brightness, contrast = torch.rand(3, number, 1, 1, 1, generator=generator).to(images.device)
    x = images.float()
    x = torch.where(flip < 0.5, x.flip(3), x)
    x = x + (2 * brightness - 1) * 63  # standardising undoes this; it is done because it was done
    mean = x.mean((2, 3), keepdim=True)
    x = (x - mean) * (0.2 + 1.6 * contrast) + mean
    std, mean = torch.std_mean(x, (1, 2, 3), correction=0, keepdim=True)
    return (x - mean) / std.clamp(min=x[0].numel() ** -0.5)


def halve_and_restore(images: Tensor) -> Tensor:
    """Resize bilinearly to half the size and back, corners aligned, without anti-aliasing: what the network sees."""
    size = images.shape[-2:]
    small = F.interpolate(images, size=(size[0] // 2, size[1] // 2), mode="bilinear", align_corners=True)
    return F.interpolate(small, size=size, mode="bilinear", align_corners=True)


class Stream:
    """Serve augmented images in a shuffled order that depends on nothing but seed and position."""

    images_per_block = 256

    def __init__(self, images: Tensor, batch_size: int, seed: int) -> None:
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.steps_per_block = max(1, self.images_per_block // batch_size)
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def block(self, index: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of `steps_per_block` updates, shape (updates, batch, 3, height, width)."""
        number = self.steps_per_block * self.batch_size
        first, size = index * number, len(self.images)
        epochs = range(first // size, (first + number - 1) // size + 1)
        chosen = torch.cat([self._shuffled(e)[max(first - e * size, 0) : first + number - e * size] for e in epochs])
        targets = augment(self.images[chosen.to(self.images.device)], _generator(self.seed, 1, index))
        inputs = halve_and_restore(targets)
        shape = (self.steps_per_block, self.batch_size, *targets.shape[1:])
        return inputs.reshape(shape), targets.reshape(shape)

    def _shuffled(self, epoch: int) -> Tensor:
        """Return the order of images in an epoch."""
        if self._order[0] != epoch:
            self._order = epoch, torch.randperm(len(self.images), generator=_generator(self.seed, 2, epoch))
        return self._order[1]


# --- Network: two convolutions, three residual blocks, two convolutions. ---


class Residual(nn.Module):
    """Add two convolutions with ReLU to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, channels, height, width) to the same shape."""
        return x + F.relu_(self.second(F.relu_(self.first(x))))


def build_network(width: int, seed: int) -> nn.Sequential:
    """Build the supersampling network: Xavier uniform weights, zero biases.

    Args:
        width: Channels of the first layer; the middle has twice as many. 64 gives 1,042,819 parameters.
        seed: Seed of the weights.

    Returns:
        A network from (batch, 3, h, w) to the same shape, in channels-last layout.
    """
    network = nn.Sequential(
        nn.Conv2d(3, width, 5, padding=2),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(inplace=True),
        *(Residual(2 * width) for _ in range(3)),
        nn.Conv2d(2 * width, width, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, 3, 5, padding=2),
    )
    generator = _generator(seed, 0, 0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.xavier_uniform_(module.weight, generator=generator)
            nn.init.zeros_(module.bias)
    return network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


# --- Training ---


def make_limiter(config: Config) -> ALRC | None:
    """Make the ALRC of the configuration, or none."""
    if config.num_stddev is None:
        return None
    variants = {"reference": ALRC.reference, "paper": ALRC.paper, "scripts": ALRC.cifar_scripts, "auto": ALRC}
    return variants[config.variant](config.num_stddev)


class Trainer:
    """Hold everything that training changes, and take one block of updates at a time.

    Args:
        config: Settings of the run.
        images: uint8 images, shape (number, 3, height, width).
    """

    columns = ("error", "loss", "loss_max", "limit", "fraction_limited")
    """What is recorded of every update; `error` is the raw batch mean, `loss` what ALRC is given."""

    def __init__(self, config: Config, images: np.ndarray) -> None:
        device = torch.device(config.device)
        if device.type == "cuda" and config.precision == "float32":
            torch.backends.cudnn.allow_tf32 = False  # torch's own choice rounds convolutions to 10 bits
        self.config = config
        self.power = {"squared": 2, "quartic": 4}[config.error]
        self.stream = Stream(torch.from_numpy(images).to(device), config.batch_size, config.seed)
        self.network = build_network(config.width, config.seed).to(device)
        optimizers = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
        self.optimizer = optimizers[config.optimizer](self.network.parameters(), config.learning_rate, fused=True)
        limiter = make_limiter(config)
        self.limiter = None if limiter is None else limiter.to(device)
        self.huber = None if config.huber is None else Huber(config.huber)
        self.step = 0
        self.errors = np.zeros(config.iterations, np.float32)
        self.num_limited = 0.0

    def losses_of(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return raw errors and training losses before ALRC, each of shape (batch,)."""
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            outputs = self.network(inputs)
        errors = (outputs.float() - targets).pow(self.power).mean((1, 2, 3))
        losses = LOSS_SCALE * errors
        if self.config.root_above is not None:
            is_high = losses >= self.config.root_above
            losses = torch.where(is_high, torch.where(is_high, losses, 1.0).sqrt(), losses)
        return errors, losses

    def update(self, inputs: Tensor, targets: Tensor, record: Tensor) -> None:
        """Take one optimiser step and write `columns` into `record`, without waiting for the device."""
        errors, losses = self.losses_of(inputs, targets)
        limited = losses if self.limiter is None else self.limiter(losses)
        if self.huber is not None:
            limited = self.huber(limited)
        self.optimizer.zero_grad(set_to_none=True)
        limited.mean().backward()
        self.optimizer.step()
        record[0], record[1], record[2] = errors.detach().mean(), losses.detach().mean(), losses.detach().max()
        if self.limiter is not None and (last := self.limiter.last) is not None:
            record[3], record[4] = last.limit, last.fraction_limited

    def train_block(self) -> dict[str, np.ndarray]:
        """Train to the end of the current block of images, or of the run.

        Returns:
            `step` and `columns`, one row per update; cut after the first row that is not finite.
        """
        index, first = divmod(self.step, self.stream.steps_per_block)
        inputs, targets = self.stream.block(index)
        number = min(self.stream.steps_per_block - first, self.config.iterations - self.step)
        records = torch.zeros(number, len(self.columns), device=inputs.device)
        records[:, 3] = torch.inf
        for i in range(number):
            if self.config.drop_at is not None and self.step + i == self.config.drop_at:
                for group in self.optimizer.param_groups:
                    group["lr"] = self.config.dropped_rate
            self.update(inputs[first + i], targets[first + i], records[i])
        rows = records.cpu().numpy()
        bad = np.flatnonzero(~np.isfinite(rows[:, 0]))
        rows = rows[: bad[0] + 1] if len(bad) else rows
        self.errors[self.step : self.step + len(rows)] = rows[:, 0]
        self.num_limited += float(rows[:, 4].sum())
        steps = np.arange(self.step + 1, self.step + len(rows) + 1)
        self.step += len(rows)
        return {"step": steps, **dict(zip(self.columns, rows.T.copy(), strict=True))}

    def save(self, path: Path) -> None:
        """Write everything that training changed."""
        torch.save(
            {
                "step": self.step,
                "network": self.network.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "limiter": None if self.limiter is None else self.limiter.state_dict(),
                "errors": torch.from_numpy(self.errors),
                "num_limited": self.num_limited,
            },
            path,
        )

    def load(self, path: Path) -> None:
        """Go back to what `save` wrote."""
        state = torch.load(path, map_location=self.config.device, weights_only=True)
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.limiter is not None:
            self.limiter.load_state_dict(state["limiter"])
        self.step, self.num_limited, self.errors = state["step"], state["num_limited"], state["errors"].cpu().numpy()


def is_diverged(errors: np.ndarray, bound: float) -> bool:
    """Whether a block of errors says that training is lost: one not finite, or a median above the bound."""
    return not np.isfinite(errors).all() or float(np.median(errors)) > bound


def load_images(inputs: dict[str, Any]) -> ImageSet:
    """Load the very images that `resolve` described, or say that they changed."""
    images = load_cifar10(inputs["path"])
    if images.sha256 != inputs["sha256"]:
        raise ValueError(
            f"the images at {inputs['path']} have SHA-256 {images.sha256[:12]}…, the run was planned with "
            f"{inputs['sha256'][:12]}…; plan it again, or bring the old data back."
        )
    return images


def run(config: dict[str, Any], recorder: Recorder) -> dict[str, Any]:
    """Train one network and record every update.

    Args:
        config: A resolved `Config` as a dictionary.
        recorder: Where rows, checkpoints and progress go; its `inputs` name the data.

    Returns:
        `diverged_at`, the update at which training was lost or none, and `summary`; see `outcome_of`.
    """
    settings = Config(**config)
    trainer = Trainer(settings, load_images(recorder.inputs).images)
    resumed = recorder.resume()
    if resumed is not None:
        trainer.load(resumed[1])
    diverged_at = None
    while trainer.step < settings.iterations and diverged_at is None:
        rows = trainer.train_block()
        recorder.log(rows)
        if is_diverged(rows["error"], settings.diverged_above):
            diverged_at = trainer.step
        recorder.progress(trainer.step, settings.iterations)
        if diverged_at is None and trainer.step < settings.iterations and recorder.is_checkpoint_due():
            recorder.checkpoint(trainer.step, trainer.save)
    return outcome_of(trainer, diverged_at)


def outcome_of(trainer: Trainer, diverged_at: int | None) -> dict[str, Any]:
    """Say how a run ended, in raw errors.

    `final_error` is the mean of the final window, NaN if the run diverged. `worst_stretch` is the highest mean of a
    stretch, a two-hundredth of the run, after its first tenth; `num_spikes` is how often such means go above 1.5 times
    their median.
    """
    errors = trainer.errors[: trainer.step].astype(np.float64)
    window = trainer.config.final_window or max(1, trainer.config.iterations // 20)
    stretch = max(1, trainer.config.iterations // 200)
    later = errors[trainer.config.iterations // 10 :]
    means = later[: len(later) // stretch * stretch].reshape(-1, stretch).mean(1)
    is_high = means > 1.5 * np.median(means) if len(means) else np.zeros(0, bool)
    summary = {
        "final_error": math.nan if diverged_at is not None else float(errors[-window:].mean()),
        "max_error": float(errors[np.isfinite(errors)].max(initial=0.0)),
        "worst_stretch": float(means.max(initial=0.0)),
        "num_spikes": int((is_high & ~np.roll(np.append(is_high, False), 1)[:-1]).sum()),
        "fraction_limited": trainer.num_limited / trainer.step,
        "steps": trainer.step,
    }
    return {"diverged_at": diverged_at, "summary": summary}
