"""Compute the reports of a monitor from everything that was ever seen, with plain numpy; and a stream to do it on.

Shared by the tests of the monitor. The oracle keeps every loss and every factor of a window, and computes its numbers
from the lists.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from alrc import rules
from alrc.rules import Norm
from alrc.torch import GradientClipper, Monitor, StepGuard

# ----------------------------------------------------------------------------------------------------------- the oracle


Call = tuple[str, np.ndarray, np.ndarray | None]
"""Name of the limiter, losses, mask."""


class Oracle:
    """Keep everything that happens in a window, and compute a report from it."""

    def __init__(self, limiters: dict[str, rules.ALRC], max_norm: float) -> None:
        self.rules, self.max_norm = limiters, max_norm
        self.states = {name: rule.init() for name, rule in limiters.items()}
        self.totals = {name: {"nonfinite": 0, "relearned": 0} for name in limiters}
        self.step = self.streak = self.total_skipped = 0
        self.restart()

    def restart(self) -> None:
        self.calls: dict[str, list[Any]] = {name: [] for name in self.rules}
        self.relearned = dict.fromkeys(self.rules, 0)
        self.factors: list[float] = []
        self.norms: list[float] = []
        self.is_skipped: list[bool] = []

    def take(self, calls: list[Call], gradient: np.ndarray) -> None:
        self.step += 1
        scales: dict[str, list[np.ndarray]] = {}
        for name, losses, mask in calls:
            rule, before = self.rules[name], self.states[name]
            losses = losses.astype(np.float64)
            kept = np.ones(losses.shape, bool) if mask is None else np.broadcast_to(mask, losses.shape)
            shown = np.where(kept, losses, np.nan)
            with np.errstate(all="ignore"):
                decision = rule.decide(shown, before)
                self.states[name] = rule.update(shown, decision, before)
            self.relearned[name] += self.states[name].count < before.count
            if losses.size:
                self.calls[name].append((losses[kept], decision.scale[kept], rule, before))
                scales.setdefault(name, []).append(decision.scale[kept])
        means = [np.concatenate(parts).mean() for parts in scales.values() if np.concatenate(parts).size]
        with np.errstate(all="ignore"):
            norm = float(np.sqrt((gradient.astype(np.float64) ** 2).sum()))
        clip = min(1.0, self.max_norm / norm) if math.isfinite(norm) else 1.0
        is_skipped = not math.isfinite(norm)
        self.factors.append((float(np.mean(means)) if means else 1.0) * clip * (not is_skipped))
        self.norms.append(norm)
        self.is_skipped.append(is_skipped)
        self.streak = self.streak + 1 if is_skipped else 0
        self.total_skipped += is_skipped

    def report(self) -> dict[str, float]:
        norms = [norm for norm in self.norms if math.isfinite(norm)]
        report: dict[str, float] = {
            "step": self.step,
            "steps": len(self.factors),
            "lr_factor": float(np.mean(self.factors)),
            "gradient/norm_mean": float(np.mean(norms)) if norms else math.nan,
            "gradient/norm_max": max(norms, default=math.nan),
            "gradient/nonfinite": len(self.norms) - len(norms),
            "gradient/fraction_clipped": float(np.mean([self.max_norm < norm < math.inf for norm in self.norms])),
            "gradient/threshold": self.max_norm,
            "guard/skipped": sum(self.is_skipped),
            "guard/consecutive_skips": self.streak,
            "guard/total_skipped": self.total_skipped,
        }
        for name in self.rules:
            prefix = f"{name}/limit/" if name else "limit/"
            report |= {f"{prefix}{key}": value for key, value in self.describe(name).items()}
        return report

    def describe(self, name: str) -> dict[str, float]:
        losses = np.concatenate([np.empty(0)] + [call[0] for call in self.calls[name]])
        scale = np.concatenate([np.empty(0)] + [call[1] for call in self.calls[name]])
        held = [call[2:] for call in self.calls[name] for _ in call[0]]
        finite = np.isfinite(losses)
        largest = z = math.nan
        if finite.any():
            place = int(np.argmax(np.where(finite, losses, -np.inf)))
            largest = losses[place]
            rule, state = held[place]
            mean, std = spread_of(rule, state)
            z = (largest - mean) / std if rule.limit(state) < math.inf else math.nan
        rule, state = self.rules[name], self.states[name]
        mean, std = spread_of(rule, state)
        values, factors = losses[finite], scale[finite]
        nonfinite = int((~finite).sum())
        totals = {f"total_{key}": value for key, value in self.totals[name].items()}
        totals["total_nonfinite"] += nonfinite
        totals["total_relearned"] += self.relearned[name]
        return {
            "losses": len(values),
            "fraction_limited": (factors < 1).mean() if len(values) else math.nan,
            "limit": rule.limit(state),
            "mean": mean,
            "std": std,
            "largest": largest,
            "largest_z": z,
            "mean_scale": scale.mean() if len(scale) else math.nan,
            "lost_gradient": (1 - factors) @ abs(values) / abs(values).sum() if len(values) else math.nan,
            "nonfinite": nonfinite,
            "nonpositive": int((values <= 0).sum()),
            "relearned": int(self.relearned[name]),
            **totals,
        }

    def hand_out(self) -> dict[str, float]:
        report = self.report()
        for name in self.rules:
            prefix = f"{name}/limit/" if name else "limit/"
            for key in self.totals[name]:
                self.totals[name][key] = int(report[f"{prefix}total_{key}"])
        self.restart()
        return report


def spread_of(rule: rules.ALRC, state: Any) -> tuple[float, float]:
    """Return mean and standard deviation of the loss as S5 and S12 write them."""
    mu1, mu2 = rule.gain * state.mean, rule.gain * (state.var + state.mean**2)
    return float(mu1), math.sqrt(max(mu2 - mu1**2, 0) + rule.eps)


def differences(report: dict[str, float], expected: dict[str, float]) -> set[str]:
    """Name the numbers that differ, and those that are there only once."""
    found = report.keys() ^ expected.keys()
    for name in report.keys() & expected.keys():
        if not np.isclose(report[name], expected[name], rtol=2e-4, atol=1e-6, equal_nan=True):
            found.add(name)
    return found


# ----------------------------------------------------------------------------------------------------------- the stream

RULES: dict[str, dict[str, Any]] = {
    "start": {"start": (1.0, 1.3)},
    "auto": {"observe": 8},
    "signed": {"observe": 8, "signed": True, "num_stddev_below": 2.0},
    "paper": {"start": (1.0, 1.3), "feed": "unlimited", "second_moment": "mean", "betas": (0.9, 0.95)},
    "scripts": {"betas": (0.997, 0.997), "start": (3.0, 12.0), "eps": 1e-3, "gain": 1 / 3},
}
EVERY, STEPS, MAX_NORM = 7, 30, 1.0


def stream(is_signed: bool = False, names: tuple[str, ...] = ("",)) -> Iterator[tuple[list[Call], np.ndarray]]:
    """Yield the calls of each step and the gradient it ends with."""
    rng = np.random.default_rng(3)
    for step in range(STEPS):
        calls: list[Call] = []
        for micro in range(1 if step % 3 else 2):
            for name in names:
                if step == 17 or (name == "kl" and step % 4 == 1):
                    continue
                losses = rng.lognormal(0, 0.3, (4, 6)).astype(np.float32) - (1.0 if is_signed or name == "kl" else 0.0)
                mask = None
                if step % 5 == 2:
                    losses[1, 2] *= 50
                if step in (4, 12):
                    losses[0, micro], losses[3, 0] = np.nan, np.inf
                if step in (6, 12, 19):
                    mask = rng.random((4, 1) if step == 19 else (4, 6)) < 0.6
                    losses = np.where(mask, losses, np.nan if step == 6 else -7).astype(np.float32)
                if step == 9:
                    mask = np.zeros((4, 6), bool)
                if step == 21:
                    losses = losses[:, :0]
                if step == 23:
                    losses = losses[0, 0]
                calls.append((name, losses.astype(np.float32), mask))
        gradient = rng.normal(0, 0.6, 3).astype(np.float32)
        if step in (5, 12, 13, 27):
            gradient[1] = np.nan if step % 2 else np.inf
        yield calls, gradient


class Run:
    """Train one weight on a stream: losses go through the limiters, the last word about the gradient has the stream."""

    def __init__(self, limit: Any, every: int = EVERY, **settings: Any) -> None:
        self.limit = limit
        self.weight = nn.Parameter(torch.ones(3))
        self.optimizer = torch.optim.SGD([self.weight], lr=0.0)
        self.clipper = GradientClipper([self.weight], Norm(MAX_NORM))
        self.guard = StepGuard(self.optimizer)
        self.reports: list[dict[str, float]] = []
        writers = [self.reports.append, *settings.pop("writers", ())]
        self.monitor = Monitor(limit, clipper=self.clipper, guard=self.guard, every=every, writers=writers, **settings)

    def step(self, calls: list[Call], gradient: np.ndarray) -> None:
        self.optimizer.zero_grad()
        for name, losses, mask in calls:
            limiter = self.limit[name] if name else self.limit
            each = torch.from_numpy(np.asarray(losses)) * self.weight[0]
            limiter(each, None if mask is None else torch.from_numpy(mask)).sum().backward()
        self.weight.grad = torch.from_numpy(gradient.copy())
        self.guard.step(norm=self.clipper.clip_())
        self.monitor.update()


def compare(run: Run, oracle: Oracle, names: tuple[str, ...] = ("",), is_signed: bool = False) -> set[str]:
    """Run through the stream; return what differs in any report, the ones before the end of a window too."""
    found: set[str] = set()
    for step, (calls, gradient) in enumerate(stream(is_signed, names), 1):
        run.step(calls, gradient)
        oracle.take(calls, gradient)
        if step == 10:
            found |= differences(run.monitor.report(), oracle.report())
        if step % EVERY == 0:
            assert len(run.reports) == step // EVERY
            found |= differences(run.reports[-1], oracle.hand_out())
            assert run.reports[-1] == pytest.approx(run.monitor.latest, nan_ok=True)
    run.monitor.close()
    assert len(run.reports) == STEPS // EVERY + 1
    return found | differences(run.reports[-1], oracle.hand_out())


@contextmanager
def unsigned_may_warn() -> Iterator[None]:
    """Let the streams hold losses ≤ 0 for rules that say so; a test of its own looks at what they say."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ALRC met losses ≤ 0", UserWarning)
        yield
