"""Execute run folders for another process: `python -m alrc_lab.runner.worker`.

Reads one JSON object per line on stdin, {"folder", "checkpoint_every_s"}, and answers each with one line on stdout,
the run's state. With "folders" instead of "folder" the answer is a list of states, and several runs train together.
What a run prints goes to log.txt in its folder, the first one's if there are several, so it cannot corrupt that
channel. Ends when stdin closes, in the middle of a run too: then the driver died, and the run can be resumed.
"""

from __future__ import annotations

import faulthandler
import io
import json
import os
import queue
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from alrc_lab.runner.attempt import execute_together
from alrc_lab.runner.folder import LOG, RunState, inspect_run, plain_errors

DRIVER_IS_GONE = 3


def main() -> int:
    """Serve requests until stdin closes or a run is interrupted; returns the exit code."""
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    faulthandler.enable()
    inbox: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    is_busy = threading.Event()
    threading.Thread(target=_listen, args=(requests, inbox, is_busy), daemon=True).start()
    is_wanted = True
    while is_wanted and (line := inbox.get()) is not None:
        request = json.loads(line)
        folders = [Path(folder) for folder in request.get("folders") or [request["folder"]]]
        options = {
            "executor": request.get("executor", "processes"),
            "checkpoint_every_s": request["checkpoint_every_s"],
        }
        try:
            with _printing_to(folders[0] / LOG):
                states = execute_together(folders, **options)
        except KeyboardInterrupt:
            states, is_wanted = [inspect_run(folder) for folder in folders], False
        except OSError as error:
            states = [_with_problem(inspect_run(folder), error) for folder in folders]
        is_busy.clear()
        documents = [state.to_json() for state in states]
        answers.write(json.dumps(documents if "folders" in request else documents[0]) + "\n")
        answers.flush()
    return 0


def _with_problem(state: RunState, error: OSError) -> RunState:
    """Say of a run that is not done what kept it from being executed."""
    return state if state.is_done else replace(state, state="failed", message=str(error))


def _listen(requests: TextIO, inbox: queue.SimpleQueue[str | None], is_busy: threading.Event) -> None:
    """Pass requests on; when the driver is gone, end this process even in the middle of a run."""
    for line in requests:
        is_busy.set()
        inbox.put(line)
    if is_busy.is_set():
        os._exit(DRIVER_IS_GONE)  # as safe as a SIGKILL, which a run folder survives at any moment
    inbox.put(None)


@contextmanager
def _printing_to(path: Path) -> Iterator[None]:
    """Send everything that is printed, by C code too, to the end of a file."""
    if not path.parent.is_dir():  # execute will say so
        yield
        return
    kept = os.dup(1), os.dup(2)
    try:
        with plain_errors(path):
            log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number, descriptor in zip((1, 2), kept, strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())
