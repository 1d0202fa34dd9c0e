"""Say what a study is before anything of it has been run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Pack = Mapping[int, dict[str, Any]]
"""Runs that train together, by their place in the plan; `step` says how many updates a run has made already."""


class Cost(NamedTuple):
    """Say what runs of one shape still take."""

    label: str
    """What was timed, such as "width 8, batch 1, float32: 2.1 ms an update × 45,000 updates"."""
    seconds: dict[int, float]
    """Seconds that each of them keeps a worker busy, by its place; in a pack its share of the pack's."""


@dataclass(frozen=True)
class Estimate:
    """Say how long what is left of a study takes on this machine."""

    seconds: float
    """Wall-clock seconds."""
    detail: list[str]
    """One line for each shape of run that was timed."""
    runs: dict[int, float]
    """Seconds that each run keeps a worker busy, by its place in the plan; in a pack its share of the pack's."""


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
    measure: Callable[[Sequence[Pack]], list[Cost]] = field(repr=False)
    """Times a few updates of each shape of run and pack."""

    def estimate(
        self,
        workers: int,
        threads: int,
        packs: Sequence[Sequence[int]] | None = None,
        steps: Mapping[int, int] | None = None,
    ) -> Estimate:
        """Time a few updates of each shape of run, and add up.

        Args:
            workers: Packs at once, of one run or more.
            threads: Threads of each.
            packs: Places of the runs that are to be done, those together that train together; by default each alone.
            steps: Updates that runs have made already, by place.

        Returns:
            The estimate, made with `threads` threads and nothing else running; never less than the longest pack.
        """
        import torch

        places = [[place] for place in range(len(self.runs))] if packs is None else packs
        made = steps or {}
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            costs = self.measure([{i: self.runs[i] | {"step": made.get(i, 0)} for i in pack} for pack in places])
        finally:
            torch.set_num_threads(before)
        runs = {place: seconds for cost in costs for place, seconds in cost.seconds.items()}
        of_packs = [sum(runs.get(place, 0.0) for place in pack) for pack in places]
        on = f"on {threads} thread{'s' if threads > 1 else ''}"
        seconds = max(sum(of_packs) / workers, max(of_packs, default=0.0))
        return Estimate(seconds, [f"{cost.label}, {on}" for cost in costs], runs)
