"""Check how reports come: late but whole from a device, to all writers, over restarts; and that no step reads."""

from __future__ import annotations

import copy
import functools
import io
import logging
import math
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from alrc import rules
from alrc.rules import Norm
from alrc.torch import ALRC, GradientClipper, Monitor, StepGuard
from alrc.torch.arrival import Arrival
from alrc.torch.monitor import logging_writer, tensorboard
from alrc.torch.named import NamedALRC
from monitor_oracle import MAX_NORM, RULES, STEPS, Oracle, Run, differences, stream, unsigned_may_warn
from waiting import RefuseReading, WaitedError, refusing


@pytest.fixture(params=["device", "host"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run what a device would run, then what a CPU runs."""
    if request.param == "device":
        for module in ("loss", "learner", "tally", "monitor", "gradient"):
            monkeypatch.setattr(f"alrc.torch.{module}.is_on_host", lambda x: False)
    return request.param


# ------------------------------------------------------------------------------------------------------------ arrival


class SlowEvent:
    """Stand for a CUDA event that is reached at the third question."""

    asked = 0

    def record(self) -> None:
        self.asked = 0

    def query(self) -> bool:
        self.asked += 1
        return self.asked > 2

    def synchronize(self) -> None:
        self.asked = 3


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alrc.torch.monitor.Arrival", functools.partial(Arrival, event=SlowEvent()))


@pytest.mark.parametrize("every", [1, 4])
def test_a_report_comes_when_it_has_arrived(every: int, path: str, slow: None) -> None:
    run = Run(ALRC(**RULES["start"]), every=every)
    oracle = Oracle({"": rules.ALRC(**RULES["start"])}, MAX_NORM)
    expected, arrived = [], []
    with unsigned_may_warn():
        for step, (calls, gradient) in enumerate(stream(), 1):
            run.step(calls, gradient)
            oracle.take(calls, gradient)
            if run.monitor._sent[0] == step:
                expected.append(oracle.hand_out())
            arrived.append(len(run.reports))
        run.monitor.close()
    if oracle.factors:
        expected.append(oracle.hand_out())
    assert arrived[:8] == ([0, 0, 1, 1, 2, 2, 3, 3] if every == 1 else [0, 0, 0, 0, 0, 1, 1, 1])
    assert [differences(*pair) for pair in zip(run.reports, expected, strict=True)] == [set()] * len(expected)
    assert sum(report["steps"] for report in run.reports) == STEPS


def test_asking_waits_for_what_is_under_way(path: str, slow: None) -> None:
    limit = ALRC(start=(1.0, 1.04))
    for ask in ("report", "state_dict", "close"):
        monitor = Monitor(limit, every=1)
        limit(torch.ones(2))
        monitor.update()
        assert monitor.latest is None
        getattr(monitor, ask)()
        assert monitor.latest is not None


# ----------------------------------------------------------------------------------------------------------- no waiting


@contextmanager
def no_reading(path: str) -> Iterator[None]:
    """Make everything that reads a tensor raise."""
    with refusing(is_on_host=path == "host"), RefuseReading():
        yield


def go(monitor: Monitor, limits: NamedALRC, weight: nn.Parameter, steps: int) -> None:
    """Take some steps, with everything that can happen in one."""
    clipper, guard = monitor._clipper, monitor._guard
    assert clipper is not None
    assert guard is not None
    for step in range(steps):
        losses = torch.full((3, 2), 3.0 if step % 2 else 0.9) * weight[0]
        mask = torch.ones(3, 1, dtype=torch.bool) if step % 3 else None
        (limits["a"](losses, mask).sum() + limits["b"](losses).sum()).backward()
        guard.step(norm=clipper.clip_())
        monitor.update()
        weight.grad = None


def watched(writers: Any = ()) -> tuple[Monitor, NamedALRC, nn.Parameter]:
    """Make all that a step needs, and go on until every buffer is there."""
    weight = nn.Parameter(torch.ones(3))
    clipper, guard = GradientClipper([weight], Norm(1.0)), StepGuard(torch.optim.SGD([weight], lr=0.0, fused=True))
    limits = NamedALRC({"a": ALRC(start=(1.0, 1.04)), "b": ALRC(observe=4)})
    monitor = Monitor(limits, clipper=clipper, guard=guard, every=2, writers=writers)
    go(monitor, limits, weight, 6)
    return monitor, limits, weight


def test_reads_no_tensor(path: str, slow: None) -> None:
    reports: list[Any] = []
    everything = watched([reports.append])
    before = len(reports)
    with no_reading(path):
        go(*everything, 8)
    assert len(reports) > before


@pytest.mark.parametrize("how", ["item", "branch"])
def test_a_monitor_that_reads_is_caught(how: str, path: str, slow: None) -> None:
    monitor, limits, weight = watched()
    losses = torch.ones(())
    limits["a"].follow(lambda *_: losses.item() if how == "item" else bool(losses > 0))
    with no_reading(path), pytest.raises(WaitedError):
        go(monitor, limits, weight, 1)


def test_runs_where_there_is_nothing_to_read() -> None:
    limit = ALRC(start=(1.0, 1.04)).to("meta")
    monitor = Monitor(limit, every=2)
    for _ in range(6):
        limit(torch.ones(3, device="meta"), torch.ones(3, dtype=torch.bool, device="meta"))
        monitor.update()
    assert monitor.latest is None


@pytest.mark.gpu
def test_the_driver_sees_no_wait() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    weight = nn.Parameter(torch.ones(3, device="cuda"))
    guard = StepGuard(torch.optim.Adam([weight], fused=True))
    clipper = GradientClipper([weight], Norm(1.0))
    limit = ALRC(start=(1.0, 1.04)).to("cuda")
    monitor = Monitor(limit, clipper=clipper, guard=guard, every=2)
    losses = torch.full((8,), 3.0, device="cuda")

    def step() -> None:
        limit(losses * weight[0]).mean().backward()
        guard.step(norm=clipper.clip_())
        monitor.update()
        weight.grad = None

    for _ in range(5):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert monitor.report()["limit/losses"] in (8, 16)
    assert monitor.latest is not None
    assert monitor.latest["limit/fraction_limited"] == 1.0


# ------------------------------------------------------------------------------------------------------------ the state


def test_resumes_where_it_was(path: str) -> None:
    def make() -> Run:
        return Run(NamedALRC({"image": ALRC(**RULES["start"]), "kl": ALRC(**RULES["signed"])}))

    steps = list(stream(names=("image", "kl")))
    with unsigned_may_warn():
        whole, first, second = make(), make(), make()
        for step in steps:
            whole.step(*step)
        for step in steps[:18]:
            first.step(*step)
        file = io.BytesIO()
        parts = ("limit", "guard", "monitor")
        torch.save({part: getattr(first, part).state_dict() for part in parts}, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        for part in parts:
            getattr(second, part).load_state_dict(state[part])
        for step in steps[18:]:
            second.step(*step)
        for run in (whole, first, second):
            run.monitor.close()
    expected = whole.reports[2:]
    assert [differences(*pair) for pair in zip(second.reports, expected, strict=True)] == [set()] * 3
    assert second.reports[-1]["image/limit/total_nonfinite"] == whole.reports[-1]["image/limit/total_nonfinite"] > 0
    second = make()  # a monitor that forgot would be seen
    assert second.monitor.report()["image/limit/total_nonfinite"] == 0


def test_a_foreign_state_is_refused() -> None:
    monitor = Monitor(ALRC())
    state = monitor.state_dict()
    with pytest.raises(ValueError, match="has version 2, but this alrc reads version 1"):
        monitor.load_state_dict({**state, "version": 2})
    with pytest.raises(ValueError, match="a Monitor of 'a', 'b', but this one has one ALRC"):
        monitor.load_state_dict(Monitor(NamedALRC("a", "b")).state_dict())


def test_copies_of_a_limiter_are_not_followed() -> None:
    limit = ALRC(start=(1.0, 1.04))
    monitor = Monitor(limit)
    for twin in (copy.deepcopy(limit), pickle.loads(pickle.dumps(limit))):
        twin(torch.ones(3))
    monitor.update()
    assert monitor.report()["limit/losses"] == 0
    limit(torch.ones(3))
    monitor.update()
    assert monitor.report()["limit/losses"] == 3


def test_a_copy_of_a_monitor_follows_the_copies(path: str) -> None:
    reports: list[Any] = []
    limit = ALRC(start=(1.0, 1.04))
    trainer = {"limit": limit, "monitor": Monitor(limit, every=2, writers=[reports.append])}
    limit(torch.tensor([1.0, 3.0]))
    trainer["monitor"].update()
    twin = copy.deepcopy(trainer)
    assert twin["limit"] is not limit
    twin["limit"](torch.tensor([1.0, 3.0, 3.0]))
    twin["monitor"].update()
    assert reports[-1] == twin["monitor"].latest
    assert [reports[-1][name] for name in ("step", "limit/losses", "limit/fraction_limited")] == [2, 5, 0.6]
    assert trainer["monitor"].report()["limit/losses"] == 2


def test_close_hands_out_the_rest_and_lets_go(path: str) -> None:
    limit = ALRC(start=(1.0, 1.04))
    reports: list[Any] = []
    first, second = Monitor(limit, writers=[reports.append]), Monitor(limit)
    limit(torch.ones(2))
    first.update()
    first.close()
    first.close()
    assert [report["limit/losses"] for report in reports] == [2]
    assert limit._followers == (second._tallies[""].add,)
    with pytest.raises(RuntimeError, match="was closed"):
        first.update()
    second.close()
    assert limit._followers == ()


# --------------------------------------------------------------------------------------------------- saying and writing


def test_losses_a_rule_cannot_limit_are_warned_of_once(path: str) -> None:
    limits = NamedALRC({"kl": ALRC(start=(1.0, 1.04)), "signed": ALRC(signed=True)})
    monitor = Monitor(limits, every=1)

    def step() -> None:
        limits({"kl": torch.tensor([-1.0, 0.0, 1.0]), "signed": torch.tensor([-1.0])})
        monitor.update()

    detail = "the lowest is -1" if path == "host" else "2 of 'kl' in 1 steps"
    with pytest.warns(UserWarning, match=rf"ALRC met losses ≤ 0 \({detail}\) and does not limit such") as caught:
        step()
    assert len(caught) == 1
    assert caught[0].filename == __file__ or path == "host"
    step()
    assert monitor.latest is not None
    assert monitor.latest["kl/limit/nonpositive"] == 2
    assert monitor.latest["signed/limit/nonpositive"] == 1


class Board:
    """Stand for a summary writer."""

    def __init__(self) -> None:
        self.scalars: dict[tuple[str, int], float] = {}

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.scalars[tag, global_step] = scalar_value


def test_tensorboard_gets_every_finite_number() -> None:
    board = Board()
    limit = ALRC()
    monitor = Monitor(limit, every=2, writers=[tensorboard(board, prefix="")])
    for _ in range(4):
        limit(torch.ones(3))
        monitor.update()
    assert monitor.latest is not None
    assert board.scalars["limit/losses", 2] == board.scalars["limit/losses", 4] == 6
    finite = {name for name, value in monitor.latest.items() if math.isfinite(value)} - {"step"}
    assert {name for name, _ in board.scalars} == finite
    assert monitor.latest["limit/limit"] == math.inf  # nothing is limited yet


def test_a_line_for_people(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("alrc.test")
    caplog.set_level(logging.INFO, logger="alrc.test")
    run = Run(
        NamedALRC({"image": ALRC(start=(1.0, 1.04)), "kl": ALRC(signed=True)}),
        every=2,
        writers=[logging_writer(logger), logging_writer(logger, logging.DEBUG)],
    )
    run.step([("image", np.float32([0.5, 3.2, np.nan]), None)], np.float32([3.0, 0.0, 0.0]))
    run.step([("image", np.float32([0.5]), None), ("kl", np.float32([-1.0]), None)], np.float32([np.nan, 0.0, 0.0]))
    assert [record.levelno for record in caplog.records] == [logging.INFO]
    assert caplog.messages[0] == (
        "step 2: learning rate x 0.0833; image limit 1.603 (mean 0.9995, std 0.201), 33.33% limited, 38.10% of the "
        "gradient lost, largest 3.2 (z 11), 1 not finite; kl limit inf (mean -1, std 0), 0.00% limited, 0.00% of the "
        "gradient lost, largest -1 (z nan), 1 ≤ 0; gradient norm 3, at most 3, 50.00% clipped at 1, 1 not finite; 1 "
        "skipped (1 in all)"
    )


def test_a_writer_that_raises_costs_a_warning() -> None:
    reports: list[Any] = []

    def full(report: dict[str, float]) -> None:
        report.clear()
        raise OSError("the disk is full")

    limit = ALRC(start=(1.0, 1.04))
    monitor = Monitor(limit, every=1, writers=[full, reports.append])
    limit(torch.ones(3))
    with pytest.warns(
        UserWarning, match=r"step 1 was not written: .*full.* raised OSError\('the disk is full'\)"
    ) as caught:
        monitor.update()
    assert caught[0].filename == __file__
    assert reports == [monitor.latest]
    assert reports[0]["limit/losses"] == 3


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, ValueError, "nothing to monitor"),
        ({"limit": ALRC(), "every": 0}, ValueError, "every must be a whole number of steps ≥ 1, got 0"),
        ({"limit": ALRC(), "every": 1.5}, ValueError, "got 1.5"),
        ({"limit": nn.Linear(1, 1)}, TypeError, "limit must be an ALRC, a NamedALRC or a dictionary of ALRC, got Lin"),
        ({"limit": {"a": nn.Linear(1, 1)}}, TypeError, "must hold instances of ALRC, got Linear under 'a'"),
        ({"clipper": ALRC()}, TypeError, "clipper must be a GradientClipper, got ALRC"),
        ({"guard": ALRC()}, TypeError, "guard must be a StepGuard, got ALRC"),
        ({"limit": ALRC(), "writers": [Board()]}, TypeError, "a writer must be callable"),
    ],
    ids=range(8),
)
def test_wrong_arguments_are_named(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Monitor(**settings)
