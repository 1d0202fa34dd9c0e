"""Say what an experiment may ask of whoever runs it, and offer a recorder that needs no runner.

Experiments depend on this protocol alone, so they can be called as plain functions in tests and notebooks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Recorder(Protocol):
    """Hand an experiment its data set, and keep what it measures."""

    inputs: dict[str, Any]
    """The resolved data set: `name`, `source`, `path`, `images`, `sha256`, …"""

    def resume(self) -> tuple[int, Path] | None:
        """Return step and file of the last checkpoint, or None; call it once, before anything is logged."""
        ...

    def log(self, columns: Mapping[str, np.ndarray]) -> None:
        """Append rows: 1-D arrays of one length, among them `step`, the n-th update from 1."""
        ...

    def is_checkpoint_due(self) -> bool:
        """Tell whether to call `checkpoint` now; cheap enough to ask after every update."""
        ...

    def checkpoint(self, step: int, save: Callable[[Path], None]) -> None:
        """Keep the state after update `step`, with `save` writing it to the path it is given; log rows before."""
        ...

    def keep(self, name: str, save: Callable[[Path], object]) -> None:
        """Keep a file of that name beside the run's numbers, with `save` writing it to the path it is given."""
        ...

    def progress(self, step: int, total: int) -> None:
        """Tell how far the run is; cheap enough to call after every update."""
        ...


class MemoryRecorder:
    """Keep everything in memory, for tests and notebooks.

    Example:
        >>> recorder = MemoryRecorder()
        >>> recorder.log({"step": np.array([1, 2]), "loss": np.array([0.5, 0.25])})
        >>> recorder.log({"step": np.array([3]), "loss": np.array([0.125])})
        >>> recorder.columns["loss"].tolist()
        [0.5, 0.25, 0.125]

    Args:
        inputs: The resolved data set.
        folder: Where checkpoints go; None for no checkpoints. A recorder on a folder that holds some resumes from
            the last one; its columns then begin behind it.
        checkpoint_every_s: Seconds from one checkpoint to when the next is due.
    """

    def __init__(
        self, inputs: Mapping[str, Any] | None = None, folder: Path | None = None, checkpoint_every_s: float = 20.0
    ) -> None:
        self.inputs: dict[str, Any] = dict(inputs or {})
        self.last_progress: tuple[int, int] | None = None
        self._folder = folder
        self._checkpoint_every_s = checkpoint_every_s
        self._checkpointed = time.monotonic()
        self._blocks: list[dict[str, np.ndarray]] = []

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """Everything logged so far, column by name."""
        names = self._blocks[0] if self._blocks else {}
        return {name: np.concatenate([block[name] for block in self._blocks]) for name in names}

    def resume(self) -> tuple[int, Path] | None:
        """Return step and file of the last checkpoint in the folder, or None."""
        files = sorted(self._folder.glob("step-*.ckpt")) if self._folder else []
        return (int(files[-1].stem.removeprefix("step-")), files[-1]) if files else None

    def log(self, columns: Mapping[str, np.ndarray]) -> None:
        """Append rows.

        Raises:
            ValueError: If they are not 1-D arrays of one length with `step` among them, or not the earlier columns.
        """
        block = {name: np.array(column) for name, column in columns.items()}
        shapes = {name: array.shape for name, array in block.items()}
        if "step" not in block or block["step"].ndim != 1 or len(set(shapes.values())) != 1:
            raise ValueError(f"log() needs 1-D arrays of one length, 'step' among them; got the shapes {shapes}")
        if self._blocks and block.keys() != self._blocks[0].keys():
            raise ValueError(f"log() got the columns {list(block)}, but the first call had {list(self._blocks[0])}")
        self._blocks.append(block)

    def is_checkpoint_due(self) -> bool:
        """Tell whether to checkpoint now; never without a folder."""
        return self._folder is not None and time.monotonic() - self._checkpointed >= self._checkpoint_every_s

    def checkpoint(self, step: int, save: Callable[[Path], None]) -> None:
        """Let `save` write the state into the folder; without a folder nothing is saved."""
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        draft = self._folder / "draft"
        save(draft)
        draft.replace(self._folder / f"step-{step:09d}.ckpt")
        self._checkpointed = time.monotonic()

    def keep(self, name: str, save: Callable[[Path], object]) -> None:
        """Let `save` write a file of that name into the folder; without a folder nothing is kept."""
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            save(self._folder / name)

    def progress(self, step: int, total: int) -> None:
        """Remember how far the run is."""
        self.last_progress = (step, total)
