"""Execute many run folders, in this process or in several others.

Every executor has the shape of `concurrent.futures`: `submit(folder)` gives a future of the run's state, `shutdown`
ends it; with `submit_together(folders)` several train as one program. Only names of folders travel to a worker process,
and only states come back; why is told in docs/design/0003-executors.md.
"""

from __future__ import annotations

import importlib.util
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from alrc_lab.runner.attempt import available_cores, execute_together, note_death
from alrc_lab.runner.folder import RunState, inspect_run
from alrc_lab.runner.packing import members_of, pack
from alrc_lab.runner.recording import CHECKPOINT_EVERY_S
from alrc_lab.runner.watching import Watch, polling
from alrc_lab.runner.worker_process import WorkerProcess, last_printed, stop


class Executor(ABC):
    """What every executor offers."""

    def submit(self, folder: Path) -> Future[RunState]:
        """Execute a run folder, now or later."""
        return self.submit_together([folder])[0]

    @abstractmethod
    def submit_together(self, folders: Sequence[Path]) -> list[Future[RunState]]:
        """Execute run folders as one program, now or later."""

    @abstractmethod
    def at_once(self, folders: Sequence[Path]) -> int:
        """Return how many packs of such runs can execute at the same time, 1 or more."""

    @abstractmethod
    def shutdown(self, wait: bool = True, cancel: bool = False) -> None:
        """Accept nothing more; with `cancel`, drop what has not started and stop what has."""


class InlineExecutor(Executor):
    """Execute in the calling thread: `submit` returns when the run is over. Ctrl-C reaches the run."""

    def __init__(self, checkpoint_every_s: float = CHECKPOINT_EVERY_S) -> None:
        self._checkpoint_every_s = checkpoint_every_s

    def submit_together(self, folders: Sequence[Path]) -> list[Future[RunState]]:
        """Execute run folders as one program and return their states in futures that are done."""
        joint = Future[list[RunState]]()
        futures = members_of(joint, len(folders))
        joint.set_result(execute_together(folders, executor="inline", checkpoint_every_s=self._checkpoint_every_s))
        return futures

    def at_once(self, folders: Sequence[Path]) -> int:
        """Return 1."""
        return 1

    def shutdown(self, wait: bool = True, cancel: bool = False) -> None:
        """Do nothing: nothing is ever left running."""


class ProcessExecutor(Executor):
    """Execute in persistent worker processes, each limited to its share of the threads.

    A worker that dies costs its run, or its pack, only: that becomes `failed` with the signal in its message, and the
    next one gets a fresh worker. If this process dies, its workers end at once and their runs can be resumed.

    Args:
        workers: Runs at once.
        threads: Threads that the numerical libraries of each worker may use.
        checkpoint_every_s: Seconds from one checkpoint of a run to when its next is due.
    """

    def __init__(self, workers: int, threads: int, checkpoint_every_s: float = CHECKPOINT_EVERY_S) -> None:
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="alrc-run")
        self._at_once = workers
        self._threads = threads
        self._checkpoint_every_s = checkpoint_every_s
        self._mine = threading.local()  # each thread of the pool owns one worker
        self._guard = threading.Lock()
        self._workers: set[WorkerProcess] = set()
        self._is_stopping = False

    def submit_together(self, folders: Sequence[Path]) -> list[Future[RunState]]:
        """Execute run folders as one program as soon as a worker is free; a worker that dies costs all of them."""
        joint = self._pool.submit(self._run, [Path(folder) for folder in folders])
        return members_of(joint, len(folders))

    def at_once(self, folders: Sequence[Path]) -> int:
        """Return the number of workers."""
        return self._at_once

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
            stop(workers)
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
        states = worker.ask(folders, self._checkpoint_every_s)
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
        largest_pack: Runs that train as one program at most, where the experiment can; 1 for none, None for what pays.
            Numbers differ from those of single runs by rounding, and env.json says who trained with whom.

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
            waiting = watch.not_done()
            for members in pack(waiting, largest_pack, pool.at_once(waiting)):
                watch.futures.update(zip(members, pool.submit_together(members), strict=True))
            for future in list(watch.futures.values()):
                future.result()
        except BaseException:
            pool.shutdown(cancel=True)
            raise
        pool.shutdown()
    return watch.states()
