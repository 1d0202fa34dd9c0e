"""Execute many run folders, in this process or in several others.

Every executor has the shape of `concurrent.futures`: `submit(folder)` gives a future of the run's state, `shutdown`
ends it. Only a folder's name travels to a worker process, and only a state comes back; why is told in
docs/design/0003-executors.md.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Protocol

from alrc_lab.runner.attempt import THREAD_VARIABLES, available_cores, execute, note_death
from alrc_lab.runner.folder import LOG, RunState, inspect_run
from alrc_lab.runner.recording import CHECKPOINT_EVERY_S

_GRACE_S = 5.0
_TAIL_BYTES = 4000


class Executor(Protocol):
    """What every executor offers."""

    def submit(self, folder: Path) -> Future[RunState]:
        """Execute a run folder, now or later."""
        ...

    def shutdown(self, wait: bool = True, cancel: bool = False) -> None:
        """Accept nothing more; with `cancel`, drop what has not started and stop what has."""
        ...


class InlineExecutor:
    """Execute in the calling thread: `submit` returns when the run is over. Ctrl-C reaches the run."""

    def __init__(self, checkpoint_every_s: float = CHECKPOINT_EVERY_S) -> None:
        self._checkpoint_every_s = checkpoint_every_s

    def submit(self, folder: Path) -> Future[RunState]:
        """Execute a run folder and return its state in a future that is done."""
        future: Future[RunState] = Future()
        future.set_result(execute(Path(folder), executor="inline", checkpoint_every_s=self._checkpoint_every_s))
        return future

    def shutdown(self, wait: bool = True, cancel: bool = False) -> None:
        """Do nothing: nothing is ever left running."""


class ProcessExecutor:
    """Execute in persistent worker processes, each limited to its share of the threads.

    A worker that dies costs its run only: the run becomes `failed` with the signal in its message, and the next one
    gets a fresh worker. If this process dies, its workers end at once and their runs can be resumed.

    Args:
        workers: Runs at once.
        threads: Threads that the numerical libraries of each worker may use.
        checkpoint_every_s: Seconds from one checkpoint of a run to when its next is due.
    """

    def __init__(self, workers: int, threads: int, checkpoint_every_s: float = CHECKPOINT_EVERY_S) -> None:
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="alrc-run")
        self._threads = threads
        self._checkpoint_every_s = checkpoint_every_s
        self._mine = threading.local()  # each thread of the pool owns one worker
        self._guard = threading.Lock()
        self._workers: set[_Worker] = set()
        self._is_stopping = False

    def submit(self, folder: Path) -> Future[RunState]:
        """Execute a run folder as soon as a worker is free."""
        return self._pool.submit(self._run, Path(folder))

    def shutdown(self, wait: bool = True, cancel: bool = False) -> None:
        """Accept nothing more and end the workers when nothing is left to do.

        Args:
            wait: Return only when everything has ended.
            cancel: Drop what has not started; ask the workers to stop, and kill them if they have not after 5 s.
                Every run can be resumed.
        """
        self._pool.shutdown(wait=False, cancel_futures=cancel)
        if cancel:
            with self._guard:
                self._is_stopping = True
        if wait:
            self._end(cancel)
        else:
            threading.Thread(target=self._end, args=(cancel,), name="alrc-shutdown").start()

    def _end(self, cancel: bool) -> None:
        """Wait for the threads of the pool, then close their workers."""
        if cancel:
            with self._guard:
                workers = list(self._workers)
            _stop(workers)
        self._pool.shutdown(wait=True)
        for worker in list(self._workers):
            self._close(worker)

    def _run(self, folder: Path) -> RunState:
        """Let this thread's worker execute a folder; a worker that is missing is started, a dead one told about."""
        try:
            worker = self._worker()
        except OSError as error:
            return replace(inspect_run(folder), state="failed", message=f"cannot start a worker process: {error}")
        if worker is None:
            return inspect_run(folder)
        state = worker.ask({"folder": str(folder), "checkpoint_every_s": self._checkpoint_every_s})
        if state is not None and state.state != "interrupted":
            return state
        self._mine.worker = None
        how, printed = self._close(worker)
        if state is not None:
            return state
        if self._is_stopping or inspect_run(folder).is_done:
            return inspect_run(folder)
        return note_death(folder, how, printed or _tail(folder / LOG))

    def _worker(self) -> _Worker | None:
        """Return this thread's worker, None if there shall be no more."""
        with self._guard:
            if self._is_stopping:
                return None
            worker = getattr(self._mine, "worker", None)
            if worker is None or not worker.is_alive:
                worker = self._mine.worker = _Worker(self._threads)
                self._workers.add(worker)
            return worker

    def _close(self, worker: _Worker) -> tuple[str, str]:
        """End a worker that has nothing to do; returns how it ended and what it printed outside of runs."""
        with self._guard:
            self._workers.discard(worker)
        return worker.close()


class _Worker:
    """Own one process of alrc_lab.runner.worker and its two pipes."""

    def __init__(self, threads: int) -> None:
        environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(threads))
        # Whatever can be imported here can be imported there. -P: the working directory is not part of that.
        environment["PYTHONPATH"] = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "alrc_lab.runner.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                encoding="utf-8",
                env=environment,
                start_new_session=True,  # Ctrl-C reaches the driver alone, which then stops its workers in order
            )
        except BaseException:
            self._errors.close()
            raise

    @property
    def is_alive(self) -> bool:
        """Tell whether the process has not ended."""
        return self.process.poll() is None

    def ask(self, request: dict[str, object]) -> RunState | None:
        """Let the worker execute a folder; None if it died instead of answering."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        line = self.process.stdout.readline()
        return RunState.from_json(json.loads(line)) if line.endswith("\n") else None

    def close(self) -> tuple[str, str]:
        """Close the pipes, so that the process ends; returns how it ended, and what it printed outside of runs."""
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # a request that nobody read
                pipe.close()
        try:
            code = self.process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            _kill(self.process)
            code = self.process.wait()
        self._errors.seek(0)
        printed = self._errors.read()[-_TAIL_BYTES:].decode(errors="replace")
        self._errors.close()
        return _how_it_ended(code), printed


def get(
    name: str,
    workers: int | None = None,
    threads: int | None = None,
    *,
    checkpoint_every_s: float = CHECKPOINT_EVERY_S,
) -> Executor:
    """Return an executor by name.

    Args:
        name: `inline` or `processes`.
        workers: Runs at once; by default as many as there are cores. `inline` always runs one.
        threads: Threads of each worker's numerical libraries; by default the cores shared out evenly. `inline` keeps
            those of this process, whose libraries are loaded already.
        checkpoint_every_s: Seconds from one checkpoint of a run to when its next is due.

    Raises:
        ValueError: If there is no such executor, or a number is below 1.
    """
    for what, number in (("workers", workers), ("threads", threads)):
        if number is not None and number < 1:
            raise ValueError(f"{what} must be at least 1, got {number}")
    cores = available_cores()
    workers = workers or cores
    threads = threads or max(1, cores // workers)
    if name == "inline":
        return InlineExecutor(checkpoint_every_s)
    if name == "processes":
        return ProcessExecutor(workers, threads, checkpoint_every_s)
    raise ValueError(f"there is no executor {name!r}; known are inline, processes")


def sweep(
    folders: Iterable[Path],
    *,
    executor: str = "processes",
    workers: int | None = None,
    threads: int | None = None,
    on_poll: Callable[[list[RunState]], None] | None = None,
    poll_s: float = 0.5,
    checkpoint_every_s: float = CHECKPOINT_EVERY_S,
) -> list[RunState]:
    """Execute every folder that is not done. A run that fails, or whose worker dies, never ends the others.

    Args:
        folders: Run folders that `prepare` made.
        executor: `inline` or `processes`.
        workers: Runs at once, as `get` takes it.
        threads: Threads of each worker, as `get` takes it.
        on_poll: Called with all states about every `poll_s` seconds, from another thread, and once at the end. If it
            raises, the runs go on and the exception is raised after them.
        poll_s: Seconds between two calls of `on_poll`.
        checkpoint_every_s: Seconds from one checkpoint of a run to when its next is due.

    Returns:
        The states afterwards, in the order of `folders`.

    Raises:
        KeyboardInterrupt: On Ctrl-C, after the workers have been stopped; the same call goes on from there.
    """
    folders = [Path(folder) for folder in folders]
    before = {folder: inspect_run(folder) for folder in folders}
    futures: dict[Path, Future[RunState]] = {}

    def states() -> list[RunState]:
        return [_state_now(folder, before[folder], futures.get(folder)) for folder in folders]

    pool = get(executor, workers, threads, checkpoint_every_s=checkpoint_every_s)
    with _polling(on_poll, states, poll_s):
        try:
            for folder, state in before.items():
                if not state.is_done:
                    futures[folder] = pool.submit(folder)
            for future in futures.values():
                future.result()
        except BaseException:
            pool.shutdown(cancel=True)
            raise
        pool.shutdown()
    return states()


def _state_now(folder: Path, before: RunState, future: Future[RunState] | None) -> RunState:
    """Return a run's state, from memory where it cannot have changed."""
    if before.is_done:
        return before
    if future is not None and future.done() and not future.cancelled() and future.exception() is None:
        return future.result()
    return inspect_run(folder)


@contextmanager
def _polling(
    on_poll: Callable[[list[RunState]], None] | None, states: Callable[[], list[RunState]], poll_s: float
) -> Iterator[None]:
    """Call `on_poll` from a thread while the block runs, and once after it."""
    if on_poll is None:
        yield
        return
    is_over = threading.Event()
    problems: list[Exception] = []

    def poll() -> None:
        try:
            while not is_over.wait(poll_s):
                on_poll(states())
        except Exception as error:
            problems.append(error)

    thread = threading.Thread(target=poll, name="alrc-poll", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        if not problems:
            on_poll(states())
    if problems:
        raise problems[0]


def _stop(workers: Iterable[_Worker]) -> None:
    """Ask processes to end, and kill those that have not after the time of grace."""
    processes = [worker.process for worker in workers]
    deadline = time.monotonic() + _GRACE_S
    try:
        for process in processes:
            process.terminate()
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
    finally:  # a second Ctrl-C shortens the wait
        for process in processes:
            _kill(process)


def _kill(process: subprocess.Popen[str]) -> None:
    """Kill a process, and what it started, if it has not ended."""
    if process.poll() is not None:
        return
    if sys.platform == "win32":
        process.kill()
    else:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _how_it_ended(code: int) -> str:
    """Tell people what an exit code means."""
    if code >= 0:
        return f"the worker process ended with exit code {code}"
    name = signal.Signals(-code).name
    hint = ", as it is when the machine runs out of memory" if name == "SIGKILL" else ""
    return f"the worker process was ended by {name}{hint}"


def _tail(path: Path) -> str:
    """Return the last of what a run printed; "" if it printed nothing."""
    return path.read_bytes()[-_TAIL_BYTES:].decode(errors="replace") if path.exists() else ""
