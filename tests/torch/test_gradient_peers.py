"""Hold the clipper beside the packages people use: equal where they are right, and without their known defects.

Each defect is shown twice: ours does not have it, and the package does. If the second half fails one day, the package
has been repaired, and the note in docs/design/0006-gradient-rules.md is to be changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from alrc.rules import AGC, AutoClip, Norm, Value, ZClip
from alrc.torch import GradientClipper


def make_weights(*shapes: tuple[int, ...], seed: int = 0, size: float = 1.0) -> nn.ParameterList:
    """Make parameters with a gradient each."""
    generator = torch.Generator().manual_seed(seed)
    weights = nn.ParameterList([nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes])
    for weight in weights:
        weight.grad = size * torch.randn(weight.shape, generator=generator)
    return weights


def gradients_of(weights: nn.ParameterList) -> list[Tensor]:
    return [weight.grad.clone() for weight in weights if weight.grad is not None]


def assert_alike(ours: nn.ParameterList, theirs: Any, rtol: float = 1e-5) -> None:
    for one, two in zip(gradients_of(ours), theirs, strict=True):
        np.testing.assert_allclose(one.numpy(), np.asarray(two), rtol=rtol, atol=1e-8)


SHAPES = ((4, 5), (4,), (3, 2, 3, 3), (3,), ())

# ------------------------------------------------------------------------------------------------------------ equal


@pytest.mark.parametrize("max_norm", [0.5, 1000.0])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
def test_norm_equals_torch(norm_type: float, max_norm: float) -> None:
    ours, theirs = make_weights(*SHAPES), make_weights(*SHAPES)
    norm = GradientClipper(ours, Norm(max_norm, norm_type=norm_type)).clip_()
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type))
    assert_alike(ours, gradients_of(theirs))


def test_norm_of_each_parameter_equals_torch_on_each() -> None:
    ours, theirs = make_weights(*SHAPES), make_weights(*SHAPES)
    GradientClipper(ours, Norm(0.5, scope="parameter")).clip_()
    for weight in theirs:
        torch.nn.utils.clip_grad_norm_(weight, 0.5)
    assert_alike(ours, gradients_of(theirs))


def test_the_limited_norm_is_the_limit_for_any_unit_of_the_gradient() -> None:
    for size in (1e-6, 1.0):
        weights = make_weights((4, 5), size=size)
        clipper = GradientClipper(weights, Norm(0.1 * size))
        clipper.clip_()
        assert float(clipper.clip_()) == pytest.approx(0.1 * size, rel=1e-6)
    theirs = make_weights((4, 5), size=1e-6)
    torch.nn.utils.clip_grad_norm_(theirs, 1e-7)
    assert float(torch.nn.utils.get_total_norm(gradients_of(theirs))) < 0.9e-7  # the 1e-6 in the denominator


def test_value_equals_torch() -> None:
    ours, theirs = make_weights(*SHAPES), make_weights(*SHAPES)
    GradientClipper(ours, Value(0.3)).clip_()
    torch.nn.utils.clip_grad_value_(theirs, 0.3)
    for one, two in zip(gradients_of(ours), gradients_of(theirs), strict=True):
        assert torch.equal(one, two)


def test_norm_and_value_equal_optax() -> None:
    optax = pytest.importorskip("optax", reason="compares with optax")
    for rule, theirs in (
        (Norm(0.5), optax.clip_by_global_norm(0.5)),
        (Norm(1000.0), optax.clip_by_global_norm(1000.0)),
        (Value(0.3), optax.clip(0.3)),
    ):
        weights = make_weights(*SHAPES)
        arrays = [gradient.numpy() for gradient in gradients_of(weights)]
        GradientClipper(weights, rule).clip_()
        updates, _ = theirs.update(arrays, theirs.init(arrays))
        assert_alike(weights, updates)


@pytest.mark.parametrize("clip_factor", [0.01, 0.5, 100.0])
def test_agc_equals_pytorch_optimizer(clip_factor: float) -> None:
    agc = pytest.importorskip("pytorch_optimizer.optimizer.agc", reason="compares with pytorch_optimizer").agc
    weights = make_weights(*SHAPES)
    with torch.no_grad():
        weights[0][1] = 0.0  # a unit below the floor
        weights[3].zero_()
    theirs = [agc(weight.detach(), weight.grad, 1e-3, clip_factor) for weight in weights]
    GradientClipper(weights, AGC(clip_factor)).clip_()
    assert_alike(weights, theirs)


def test_agc_reduces_all_of_three_dimensions_as_timm_does() -> None:
    agc = pytest.importorskip("pytorch_optimizer.optimizer.agc", reason="compares with pytorch_optimizer").agc
    weights = make_weights((4, 3, 2))
    (before,) = gradients_of(weights)
    theirs = agc(weights[0].detach(), before, 1e-3, 0.01)
    GradientClipper(weights, AGC(0.01)).clip_()
    (after,) = gradients_of(weights)
    norms, limits = before.flatten(1).norm(dim=1), 0.01 * weights[0].detach().flatten(1).norm(dim=1)
    torch.testing.assert_close(after, before * (limits / norms)[:, None, None])
    assert not torch.allclose(after, theirs)  # its units of three dimensions are other ones: dimension 1 alone


@pytest.mark.parametrize("clip_factor", [0.01, 0.5, 100.0])
def test_agc_equals_optax_in_its_layouts(clip_factor: float) -> None:
    optax = pytest.importorskip("optax", reason="compares with optax")
    weights = make_weights(*SHAPES)
    with torch.no_grad():
        weights[0][1] = 0.0
    layouts: dict[int, Callable[[Any], Any]] = {
        2: lambda x: x.T,  # torch (out, in), optax (in, out)
        4: lambda x: x.transpose(2, 3, 1, 0),  # torch OIHW, optax HWIO
    }
    back = {2: layouts[2], 4: lambda x: x.transpose(3, 2, 0, 1)}

    def lay(tensors: list[Tensor], ways: dict[int, Callable[[Any], Any]]) -> list[Any]:
        arrays = [np.asarray(tensor) for tensor in tensors]
        return [ways[array.ndim](array) if array.ndim in ways else array for array in arrays]

    theirs = optax.adaptive_grad_clip(clip_factor)
    parameters = lay([weight.detach() for weight in weights], layouts)
    updates, _ = theirs.update(lay(gradients_of(weights), layouts), theirs.init(parameters), parameters)
    GradientClipper(weights, AGC(clip_factor)).clip_()
    assert_alike(weights, lay(updates, back))


def sizes(number: int = 150) -> Any:
    """Make sizes of gradients with some spikes."""
    found = np.exp(np.random.default_rng(0).normal(0, 0.2, number))
    found[[40, 41]] *= 30
    return found


def follow(step: Callable[[nn.ParameterList], Any], weights: nn.ParameterList, stream: Any) -> list[float]:
    """Give gradients of these norms, in one direction; return the norms after each step."""
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(weight.shape, generator=generator) for weight in weights]
    whole = float(torch.nn.utils.get_total_norm(directions))
    norms = []
    for size in stream:
        for weight, direction in zip(weights, directions, strict=True):
            weight.grad = (direction * (float(size) / whole)).to(weight.dtype)
        step(weights)
        norms.append(float(torch.nn.utils.get_total_norm(gradients_of(weights))))
    return norms


def their_zclip(**settings: Any) -> Callable[[nn.ParameterList], Any]:
    return pytest.importorskip("zclip", reason="compares with zclip").ZClip(**settings).step


def our_zclip(weights: nn.ParameterList, rule: Any) -> Callable[[nn.ParameterList], Any]:
    clipper = GradientClipper(weights, rule)
    return lambda _: clipper.clip_()


@pytest.mark.parametrize("recover", [True, False])
@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize(("decay", "z_threshold", "warmup"), [(0.97, 2.5, 25), (0.9, 1.5, 5)])
def test_zclip_equals_zclip(
    decay: float, z_threshold: float, warmup: int, max_norm: float | None, recover: bool
) -> None:
    weights = make_weights((4, 5), (4,))
    theirs = follow(
        their_zclip(alpha=decay, z_thresh=z_threshold, max_grad_norm=max_norm, warmup_steps=warmup), weights, sizes()
    )
    rule = ZClip(decay, z_threshold=z_threshold, max_norm=max_norm, warmup=warmup, recover=recover)
    ours = follow(our_zclip(weights, rule), weights, sizes())
    assert np.any(np.array(theirs) < 0.9 * sizes())
    np.testing.assert_allclose(ours, theirs, rtol=2e-5)


def test_autoclip_equals_the_published_script() -> None:
    weights = make_weights((4, 5), (4,))
    history = list[float]()

    def published(weights: nn.ParameterList) -> None:
        history.append(float(torch.nn.utils.get_total_norm(gradients_of(weights))))
        torch.nn.utils.clip_grad_norm_(weights, float(np.percentile(history, 10)))

    theirs = follow(published, weights, sizes())
    clipper = GradientClipper(weights, AutoClip(10.0))
    np.testing.assert_allclose(follow(lambda _: clipper.clip_(), weights, sizes()), theirs, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------- defects


def spike_after(step: Callable[[nn.ParameterList], Any], weights: nn.ParameterList, bad: float, place: int) -> float:
    """Return the norm of a spike of 100 that comes forty steps after a gradient that is not finite."""
    stream = np.exp(np.random.default_rng(1).normal(0, 0.05, 100))
    stream[place] = bad
    stream[place + 40] = 100.0
    return follow(step, weights, stream)[place + 40]


@pytest.mark.parametrize(("bad", "place"), [(math.nan, 3), (math.nan, 50), (math.inf, 3)])
def test_poison_does_not_switch_zclip_off(bad: float, place: int) -> None:
    weights = make_weights((4, 5))
    assert spike_after(our_zclip(weights, ZClip(max_norm=None)), weights, bad, place) < 2
    assert spike_after(their_zclip(max_grad_norm=None), weights, bad, place) == pytest.approx(100)


@pytest.mark.parametrize("factor", [1.5, 3.0, 10.0])
def test_zclip_follows_a_shift(factor: float) -> None:
    weights = make_weights((4, 5))
    stream = np.abs(np.random.default_rng(2).normal(1, 0.05, 300))
    stream[100:] *= factor
    ours = follow(our_zclip(weights, ZClip(max_norm=None)), weights, stream)
    theirs = follow(their_zclip(max_grad_norm=None), weights, stream)
    assert np.mean(ours[150:] < 0.999 * stream[150:]) < 0.05
    assert np.mean(theirs[150:] < 0.999 * stream[150:]) == 1


def test_half_precision_does_not_overflow() -> None:
    weights = nn.ParameterList([nn.Parameter(torch.ones(100, dtype=torch.float16))])
    for step, is_right in ((our_zclip(weights, ZClip()), True), (their_zclip(), False)):
        weights[0].grad = torch.full((100,), 2e4, dtype=torch.float16)
        norm = step(weights)
        assert math.isfinite(float(norm)) == is_right


def test_autoclip_makes_no_nan() -> None:
    autoclip = pytest.importorskip("autoclip.torch", reason="compares with autoclip")
    weights = make_weights((4, 5))
    clipper = GradientClipper(weights, AutoClip(90.0))
    stream = np.array([1.0, 1.1, 0.9, 1.0])
    assert np.all(np.isfinite(follow(lambda _: clipper.clip_(), weights, stream)))
    theirs = autoclip.StandardClip(weights.parameters(), global_threshold=True)
    with pytest.warns(UserWarning, match="degrees of freedom"):
        norms = follow(lambda _: theirs.step(), weights, stream)
    assert math.isnan(norms[1])


def test_poison_does_not_blind_autoclip() -> None:
    autoclip = pytest.importorskip("autoclip.torch", reason="compares with autoclip")
    weights = make_weights((4, 5))
    clipper = GradientClipper(weights, AutoClip(90.0))
    assert spike_after(lambda _: clipper.clip_(), weights, math.nan, 50) < 2
    theirs = autoclip.QuantileClip(weights.parameters(), 0.9, global_threshold=True)
    assert math.isnan(spike_after(lambda _: theirs.step(), weights, math.nan, 50))


def test_the_memory_of_autoclip_is_bounded() -> None:
    weights = make_weights((2,))
    clipper = GradientClipper(weights, AutoClip(window=8))
    before = {name: x.shape for name, x in clipper.state_dict()["state"].items()}
    follow(lambda _: clipper.clip_(), weights, sizes(50))
    assert {name: x.shape for name, x in clipper.state_dict()["state"].items()} == before


def test_agc_moves_zero_initialised_weights() -> None:
    weights = make_weights((4, 5), (4,))
    with torch.no_grad():
        for weight in weights:
            weight.zero_()
    GradientClipper(weights, AGC(0.01)).clip_()
    without_floor = make_weights((4, 5), (4,))
    for weight, one in zip(without_floor, weights, strict=True):
        assert weight.grad is not None
        assert one.grad is not None
        factor = (0.01 * one.detach().norm() / weight.grad.norm()).clamp(max=1)  # Composer's, by its source
        assert float((weight.grad * factor).norm()) == 0
        assert float(one.grad.norm()) > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_bad_element_does_not_spread(bad: float) -> None:
    for is_ours in (True, False):
        weights = make_weights((4, 5), (4,))
        assert weights[0].grad is not None
        weights[0].grad[1, 2] = bad
        before = gradients_of(weights)[1]
        norm = (
            GradientClipper(weights, Norm(1.0)).clip_()
            if is_ours
            else torch.nn.utils.clip_grad_norm_(weights.parameters(), 1.0)
        )
        assert not torch.isfinite(norm)
        assert torch.equal(gradients_of(weights)[1], before) == is_ours


def test_an_infinite_element_stays_visible() -> None:
    ours, theirs = make_weights((4, 5)), make_weights((4, 5))
    for weights in (ours, theirs):
        assert weights[0].grad is not None
        weights[0].grad[1, 2] = math.inf
    assert not torch.isfinite(GradientClipper(ours, Value(0.3)).clip_())
    torch.nn.utils.clip_grad_value_(theirs.parameters(), 0.3)
    assert not torch.isfinite(gradients_of(ours)[0]).all()
    assert torch.isfinite(gradients_of(theirs)[0]).all()  # nobody can tell any more
