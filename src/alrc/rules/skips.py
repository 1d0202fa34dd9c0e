"""What every step guard says when it has skipped too much: the steps, their losses and norms.

One error for all frameworks, so that one `except` catches it. Must import no framework.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

__all__ = ["SkippedStep", "TooManySkips"]


class SkippedStep(NamedTuple):
    """Say what is known of one update that was skipped."""

    step: int
    """Number of the update, counted from 0."""
    loss: float
    """Its loss; NaN if none was given, or if it was NaN."""
    norm: float
    """Its gradient norm."""
    ids: Any = None
    """What was given as `ids`; None if nothing was."""


class TooManySkips(RuntimeError):  # noqa: N818 - the name says what happened
    """Report that a whole budget of updates was skipped, one after the other.

    Attributes:
        skipped: The skipped updates, oldest first: as many as the budget allows.
    """

    def __init__(self, skipped: Sequence[SkippedStep]) -> None:
        self.skipped = tuple(skipped)
        first, last = self.skipped[0], self.skipped[-1]
        message = (
            f"{len(self.skipped)} updates in a row were skipped, steps {first.step} to {last.step}; they left the "
            f"weights as they were before step {first.step}. "
            f"Gradient norms: {_shorten(entry.norm for entry in self.skipped)}. "
            f"Losses: {_shorten(entry.loss for entry in self.skipped)}."
        )
        if any(entry.ids is not None for entry in self.skipped):
            message += f" Samples: {'; '.join(str(entry.ids) for entry in self.skipped)}."
        super().__init__(f"{message} Look at these batches and at the learning rate, or raise max_consecutive_skips.")


def _shorten(values: Any) -> str:
    """Write numbers with three digits, runs of equal ones once."""
    runs: list[tuple[str, int]] = []
    for text in (f"{value:.3g}" for value in values):
        number = runs.pop()[1] if runs and runs[-1][0] == text else 0
        runs.append((text, number + 1))
    return ", ".join(text if number == 1 else f"{text} ({number} times)" for text, number in runs)
