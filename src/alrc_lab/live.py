"""Say and show: sentences, tables, and live progress (bars in a terminal, plain lines everywhere else).

Kept apart from the command line because it has its own reason to change: how things look. It is given states and
starts no run. It must not import a framework.
"""

from __future__ import annotations

import json as jsonlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn
from rich.table import Column, Table

if TYPE_CHECKING:
    from alrc_lab.runner import RunState

DONE = frozenset({"finished", "diverged"})
OVER = DONE | {"failed"}


def open_console(json: bool, *, shows_progress: bool = False) -> Console:
    """Return the console for text: standard output, which JSON has to itself where it is asked for.

    A pipe has no width of its own, so tables get 120 columns there unless COLUMNS says otherwise.

    Args:
        json: Whether standard output must hold one JSON document and nothing else.
        shows_progress: Whether a person may wait for the command; if so, text goes to standard error beside JSON
            instead of nowhere.

    Returns:
        A console that prints text as it is, without markup.
    """
    quiet = json and not shows_progress
    console = Console(stderr=json, quiet=quiet, markup=False, highlight=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 120
    return console


def say(console: Console, line: str) -> None:
    """Print one line as it is, however long."""
    console.print(line, soft_wrap=True, markup=False, highlight=False, emoji=False)


def finish(json: bool, document: dict[str, Any], code: int = 0) -> int:
    """Print the JSON document if asked for, and return the exit code."""
    if json:
        print(jsonlib.dumps(_plain(document), indent=2, ensure_ascii=False, allow_nan=False))
    return code


def _plain(value: Any) -> Any:
    """Turn a value into what JSON can say: no NaN or infinity (null instead), no paths, no tuples."""
    if isinstance(value, Mapping):
        return {str(key): _plain(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(member) for member in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def data_line(data: Mapping[str, Any]) -> str:
    """Name a data set, its size, its checksum and where it came from.

    Args:
        data: `name`, `images`, `sha256`, `source`, and `path` where there is one.

    Returns:
        One line.
    """
    place = data["source"] if data.get("path") in (None, "", data["source"]) else f"{data['source']}: {data['path']}"
    return f"data: {data['name']} · {data['images']:,} images · sha256 {data['sha256'][:12]} · {place}"


def cells_table(cells: Sequence[Mapping[str, Any]]) -> Table:
    """Lay out the cells of a study with the number of runs in each.

    Args:
        cells: `panel`, `row`, `column` and `runs` of each.
    """
    table = Table("panel", "row", "column", "runs", box=None, pad_edge=False)
    table.columns[-1].justify = "right"
    for cell in cells:
        table.add_row(*(str(cell[key]) for key in ("panel", "row", "column", "runs")))
    return table


def layers_table(layers: Sequence[Mapping[str, Any]]) -> Table:
    """Lay out layers with their sizes, parameters and cost.

    Args:
        layers: `name`, `op`, `kernel`, `stride`, `channels_in`, `channels_out`, `side_in`, `side_out`, `copies`,
            `parameters` and `mmac` of each.
    """
    table = Table("layer", "op", "kernel, stride", box=None, pad_edge=False)
    for name in ("channels", "side", "copies", "parameters", "MMAC"):
        table.add_column(name, justify="right")
    for layer in layers:
        table.add_row(
            layer["name"],
            layer["op"],
            f"{layer['kernel']}, {layer['stride']}",
            f"{layer['channels_in']}→{layer['channels_out']}",
            f"{layer['side_in']}→{layer['side_out']}",
            str(layer["copies"]),
            f"{layer['parameters']:,}",
            f"{layer['mmac']:,.1f}",
        )
    return table


def states_table(states: Sequence[RunState]) -> Table:
    """Lay out run states, one line each."""
    table = Table("run", "state", "steps", "it/s", "time", "remark", box=None, pad_edge=False)
    for state in states:
        steps = f"{state.step:,}/{state.total:,}" if state.total else ""
        rate = f"{state.steps_per_s:,.1f}" if state.steps_per_s else ""
        remark = f"diverged at step {state.diverged_at:,}" if state.diverged_at else state.message or ""
        took = duration(state.wall_s) if state.wall_s else ""
        table.add_row(state.name, state.state, steps, rate, took, remark)
    return table


def duration(seconds: float) -> str:
    """Write a time span the way a person says it.

    Args:
        seconds: Length of the span in seconds, zero or more.

    Returns:
        Two units at most.

    Example:
        >>> duration(8.4), duration(365), duration(7380), duration(400_000)
        ('8 s', '6 min 05 s', '2 h 03 min', '4 d 15 h')
    """
    whole = round(seconds)
    for size, large, part, small in ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {large} {rest if size == 86_400 else format(rest, '02')} {small}"
    return f"{whole} s"


def remaining_s(states: Sequence[RunState], workers: int, seconds: Mapping[Path, float] | None = None) -> float | None:
    """Estimate the wall time that is left: what is left in total, by how fast all that run get on together now.

    Work is counted in the seconds that it was estimated to keep a worker busy, so that neither packs nor updates of
    different cost are mixed up; without an estimate all updates count alike. The pace is what is seen, so a busy
    machine is too; the assumption is that what waits goes on at it. The longest run at work cannot be shared.

    Args:
        states: Every run of the sweep.
        workers: How many packs, of one run or more, go at once, 1 or more.
        seconds: Seconds that whole runs were estimated to keep a worker busy, by folder.

    Returns:
        Seconds, or None while nothing has been measured.
    """
    lengths = [state.total for state in states if state.total]
    if not lengths and not seconds:
        return None
    typical = sum(lengths) / len(lengths) if lengths else 0.0

    def work(state: RunState) -> float:
        return seconds.get(state.folder, 0.0) if seconds else state.total or typical

    def left(state: RunState) -> float:
        return work(state) * (max(1 - state.step / state.total, 0.0) if state.total else 1.0)

    waiting = [state for state in states if state.state not in OVER]
    running = [state for state in waiting if state.state == "running"]
    paces = [work(state) * state.steps_per_s / state.total for state in running if state.steps_per_s and state.total]
    if sum(paces):
        at_work = max(len(running), min(workers, len(waiting)))  # those without a rate yet are as fast as the others
        pace = sum(paces) * at_work / len(paces)
        longest = max((run.total - run.step) / run.steps_per_s for run in running if run.steps_per_s and run.total)
        return max(sum(map(left, waiting)) / pace, longest)
    if seconds:
        return sum(map(left, waiting)) / workers
    costs = [1 / state.steps_per_s for state in states if state.steps_per_s]
    return sum(map(left, waiting)) * sum(costs) / len(costs) / workers if costs else None


def outcome(state: RunState) -> str:
    """Say in one line how a run ended."""
    if state.state == "failed":
        return f"failed    {state.name}: {state.message or 'no message'}"
    took = f", {duration(state.wall_s)}" if state.wall_s else ""
    if state.state == "diverged":
        return f"diverged  {state.name}: at step {state.diverged_at or state.step:,}{took}"
    return f"finished  {state.name}: {state.step:,} steps{took}"


class RunsView:
    """Draw the progress of a set of runs on a console, from successive lists of their states.

    In a terminal: one bar for all runs with the time left, one line for each running run, and a lasting line for
    whatever failed or diverged. Elsewhere: one plain line every `line_every_s` seconds and one for each run that ends.

    Args:
        console: Where to draw.
        states: The states before the start; what was over by then is not announced again.
        workers: How many runs, or packs of them, go at once; needed for the time left.
        seconds: Seconds that each run was estimated to keep a worker busy from now on, by folder; for the time left.
        line_every_s: Seconds between plain lines.
        clock: Source of time in seconds; tests give their own.
    """

    def __init__(
        self,
        console: Console,
        states: Sequence[RunState],
        workers: int,
        *,
        seconds: Mapping[Path, float] | None = None,
        line_every_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._workers = workers
        made = {state.folder: state.step / state.total for state in states if state.total and state.step < state.total}
        self._seconds = {folder: cost / (1 - made.get(folder, 0.0)) for folder, cost in (seconds or {}).items()}
        self._line_every_s = line_every_s
        self._clock = clock
        self._started = self._last_line = clock()
        self._seen = {state.folder: state.state for state in states}
        self._bars: dict[object, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", max_width=44)),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}", justify="right"),
            TextColumn("{task.fields[pace]}", justify="right"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._overall = self._progress.add_task("all runs", total=1.0, count="", pace="")
        self.update(states)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, states: Sequence[RunState]) -> None:
        """Take in the newest states and draw them.

        Args:
            states: Every run of the sweep, in any order.
        """
        for state in states:
            before, self._seen[state.folder] = self._seen.get(state.folder), state.state
            is_news = state.state in OVER and state.state != before
            # Bars show what finished; in a terminal only the surprises deserve a lasting line.
            if is_news and not (self._console.is_terminal and state.state == "finished"):
                say(self._console, outcome(state))
        if self._console.is_terminal:
            self._draw_bars(states)
        elif self._clock() - self._last_line >= self._line_every_s:
            self._last_line = self._clock()
            say(self._console, self._plain_line(states))

    def _plain_line(self, states: Sequence[RunState]) -> str:
        """Sum up all runs in one line of text."""
        running = [state for state in states if state.state == "running"]
        rate = sum(state.steps_per_s or 0.0 for state in running)
        over = sum(state.state in OVER for state in states)
        together = f" at {rate:,.0f} it/s together" if rate else ""
        return (
            f"[{duration(self._clock() - self._started)}] {over} of {len(states)} runs ended, {len(running)} running"
            f"{together}, {self._time_left(states)}"
        )

    def _time_left(self, states: Sequence[RunState]) -> str:
        """Say how long it will still take, or that nobody knows yet."""
        left = remaining_s(states, self._workers, self._seconds)
        return "time left not known yet" if left is None else f"about {duration(left)} left"

    def _draw_bars(self, states: Sequence[RunState]) -> None:
        """Bring the bars in line with the states."""
        lengths = [state.total for state in states if state.total]
        typical = sum(lengths) / len(lengths) if lengths else 1.0
        done = sum((state.total or typical) if state.state in OVER else state.step for state in states) / max(
            sum(state.total or typical for state in states), 1
        )
        over = sum(state.state in OVER for state in states)
        self._progress.update(
            self._overall,
            completed=done,
            count=f"{over}/{len(states)} runs",
            pace=self._time_left(states),
        )
        for state in states:
            bar = self._bars.get(state.folder)
            if state.state != "running":
                if bar is not None:
                    self._progress.remove_task(self._bars.pop(state.folder))
                continue
            if bar is None:
                bar = self._bars[state.folder] = self._progress.add_task(state.name, count="", pace="")
            self._progress.update(
                bar,
                total=state.total or None,
                completed=state.step,
                count=f"{state.step:,}/{state.total or 0:,}" if state.total else "starting",
                pace=f"{state.steps_per_s:,.1f} it/s" if state.steps_per_s else "",
            )


class BytesView:
    """Show a download: a bar in a terminal, a plain line at every tenth elsewhere.

    Args:
        console: Where to draw.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tenth = 0
        self._progress = Progress(
            BarColumn(), DownloadColumn(), TransferSpeedColumn(), console=console, disable=not console.is_terminal
        )
        self._bar = self._progress.add_task("", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, done: int, total: int | None) -> None:
        """Show how much is there.

        Args:
            done: Bytes present.
            total: Bytes in all, or None if nobody knows.
        """
        self._progress.update(self._bar, completed=done, total=total)
        if not self._console.is_terminal and total and done * 10 // total > self._tenth:
            self._tenth = done * 10 // total
            say(self._console, f"{done / 1e6:,.1f} of {total / 1e6:,.1f} MB")
