"""Hold the clipper against plain torch: what it measures, scales, remembers and refuses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from alrc import rules
from alrc.ops import NUMPY
from alrc.rules import AGC, AutoClip, GradientRule, Norm, Value, ZClip
from alrc.torch import ALRC, GradientClipper
from waiting import RefuseReading, WaitedError, refusing

RULES: dict[str, Any] = {
    "value": Value(0.5),
    "norm": Norm(1.0),
    "norm of each": Norm(0.5, scope="parameter"),
    "largest": Norm(0.5, norm_type=math.inf),
    "agc": AGC(0.1),
    "autoclip": AutoClip(50.0, window=6),
    "autoclip of each": AutoClip(50.0, window=6, scope="parameter"),
    "zclip": ZClip(max_norm=None, warmup=4),
    "zclip as published": ZClip(max_norm=20.0, warmup=4, recover=False),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


@pytest.fixture(params=["host", "device"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Take the way of numbers in the host's memory, and that of a device, where nothing may be looked at."""
    if request.param == "device":
        for module in ("gradient", "norms"):
            monkeypatch.setattr(f"alrc.torch.{module}.is_on_host", lambda x: False)
    return request.param


def make_model(dtype: torch.dtype = torch.float32) -> nn.ModuleDict:
    """Make parameters of nought to four dimensions."""
    model = nn.ModuleDict({"linear": nn.Linear(5, 4), "conv": nn.Conv2d(2, 3, 3), "head": nn.Linear(4, 2)})
    model["linear"].register_parameter("gain", nn.Parameter(torch.tensor(0.7)))
    return model.to(dtype)


def give_gradients(model: nn.Module, seed: int = 0, size: float = 1.0) -> list[Tensor]:
    """Set random gradients and return copies of them."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = (size * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
    return copies(model)


def copies(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def sizes(number: int = 40) -> Iterator[float]:
    """Yield sizes of gradients with some spikes."""
    generator = np.random.default_rng(0)
    for step in range(number):
        yield float(np.exp(generator.normal(0, 0.2))) * (30 if step in (12, 13, 30) else 1)


def expected_magnitudes(rule: Any, gradients: list[Tensor], weights: list[Tensor]) -> Any:
    """Measure with numpy, in float64, by the words of `Measure`."""
    arrays = [gradient.double().numpy() for gradient in gradients]
    order = rule.measures.norm_type
    if rule.measures.granularity == "global":
        return np.linalg.norm(np.concatenate([array.ravel() for array in arrays]), order)
    if rule.measures.granularity == "parameter":
        return np.array([np.linalg.norm(array.ravel(), order) for array in arrays])
    if rule.measures.granularity == "element":
        return np.concatenate([abs(array).ravel() for array in arrays])

    def units(tensors: list[Any]) -> Any:
        rows = [array.reshape(len(array), -1) if array.ndim > 1 else array.reshape(1, -1) for array in tensors]
        return np.concatenate([np.linalg.norm(row, axis=1) for row in rows])

    return rules.UnitNorms(units(arrays), units([weight.detach().double().numpy() for weight in weights]))


def expected_factors(rule: Any, scale: Any, gradients: list[Tensor]) -> list[Any]:
    """Spread the factors of a rule over gradients."""
    if rule.measures.granularity == "global":
        return [scale] * len(gradients)
    if rule.measures.granularity == "parameter":
        return list(scale)
    if rule.measures.granularity == "element":
        numbers = np.cumsum([gradient.numel() for gradient in gradients])[:-1]
        return [x.reshape(g.shape) for x, g in zip(np.split(scale, numbers), gradients, strict=True)]
    units = [len(gradient) if gradient.ndim > 1 else 1 for gradient in gradients]
    split = np.split(scale, np.cumsum(units)[:-1])
    return [x.reshape(-1, *[1] * (g.ndim - 1)) if g.ndim > 1 else x for x, g in zip(split, gradients, strict=True)]


def check_against_rule(
    rule: Any, make: Callable[[nn.Module, Any], Any], dtype: torch.dtype = torch.float32, tolerance: float = 1e-4
) -> None:
    """Follow a stream beside the pure rule in float64 over numpy's norms."""
    model = make_model(dtype)
    clipper, names = make(model, rule), list(model.parameters())
    state = rule.init(len(names) if rule.measures.granularity == "parameter" else None)
    limited = 0
    for step, size in enumerate(sizes()):
        before = give_gradients(model, step, size)
        magnitudes = expected_magnitudes(rule, before, names)
        decision = rule.decide(magnitudes, state, NUMPY)
        state = rule.update(magnitudes, decision, state, NUMPY)
        norm = clipper.clip_()
        whole = np.concatenate([gradient.double().numpy().ravel() for gradient in before])
        assert norm.ndim == 0
        assert float(norm) == pytest.approx(np.linalg.norm(whole, rule.measures.norm_type), rel=1e-5)
        for old, new, factor in zip(before, copies(model), expected_factors(rule, decision.scale, before), strict=True):
            np.testing.assert_allclose(new.numpy(), old.numpy() * factor, rtol=tolerance, atol=tolerance * size)
            limited += int(np.sum(np.asarray(factor) < 0.999))
    assert limited > 0, "nothing was limited"


class _Disabled(GradientClipper):
    """Measure, decide, and scale nothing: what a published optimiser did for months."""

    def clip_(self) -> Tensor:
        before = [weight.grad.clone() for weight in self._weights if weight.grad is not None]
        norm = super().clip_()
        for weight, gradient in zip(self._weights, before, strict=True):
            weight.grad = gradient
        return norm


class _Zeroed(GradientClipper):
    """Drop what should be scaled."""

    def clip_(self) -> Tensor:
        before = [weight.grad.clone() for weight in self._weights if weight.grad is not None]
        norm = super().clip_()
        for weight, gradient in zip(self._weights, before, strict=True):
            assert weight.grad is not None
            weight.grad *= weight.grad == gradient
        return norm


class _FirstAxis(GradientClipper):
    """Take the units of AGC along the wrong axis."""

    def clip_(self) -> Tensor:
        for weight in self._weights:
            if weight.ndim == 2 and weight.grad is not None:
                weight.data, weight.grad = weight.data.T.contiguous(), None if weight.grad is None else weight.grad.T
        norm = super().clip_()
        for weight in self._weights:
            if weight.ndim == 2 and weight.grad is not None:
                gradient, weight.grad = weight.grad.T, None
                weight.data = weight.data.T.contiguous()
                weight.grad = gradient
        return norm


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scales_by_the_rule(rule: Any, dtype: torch.dtype, path: str) -> None:
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-11}[dtype]
    if path == "device":  # torch divides integers in float32
        tolerance = max(tolerance, 1e-6)
    check_against_rule(rule, GradientClipper, dtype, tolerance)


@pytest.mark.parametrize(
    ("mutant", "rule"),
    [*((kind, rule) for kind in (_Disabled, _Zeroed) for rule in RULES.values()), (_FirstAxis, RULES["agc"])],
    ids=lambda thing: getattr(thing, "__name__", repr(thing)),
)
def test_another_scale_is_caught(mutant: type[GradientClipper], rule: Any) -> None:
    with pytest.raises(AssertionError):
        check_against_rule(rule, mutant)


@pytest.mark.parametrize(
    "give",
    [
        lambda model: model,
        lambda model: model.named_parameters(),
        lambda model: model.parameters(),
        lambda model: list(model.parameters()),
    ],
    ids=["module", "pairs", "generator", "list"],
)
def test_takes_parameters_in_any_form(give: Callable[[nn.Module], Any]) -> None:
    model = make_model()
    give_gradients(model)
    expected = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    clipper = GradientClipper(give(model), Norm(1.0))
    torch.testing.assert_close(clipper.clip_(), expected)
    torch.testing.assert_close(clipper.clip_(), torch.tensor(1.0))
    assert repr(clipper).startswith("GradientClipper(7 parameters, Norm(")


def test_takes_one_tensor() -> None:
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.full((3,), 2.0)
    GradientClipper(weight, Value(0.5)).clip_()
    assert weight.grad.tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("parameters", "rule", "kind", "complaint"),
    [
        ([], Norm(1.0), ValueError, "no parameter to limit"),
        ([torch.ones(2), torch.ones(2, dtype=torch.int64)], Norm(1.0), TypeError, "'1' must be a floating-point"),
        ([("a", torch.ones(2)), ("a", torch.ones(2))], Norm(1.0), ValueError, "the name 'a' comes twice"),
        ([torch.ones(2, dtype=torch.complex64)], Norm(1.0), TypeError, "floating-point"),
        ([torch.ones(2)], ALRC(), TypeError, "rule must be a gradient rule"),
        ([torch.ones(2)], rules.ALRC(), TypeError, "rule must be a gradient rule"),
        ([("a.b", torch.ones(2))], AGC(exclude=("a.*", "head.*")), ValueError, r"'head\.\*', which fits none"),
        ([torch.ones(2)], AGC(exclude=("head",)), ValueError, "names are known of a module"),
    ],
)
def test_refuses_what_it_cannot_hold(parameters: Any, rule: Any, kind: type[Exception], complaint: str) -> None:
    with pytest.raises(kind, match=complaint):
        GradientClipper(parameters, rule)


def test_refuses_one_parameter_under_two_names() -> None:
    weight = torch.ones(2)
    with pytest.raises(ValueError, match="'tied' and 'first' are one parameter"):
        GradientClipper([("first", weight), ("tied", weight)], Norm(1.0))


def test_says_that_there_is_no_gradient() -> None:
    with pytest.raises(RuntimeError, match=r"call clip_\(\) after backward\(\)"):
        GradientClipper(make_model(), Norm(1.0)).clip_()


@every_rule
def test_skips_parameters_without_a_gradient(rule: Any, path: str) -> None:
    model, other = make_model(), make_model()
    other.load_state_dict(model.state_dict())
    others = {name: p for name, p in other.named_parameters() if not name.startswith("conv")}
    one, two = GradientClipper(model, rule), GradientClipper(others.items(), rule)
    for step, size in enumerate(sizes(20)):
        give_gradients(model, step, size)
        give_gradients(other, step, size)
        for parameter in model["conv"].parameters():
            parameter.grad = None
        torch.testing.assert_close(one.clip_(), two.clip_())
        assert one.last is not None
        assert two.last is not None
        torch.testing.assert_close(one.last.fraction_limited, two.last.fraction_limited)
        assert int(one.last.nonfinite) == 0
        for name, parameter in others.items():
            torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad)
    saved = one.state_dict()
    if saved["parameters"] and saved["state"]:
        counts = dict(zip(saved["parameters"], saved["state"]["count"].tolist(), strict=True))
        assert counts == {name: 20 if name in others else 0 for name in counts}


@pytest.mark.parametrize("pattern", ["head.weight", "head.*", "*.bias"])
def test_excluded_parameters_are_left_alone(pattern: str, path: str) -> None:
    model = make_model()
    clipper = GradientClipper(model, AGC(1e-4, exclude=(pattern,)))
    before = dict(zip(dict(model.named_parameters()), give_gradients(model), strict=True))
    norm = clipper.clip_()
    torch.testing.assert_close(norm, torch.nn.utils.get_total_norm(before.values()))
    left = {name for name, p in model.named_parameters() if p.grad is not None and torch.equal(p.grad, before[name])}
    expected = {
        "head.weight": {"head.weight"},
        "head.*": {"head.weight", "head.bias"},
        "*.bias": {"linear.bias", "conv.bias", "head.bias"},
    }
    assert left == expected[pattern]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@every_rule
def test_half_precision_is_measured_in_float32(rule: Any, dtype: torch.dtype, path: str) -> None:
    model = make_model(dtype)
    before = give_gradients(model, size=2e4 / 4)
    clipper = GradientClipper(model, rule)
    norm = clipper.clip_()
    whole = torch.cat([gradient.double().ravel() for gradient in before])
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(float(torch.linalg.vector_norm(whole, rule.measures.norm_type)), rel=1e-3)
    assert all(torch.isfinite(gradient).all() for gradient in copies(model))
    assert clipper.last is not None
    fields = clipper.state_dict()["state"].values()
    assert all(field.dtype in (torch.float32, torch.int64) for field in fields)


def test_a_large_half_precision_gradient_is_scaled_and_not_lost(path: str) -> None:
    weight = nn.Parameter(torch.ones(1000, dtype=torch.float16))
    weight.grad = torch.full((1000,), 6e4, dtype=torch.float16)
    norm = GradientClipper([weight], Norm(1e-3)).clip_()
    assert float(norm) == pytest.approx(6e4 * math.sqrt(1000), rel=1e-3)
    np.testing.assert_allclose(weight.grad.float().numpy(), 1e-3 / math.sqrt(1000), rtol=2e-3)


@every_rule
def test_mixed_precisions_are_scaled_alike(rule: Any, path: str) -> None:
    model = make_model()
    model["conv"].bfloat16()
    model["head"].double()
    check = make_model()
    give_gradients(model, 3, 2.0)
    for parameter, other in zip(model.parameters(), check.parameters(), strict=True):
        assert parameter.grad is not None
        other.data, other.grad = parameter.data.float(), parameter.grad.float().clone()
    one, two = GradientClipper(model, rule), GradientClipper(check, rule)
    assert one.clip_().dtype == torch.float64
    two.clip_()
    for gradient, other in zip(copies(model), copies(check), strict=True):
        torch.testing.assert_close(gradient.float(), other, rtol=1e-2, atol=1e-4)


# ------------------------------------------------------------------------------------------------------- non-finite


def check_poison(rule: Any, make: Callable[[nn.Module, Any], Any], bad: float) -> None:
    """Leave gradients and state as they are when one element is not finite, at the start and later, and report it."""
    model = make_model()
    clipper = make(model, rule)
    for step, size in enumerate(sizes(20)):
        before = give_gradients(model, step, size)
        if step in (0, 9):
            poisoned = model.get_parameter("linear.weight").grad
            assert poisoned is not None
            poisoned[1, 2] = bad
            before = copies(model)
            state = clipper.state_dict()["state"]
            assert not torch.isfinite(clipper.clip_()), "nobody can see it"
            touched = torch.nan_to_num(poisoned) != torch.nan_to_num(before[0])
            assert not touched[1].any(), "it has been scaled"
            assert not touched.any() or rule.measures.granularity == "unit"
            assert torch.isnan(poisoned[1, 2]) == math.isnan(bad)
            for name, value in clipper.state_dict()["state"].items():
                if rule.measures.granularity == "global":
                    assert torch.equal(value, state[name]), f"{name} has changed"
                assert torch.isfinite(value).all()
            if rule.measures.granularity == "global":
                for gradient, other in zip(copies(model)[1:], before[1:], strict=True):
                    assert torch.equal(gradient, other), "a finite gradient has been changed"
            assert all(torch.isfinite(gradient).all() for gradient in copies(model)[1:])
        else:
            clipper.clip_()


class _TorchNorm:
    """Do what `clip_grad_norm_` does."""

    def __init__(self, model: nn.Module, rule: Any) -> None:
        self.model = model

    def clip_(self) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)

    def state_dict(self) -> dict[str, Any]:
        return {"state": {}}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@every_rule
def test_poison_stays_where_it_is(rule: Any, bad: float, path: str) -> None:
    check_poison(rule, GradientClipper, bad)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_norm_of_torch_spreads_poison(bad: float) -> None:
    with pytest.raises(AssertionError, match=r"scaled|changed"):
        check_poison(Norm(1.0), _TorchNorm, bad)


# -------------------------------------------------------------------------------------------------------- telemetry


def test_telemetry_says_what_happened(path: str) -> None:
    weights = [nn.Parameter(torch.ones(2)) for _ in range(4)]
    for weight, value in zip(weights, (1.0, 0.1, math.nan), strict=False):
        weight.grad = torch.full((2,), value)
    clipper = GradientClipper(weights, Norm(0.5, scope="parameter"))
    assert clipper.last is None
    norm = clipper.clip_()
    last = clipper.last
    assert last is not None
    assert torch.isnan(norm)
    assert last.scale.tolist() == [pytest.approx(0.5 / math.sqrt(2)), 1.0, 1.0, 1.0]
    assert float(last.threshold) == 0.5
    assert float(last.fraction_limited) == 0.5
    assert int(last.nonfinite) == 1
    assert all(isinstance(field, Tensor) for field in last)


@every_rule
def test_telemetry_is_tensors(rule: Any, path: str) -> None:
    model = make_model()
    clipper = GradientClipper(model, rule)
    give_gradients(model, size=100.0)
    norm = clipper.clip_()
    last = clipper.last
    assert last is not None
    assert last.norm is norm
    torch.broadcast_tensors(last.threshold, last.scale)
    assert 0 <= float(last.fraction_limited) <= 1
    assert (float(last.fraction_limited) > 0) == bool((last.scale < 1).any())


# ------------------------------------------------------------------------------------------------------------ state


@every_rule
def test_resumes_to_the_last_bit(rule: Any, path: str, tmp_path: Path) -> None:
    def follow(clipper: GradientClipper, model: nn.Module, steps: list[tuple[int, float]]) -> list[list[Tensor]]:
        found = []
        for step, size in steps:
            give_gradients(model, step, size)
            clipper.clip_()
            found.append(copies(model))
        return found

    steps = list(enumerate(sizes(40)))
    model = make_model()
    straight = follow(GradientClipper(model, rule), model, steps)
    first = GradientClipper(model, rule)
    resumed = follow(first, model, steps[:30])
    torch.save(first.state_dict(), tmp_path / "clipper.pt")
    second = GradientClipper(model, rule)
    second.load_state_dict(torch.load(tmp_path / "clipper.pt", weights_only=True))
    resumed += follow(second, model, steps[30:])  # a spike comes first
    for one, two in zip(straight, resumed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    if first.state_dict()["state"]:
        fresh = follow(GradientClipper(model, rule), model, steps[30:])
        assert not all(torch.equal(a, b) for a, b in zip(straight[30], fresh[0], strict=True)), "no state is needed"


def test_a_saved_state_is_a_copy() -> None:
    model = make_model()
    clipper = GradientClipper(model, ZClip())
    give_gradients(model)
    clipper.clip_()
    saved = clipper.state_dict()
    give_gradients(model, 1)
    clipper.clip_()
    assert int(saved["state"]["count"]) == 1


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"version": 7}, "version 7, but this alrc reads version 1"),
        ({"rule": "Norm(max_norm=1.0)"}, r"state is that of Norm\(max_norm=1.0\), but this clipper has the rule Auto"),
        ({"parameters": ["0", "1", "stem"]}, "other parameters; the difference is 2, stem"),
        ({"parameters": ["1", "0", "2"]}, "the difference is their order"),
        ({"state": {}}, "arrays of other shapes"),
    ],
)
def test_a_foreign_state_is_refused(change: dict[str, Any], complaint: str) -> None:
    clipper = GradientClipper([torch.ones(2) for _ in range(3)], AutoClip(scope="parameter"))
    with pytest.raises(ValueError, match=complaint):
        clipper.load_state_dict(clipper.state_dict() | change)


def test_the_window_of_a_state_is_checked() -> None:
    saved = GradientClipper([torch.ones(2)], AutoClip(window=5)).state_dict()
    with pytest.raises(ValueError, match="other shapes"):
        GradientClipper([torch.ones(2)], AutoClip(window=6)).load_state_dict(saved)
    GradientClipper([torch.ones(2)], AutoClip(20.0, window=5)).load_state_dict(saved)


# --------------------------------------------------------------------------------------------------------- refusals


@every_rule
def test_sparse_gradients_are_refused_by_name(rule: Any) -> None:
    model = nn.ModuleDict({"words": nn.Embedding(5, 3, sparse=True), "head": nn.Linear(3, 1)})
    clipper = GradientClipper(model, rule)
    model["head"](model["words"](torch.tensor([1, 2]))).sum().backward()
    before = model.get_parameter("head.weight").grad
    assert before is not None
    before = before.clone()
    with pytest.raises(TypeError, match=r"the gradient of 'words\.weight' is sparse"):
        clipper.clip_()
    assert torch.equal(model.get_parameter("head.weight").grad, before)  # type: ignore[arg-type]


def test_agc_moves_zero_initialised_biases(path: str) -> None:
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.bias)
    layer(torch.ones(4, 3)).sum().backward()
    GradientClipper(layer, AGC(0.01)).clip_()
    assert layer.bias.grad is not None
    assert float(layer.bias.grad.norm()) == pytest.approx(0.01 * 1e-3)


def test_empty_parameters_do_no_harm(path: str) -> None:
    for rule in RULES.values():
        weights = [nn.Parameter(torch.ones(0, 3)), nn.Parameter(torch.ones(0)), nn.Parameter(torch.ones(2, 2))]
        for weight in weights:
            weight.grad = torch.full_like(weight, 3.0)
        assert torch.isfinite(GradientClipper(weights, rule).clip_())


def test_channels_last_gradients_keep_their_layout(path: str) -> None:
    one, two = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    two.load_state_dict(one.state_dict())
    two.to(memory_format=torch.channels_last)
    for layer in (one, two):
        give_gradients(layer)
        assert layer.weight.grad is not None
    two.weight.grad = two.weight.grad.to(memory_format=torch.channels_last)  # type: ignore[union-attr]
    for layer in (one, two):
        GradientClipper(layer, AGC(0.01)).clip_()
    torch.testing.assert_close(one.weight.grad, two.weight.grad)


# ------------------------------------------------------------------------------------------------------- no waiting


@pytest.fixture
def no_reading(path: str) -> Iterator[None]:
    with refusing(is_on_host=path == "host"):
        yield


class _Itemising(GradientClipper):
    """Read the norm, as many published implementations do."""

    def clip_(self) -> Tensor:
        norm = super().clip_()
        return norm + 0 * norm.item()


def two_steps(make: Callable[..., GradientClipper], rule: GradientRule, device: str = "cpu") -> None:
    model = make_model().to(device)
    model["conv"].bfloat16()
    clipper = make(model, rule)
    for _ in range(2):
        for parameter in list(model.parameters())[:-1]:
            parameter.grad = torch.ones_like(parameter)
        clipper.clip_()
        _ = clipper.last


@every_rule
def test_reads_no_tensor(rule: Any, no_reading: None) -> None:
    two_steps(GradientClipper, rule)


@every_rule
def test_calls_no_operator_that_reads(rule: Any, path: str) -> None:
    with RefuseReading():
        two_steps(GradientClipper, rule)


@every_rule
def test_runs_where_there_is_nothing_to_read(rule: Any) -> None:
    two_steps(GradientClipper, rule, "meta")


def test_a_clipper_that_reads_is_caught(no_reading: None) -> None:
    with pytest.raises(WaitedError):
        two_steps(_Itemising, Norm(1.0))


def test_an_operator_that_reads_is_caught() -> None:
    with RefuseReading(), pytest.raises(WaitedError):
        two_steps(_Itemising, Norm(1.0))


@pytest.mark.gpu
@every_rule
def test_the_driver_sees_no_wait(rule: Any) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    two_steps(GradientClipper, rule, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        two_steps(GradientClipper, rule, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
