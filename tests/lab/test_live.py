"""Check how progress and sentences look, in a terminal and elsewhere."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich", reason="needs the laboratory's dependencies")

from rich.console import Console

from alrc_lab.live import BytesView, RunsView, data_line, open_console, remaining_s
from alrc_lab.runner import RunState


def state(number: int, kind: Any, step: int = 0, total: int | None = 100, rate: float | None = None) -> RunState:
    return RunState(Path(f"run-{number}"), f"run-{number}", "", kind, step, total, rate, message="why")


def test_time_left_from_steps_and_rates() -> None:
    states = [
        state(1, "finished", 100, 100, 50.0),
        state(2, "running", 60, 100, 25.0),
        state(3, "pending", 0, None),
    ]
    # Left: 40 steps at 1/25 s, and an unknown run of 100 steps at the mean of 1/50 and 1/25 s.
    assert remaining_s(states, workers=1) == pytest.approx(40 / 25 + 100 * (1 / 50 + 1 / 25) / 2)
    # With two workers, the longest single run is what one has to wait for.
    assert remaining_s(states, workers=2) == pytest.approx(3.0)
    assert remaining_s([state(1, "pending")], workers=2) is None


def test_plain_lines_come_in_time_and_for_every_end() -> None:
    file, now = io.StringIO(), [0.0]
    before = [state(1, "pending"), state(2, "failed"), state(3, "diverged")]
    with RunsView(Console(file=file, width=200), before, workers=2, clock=lambda: now[0]) as view:
        for now[0] in (4.0, 8.0, 12.0, 16.0):
            view.update([state(1, "running", 20, 100, 10.0), state(2, "running"), state(3, "diverged")])
        view.update([state(1, "finished", 100, 100, 10.0), state(2, "failed"), state(3, "diverged")])
    # Two runs are left, 80 and 100 steps at 10 a second, two at once.
    assert file.getvalue().splitlines() == [
        "[12 s] 1 of 3 runs ended, 2 running at 10 it/s together, about 10 s left",
        "finished  run-1: 100 steps",
        "failed    run-2: why",
    ]


def test_bars_in_a_terminal() -> None:
    file = io.StringIO()
    console = Console(file=file, width=120, force_terminal=True, color_system=None)
    with RunsView(console, [state(1, "pending"), state(2, "pending")], workers=2) as view:
        view.update([state(1, "running", 1234, 6000, 98.76), state(2, "diverged", 5)])
        view._progress.refresh()
    shown = file.getvalue()
    assert "1,234/6,000" in shown
    assert "98.8 it/s" in shown
    assert "1/2 runs" in shown
    assert "diverged  run-2: at step 5" in shown


def test_data_line_names_the_place_once() -> None:
    data = {"name": "CIFAR-10", "images": 8068, "sha256": "ab" * 32, "source": "ALRC_DATA", "path": "/d"}
    assert data_line(data) == "data: CIFAR-10 · 8,068 images · sha256 abababababab · ALRC_DATA: /d"


def test_json_has_stdout_to_itself(capsys: pytest.CaptureFixture[str]) -> None:
    open_console(False).print("text")
    open_console(True).print("told by the JSON too")
    open_console(True, shows_progress=True).print("for those who wait")
    assert capsys.readouterr() == ("text\n", "for those who wait\n")


def test_a_download_without_terminal_prints_every_tenth() -> None:
    file = io.StringIO()
    with BytesView(Console(file=file, width=200)) as view:
        for done in range(21):
            view.update(done * 10**6, 20 * 10**6)
        view.update(5, None)
    lines = file.getvalue().splitlines()
    assert lines == [f"{done:.1f} of 20.0 MB" for done in range(2, 21, 2)]
