"""Execute run folders on a Ray cluster, an existing one or one that is started here for as long as it is needed.

Ray decides where and when. What executes is the worker process that every other sweep uses, started by the task on
its machine, so a run ends with the same numbers wherever it ran. Why so is told in docs/design/0012-ray.md.
"""

from __future__ import annotations

import math
import os
import platform
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import ray
from ray import exceptions

from alrc_lab.runner.attempt import note_death
from alrc_lab.runner.executors import Executor
from alrc_lab.runner.folder import CONFIG, RunState, inspect_run, read_json
from alrc_lab.runner.packing import members_of
from alrc_lab.runner.recording import CHECKPOINT_EVERY_S
from alrc_lab.runner.worker_process import WorkerProcess, last_printed

_RETRIES = 3
# So long a retry waits for a process that lost its task to notice that, and to let go of the run.
_HANDOVER_S = 10.0
_OBJECT_STORE_BYTES = 100 * 2**20  # Ray's least is some 80 MB; only states travel


class RayExecutor(Executor):
    """Execute each run folder, or pack of them, as one Ray task, on storage that all machines see under one path.

    A run or pack whose worker is lost - killed, out of memory, its machine gone - goes on from the last checkpoints in
    another one, three times at most; then it is `failed`. If this process dies, Ray ends its tasks and the runs can
    be resumed.

    Args:
        workers: Runs at once; None for as many as the cluster has room for.
        threads: Cores that a run or a pack asks of Ray, and threads that its numerical libraries may use.
        checkpoint_every_s: Seconds from one checkpoint of a run to when its next is due.
        address: Address of a cluster, as `ray.init` takes it; None to use the one that this process is connected to,
            or to start one on this machine with `workers` · `threads` cores.
        gpus_per_run: GPUs, or the part of one, that a run whose config says `device: cuda`, or a pack of such, asks of
            Ray.

    Raises:
        ValueError: If gpus_per_run is nothing that Ray can share out.
        ConnectionError: If there is no cluster at the address.
    """

    def __init__(
        self,
        workers: int | None,
        threads: int,
        checkpoint_every_s: float = CHECKPOINT_EVERY_S,
        *,
        address: str | None = None,
        gpus_per_run: float = 1.0,
    ) -> None:
        if not (0 < gpus_per_run <= 1 or gpus_per_run == int(gpus_per_run) > 1):
            raise ValueError(f"gpus_per_run must be a part of one GPU or a whole number of them, got {gpus_per_run}")
        self._is_mine = connect(address, workers, threads)
        self._task = ray.remote(max_retries=0)(execute_on_this_machine)  # a retry shall know that it is one
        self._threads = threads
        self._limit = workers
        self._gpus_per_run = gpus_per_run
        self._checkpoint_every_s = checkpoint_every_s
        self._guard = threading.RLock()
        self._fitting: list[dict[str, float]] = []
        self._waiting: deque[_Job] = deque()
        self._running: dict[ray.ObjectRef[Any], _Job] = {}
        self._answers: SimpleQueue[tuple[ray.ObjectRef[Any], Future[Any]] | None] = SimpleQueue()
        self._is_closed = self._is_stopping = False
        self._collector = threading.Thread(target=self._collect, name="alrc-ray", daemon=True)
        self._collector.start()

    def submit_together(self, folders: Sequence[Path]) -> list[Future[RunState]]:
        """Execute run folders as one task as soon as the cluster has room for it.

        Raises:
            ValueError: If no machine of the cluster is large enough, however long one waits.
        """
        folders = [Path(folder) for folder in folders]
        resources = self._resources(folders)
        self._check_room(resources)
        job = _Job(folders, Future(), resources)
        with self._guard:
            if self._is_closed:
                raise RuntimeError("cannot submit a run after shutdown")
            self._waiting.append(job)
            self._start_some()
        return members_of(job.future, len(folders))

    def at_once(self, folders: Sequence[Path]) -> int:
        """Return how many tasks the cluster has room for now, as the run that asks for most, or the limit if lower."""
        needs = _needs(self._resources(folders))
        rooms = [
            min(math.floor(node["Resources"].get(name, 0) / number + 1e-9) for name, number in needs.items() if number)
            for node in ray.nodes()
            if node["Alive"]
        ]
        room = sum(rooms)
        return max(1, room if self._limit is None else min(room, self._limit))

    def shutdown(self, wait: bool = True, cancel: bool = False) -> None:
        """Accept nothing more and let go of the cluster when nothing is left to do.

        Args:
            wait: Return only when everything has ended.
            cancel: Drop what has not started, and end what has. Every run can be resumed.
        """
        with self._guard:
            self._is_closed = True
            self._is_stopping |= cancel
            if cancel:
                for job in self._waiting:
                    if not job.future.cancel():  # it has been running, and lost its worker
                        job.future.set_result([inspect_run(folder) for folder in job.folders])
                self._waiting.clear()
                for reference in self._running:
                    ray.cancel(reference, force=True)
            if not self._running and not self._waiting:
                self._answers.put(None)
        if wait:
            self._collector.join()

    def _resources(self, folders: Sequence[Path]) -> dict[str, float]:
        """Return what runs ask of Ray, together no more than the one that asks for most."""
        gpus = [self._gpus_per_run * _wants_gpu(folder) for folder in folders]
        return {"num_cpus": self._threads, "num_gpus": max(gpus, default=0)}

    def _check_room(self, resources: dict[str, float]) -> None:
        """Refuse what would wait forever."""
        needs = _needs(resources)
        if needs in self._fitting:
            return
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(all(node.get(name, 0) >= number for name, number in needs.items()) for node in nodes):
            wanted = " and ".join(f"{number:g} {name}" for name, number in needs.items() if number)
            has = "; ".join(f"{node.get('CPU', 0):g} CPU and {node.get('GPU', 0):g} GPU" for node in nodes)
            raise ValueError(f"a run needs {wanted}, and no machine of the Ray cluster has that: there is {has}")
        self._fitting.append(needs)

    def _start_some(self) -> None:
        """Hand to Ray what may run; needs the guard."""
        while self._waiting and (self._limit is None or len(self._running) < self._limit):
            job = self._waiting.popleft()
            if job.losses == 0 and not job.future.set_running_or_notify_cancel():
                continue
            more = f" and {len(job.folders) - 1} more" * (len(job.folders) > 1)
            task = self._task.options(name=job.folders[0].name + more, **job.resources)
            names = [str(folder.absolute()) for folder in job.folders]
            reference = task.remote(names, self._threads, self._checkpoint_every_s, job.losses > 0)
            self._running[reference] = job
            reference.future().add_done_callback(lambda answer, ref=reference: self._answers.put((ref, answer)))

    def _collect(self) -> None:
        """Take in what becomes of the tasks, until nothing is left after a shutdown; then let go of the cluster."""
        while (item := self._answers.get()) is not None:
            reference, answer = item
            job = self._running[reference]
            try:
                states = self._states_after(job, answer)
            except Exception as error:  # must reach whoever waits, and must not end this thread
                states = _failed(job.folders, f"{type(error).__name__}: {error}")
            with self._guard:
                del self._running[reference]
                if states is None and not self._is_stopping:
                    self._waiting.appendleft(job)
                elif states is None:
                    states = [inspect_run(folder) for folder in job.folders]
                self._start_some()
                is_over = self._is_closed and not self._running and not self._waiting
            if states is not None:
                named = zip(states, job.folders, strict=True)
                job.future.set_result([replace(state, folder=folder) for state, folder in named])
            if is_over:
                break
        if self._is_mine:
            ray.shutdown()

    def _states_after(self, job: _Job, answer: Future[Any]) -> list[RunState] | None:
        """Return the states that a task left its runs in, None if they shall go on in another one."""
        error = answer.exception()
        if error is None and "states" in answer.result():
            return [RunState.from_json(state) for state in answer.result()["states"]]
        if self._is_stopping:
            return _settled(job.folders)
        if isinstance(error, exceptions.RayTaskError):  # not the run's fault, and it would be the same again
            return _failed(job.folders, f"the Ray task failed: {error.cause!r}")
        job.losses += 1
        if job.losses <= _RETRIES:
            return None
        how, printed = ("", "") if error is not None else (answer.result()["died"], answer.result()["printed"])
        how = how or f"its Ray worker was lost ({type(error).__name__})"
        told = f"{how}; given up after {job.losses} attempts"
        return [
            found if found.is_done else note_death(folder, told, printed or str(error))
            for folder, found in zip(job.folders, _settled(job.folders), strict=True)
        ]


@dataclass
class _Job:
    """Hold runs that were submitted together, and how many workers they have lost."""

    folders: list[Path]
    future: Future[list[RunState]]
    resources: dict[str, float]
    losses: int = 0


def connect(address: str | None, workers: int | None = None, threads: int = 1) -> bool:
    """Connect this process to a Ray cluster, if it is not connected already.

    Args:
        address: Address of a cluster; None to start one on this machine.
        workers: Runs at once, for a cluster that is started.
        threads: Cores of each, for a cluster that is started.

    Returns:
        Whether the connection was made here, so that whoever asked has to end it.

    Raises:
        ValueError: If the address is one of the Ray client, which cannot do what is needed.
        ConnectionError: If there is no cluster at the address.
    """
    if address is not None and address.startswith("ray://"):
        raise ValueError(f"address {address!r} is one of the Ray client: run the command on a machine of the cluster")
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        cores = None if workers is None else workers * threads
        ray.init("local", num_cpus=cores, include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES, **quiet)
        return True
    try:
        ray.init(address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConnectionError(f"no Ray cluster answers at {address!r}: {reason}") from error
    return True


def cluster_cores(address: str) -> int:
    """Connect to a cluster and count the cores of all its machines.

    Args:
        address: Address of a cluster, as `ray.init` takes it.
    """
    connect(address)
    return int(ray.cluster_resources().get("CPU", 0))


# --- On a machine of the cluster. Only names, numbers and JSON values go in and out. ---

_held: tuple[tuple[int, str | None], WorkerProcess] | None = None


def execute_on_this_machine(
    folders: list[str], threads: int, checkpoint_every_s: float, is_retry: bool
) -> dict[str, Any]:
    """Execute run folders, several as one program, in a worker process of this Ray worker, kept for the next ones.

    If this process is killed, the worker process sees its stdin close and ends at once.

    Args:
        folders: Absolute paths of the run folders.
        threads: Threads that the numerical libraries may use.
        checkpoint_every_s: Seconds from one checkpoint to when the next is due.
        is_retry: Whether the process of an earlier task may still be about to let go of the runs.

    Returns:
        `states`, the runs' states as JSON; or `died` and `printed`: how the worker process ended, and its last words.
    """
    paths = [Path(folder) for folder in folders]
    unseen = [path / CONFIG for path in paths if not (path / CONFIG).is_file()]
    if unseen:
        told = f"{platform.node()} sees no {unseen[0]}: the results must lie where every machine sees them"
        return {"states": [state.to_json() for state in _failed(paths, told)]}
    if is_retry:  # a pack must find all its runs free, or it would be another pack
        _settled(paths)
    deadline = time.monotonic() + _HANDOVER_S
    while True:
        states = _worker(threads).ask(paths, checkpoint_every_s, "ray")
        if states is None or any(state.state == "interrupted" for state in states):
            how, printed = _let_go()
            how = how if states is None else "the worker process was asked to stop"
            return {"died": how, "printed": printed or last_printed(paths[0])}
        is_held = any(state.state == "running" for state in states)
        if not (is_retry and is_held and time.monotonic() < deadline):
            return {"states": [state.to_json() for state in states]}
        time.sleep(0.1)


def _worker(threads: int) -> WorkerProcess:
    """Return the worker process that this process keeps; its threads and GPUs are those it was started with."""
    global _held  # noqa: PLW0603 - a Ray worker is a process that serves many tasks, one after the other
    wanted = (threads, os.environ.get("CUDA_VISIBLE_DEVICES"))
    if _held is not None and (_held[0] != wanted or not _held[1].is_alive):
        _let_go()
    if _held is None:
        _held = wanted, WorkerProcess(threads, _search_path())
    return _held[1]


def _search_path() -> list[str]:
    """Return where this process finds modules, without the private folders that a Ray worker puts in front."""
    private = Path(ray.__file__).resolve().parent
    return [entry for entry in sys.path if private not in Path(entry).resolve().parents]


def _let_go() -> tuple[str, str]:
    """End the worker process that this process keeps; returns how it ended and what it printed outside of runs."""
    global _held
    assert _held is not None
    worker, _held = _held[1], None
    return worker.close()


# --- What a run needs, and how it was left ---


def _wants_gpu(folder: Path) -> bool:
    """Tell from the device in a run's config whether it needs a GPU."""
    config = None
    with suppress(ValueError, OSError):  # executing it will say so
        config = (read_json(folder / CONFIG) or {}).get("config")
    device = str((config or {}).get("device", "cpu"))
    if device.startswith("cuda:"):
        raise ValueError(
            f"{folder.name} wants device {device!r}, but Ray chooses the GPU of each run and shows it no other: "
            "use device 'cuda'"
        )
    return device == "cuda"


def _needs(resources: dict[str, float]) -> dict[str, float]:
    """Return what a task asks for, under the names that machines have it."""
    return {"CPU": resources["num_cpus"], "GPU": resources["num_gpus"]}


def _failed(folders: Sequence[Path], message: str) -> list[RunState]:
    """Say of runs that are not done why they were not executed."""
    found = [inspect_run(folder) for folder in folders]
    return [state if state.is_done else replace(state, state="failed", message=message) for state in found]


def _settled(folders: Sequence[Path]) -> list[RunState]:
    """Return the states of runs when their process, which has lost its task, has let go of them."""
    deadline = time.monotonic() + _HANDOVER_S
    while True:
        states = [inspect_run(folder) for folder in folders]
        if all(state.state != "running" for state in states) or time.monotonic() > deadline:
            return states
        time.sleep(0.02)
