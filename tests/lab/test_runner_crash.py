"""Kill runs, workers and drivers for real, then repeat the command: the numbers must be those of an unbroken run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from alrc_lab import runner
from alrc_lab.runner import MetricsWriter, executors, recording, worker_process
from counting_experiment import check_is_unbroken, files, prepared, read

EXECUTE = "runner.execute(folders[0], checkpoint_every_s=0.05)"
SWEEP = "runner.sweep(folders, workers=2, checkpoint_every_s=0.05)"
PATIENCE_S = 20.0
SLOW = {"steps": 3000, "sleep_s": 0.002, "block": 2}  # at least six seconds: no test comes too late to stop it


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch) -> None:
    """Spare the disk in this process: fsync protects from power failures, which no test can cause."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def driver() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a process that executes folders, in a session of its own; end it if the test did not."""
    started: list[subprocess.Popen[str]] = []

    def start(command: str, *folders: Path) -> subprocess.Popen[str]:
        code = "import sys; from pathlib import Path; from alrc_lab import runner; folders = [*map(Path, sys.argv[1:])]"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", f"{code}; {command}", *map(str, folders)],
                env=environment,
                start_new_session=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        with process:  # closes its pipe
            process.kill()


def wait_until(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def attempts(folder: Path) -> list[dict]:
    path = folder / "env.json"
    return read(path)["attempts"] if path.exists() else []


def is_counting(folder: Path, attempt: int = 1) -> bool:
    """Tell whether the n-th attempt has come to its loop."""
    return len(attempts(folder)) >= attempt and (folder / "progress.json").exists()


def has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def surplus_bytes(folder: Path) -> int:
    """Bytes of metrics behind the last checkpoint; 0 if there is no checkpoint."""
    latest = folder / "checkpoint" / "latest.json"
    return (folder / "metrics.arrows").stat().st_size - read(latest)["metrics_bytes"] if latest.exists() else 0


def hurry(folder: Path, **changes) -> None:
    """Take the sleep out of a SLOW run; its identity does not cover it."""
    assert prepared(folder.parents[1], **(SLOW | {"sleep_s": 0.0} | changes)) == folder


def kill_with_surplus(folder: Path, driver: Callable[..., subprocess.Popen[str]]) -> None:
    """Leave a folder with a checkpoint and with rows behind it, as a kill between two checkpoints does."""
    first = len(attempts(folder)) + 1
    for attempt in range(first, first + 10):
        process = driver(EXECUTE, folder)
        wait_until(lambda n=attempt: is_counting(folder, n) and surplus_bytes(folder) > 0)
        process.kill()
        process.wait()
        if surplus_bytes(folder) > 0:
            return
    raise AssertionError("no kill hit the time between two checkpoints")


# --- SIGKILL ----------------------------------------------------------------------------------------------------------


def test_killed_at_any_moment_a_run_ends_with_the_numbers_of_an_unbroken_one(tmp_path, driver):
    folder = prepared(tmp_path, **SLOW)
    steps = []
    kill_after_s = (0.0, 0.06, 0.11, 0.173, 0.204, 0.237)
    for attempt, delay_s in enumerate(kill_after_s, 1):
        process = driver(EXECUTE, folder)
        wait_until(lambda n=attempt: is_counting(folder, n))
        time.sleep(delay_s)
        assert runner.inspect_run(folder).state == "running"
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        state = runner.inspect_run(folder)  # the lock went with its holder
        assert state.state == "interrupted"
        steps.append(state.step)
    kill_with_surplus(folder, driver)  # whatever the times above hit, one kill came between two checkpoints
    steps.append(runner.inspect_run(folder).step)
    assert steps == sorted(steps)
    assert steps[-1] > 0
    hurry(folder)
    runner.execute(folder, checkpoint_every_s=0.05)
    check_is_unbroken(folder, **SLOW)
    assert len(attempts(folder)) > len(kill_after_s) + 1
    assert not (folder / "checkpoint").exists()


class ForgetsToCut(MetricsWriter):
    """Known-wrong: goes on behind the rows of the killed attempt, and is not stopped by steps that repeat."""

    def __init__(self, path: Path, keep_bytes: int = 0) -> None:
        super().__init__(path, path.stat().st_size if path.exists() else 0)
        self.last_step = 0


class CutsTooMuch(MetricsWriter):
    """Known-wrong: forgets the rows before the checkpoint."""

    def __init__(self, path: Path, keep_bytes: int = 0) -> None:
        super().__init__(path, 0)


@pytest.mark.parametrize("mutant", [ForgetsToCut, CutsTooMuch])
def test_twin_resuming_wrongly_is_caught(tmp_path, driver, monkeypatch, mutant):
    folder = prepared(tmp_path / "mutant", **SLOW)
    kill_with_surplus(folder, driver)
    hurry(folder)
    other = shutil.copytree(folder, tmp_path / "right")
    runner.execute(other)
    check_is_unbroken(other, **SLOW)
    monkeypatch.setattr(recording, "MetricsWriter", mutant)
    assert runner.execute(folder).state == "finished"
    with pytest.raises(AssertionError):
        check_is_unbroken(folder, **SLOW)


class Crash(BaseException):
    """Stands for the end of the process: no handler of the runner may take it for a failure of the run."""


def test_a_crash_before_any_write_that_counts_loses_nothing(tmp_path, monkeypatch):
    """Not in time but in place: every fsync and every rename of a run with many checkpoints, one after the other."""
    changes = {"steps": 8, "block": 3}
    calls = crash_at = 0

    def counted(original: Callable) -> Callable:
        def function(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == crash_at:
                raise Crash
            return original(*arguments, **options)

        return function

    monkeypatch.setattr(os, "fsync", counted(os.fsync))
    monkeypatch.setattr(Path, "replace", counted(Path.replace))
    resumed_at = set()
    for place in range(1, 1000):
        calls, crash_at = 0, 0
        folder = prepared(tmp_path / str(place), **changes)
        calls, crash_at = 0, place
        try:
            runner.execute(folder, checkpoint_every_s=0.0)
        except Crash:
            pass
        else:
            break
        resumed_at.add(runner.inspect_run(folder).step)
        runner.execute(folder, checkpoint_every_s=0.0)
        check_is_unbroken(folder, **changes)
        left = {"config.json", "env.json", "metrics.arrows", "progress.json", "result.json", "run.lock", "checkpoint"}
        assert {path.name for path in folder.iterdir()} <= left
    assert place > 8 * 6
    assert resumed_at == set(range(9))


# --- stopping politely ------------------------------------------------------------------------------------------------


def test_sigterm_leaves_a_run_that_can_be_resumed(tmp_path, driver):
    folder = prepared(tmp_path, **SLOW)
    process = driver(EXECUTE, folder)
    wait_until(lambda: is_counting(folder) and surplus_bytes(folder) > 0)
    process.terminate()
    errors = process.communicate()[1]
    assert "KeyboardInterrupt: SIGTERM" in errors
    assert runner.inspect_run(folder).state == "interrupted"
    assert not (folder / "failure.json").exists()
    hurry(folder)
    runner.execute(folder)
    check_is_unbroken(folder, **SLOW)


def test_ctrl_c_leaves_every_run_resumable_and_the_same_command_completes_them(tmp_path, driver):
    folders = [prepared(tmp_path, start=start, **SLOW) for start in (0.2, 0.3, 0.4, 0.5)]
    process = driver(SWEEP, *folders)
    wait_until(lambda: all(is_counting(folder) and surplus_bytes(folder) > 0 for folder in folders[:2]))
    workers = [attempts(folder)[0]["pid"] for folder in folders[:2]]
    assert len({process.pid, *workers}) == 3
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    errors = process.communicate()[1]
    assert time.monotonic() - started < 4.5  # so no worker had to be killed
    assert process.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in errors
    assert all(has_ended(pid) for pid in workers)
    states = [runner.inspect_run(folder) for folder in folders]
    assert [state.state for state in states] == ["interrupted", "interrupted", "pending", "pending"]
    assert all(state.step > 0 for state in states[:2])
    assert not any((folder / "failure.json").exists() for folder in folders)
    for folder, start in zip(folders, (0.2, 0.3, 0.4, 0.5), strict=True):
        hurry(folder, start=start)
    runner.sweep(folders)
    for folder, start in zip(folders, (0.2, 0.3, 0.4, 0.5), strict=True):
        check_is_unbroken(folder, start=start, **SLOW)


def test_a_run_that_will_not_stop_is_killed_after_the_time_of_grace(tmp_path, monkeypatch):
    folder = prepared(tmp_path, steps=10_000, sleep_s=0.01, hang=True)
    pool = executors.get("processes", 1, 1)
    future = pool.submit(folder)
    wait_until(lambda: is_counting(folder))
    monkeypatch.setattr(worker_process, "_GRACE_S", 0.3)
    started = time.monotonic()
    pool.shutdown(cancel=True)
    assert 0.3 <= time.monotonic() - started < 4.5
    assert has_ended(attempts(folder)[0]["pid"])
    assert future.result().state == "interrupted"


# --- death of a worker, death of the driver --------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "says"), [({"kill_at": 9}, "SIGKILL"), ({"exit_at": 9}, "exit code 7")])
def test_a_worker_that_dies_costs_its_run_only(tmp_path, changes, says):
    folders = [prepared(tmp_path, start=0.2), prepared(tmp_path, **changes), prepared(tmp_path, start=0.4)]
    states = runner.sweep(folders, workers=1)
    assert [state.state for state in states] == ["finished", "failed", "finished"]
    assert says in states[1].message
    pids = [attempts(folder)[0]["pid"] for folder in folders]
    assert pids[0] == pids[1] != pids[2]
    assert read(folders[1] / "failure.json")["type"] == "WorkerDied"
    assert says in runner.inspect_run(folders[1]).message
    check_is_unbroken(folders[2], start=0.4)


def test_a_worker_killed_from_outside_is_replaced_and_its_run_goes_on_the_next_time(tmp_path):
    folders = [prepared(tmp_path, **SLOW), prepared(tmp_path, start=0.4)]
    pool = executors.get("processes", 1, 1, checkpoint_every_s=0.05)
    futures = [pool.submit(folder) for folder in folders]
    wait_until(lambda: is_counting(folders[0]) and surplus_bytes(folders[0]) > 0)
    os.kill(attempts(folders[0])[0]["pid"], signal.SIGKILL)
    state = futures[0].result(PATIENCE_S)
    assert state.state == "failed"
    assert "SIGKILL" in state.message
    assert state.step > 0
    assert futures[1].result(PATIENCE_S).state == "finished"
    pool.shutdown()
    hurry(folders[0])
    runner.sweep(folders, workers=1)
    check_is_unbroken(folders[0], **SLOW)
    assert not (folders[0] / "failure.json").exists()


def test_a_worker_terminated_from_outside_leaves_its_run_interrupted_and_is_replaced(tmp_path):
    folders = [prepared(tmp_path, **SLOW), prepared(tmp_path, start=0.4)]
    pool = executors.get("processes", 1, 1)
    futures = [pool.submit(folder) for folder in folders]
    wait_until(lambda: is_counting(folders[0]))
    os.kill(attempts(folders[0])[0]["pid"], signal.SIGTERM)
    assert futures[0].result(PATIENCE_S).state == "interrupted"
    assert futures[1].result(PATIENCE_S).state == "finished"
    pool.shutdown()


def test_workers_that_cannot_start_fail_their_runs_with_what_they_said(tmp_path, monkeypatch):
    (tmp_path / "alrc_lab").mkdir()
    (tmp_path / "alrc_lab" / "__init__.py").write_text("raise SystemExit('this is not the laboratory')\n")
    folders = [prepared(tmp_path), prepared(tmp_path, start=0.4)]
    monkeypatch.syspath_prepend(tmp_path)
    states = runner.sweep(folders, workers=1)
    assert [state.state for state in states] == ["failed", "failed"]
    assert "exit code 1" in states[0].message
    assert "this is not the laboratory" in read(folders[0] / "failure.json")["traceback"]


def test_when_the_driver_is_killed_its_workers_end_and_the_command_can_be_repeated(tmp_path, driver):
    folders = [prepared(tmp_path, start=start, **SLOW) for start in (0.2, 0.3)]
    process = driver(SWEEP, *folders)
    wait_until(lambda: all(is_counting(folder) for folder in folders))
    workers = [attempts(folder)[0]["pid"] for folder in folders]
    process.kill()
    process.wait()
    started = time.monotonic()
    wait_until(lambda: all(has_ended(pid) for pid in workers))
    wait_until(lambda: all(runner.inspect_run(folder).state == "interrupted" for folder in folders))
    assert time.monotonic() - started < 2.0
    for folder, start in zip(folders, (0.2, 0.3), strict=True):
        hurry(folder, start=start)
    runner.sweep(folders)
    for folder, start in zip(folders, (0.2, 0.3), strict=True):
        check_is_unbroken(folder, start=start, **SLOW)


def test_a_process_killed_while_it_wrote_leaves_no_rubbish_after_the_next_attempt(tmp_path):
    folder = prepared(tmp_path)
    (folder / ".progress.json.4711.1").write_text('{"ste')
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "draft").write_text("half")
    runner.execute(folder, checkpoint_every_s=0.0)
    check_is_unbroken(folder)
    assert not [name for name in files(folder) if name.startswith((".", "checkpoint"))]
