"""Kill the driver and the workers of a sweep at random, again and again, and compare it with an undisturbed one.

A sweep of the counting experiment stands for a study: two cells, some runs short and some long, so that kills meet runs
that wait, that begin, that are in the middle and that are about to end. Its table is the report's own.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

import counting_experiment as counting
import counting_together as together
from alrc_lab import report, runner

CELLS = {"slow": 3.7, "fast": 3.9}  # rate of the recursion by cell
SHORT, LONG = {"steps": 400, "block": 5}, {"steps": 20_000, "block": 5}
SLEEP_S = 0.01  # per step while there are kills to come; it does not belong to a run's identity
SWEEP = (
    "import sys; from pathlib import Path; from alrc_lab import runner;"
    "runner.sweep(map(Path, sys.argv[5:]), executor=sys.argv[1], workers=int(sys.argv[2]),"
    " address=sys.argv[3] or None, largest_pack=int(sys.argv[4]), checkpoint_every_s=0.05)"
)
STARTING = 0.2  # share of the kills of a driver that it gets although it has nothing at work yet; else it never would
PATIENCE_S = 300.0


def prepare(root: Path, seeds: int, sleep_s: float) -> dict[Path, dict[str, Any]]:
    """Write a study and its runs; every third run is long.

    Returns:
        The settings of each run, by folder.
    """
    settings: dict[Path, dict[str, Any]] = {}
    runs = []
    for cell, rate in CELLS.items():
        for seed in range(1, seeds + 1):
            changes = (LONG if seed % 3 == 0 else SHORT) | {"rate": rate, "start": 0.2 + 0.01 * seed}
            config = counting.config(sleep_s=sleep_s, **changes)
            spec = runner.RunSpec(together.ENTRY, config, counting.INPUTS, counting.EXCLUDED, "count")
            folder = runner.prepare(spec, root)
            settings[folder] = changes
            runs.append({"folder": f"runs/{folder.name}", "cell": cell, "seed": seed})
    study = {
        "study": "soak",
        "preset": "smoke",
        "title": "Counting under fire",
        "question": "Does a sweep that is killed again and again end with the same numbers?",
        "data": counting.INPUTS,
        "metric": {"key": "mean", "label": "mean", "factor": 1, "better": "lower", "window": 1},
        "curve": {"column": "x", "label": "x", "factor": 1, "boxcar": 1},
        "stream": None,
        "panels": [{"id": "all", "title": "all"}],
        "cells": [
            {
                "id": cell,
                "panel": "all",
                "row": cell,
                "column": "counting",
                "baseline": None if cell == "slow" else "slow",
                "published": None,
            }
            for cell in CELLS
        ],
        "runs": runs,
        "differences": [],
        "notes": [],
    }
    runner.write_study(root, study)
    return settings


def table(root: Path) -> str:
    """Return the table that the report prints of a study, as text."""
    console = Console(width=120, highlight=False)
    with console.capture() as capture:
        console.print(report.render_text(report.load(root)))
    return capture.get().replace(str(root), "ROOT")


def soak(
    root: Path,
    kills: int,
    *,
    executor: str = "processes",
    pack: int = 1,
    address: str = "",
    seeds: int = 9,
    dice: int = 0,
    say: Callable[[str], object] = print,
) -> Counter[str]:
    """Sweep while somebody kills, until all runs are done.

    Args:
        root: Folder of the study; must be new.
        kills: How many signals are sent to a driver or a worker.
        executor: `processes` or `ray`.
        pack: Runs that train together at most.
        address: Address of the cluster for `ray`.
        seeds: Runs of each of the two cells.
        dice: Seed of who is killed when.
        say: Takes one line about each kill.

    Returns:
        How often whom was sent what.
    """
    rng = random.Random(dice)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell lets what it starts with & ignore it, and children
        signal.signal(signal.SIGINT, signal.default_int_handler)
    folders = list(prepare(root, seeds, SLEEP_S))
    command = [sys.executable, "-c", SWEEP, executor, "2", address, str(pack), *map(str, folders)]
    options = {"env": os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, "start_new_session": True}
    sent: Counter[str] = Counter()
    started = time.monotonic()
    driver = subprocess.Popen(command, stderr=subprocess.DEVNULL, **options)
    try:
        while sum(sent.values()) < kills:
            time.sleep(rng.uniform(0.05, 1.5))
            assert time.monotonic() - started < PATIENCE_S + 10 * kills, "the sweep makes no headway"
            if driver.poll() is not None:  # what failed is tried again by the same command
                driver = subprocess.Popen(command, stderr=subprocess.DEVNULL, **options)
            workers = workers_of(folders)
            who = rng.choice(("driver", "worker", "worker", *(("ray worker",) * (executor == "ray"))))
            if not workers and (who != "driver" or rng.random() > STARTING):
                continue
            number = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGINT if who == "driver" else signal.SIGTERM))
            pid = driver.pid if who == "driver" else rng.choice(workers)
            try:
                os.kill(psutil.Process(pid).ppid() if who == "ray worker" else pid, number)
            except (ProcessLookupError, psutil.NoSuchProcess):  # it was faster
                continue
            sent[f"{who} {signal.Signals(number).name}"] += 1
            states = Counter(runner.inspect_run(folder).state for folder in folders)
            stand = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
            say(f"{time.monotonic() - started:6.1f} s  {signal.Signals(number).name} to {who} {pid}; {stand}")
            if who == "driver":
                driver.wait()
        assert any(not runner.inspect_run(folder).is_done for folder in folders), "the runs were over too soon"
    finally:
        driver.kill()
        driver.wait()
    prepare(root, seeds, 0.0)
    for _ in range(5):
        subprocess.run(command, check=True, timeout=PATIENCE_S, **options)
        if all(runner.inspect_run(folder).is_done for folder in folders):
            break
    return sent


def workers_of(folders: list[Path]) -> list[int]:
    """Return the processes that execute folders now."""
    states = [(folder, runner.inspect_run(folder).state) for folder in folders]
    at_work = [folder for folder, state in states if state == "running"]
    return sorted({counting.read(folder / "env.json")["attempts"][-1]["pid"] for folder in at_work})


def problems(root: Path, undisturbed: Path, seeds: int = 9) -> list[str]:
    """List what is lost, corrupt or different after a soak; an undisturbed sweep is made for comparison.

    Args:
        root: The study that was soaked.
        undisturbed: Folder for the other one; must be new, or hold it already.
        seeds: Runs of each cell.
    """
    other = prepare(undisturbed, seeds, 0.0)
    runner.sweep(other, executor="inline")
    found = []
    allowed = {"config.json", "env.json", "metrics.arrows", "progress.json", "result.json", "run.lock", "log.txt"}
    for folder, changes in other.items():
        mine = root / "runs" / folder.name
        try:
            counting.check_is_unbroken(mine, **changes)
        except (AssertionError, OSError) as error:
            found.append(f"{folder.name}: {' '.join(str(error).split())[:300]}")
            continue
        surplus = {path.name for path in mine.iterdir()} - allowed
        found += [f"{folder.name}: left {name} behind" for name in sorted(surplus)]
    ours, theirs = table(root), table(undisturbed)
    if ours != theirs:
        found.append(f"the tables differ:\n{ours}\n{theirs}")
    return found
