"""Execute run folders for another process: `python -m alrc_lab.runner.worker`.

Reads one JSON object per line on stdin, {"folder", "checkpoint_every_s"}, and answers each with one line on stdout,
the run's state. What a run prints goes to log.txt in its folder, so it cannot corrupt that channel. Ends when stdin
closes, in the middle of a run too: then the driver died, and the run can be resumed.
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

from alrc_lab.runner.attempt import execute
from alrc_lab.runner.folder import LOG, inspect_run, plain_errors

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
        folder = Path(request["folder"])
        try:
            with _printing_to(folder / LOG):
                state = execute(folder, executor="processes", checkpoint_every_s=request["checkpoint_every_s"])
        except KeyboardInterrupt:
            state, is_wanted = inspect_run(folder), False
        except OSError as error:
            state = replace(inspect_run(folder), state="failed", message=str(error))
        is_busy.clear()
        answers.write(json.dumps(state.to_json()) + "\n")
        answers.flush()
    return 0


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
