"""Add up what becomes of the losses of one ALRC, call by call, where they are.

Exists because `ALRC.last` knows the last call only, and a step may make many. What was added up becomes numbers on the
host, where the rule says what they mean. When that happens is up to `monitor.py`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alrc import rules
from alrc.moments import Moments
from alrc.ops import NUMPY
from alrc.torch.host import is_on_host
from alrc.torch.loss import ALRC, Seen

__all__ = ["Tally", "wide_dtype"]

NUMBER, LIMITED, NONFINITE, NONPOSITIVE, SIZE, LOST, SCALE, RELEARNED = range(8)
"""Sums over the losses of a step or a window; the sizes |L| and what limits took of them are sums of finite losses."""
LARGEST, COUNT = 0, 3
"""In the record of the largest loss: itself, then mean, variance and count of the moments it was held against."""


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype to add up in: float64 holds every count, but not every device has it."""
    return torch.float64 if device.type in ("cpu", "cuda", "meta") else torch.float32


class Tally:
    """Follow one ALRC and add up what its calls do, in memory of their device."""

    def __init__(self, limiter: ALRC) -> None:
        self.limiter = limiter
        buffers: Any = limiter._buffers
        count = buffers["count"].detach()
        dtype = wide_dtype(count.device)
        self._use(
            {
                "step": torch.zeros(8, dtype=dtype, device=count.device),
                "window": torch.zeros(8, dtype=dtype, device=count.device),
                "record": torch.full((4,), -math.inf, dtype=dtype, device=count.device),
                "count": count.to(dtype),
            }
        )
        self.leave = limiter.follow(self.add)

    def add(self, seen: Seen, state: Any) -> None:
        """Take in a call: what was seen of its losses, and the state they were held against."""
        losses, scale, _, mask, known = seen
        if losses.device != self.step.device:
            self._use({name: tensor.to(losses.device) for name, tensor in self.state().items()})
        if not losses.numel():
            return
        if isinstance(state.mean, Tensor):
            with torch.no_grad():
                self._add_on_device(losses, scale, mask, state)
            return
        step, _, record, count = self._views
        if known is not None and known[0] > 0:
            number, (_, largest, total) = losses.numel(), known
            step[NUMBER] += number
            step[SIZE] += total
            step[SCALE] += number
        else:
            sums, largest = _measure_on_host(losses, scale, mask)
            step[:RELEARNED] += sums
        if largest > record[LARGEST]:
            record[:] = largest, state.mean, state.var, state.count
        step[RELEARNED] += state.count < count
        count[...] = state.count

    def pour(self) -> tuple[Any, Any]:
        """End a step; return its mean gradient factor and 1, or 0 and 0 without losses: numbers, or 0-d tensors."""
        if self._views:
            step, window, *_ = self._views
            number = step[NUMBER] + step[NONFINITE]
            factor = step[SCALE] / number if number else 0.0
            window += step
            step.fill(0.0)
            return factor, float(number > 0)
        number = self.step[NUMBER] + self.step[NONFINITE]
        factor = self.step[SCALE] / number.clamp(min=1)
        self.window.add_(self.step)
        self.step.zero_()
        return factor, number.clamp(max=1)

    def parts(self) -> list[Tensor]:
        """Return what `describe` needs: the sums, the record, the moments as they are now."""
        self.limiter._settle()
        state = self.limiter._state(False)
        moments = torch.stack([part.to(self.window) for part in (state.mean, state.var, state.count)])
        self.window[RELEARNED].add_(moments[2] < self.count)
        self.count.copy_(moments[2])
        return [self.window, self.record, moments]

    def restart(self) -> None:
        """Begin a new window."""
        self.window.zero_()
        self.record.fill_(-math.inf)

    def describe(self, row: np.ndarray) -> dict[str, float]:
        """Say what the parts mean, when they are on the host."""
        window, record, moments = row[:8], row[8:12], row[12:15]
        limit, mean, std = self._level(moments)
        largest = z = math.nan
        if record[LARGEST] > -math.inf:
            largest = float(record[LARGEST])
            held, center, spread = self._level(record[1:])
            if held < math.inf:
                z = _ratio(largest - center, spread, math.inf if largest > center else 0.0)
        number = window[NUMBER]
        return {
            "losses": int(number),
            "fraction_limited": _ratio(window[LIMITED], number),
            "limit": limit,
            "mean": mean,
            "std": std,
            "largest": largest,
            "largest_z": z,
            "mean_scale": _ratio(window[SCALE], number + window[NONFINITE]),
            "lost_gradient": _ratio(window[LOST], window[SIZE], 0.0 if number else math.nan),
            "nonfinite": int(window[NONFINITE]),
            "nonpositive": int(window[NONPOSITIVE]),
            "relearned": int(window[RELEARNED]),
        }

    def state(self) -> dict[str, Tensor]:
        """Return all there is to remember."""
        return {"step": self.step, "window": self.window, "record": self.record, "count": self.count}

    def _use(self, tensors: dict[str, Tensor]) -> None:
        """Use these tensors from now on."""
        self.step, self.window = tensors["step"], tensors["window"]
        self.record, self.count = tensors["record"], tensors["count"]
        self._views: Any = [tensor.numpy() for tensor in self.state().values()] if is_on_host(self.step) else ()

    def _add_on_device(self, losses: Tensor, scale: Any, mask: Tensor | None, state: Any) -> None:
        """Take in a call without looking at it."""
        wide, unmasked = self.step.dtype, losses.numel()
        if mask is not None:
            unmasked = mask.sum() * (unmasked // mask.numel())
        is_finite = scale > 0
        size = torch.where(is_finite, losses.abs(), 0.0)
        number = is_finite.sum()
        sums = (
            number,
            ((scale < 1) & is_finite).sum(),
            unmasked - number,
            ((losses <= 0) & is_finite).sum(),
            size.sum(dtype=wide),
            ((1 - scale) * size).sum(dtype=wide),
            scale.sum(dtype=wide),
        )
        largest = torch.where(is_finite, losses, -math.inf).max()
        self.step.add_(torch.stack((*sums, state.count < self.count)))
        self.count.copy_(state.count)
        record = torch.stack((largest, state.mean, state.var, state.count))
        self.record.copy_(torch.where(largest > self.record[LARGEST], record, self.record))

    def _level(self, moments: np.ndarray) -> tuple[float, float, float]:
        """Return limit, mean and standard deviation as the rule makes them from its moments, in their precision."""
        buffers: Any = self.limiter._buffers
        number = np.float64 if buffers["mean"].dtype == torch.float64 else np.float32
        rule: rules.ALRC = self.limiter.rule
        state = Moments(number(moments[0]), number(moments[1]), int(moments[2]))
        with np.errstate(all="ignore"):
            _, _, std = rule._bounds(state, NUMPY)
            return float(rule.limit(state, NUMPY)), float(rule.gain * state.mean), float(std)


def _measure_on_host(losses: Tensor, scale: Tensor | None, mask: Tensor | None) -> tuple[Any, float]:
    """Return the sums of a call up to RELEARNED, and its largest finite loss; a scale of None is 1 everywhere."""
    size = losses.numel()
    wide = losses.to(torch.promote_types(losses.dtype, torch.float32))
    if scale is None:
        values: Any = wide.numpy()
        sizes = np.abs(values).sum(dtype=np.float64)
        return (size, 0, 0, np.count_nonzero(values <= 0), sizes, 0.0, size), values.max()
    unmasked = size
    if mask is not None:
        found: Any = mask.numpy()
        unmasked = np.count_nonzero(found) * (size // mask.numel())
    factors: Any = scale.numpy()
    is_finite = factors > 0
    number = np.count_nonzero(is_finite)
    rest = size - number
    values = wide.nan_to_num(0.0, 0.0, 0.0).numpy() * is_finite
    sizes = np.abs(values)
    limited = np.count_nonzero(factors < 1) - rest
    largest = values.max()
    if rest and largest <= 0:  # zeros stand for what is not finite
        largest = np.where(is_finite, values, -math.inf).max()
    return (
        number,
        limited,
        unmasked - number,
        np.count_nonzero(values <= 0) - rest,
        sizes.sum(dtype=np.float64),
        ((1 - factors) * sizes).sum(dtype=np.float64) if limited else 0.0,
        factors.sum(dtype=np.float64),
    ), largest


def _ratio(x: Any, y: Any, otherwise: float = math.nan) -> float:
    """Return x / y, or what to say where there is nothing to divide by."""
    return float(x / y) if y else otherwise
