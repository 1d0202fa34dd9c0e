"""A stand-in for an experiment: a chaotic recursion, so that one update lost or made twice changes every later row.

Its state is one float and its sum; `expected` computes the same numbers in one plain loop, without any recorder.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from alrc_lab.runner import RunSpec, inspect_run, prepare, read_metrics

INPUTS = {"name": "numbers", "source": "made up", "path": "/here", "images": 3, "sha256": "ab" * 32}
ENTRY = "counting_experiment:run"
EXCLUDED = ("sleep_s", "block", "hang")


def config(**changes: Any) -> dict[str, Any]:
    """Resolved settings, with changes."""
    defaults = {
        "steps": 60,
        "start": 0.3,
        "rate": 3.9,
        "sleep_s": 0.0,
        "block": 3,  # rows per call of log
        "say": None,  # printed at every step
        "say_last": False,  # print when the process ends
        "raise_at": None,
        "diverge_at": None,
        "exit_at": None,  # os._exit, as a crash in C code would
        "kill_at": None,  # SIGKILL, as the kernel does when memory runs out
        "hang": False,  # ignore requests to stop
    }
    assert changes.keys() <= defaults.keys()
    return defaults | changes


def run(config: dict[str, Any], recorder: Any) -> dict[str, Any]:
    """Iterate x ← rate·x·(1−x) and log every x."""
    *_, outcome = updates_of(config, recorder)
    assert outcome is not None
    return outcome


def updates_of(config: dict[str, Any], recorder: Any) -> Iterator[dict[str, Any] | None]:
    """Do what `run` does, an update at a time; what comes last is what `run` returns."""
    step, x, total = 0, config["start"], 0.0
    found = recorder.resume()
    if found is not None:
        state = json.loads(found[1].read_text())
        step, x, total = state["step"], state["x"], state["total"]
        assert step == found[0]
    if config["say_last"]:
        atexit.register(os.write, 1, b"from the very end\n")
    rows: list[tuple[int, float]] = []

    def log() -> None:
        if rows:
            steps, values = zip(*rows, strict=True)
            recorder.log({"step": np.array(steps), "x": np.array(values), "x32": np.array(values, np.float32)})
            rows.clear()

    while step < config["steps"]:
        try:
            time.sleep(config["sleep_s"])
        except KeyboardInterrupt:
            if not config["hang"]:
                raise
        step += 1
        x = config["rate"] * x * (1 - x)
        total += x
        rows.append((step, x))
        if config["say"]:
            print(config["say"], step)
            os.write(1, b"from below\n")
        recorder.progress(step, config["steps"])
        if len(rows) >= config["block"]:
            log()
        if step == config["raise_at"]:
            raise ArithmeticError(f"raised at {step}")
        if step == config["exit_at"]:
            os._exit(7)
        if step == config["kill_at"]:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == config["diverge_at"]:
            log()
            yield {"diverged_at": step, "summary": {"last": float("nan"), "mean": total / step}}
            return
        if recorder.is_checkpoint_due():
            log()
            state = json.dumps({"step": step, "x": x, "total": total})
            recorder.checkpoint(step, lambda path, state=state: Path(path).write_text(state))
        yield None
    log()
    print("counted", file=sys.stderr)
    yield {"diverged_at": None, "summary": {"last": x, "mean": total / config["steps"]}}


def expected(config: dict[str, Any]) -> tuple[np.ndarray, dict[str, float]]:
    """Return the column x and the summary that any run of the config must end with."""
    values = []
    for _ in range(config["steps"]):
        before = values[-1] if values else config["start"]
        values.append(config["rate"] * before * (1 - before))
    total = 0.0
    for value in values:
        total += value
    return np.array(values), {"last": values[-1], "mean": total / config["steps"]}


def spec(name: str = "count", inputs: dict[str, Any] | None = None, **changes: Any) -> RunSpec:
    """A run of this experiment."""
    return RunSpec(ENTRY, config(**changes), inputs, EXCLUDED, name)


def prepared(root: Path, **changes: Any) -> Path:
    """The folder of such a run, ready to be executed."""
    return prepare(spec(**changes), root)


def check_is_unbroken(folder: Path, **changes: Any) -> None:
    """Fail unless a folder holds exactly what a run that nothing ever stopped ends with."""
    column, summary = expected(config(**changes))
    state, found = inspect_run(folder), read_metrics(folder)
    assert (state.state, state.summary) == ("finished", summary), state.message
    np.testing.assert_array_equal(found["step"], np.arange(1, len(column) + 1))
    np.testing.assert_array_equal(found["x"], column)
    np.testing.assert_array_equal(found["x32"], column.astype(np.float32))


def read(path: Path) -> Any:
    """Content of a JSON file."""
    return json.loads(path.read_text())


def files(folder: Path) -> dict[str, bytes]:
    """Content of every file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
