"""Check the supersampling experiment against numpy, piece by piece, and its runs for exact repetition."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alrc_lab.data import load_cifar10
from alrc_lab.experiments.recorder import MemoryRecorder

torch = pytest.importorskip("torch", reason="the experiment trains with torch")
from alrc_lab.experiments import cifar10_supersampling as experiment  # noqa: E402 - after the skip

Config = experiment.Config
TINY = Config(width=4, iterations=300, final_window=100, data="embedded")


def run(config: Any, folder: Path | None = None, **options: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Run an experiment in memory."""
    resolved, inputs = experiment.resolve(config)
    recorder = MemoryRecorder(inputs, folder, **options)
    result = experiment.run(resolved, recorder)
    return result, recorder.columns


# --- the pipeline ---


def standardised(image: np.ndarray, flip: float, brightness: float, contrast: float) -> np.ndarray:
    """Augment one image (3, h, w) the published way, in float64."""
    x = image.astype(np.float64)
    if flip < 0.5:
        x = x[:, :, ::-1]
    x = x + (2 * brightness - 1) * 63
    for channel in x:
        mean = channel.mean()
        channel[:] = (channel - mean) * (0.2 + 1.6 * contrast) + mean
    return (x - x.mean()) / max(x.std(), 1 / math.sqrt(x.size))


def test_augmentation_is_the_published_one() -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 3, 32, 32), np.uint8)
    images[0] = 7  # no spread at all: the floor of the standard deviation
    augmented = experiment.augment(torch.from_numpy(images), torch.Generator().manual_seed(5)).numpy()
    choices = torch.rand(3, 40, generator=torch.Generator().manual_seed(5)).double().numpy()
    assert (choices[0] < 0.5).any()
    assert (choices[0] >= 0.5).any()
    for i in range(40):
        np.testing.assert_allclose(augmented[i], standardised(images[i], *choices[:, i]), atol=2e-4)


def test_contrast_survives_standardisation_and_brightness_does_not() -> None:
    image = np.random.default_rng(1).integers(0, 256, (3, 32, 32), np.uint8)
    np.testing.assert_allclose(standardised(image, 1, 0.1, 0.5), standardised(image, 1, 0.9, 0.5), atol=1e-12)
    assert np.abs(standardised(image, 1, 0.5, 0.1) - standardised(image, 1, 0.5, 0.9)).max() > 1e-3


def resize_matrix(source: int, target: int) -> np.ndarray:
    """Make the matrix of one axis of a bilinear resize with aligned corners."""
    matrix = np.zeros((target, source))
    for row in range(target):
        position = row * (source - 1) / (target - 1)
        low = min(int(position), source - 2)
        matrix[row, low], matrix[row, low + 1] = low + 1 - position, position - low
    return matrix


def test_resize_aligns_corners() -> None:
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    there_and_back = resize_matrix(16, 32) @ resize_matrix(32, 16)
    expected = np.einsum("ij,bcjk,lk->bcil", there_and_back, images.numpy(), there_and_back)
    np.testing.assert_allclose(experiment.halve_and_restore(images).numpy(), expected, atol=1e-12)


def test_every_image_is_seen_once_an_epoch() -> None:
    images = torch.arange(40, dtype=torch.uint8).reshape(40, 1, 1, 1).expand(40, 3, 4, 4).contiguous()
    stream = experiment.Stream(images, 4, 3)
    seen: list[float] = []
    stream_images = experiment.augment
    try:
        experiment.augment = lambda chosen, generator: chosen.float()
        for index in range(2):
            seen += stream.block(index)[1][:, :, 0, 0, 0].flatten().tolist()
    finally:
        experiment.augment = stream_images
    epochs = [seen[i : i + 40] for i in range(0, 480, 40)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert epochs[0] != epochs[1], "the order is shuffled anew"


def test_network_is_the_published_one() -> None:
    network = experiment.build_network(64, 0)
    assert sum(p.numel() for p in network.parameters()) == 1_042_819
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    for m in convolutions:
        fan = (m.in_channels + m.out_channels) * m.kernel_size[0] ** 2
        assert m.weight.abs().max() <= math.sqrt(6 / fan)
        assert m.weight.abs().max() > 0.95 * math.sqrt(6 / fan)
        assert not m.bias.any()
    shapes = [(m.in_channels, m.out_channels, m.kernel_size[0]) for m in convolutions]
    assert shapes == [(3, 64, 5), (64, 128, 3), *[(128, 128, 3)] * 6, (128, 64, 3), (64, 3, 5)]
    x = torch.randn(1, 3, 8, 8)
    assert network(x).shape == x.shape
    block = network[4]
    h = torch.randn(1, 128, 8, 8)
    relu = torch.nn.functional.relu
    torch.testing.assert_close(block(h), h + relu(block.second(relu(block.first(h)))))


# --- the losses ---


@pytest.mark.parametrize(("error", "power"), [("squared", 2), ("quartic", 4)])
def test_losses(error: Any, power: int) -> None:
    trainer = experiment.Trainer(replace(TINY, error=error, batch_size=3), np.zeros((8, 3, 32, 32), np.uint8))
    inputs = torch.randn(3, 3, 32, 32)
    targets = inputs * torch.tensor([0.1, 1.0, 3.0]).reshape(3, 1, 1, 1)
    errors, losses = trainer.losses_of(inputs, targets)
    outputs = trainer.network(inputs).detach().double().numpy()
    expected = (np.abs(outputs - targets.double().numpy()) ** power).mean((1, 2, 3))
    np.testing.assert_allclose(errors.detach(), expected, rtol=1e-4)
    rooted = [math.sqrt(25 * e) if 25 * e >= 50 else 25 * e for e in expected]
    np.testing.assert_allclose(losses.detach(), rooted, rtol=1e-4)
    assert (25 * expected >= 50).any()
    assert (25 * expected < 50).any()
    trainer.config = replace(trainer.config, root_above=None)
    np.testing.assert_allclose(trainer.losses_of(inputs, targets)[1].detach(), 25 * expected, rtol=1e-4)


def test_gradients_pass_the_root_of_a_zero_loss() -> None:
    trainer = experiment.Trainer(replace(TINY, root_above=0.0), np.zeros((4, 3, 32, 32), np.uint8))
    inputs = torch.zeros(1, 3, 32, 32)
    _, losses = trainer.losses_of(inputs, inputs)
    assert float(losses.detach()) == 0


@pytest.mark.parametrize(
    ("variant", "attributes"),
    [
        ("reference", {"betas": (0.999, 0.999), "start": (25.0, 900.0), "feed": "limited", "eps": 1e-8, "gain": 1.0}),
        ("paper", {"betas": (0.999, 0.999), "feed": "unlimited", "second_moment": "mean", "eps": 0.0}),
        ("scripts", {"betas": (0.997, 0.997), "start": (30.0, 1200.0), "eps": 1e-3, "gain": 1 / 3}),
        ("auto", {"start": "auto", "feed": "limited"}),
    ],
)
def test_variants(variant: Any, attributes: dict[str, Any]) -> None:
    limiter = experiment.make_limiter(replace(TINY, num_stddev=2.5, variant=variant))
    assert limiter is not None
    assert {key: getattr(limiter.rule, key) for key in attributes} == attributes
    assert limiter.rule.num_stddev == 2.5
    assert experiment.make_limiter(TINY) is None


def test_alrc_comes_before_huber_and_the_recorded_error_before_both() -> None:
    images = np.random.default_rng(2).integers(0, 256, (64, 3, 32, 32), np.uint8)
    config = replace(TINY, num_stddev=1.0, huber=1.0, root_above=None, batch_size=2)
    trainer = experiment.Trainer(config, images)
    assert trainer.limiter is not None
    trainer.limiter.mean.fill_(2.0)
    trainer.limiter.var.fill_(1.0)
    inputs, targets = trainer.stream.block(0)
    with torch.no_grad():
        errors, losses = trainer.losses_of(inputs[0], 4 * targets[0])
    assert (losses > 3).all()
    trainer.optimizer = torch.optim.SGD(trainer.network.parameters(), 0.0)
    record = torch.zeros(5)
    trainer.update(inputs[0], 4 * targets[0], record)
    np.testing.assert_allclose(record[:4], [errors.mean(), losses.mean(), losses.max(), 3.0], rtol=1e-5)
    assert record[4] == 1
    gradient = [p.grad.clone() for p in trainer.network.parameters()]
    # d mean(√min(L, 3)) with the stopped factor of ALRC: ½ / √3 · (3 / L) · dL, over two examples.
    _, losses = trainer.losses_of(inputs[0], 4 * targets[0])
    factor = 0.5 / math.sqrt(3) * 3 / losses.detach() / 2
    expected = torch.autograd.grad((losses * factor).sum(), list(trainer.network.parameters()))
    for found, wanted in zip(gradient, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


# --- whole runs ---


def test_two_runs_are_identical_and_seeds_are_not() -> None:
    config = replace(TINY, num_stddev=2.0, variant="auto")
    (first, a), (second, b), (_, c) = run(config), run(config), run(replace(config, seed=1))
    assert first == second
    assert all(a[key].tobytes() == b[key].tobytes() for key in a)
    assert a["error"].tobytes() != c["error"].tobytes()
    assert list(a["step"]) == list(range(1, 301))
    assert a["error"][-50:].mean() < a["error"][:50].mean()
    np.testing.assert_allclose(first["summary"]["final_error"], a["error"][-100:].mean(dtype=np.float64), rtol=1e-12)
    assert first["summary"]["fraction_limited"] == pytest.approx(a["fraction_limited"].mean())
    limited = a["loss_max"] > a["limit"]
    assert (limited == (a["fraction_limited"] == 1)).all(), "at batch size 1 a loss is limited or not"
    assert limited.any()


def test_seeds_are_paired() -> None:
    (_, plain), (_, limited) = run(TINY), run(replace(TINY, num_stddev=2.0, variant="auto"))
    first = int(np.argmax(limited["fraction_limited"] > 0))
    assert first > 0
    assert plain["error"][: first + 1].tobytes() == limited["error"][: first + 1].tobytes()
    assert plain["error"].tobytes() != limited["error"].tobytes()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_resumes_exactly(tmp_path: Path, precision: Any) -> None:
    config = replace(TINY, num_stddev=2.0, variant="auto", precision=precision, iterations=384)
    whole, columns = run(config)
    resolved, inputs = experiment.resolve(config)

    class StopError(Exception):
        pass

    class Broken(MemoryRecorder):
        def checkpoint(self, step: int, save: Any) -> None:
            super().checkpoint(step, save)
            raise StopError

    with pytest.raises(StopError):
        experiment.run(resolved, Broken(inputs, tmp_path, checkpoint_every_s=0))
    recorder = MemoryRecorder(inputs, tmp_path)
    assert experiment.run(resolved, recorder) == whole
    rest = recorder.columns
    assert rest["step"][0] == 257
    assert all(rest[key].tobytes() == columns[key][256:].tobytes() for key in rest)


def test_divergence_ends_a_run_early_and_is_named() -> None:
    result, columns = run(replace(TINY, learning_rate=30.0, optimizer="sgd", root_above=None))
    assert result["diverged_at"] == columns["step"][-1] < 300
    assert not np.isfinite(columns["error"][-1])
    assert np.isfinite(columns["error"][:-1]).all()
    assert math.isnan(result["summary"]["final_error"])
    assert not experiment.is_diverged(np.array([1.0, 1e9, 2.0]), 1e3), "one spike is no divergence"
    assert experiment.is_diverged(np.array([2e3, 1.0, 2e3]), 1e3)


def test_learning_rate_drops() -> None:
    config = replace(TINY, iterations=40, final_window=10, drop_at=20, dropped_rate=0.0)
    trainer = experiment.Trainer(config, load_cifar10("embedded").images[:100])
    trainer.config = replace(config, iterations=20)
    trainer.train_block()
    before = [p.detach().clone() for p in trainer.network.parameters()]
    trainer.config = config
    trainer.train_block()
    assert all(torch.equal(p, q) for p, q in zip(trainer.network.parameters(), before, strict=True))


def test_changed_data_is_refused() -> None:
    resolved, inputs = experiment.resolve(TINY)
    with pytest.raises(ValueError, match="SHA-256"):
        experiment.run(resolved, MemoryRecorder({**inputs, "sha256": "0" * 64}))


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ({"width": 0}, "0"),
        ({"learning_rate": -1.0}, "-1"),
        ({"final_window": 9, "iterations": 5}, "9"),
        ({"seed": -1}, "-1"),
    ],
)
def test_invalid_settings_are_named(settings: dict[str, Any], value: str) -> None:
    with pytest.raises(ValueError, match=value):
        Config(**settings)
