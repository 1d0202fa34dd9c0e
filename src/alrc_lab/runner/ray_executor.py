"""Execute run folders on a Ray cluster, an existing one or one that is started here for as long as it is needed.

Ray decides where and when. What executes is the worker process that every other sweep uses, started by the task on
its machine, so a run ends with the same numbers wherever it ran. Why so is told in docs/design/0012-ray.md.
"""

from __future__ import annotations

import os
import platform
import sys
import threading
import time
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import ray
from ray import exceptions

from alrc_lab.runner.attempt import note_death
from alrc_lab.runner.executors import WorkerProcess, last_printed
from alrc_lab.runner.folder import CONFIG, RunState, inspect_run, read_json
from alrc_lab.runner.recording import CHECKPOINT_EVERY_S

_RETRIES = 3
# So long a retry waits for a process that lost its task to notice that, and to let go of the run.
_HANDOVER_S = 10.0
_OBJECT_STORE_BYTES = 100 * 2**20  # Ray's least is some 80 MB; only states travel


class RayExecutor:
    """Execute each run folder as one Ray task, on storage that every machine of the cluster sees under the same path.

    A run whose worker is lost - killed, out of memory, its machine gone - goes on from its last checkpoint in another
    one, three times at most; then it is `failed`. If this process dies, Ray ends its tasks and the runs can be
    resumed.

    Args:
        workers: Runs at once; None for as many as the cluster has room for.
        threads: Cores that a run asks of Ray, and threads that its numerical libraries may use.
        checkpoint_every_s: Seconds from one checkpoint of a run to when its next is due.
        address: Address of a cluster, as `ray.init` takes it; None to use the one that this process is connected to,
            or to start one on this machine with `workers` · `threads` cores.
        gpus_per_run: GPUs, or the part of one, that a run whose config says `device: cuda` asks of Ray.

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

    def submit(self, folder: Path) -> Future[RunState]:
        """Execute a run folder as soon as the cluster has room for it.

        Raises:
            ValueError: If no machine of the cluster is large enough, however long one waits.
        """
        folder = Path(folder)
        resources = _resources(folder, self._threads, self._gpus_per_run)
        self._check_room(resources)
        job = _Job(folder, Future(), resources)
        with self._guard:
            if self._is_closed:
                raise RuntimeError("cannot submit a run after shutdown")
            self._waiting.append(job)
            self._start_some()
        return job.future

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
                    job.future.cancel()
                self._waiting.clear()
                for reference in self._running:
                    ray.cancel(reference, force=True)
            if not self._running and not self._waiting:
                self._answers.put(None)
        if wait:
            self._collector.join()

    def _check_room(self, resources: dict[str, float]) -> None:
        """Refuse what would wait forever."""
        needs = {"CPU": resources["num_cpus"], "GPU": resources["num_gpus"]}
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
            task = self._task.options(name=job.folder.name, **job.resources)
            reference = task.remote(str(job.folder.absolute()), self._threads, self._checkpoint_every_s, job.losses > 0)
            self._running[reference] = job
            reference.future().add_done_callback(lambda answer, ref=reference: self._answers.put((ref, answer)))

    def _collect(self) -> None:
        """Take in what becomes of the tasks, until nothing is left after a shutdown; then let go of the cluster."""
        while (item := self._answers.get()) is not None:
            reference, answer = item
            job = self._running[reference]
            try:
                state = self._state_after(job, answer)
            except Exception as error:  # must reach whoever waits, and must not end this thread
                state = replace(inspect_run(job.folder), state="failed", message=f"{type(error).__name__}: {error}")
            with self._guard:
                del self._running[reference]
                if state is None and not self._is_stopping:
                    self._waiting.appendleft(job)
                elif state is None:
                    state = inspect_run(job.folder)
                self._start_some()
                is_over = self._is_closed and not self._running and not self._waiting
            if state is not None:
                job.future.set_result(replace(state, folder=job.folder))
            if is_over:
                break
        if self._is_mine:
            ray.shutdown()

    def _state_after(self, job: _Job, answer: Future[Any]) -> RunState | None:
        """Return the state that a task left its run in, None if the run shall go on in another one."""
        error = answer.exception()
        if error is None and "state" in answer.result():
            return RunState.from_json(answer.result()["state"])
        if self._is_stopping:
            return _settled(job.folder)
        if isinstance(error, exceptions.RayTaskError):  # not the run's fault, and it would be the same again
            return replace(inspect_run(job.folder), state="failed", message=f"the Ray task failed: {error.cause!r}")
        job.losses += 1
        if job.losses <= _RETRIES:
            return None
        found = _settled(job.folder)
        if found.is_done:
            return found
        how, printed = ("", "") if error is not None else (answer.result()["died"], answer.result()["printed"])
        how = how or f"its Ray worker was lost ({type(error).__name__})"
        return note_death(job.folder, f"{how}; given up after {job.losses} attempts", printed or str(error))


@dataclass
class _Job:
    """Hold a run that was submitted, and how many workers it has lost."""

    folder: Path
    future: Future[RunState]
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


def execute_on_this_machine(folder: str, threads: int, checkpoint_every_s: float, is_retry: bool) -> dict[str, Any]:
    """Execute a run folder in a worker process of this Ray worker, which it keeps for the next one.

    If this process is killed, the worker process sees its stdin close and ends at once.

    Args:
        folder: Absolute path of the run folder.
        threads: Threads that the numerical libraries may use.
        checkpoint_every_s: Seconds from one checkpoint to when the next is due.
        is_retry: Whether the process of an earlier task may still be about to let go of the run.

    Returns:
        `state`, the run's state as JSON; or `died` and `printed`: how the worker process ended, and its last words.
    """
    path = Path(folder)
    if not (path / CONFIG).is_file():
        message = f"{platform.node()} sees no {path / CONFIG}: the results must lie where every machine sees them"
        return {"state": replace(inspect_run(path), state="failed", message=message).to_json()}
    request = {"folder": folder, "checkpoint_every_s": checkpoint_every_s, "executor": "ray"}
    deadline = time.monotonic() + _HANDOVER_S
    while True:
        worker = _worker(threads)
        state = worker.ask(request)
        if state is None or state.state == "interrupted":
            how, printed = _let_go()
            how = how if state is None else "the worker process was asked to stop"
            return {"died": how, "printed": printed or last_printed(path)}
        if not (is_retry and state.state == "running" and time.monotonic() < deadline):
            return {"state": state.to_json()}
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
    return [entry for entry in sys.path if Path(ray.__file__).parent not in Path(entry).parents]


def _let_go() -> tuple[str, str]:
    """End the worker process that this process keeps; returns how it ended and what it printed outside of runs."""
    global _held
    assert _held is not None
    worker, _held = _held[1], None
    return worker.close()


# --- What a run needs, and how it was left ---


def _resources(folder: Path, threads: int, gpus_per_run: float) -> dict[str, float]:
    """Return what a run asks of Ray, from the device in its config."""
    config = None
    with suppress(ValueError, OSError):  # executing it will say so
        config = (read_json(folder / CONFIG) or {}).get("config")
    device = str((config or {}).get("device", "cpu"))
    if device.startswith("cuda:"):
        raise ValueError(
            f"{folder.name} wants device {device!r}, but Ray chooses the GPU of each run and shows it no other: "
            "use device 'cuda'"
        )
    return {"num_cpus": threads, "num_gpus": gpus_per_run if device == "cuda" else 0}


def _settled(folder: Path) -> RunState:
    """Return a run's state when its process, which has lost its task, has let go of it."""
    deadline = time.monotonic() + _HANDOVER_S
    while (state := inspect_run(folder)).state == "running" and time.monotonic() < deadline:
        time.sleep(0.02)
    return state
