"""Check that a step that is skipped leaves no trace in an attached limiter: by a device, a loss scaler, or its user.

The oracle is the same run without the skipped steps. The twin is a limiter that is not attached.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from alrc.torch import ALRC, StepGuard
from attached_runs import MAKES, START, Attach, Weighted, attached, close_states, not_attached, run, spiky
from bitwise import same


class Judged(torch.optim.SGD):
    """Let the tests say whether a step is skipped on the device, as loss scalers and step guards do."""

    verdict: Any = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.found_inf = self.verdict


@pytest.mark.parametrize("path", ["host", "device"])
@pytest.mark.parametrize("found", [torch.tensor(1.0), torch.tensor([2.0]), torch.tensor(True), 1, True], ids=str)
def test_a_step_that_the_device_skips_commits_nothing(found: Any, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "device":
        for module in ("loss", "learner"):
            monkeypatch.setattr(f"alrc.torch.{module}.is_on_host", lambda x: False)
    for make in MAKES.values():
        limit, oracle = make(), make()
        model = Weighted()
        optimizer = Judged(model.parameters())
        limit.attach(optimizer)
        for step, losses in enumerate(spiky(10, 3)):
            optimizer.verdict = found if step % 3 == 1 else [None, 0 * torch.as_tensor(found)][step % 2]
            optimizer.zero_grad()
            limit(model(losses)).sum().backward()
            optimizer.step()
            if step % 3 != 1:
                oracle(losses)
            close_states(limit, oracle)
        shapes = {name: value.shape for name, value in limit.state_dict().items()}
        assert shapes == {name: value.shape for name, value in make().state_dict().items()}


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3, fused=False),
    "fused Adam": lambda p: torch.optim.Adam(p, lr=1e-3, fused=True),
    "fused SGD": lambda p: torch.optim.SGD(p, lr=1e-3, fused=True),
}


def scaled_run(name: str, attach: Attach, order: str, scale: float = 64.0, bad: bool = True) -> tuple[ALRC, Weighted]:
    """Train by a loss scaler; steps 3, 7 and 8 overflow, or are left out."""
    limit, model = ALRC(observe=4), Weighted()
    optimizer = OPTIMIZERS[name](model.parameters())
    attach(limit, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10_000)
    generator = torch.Generator().manual_seed(1)
    for step, losses in enumerate(torch.randn(14, 2, 3, generator=generator).mul(0.3).exp()):
        is_bad = step in (3, 7, 8)
        if is_bad and not bad:
            continue
        if order == "first":
            optimizer.zero_grad()
        for i, part in enumerate(losses):
            limited = limit(model(part * (40 if step == 6 else 1)))
            if order == "between" and i == 0:
                optimizer.zero_grad()
            loss = limited.mean()
            scaler.scale(loss * torch.inf if is_bad and i == 1 else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if order == "in place":
            optimizer.zero_grad(set_to_none=False)
            if is_bad:
                limit.discard()
        if order == "last":
            optimizer.zero_grad()
    return limit, model


@pytest.mark.parametrize("order", ["first", "between", "last", "in place"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_a_loss_scaler_skips_leaves_no_trace(name: str, order: str) -> None:
    limit, model = scaled_run(name, attached, order)
    oracle, expected = scaled_run(name, attached, order, bad=False)
    assert limit.count == 11
    close_states(limit, oracle)
    torch.testing.assert_close(model.weight, expected.weight)


@pytest.mark.parametrize("order", ["first", "between"])
@pytest.mark.parametrize("mode", ["fused", "select", "host"])
def test_a_step_that_a_guard_skips_leaves_no_trace(mode: Any, order: str) -> None:
    def train(bad: tuple[int, ...], left_out: tuple[int, ...] = ()) -> ALRC:
        limit, model = ALRC(observe=4), Weighted()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, fused=mode == "fused")
        limit.attach(optimizer)
        guard = StepGuard(optimizer, mode=mode)
        for step, losses in enumerate(torch.arange(1.0, 13.0).div(10).exp().unsqueeze(1)):
            if step in left_out:
                continue
            if order == "first":
                optimizer.zero_grad()
            loss = limit(model(losses)).sum()
            if order == "between":
                optimizer.zero_grad()
            (loss * torch.inf if step in bad else loss).backward()
            guard.step()
        return limit

    limit = train((2, 6, 7))
    assert limit.count == 9
    close_states(limit, train((), (2, 6, 7)))


def test_a_scaler_skips_in_two_ways() -> None:
    """Only the fused kernels are called with a verdict; the others are not called at all."""
    calls = {}
    for name in ("SGD", "fused Adam"):
        model = Weighted()
        optimizer = OPTIMIZERS[name](model.parameters())
        seen: list[Any] = []
        optimizer.register_step_post_hook(lambda opt, *_, seen=seen: seen.append(float(opt.found_inf)))
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        scaler.scale(model(torch.tensor(torch.inf))).backward()
        scaler.step(optimizer)
        calls[name] = seen
    assert calls == {"SGD": [], "fused Adam": [1.0]}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_skipped_steps_of_a_limiter_that_is_not_attached_leave_traces(name: str) -> None:
    limit, _ = scaled_run(name, not_attached, "first")
    oracle, _ = scaled_run(name, not_attached, "first", bad=False)
    with pytest.raises(AssertionError):
        close_states(limit, oracle)


def test_gradients_zeroed_in_place_need_a_word() -> None:
    limit = ALRC()
    model, optimizer = run(limit)
    for value in (2.0, 4.0):
        limit(model(torch.tensor([value]))).sum().backward()
        optimizer.zero_grad(set_to_none=False)  # nobody can tell this from a micro-batch
    optimizer.step()
    assert limit.mean == 3.0


def test_discard_forgets_what_was_observed() -> None:
    limit, oracle = ALRC(start=START), ALRC(start=START)
    model, optimizer = run(limit)
    limit(model(torch.tensor([7.0]))).sum().backward()
    limit.discard()
    limit(model(torch.tensor([5.0]))).sum().backward()
    optimizer.step()
    oracle(torch.tensor([5.0]))
    close_states(limit, oracle)
    ALRC().discard()  # harmless when not attached


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decisions_do_not_know_the_loss_scale(name: str) -> None:
    one, other = (scaled_run(name, attached, "first", scale) for scale in (1.0, 65536.0))
    assert same(one[0].state_dict(), other[0].state_dict())
    assert same(one[0].last, other[0].last)
    torch.testing.assert_close(one[1].weight, other[1].weight)


def test_autocast_in_the_documented_order() -> None:
    def train(scale: float) -> tuple[list[Any], ALRC]:
        torch.manual_seed(3)
        limit = ALRC(observe=4)
        network = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
        limit.attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10_000)
        seen: list[Any] = []
        for step in range(12):
            inputs, wanted = torch.randn(8, 3), torch.randn(8, 1) * (50 if step == 9 else 1)
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                losses = (network(inputs) - wanted).square()
                loss = limit(losses).mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(network.parameters(), 10.0)
            scaler.step(optimizer)
            scaler.update()
            assert limit.last is not None
            seen.append(limit.last)
        assert limit.mean.dtype == torch.float32
        assert seen[9].fraction_limited > 0
        return seen, limit

    (seen, limit), (others, other) = train(1.0), train(65536.0)
    assert limit.count == 12
    assert same(seen, others)
    assert same(limit.state_dict(), other.state_dict())
