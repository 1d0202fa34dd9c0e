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


def test_time_left_is_what_is_left_by_the_pace_of_all_that_run() -> None:
    states = [
        state(1, "finished", 100, 100, 50.0),
        state(2, "running", 60, 100, 25.0),
        state(3, "pending", 0, None),
    ]
    assert remaining_s(states, workers=1) == pytest.approx((40 + 100) / 25)
    # The second worker is about to begin, with a run like those at work.
    assert remaining_s(states, workers=2) == pytest.approx((40 + 100) / 50)
    assert remaining_s([state(1, "pending")], workers=2) is None
    assert remaining_s([state(1, "pending"), state(2, "finished", 100, 100, 50.0)], workers=2) == pytest.approx(1.0)
    # What one has to wait for is the longest.
    assert remaining_s([state(1, "running", 99, 100, 1.0), state(2, "running", 0, 100, 2.0)], 2) == pytest.approx(50.0)


def test_time_left_of_packs_is_not_that_of_single_runs() -> None:
    """The first line of a night: two packs of nine on two cores, 720,000 updates, 590 a second."""
    begun = [state(number, "running", 0, 20_000, 590 / 18) for number in range(18)]
    waiting = [state(number, "pending", 0, None) for number in range(18, 36)]
    assert remaining_s([*begun, *waiting], workers=2) == pytest.approx(720_000 / 590)
    # The second pack has told no rate yet.
    late = [state(number, "running", 0, 20_000, 590 / 18 if number < 9 else None) for number in range(18)]
    assert remaining_s([*late, *waiting], workers=2) == pytest.approx(720_000 / 590)


def test_time_left_of_small_and_large_batches_goes_by_what_they_cost() -> None:
    """Sixteen runs of batch 1 together, 4 ms of a core for an update of each; then four of batch 64 at 160 ms."""
    packed = [state(number, "running", 500, 1_000, 1 / (8 * 0.004)) for number in range(16)]
    single = [state(number, "pending", 0, None) for number in range(16, 20)]
    seconds = {run.folder: 4.0 for run in packed} | {run.folder: 160.0 for run in single}
    left = (16 * 4 / 2 + 4 * 160) / 2
    assert remaining_s([*packed, *single], 2, seconds) == pytest.approx(left)
    slower = [state(number, "running", 500, 1_000, 1 / (16 * 0.004)) for number in range(16)]
    assert remaining_s([*slower, *single], 2, seconds) == pytest.approx(2 * left), "on a busy machine"
    done = [state(number, "finished", 1_000, 1_000, 250.0) for number in range(16)]
    assert remaining_s([*done, *single], 2, seconds) == pytest.approx(320.0)
    at_work = [state(number, "running", 250, 1_000, 6.25) for number in range(16, 18)]
    assert remaining_s([*done, *at_work, *single[2:]], 2, seconds) == pytest.approx((2 * 120 + 2 * 160) / 2)
    assert remaining_s([*packed, *single], 2) < left / 4, "twin: without costs it would be grossly wrong"
    # A run without an estimate costs nothing that is known of.
    assert remaining_s([state(99, "pending"), *single], 2, seconds) == pytest.approx(320.0)


def test_a_view_counts_an_estimate_from_where_the_runs_stood() -> None:
    file, now = io.StringIO(), [0.0]
    half, fresh = state(1, "interrupted", 50, 100), state(2, "pending", 0, None)
    seconds = {half.folder: 10.0, fresh.folder: 20.0}
    with RunsView(
        Console(file=file, width=200), [half, fresh], workers=1, seconds=seconds, clock=lambda: now[0]
    ) as view:
        now[0] = 10.0
        view.update([half, fresh])
        now[0] = 20.0
        view.update([state(1, "running", 75, 100, 5.0), fresh])
    assert [line.partition(", about ")[2] for line in file.getvalue().splitlines()] == ["30 s left", "25 s left"]


def test_plain_lines_come_in_time_and_for_every_end() -> None:
    file, now = io.StringIO(), [0.0]
    before = [state(1, "pending"), state(2, "failed"), state(3, "diverged")]
    with RunsView(Console(file=file, width=200), before, workers=2, clock=lambda: now[0]) as view:
        for now[0] in (4.0, 8.0, 12.0, 16.0):
            view.update([state(1, "running", 20, 100, 10.0), state(2, "running"), state(3, "diverged")])
        view.update([state(1, "finished", 100, 100, 10.0), state(2, "failed"), state(3, "diverged")])
    # Two runs are left, 80 and 100 steps, two at once; the second is taken to be as fast as the first.
    assert file.getvalue().splitlines() == [
        "[12 s] 1 of 3 runs ended, 2 running at 10 it/s together, about 9 s left",
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
