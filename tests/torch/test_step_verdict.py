"""Check what the step guard judges, counts, reports and stores, and that it waits for nothing."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from alrc.rules import SkipStep
from alrc.torch import StepGuard, TooManySkips
from alrc.torch.arrival import Arrival
from bitwise import same
from waiting import RefuseReading, WaitedError, refusing

Make = Callable[[Any], Optimizer]


def one_weight(rule: SkipStep | None = None, **settings: Any) -> tuple[nn.Parameter, StepGuard]:
    """Return a weight and the guard of its optimiser."""
    weight = nn.Parameter(torch.zeros(2))
    return weight, StepGuard(optim.Adam([weight], fused=True), rule, **settings)


@pytest.mark.parametrize(
    ("dtype", "value", "is_skipped"),
    [
        (torch.float16, 3e4, False),  # its norm overflows half precision, and is measured in float32
        (torch.bfloat16, 1e15, False),
        (torch.float32, 1e15, False),
        (torch.float32, 1e25, True),  # its square, which Adam keeps, is infinite
        (torch.float64, 1e25, False),
        (torch.float64, 1e200, True),
    ],
    ids=str,
)
def test_finite_gradients_are_judged_by_what_they_would_do(dtype: torch.dtype, value: float, is_skipped: bool) -> None:
    weight = nn.Parameter(torch.zeros(64, dtype=dtype))
    guard = StepGuard(optim.SGD([weight], lr=0.0))
    weight.grad = torch.full_like(weight, value)
    guard.step()
    assert bool(guard.last.is_skipped) == is_skipped
    if not is_skipped:
        assert float(guard.last.norm) == pytest.approx(float(weight.grad.double().norm()), rel=1e-5)


@pytest.mark.parametrize(
    ("make", "mode"),
    [(optim.SparseAdam, "auto"), (lambda p: optim.SGD(p, lr=0.1), "select")],
    ids=["SparseAdam", "SGD"],
)
def test_sparse_gradients(make: Make, mode: Any) -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    guard = StepGuard(make(embedding.parameters()), mode=mode)
    for scale in (1.0, 1.0, math.nan):
        before = embedding.weight.detach().clone()
        embedding.weight.grad = None
        (scale * embedding(torch.tensor([1, 1, 3]))).sum().backward()
        guard.step()
        assert torch.equal(before, embedding.weight) == math.isnan(scale)
    assert bool(guard.last.is_skipped)


def test_no_gradients_are_no_reason() -> None:
    _, guard = one_weight()
    guard.step()
    assert not guard.last.is_skipped
    assert guard.last.norm == 0


def test_a_norm_that_is_given_is_trusted() -> None:
    weight, guard = one_weight()
    for given, is_skipped in ((1.0, False), (math.inf, True), (math.nan, True)):
        weight.grad = torch.ones(2)
        guard.step(norm=torch.tensor(given))
        assert bool(guard.last.is_skipped) == is_skipped


def run_rule(rule: SkipStep, **settings: Any) -> list[int]:
    """Return the steps that a rule rejects of 320, with spikes in the loss and one in the gradient."""
    weight, guard = one_weight(rule, **settings)
    generator = torch.Generator().manual_seed(0)
    rejected = []
    for step in range(320):
        loss, gradient = 1 + 0.1 * torch.rand(2, generator=generator).unbind()[0], torch.rand(2, generator=generator)
        loss = loss * {100: 1000, 110: 100, 300: 100}.get(step, 1)
        weight.grad = gradient * {150: 1e4, 160: math.nan, 310: 100}.get(step, 1)
        guard.step(loss=loss)
        if guard.last.is_skipped:
            rejected.append(step)
    return rejected


def test_a_rule_rejects_spikes_and_nothing_else() -> None:
    assert run_rule(SkipStep()) == [100, 110, 150, 160, 300, 310]


def test_the_loss_is_given_always_or_never() -> None:
    weight, guard = one_weight(SkipStep())
    weight.grad = torch.ones(2)
    guard.step(loss=torch.tensor(1.0))
    with pytest.raises(ValueError, match="step 1 was given no loss, unlike the steps before"):
        guard.step()
    with pytest.raises(ValueError, match=r"loss must be one number, got shape \(2,\); pass its mean"):
        guard.step(loss=torch.ones(2))
    weight, guard = one_weight()  # without a rule it is evidence only
    weight.grad = torch.ones(2)
    guard.step(loss=torch.tensor(math.nan))
    guard.step()
    assert guard.last.total_skipped == 0


def test_telemetry() -> None:
    weight, guard = one_weight()
    seen = []
    for value in (3.0, math.nan, math.nan, 4.0):
        weight.grad = torch.tensor([value, 0.0])
        guard.step()
        seen.append(guard.last)
    assert [bool(last.is_skipped) for last in seen] == [False, True, True, False]
    assert [int(last.consecutive) for last in seen] == [0, 1, 2, 0]
    assert [int(last.total_skipped) for last in seen] == [0, 1, 2, 2]
    assert [int(last.step) for last in seen] == [0, 1, 2, 3]
    assert [float(seen[0].norm), float(seen[3].norm)] == [3.0, 4.0]


# ----------------------------------------------------------------------------------------------------- loss scaling


def scaled(scale: float, mode: str, explicit: bool) -> tuple[list[int], list[float], Tensor]:
    """Train with a GradScaler; return the skipped steps, the loss scales, and the weight."""
    weight = nn.Parameter(torch.zeros(4))
    optimizer = optim.Adam([weight], lr=0.1, fused=mode == "fused")
    guard = StepGuard(optimizer, SkipStep(min_history=13), mode=mode)  # pyright: ignore[reportArgumentType]
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10_000)
    generator = torch.Generator().manual_seed(0)
    skipped, scales = [], []
    for step in range(60):
        factor = {5: math.nan, 30: math.inf, 40: 1000.0, 41: 3e38}.get(step, 1.0)
        loss = (factor * torch.rand(4, generator=generator) * weight).sum()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if explicit:
            scaler.unscale_(optimizer)
        guard.step(scaler=scaler)
        scaler.update()
        scales.append(scaler.get_scale())
        if guard.last.is_skipped:
            skipped.append(step)
    return skipped, scales, weight.detach()


@pytest.mark.parametrize("explicit", [True, False], ids=["unscaled before", "unscaled by the guard"])
@pytest.mark.parametrize("mode", ["fused", "select", "host"])
def test_decisions_do_not_depend_on_the_loss_scale(mode: str, explicit: bool) -> None:
    skipped, scales, weight = scaled(1.0, mode, explicit)
    skipped_scaled, scales_scaled, weight_scaled = scaled(65536.0, mode, explicit)
    assert skipped == skipped_scaled == [5, 30, 40, 41]
    assert torch.equal(weight, weight_scaled)
    # The scaler hears of what is not finite and not of what the rule rejects; 3e38 overflows when scaled.
    assert scales[-1] == 0.25
    assert scales_scaled[-1] == 65536 / 8
    assert scales_scaled[40] == 65536 / 4


def test_a_scaler_that_was_stepped_is_refused() -> None:
    weight, guard = one_weight()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale((weight * 1.0).sum()).backward()
    scaler.step(guard.optimizer)
    with pytest.raises(RuntimeError, match="after step"):
        guard.step(scaler=scaler)


def test_a_disabled_scaler_changes_nothing() -> None:
    weight, guard = one_weight()
    weight.grad = torch.ones(2)
    guard.step(scaler=torch.amp.GradScaler("cpu", enabled=False))
    assert not torch.equal(weight, torch.zeros(2))


# ------------------------------------------------------------------------------------------------------- the budget


def spend(guard: StepGuard, weight: nn.Parameter, values: Iterable[float], first: int = 0) -> None:
    """Make one step with each gradient."""
    for index, value in enumerate(values, start=first):
        weight.grad = torch.full((2,), float(value))
        guard.step(loss=torch.tensor(float(index)), ids=torch.tensor([index, 10 * index]))


def test_raises_with_evidence_when_the_budget_is_spent() -> None:
    weight, guard = one_weight(max_consecutive_skips=3)
    spend(guard, weight, [1, math.nan, math.nan, 1, math.nan, math.inf])
    with pytest.raises(TooManySkips) as caught:
        spend(guard, weight, [1e30], first=6)
    assert [entry.step for entry in caught.value.skipped] == [4, 5, 6]
    assert [entry.loss for entry in caught.value.skipped] == [4.0, 5.0, 6.0]
    assert [entry.ids for entry in caught.value.skipped] == [[4, 40], [5, 50], [6, 60]]
    assert str(caught.value) == (
        "3 updates in a row were skipped, steps 4 to 6; they left the weights as they were before step 4. "
        "Gradient norms: nan, inf (2 times). Losses: 4, 5, 6. Samples: [4, 40]; [5, 50]; [6, 60]. "
        "Look at these batches and at the learning rate, or raise max_consecutive_skips."
    )
    assert isinstance(caught.value, RuntimeError)
    spend(guard, weight, [math.nan, math.nan, 1], first=7)  # whoever catches it has the whole budget again
    assert guard.last.total_skipped == 7


def test_the_default_budget_is_twenty_and_none_is_none() -> None:
    weight, guard = one_weight()
    with pytest.raises(TooManySkips, match=r"^20 updates in a row were skipped, steps 0 to 19"):
        spend(guard, weight, [math.nan] * 50)
    weight, guard = one_weight(max_consecutive_skips=None)
    spend(guard, weight, [math.nan] * 50)


class SlowEvent:
    """Stand for a CUDA event that is reached at the third question."""

    def record(self) -> None:
        self.asked = 0

    def query(self) -> bool:
        self.asked += 1
        return self.asked > 2


def test_on_a_device_the_report_comes_late_and_is_right() -> None:
    weight, guard = one_weight(max_consecutive_skips=3)
    ledger = guard._ledger
    ledger._arrival = Arrival((ledger.counters, ledger.evidence), SlowEvent())
    spend(guard, weight, [1, 1, math.nan, math.nan, math.nan])
    with pytest.raises(TooManySkips) as caught:
        spend(guard, weight, [1.0] * 9, first=5)
    assert [entry.step for entry in caught.value.skipped] == [2, 3, 4]
    assert [entry.ids for entry in caught.value.skipped] == [[2, 20], [3, 30], [4, 40]]
    assert 6 < int(guard.last.step) < 13
    spend(guard, weight, [1.0] * 9, first=14)


# ---------------------------------------------------------------------------------------------------------- the state


def test_resumes_bit_for_bit() -> None:
    def go(guard: StepGuard, weight: nn.Parameter, steps: range) -> list[Tensor]:
        seen = []
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            weight.grad = torch.rand(2, generator=generator) * {20: math.nan, 31: 1000, 55: 1000}.get(step, 1)
            guard.step(loss=torch.rand((), generator=generator))
            seen.append(torch.stack([value.double() for value in guard.last]))
        return seen

    def make() -> tuple[nn.Parameter, StepGuard]:
        return one_weight(SkipStep(min_history=16, window=32))

    weight, guard = make()
    expected = go(guard, weight, range(60))
    other, guard_saved = make()
    seen = go(guard_saved, other, range(31))
    file = io.BytesIO()
    torch.save([guard_saved.state_dict(), guard_saved.optimizer.state_dict(), other.detach()], file)
    file.seek(0)
    state, optimizer_state, value = torch.load(file, weights_only=True)
    resumed, guard_resumed = make()
    guard_resumed.load_state_dict(state)
    guard_resumed.optimizer.load_state_dict(optimizer_state)
    resumed.data.copy_(value)
    seen += go(guard_resumed, resumed, range(31, 60))
    assert same(expected, seen)
    assert torch.equal(weight, resumed)
    assert same(guard.state_dict(), guard_resumed.state_dict())
    assert int(guard.last.total_skipped) == 3


def test_a_foreign_state_is_refused() -> None:
    _, guard = one_weight(SkipStep())
    state = guard.state_dict()
    with pytest.raises(ValueError, match="has version 2, but this alrc reads version 1"):
        guard.load_state_dict({**state, "version": 2})
    with pytest.raises(ValueError, match="that of a guard without a rule, unlike this one"):
        guard.load_state_dict(one_weight()[1].state_dict())
    with pytest.raises(ValueError, match=r"values has shape \(2, 64\) in the state and \(2, 128\) in this StepGuard"):
        guard.load_state_dict(one_weight(SkipStep(window=64))[1].state_dict())
    assert same(guard.state_dict(), state)


# ------------------------------------------------------------------------------------------------------- no waiting


@pytest.fixture
def no_reading() -> Iterator[None]:
    with refusing():
        yield


def walk(guard: StepGuard, weight: nn.Parameter, loss: Tensor, steps: int = 3) -> None:
    """Take steps, and read everything there is to read."""
    for _ in range(steps):
        weight.grad = torch.ones_like(weight)
        guard.step(loss=loss, ids=[1, 2])
        _ = guard.last, guard.mode, guard.state_dict()


def ready(mode: str, device: str = "cpu") -> tuple[StepGuard, nn.Parameter, Tensor]:
    """Return a guard whose optimiser has made its state."""
    weight = nn.Parameter(torch.zeros(2, device=device))
    make = optim.Adam if mode == "fused" else optim.SGD
    settings: dict[str, Any] = {"fused": True} if mode == "fused" else {"momentum": 0.9}
    optimizer = make([weight], lr=0.1, **settings)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    guard = StepGuard(optimizer, SkipStep(), mode=mode)  # pyright: ignore[reportArgumentType]
    return guard, weight, torch.ones((), device=device)


@pytest.mark.parametrize("mode", ["fused", "select"])
def test_reads_no_tensor(mode: str, request: pytest.FixtureRequest) -> None:
    walker = ready(mode)
    request.getfixturevalue("no_reading")
    walk(*walker)
    assert walker[0].mode == mode


@pytest.mark.parametrize("mode", ["fused", "select"])
def test_calls_no_operator_that_reads(mode: str) -> None:
    walker = ready(mode)
    with RefuseReading():
        walk(*walker)


def test_runs_where_there_is_nothing_to_read() -> None:
    walk(*ready("select", "meta"))


def test_a_guard_that_reads_is_caught(request: pytest.FixtureRequest) -> None:
    with pytest.raises(NotImplementedError, match=r"[Mm]eta"):
        walk(*ready("host", "meta"))
    guard, weight, loss = ready("select")
    guard.optimizer.register_step_post_hook(lambda optimizer, *_: optimizer.found_inf.item())
    with RefuseReading(), pytest.raises(WaitedError):
        walk(guard, weight, loss)
    request.getfixturevalue("no_reading")
    with pytest.raises(WaitedError):
        walk(guard, weight, loss)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["fused", "select"])
def test_the_driver_sees_no_wait(mode: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    walker = ready(mode, "cuda")
    walk(*walker)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        walk(*walker, steps=50)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    def spoil() -> None:
        for _ in range(200):
            walker[1].grad = torch.full_like(walker[1], math.nan)
            walker[0].step(loss=walker[2])
            torch.cuda.synchronize()

    with pytest.raises(TooManySkips):
        spoil()
