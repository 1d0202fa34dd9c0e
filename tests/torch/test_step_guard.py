"""Hold the step guard to its word: a skipped update is one that never was, in every mode, for every optimiser.

The oracle is the same run without the skipped steps: weights and everything the optimiser keeps are compared bit for
bit. Known-wrong guards must fail the same comparison.
"""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from alrc.torch import StepGuard
from bitwise import same

Make = Callable[[Any], Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, foreach=False),
    "SGD foreach": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "SGD dampening": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
    "Adam": lambda p: optim.Adam(p, foreach=False),
    "Adam foreach": lambda p: optim.Adam(p, foreach=True),
    "AdamW amsgrad": lambda p: optim.AdamW(p, amsgrad=True),
    "RMSprop": lambda p: optim.RMSprop(p, momentum=0.9, centered=True),
    "Adagrad": lambda p: optim.Adagrad(p, initial_accumulator_value=0.1),
    "Adadelta": optim.Adadelta,
    "NAdam": optim.NAdam,
    "RAdam": optim.RAdam,
    "Adamax": optim.Adamax,
    "ASGD": optim.ASGD,
    "Rprop": optim.Rprop,
    "Adafactor": optim.Adafactor,
}
FUSED: dict[str, Make] = {
    "SGD": lambda p: optim.SGD(p, lr=0.1, fused=True),
    "SGD momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, fused=True),
    "SGD dampening": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5, fused=True),
    "Adam": lambda p: optim.Adam(p, fused=True),
    "AdamW amsgrad": lambda p: optim.AdamW(p, amsgrad=True, fused=True),
    "Adagrad": lambda p: optim.Adagrad(p, fused=True),
}
POISON = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "max": torch.finfo(torch.float32).max}
Bad = dict[int, float]
Step = Callable[[Optimizer], Callable[[], None]]


def guarded(**settings: Any) -> Step:
    """Return what makes a guarded step of an optimiser."""
    return lambda optimizer: StepGuard(optimizer, **settings).step


def train(make: Make, make_step: Step | None, bad: Bad, steps: int = 8) -> tuple[list[Tensor], Optimizer]:
    """Take steps of two micro-batches each, with poison in the first; without a guard, leave poisoned steps out."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (5,), ())]
    frozen = nn.Parameter(torch.ones(2))
    optimizer = make([*parameters, frozen])
    step = optimizer.step if make_step is None else make_step(optimizer)
    for index in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        if index in bad:
            assert parameters[0].grad is not None
            parameters[0].grad[1, 2] = bad[index]
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad += torch.randn(parameter.shape, generator=generator)
        if make_step is not None or index not in bad:
            step()
    assert torch.equal(frozen, torch.ones(2))
    return parameters, optimizer


def is_as_if_never_called(make: Make, make_step: Step, bad: Bad) -> bool:
    """Tell whether a guarded run equals the run without the poisoned steps."""
    weights, optimizer = train(make, make_step, bad)
    expected, reference = train(make, None, bad)
    # Groups may differ in nothing, states in nothing but parameters that have none.
    states = [
        {key: value for key, value in each.state_dict()["state"].items() if value} for each in (optimizer, reference)
    ]
    return same(weights, expected) and same(*states) and same(optimizer.param_groups, reference.param_groups)


BAD_STEPS: dict[str, tuple[int, ...]] = {"first": (0,), "early": (1,), "several": (0, 1, 4, 7)}


@pytest.mark.parametrize("steps", BAD_STEPS.values(), ids=BAD_STEPS)
@pytest.mark.parametrize("mode", ["select", "host"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_skipped_step_never_was(make: Make, mode: str, steps: Iterable[int]) -> None:
    assert is_as_if_never_called(make, guarded(mode=mode), dict.fromkeys(steps, math.nan))


@pytest.mark.parametrize("steps", BAD_STEPS.values(), ids=BAD_STEPS)
@pytest.mark.parametrize("make", FUSED.values(), ids=FUSED)
def test_a_skipped_step_never_was_where_kernels_are_fused(make: Make, steps: Iterable[int]) -> None:
    for mode in ("auto", "select"):
        assert is_as_if_never_called(make, guarded(mode=mode), dict.fromkeys(steps, math.nan))


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("value", POISON.values(), ids=POISON)
@pytest.mark.parametrize("mode", ["select", "host", "fused"])
def test_every_poison_is_skipped(mode: str, value: float, step: int) -> None:
    make = FUSED["AdamW amsgrad"] if mode == "fused" else OPTIMIZERS["AdamW amsgrad"]
    assert is_as_if_never_called(make, guarded(mode=mode), {step: value})


# ------------------------------------------------------------------------------------------- guards known to be wrong


def unguarded(optimizer: Optimizer) -> Callable[[], None]:
    """Step always."""
    return optimizer.step


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def multiplying(optimizer: Optimizer) -> Callable[[], None]:
    """Multiply gradients by 0 or 1, as published."""

    def step() -> None:
        factor = torch.stack([gradient.isfinite().all() for gradient in _gradients(optimizer)]).all().float()
        for gradient in _gradients(optimizer):
            gradient.mul_(factor)
        optimizer.step()

    return step


def zeroing(optimizer: Optimizer) -> Callable[[], None]:
    """Select zeros for gradients: weights are safe, moments decay and the step is counted."""

    def step() -> None:
        is_good = torch.stack([gradient.isfinite().all() for gradient in _gradients(optimizer)]).all()
        for gradient in _gradients(optimizer):
            gradient.copy_(torch.where(is_good, gradient, 0.0))
        optimizer.step()

    return step


def counting(optimizer: Optimizer) -> Callable[[], None]:
    """Restore everything but the number of steps."""
    guard = StepGuard(optimizer, mode="select")

    def step() -> None:
        guard.step()
        for state in optimizer.state.values():
            if "step" in state:
                state["step"] += guard.last.is_skipped

    return step


@pytest.mark.parametrize("wrong", [unguarded, multiplying, zeroing, counting], ids=lambda step: step.__name__)
def test_a_wrong_guard_is_caught(wrong: Step) -> None:
    assert is_as_if_never_called(OPTIMIZERS["Adam"], wrong, {})
    assert not is_as_if_never_called(OPTIMIZERS["Adam"], wrong, {3: math.nan})


# --------------------------------------------------------------------------------------------------------- the modes


def modes(make: Make, mode: str, bad: Bad, steps: int = 4) -> str:
    """Return the first letters of the modes of the steps of a run."""
    seen: list[str] = []

    def make_step(optimizer: Optimizer) -> Callable[[], None]:
        guard = StepGuard(optimizer, mode=mode)  # pyright: ignore[reportArgumentType]

        def step() -> None:
            guard.step()
            seen.append(guard.mode[0])

        return step

    train(make, make_step, bad, steps)
    return "".join(seen)


def test_says_how_it_decides() -> None:
    assert modes(FUSED["Adam"], "auto", {0: math.nan}) == "ffff"
    assert modes(FUSED["SGD momentum"], "auto", {0: math.nan}) == "ffff"
    # Its first gradient is not weighed like the others, so the step that makes the momentum must know.
    assert modes(FUSED["SGD dampening"], "auto", {0: math.nan}) == "hhff"
    assert modes(OPTIMIZERS["Adam"], "auto", {}) == "hhhh", "the verdict lies in the CPU's memory"
    assert modes(OPTIMIZERS["Adam"], "select", {}) == "hsss", "the first step makes the state"
    assert modes(OPTIMIZERS["Adam"], "select", {0: math.nan}) == "hhss"
    assert modes(OPTIMIZERS["Adagrad"], "select", {}) == "ssss"


class Stateful(Optimizer):
    """Average gradients, and keep the average in a way of its own."""

    def __init__(self, params: Any, way: str) -> None:
        super().__init__(params, {"lr": 0.1})
        self.way = way
        self.calls = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if self.way == "refuses" and not parameter.grad.isfinite().all():
                    raise ArithmeticError("a gradient is not finite")
                state = self.state[parameter]
                average = 0.9 * state.get("average", torch.zeros_like(parameter)) + parameter.grad
                state["average"] = average  # a new tensor each time
                if self.way == "appears" and float(average.sum()) > 1 and "late" not in state:
                    state["late"] = average.clone()
                if self.way == "number":
                    state["number"] = state.get("number", 0) + 1
                if self.way == "attribute":
                    self.calls += 1
                parameter -= group["lr"] * average * (1 + state.get("number", 0) + self.calls) + state.get("late", 0.0)


@pytest.mark.parametrize("way", ["plain", "appears", "number", "attribute", "refuses"])
@pytest.mark.parametrize("mode", ["auto", "select", "host"])
def test_an_optimiser_may_keep_what_it_likes(way: str, mode: str) -> None:
    step = guarded(mode=mode)
    if mode == "select" and way in ("number", "attribute"):
        with pytest.raises(RuntimeError, match="mode='select' cannot undo what Stateful changes"):
            train(lambda p: Stateful(p, way), step, {})
        return
    for bad in ((0,), (3,), (2, 5, 6)):
        assert is_as_if_never_called(lambda p: Stateful(p, way), step, dict.fromkeys(bad, math.nan))


@pytest.mark.parametrize("way", ["appears", "attribute"])
def test_what_only_python_can_undo_is_undone_when_it_is_found(way: str) -> None:
    weight = nn.Parameter(torch.zeros(3))
    optimizer = Stateful([weight], way)
    optimizer.state[weight]["average"] = torch.ones(3)  # as if loaded: there is nothing new for the guard to wait for
    guard = StepGuard(optimizer, mode="select")
    weight.grad = torch.full((3,), 1e30)
    before = copy.deepcopy(optimizer.state_dict())
    guard.step()
    assert guard.mode == "select"
    assert bool(guard.last.is_skipped)
    assert same(before, optimizer.state_dict())
    assert optimizer.calls == 0
    assert torch.equal(weight, torch.zeros(3))


@pytest.mark.parametrize("kind", ["Lion", "AdamP", "SOAP", "ScheduleFreeAdamW"])
def test_third_party_optimisers(kind: str) -> None:
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer", reason="these are its optimisers")
    make: Make = getattr(pytorch_optimizer, kind)
    for bad in ((0,), (3,), (2, 5, 6)):
        assert is_as_if_never_called(make, guarded(), dict.fromkeys(bad, math.nan))
    with pytest.raises(RuntimeError, match=f"cannot undo what {kind} changes: Python numbers in its groups"):
        train(make, guarded(mode="select"), {})


def test_refuses_what_it_cannot_guard() -> None:
    weight = nn.Parameter(torch.zeros(3))
    with pytest.raises(TypeError, match="LBFGS evaluates its closure"):
        StepGuard(optim.LBFGS([weight]))
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer, got list"):
        StepGuard([weight])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="must be 'auto', 'fused', 'select' or 'host', got 'device'"):
        StepGuard(optim.Adam([weight]), mode="device")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="needs an optimiser that reads found_inf, and this Adam does not"):
        StepGuard(optim.Adam([weight]), mode="fused")
    with pytest.raises(ValueError, match="max_consecutive_skips must be a whole number ≥ 1, or None, got 0"):
        StepGuard(optim.Adam([weight]), max_consecutive_skips=0)


@pytest.mark.parametrize("mode", ["fused", "select", "host"])
def test_hooks_of_the_step_see_the_verdict_and_the_committed_state(mode: str) -> None:
    weight = nn.Parameter(torch.zeros(3))
    optimizer = optim.Adam([weight], fused=mode == "fused")
    seen: list[tuple[float, float]] = []

    def look(optimizer: Any, *_: Any) -> None:
        seen.append((float(optimizer.found_inf), float(weight.detach().isfinite().all())))

    optimizer.register_step_post_hook(look)  # before the guard is made
    guard = StepGuard(optimizer, mode=mode)  # pyright: ignore[reportArgumentType]
    optimizer.register_step_post_hook(look)
    for value in (1.0, math.nan, 1.0):
        weight.grad = torch.full((3,), value)
        guard.step()
        assert not hasattr(optimizer, "found_inf")
        assert not hasattr(optimizer, "grad_scale")
    skipped = [] if mode == "host" else [(1.0, 1.0)] * 2  # on the host the optimiser is not called
    assert seen == [(0.0, 1.0)] * 2 + skipped + [(0.0, 1.0)] * 2


def test_the_optimiser_steps_as_ever_without_the_guard() -> None:
    weight = nn.Parameter(torch.zeros(3))
    optimizer = optim.SGD([weight], lr=1.0)
    StepGuard(optimizer)
    weight.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(weight, -torch.ones(3))


@pytest.mark.parametrize("mode", ["select", "host"])
def test_a_scheduler_does_not_warn_after_a_skipped_first_step(mode: str) -> None:
    weight = nn.Parameter(torch.zeros(3))
    optimizer = optim.SGD([weight], lr=1.0)
    guard = StepGuard(optimizer, mode=mode)  # pyright: ignore[reportArgumentType]
    scheduler = optim.lr_scheduler.StepLR(optimizer, 1)
    weight.grad = torch.full((3,), math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guard.step()
        scheduler.step()


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps], ids=lambda f: f.__name__)
def test_a_guard_is_not_copied(duplicate: Any) -> None:
    """A copy would look like a guard and hang on the optimiser of the original."""
    guard = StepGuard(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1))
    with pytest.raises(TypeError, match=r"cannot be (copied|pickled).*state_dict"):
        duplicate(guard)
