"""Keep what a run logs so that a kill at any moment costs time, never numbers.

Metrics are appended to one Arrow IPC stream; a checkpoint remembers how long that stream was, and resuming cuts it
back to that length. So no row is lost and none is there twice, whatever happened after the checkpoint.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from alrc_lab.runner.folder import (
    CHECKPOINTS,
    DRAFT,
    LATEST,
    METRICS,
    OWN_FILES,
    PROGRESS,
    now,
    plain_errors,
    read_json,
    sync_folder,
    write_json,
)

CHECKPOINT_EVERY_S = 20.0
_PROGRESS_EVERY_S = 0.5
_RATE_WINDOW_S = 10.0
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


def read_metrics(folder: Path) -> dict[str, np.ndarray]:
    """Read the metrics of a run, finished or not.

    Args:
        folder: The run folder.

    Returns:
        Column by name, all of one length: `step` (int64), the others float32 or float64 as logged. A stream without
        end marker or with a torn tail gives every whole block; nothing logged gives an empty dict.
    """
    path = Path(folder) / METRICS
    if not path.exists():
        return {}
    schema, batches = _whole_batches(path.read_bytes())
    if schema is None:
        return {}
    table = pa.Table.from_batches(batches, schema)
    return {name: table.column(name).to_numpy() for name in schema.names}


class MetricsWriter:
    """Append blocks of rows to an Arrow IPC stream.

    Args:
        path: The stream; it is made if it is not there.
        keep_bytes: How much of it to keep; what is behind is cut off. 0 starts anew.

    Raises:
        ValueError: If the file is shorter than `keep_bytes`, or does not hold whole blocks up to there.
        OSError: In one sentence, if the file cannot be written.
    """

    def __init__(self, path: Path, keep_bytes: int = 0) -> None:
        self._path = path
        self._schema: pa.Schema | None = None
        self.last_step = 0
        length = path.stat().st_size if path.exists() else 0
        if keep_bytes > length:
            raise ValueError(f"it wants {keep_bytes} bytes of {path}, which has {length}")
        if keep_bytes:
            self._adopt(path.read_bytes()[:keep_bytes])
        with plain_errors(path):
            # Unbuffered: what `append` returned from is in the hands of the system, even if this process is killed.
            self._file = path.open("r+b" if length else "wb", buffering=0)
            self._file.truncate(keep_bytes)
            self._file.seek(keep_bytes)

    @property
    def length(self) -> int:
        """Length of the stream so far, in bytes."""
        return self._file.tell()

    def append(self, columns: Mapping[str, np.ndarray]) -> None:
        """Append rows.

        Args:
            columns: 1-D arrays of one length. `step` holds increasing integers, beyond all earlier ones. The others
                hold numbers; float16 and float32 are stored as float32, everything else as float64.

        Raises:
            ValueError: If they are not like that, or not the columns of the first call; nothing is written then.
            OSError: In one sentence, if the file cannot be written.
        """
        arrays = {name: np.asarray(column) for name, column in columns.items()}
        steps = self._checked_steps(arrays)
        if not steps.size:
            return
        stored = {"step": steps.astype(np.int64)}
        stored |= {name: _as_float(name, array) for name, array in arrays.items() if name != "step"}
        schema = pa.schema([(name, pa.from_numpy_dtype(array.dtype)) for name, array in stored.items()])
        known = self._schema if self._schema is not None else schema
        if {name: schema.field(name).type for name in schema.names} != {
            name: known.field(name).type for name in known.names
        }:
            raise ValueError(f"log() got the columns {_described(schema)}, but the first call had {_described(known)}")
        batch = pa.record_batch([pa.array(stored[name]) for name in known.names], schema=known)
        block = batch.serialize().to_pybytes()
        self._write(block if self._schema is not None else known.serialize().to_pybytes() + block)
        self._schema, self.last_step = known, int(steps[-1])

    def sync(self) -> None:
        """Make everything appended survive a power failure."""
        with plain_errors(self._path):
            os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Write the end marker, if anything was appended, and close."""
        if self._schema is not None:
            self._write(_END_OF_STREAM)
        self.sync()
        self.close()

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        self._file.close()

    def _write(self, block: bytes) -> None:
        """Write all of a block; a full disk may take only a part, which the next attempt cuts off."""
        rest = memoryview(block)
        with plain_errors(self._path):
            while rest:
                rest = rest[self._file.write(rest) :]

    def _adopt(self, kept: bytes) -> None:
        """Take columns and last step from what is kept of an earlier attempt."""
        schema, batches = _whole_batches(kept)
        if schema is None or not batches:
            raise ValueError(f"the first {len(kept)} bytes of {self._path} are damaged")
        self._schema = schema
        self.last_step = int(batches[-1].column("step")[-1].as_py())

    def _checked_steps(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        """Return the step column, after checking the shapes and that steps only grow."""
        shapes = {name: array.shape for name, array in arrays.items()}
        if "step" not in arrays:
            raise ValueError(f"log() needs a column 'step'; got {', '.join(arrays) or 'none'}")
        if len(set(shapes.values())) != 1 or arrays["step"].ndim != 1:
            raise ValueError(f"log() needs 1-D arrays of one length; got the shapes {shapes}")
        steps = arrays["step"]
        if steps.size and not np.issubdtype(steps.dtype, np.integer):
            raise ValueError(f"log() needs whole numbers in 'step'; got {steps.dtype}")
        if steps.size and (steps[0] <= self.last_step or np.any(np.diff(steps) <= 0)):
            raise ValueError(
                f"log() needs steps that grow from 1, beyond the last one logged ({self.last_step}); "
                f"got {steps[0]} … {steps[-1]}"
            )
        return steps


class SharedClock:
    """Share out the time of several runs that train as one program, evenly among those at work at each moment.

    Args:
        members: How many there are.
    """

    def __init__(self, members: int) -> None:
        self._members = members
        self._spent, self._seen = 0.0, time.monotonic()

    def seconds(self) -> float:
        """Return the share, since this clock was made, of a run that is at work still."""
        now_s = time.monotonic()
        self._spent, self._seen = self._spent + (now_s - self._seen) / max(self._members, 1), now_s
        return self._spent

    def leave(self) -> None:
        """Take one run out; from now on the others share the time."""
        self.seconds()
        self._members -= 1


class FolderRecorder:
    """Give an entry point its inputs, and keep what it hands over in a run folder.

    Satisfies the `Recorder` protocol of the experiments. One attempt uses one recorder and holds the run's lock.

    Args:
        folder: The run folder.
        inputs: The resolved data set.
        checkpoint_every_s: Seconds from one checkpoint to when the next is due.
        clock: Gives the seconds that count as the run's; by default all that pass.
    """

    def __init__(
        self,
        folder: Path,
        inputs: Mapping[str, Any] | None,
        checkpoint_every_s: float = CHECKPOINT_EVERY_S,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.inputs: dict[str, Any] = dict(inputs or {})
        self.steps = 0
        self._folder = folder
        self._metrics: MetricsWriter | None = None
        self._checkpoint_every_s = checkpoint_every_s
        self._clock = clock or time.monotonic
        self._started = self._clock()
        self._checkpointed = time.monotonic()
        self._earlier_s = 0.0
        self._progressed = -_PROGRESS_EVERY_S
        self._pace: deque[tuple[float, int]] = deque()

    @property
    def wall_s(self) -> float:
        """Seconds the run has taken, its share of a pack's: this attempt, and earlier ones up to their checkpoint."""
        return self._earlier_s + self._clock() - self._started

    def resume(self) -> tuple[int, Path] | None:
        """Return step and file of the last checkpoint, None if there is none, and cut the metrics back to it.

        Call it once, before anything is logged. An entry point that never calls it starts from zero.

        Raises:
            ValueError: If the checkpoint does not fit the folder; says what to delete.
        """
        if self._metrics is not None:
            raise RuntimeError("resume() must be called once, before log() and checkpoint()")
        folder = self._folder / CHECKPOINTS
        latest = read_json(folder / LATEST)
        if latest is None:
            self._metrics = MetricsWriter(self._folder / METRICS)
            return None
        path = folder / str(latest.get("file"))
        try:
            if not path.is_file():
                raise ValueError(f"its file {path.name} is missing")
            self._metrics = MetricsWriter(self._folder / METRICS, keep_bytes=int(latest["metrics_bytes"]))
            self.steps = int(latest["step"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"the checkpoint in {folder} cannot be used: {error}. Delete {folder} to start this run again from zero"
            ) from error
        self._earlier_s = float(latest.get("wall_s", 0.0))
        return self.steps, path

    def log(self, columns: Mapping[str, np.ndarray]) -> None:
        """Append rows to the metrics; hand over blocks of some hundred rows rather than single ones.

        Args:
            columns: 1-D arrays of one length, as `MetricsWriter.append` takes them.
        """
        self._writer().append(columns)
        self.steps = max(self.steps, self._writer().last_step)

    def is_checkpoint_due(self) -> bool:
        """Tell whether it is time for a checkpoint; costs less than a microsecond."""
        return time.monotonic() - self._checkpointed >= self._checkpoint_every_s

    def checkpoint(self, step: int, save: Callable[[Path], None]) -> None:
        """Keep the state after an update, so that a killed run goes on from here.

        Log the rows up to `step` before: what is logged later is cut off when the run resumes.

        Args:
            step: Updates made.
            save: Writes the state to the path it is given; the path has no suffix to rely on.
        """
        metrics = self._writer()
        metrics.sync()
        folder = self._folder / CHECKPOINTS
        with plain_errors(folder):
            folder.mkdir(exist_ok=True)
        path = folder / f"step-{step:09d}.ckpt"
        _write_whole(path, folder / "draft", save)
        latest = {"step": step, "file": path.name, "metrics_bytes": metrics.length, "wall_s": round(self.wall_s, 3)}
        write_json(folder / LATEST, latest)
        for other in folder.iterdir():
            if other.name not in (LATEST, path.name):
                other.unlink()
        self.steps = max(self.steps, step)
        self._checkpointed = time.monotonic()

    def keep(self, name: str, save: Callable[[Path], object]) -> None:
        """Keep a file beside the run's numbers, such as trained weights; a file of that name is replaced.

        Args:
            name: Name of the file, none of those that a run folder has by itself.
            save: Writes the file to exactly the path it is given.

        Raises:
            ValueError: If the name is a path or taken, or `save` wrote nothing.
        """
        if Path(name).name != name or name.startswith(".") or name in OWN_FILES:
            raise ValueError(f"keep() needs the plain name of a file, other than {', '.join(OWN_FILES)}; got {name!r}")
        _write_whole(
            self._folder / name, self._folder / f"{DRAFT}{name}", save
        )  # the suffix stays: some savers need it

    def progress(self, step: int, total: int) -> None:
        """Tell how far the run is; call it as often as you like, it writes at most twice a second.

        Args:
            step: Updates made.
            total: Updates wanted.
        """
        self.steps = max(self.steps, step)
        time_s = time.monotonic()
        if not self._pace:
            self._pace.append((time_s, step))
        if time_s - self._progressed < _PROGRESS_EVERY_S:
            return
        self._progressed = time_s
        since_s, since = self._pace[0]
        rate = (step - since) / (time_s - since_s) if step > since else None
        self._pace.append((time_s, step))
        while time_s - self._pace[1][0] > _RATE_WINDOW_S:
            self._pace.popleft()
        document = {"step": step, "total": total, "steps_per_s": rate, "updated_at": now()}
        write_json(self._folder / PROGRESS, document, durable=False)

    def finish(self) -> None:
        """End the stream of metrics."""
        self._writer().finish()

    def close(self) -> None:
        """Release the files, whatever happened."""
        if self._metrics is not None:
            self._metrics.close()

    def _writer(self) -> MetricsWriter:
        """Return the open stream; starts anew if the entry point did not ask to resume."""
        if self._metrics is None:
            self._metrics = MetricsWriter(self._folder / METRICS)
        return self._metrics


def _write_whole(path: Path, draft: Path, save: Callable[[Path], object]) -> None:
    """Let `save` write a draft, and give it its name once all of it is on the disk."""
    draft.unlink(missing_ok=True)
    try:
        with plain_errors(path):
            try:
                save(draft)
            except RuntimeError:  # torch says so of a full disk too; then there is no room for more either
                with draft.open("ab") as file:
                    file.write(bytes(2**20))
                raise
            if not draft.is_file():
                raise ValueError(f"save() must write to exactly {draft}; does it append a suffix of its own?")
            with draft.open("r+b") as file:
                os.fsync(file.fileno())
            draft.replace(path)
            sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            draft.unlink()  # a full disk needs the room to say why the run failed
        raise


def _whole_batches(stream: bytes) -> tuple[pa.Schema | None, list[pa.RecordBatch]]:
    """Return schema and whole batches of a stream that may end anywhere; no schema if not even that is whole."""
    try:
        reader = pa.ipc.open_stream(stream)
    except (pa.ArrowException, OSError):
        return None, []
    batches = []
    while True:
        try:
            batches.append(reader.read_next_batch())
        except StopIteration:
            return reader.schema, batches
        except (pa.ArrowException, OSError):  # the torn tail: in memory nothing else can fail to be read
            return reader.schema, batches


def _as_float(name: str, array: np.ndarray) -> np.ndarray:
    """Return a column as float32 or float64."""
    if array.dtype.kind not in "biuf":
        raise ValueError(f"log() needs numbers; column {name!r} holds {array.dtype}")
    return array.astype(np.float32 if array.dtype in (np.float16, np.float32) else np.float64)


def _described(schema: pa.Schema) -> str:
    """List names and types of columns."""
    return ", ".join(f"{field.name} ({field.type})" for field in schema)
