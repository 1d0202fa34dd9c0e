"""Check the torch module: values, gradients, dtypes, modes and telemetry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from alrc import rules
from alrc.moments import Moments
from alrc.reference import alrc_trace
from alrc.torch import ALRC, Telemetry
from alrc.torch.ops import EAGER, TRACED, TorchOps, TracedOps

NAN, INF = float("nan"), float("inf")
START = (1.0, 1.04)
"""Mean 1, standard deviation 0.2: the limit is 1.6."""

pytestmark = pytest.mark.filterwarnings("ignore:ALRC met losses")  # It has tests of its own.


def bits(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor: equal bytes are equal bit for bit, the sign of zero included."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def state_of(module: ALRC) -> list[bytes]:
    """Return the bytes of every buffer."""
    return [bits(buffer.reshape(1)) for buffer in module.buffers()]


LAYOUTS: dict[str, Callable[[torch.dtype], Tensor]] = {
    "mixed": lambda dtype: torch.tensor([0.5, 2.0, 1.5, 16.0, -3.0, 0.0, -0.0], dtype=dtype),
    "all limited": lambda dtype: torch.tensor([2.0, 3.3, 1e30], dtype=dtype),
    "none limited": lambda dtype: torch.tensor([0.1, 0.2], dtype=dtype),
    "scalar limited": lambda dtype: torch.tensor(7.0, dtype=dtype),
    "scalar": lambda dtype: torch.tensor(0.7, dtype=dtype),
    "one": lambda dtype: torch.tensor([7.0], dtype=dtype),
    "summands": lambda dtype: torch.rand(4, 5, dtype=dtype) * 3,
    "transposed": lambda dtype: (torch.rand(4, 5, dtype=dtype) * 3).T,
    "every other": lambda dtype: (torch.rand(40, dtype=dtype) * 3)[::2],
    "channels last": lambda dtype: (torch.rand(2, 3, 4, 4, dtype=dtype) * 3).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values_and_gradients_are_exact(layout: str, dtype: torch.dtype) -> None:
    losses = LAYOUTS[layout](dtype).requires_grad_()
    upstream = torch.rand_like(losses) + 0.5
    module = ALRC(start=START)
    limit = module.limit.to(dtype)
    limited = module(losses)
    limited.backward(upstream)
    is_limited = losses.detach() > limit
    assert limited.shape == losses.shape
    assert limited.dtype == dtype
    assert bits(limited) == bits(torch.where(is_limited, limit, losses.detach()))
    assert losses.grad is not None
    assert bits(losses.grad) == bits(torch.where(is_limited, (limit / losses.detach()) * upstream, upstream))


def test_a_loss_at_the_limit_is_untouched_and_the_next_number_is_not() -> None:
    limit = ALRC(start=START).limit
    losses = torch.stack([limit, torch.nextafter(limit, torch.tensor(INF))]).requires_grad_()
    limited = ALRC(start=START)(losses)
    limited.sum().backward()
    assert limited.tolist() == [limit.item()] * 2
    assert losses.grad is not None
    assert losses.grad[0] == 1
    assert losses.grad[1] == limit / losses[1] < 1


@pytest.mark.parametrize("shape", [(0,), (3, 0)], ids=str)
def test_an_empty_batch_changes_nothing(shape: tuple[int, ...]) -> None:
    module = ALRC(start=START)
    before = state_of(module)
    losses = torch.empty(shape, requires_grad=True)
    limited = module(losses)
    limited.sum().backward()
    assert limited.shape == shape
    assert state_of(module) == before
    assert module.last is not None
    assert module.last.fraction_limited == 0
    assert module.last.nonfinite == 0
    assert not torch.isnan(module.limit)


@pytest.mark.parametrize("reduce", [torch.mean, torch.sum], ids=["mean", "sum"])
def test_scales_what_each_example_does_to_the_weights(reduce: Callable[[Tensor], Tensor]) -> None:
    network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    images, wanted = torch.randn(6, 3).double(), 3 * torch.randn(6, 1).double()
    losses = (network(images) - wanted).square().flatten()
    module = ALRC(start=START).double()
    factors = (module.limit / losses.detach()).clamp(max=1)
    assert 0 < (factors < 1).sum() < 6
    reduce(module(losses)).backward()
    for name, weight in network.named_parameters():
        by_hand = torch.zeros_like(weight)
        for i in range(6):
            alone = (network(images[i : i + 1]) - wanted[i : i + 1]).square().sum()
            by_hand += factors[i] * torch.autograd.grad(alone, weight)[0]
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, by_hand / (6 if reduce is torch.mean else 1), msg=name)


def as_written(losses: Tensor, limit: Tensor) -> Tensor:
    """Write the rule as the paper does, with a constant factor."""
    return torch.where(losses > limit, losses * (limit / losses).detach(), losses)


@pytest.mark.parametrize("apply", [ALRC.forward, lambda module, losses: losses.clamp(max=module.limit)])
def test_derivatives_of_first_and_second_order_are_those_of_a_constant_factor(apply: Any) -> None:
    torch.manual_seed(1)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    module = ALRC(start=START).double()

    def derivatives(rule: Callable[[Tensor], Tensor]) -> list[Tensor]:
        losses = (weight * torch.arange(1.0, 6)).square()  # Second derivatives do not vanish.
        (first,) = torch.autograd.grad(rule(losses).square().sum(), weight, create_graph=True)
        (second,) = torch.autograd.grad((first * torch.arange(5)).sum(), weight)
        return [first, second]

    limit = module.limit
    want = derivatives(lambda losses: as_written(losses, limit))
    got = derivatives(lambda losses: apply(module, losses))
    is_right = all(torch.allclose(*pair, rtol=1e-12) for pair in zip(got, want, strict=True))
    assert is_right == (apply is ALRC.forward)  # Clamping, with its zero gradient, must not pass.


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("start", ["auto", START], ids=str)
def test_a_loss_that_is_not_finite_is_left_out(bad: float, start: Any) -> None:
    poisoned, clean = ALRC(start=start, observe=4), ALRC(start=start, observe=4)
    for losses in ([0.5, 2.0, 1.0], [9.0, 0.1, 0.2], [0.3, 0.3, 30.0]):
        clean(torch.tensor(losses))
        leaf = torch.tensor([losses[0], bad, *losses[1:], bad], requires_grad=True)
        limited = poisoned(leaf)
        limited.mean().backward()
        assert leaf.grad is not None
        assert torch.all(torch.isfinite(limited))
        assert leaf.grad[1] == leaf.grad[4] == 0
        assert torch.all(leaf.grad[[0, 2, 3]] > 0)
        assert poisoned.last is not None
        assert poisoned.last.nonfinite == 2
    torch.testing.assert_close(poisoned.state_dict(), clean.state_dict(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("losses", [NAN, INF, [NAN, -INF]], ids=str)
def test_a_call_without_a_finite_loss_leaves_the_state_alone(losses: Any) -> None:
    module = ALRC(start=START)
    before = state_of(module)
    leaf = torch.tensor(losses, requires_grad=True)
    module(leaf).sum().backward()
    assert state_of(module) == before
    assert leaf.grad is not None
    assert torch.all(leaf.grad == 0)
    assert module.last is not None
    assert module.last.nonfinite == leaf.numel()
    assert module.last.fraction_limited == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_gives_back_the_dtype_it_was_given_and_keeps_its_own(dtype: torch.dtype) -> None:
    module = ALRC(start=START)
    losses = torch.tensor([0.5, 2.0, 4.0], dtype=dtype, requires_grad=True)
    limited = module(losses)
    limited.sum().backward()
    assert losses.grad is not None
    assert limited.dtype == losses.grad.dtype == dtype
    limit = torch.tensor(1.6).to(dtype)
    torch.testing.assert_close(limited.detach(), torch.stack([losses.detach()[0], limit, limit]), rtol=1e-6, atol=0)
    torch.testing.assert_close(losses.grad, torch.tensor([1, 0.8, 0.4], dtype=dtype))
    assert module.mean.dtype == module.var.dtype == torch.float32
    assert module.count.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_squares_of_half_precision_losses_do_not_overflow(dtype: torch.dtype) -> None:
    stream = np.random.default_rng(1).uniform(300, 60_000, (64, 7))
    stream = torch.tensor(stream).to(dtype)
    module = ALRC(num_stddev=10)
    for losses in stream:
        limited = module(losses)
        assert torch.all(torch.isfinite(limited))
    want = alrc_trace(stream.double().numpy(), num_stddev=10)
    assert module.mu1.item() == pytest.approx(want.mu1[-1], rel=1e-5)
    assert module.mu2.item() == pytest.approx(want.mu2[-1], rel=1e-5)


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.float16)])
def test_conversion_to_half_precision_leaves_the_moments_in_float32(convert: Callable[[nn.Module], Any]) -> None:
    module = ALRC(start=(1000.0, 1000.0**2 + 0.01))
    before = state_of(module)
    model = nn.Sequential(nn.Linear(2, 2), module)
    assert convert(model) is model
    assert next(model.parameters()).dtype in (torch.float16, torch.bfloat16)
    assert module.mean.dtype == module.var.dtype == torch.float32
    assert state_of(module) == before


def test_conversion_to_double_is_followed() -> None:
    module = ALRC(start=START).double()
    assert module.mean.dtype == module.var.dtype == torch.float64
    assert module.float().mean.dtype == torch.float32


@pytest.mark.parametrize("convert", [lambda m: m, nn.Module.half, nn.Module.double], ids=["float", "half", "double"])
def test_moving_to_another_device_keeps_the_dtypes(convert: Callable[[nn.Module], Any]) -> None:
    module = convert(ALRC())
    dtypes = [buffer.dtype for buffer in module.buffers()]
    moved = module.to("meta")
    assert [buffer.dtype for buffer in moved.buffers()] == dtypes
    assert {buffer.device.type for buffer in moved.buffers()} == {"meta"}


def test_double_precision_is_used_all_the_way() -> None:
    """Losses and state in float64: as exact as the pure rule in float64."""
    rule = rules.ALRC(betas=(0.9, 0.9), start=(1.0, 1.0625))  # Starts on a number float32 can hold.
    module, state = ALRC.from_rule(rule).double(), rule.init()
    for losses in np.random.default_rng(2).lognormal(0, 0.5, (50, 3)):
        module(torch.tensor(losses))
        state = rule.update(losses, rule.decide(losses, state), state)
    assert module.mean.item() == pytest.approx(state.mean, rel=1e-13)
    assert module.var.item() == pytest.approx(state.var, rel=1e-12)


class _Undivided(TracedOps):
    """Known wrong: lets torch divide whole numbers into float32, whatever the state is."""

    real = staticmethod(lambda x, like: x)


@pytest.mark.parametrize(("ops", "is_right"), [(EAGER, True), (TRACED, True), (_Undivided(), False)])
def test_the_default_rule_on_tensors_is_as_exact_as_its_state(ops: TorchOps, is_right: bool) -> None:
    """What is not counted on the host, such as a device or a compiled step, divides counts in the state's precision."""
    rule = rules.ALRC()
    want = rule.init()
    fields = zip(want._fields, want, strict=True)
    state = type(want)(*(torch.tensor(x, dtype=torch.int64 if n == "count" else torch.float64) for n, x in fields))
    gaps = list[float]()
    for losses in np.random.default_rng(2).lognormal(0, 1, (80, 3)):
        want = rule.update(losses, rule.decide(losses, want), want)
        tensor = torch.tensor(losses)
        state = rule.update(tensor, rule.decide(tensor, state, ops), state, ops)
        gaps.append(abs(state.mean.item() / want.mean - 1))
    assert (max(gaps) < 1e-13) == is_right


def test_works_under_autocast() -> None:
    network = nn.Linear(4, 1)
    images = torch.randn(32, 4)
    module, plain = ALRC(start=START), ALRC(start=START)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = network(images).square() * 4
        assert losses.dtype == torch.bfloat16
        limited = module(losses)
        limited.mean().backward()
    assert limited.dtype == torch.bfloat16
    assert bits(limited) == bits(plain(losses.detach()))
    assert state_of(module) == state_of(plain)
    assert module.mean.dtype == torch.float32
    assert module.last is not None
    assert 0 < module.last.fraction_limited < 1
    assert network.weight.grad is not None
    assert torch.all(torch.isfinite(network.weight.grad))


def test_eval_mode_passes_through_and_learns_nothing() -> None:
    module = ALRC(start=START)
    module(torch.tensor([1.0, 5.0]))
    before, last = state_of(module), module.last
    module.eval()
    losses = torch.tensor([0.5, 100.0, NAN], requires_grad=True)
    passed = module(losses)
    assert passed is losses
    passed.sum().backward()
    assert losses.grad is not None
    assert losses.grad.tolist() == [1, 1, 1]
    assert state_of(module) == before
    assert module.last is not None
    assert last is not None
    assert bits(module.last.scale) == bits(last.scale)
    module.train()
    assert module(torch.tensor(100.0)) < 2
    assert state_of(module) != before


def test_follows_the_mode_of_the_model_it_is_part_of() -> None:
    model = nn.ModuleDict({"network": nn.Linear(2, 1), "limit": ALRC()})
    assert model.eval()["limit"](torch.tensor(1.0)) == 1
    assert model["limit"].get_buffer("count") == 0
    model.train()["limit"](torch.tensor(1.0))
    assert model["limit"].get_buffer("count") == 1


def test_what_can_be_read_are_tensors() -> None:
    assert ALRC().last is None
    module = ALRC(observe=4)
    assert module.limit == INF
    for _ in range(4):
        module(torch.tensor([1.0, 3.0]))
    assert all(isinstance(value, Tensor) and value.ndim == 0 for value in (module.mu1, module.mu2, module.limit))
    assert (module.mu1, module.mu2, module.limit) == (2, 5, 5)
    assert isinstance(module.last, Telemetry)
    assert module.last.limit == INF  # The one these losses were held against.
    assert torch.equal(module.last.scale, torch.ones(2))
    assert module.last.largest == 3

    module(torch.tensor([1.0, 10.0, 20.0, NAN, INF, 0.0]))
    assert module.last.limit == 5
    torch.testing.assert_close(module.last.scale, torch.tensor([1, 0.5, 0.25, 0, 0, 1]))
    assert module.last.fraction_limited.item() == pytest.approx(2 / 4)
    assert module.last.nonfinite == 2
    assert module.last.nonpositive == 1
    assert module.last.largest == 20
    assert not module.last.nonfinite.is_floating_point()
    want = alrc_trace([[1.0, 3.0]] * 4 + [[1.0, 10.0, 20.0, NAN, INF, 0.0]], observe=4)
    assert module.mu1.item() == pytest.approx(want.mu1[-1])
    assert module.mu2.item() == pytest.approx(want.mu2[-1])
    assert not any(value.requires_grad for value in (*module.last, module.mu1, module.mu2, module.limit))


def test_a_value_read_once_does_not_change_with_the_next_step() -> None:
    module = ALRC(start=START)
    mu1, mu2, limit = module.mu1, module.mu2, module.limit
    before = [mu1.item(), mu2.item(), limit.item()]
    module(torch.tensor(1.5))
    assert [mu1.item(), mu2.item(), limit.item()] == before


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_refuses_losses_that_are_not_floating_point(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=str(dtype)):
        ALRC()(torch.ones(3, dtype=dtype))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("paper", (2.0, (0.9, 0.99), 4.0, 20.0)),
        ("reference", (2.0, 0.99, 6.0, 60.0)),
        ("cifar_scripts", (2.0,)),
        ("paper", ()),
        ("reference", ()),
        ("cifar_scripts", ()),
    ],
)
def test_presets_apply_the_preset_of_the_core(name: str, arguments: tuple[Any, ...]) -> None:
    module = getattr(ALRC, name)(*arguments)
    rule = getattr(rules.ALRC, name)(*arguments)
    assert isinstance(module, ALRC)
    assert module.rule == rule
    state = rule.init()
    for losses in np.random.default_rng(3).lognormal(3, 1, (40, 4)):
        decision = rule.decide(losses, state)
        leaf = torch.tensor(losses, requires_grad=True)
        limited = module(leaf)
        limited.sum().backward()
        state = rule.update(losses, decision, state)
        np.testing.assert_allclose(limited.detach(), decision.limited, rtol=1e-5)
        assert leaf.grad is not None
        np.testing.assert_allclose(leaf.grad, decision.scale, rtol=1e-5)
        np.testing.assert_allclose([module.mu1, module.mu2], [state.mu1, state.mu2], rtol=1e-5)


def test_shows_its_settings() -> None:
    assert repr(ALRC()) == "ALRC()"
    assert "num_stddev=2.0" in repr(ALRC(2.0))


NASTY = [0.0, -0.0, 1e-45, 1e-38, 0.5, 1.0, 1e10, 1e19, 1e20, 3e38, -1.0, -3e38, NAN, INF, -INF]
RULES = [
    rules.ALRC(observe=4),
    rules.ALRC(start=START),
    rules.ALRC(start=(-1.0, 1.5)),
    rules.ALRC.paper(3.0, (0.99, 0.9), 1.0, 1.04),
    rules.ALRC.paper(mu1=1.0, mu2=1.04),
    rules.ALRC.cifar_scripts(),
]


@given(
    rule=st.sampled_from(RULES),
    stream=st.lists(st.lists(st.sampled_from(NASTY) | st.floats(width=32), min_size=1, max_size=3), max_size=6),
)
@example(rule=RULES[3], stream=[[3e38], [1.0]])
@example(rule=RULES[0], stream=[[1e20], [1.0], [1.0]])
@example(rule=rules.ALRC(start=(1e-9, 1.04e-18)), stream=[[3e38, 1e-9]])
def test_scale_is_always_a_factor_from_zero_to_one(rule: rules.ALRC, stream: list[list[float]]) -> None:
    module = ALRC.from_rule(rule)
    for losses in stream:
        leaf = torch.tensor(losses, requires_grad=True)
        limited = module(leaf)
        limited.sum().backward()
        assert leaf.grad is not None
        assert torch.all((leaf.grad >= 0) & (leaf.grad <= 1)), f"{losses} → {leaf.grad}"
        assert torch.all(torch.isfinite(limited)), f"{losses} → {limited}"
        assert not torch.isnan(module.mean)
        assert not torch.isnan(module.var)
        assert module.last is not None
        ceiling = np.float32(min(float(module.last.limit), rules.LARGEST_LOSS))
        with np.errstate(all="ignore"):  # S8: so far above the limit that the factor underflows counts as non-finite
            gone = [not np.isfinite(loss) or (loss > ceiling and ceiling / np.float32(loss) == 0) for loss in losses]
        assert module.last.nonfinite == sum(gone)


@pytest.mark.parametrize("exponent", [-26, 26])
def test_auto_decides_bit_for_bit_the_same_in_another_unit(exponent: int) -> None:
    stream = torch.randn(80, 3).mul(0.5).exp() * torch.where(torch.rand(80, 3) < 0.1, 30, 1)
    module, other = ALRC(observe=8), ALRC(observe=8)
    limited = 0
    for losses in stream:
        module(losses)
        other(losses * 2.0**exponent)
        assert module.last is not None
        assert other.last is not None
        assert bits(other.last.scale) == bits(module.last.scale)
        limited += int((module.last.scale < 1).sum())
    assert limited > 5


def test_a_state_of_moments_is_what_the_core_calls_one() -> None:
    rule = rules.ALRC.reference()
    module = ALRC.from_rule(rule)
    assert Moments(module.mean.item(), module.var.item(), module.count.item()) == rule.init()
