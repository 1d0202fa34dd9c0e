"""What a sweep of many runs costs beside the runs: status of 10,000 run folders, and a driver with 1,000 queued runs.

Run with `python benchmarks/many_runs.py [--folders N] [--queued N] [--seconds S] [--out FILE]`; prints a table and
writes it as JSON, by default to benchmarks/results/many_runs.json. The queued runs wait behind one that only sleeps, so
whatever the driver uses is the price of the queue. Cores are CPU seconds in a second; a Ray cluster's own processes are
counted apart from the driver.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # for the workers of a Ray cluster that is started here
os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray keeps no token in anybody's home
os.environ.setdefault("RAY_AUTH_TOKEN", os.urandom(32).hex())

from alrc_lab import runner
from counting_experiment import prepared
from side_by_side import header


def many_folders(root: Path, number: int) -> None:
    """Copy folders of runs that are done, wait or have failed: two, one, one of each four."""
    done, waiting = prepared(root / "one"), prepared(root / "one", steps=61)
    failed = prepared(root / "one", steps=300, raise_at=200)
    runner.execute(done)
    runner.execute(failed, checkpoint_every_s=0.0)
    for place in range(number):
        original = (done, waiting, failed, done)[place % 4]
        shutil.copytree(original, root / "many" / "runs" / f"count-{place:010x}")


def time_status(root: Path, *flags: str) -> tuple[float, float]:
    """Return wall and CPU seconds of `alrc status` as a command of its own, the better of three."""
    best = (float("inf"), float("inf"))
    for _ in range(3):
        before, started = os.times(), time.perf_counter()
        command = [sys.executable, "-m", "alrc_lab", "status", str(root), *flags]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
        after = os.times()
        spent = after.children_user + after.children_system - before.children_user - before.children_system
        best = min(best, (time.perf_counter() - started, spent))
    return best


def cost_of_queue(root: Path, executor: str, queued: int, seconds: float) -> tuple[float, float]:
    """Return the cores that the driver, and the processes it started, use while runs wait behind one that sleeps."""
    folders = [prepared(root / executor, start=0.1 + 1e-5 * place, steps=10**6, sleep_s=1.0) for place in range(queued)]
    seen = threading.Event()

    def look(states: list[runner.RunState]) -> None:
        if any(state.state == "running" for state in states):
            seen.set()

    def sweep() -> None:
        runner.sweep(folders, executor=executor, workers=1, on_poll=look)

    thread = threading.Thread(target=sweep, daemon=True)
    thread.start()
    assert seen.wait(300), "no run began"
    time.sleep(15)  # what was loaded and started is settled

    def of_children() -> dict[int, float]:
        return {child.pid: sum(child.cpu_times()[:2]) for child in psutil.Process().children(recursive=True)}

    before, before_children, started = time.process_time(), of_children(), time.perf_counter()
    time.sleep(seconds)
    took, mine, children = time.perf_counter() - started, time.process_time() - before, of_children()
    states = [runner.inspect_run(folder).state for folder in folders]
    assert thread.is_alive(), "the sweep ended"
    assert (states.count("running"), states.count("pending")) == (1, queued - 1), "the queue did not stand still"
    others = sum(spent - before_children.get(pid, 0.0) for pid, spent in children.items())  # less those that ended
    return mine / took, others / took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folders", type=int, default=10_000, help="run folders that alrc status looks into")
    parser.add_argument("--queued", type=int, default=1_000, help="runs that wait")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long the driver is watched")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # an executor: in a process of its own
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "many_runs.json")
    arguments = parser.parse_args()
    queued, seconds = arguments.queued, arguments.seconds
    with tempfile.TemporaryDirectory(prefix="alrc-many-", ignore_cleanup_errors=True) as scratch:
        if arguments.only:  # nothing else may be counted
            print(json.dumps(cost_of_queue(Path(scratch), arguments.only, queued, seconds)), flush=True)
            os._exit(0)  # ends the workers too: their stdin closes
        title = header("What many runs cost beside the runs")
        print(f"{title.splitlines()[1]}\nalrc status on {arguments.folders:,} run folders, best of three", flush=True)
        many_folders(Path(scratch), arguments.folders)
        status = []
        for flags in ((), ("--json",)):
            wall, spent = time_status(Path(scratch) / "many", *flags)
            status.append({"folders": arguments.folders, "flags": list(flags), "wall_s": wall, "cpu_s": spent})
            print(f"  {' '.join(flags) or 'text':<10} {wall:5.2f} s wall, {spent:5.2f} s CPU", flush=True)
    print(f"{queued:,} queued runs, during {seconds:g} s", flush=True)
    queue = []
    for executor in ("processes", "ray"):
        command = [sys.executable, __file__, "--queued", str(queued), "--seconds", str(seconds), "--only", executor]
        told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        mine, others = json.loads(told.splitlines()[-1])
        queue.append({"executor": executor, "queued": queued, "driver_cores": mine, "other_cores": others})
        print(
            f"  {executor:<10} driver {100 * mine:5.2f} % of a core, workers and cluster {100 * others:5.1f} %",
            flush=True,
        )
    document = {"machine": title.splitlines()[1], "code": runner.code_version(), "status": status, "queue": queue}
    document["note"] = (
        "The load is that when the script began. CPU seconds hold on a busy machine, wall seconds do not."
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"\nwritten to {arguments.out}")


if __name__ == "__main__":
    main()
