"""Check masks and weights, the warning about losses ≤ 0, signed losses, and the short way of calm batches.

The oracle for a mask is the call on `losses[mask]`; for whole-numbered weights, the call on repeated losses.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alrc import rules
from alrc.torch import ALRC
from bitwise import same

NAN, INF = math.nan, math.inf
START = (1.0, 1.04)
"""Mean 1, standard deviation 0.2: the limit is 1.6."""
FILLS = [NAN, INF, -INF, -1.0, 0.0, 1e38]
"""What padding may hold."""

Make = Callable[[], ALRC]
MAKES: dict[str, Make] = {
    "default": lambda: ALRC(observe=4),
    "start": lambda: ALRC(start=START, betas=(0.9, 0.9)),
    "two-sided": lambda: ALRC(observe=4, signed=True, num_stddev_below=2.0),
    "below": lambda: ALRC(observe=4, num_stddev_below=1.0),
    "unlimited": lambda: ALRC(observe=4, feed="unlimited"),
    "paper": lambda: ALRC.paper(2.0, (0.9, 0.95), *START),
    "reference": lambda: ALRC.reference(2.0, 0.9, *START),
}
makes = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)


@contextmanager
def along(path: str) -> Iterator[None]:
    """Run what a CPU runs ("host"), or what every other device runs ("device")."""
    with ExitStack() as stack:
        if path == "device":
            for module in ("loss", "learner"):
                stack.enter_context(mock.patch(f"alrc.torch.{module}.is_on_host", return_value=False))
        yield


@pytest.fixture(params=["host", "device"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    with along(request.param):
        yield request.param


def spiky(steps: int, *shape: int) -> Tensor:
    """Make positive losses around 1 of which about a tenth are far out."""
    return torch.randn(steps, *shape).mul(0.3).exp() * torch.where(torch.rand(steps, *shape) < 0.1, 20, 1)


def call(module: Callable[..., Tensor], losses: Tensor, **given: Tensor) -> tuple[Tensor, Tensor]:
    """Return values and gradients."""
    leaf = losses.clone().requires_grad_()
    limited = module(leaf, **given)
    limited.backward(torch.ones_like(limited))
    assert leaf.grad is not None
    return limited.detach(), leaf.grad


def close(got: Any, wanted: Any, rtol: float = 1e-6) -> None:
    torch.testing.assert_close(got, wanted, rtol=rtol, atol=1e-7)


def state_of(module: ALRC) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def close_states(one: ALRC, other: ALRC, rtol: float = 1e-6) -> None:
    """Compare states; where decays differ the variance is a difference of terms as large as the squared mean (S4)."""
    got, wanted = state_of(one), state_of(other)
    if one.rule.betas[0] != one.rule.betas[1]:
        torch.testing.assert_close(got.pop("var"), wanted.pop("var"), rtol=0, atol=rtol * float(one.mu2))
    close(got, wanted, rtol)


# ----------------------------------------------------------------------------------------------------------- masks


class Filling(ALRC):
    """Replace what is masked by 0 and learn from it: what `losses * mask` does."""

    def forward(self, losses: Tensor, mask: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        return super().forward(losses if mask is None else losses.masked_fill(~mask, 0.0))


def check_padding(module: ALRC, oracle: ALRC, fill: float) -> None:
    """Compare a stream of padded batches with the call on what is not padding."""
    stream, masks = spiky(24, 4, 6), torch.rand(24, 4, 6) < 0.6
    masks[10] = False
    masks[11] = False
    masks[11, 2, 3] = True  # one loss is left
    limited_any = False
    for losses, mask in zip(stream, masks, strict=True):
        padded = losses.masked_fill(~mask, fill)
        value, gradient = call(module, padded, mask=mask)
        wanted, wanted_gradient = call(oracle, losses[mask])
        close((value[mask], gradient[mask]), (wanted, wanted_gradient))
        assert torch.all(value[~mask] == 0)
        assert torch.all(gradient[~mask] == 0)
        close_states(module, oracle)
        limited_any |= bool((wanted_gradient < 1).any())
    assert limited_any, "the stream limits nothing"


@makes
@pytest.mark.parametrize("fill", [NAN, -1.0], ids=str)
def test_padding_is_not_there(make: Make, fill: float, path: str) -> None:
    check_padding(make(), make(), fill)


@pytest.mark.parametrize("fill", FILLS, ids=str)
def test_what_padding_holds_makes_no_difference_of_a_bit(fill: float, path: str) -> None:
    for make in MAKES.values():
        one, other = make(), make()
        for losses, mask in zip(spiky(8, 3, 4), torch.rand(8, 3, 4) < 0.6, strict=True):
            weight = torch.rand(3, 4)
            expected = call(one, losses, mask=mask, weight=weight)
            filled = losses.masked_fill(~mask, fill)
            got = call(other, filled, mask=mask, weight=weight.masked_fill(~mask, fill))
            assert same(got, expected)
            assert same(state_of(other), state_of(one))


@pytest.mark.filterwarnings("ignore:ALRC met losses")
def test_a_module_that_learns_from_padding_is_caught() -> None:
    with pytest.raises(AssertionError):
        check_padding(Filling(observe=4), ALRC(observe=4), 0.0)


@makes
def test_an_empty_mask_changes_nothing(make: Make, path: str) -> None:
    module = make()
    for losses in spiky(6, 5):
        module(losses)
    before = state_of(module)
    nothing = torch.zeros((), dtype=torch.bool)
    for losses in (torch.tensor([NAN, 1.0, 99.0]), torch.tensor(99.0), torch.tensor([99.0]), torch.zeros(0)):
        value, gradient = call(module, losses, mask=nothing)
        assert not value.any()
        assert not gradient.any()
        assert same(state_of(module), before)


def test_a_mask_is_broadcast(path: str) -> None:
    losses = spiky(1, 4, 6)[0]
    for shape in [(4, 6), (1, 6), (6,), (4, 1), (1, 1), (1,), ()]:
        part = torch.rand(shape) < 0.7
        weight = torch.rand(shape)
        one, other = ALRC(start=START), ALRC(start=START)
        got = call(one, losses, mask=part, weight=weight)
        full = {"mask": part.expand(4, 6).clone(), "weight": weight.expand(4, 6).clone()}
        assert same(got, call(other, losses, **full))
        close_states(one, other)


@pytest.mark.parametrize("name", ["mask", "weight"])
@pytest.mark.parametrize("shape", [(2, 3), (4,), (3, 1), (1, 1, 3)], ids=str)
def test_a_mask_that_does_not_fit_is_refused(name: str, shape: tuple[int, ...], path: str) -> None:
    wrong = {name: torch.ones(shape, dtype=torch.bool if name == "mask" else torch.float32)}
    with pytest.raises(ValueError, match=rf"{name} of shape .* does not broadcast to losses of shape \(3,\)"):
        ALRC()(torch.ones(3), **wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8], ids=str)
def test_a_mask_must_be_boolean(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"mask must be a boolean tensor, got {dtype}; use mask != 0"):
        ALRC()(torch.ones(3), mask=torch.ones(3, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64], ids=str)
def test_a_weight_must_be_floating_point(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"weight must be a floating-point tensor, got {dtype}; use weight.float"):
        ALRC()(torch.ones(3), weight=torch.ones(3, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_losses_are_masked_alike(dtype: torch.dtype, path: str) -> None:
    module, oracle = ALRC(observe=4), ALRC(observe=4)
    for losses, mask in zip(spiky(20, 8).mul(300).to(dtype), torch.rand(20, 8) < 0.6, strict=True):
        value, gradient = call(module, losses.masked_fill(~mask, NAN), mask=mask, weight=torch.ones(8, dtype=dtype))
        wanted, factor = call(oracle, losses[mask].float())
        assert value.dtype == gradient.dtype == dtype
        assert torch.equal(value[mask], wanted.to(dtype))
        close(gradient[mask].float(), factor, rtol=1e-2)
        close_states(module, oracle)
    assert module.mean.dtype == torch.float32


def test_both_paths_agree() -> None:
    for make in MAKES.values():
        modules = {"host": make(), "device": make()}
        for losses, mask, weight in zip(spiky(16, 7), torch.rand(16, 7) < 0.7, torch.rand(16, 7), strict=True):
            seen: dict[str, Any] = {}
            for path, module in modules.items():
                with along(path):
                    seen[path] = call(module, losses, mask=mask, weight=weight), module.last
            close(seen["device"], seen["host"], rtol=2e-6)
            close_states(modules["device"], modules["host"], rtol=2e-6)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_masks_and_weights_compile() -> None:
    torch._dynamo.reset()
    module, eager = ALRC(observe=4), ALRC(observe=4)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=False)
    for step, losses in enumerate(spiky(12, 6)):
        mask, weight = torch.rand(6) < 0.7, torch.rand(6)
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            got = call(compiled, losses.masked_fill(~mask, NAN), mask=mask, weight=weight)
        close(got, call(eager, losses, mask=mask, weight=weight))
        close_states(module, eager)
        close(module.last, eager.last)
    torch._dynamo.reset()


# --------------------------------------------------------------------------------------------------------- weights


class WeightingTheResult(ALRC):
    """Multiply the losses by their weights, which is not asked for."""

    def forward(self, losses: Tensor, mask: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        return super().forward(losses if weight is None else losses * weight, mask)


def check_repetition(module: ALRC, oracle: ALRC) -> None:
    """Compare whole-numbered weights with repeated losses; zero is absent from the moments."""
    for step, losses in enumerate(spiky(24, 6)):
        weight = torch.randint(0, 4, (6,))
        weight[step % 6] = 2
        close(
            call(module, losses, weight=weight.float())[0].repeat_interleave(weight),
            call(oracle, losses.repeat_interleave(weight))[0],
        )
        close_states(module, oracle, rtol=2e-6)


@makes
def test_a_weight_is_a_repetition(make: Make, path: str) -> None:
    check_repetition(make(), make())


@pytest.mark.filterwarnings("ignore:ALRC met losses")
def test_a_module_that_weights_its_result_is_caught() -> None:
    with pytest.raises(AssertionError):
        check_repetition(WeightingTheResult(observe=4), ALRC(observe=4))


def test_a_weight_does_not_change_what_is_done_to_the_losses_at_hand(path: str) -> None:
    losses = torch.tensor([0.5, 2.0, 4.0, NAN])
    one, other = ALRC(start=START), ALRC(start=START)
    assert same(call(one, losses, weight=torch.tensor([0.0, 0.0, 7.0, 1.0])), call(other, losses))
    assert one.mean != other.mean


@pytest.mark.parametrize("bad", [0.0, NAN, INF, -INF, -3.0], ids=str)
def test_a_weight_that_is_none_counts_as_zero(bad: float, path: str) -> None:
    for make in MAKES.values():
        one, other = make(), make()
        for losses in spiky(10, 5):
            one(losses, weight=torch.tensor([1.0, bad, 2.0, 0.5, bad]))
            other(losses[[0, 2, 3]], weight=torch.tensor([1.0, 2.0, 0.5]))
        close_states(one, other)
        before = state_of(one)
        one(torch.tensor([5.0, 6.0]), weight=torch.tensor(bad))
        one(torch.tensor(5.0), weight=torch.tensor(bad))
        assert same(state_of(one), before)


def test_weights_take_no_part_in_the_graph() -> None:
    weight = torch.ones(2, requires_grad=True)
    losses = torch.ones(2, requires_grad=True)
    ALRC()(losses, weight=weight).sum().backward()
    assert weight.grad is None


# ------------------------------------------------------------------------------------------------------- telemetry


@pytest.mark.filterwarnings("ignore:ALRC met losses")
def test_telemetry_counts_what_is_not_masked(path: str) -> None:
    module = ALRC(start=START)
    losses = torch.tensor([[0.5, 3.2, NAN, -1.0, 99.0], [0.0, 1.0, INF, -5.0, NAN]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)
    module(losses, mask=mask)
    last = module.last
    assert last is not None
    close(last.limit, torch.tensor(1.6))
    close(last.scale, torch.tensor([[1, 0.5, 0, 1, 0], [1, 1, 0, 0, 0]]))
    close(last.fraction_limited, torch.tensor(1 / 5))
    assert last.nonfinite == 1
    assert last.nonpositive == 2
    close(last.largest, torch.tensor(3.2))


def test_telemetry_of_an_empty_mask(path: str) -> None:
    module = ALRC(start=START)
    module(torch.tensor([3.0, NAN]), mask=torch.tensor([False]))
    last = module.last
    assert last is not None
    assert (last.nonfinite, last.nonpositive, last.fraction_limited) == (0, 0, 0)
    assert last.largest == -INF


# --------------------------------------------------------------------------------------------- the warning of signs


def test_warns_once_of_losses_that_are_not_positive() -> None:
    module = ALRC()
    module(torch.tensor([1.0, 2.0]))
    with pytest.warns(UserWarning, match=r"losses ≤ 0 \(the lowest is -3\).*signed=True.*mask=") as caught:
        module(torch.tensor([1.0, -3.0]))
    assert len(caught) == 1
    assert caught[0].filename == __file__, "the warning points at somebody else's line"
    module(torch.tensor([1.0, -4.0]))  # warnings are errors
    with pytest.warns(UserWarning, match="the lowest is 0"):
        ALRC()(torch.tensor(0.0))


@pytest.mark.parametrize("losses", [[NAN, -3.0], [INF, -3.0], [-INF, -3.0]], ids=str)
def test_warns_beside_poison(losses: list[float]) -> None:
    with pytest.warns(UserWarning, match="the lowest is -3"):
        ALRC()(torch.tensor(losses))
    with pytest.warns(UserWarning, match="the lowest is -3"):
        ALRC()(torch.tensor([1.0, -3.0]), weight=torch.ones(2))


def test_does_not_warn_without_reason() -> None:
    quiet: list[tuple[ALRC, list[float], dict[str, Tensor]]] = [
        (ALRC(signed=True), [1.0, -3.0], {}),
        (ALRC(), [1.0, -3.0, 0.0], {"mask": torch.tensor([True, False, False])}),
        (ALRC(), [NAN, INF, -INF], {}),
        (ALRC(), [], {}),
        (ALRC().eval(), [-1.0], {}),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for module, losses, given in quiet:
            module(torch.tensor(losses), **given)


def test_does_not_look_where_looking_would_wait() -> None:
    with along("device"):
        module = ALRC()
        module(torch.tensor([1.0, -3.0]))
        assert module.last is not None
        assert module.last.nonpositive == 1


# -------------------------------------------------------------------------------------------- shift, scale, mirror


def decisions(rule: rules.ALRC, stream: Tensor) -> tuple[Tensor, Tensor]:
    """Return values and gradients of a whole stream in double precision."""
    module = ALRC.from_rule(rule).double()
    values, gradients = zip(*(call(module, losses) for losses in stream), strict=True)
    return torch.stack(values), torch.stack(gradients)


def check_invariant(rule: rules.ALRC, seed: int, factor: float, shift: float) -> None:
    """Compare the decisions about a · L + b with those about L."""
    generator = torch.Generator().manual_seed(seed)
    stream = torch.randn(30, 5, generator=generator, dtype=torch.float64).exp() + 0.1
    stream[torch.rand(30, 5, generator=generator) < 0.1] *= 30
    if rule.signed:
        stream[torch.rand(30, 5, generator=generator) < 0.1] -= 40
    values, gradients = decisions(rule, stream)
    moved_values, moved_gradients = decisions(rule, factor * stream + shift)
    assert (gradients < 1).any(), "the stream limits nothing"
    assert ((gradients >= 0) & (gradients <= 1)).all()
    torch.testing.assert_close(moved_gradients, gradients, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(moved_values, factor * values + shift, rtol=1e-6, atol=1e-9 * factor)


SIGNED = [
    rules.ALRC(observe=4, signed=True),
    rules.ALRC(observe=4, signed=True, num_stddev_below=2.0),
    rules.ALRC(observe=4, signed=True, feed="unlimited", second_moment="mean", num_stddev_below=3.0),
]


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("rule", SIGNED, ids=["above", "both sides", "unlimited"])
@settings(max_examples=5)
@given(seed=st.integers(0, 9), factor=st.floats(1e-3, 1e3), shift=st.floats(-100, 100))
def test_signed_decisions_do_not_know_unit_or_origin(
    where: str, rule: rules.ALRC, seed: int, factor: float, shift: float
) -> None:
    with along(where):
        check_invariant(rule, seed, factor, shift)


@pytest.mark.parametrize("where", ["host", "device"])
@settings(max_examples=5)
@given(seed=st.integers(0, 9), factor=st.floats(1e-6, 1e6))
def test_two_sided_decisions_do_not_know_the_unit(where: str, seed: int, factor: float) -> None:
    with along(where):
        check_invariant(rules.ALRC(observe=4, num_stddev_below=1.0), seed, factor, 0.0)


def test_decisions_about_positive_losses_know_their_origin() -> None:
    with pytest.raises(AssertionError, match="not close"):
        check_invariant(rules.ALRC(observe=4), seed=0, factor=1.0, shift=1.0)


def test_equal_sides_mirror_each_other(path: str) -> None:
    rule = rules.ALRC(2.0, observe=4, signed=True, num_stddev_below=2.0)
    stream = torch.randn(30, 5, dtype=torch.float64) * torch.where(torch.rand(30, 5) < 0.1, 20, 1)
    values, gradients = decisions(rule, stream)
    mirrored, mirrored_gradients = decisions(rule, -stream)
    assert (gradients < 1).sum() > 5
    torch.testing.assert_close((-mirrored, mirrored_gradients), (values, gradients), rtol=1e-9, atol=1e-12)


# -------------------------------------------------------------------------------------------------- the calm path


@dataclasses.dataclass(frozen=True)
class NeverCalm(rules.ALRC):
    """The same rule, whose batches all take the long way."""


CALM: dict[str, dict[str, Any]] = {
    "default": {"observe": 4},
    "start": {"start": START},
    "paper": vars(rules.ALRC.paper(2.0, (0.9, 0.95), *START)),
    "reference": vars(rules.ALRC.reference(2.0, 0.9, *START)),
    "scripts": vars(rules.ALRC.cifar_scripts()),
    "signed": {"observe": 4, "signed": True},
    "mean": {"observe": 4, "second_moment": "mean"},
    "below": {"observe": 4, "num_stddev_below": 2.0},
}


def check_calm(arguments: dict[str, Any], *shape: int) -> int:
    """Compare the short with the long way bit for bit; return how often the short one was taken."""
    calm, full = ALRC.from_rule(rules.ALRC(**arguments)), ALRC.from_rule(NeverCalm(**arguments))
    taken = 0
    for losses in spiky(40, *shape):
        assert same(call(calm, losses), call(full, losses))
        assert same(state_of(calm), state_of(full))
        assert same(calm.last, full.last)
        taken += calm._seen[0].scale is None
    return taken


@pytest.mark.parametrize("shape", [(), (1,), (2,), (3, 5)], ids=str)
@pytest.mark.parametrize("arguments", CALM.values(), ids=CALM)
def test_the_short_way_is_the_long_way_bit_for_bit(arguments: dict[str, Any], shape: tuple[int, ...]) -> None:
    taken = check_calm(arguments, *shape)
    assert taken > 3 or arguments.get("num_stddev_below"), "the short way was not taken"


def test_a_short_way_that_leads_elsewhere_is_caught() -> None:
    right = rules.ALRC.calm

    def wrong(self: rules.ALRC, *given: Any) -> Any:
        batch, ceiling = right(self, *given)
        return batch and batch._replace(mean=batch.mean * (1 + 1e-6)), ceiling

    with mock.patch.object(rules.ALRC, "calm", wrong), pytest.raises(AssertionError):
        check_calm({"observe": 4}, 5)
