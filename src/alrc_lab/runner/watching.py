"""Watch many runs while they execute, at a price that does not grow with their number.

A thousand runs may be waiting for a day. Looking into every folder twice a second would take a third of a core.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

from alrc_lab.runner.folder import RunState, inspect_run

_POLLING_SHARE = 0.005  # of one core, however many runs there are
_LONGEST_PAUSE_S = 10.0


class Watch:
    """Tell the states of many runs, again and again, from memory where nothing can have changed.

    Every file of a run folder gets its name by a rename or is made anew, so a change shows in the folder's own time.

    Args:
        folders: Run folders, in the order in which their states are told.

    Attributes:
        futures: What an executor promised about them; whoever submits a folder puts its future here.
    """

    def __init__(self, folders: list[Path]) -> None:
        self.futures: dict[Path, Future[RunState]] = {}
        self._folders = folders
        self._stamps: dict[Path, int] = {folder: _stamp(folder) for folder in folders}
        self._known = {folder: inspect_run(folder) for folder in folders}

    def not_done(self) -> list[Path]:
        """Return the folders of runs without a result, as last seen."""
        return [folder for folder, state in self._known.items() if not state.is_done]

    def states(self) -> list[RunState]:
        """Return the states now, in the order of the folders."""
        return [self._state(folder) for folder in self._folders]

    def _state(self, folder: Path) -> RunState:
        """Return a run's state now."""
        known, future = self._known[folder], self.futures.get(folder)
        if known.is_done:
            return known
        if future is not None and future.done() and not future.cancelled() and future.exception() is None:
            return future.result()
        stamp = _stamp(folder)
        if known.state == "running" or stamp != self._stamps[folder]:  # a run that is killed leaves no trace
            self._stamps[folder] = stamp
            self._known[folder] = inspect_run(folder)
        return self._known[folder]


def _stamp(folder: Path) -> int:
    """Return when a file of a folder was last made, renamed or removed, in ns; 0 if there is no such folder."""
    try:
        return os.stat(folder).st_mtime_ns  # noqa: PTH116 - asked of thousands, and half the price of Path.stat
    except OSError:
        return 0


@contextmanager
def polling(
    on_poll: Callable[[list[RunState]], None] | None, states: Callable[[], list[RunState]], poll_s: float
) -> Iterator[None]:
    """Call `on_poll` from a thread while the block runs, and once after it.

    Args:
        on_poll: What to call with the states; None for nothing. What it raises is raised at the end of the block.
        states: Gives the states now.
        poll_s: Seconds between two calls; more where a call takes so long that it would cost half a percent of a core.
    """
    if on_poll is None:
        yield
        return
    is_over = threading.Event()
    problems: list[Exception] = []

    def poll() -> None:
        pause_s = poll_s
        try:
            while not is_over.wait(pause_s):
                before = time.thread_time()
                on_poll(states())
                pause_s = max(poll_s, min((time.thread_time() - before) / _POLLING_SHARE, _LONGEST_PAUSE_S))
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
