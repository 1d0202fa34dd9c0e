"""Read and write the small files of a run folder, and tell from them how a run stands.

This is the only module that knows the file names of docs/design/0002-run-folders.md. It must stay cheap to import
and to call: a status of ten thousand runs goes through `inspect_run`, so nothing here may import pyarrow or numpy.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

SCHEMA = 1
CONFIG, ENV, PROGRESS, FAILURE, RESULT = "config.json", "env.json", "progress.json", "failure.json", "result.json"
METRICS, CHECKPOINTS, LATEST, LOCK, LOG = "metrics.arrows", "checkpoint", "latest.json", "run.lock", "log.txt"
OWN_FILES = (CONFIG, ENV, PROGRESS, FAILURE, RESULT, METRICS, CHECKPOINTS, LOCK, LOG)
DRAFT = ".draft-"

State = Literal["pending", "running", "interrupted", "failed", "finished", "diverged"]

# A reader that looks whether a run is locked holds the lock for microseconds; an executor waits that long for it.
_LOCK_PATIENCE_S = 0.25
_PROGRESS_IS_YOUNG_S = 10.0
_ADVICE = {
    errno.ENOSPC: "free some space, then repeat the command",
    errno.EDQUOT: "your quota is used up: free some space, then repeat the command",
    errno.EFBIG: "files may not grow that large here: raise the limit or choose another folder",
    errno.EACCES: "make the folder writable or choose another one",
    errno.EPERM: "make the folder writable or choose another one",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.ENOTDIR: "a file stands where a folder is needed: move it away or choose another folder",
    errno.EEXIST: "a file stands where a folder is needed: move it away or choose another folder",
}


@dataclass(frozen=True)
class RunState:
    """Hold how a run stands.

    Attributes:
        folder: The run folder.
        name: Name of the run, without the digits of its identity.
        identity: SHA-256 of what determines the run's numbers, 64 hex digits; "" if config.json is missing.
        state: `pending` (never started), `running`, `interrupted` (goes on when the command is repeated), `failed`
            (tried again when the command is repeated), `finished` or `diverged` (both are done).
        step: Updates made. For an interrupted or failed run: the step of the checkpoint it would go on from.
        total: Updates wanted, or None while unknown.
        steps_per_s: Updates per second over the last ten seconds, in company as many as the run makes itself; of a
            done run, updates per second of `wall_s`; None if unknown.
        diverged_at: Step of the divergence, or None.
        message: What a person should know; "" if nothing.
        summary: The run's final numbers; None unless done. A number that was not finite is None.
        wall_s: Seconds the result took, over all attempts, without lost work; None unless done. A run that trained in
            a pack takes its share: the pack's seconds, each divided by the runs at work.
        code_version: Version of the code that made the last attempt, or None.
    """

    folder: Path
    name: str
    identity: str
    state: State
    step: int = 0
    total: int | None = None
    steps_per_s: float | None = None
    diverged_at: int | None = None
    message: str = ""
    summary: dict[str, float | None] | None = None
    wall_s: float | None = None
    code_version: str | None = None

    @property
    def is_done(self) -> bool:
        """Tell whether the run has its result and is left untouched from now on."""
        return self.state in ("finished", "diverged")

    def to_json(self) -> dict[str, Any]:
        """Return the state as a JSON object, the folder as a string."""
        return {**vars(self), "folder": str(self.folder)}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> RunState:
        """Return the state that `to_json` was called on."""
        return cls(**{**document, "folder": Path(document["folder"])})


def inspect_run(folder: Path) -> RunState:
    """Tell how a run stands, from a few small reads.

    Never raises for what it finds: a folder that is missing is pending (repeating the command that made it makes it
    again), a file that cannot be read makes the run failed, and the message says which.

    Args:
        folder: The run folder.

    Returns:
        The state at this moment.
    """
    folder = Path(folder)
    name = folder.name.rpartition("-")[0] or folder.name
    try:
        return _inspect(folder, name)
    except (ValueError, OSError) as error:
        return RunState(folder, name, "", "failed", message=str(error))


def _inspect(folder: Path, name: str) -> RunState:
    """Do the work of inspect_run; ValueError and OSError name the file that cannot be read."""
    place = f"{folder}{os.sep}"  # joining paths would take as long as reading the files
    result = read_json(place + RESULT)
    attempts = (read_json(place + ENV) or {}).get("attempts") or []
    code_version = attempts[-1].get("code_version") if attempts else None
    if result is not None:
        steps, wall_s = result.get("steps") or 0, result.get("wall_s")
        return RunState(
            folder,
            name,
            identity=result.get("identity", ""),
            state="diverged" if result.get("status") == "diverged" else "finished",
            step=steps,
            total=steps,
            steps_per_s=steps / wall_s if wall_s else None,
            diverged_at=result.get("diverged_at"),
            summary=result.get("summary"),
            wall_s=wall_s,
            code_version=code_version,
        )
    config = read_json(place + CONFIG)
    if config is None:
        message = f"{place + CONFIG} is missing: repeat the command that made the folder"
        return RunState(folder, name, "", "pending", message=message, code_version=code_version)
    state = RunState(folder, name, config.get("identity", ""), "pending", code_version=code_version)
    failure = read_json(place + FAILURE)
    if not attempts and failure is None:
        return state
    progress = read_json(place + PROGRESS) or {}
    state = replace(state, total=progress.get("total"), steps_per_s=progress.get("steps_per_s"))
    # An attempt begins with removing the failure of the one before. Trying the lock costs more than all the rest.
    if failure is None and _is_executing(folder, progress):
        return replace(state, state="running", step=progress.get("step", 0))
    checkpoint = read_json(folder / CHECKPOINTS / LATEST) or {}
    state = replace(state, state="interrupted", step=checkpoint.get("step", 0))
    if failure is not None:
        return replace(state, state="failed", message=f"{failure.get('type')}: {failure.get('message')}")
    return state


def _is_executing(folder: Path, progress: dict[str, Any]) -> bool:
    """Tell whether some process holds the run's lock."""
    path = folder / LOCK
    if not path.exists():
        return False
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return True
    except OSError:
        # In a folder that may only be read the lock cannot be tried; young progress is the next best evidence.
        written = progress.get("updated_at")
        age = datetime.now(UTC) - datetime.fromisoformat(written) if written else None
        return age is not None and age.total_seconds() < _PROGRESS_IS_YOUNG_S
    lock.release()
    return False


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold a run's lock; yields False, at once and without waiting, if another process holds it."""
    lock = FileLock(folder / LOCK)
    with plain_errors(folder / LOCK):
        try:
            lock.acquire(timeout=_LOCK_PATIENCE_S, poll_interval=0.02)
        except Timeout:
            lock = None
    try:
        yield lock is not None
    finally:
        if lock is not None:
            lock.release()


def read_json(path: Path | str) -> dict[str, Any] | None:
    """Read a JSON object; None if there is no such file, ValueError naming the file if it holds something else."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - half the price of Path.read_bytes
            document = json.loads(file.read())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); delete it and repeat the command") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path} holds no JSON object; delete it and repeat the command")
    return document


def check_schema(document: dict[str, Any], path: Path) -> None:
    """Raise ValueError if a document was written by a version of the format that this code does not know."""
    if document.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {document.get('schema')!r}, this code knows {SCHEMA}: use the newer alrc")


def write_json(path: Path, document: dict[str, Any], *, durable: bool = True) -> None:
    """Write a JSON object so that the file is, at every moment, the whole old one or the whole new one.

    Args:
        path: The file; its folder must exist.
        document: What to write. Numbers must be finite.
        durable: Whether it must survive a power failure from when this returns; costs two fsyncs.

    Raises:
        OSError: In one sentence, if the file cannot be written; nothing is left under the final name.
    """
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    draft = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    with plain_errors(path):
        try:
            with draft.open("w", encoding="utf-8") as file:
                file.write(text)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            draft.replace(path)
        except BaseException:
            with suppress(OSError):
                draft.unlink()
            raise
        if durable:
            sync_folder(path.parent)


def remove_drafts(folder: Path) -> None:
    """Delete what attempts that were killed in the middle of writing a file left behind; needs the run's lock."""
    for pattern in (f"{DRAFT}*", *(f".{name}.*" for name in (ENV, PROGRESS, FAILURE, RESULT))):
        for draft in folder.glob(pattern):
            draft.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power failure, where folders can be synced at all."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def plain_errors(path: Path) -> Iterator[None]:
    """Turn an OSError about writing a file into one sentence: which file, what is wrong, what to do."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # already a sentence
            raise
        advice = _ADVICE.get(error.errno, "repeat the command when this is repaired")
        raise type(error)(f"cannot write {path}: {error.strerror}; {advice}") from error


def now() -> str:
    """Return the time as ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
