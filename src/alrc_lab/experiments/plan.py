"""Say what a study is before anything of it has been run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Cost(NamedTuple):
    """Say what runs of one shape take."""

    label: str
    """What was timed, such as "width 8, batch 1: 2.1 ms an update × 45,000 updates"."""
    seconds: float
    """Seconds that all runs of this shape take, one after the other."""


@dataclass(frozen=True)
class Estimate:
    """Say how long a study takes on this machine."""

    seconds: float
    """Wall-clock seconds for all runs, none of them done."""
    detail: list[str]
    """One line for each shape of run that was timed."""


@dataclass(frozen=True)
class Plan:
    """Hold everything about a study that is known before it starts."""

    study: dict[str, Any]
    """Content of study.json, without the runs' folders."""
    runs: list[dict[str, Any]]
    """`entry`, `config`, `inputs`, `excluded`, `name`, `cell` and `seed` of every run; one whose cell is none, if there
    is one, is what the study's `references` are read from."""
    default_out: str
    """Folder to use when none is named."""
    measure: Callable[[Sequence[dict[str, Any]]], list[Cost]] = field(repr=False)
    """Times a few updates of each shape of run."""

    def estimate(self, workers: int, threads: int) -> Estimate:
        """Time a few updates of each shape of run, and add up.

        Args:
            workers: Runs at once.
            threads: Threads of each.

        Returns:
            The estimate, made with `threads` threads and nothing else running.
        """
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            costs = self.measure(self.runs)
        finally:
            torch.set_num_threads(before)
        on = f"on {threads} thread{'s' if threads > 1 else ''}"
        return Estimate(sum(cost.seconds for cost in costs) / workers, [f"{cost.label}, {on}" for cost in costs])
