"""Say what limiting does to a training run, in numbers for people, without making the run wait.

Adds up on the device and hands out a report every so many steps. Contains no arithmetic of a rule; what the losses of
one ALRC add up to is `tally.py`'s business, and how numbers come to the host is `arrival.py`'s.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alrc.rules.history import LARGEST_NORM
from alrc.torch.arrival import Arrival
from alrc.torch.gradient import GradientClipper
from alrc.torch.guard import StepGuard
from alrc.torch.host import is_on_host, number_of
from alrc.torch.loss import ALRC
from alrc.torch.skips import CONSECUTIVE, TOTAL
from alrc.torch.tally import Tally, wide_dtype
from alrc.torch.writers import Report, Writer, logging_writer, tensorboard

__all__ = ["Monitor", "Report", "Writer", "logging_writer", "tensorboard"]

_STATE_VERSION = 1
_TOTALS = ("nonfinite", "relearned")
FACTOR, CLIPPED, NORMS, NORM_SUM, SKIPPED, NORM_MAX = range(6)


class Monitor:
    """Report what limiting does to a training run, every so many steps.

    Call `update()` once after each optimiser step. All calls of the limiters in between count, those of k micro-batches
    too; what activation checkpointing repeats does not. Nothing waits for a CUDA device: a report is handed out when
    its copy has arrived, usually one step late. `docs/monitoring.md` defines every number of a report.

    Args:
        limit: An `ALRC`, a `NamedALRC`, or a dictionary from names to `ALRC`; None for none.
        clipper: The `GradientClipper`, if there is one.
        guard: The `StepGuard`, if there is one. Skipped steps are known through it alone.
        every: Number of steps that a report covers, ≥ 1.
        writers: Called with each report, in order; `tensorboard`, `logging_writer` or any function of a dictionary. One
            that raises costs a warning, neither the report nor the run.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If there is nothing to monitor, or `every` is not a whole number ≥ 1.

    Example:
        >>> limit = ALRC(start=(1.0, 1.04))
        >>> monitor = Monitor(limit, every=2)
        >>> for losses in ([0.5, 1.0], [1.0, 3.2]):
        ...     _ = limit(torch.tensor(losses))  # backward() and step() would follow
        ...     monitor.update()
        >>> monitor.latest["limit/fraction_limited"], monitor.latest["limit/nonfinite"]
        (0.25, 0)
    """

    def __init__(
        self,
        limit: Any = None,
        *,
        clipper: GradientClipper | None = None,
        guard: StepGuard | None = None,
        every: int = 100,
        writers: Iterable[Writer] = (),
    ) -> None:
        if limit is None and clipper is None and guard is None:
            raise ValueError("there is nothing to monitor; give limit=, clipper= or guard=.")
        if isinstance(every, bool) or every < 1 or every % 1:
            raise ValueError(f"every must be a whole number of steps ≥ 1, got {every}.")
        self.every, self.writers = int(every), list(writers)
        self._limit, self._clipper, self._guard = limit, clipper, guard
        for name, thing, kind in (("clipper", clipper, GradientClipper), ("guard", guard, StepGuard)):
            if not (thing is None or isinstance(thing, kind)):
                raise TypeError(f"{name} must be a {kind.__name__}, got {type(thing).__name__}.")
        for writer in self.writers:
            if not callable(writer):
                raise TypeError(f"a writer must be callable, got {writer!r}; tensorboard(it) may be what you want.")
        self._tallies = {name: Tally(limiter) for name, limiter in _limiters(limit).items()}
        self._latest: Report | None = None
        self._totals = {f"{_prefix(name)}total_{total}": 0 for name in self._tallies for total in _TOTALS}
        self._step = 0
        self._window = np.zeros(3, dtype=np.int64)  # steps, steps with a clip, steps with a norm
        self._use(torch.zeros(6, dtype=torch.float64))
        self._arrival: Arrival | None = None
        self._outbox = self._sums
        self._sent: tuple[int, list[int]] = (0, [])
        self._seen_clip = None if clipper is None else clipper._seen
        self._seen_step = 0 if guard is None else guard._steps
        self._is_closed = False

    @property
    def latest(self) -> Report | None:
        """The report handed out last; None before the first."""
        return self._latest

    @torch.no_grad()
    def update(self) -> None:
        """Take in a step of the optimiser, whether it was made or skipped; hand out a report if one has arrived.

        Warns once for each limiter that meets losses ≤ 0 and cannot limit them: an ALRC on a GPU does not see them.
        """
        if self._is_closed:
            raise RuntimeError("this Monitor was closed; make a new one to go on.")
        self._receive()
        self._step += 1
        self._window[0] += 1
        self._add(*self._measure())
        if self._window[0] < self.every or (self._arrival is not None and self._arrival.is_under_way):
            return
        self._send()
        self._receive()

    def report(self) -> Report:
        """Return what has gathered since the last report was sent, without ending it. Waits for the device."""
        self._receive(wait=True)
        return self._describe(self._step, self._window.tolist(), self._packed().cpu().numpy())

    def close(self) -> None:
        """Hand out what has gathered as a last, shorter report, and let go of the limiters. Waits for the device."""
        if self._is_closed:
            return
        self._receive(wait=True)
        if self._window[0]:
            self._publish(self.report())
        self._is_closed = True
        for tally in self._tallies.values():
            tally.leave()

    def state_dict(self) -> dict[str, Any]:
        """Return counts and totals, as tensors and plain numbers; a report that is under way is waited for."""
        self._receive(wait=True)
        return {
            "version": _STATE_VERSION,
            "step": self._step,
            "window": self._window.tolist(),
            "sums": self._sums.clone(),
            "totals": dict(self._totals),
            "limits": {
                name: {key: tensor.clone() for key, tensor in tally.state().items()}
                for name, tally in self._tallies.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another monitor of the same limiters was.

        Args:
            state: What `state_dict` returned.

        Raises:
            ValueError: If another version wrote it, or a monitor of limiters with other names.
        """
        if state["version"] != _STATE_VERSION:
            raise ValueError(
                f"the state of this Monitor has version {state['version']}, but this alrc reads version "
                f"{_STATE_VERSION}; load it with the alrc that wrote it, or leave it out to start afresh."
            )
        if set(state["limits"]) != set(self._tallies):
            raise ValueError(
                f"the state is that of a Monitor of {_names(state['limits'])}, but this one has "
                f"{_names(self._tallies)}; make it with the same names, or leave its state out to start afresh."
            )
        if self._arrival is not None:
            self._arrival.forget()
        self._step = state["step"]
        self._window[:] = state["window"]
        self._sums.copy_(state["sums"])
        self._totals |= state["totals"]
        for name, tally in self._tallies.items():
            for key, tensor in tally.state().items():
                tensor.copy_(state["limits"][name][key])

    def __deepcopy__(self, memo: dict[int, Any]) -> Monitor:
        """Follow the copies of the limiters; the writers are the same."""
        parts = {name: copy.deepcopy(part, memo) for name, part in self._parts.items()}
        twin = type(self)(parts.pop("limit"), **parts, every=self.every, writers=self.writers)
        memo[id(self)] = twin
        twin.load_state_dict(self.state_dict())
        twin._latest = self._latest
        return twin

    @property
    def _parts(self) -> dict[str, Any]:
        """What is monitored."""
        return {"limit": self._limit, "clipper": self._clipper, "guard": self._guard}

    def _measure(self) -> tuple[Any, Any, Any, Any]:
        """Return the step's factor on the learning rate, whether it was clipped, its norm, whether it was skipped.

        Numbers where they lie in the host's memory, else 0-d tensors.
        """
        factor: Any = 1.0
        if self._tallies:
            poured = [tally.pour() for tally in self._tallies.values()]
            number: Any = sum(number for _, number in poured)
            total: Any = sum(mean for mean, _ in poured)
            if isinstance(number, Tensor):
                factor = torch.where(number > 0, total / number.clamp(min=1), 1.0)
            else:
                factor = total / number if number else 1.0
        is_clipped = is_skipped = 0.0
        norm: Any = None
        guard, clipper = self._guard, self._clipper
        if guard is not None and guard._steps != self._seen_step:
            self._seen_step = guard._steps
            norm, is_skipped = guard._norm, guard._is_bad
            if is_on_host(norm):
                norm, is_skipped = number_of(norm), float(number_of(is_skipped))
            else:
                is_skipped = is_skipped.to(norm.dtype)
            factor = factor * (1.0 - is_skipped)
        if clipper is not None and clipper._seen is not self._seen_clip:
            seen = self._seen_clip = clipper._seen
            assert seen is not None
            self._window[1] += 1
            norm, scale = seen.norm, seen.decision.scale
            number = scale.numel()
            if is_on_host(norm):
                norm, scale = number_of(norm), number_of(scale)
            if scale.ndim:  # gradients that are absent count among the factors, as 1
                is_clipped = (scale < 1).any()
                scale = (scale.sum() - seen.absent) / (number - seen.absent)
            else:
                is_clipped = scale < 1
            factor = factor * scale
        return factor, is_clipped, norm, is_skipped

    def _add(self, factor: Any, is_clipped: Any, norm: Any, is_skipped: Any) -> None:
        """Add what was measured to the sums."""
        if norm is not None:
            self._window[2] += 1
        tensors = [part for part in (factor, is_clipped, norm, is_skipped) if isinstance(part, Tensor)]
        if self._view is not None and not tensors:
            view = self._view
            view[FACTOR] += factor
            view[CLIPPED] += is_clipped
            view[SKIPPED] += is_skipped
            if norm is not None and norm < math.inf:
                view[NORMS] += 1
                view[NORM_SUM] += norm
                view[NORM_MAX] = max(view[NORM_MAX], norm)
            return
        if tensors and tensors[0].device != self._sums.device:
            device = tensors[0].device
            self._use(self._sums.to(device, wide_dtype(device)))
        sums = self._sums
        known = 0.0 if norm is None else norm
        row = [
            part.to(sums) if isinstance(part, Tensor) else sums.new_full((), float(part))
            for part in (factor, is_clipped, float(norm is not None), known, is_skipped)
        ]
        is_finite = row[NORM_SUM] < math.inf
        row[NORMS] = row[NORMS] * is_finite
        row[NORM_SUM] = torch.where(is_finite, row[NORM_SUM], 0.0)
        sums[:NORM_MAX].add_(torch.stack(row))
        sums[NORM_MAX].clamp_(min=row[NORM_SUM])

    def _packed(self) -> Tensor:
        """Return everything a report is made of, as one tensor."""
        parts = [self._sums]
        for tally in self._tallies.values():
            parts += tally.parts()
        if self._clipper is not None:
            threshold = math.inf if self._seen_clip is None else self._seen_clip.decision.threshold
            if isinstance(threshold, int | float):
                threshold = self._sums.new_full((), threshold)  # a copy from the host would make it wait
            threshold = torch.as_tensor(threshold)
            is_limit = threshold < LARGEST_NORM
            total = torch.where(is_limit, threshold, 0.0).sum()
            # Nothing divided by nothing is NaN, for no limit.
            parts.append((total / is_limit.sum()).reshape(1))
        if self._guard is not None:
            parts.append(self._guard._ledger.counters)
        return torch.cat([part.to(self._sums, non_blocking=True) for part in parts])

    def _send(self) -> None:
        """Start to hand out a report, and begin the next."""
        packed = self._packed()
        if self._arrival is None or (packed.shape, packed.device) != (self._outbox.shape, self._outbox.device):
            self._outbox = packed
            self._arrival = Arrival([packed])
        else:
            self._outbox.copy_(packed)
        self._sent = self._step, self._window.tolist()
        self._arrival.send()
        self._window.fill(0)
        self._sums.zero_()
        for tally in self._tallies.values():
            tally.restart()

    def _receive(self, *, wait: bool = False) -> None:
        """Hand out the report that was sent, if it has arrived."""
        views = None if self._arrival is None else self._arrival.read(wait=wait)
        if views is not None:
            self._publish(self._describe(*self._sent, views[0]))

    def _describe(self, step: int, window: list[int], row: np.ndarray) -> Report:
        """Make a report of what has arrived."""
        steps, clips, norms = window
        report: Report = {"step": step, "steps": steps, "lr_factor": _ratio(row[FACTOR], steps)}
        place = 6
        for name, tally in self._tallies.items():
            prefix = _prefix(name)
            report |= {f"{prefix}{key}": value for key, value in tally.describe(row[place : place + 15]).items()}
            for total in _TOTALS:
                report[f"{prefix}total_{total}"] = self._totals[f"{prefix}total_{total}"] + report[f"{prefix}{total}"]
            place += 15
        if self._clipper is not None or self._guard is not None:
            report["gradient/norm_mean"] = _ratio(row[NORM_SUM], row[NORMS])
            report["gradient/norm_max"] = float(row[NORM_MAX]) if row[NORMS] else math.nan
            report["gradient/nonfinite"] = norms - int(row[NORMS])
        if self._clipper is not None:
            report["gradient/fraction_clipped"] = _ratio(row[CLIPPED], clips)
            report["gradient/threshold"] = math.inf if math.isnan(row[place]) else float(row[place])
            place += 1
        if self._guard is not None:
            report["guard/skipped"] = int(row[SKIPPED])
            report["guard/consecutive_skips"] = int(row[place + CONSECUTIVE])
            report["guard/total_skipped"] = int(row[place + TOTAL])
        return report

    def _publish(self, report: Report) -> None:
        """Keep a report, give it to all writers, then say what is to be said about it."""
        self._latest = report
        self._totals = {name: int(report[name]) for name in self._totals}
        failures: list[str] = []
        for writer in self.writers:
            try:
                writer(dict(report))
            except Exception as error:
                failures.append(f"{writer!r} raised {error!r}")
        for name, tally in self._tallies.items():
            number = report[f"{_prefix(name)}nonpositive"]
            if number and not (tally.limiter._has_warned or tally.limiter.rule.signed):
                whose = f" of '{name}'" if name else ""
                tally.limiter._warn(f"{number}{whose} in {report['steps']} steps", 6)
        for failure in failures:
            warnings.warn(
                f"the report of step {report['step']} was not written: {failure}. It is in monitor.latest.",
                stacklevel=5,
            )

    def _use(self, sums: Tensor) -> None:
        """Add up in this tensor from now on."""
        self._sums = sums
        self._view = sums.numpy() if is_on_host(sums) else None


def _limiters(limit: Any) -> Mapping[str, ALRC]:
    """Return limiters by name; a single one has the name ''."""
    if limit is None:
        return {}
    if isinstance(limit, ALRC):
        return {"": limit}
    if not (hasattr(limit, "__iter__") and hasattr(limit, "__getitem__")):
        raise TypeError(f"limit must be an ALRC, a NamedALRC or a dictionary of ALRC, got {type(limit).__name__}.")
    limiters = {str(name): limit[name] for name in limit}
    for name, limiter in limiters.items():
        if not isinstance(limiter, ALRC):
            raise TypeError(f"limit must hold instances of ALRC, got {type(limiter).__name__} under '{name}'.")
    return limiters


def _prefix(name: str) -> str:
    """Return what stands before the names of one limiter's numbers."""
    return f"{name}/limit/" if name else "limit/"


def _names(limits: Iterable[str]) -> str:
    """Name limiters in a message."""
    return ", ".join(f"'{name}'" if name else "one ALRC" for name in limits) or "no ALRC"


def _ratio(x: Any, y: Any) -> float:
    """Return x / y; NaN where there is nothing to divide by."""
    return float(x / y) if y else math.nan
