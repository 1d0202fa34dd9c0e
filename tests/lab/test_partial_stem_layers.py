"""Check partial-STEM's layer against loops in numpy: values, gradients, running means; each check has a wrong twin."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the experiment trains with torch")
from torch import nn  # noqa: E402 - after the skip
from torch.nn import functional as F  # noqa: E402

from alrc_lab.experiments import partial_stem_layers as layers  # noqa: E402
from alrc_lab.experiments.partial_stem_layers import MeanOnlyNorm, NormalisedConvolution  # noqa: E402

Array = np.ndarray


# --- the oracle: loops in float64 ---


def same_convolution(x: Array, weight: Array, stride: int) -> Array:
    """Convolve (batch, in, h, w) with (out, in, k, k) as TensorFlow's SAME does: what is odd is padded at the end."""
    size, k = x.shape[2], weight.shape[2]
    total = max((-(-size // stride) - 1) * stride + k - size, 0)
    before, after = total // 2, total - total // 2
    padded = np.pad(x, ((0, 0), (0, 0), (before, after), (before, after)))
    out = -(-size // stride)
    result = np.zeros((len(x), len(weight), out, out))
    for i, j in itertools.product(range(out), range(out)):
        window = padded[:, :, i * stride : i * stride + k, j * stride : j * stride + k]
        result[:, :, i, j] = np.einsum("bcij,ocij->bo", window, weight)
    return result


def same_transposed(x: Array, weight: Array) -> Array:
    """Scatter (batch, in, n, n) with (in, out, 3, 3) to the full 2n + 1 pixels, and keep the first 2n."""
    n = x.shape[2]
    full = np.zeros((len(x), weight.shape[1], 2 * n + 1, 2 * n + 1))
    for i, j in itertools.product(range(n), range(n)):
        full[:, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3] += np.einsum("bc,coij->boij", x[:, :, i, j], weight)
    return full[:, :, : 2 * n, : 2 * n]


def naive(layer: NormalisedConvolution, values: dict[str, Array], mean: Array | None = None) -> Array:
    """Apply a layer of given values; subtract `mean`, or that of the picture."""
    v, axis = values["direction"], 1 if layer.transposed else 0
    weight = v.copy()
    if layer.weight_norm == "output":
        for channel in range(v.shape[axis]):
            part = v.take(channel, axis)
            scaled = values["gain"][channel] * part / np.sqrt((part**2).sum())
            weight[(slice(None),) * axis + (channel,)] = scaled
    elif layer.weight_norm == "input":
        for i, o in itertools.product(*map(range, v.shape[:2])):
            weight[i, o] = values["gain"][o] * v[i, o] / np.sqrt((v[i] ** 2).sum())
    x = values["x"]
    y = same_transposed(x, weight) if layer.transposed else same_convolution(x, weight, layer.stride)
    if layer.norm is not None:
        y = y - (y.mean((2, 3)) if mean is None else mean)[..., None, None]
    if "bias" in values:
        y = y + values["bias"][:, None, None]
    return y if layer.slope is None else np.where(y > 0, y, layer.slope * y)


def make(kind: type[NormalisedConvolution] = NormalisedConvolution, cin: int = 3, cout: int = 2, **options: Any) -> Any:
    """Make a layer in float64 with arbitrary gains and biases."""
    torch.manual_seed(3)
    layer = kind(cin, cout, **options).double()
    with torch.no_grad():
        for parameter in (layer.gain, layer.bias):
            if parameter is not None:
                parameter.copy_(torch.randn_like(parameter) + 1)
    return layer


def values_of(layer: NormalisedConvolution, x: Any) -> dict[str, Array]:
    """Return copies of everything that the result depends on."""
    tensors = {"x": x, **dict(layer.named_parameters())}
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}


def check(layer: NormalisedConvolution, side: int, mean: Array | None = None, batch: int = 2) -> None:
    """Compare values with the oracle, and gradients with its differences along every coordinate."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(batch, 3, side, side, dtype=torch.float64, generator=generator, requires_grad=True)
    y = layer(x)
    values = values_of(layer, x)
    np.testing.assert_allclose(y.detach().numpy(), naive(layer, values, mean), rtol=1e-10, atol=1e-12)
    direction = np.random.default_rng(5).normal(size=tuple(y.shape))
    (y * torch.from_numpy(direction)).sum().backward()
    found = {"x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    assert found.keys() == values.keys()
    for name, value in values.items():
        for index in list(np.ndindex(value.shape))[:: max(1, value.size // 12)]:
            old, sides = value[index], []
            for delta in (1e-6, -1e-6):
                value[index] = old + delta
                sides.append((naive(layer, values, mean) * direction).sum())
            value[index] = old
            expected = (sides[0] - sides[1]) / 2e-6
            np.testing.assert_allclose(float(found[name][index]), expected, rtol=2e-6, atol=2e-7, err_msg=name)


CASES: dict[str, dict[str, Any]] = {
    "plain": {"weight_norm": "none", "slope": 0.1, "mean_form": "none", "kernel": 5},
    "last": {"slope": None, "mean_form": "none"},
    "linear without bias": {"slope": None, "mean_form": "none", "has_bias": False},
    "paper": {"has_bias": False},
    "leaky": {"slope": 0.01},
    "halving": {"stride": 2},
    "doubling": {"stride": 2, "transposed": True},
    "doubling, authors' norm": {"stride": 2, "transposed": True, "weight_norm": "input", "slope": 0.01},
    "halving without norm": {"stride": 2, "weight_norm": "none", "mean_form": "none", "has_bias": False},
    "doubling without norm": {
        "stride": 2,
        "transposed": True,
        "weight_norm": "none",
        "mean_form": "none",
        "has_bias": False,
    },
}


# At 2×2 pixels the response is scaled, at 8×8 the weights.
@pytest.mark.parametrize("side", [2, 8])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_layer_is_the_naive_one(options: dict[str, Any], side: int) -> None:
    check(make(**options), side)


class SymmetricPadding(NormalisedConvolution):
    def _convolve(self, x: Any, weight: Any) -> Any:
        if self.transposed:
            return F.conv_transpose2d(x, weight, stride=2, padding=1, output_padding=1)
        return F.conv2d(x, weight, stride=self.stride, padding=weight.shape[-1] // 2)


class WrongAxes(NormalisedConvolution):
    def respond(self, x: Any, gain: Any) -> Any:
        dims = (1, 2, 3) if self.transposed else (0, 2, 3)
        norm = torch.linalg.vector_norm(self.direction, dim=dims, keepdim=True)
        return self._convolve(x, self.direction / norm) * gain[:, None, None]


class StoppedNorm(NormalisedConvolution):
    def respond(self, x: Any, gain: Any) -> Any:
        dims = (0, 2, 3) if self.transposed else (1, 2, 3)
        norm = torch.linalg.vector_norm(self.direction.detach(), dim=dims)
        return self._convolve(x, self.direction) * (gain / norm)[:, None, None]


class StoppedMean(NormalisedConvolution):
    def forward(self, x: Any) -> Any:
        y = self.respond(x, self.gain)
        return F.relu(y - y.detach().mean((2, 3), keepdim=True) + self.bias[:, None, None])


class BatchMean(NormalisedConvolution):
    def forward(self, x: Any) -> Any:
        y = self.respond(x, self.gain)
        return F.relu(y - y.mean((0, 2, 3), keepdim=True) + self.bias[:, None, None])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (SymmetricPadding, {"stride": 2}),
        (SymmetricPadding, {"stride": 2, "transposed": True}),
        (WrongAxes, {}),
        (WrongAxes, {"stride": 2, "transposed": True}),
        (StoppedNorm, {}),
        (StoppedMean, {}),
        (BatchMean, {}),
    ],
)
def test_a_wrong_layer_is_reported(kind: Any, options: dict[str, Any]) -> None:
    check(make(**options), 4)
    with pytest.raises(AssertionError):
        check(make(kind, **options), 4)


def test_every_scaling_is_tried() -> None:
    calls: list[bool] = []

    class Watched(NormalisedConvolution):
        def _convolve(self, x: Any, weight: Any) -> Any:
            calls.append(weight is self.direction)
            return super()._convolve(x, weight)

    for side in (2, 8):
        for options in ({}, {"stride": 2}, {"stride": 2, "transposed": True}):
            make(Watched, **options)(torch.zeros(2, 3, side, side, dtype=torch.float64))
    assert calls == [True, True, False, False, False, False]


# --- padding ---

BARE: dict[str, Any] = {"weight_norm": "none", "has_bias": False, "mean_form": "none", "slope": None}


def adjoint_gap(kind: type[NormalisedConvolution]) -> float:
    """Return how far <A x, y> is from <x, Aᵀ y> when both layers share their weights."""
    halve = make(kind, cin=3, cout=2, stride=2, **BARE)
    double = make(
        cin=2, cout=3, stride=2, transposed=True, mean_form="none", has_bias=False, weight_norm="none", slope=None
    )
    double.direction = halve.direction
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    y = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    return float(abs((halve(x) * y).sum() - (x * double(y)).sum()).detach())


def test_doubling_is_the_adjoint_of_halving() -> None:
    assert adjoint_gap(NormalisedConvolution) < 1e-12
    assert adjoint_gap(SymmetricPadding) > 1e-3


def test_halving_pads_only_below_and_to_the_right() -> None:
    layer = make(cin=1, cout=1, stride=2, **BARE)
    nn.init.ones_(layer.direction)
    x = torch.ones(1, 1, 4, 4, dtype=torch.float64)
    np.testing.assert_array_equal(layer(x).detach().numpy()[0, 0], [[9, 6], [6, 4]])


# --- mean-only normalisation ---


def follow(norm: MeanOnlyNorm, pictures: Array, freeze_at: int, decay: float = 0.99) -> None:
    """Feed pictures one after the other and compare results and running mean with a loop."""
    mean = np.zeros(pictures.shape[2])
    for step, picture in enumerate(pictures):
        layers.freeze(norm, step >= freeze_at)
        here = picture.mean((2, 3))
        if norm.form != "image" and step < freeze_at:
            mean = decay * mean + (1 - decay) * here.mean(0)
        uses_mean = norm.form == "running" or (norm.form == "frozen" and step >= freeze_at)
        subtracted = mean if uses_mean else here
        x = torch.from_numpy(picture).requires_grad_()
        y = norm(x)
        np.testing.assert_allclose(y.detach().numpy(), picture - subtracted[..., None, None], atol=1e-12)
        if norm.mean is not None:
            np.testing.assert_allclose(norm.mean.numpy(), mean, atol=1e-12)
        weight = torch.from_numpy(np.random.default_rng(step).normal(size=picture.shape))
        (y * weight).sum().backward()
        stopped = 0 if uses_mean else weight.mean((2, 3), keepdim=True)
        np.testing.assert_allclose(x.grad.numpy(), (weight - stopped).numpy(), atol=1e-12)


PICTURES = np.random.default_rng(6).normal(1, 1, (12, 2, 3, 4, 4))


@pytest.mark.parametrize("form", ["image", "frozen", "running"])
def test_means(form: Any) -> None:
    follow(MeanOnlyNorm(3, form).double(), PICTURES, 7)


class BiasedDecay(MeanOnlyNorm):
    def _mean_of(self, x: Any) -> Any:
        before = self.mean.clone()
        result = super()._mean_of(x)
        if not self.is_frozen:
            self.mean.sub_(0.5 * (self.mean - before))
        return result


class NeverFrozen(MeanOnlyNorm):
    def _mean_of(self, x: Any) -> Any:
        self.is_frozen = False
        return super()._mean_of(x)


class NoGradient(MeanOnlyNorm):
    def _mean_of(self, x: Any) -> Any:
        return super()._mean_of(x).detach()


@pytest.mark.parametrize(
    ("kind", "form"),
    [(BiasedDecay, "frozen"), (NeverFrozen, "frozen"), (NeverFrozen, "running"), (NoGradient, "image")],
)
def test_wrong_means_are_reported(kind: Any, form: Any) -> None:
    with pytest.raises(AssertionError):
        follow(kind(3, form).double(), PICTURES, 7)


def test_evaluation_subtracts_the_running_mean_and_does_not_track() -> None:
    x = torch.from_numpy(PICTURES[0])
    for form in ("frozen", "running"):
        norm = MeanOnlyNorm(3, form).double().eval()
        norm.mean.fill_(0.25)
        np.testing.assert_array_equal(norm(x).numpy(), x.numpy() - 0.25)
        assert (norm.mean == 0.25).all()
    image = MeanOnlyNorm(3, "image").double()
    assert not image.state_dict()
    assert torch.equal(image.eval()(x), image.train()(x))


def test_a_second_forward_pass_does_not_spoil_the_first_one() -> None:
    layer = make(mean_form="running")
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    (layer(x) + layer(x)).sum().backward()
    assert layer.bias.grad is not None


def mean_after(form: Any, steps: int) -> float:
    """Let three layers raise the mean of their result as they please, and return how far it came."""
    torch.manual_seed(7)
    slopes = (0.5, 0.5, None)
    network = nn.Sequential(*(NormalisedConvolution(4, 4, mean_form=form, has_bias=False, slope=s) for s in slopes))
    x = torch.rand(1, 4, 8, 8)
    layers.initialise_by_data(network, x)
    optimizer = torch.optim.Adam(network.parameters(), 3e-4)
    for _ in range(steps):
        optimizer.zero_grad()
        (-network(x).mean()).backward()
        optimizer.step()
    return float(network(x).detach().mean())


def test_nothing_controls_activations_when_the_running_mean_is_subtracted() -> None:
    early, middle, late = (mean_after("running", steps) for steps in (10, 30, 60))
    assert 0.1 < early < middle / 2 < late / 4
    assert late > 5, "five standard deviations of the start"
    assert abs(mean_after("image", 60)) < 1e-5


@pytest.mark.slow
def test_training_with_the_running_mean_diverges() -> None:
    networks = pytest.importorskip("alrc_lab.experiments.partial_stem_networks")
    policy = pytest.importorskip("alrc_lab.experiments.partial_stem_policy")
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(16, 1, 8, 8, generator=generator)
    truth = F.interpolate(coarse, size=(64, 64), mode="bicubic")
    truth = truth / truth.abs().amax((2, 3), keepdim=True)
    mask = (torch.rand(1, 1, 64, 64, generator=generator) < 0.2).float()
    inputs = torch.cat([(truth + 1) / 2 * mask, mask.expand_as(truth)], 1)
    largest = {}
    for form in ("running", "image"):
        shape = replace(networks.NetworkShape.quarter(1, 1), mean_form=form)
        network = networks.build_network(shape, 0, inputs[:1])
        rule = policy.Policy(2000)
        optimizer = torch.optim.Adam(rule.parameter_groups(network))
        losses = []
        for i in range(450):
            k = slice(i % 16, i % 16 + 1)
            loss = policy.losses_of(network(inputs[k]), policy.targets_of(truth[k]))
            optimizer.zero_grad()
            (loss.inner + loss.outer).sum().backward()
            optimizer.step()
            losses.append(float(loss.outer.detach()))
            if not losses[-1] < 1e6 and i > 100:
                break
        largest[form] = max(losses[100:])
    assert not largest["running"] < 1e6
    assert largest["image"] < 200


# --- the data-dependent start ---


def chain(mean_form: Any = "frozen", **options: Any) -> nn.Sequential:
    """Make four layers: plain, halving, doubling, and a last linear one without mean."""
    torch.manual_seed(8)
    return nn.Sequential(
        NormalisedConvolution(2, 4, mean_form=mean_form, **options),
        NormalisedConvolution(4, 6, 3, 2, mean_form=mean_form, **options),
        NormalisedConvolution(6, 4, 3, 2, transposed=True, mean_form=mean_form, **options),
        NormalisedConvolution(4, 1, mean_form="none", slope=None, **options),
    ).double()


def check_start(initialise: Callable[[nn.Module, Any], None], centre: bool) -> None:
    """Compare gains, biases and running means with a pass through the oracle."""
    network = chain()
    x = torch.rand(1, 2, 8, 8, dtype=torch.float64)
    initialise(network, x)
    value = x.numpy()
    for layer in network:
        parameters = {**values_of(layer, torch.from_numpy(value)), "gain": np.ones(layer.gain.shape)}
        bare = NormalisedConvolution(1, 1, slope=None, mean_form="none")
        bare.transposed, bare.stride = layer.transposed, layer.stride
        response = naive(bare, {**parameters, "bias": np.zeros(layer.gain.shape)})
        std, mean = response.std((0, 2, 3)), response.mean((0, 2, 3))
        np.testing.assert_allclose(layer.gain.detach(), 1 / std, rtol=1e-9)
        if layer.norm is not None:
            np.testing.assert_allclose(layer.norm.mean, mean / std, rtol=1e-9)
            assert not layer.bias.any()
        else:
            np.testing.assert_allclose(layer.bias.detach(), -mean / std if centre else 0, rtol=1e-9)
        value = naive(layer, values_of(layer, torch.from_numpy(value)))


@pytest.mark.parametrize("centre", [False, True])
def test_start_follows_the_data(centre: bool) -> None:
    check_start(lambda network, x: layers.initialise_by_data(network, x, centre=centre), centre)
    with pytest.raises(AssertionError):
        check_start(lambda network, x: layers.initialise_by_data(network, x, centre=not centre), centre)
    with pytest.raises(AssertionError):
        check_start(lambda network, x: None, centre)


def test_start_gives_unit_variance_and_leaves_nothing_behind() -> None:
    network = chain("image").train()
    x = torch.rand(1, 2, 8, 8, dtype=torch.float64)
    layers.initialise_by_data(network, x)
    y = network(x)
    assert float(y.detach().std(correction=0)) == pytest.approx(1)
    assert network.training
    assert not any(module._forward_pre_hooks for module in network.modules())
    assert all(p.grad is None for p in network.parameters())


def test_start_survives_a_blank_picture_and_layers_without_norm() -> None:
    network = chain(has_bias=False)
    layers.initialise_by_data(network, torch.zeros(1, 2, 8, 8, dtype=torch.float64))
    assert all((layer.gain == 1).all() for layer in network)
    plain = make(weight_norm="none")
    before = values_of(plain, torch.zeros(1))
    layers.initialise_by_data(plain, torch.rand(1, 3, 4, 4, dtype=torch.float64))
    assert all(np.array_equal(value, values_of(plain, torch.zeros(1))[name]) for name, value in before.items())


# --- ways of running ---


def outcome(network: nn.Module, run: Callable[[Any], Any], **options: Any) -> dict[str, Any]:
    """Return result, gradients and buffers of two passes in float32."""
    x = torch.rand(1, 2, 16, 16, generator=torch.Generator().manual_seed(9)).to(**options).requires_grad_()
    run(x)
    y = run(x)
    y.float().square().sum().backward()
    found = {"y": y, "x": x.grad, **{name: p.grad for name, p in network.named_parameters()}}
    found |= dict(network.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in found.items()}


@pytest.mark.parametrize("form", ["image", "frozen", "running"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_into_one_graph(backend: str, form: Any) -> None:
    torch.compiler.reset()
    network, other = chain(form).float(), chain(form).float()
    expected = outcome(network, network)
    found = outcome(other, torch.compile(other, backend=backend, fullgraph=True))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def test_layout_changes_nothing() -> None:
    network, other = chain().float(), chain().float().to(memory_format=torch.channels_last)
    expected = outcome(network, network)
    found = outcome(other, other, memory_format=torch.channels_last)
    assert found["y"].is_contiguous(memory_format=torch.channels_last)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def test_half_precision_keeps_weights_and_means_in_float32() -> None:
    network, other = chain().float(), chain().float()

    def in_bfloat16(x: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return other(x)

    expected, found = outcome(network, network), outcome(other, in_bfloat16)
    for name, tensor in expected.items():
        assert name == "y" or found[name].dtype == torch.float32
        torch.testing.assert_close(found[name].float(), tensor, rtol=0.1, atol=0.1 * float(tensor.abs().max()))
    norm = MeanOnlyNorm(1, "image")
    assert norm(torch.full((1, 1, 64, 64), 300.0, dtype=torch.bfloat16)).abs().max() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": 4}, "kernel 4"),
        ({"kernel": 5, "stride": 2}, "stride 2"),
        ({"stride": 3}, "stride 3"),
        ({"transposed": True}, "transposed True"),
        ({"weight_norm": "input"}, "input"),
    ],
)
def test_impossible_layers_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NormalisedConvolution(1, 1, **options)
