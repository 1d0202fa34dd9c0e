"""Hold every number of a report against plain numpy, over a stream with spikes, NaN, masks and micro-batches.

Monitors that are known to be wrong must fail the same comparison.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from alrc import rules
from alrc.rules import AGC, Norm
from alrc.torch import ALRC, GradientClipper, Monitor, StepGuard
from alrc.torch.named import NamedALRC
from alrc.torch.tally import Tally
from monitor_oracle import MAX_NORM, RULES, Oracle, Run, compare, differences, unsigned_may_warn


@pytest.fixture(params=["device", "host"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run what a device would run, then what a CPU runs."""
    if request.param == "device":
        for module in ("loss", "learner", "tally", "monitor", "gradient"):
            monkeypatch.setattr(f"alrc.torch.{module}.is_on_host", lambda x: False)
    return request.param


# ------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("settings", RULES.values(), ids=RULES)
def test_every_number_is_that_of_the_oracle(settings: dict[str, Any], path: str) -> None:
    run = Run(ALRC(**settings))
    with unsigned_may_warn():
        found = compare(run, Oracle({"": rules.ALRC(**settings)}, MAX_NORM), is_signed=settings.get("signed", False))
    assert found == set()
    assert {type(value) for report in run.reports for value in report.values()} == {int, float}
    # The stream has what it promises.
    assert [report["limit/nonfinite"] for report in run.reports] == [2, 3, 0, 0, 0]
    assert [report["guard/skipped"] for report in run.reports] == [1, 2, 0, 1, 0]
    assert any(0 < report["gradient/fraction_clipped"] < 1 for report in run.reports)
    assert any(report["limit/fraction_limited"] > 0 and report["limit/largest_z"] > 5 for report in run.reports)


def test_named_losses_are_reported_by_name(path: str) -> None:
    limits = NamedALRC({"image": ALRC(**RULES["start"]), "kl": ALRC(**RULES["signed"])})
    oracle = Oracle({"image": rules.ALRC(**RULES["start"]), "kl": rules.ALRC(**RULES["signed"])}, MAX_NORM)
    run = Run(limits)
    with unsigned_may_warn():
        assert compare(run, oracle, ("image", "kl")) == set()
    assert run.reports[0]["kl/limit/losses"] < run.reports[0]["image/limit/losses"]
    assert Monitor(dict(limits.limits)).report().keys() == Monitor(limits).report().keys()


def test_a_shift_that_was_learned_anew_is_counted(path: str) -> None:
    def learn(limit: ALRC, level: float, steps: int) -> None:
        for step in range(steps):
            limit(torch.tensor(level + 0.1 * math.sin(step)))
            monitor.update()

    limit, rule = ALRC(observe=8), rules.ALRC(observe=8)
    monitor = Monitor(limit, every=10)
    learn(limit, 1.0, 60)
    assert monitor.latest is not None
    assert monitor.latest["limit/total_relearned"] == 0
    learn(limit, 10.0, 60)
    assert monitor.latest["limit/total_relearned"] == 1
    assert monitor.latest["limit/limit"] > 9
    learn(limit, 100.0, 60)
    assert monitor.latest["limit/total_relearned"] == 2
    assert rule.limit(rule.init()) == math.inf
    assert monitor.latest["limit/relearned"] == 0


@pytest.mark.parametrize("losses", [0.7, 3.0, 3.4e38], ids=["calm", "limited", "astronomic"])
def test_lost_gradient_and_factor_by_hand(losses: float, path: str) -> None:
    limit = ALRC(start=(1.0, 1.04))
    monitor = Monitor(limit, every=1)
    limit(torch.tensor([losses, 0.9]))
    monitor.update()
    factor = min(1, 1.6 / losses)
    report = monitor.latest
    assert report is not None
    assert report["limit/lost_gradient"] == pytest.approx((1 - factor) * losses / (losses + 0.9), rel=1e-5)
    assert report["lr_factor"] == pytest.approx((factor + 1) / 2, rel=1e-5)
    assert report["limit/largest_z"] == pytest.approx((max(losses, 0.9) - 1) / 0.2, rel=1e-5)


def test_moments_without_spread_give_no_nan(path: str) -> None:
    limit = ALRC(observe=4)
    monitor = Monitor(limit, every=1)
    seen = []
    for loss in [1.0] * 5 + [2.0]:
        limit(torch.tensor(loss))
        monitor.update()
        assert monitor.latest is not None
        seen.append([monitor.latest[f"limit/{name}"] for name in ("mean", "std", "largest_z")])
    assert seen[0] == [1, 0, pytest.approx(math.nan, nan_ok=True)]  # it was held against nothing
    assert seen[4] == [1, 0, 0]
    assert seen[5][:2] == [pytest.approx(1, abs=1e-6), 0]
    assert seen[5][2] == math.inf


def test_half_precision_is_measured_as_float32(path: str) -> None:
    limit = ALRC(start=(1.0, 1.04))
    monitor = Monitor(limit, every=1)
    limit(torch.tensor([0.5, 1.0, 4.0, torch.inf], dtype=torch.bfloat16))
    limit(torch.tensor([0.5, 1.0], dtype=torch.bfloat16))
    monitor.update()
    assert monitor.latest is not None
    assert monitor.latest["limit/losses"] == 5
    assert monitor.latest["limit/lost_gradient"] == pytest.approx(2.4 / 7, rel=1e-5)


def test_factors_of_many_parameters_are_averaged(path: str) -> None:
    weights = {name: nn.Parameter(torch.ones(2, 2)) for name in ("a", "b", "unused")}
    for rule, factor, threshold in (
        (Norm(2.0, scope="parameter"), (0.5 + 1) / 2, 2.0),
        (AGC(1.0), (math.sqrt(0.5) + math.sqrt(0.5) + 1 + 1) / 4, math.sqrt(2)),
    ):
        clipper = GradientClipper(weights.items(), rule)
        monitor = Monitor(clipper=clipper, every=2)
        weights["a"].grad, weights["b"].grad = torch.full((2, 2), 2.0), torch.full((2, 2), 0.1)
        if isinstance(rule, AGC):
            weights["a"].grad = torch.full((2, 2), math.sqrt(2))
        clipper.clip_()
        monitor.update()
        monitor.update()  # a step without a clip
        report = monitor.latest
        assert report is not None
        assert report["lr_factor"] == pytest.approx((factor + 1) / 2)
        assert report["gradient/fraction_clipped"] == 1
        assert report["gradient/threshold"] == pytest.approx(threshold)


def test_a_guard_alone_knows_the_norm(path: str) -> None:
    weight = nn.Parameter(torch.ones(2))
    guard = StepGuard(torch.optim.SGD([weight], lr=0.0))
    monitor = Monitor(guard=guard, every=4)
    for gradient in ([3.0, 4.0], [math.nan, 1.0], [math.inf, 1.0]):
        weight.grad = torch.tensor(gradient)
        guard.step()
        monitor.update()
    monitor.update()  # a step without the guard
    report = {name: value for name, value in (monitor.latest or {}).items() if name not in ("step", "steps")}
    assert report == {
        "lr_factor": 0.5,
        "gradient/norm_mean": 5.0,
        "gradient/norm_max": 5.0,
        "gradient/nonfinite": 2,
        "guard/skipped": 2,
        "guard/consecutive_skips": 2,
        "guard/total_skipped": 2,
    }


# ------------------------------------------------------------------------------------------------- which calls count


class Network(nn.Module):
    """Compute losses inside of a checkpointed block, and count how often."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.limit = nn.Parameter(torch.ones(())), ALRC(start=(1.0, 1.04))
        self.calls = 0
        self.limit.register_forward_pre_hook(self.count)

    def count(self, *_: Any) -> None:
        self.calls += 1

    def forward(self, x: Tensor) -> Tensor:
        return self.limit(x * self.weight) * self.weight  # whose gradient needs the limited losses again


@pytest.mark.parametrize("is_attached", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_counts_once(use_reentrant: bool, is_attached: bool, path: str) -> None:
    network = Network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    if is_attached:
        network.limit.attach(optimizer)
    monitor = Monitor(network.limit)
    x = torch.tensor([0.5, 4.0], requires_grad=True)
    for _ in range(3):
        limited: Any = checkpoint(network, x, use_reentrant=use_reentrant)
        limited.sum().backward()
    optimizer.step()
    monitor.update()
    assert monitor.report()["limit/losses"] == 6
    assert network.calls == 6  # who counts calls counts twice


def test_evaluation_and_transforms_do_not_count(path: str) -> None:
    limit = ALRC(start=(1.0, 1.04))
    monitor = Monitor(limit)
    states = {name: torch.stack([buffer, buffer]) for name, buffer in limit.named_buffers()}
    torch.func.vmap(lambda state, losses: torch.func.functional_call(limit, state, (losses,)))(states, torch.ones(2, 3))
    limit.eval()
    limit(torch.ones(5))
    monitor.update()
    report = monitor.report()
    assert report["limit/losses"] == 0
    assert report["lr_factor"] == 1.0
    assert math.isnan(report["limit/fraction_limited"])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_calls_count() -> None:
    def run(is_compiled: bool) -> dict[str, float]:
        limit = ALRC(start=(1.0, 1.04))
        monitor = Monitor(limit)
        call = torch.compile(limit, fullgraph=True, backend="aot_eager") if is_compiled else limit
        for losses in ([0.5, 3.0, torch.nan, 4.0], [0.7, 1.0, 0.0, 5.0], [0.7, 1.0, 0.5, 1.0]):
            call(torch.tensor(losses), torch.tensor([True, True, True, False]))
            monitor.update()
            torch.compiler.set_stance("fail_on_recompile")
        torch.compiler.set_stance("default")
        return monitor.report()

    torch._dynamo.reset()
    with unsigned_may_warn():
        assert differences(run(True), run(False)) == set()
    torch._dynamo.reset()


# --------------------------------------------------------------------------------------------------- known to be wrong


def forgetful(self: Tally, *args: Any, add: Any = Tally.add) -> None:
    """Look at the last call of a step only, as `ALRC.last` does."""
    self.step.zero_()
    add(self, *args)


def endless(self: Tally) -> None:
    """Never begin a new window."""


def late(self: Tally, row: np.ndarray, describe: Any = Tally.describe) -> dict[str, float]:
    """Hold the largest loss against the moments at the end."""
    row = row.copy()
    row[9:12] = row[12:15]
    return describe(self, row)


def unweighted(self: Tally, row: np.ndarray, describe: Any = Tally.describe) -> dict[str, float]:
    """Take the mean of 1 - scale for the lost gradient."""
    numbers = describe(self, row)
    return numbers | {"lost_gradient": 1 - numbers["mean_scale"]}


def counting_bad(self: Tally, row: np.ndarray, describe: Any = Tally.describe) -> dict[str, float]:
    """Count losses that are not finite as limited, as `scale < 1` does."""
    row = row.copy()
    row[1] += row[2]
    return describe(self, row)


def hopeful(self: Monitor, *args: Any, add: Any = Monitor._add) -> None:
    """Count a skipped step as if it had been made."""
    factor, is_clipped, norm, is_skipped = args
    add(self, factor + is_skipped, is_clipped, norm, is_skipped)


MUTANTS: dict[str, tuple[type, str, Callable[..., Any], str]] = {
    "forgets micro-batches": (Tally, "add", forgetful, "limit/losses"),
    "windows never end": (Tally, "restart", endless, "limit/losses"),
    "moments too late": (Tally, "describe", late, "limit/largest_z"),
    "mass not weighed": (Tally, "describe", unweighted, "limit/lost_gradient"),
    "NaN is limited": (Tally, "describe", counting_bad, "limit/fraction_limited"),
    "skips forgotten": (Monitor, "_add", hopeful, "lr_factor"),
}


@pytest.mark.parametrize(("kind", "name", "mutant", "victim"), MUTANTS.values(), ids=MUTANTS)
def test_a_wrong_monitor_is_caught(
    kind: type, name: str, mutant: Callable[..., Any], victim: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kind, name, mutant)
    run = Run(ALRC(**RULES["start"]))
    with unsigned_may_warn():
        assert victim in compare(run, Oracle({"": rules.ALRC(**RULES["start"])}, MAX_NORM))
