"""Count skipped updates on the device, keep their evidence there, and raise when there are too many in a row.

Exists apart from `guard.py` because looking at a device without waiting for it is a subject of its own.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alrc.rules.skips import SkippedStep, TooManySkips
from alrc.torch.arrival import Arrival

__all__ = ["SkipLedger"]

CONSECUTIVE, LONGEST, TOTAL, STEPS = range(4)
_LATE = 64


class SkipLedger:
    """Keep counters and evidence on a device; look at them from the host when a copy has arrived."""

    def __init__(self, budget: int | None, device: torch.device) -> None:
        self.budget = budget
        self.ids: deque[tuple[int, Any]] = deque(maxlen=(budget or 0) + _LATE)
        # One dtype for both saves conversions. float64 holds every step number; Apple's GPUs have none.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.counters = torch.zeros(4, dtype=dtype, device=device)
        self.evidence = torch.zeros((budget or 1, 3), dtype=dtype, device=device)
        self._rows = torch.arange(budget or 1, device=device)
        self._arrival = Arrival((self.counters, self.evidence))
        self._until_look = budget or 0

    def record(self, is_bad: Tensor, loss: Tensor, norm: Tensor) -> None:
        """Take an update into the counters, and into the evidence if it is skipped; all 0-d, on the device."""
        consecutive, longest, total, steps = self.counters.unbind()
        row = torch.stack((steps, loss, norm))
        is_row = (self._rows == consecutive.remainder(self._rows.numel())) & is_bad
        torch.where(is_row.unsqueeze(1), row, self.evidence, out=self.evidence)
        number = is_bad.to(steps.dtype)
        consecutive = (consecutive + 1) * number
        counters = [consecutive, torch.maximum(longest, consecutive), total + number, steps + 1]
        torch.stack(counters, out=self.counters)

    def check(self) -> None:
        """Raise if the budget is spent, as far as the host knows; never waits for a CUDA device or the CPU."""
        arrival = self._arrival
        if self.budget is None:
            return
        if arrival.waits:
            self._until_look -= 1
            if self._until_look:
                return
            self._until_look = self.budget
        self._inspect(self.budget)
        if not arrival.is_under_way:
            arrival.send()
            if arrival.is_immediate:
                self._inspect(self.budget)

    def _inspect(self, budget: int) -> None:
        """Raise if what has arrived says that the budget was spent; the next streak then starts from nothing."""
        views = self._arrival.read()
        if views is None or views[0][LONGEST] < budget:
            return
        evidence = views[1]
        rows = evidence[np.argsort(evidence[:, 0])]
        ids = dict(self.ids)
        skipped = [
            SkippedStep(int(step), float(loss), float(norm), _plain(ids.get(int(step)))) for step, loss, norm in rows
        ]
        self.counters[:TOTAL].zero_()
        raise TooManySkips(skipped)


def _plain(ids: Any) -> Any:
    """Return sample ids as Python objects."""
    return ids.tolist() if isinstance(ids, Tensor) else ids
