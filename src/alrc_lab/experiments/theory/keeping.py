"""Keep what is done of an experiment, so that a killed run goes on after the last setting it finished."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from alrc_lab.experiments.recorder import Recorder

__all__ = ["Kept"]


class Kept:
    """Remember the arrays of every part of a run, in the checkpoints of its recorder.

    Args:
        recorder: The recorder; asked for its last checkpoint at once.
        parts: Number of parts, for progress.
    """

    def __init__(self, recorder: Recorder, parts: int) -> None:
        self._recorder, self._parts = recorder, parts
        self._arrays: dict[str, dict[str, np.ndarray]] = {}
        resumed = recorder.resume()
        if resumed is not None:
            with np.load(resumed[1], allow_pickle=False) as stored:
                for name in stored.files:
                    part, _, field = name.partition("/")
                    self._arrays.setdefault(part, {})[field] = stored[name]
        self._done = 0

    def part(self, name: str, make: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Return the arrays of a part, made now or found in the checkpoint.

        Args:
            name: Name of the part, without a slash.
            make: Makes its arrays; numbers and booleans only.

        Returns:
            The arrays.
        """
        is_new = name not in self._arrays
        if is_new:
            self._arrays[name] = {field: np.asarray(array) for field, array in make().items()}
        self._done += 1
        self._recorder.progress(self._done, self._parts)
        if is_new and self._done < self._parts and self._recorder.is_checkpoint_due():
            self._recorder.checkpoint(self._done, self._save)
        return self._arrays[name]

    def _save(self, path: Path) -> None:
        """Write all arrays."""
        flat = {f"{part}/{field}": array for part, arrays in self._arrays.items() for field, array in arrays.items()}
        with path.open("wb") as file:
            np.savez(file, allow_pickle=False, **flat)
