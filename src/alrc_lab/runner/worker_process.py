"""Own a process of alrc_lab.runner.worker from outside: start it, ask it, stop it, and say how it ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from alrc_lab.runner.attempt import THREAD_VARIABLES
from alrc_lab.runner.folder import LOG, RunState

_GRACE_S = 5.0
_TAIL_BYTES = 4000


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

    def ask(
        self, folders: Sequence[Path], checkpoint_every_s: float, executor: str = "processes"
    ) -> list[RunState] | None:
        """Let the worker execute folders, several of them as one program; None if it died instead of answering."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        names = [str(folder) for folder in folders]
        request = {"folders": names, "checkpoint_every_s": checkpoint_every_s, "executor": executor}
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        line = self.process.stdout.readline()
        return [RunState.from_json(answer) for answer in json.loads(line)] if line.endswith("\n") else None

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


def stop(workers: Iterable[WorkerProcess]) -> None:
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
