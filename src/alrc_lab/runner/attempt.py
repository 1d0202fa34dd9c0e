"""Make one attempt at one run, in this process.

Takes the lock, notes who tries and with which code, calls the entry point, and writes down how it ended: a result, a
failure, or nothing at all if it was stopped. Nothing here knows what an entry point computes.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import math
import numbers
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import traceback as tracebacks
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

from alrc_lab.runner.folder import (
    CHECKPOINTS,
    CONFIG,
    ENV,
    FAILURE,
    PROGRESS,
    RESULT,
    SCHEMA,
    RunState,
    check_schema,
    inspect_run,
    locked,
    now,
    read_json,
    remove_drafts,
    write_json,
)
from alrc_lab.runner.packing import together_of
from alrc_lab.runner.recording import CHECKPOINT_EVERY_S, FolderRecorder, SharedClock
from alrc_lab.runner.spec import identity_of

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
_LIBRARIES = ("numpy", "scipy", "statsmodels", "scikit-image", "pyarrow", "torch", "jax", "keras", "tensorflow")
# What a run's numbers come from: the library, the experiments and the data sets, not the CLI or the report.
_CODE_THAT_COUNTS = ("alrc", "alrc_lab/experiments", "alrc_lab/data")


def execute(folder: Path, *, executor: str = "inline", checkpoint_every_s: float = CHECKPOINT_EVERY_S) -> RunState:
    """Run or resume one run folder in this process.

    A done folder is left untouched. An exception of the entry point, SystemExit included, ends up in failure.json
    and in the state that is returned, and is never raised.

    Args:
        folder: A folder that `prepare` made.
        executor: Name to record in env.json.
        checkpoint_every_s: Seconds from one checkpoint to when the next is due.

    Returns:
        The state afterwards: `finished`, `diverged`, `failed`, or `running` if another process is executing the
        folder at this moment.

    Raises:
        KeyboardInterrupt: On Ctrl-C, and on SIGTERM if called in the main thread. The folder is left interrupted:
            executing it again goes on from its last checkpoint.
    """
    folder = Path(folder)
    state = inspect_run(folder)
    if state.is_done:
        return state
    if not (folder / CONFIG).is_file():
        return replace(state, state="failed")
    problem = None
    try:
        with locked(folder) as is_mine:
            state = inspect_run(folder)  # another process may have finished it while the lock was being taken
            if is_mine and not state.is_done:
                with _sigterm_as_interrupt():
                    problem = _attempt(folder, executor, checkpoint_every_s)
    except OSError as error:
        return replace(state, state="failed", message=str(error))
    if state.is_done:
        return state
    if not is_mine:
        return replace(state, state="running", message="another process is executing this run")
    return inspect_run(folder) if problem is None else replace(inspect_run(folder), state="failed", message=problem)


def execute_together(
    folders: Sequence[Path], *, executor: str = "inline", checkpoint_every_s: float = CHECKPOINT_EVERY_S
) -> list[RunState]:
    """Run or resume several run folders of one entry point as one program, its `run_together`.

    Each run keeps its own lock, files and state, as if `execute` had been called on it. What the program says of a
    run is written when that run ends. If the program fails, the runs without result are tried again one by one.

    Args:
        folders: Folders that `packing.pack` put together.
        executor: Name to record in env.json.
        checkpoint_every_s: Seconds from one checkpoint to when the next is due.

    Returns:
        The states afterwards, in the order of `folders`.

    Raises:
        KeyboardInterrupt: As `execute` does.
    """
    folders = [Path(folder) for folder in folders]
    if len(folders) == 1:
        return [execute(folders[0], executor=executor, checkpoint_every_s=checkpoint_every_s)]
    locks = dict[Path, ExitStack]()
    with ExitStack() as all_locks:
        for folder in folders:
            if (folder / CONFIG).is_file() and not inspect_run(folder).is_done:
                lock = all_locks.enter_context(ExitStack())
                try:
                    is_mine = lock.enter_context(locked(folder))
                except OSError:
                    continue  # `execute` says below what is wrong with it
                if is_mine and not inspect_run(folder).is_done:
                    locks[folder] = lock
                else:
                    lock.close()
        if len(locks) > 1:
            with _sigterm_as_interrupt():
                _attempt_together(locks, executor, checkpoint_every_s)
    return [execute(folder, executor=executor, checkpoint_every_s=checkpoint_every_s) for folder in folders]


def note_death(folder: Path, message: str, traceback: str) -> RunState:
    """Record that the process of an attempt died without saying why.

    Args:
        folder: The run folder.
        message: How it died.
        traceback: The last it printed.

    Returns:
        The state afterwards: `failed`, or what it is by now if the run was done or another process took it up.
    """
    try:
        with locked(folder) as is_mine:
            if is_mine and not inspect_run(folder).is_done:
                _note_failure(folder, "WorkerDied", message, traceback)
    except OSError as error:
        return replace(inspect_run(folder), state="failed", message=f"{message}; {error}")
    state = inspect_run(folder)
    return state if state.is_done or not is_mine else replace(state, state="failed", message=message)


@functools.cache
def code_version() -> str:
    """Return the version of the code that makes the numbers: the release, and ten digits of a hash of the sources.

    The hash covers `alrc`, the experiments and the data sets; a change of the report or the CLI does not alter it.
    """
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for part in _CODE_THAT_COUNTS:
        for path in sorted((root / part).rglob("*.py")):
            digest.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return f"{_version('alrc') or 'uninstalled'}+{digest.hexdigest()[:10]}"


def available_cores() -> int:
    """Count the cores this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _attempt(folder: Path, executor: str, checkpoint_every_s: float) -> str | None:
    """Make the attempt; returns what went wrong, if that could not even be written down."""
    recorder = None
    try:
        document = _begin(folder, executor)
        entry = _load(document["entry"])
        recorder = FolderRecorder(folder, document["inputs"], checkpoint_every_s)
        _end(folder, document, recorder, entry(document["config"], recorder))
    except (Exception, SystemExit) as error:
        return _fail(folder, error)
    finally:
        if recorder is not None:
            recorder.close()
    return None


def _attempt_together(locks: dict[Path, ExitStack], executor: str, checkpoint_every_s: float) -> None:
    """Make the attempt at several runs, whose locks are held; leaves those without result to whoever comes next."""
    documents = dict[Path, dict[str, Any]]()
    recorders = dict[Path, FolderRecorder]()
    try:
        pack = [_checked_config(folder) for folder in locks]
        together: Any = together_of(pack[0]["entry"])
        company = {
            "number": len(pack),
            "runs": [folder.name for folder in locks],
            "seeds": [document["config"].get("seed") for document in pack],
        }
        if hasattr(together, "facts_of"):
            company |= together.facts_of([document["config"] for document in pack])
        clock = SharedClock(len(pack))
        for folder in locks:
            documents[folder] = _begin(folder, executor, {"pack": company})
            recorders[folder] = FolderRecorder(folder, documents[folder]["inputs"], checkpoint_every_s, clock.seconds)
        members = list(locks)
        configs = [document["config"] for document in documents.values()]
        for place, outcome in together.run_together(configs, list(recorders.values())):
            folder = members[place]
            _end(folder, documents[folder], recorders[folder], outcome)
            clock.leave()
            locks[folder].close()
    except (Exception, SystemExit):
        # Whose fault it was shows when each is tried alone; nothing is lost but the time since the last checkpoint.
        tracebacks.print_exc()
    finally:
        for recorder in recorders.values():
            recorder.close()


def _begin(folder: Path, executor: str, company: dict[str, Any] | None = None) -> dict[str, Any]:
    """Clean up after earlier attempts and note this one; returns the content of config.json."""
    remove_drafts(folder)
    (folder / FAILURE).unlink(missing_ok=True)
    (folder / PROGRESS).unlink(missing_ok=True)
    document = _checked_config(folder)
    earlier = (read_json(folder / ENV) or {}).get("attempts", [])
    attempt = {"started_at": now(), **_surroundings(), "executor": executor, **(company or {})}
    write_json(folder / ENV, {"attempts": [*earlier, attempt]})
    return document


def _end(folder: Path, document: dict[str, Any], recorder: FolderRecorder, outcome: Any) -> None:
    """Write the result of a run."""
    outcome = _checked_outcome(document["entry"], outcome)
    recorder.finish()
    result = {
        "schema": SCHEMA,
        "status": "finished" if outcome["diverged_at"] is None else "diverged",
        **outcome,
        "steps": recorder.steps,
        "wall_s": round(recorder.wall_s, 3),
        "identity": document["identity"],
        "finished_at": now(),
    }
    write_json(folder / RESULT, result)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)  # of no use to a run that is done


def _fail(folder: Path, error: BaseException) -> str | None:
    """Write down why an attempt failed, unless its result is there; returns the reason if that could not be written."""
    if (folder / RESULT).exists():  # whole, or it would not have its name
        return None
    message = str(error) or "no message"
    try:
        _note_failure(folder, type(error).__name__, message, tracebacks.format_exc())
    except OSError as another:
        return f"{type(error).__name__}: {message} (and {another})"
    return None


def _note_failure(folder: Path, kind: str, message: str, traceback: str) -> None:
    """Write failure.json."""
    document = {"schema": SCHEMA, "type": kind, "message": message, "traceback": traceback, "failed_at": now()}
    write_json(folder / FAILURE, document)


def _checked_config(folder: Path) -> dict[str, Any]:
    """Return the content of config.json, if it still is what its identity says."""
    path = folder / CONFIG
    document = read_json(path) or {}
    check_schema(document, path)
    if identity_of(document) != document.get("identity"):
        raise ValueError(f"{path} was changed since it was written: delete the folder and repeat the command")
    return document


def _load(entry: str) -> Callable[[dict[str, Any], FolderRecorder], Any]:
    """Import an entry point."""
    module, _, name = entry.partition(":")
    function = getattr(importlib.import_module(module), name, None)
    if not callable(function):
        raise ValueError(f"entry {entry!r}: {module} has no function {name}")
    return function


def _checked_outcome(entry: str, outcome: Any) -> dict[str, Any]:
    """Return what an entry point returned as JSON values; numbers that are not finite become null."""
    wanted = "{'diverged_at': step or None, 'summary': {name: number}}"
    if not isinstance(outcome, dict) or set(outcome) != {"diverged_at", "summary"}:
        raise TypeError(f"{entry} must return {wanted}, got {outcome!r}")
    diverged_at, summary = outcome["diverged_at"], outcome["summary"]
    if not (diverged_at is None or isinstance(diverged_at, numbers.Integral)):
        raise TypeError(f"{entry} must return {wanted}, got diverged_at {diverged_at!r}")
    if not isinstance(summary, dict) or not all(isinstance(value, numbers.Real) for value in summary.values()):
        raise TypeError(f"{entry} must return {wanted}, got summary {summary!r}")
    plain = {str(name): int(v) if isinstance(v, numbers.Integral) else float(v) for name, v in summary.items()}
    return {
        "diverged_at": None if diverged_at is None else int(diverged_at),
        "summary": {name: value if math.isfinite(value) else None for name, value in plain.items()},
    }


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end the attempt as Ctrl-C does; only the main thread may ask for that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt("SIGTERM")

    before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
    try:
        signal.signal(signal.SIGTERM, interrupt)
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _surroundings() -> dict[str, Any]:
    """Describe code, machine and process of an attempt."""
    threads = os.environ.get(THREAD_VARIABLES[0], "")
    return {
        **_machine(),
        "cores": available_cores(),
        "threads": int(threads) if threads.isdigit() else None,
        "pid": os.getpid(),
    }


@functools.cache
def _machine() -> dict[str, Any]:
    """Describe what stays the same while this process lives."""
    return {
        "code_version": code_version(),
        "git": _git_state(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "libraries": {name: version for name in _LIBRARIES if (version := _version(name))},
    }


def _version(distribution: str) -> str | None:
    """Return the version of an installed distribution."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any] | None:
    """Return commit and cleanliness of the working tree this file is tracked in; None if it is in none."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        # Without its lock, which a run that is killed would leave behind for its owner to find.
        command = ["git", "--no-optional-locks", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # an installed copy may lie in somebody else's working tree
        return {"commit": git("rev-parse", "HEAD"), "is_dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_name() -> str:
    """Return the processor's name as people know it, where the system tells."""
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
