"""Execute many run folders, in this process or in several others.

Every executor has the shape of `concurrent.futures`: `submit(folder)` gives a future of the run's state, `shutdown`
ends it. Only a folder's name travels to a worker process, and only a state comes back; why is told in
docs/design/0003-executors.md.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Protocol

from alrc_lab.runner.attempt import THREAD_VARIABLES, available_cores, execute, note_death
from alrc_lab.runner.folder import LOG, RunState, inspect_run
from alrc_lab.runner.packing import members_of, pack
from alrc_lab.runner.recording import CHECKPOINT_EVERY_S
from alrc_lab.runner.watching import Watch, polling

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
        self._workers: set[WorkerProcess] = set()
        self._is_stopping = False

    def submit(self, folder: Path) -> Future[RunState]:
        """Execute a run folder as soon as a worker is free."""
        return self.submit_together([folder])[0]

    def submit_together(self, folders: Sequence[Path]) -> list[Future[RunState]]:
        """Execute run folders as one program as soon as a worker is free; a worker that dies costs all of them."""
        joint = self._pool.submit(self._run, [Path(folder) for folder in folders])
        return members_of(joint, len(folders))

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

    def _run(self, folders: list[Path]) -> list[RunState]:
        """Let this thread's worker execute folders; a worker that is missing is started, a dead one told about."""
        try:
            worker = self._worker()
        except OSError as error:
            message = f"cannot start a worker process: {error}"
            return [replace(inspect_run(folder), state="failed", message=message) for folder in folders]
        if worker is None:
            return [inspect_run(folder) for folder in folders]
        states = worker.ask_together(folders, self._checkpoint_every_s)
        if states is not None and all(state.state != "interrupted" for state in states):
            return states
        self._mine.worker = None
        how, printed = self._close(worker)
        if states is not None:
            return states
        return [self._after_death(folder, how, printed or last_printed(folders[0])) for folder in folders]

    def _after_death(self, folder: Path, how: str, printed: str) -> RunState:
        """Return the state of a run whose worker died, after writing that down."""
        state = inspect_run(folder)
        return state if self._is_stopping or state.is_done else note_death(folder, how, printed)

    def _worker(self) -> WorkerProcess | None:
        """Return this thread's worker, None if there shall be no more."""
        with self._guard:
            if self._is_stopping:
                return None
            worker = getattr(self._mine, "worker", None)
            if worker is None or not worker.is_alive:
                worker = self._mine.worker = WorkerProcess(self._threads)
                self._workers.add(worker)
            return worker

    def _close(self, worker: WorkerProcess) -> tuple[str, str]:
        """End a worker that has nothing to do; returns how it ended and what it printed outside of runs."""
        with self._guard:
            self._workers.discard(worker)
        return worker.close()


class WorkerProcess:
    """Own one process of alrc_lab.runner.worker and its two pipes.

    Args:
        threads: Threads that its numerical libraries may use.
        search_path: Where it looks for modules; by default where this process does.
    """

    def __init__(self, threads: int, search_path: Iterable[str] | None = None) -> None:
        environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(threads))
        # Whatever can be imported here can be imported there. -P: the working directory is not part of that.
        entries = sys.path if search_path is None else search_path
        environment["PYTHONPATH"] = os.pathsep.join(entry or str(Path.cwd()) for entry in entries)
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
        answer = self._exchange(request)
        return None if answer is None else RunState.from_json(answer)

    def ask_together(self, folders: Sequence[Path], checkpoint_every_s: float) -> list[RunState] | None:
        """Let the worker execute folders as one program; None if it died instead of answering."""
        request = {"folders": [str(folder) for folder in folders], "checkpoint_every_s": checkpoint_every_s}
        answers = self._exchange(request)
        return None if answers is None else [RunState.from_json(answer) for answer in answers]

    def _exchange(self, request: dict[str, object]) -> Any:
        """Send a request and return the answer, None if there was none."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        line = self.process.stdout.readline()
        return json.loads(line) if line.endswith("\n") else None

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
    address: str | None = None,
    gpus_per_run: float = 1.0,
) -> Executor:
    """Return an executor by name.

    Args:
        name: `inline`, `processes` or `ray`.
        workers: Runs at once; by default as many as there are cores, or room in the cluster at `address`. `inline`
            always runs one.
        threads: Threads of each worker's numerical libraries; by default the cores shared out evenly, one for a run in
            a cluster. `inline` keeps those of this process, whose libraries are loaded already.
        checkpoint_every_s: Seconds from one checkpoint of a run to when its next is due.
        address: For `ray`: address of a cluster; None starts one on this machine.
        gpus_per_run: For `ray`: GPUs, or the part of one, for a run whose config says `device: cuda`.

    Raises:
        ValueError: If there is no such executor, Ray is not installed, or a number is below 1.
        ConnectionError: If there is no cluster at the address.
    """
    for what, number in (("workers", workers), ("threads", threads)):
        if number is not None and number < 1:
            raise ValueError(f"{what} must be at least 1, got {number}")
    if address is not None and name != "ray":
        raise ValueError(f"address {address!r} is for the executor ray, not {name}")
    if address is None:
        cores = available_cores()
        workers = workers or cores
        threads = threads or max(1, cores // workers)
    if name == "inline":
        return InlineExecutor(checkpoint_every_s)
    if name == "processes":
        return ProcessExecutor(workers or 1, threads or 1, checkpoint_every_s)
    if name != "ray":
        raise ValueError(f"there is no executor {name!r}; known are inline, processes, ray")
    _check_ray()
    from alrc_lab.runner.ray_executor import RayExecutor

    return RayExecutor(workers, threads or 1, checkpoint_every_s, address=address, gpus_per_run=gpus_per_run)


def cluster_cores(address: str) -> int:
    """Connect this process to a Ray cluster and count the cores of all its machines.

    Args:
        address: Address of the cluster, as `get` takes it.

    Raises:
        ValueError: If Ray is not installed.
        ConnectionError: If there is no cluster at the address.
    """
    _check_ray()
    from alrc_lab.runner import ray_executor

    return ray_executor.cluster_cores(address)


def _check_ray() -> None:
    """Say what to install if Ray is missing."""
    if importlib.util.find_spec("ray") is None:
        raise ValueError("the executor ray needs the package ray: pip install 'alrc[ray]'")


def sweep(
    folders: Iterable[Path],
    *,
    executor: str = "processes",
    workers: int | None = None,
    threads: int | None = None,
    on_poll: Callable[[list[RunState]], None] | None = None,
    poll_s: float = 0.5,
    checkpoint_every_s: float = CHECKPOINT_EVERY_S,
    address: str | None = None,
    gpus_per_run: float = 1.0,
    largest_pack: int | None = 1,
) -> list[RunState]:
    """Execute every folder that is not done. A run that fails, or whose worker dies, never ends the others.

    Args:
        folders: Run folders that `prepare` made.
        executor: `inline`, `processes` or `ray`.
        workers: Runs at once, as `get` takes it.
        threads: Threads of each worker, as `get` takes it.
        on_poll: Called with all states about every `poll_s` seconds, from another thread, and once at the end; less
            often where that would take more than half a percent of a core. If it raises, the runs go on and the
            exception is raised after them.
        poll_s: Seconds between two calls of `on_poll`.
        checkpoint_every_s: Seconds from one checkpoint of a run to when its next is due.
        address: Address of a Ray cluster, as `get` takes it.
        gpus_per_run: GPUs of each run in Ray, as `get` takes it.
        largest_pack: Runs that `processes` trains as one program at most; 1 for none, None for what pays. Numbers
            differ from those of single runs by rounding, and env.json says who trained with whom.

    Returns:
        The states afterwards, in the order of `folders`.

    Raises:
        KeyboardInterrupt: On Ctrl-C, after the workers have been stopped; the same call goes on from there.
    """
    folders = [Path(folder) for folder in folders]
    watch = Watch(folders)
    pool = get(
        executor, workers, threads, checkpoint_every_s=checkpoint_every_s, address=address, gpus_per_run=gpus_per_run
    )
    with polling(on_poll, watch.states, poll_s):
        try:
            if isinstance(pool, ProcessExecutor):
                for members in pack(watch.not_done(), largest_pack, workers or available_cores()):
                    watch.futures.update(zip(members, pool.submit_together(members), strict=True))
            else:
                for folder in watch.not_done():
                    watch.futures[folder] = pool.submit(folder)
            for future in list(watch.futures.values()):
                future.result()
        except BaseException:
            pool.shutdown(cancel=True)
            raise
        pool.shutdown()
    return watch.states()


def _stop(workers: Iterable[WorkerProcess]) -> None:
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


def last_printed(folder: Path) -> str:
    """Return the last of what a run printed; "" if it printed nothing."""
    path = folder / LOG
    return path.read_bytes()[-_TAIL_BYTES:].decode(errors="replace") if path.exists() else ""
