"""One run and its files, disks that will not have it, and sweeps. Killing is in test_runner_crash."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import polars
import pytest

import counting_experiment as counting
from alrc_lab import runner
from alrc_lab.runner import RunSpec
from alrc_lab.runner import attempt as attempt_module
from counting_experiment import INPUTS, files, prepared, read, spec


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch) -> None:
    """Spare the disk in this process: fsync protects from power failures, which no test can cause."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# --- one run ----------------------------------------------------------------------------------------------------------


def test_a_run_leaves_exactly_the_files_of_the_contract(tmp_path):
    mine = spec(inputs=INPUTS)
    folder = runner.prepare(mine, tmp_path)
    assert runner.inspect_run(folder).state == "pending"
    state = runner.execute(folder, checkpoint_every_s=0.0)
    column, summary = counting.expected(mine.config)

    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "env.json", "metrics.arrows", "progress.json", "result.json", "run.lock")
    }
    result = read(folder / "result.json")
    assert result["summary"] == summary == state.summary
    assert (result["status"], result["diverged_at"], result["steps"]) == ("finished", None, 60)
    assert result["identity"] == mine.identity == state.identity
    assert (state.state, state.name, state.step, state.total, state.is_done) == ("finished", "count", 60, 60, True)
    (attempt,) = read(folder / "env.json")["attempts"]
    assert attempt.keys() >= {"started_at", "code_version", "git", "python", "platform", "cpu", "cores", "threads"}
    assert (attempt["executor"], attempt["pid"], attempt["code_version"]) == (
        *("inline", os.getpid(), runner.code_version()),
    )
    assert attempt["libraries"]["numpy"] == np.__version__
    assert state.code_version == runner.code_version()
    progress = read(folder / "progress.json")
    assert progress.keys() == {"step", "total", "steps_per_s", "updated_at"}

    assert (folder / "metrics.arrows").read_bytes().endswith(b"\xff\xff\xff\xff\0\0\0\0")  # Arrow's end of stream
    table = polars.read_ipc_stream(folder / "metrics.arrows")  # the one line that the contract promises
    assert table.schema == {"step": polars.Int64, "x": polars.Float64, "x32": polars.Float32}
    assert table.columns[0] == "step"
    np.testing.assert_array_equal(table["x"].to_numpy(), column)
    found = runner.read_metrics(folder)
    np.testing.assert_array_equal(found["x"], column)
    np.testing.assert_array_equal(found["x32"], column.astype(np.float32))
    np.testing.assert_array_equal(found["step"], np.arange(1, 61))


def test_asking_for_the_commit_leaves_the_repository_alone(tmp_path, monkeypatch):
    """A run that is killed while git refreshes its index would leave the index locked."""

    def git(*arguments: str) -> str:
        names = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        return subprocess.run(["git", "-C", tmp_path, *names, *arguments], check=True, capture_output=True).stdout

    here, index = tmp_path / "code.py", tmp_path / ".git" / "index"
    here.write_text("1")
    git("init", "-q")
    git("add", "code.py")
    git("commit", "-q", "-m", "One")
    os.utime(here, (1, 1))  # as it was, but git must look
    before = index.stat().st_ino
    monkeypatch.setattr(attempt_module, "__file__", str(here))
    assert attempt_module._git_state()["is_dirty"] is False
    assert index.stat().st_ino == before
    git("status", "--porcelain")  # known wrong: writes a new index, through a lock
    assert index.stat().st_ino != before


def test_a_done_run_is_left_untouched(tmp_path):
    folder = prepared(tmp_path)
    first = runner.execute(folder)
    before = files(folder)
    assert runner.execute(folder) == first
    (second,) = runner.sweep([folder], workers=1)
    assert second == first
    assert files(folder) == before


def test_divergence_is_a_result_and_numbers_that_are_not_finite_become_null(tmp_path):
    state = runner.execute(prepared(tmp_path, diverge_at=5))
    assert (state.state, state.diverged_at, state.step, state.is_done) == ("diverged", 5, 5, True)
    assert state.summary is not None
    assert state.summary["last"] is None
    assert runner.RunState.from_json(json.loads(json.dumps(state.to_json()))) == state


def test_a_failure_is_recorded_and_tried_again(tmp_path, monkeypatch):
    folder = prepared(tmp_path, raise_at=40)
    state = runner.execute(folder, checkpoint_every_s=0.0)
    assert (state.state, state.message, state.is_done) == ("failed", "ArithmeticError: raised at 40", False)
    failure = read(folder / "failure.json")
    assert failure.keys() >= {"type", "message", "traceback", "failed_at"}
    assert "counting_experiment.py" in failure["traceback"]
    assert not (folder / "result.json").exists()
    assert runner.inspect_run(folder).step == 39  # where the next attempt goes on

    original = counting.run

    def repaired(config, recorder):
        at_work = runner.inspect_run(folder)  # nothing of the earlier attempt is shown as if it were this one's
        assert (at_work.state, at_work.step, at_work.message) == ("running", 0, "")
        return original(config | {"raise_at": None}, recorder)

    monkeypatch.setattr(counting, "run", repaired)
    state = runner.execute(folder)
    assert (state.state, state.step) == ("finished", 60)
    assert not (folder / "failure.json").exists()
    assert len(read(folder / "env.json")["attempts"]) == 2
    column, summary = counting.expected(counting.config())
    np.testing.assert_array_equal(runner.read_metrics(folder)["x"], column)
    assert state.summary == summary


@pytest.mark.parametrize(
    ("outcome", "says"),
    [
        (None, "must return"),
        ({"summary": {}}, "must return"),
        ({"diverged_at": None, "summary": {"a": "high"}}, "high"),
        ({"diverged_at": 1.5, "summary": {}}, "1.5"),
    ],
)
def test_an_outcome_of_another_form_is_a_failure(tmp_path, monkeypatch, outcome, says):
    monkeypatch.setattr(counting, "run", lambda config, recorder: outcome)
    state = runner.execute(prepared(tmp_path))
    assert state.state == "failed"
    assert says in state.message


def test_numpy_numbers_in_a_summary_are_numbers(tmp_path, monkeypatch):
    summary = {"a": np.float32(0.5), "b": np.int64(3)}
    monkeypatch.setattr(counting, "run", lambda config, recorder: {"diverged_at": np.int64(4), "summary": summary})
    state = runner.execute(prepared(tmp_path))
    assert (state.state, state.diverged_at, state.summary) == ("diverged", 4, {"a": 0.5, "b": 3})


@pytest.mark.parametrize("entry", ["no_such_module:run", "counting_experiment:no_such_function"])
def test_an_entry_that_cannot_be_imported_is_a_failure(tmp_path, entry):
    folder = runner.prepare(RunSpec(entry, {}, None, (), "lost"), tmp_path)
    state = runner.execute(folder)
    assert state.state == "failed"
    assert "no_such" in state.message


def test_sys_exit_of_an_entry_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(counting, "run", lambda config, recorder: sys.exit("out"))
    assert runner.execute(prepared(tmp_path)).message == "SystemExit: out"


def test_a_config_that_was_edited_is_refused(tmp_path):
    folder = prepared(tmp_path)
    document = read(folder / "config.json")
    document["config"]["steps"] = 61
    (folder / "config.json").write_text(json.dumps(document))
    state = runner.execute(folder)
    assert state.state == "failed"
    assert "was changed since it was written" in state.message


def test_broken_and_missing_folders_are_states_not_exceptions(tmp_path):
    assert runner.inspect_run(tmp_path / "runs" / "gone-0123456789").state == "pending"
    state = runner.execute(tmp_path / "runs" / "gone-0123456789")
    assert (state.state, state.name) == ("failed", "gone")
    assert "config.json is missing" in state.message
    assert not (tmp_path / "runs").exists()
    folder = prepared(tmp_path)
    (folder / "result.json").write_text('{"stat')
    state = runner.inspect_run(folder)
    assert state.state == "failed"
    assert "result.json is not valid JSON" in state.message


def test_two_executions_of_one_folder(tmp_path):
    folder = prepared(tmp_path, steps=60, sleep_s=0.02)
    first: list[runner.RunState] = []
    thread = threading.Thread(target=lambda: first.append(runner.execute(folder)))
    thread.start()
    while not (folder / "metrics.arrows").exists():
        time.sleep(0.005)
    assert runner.inspect_run(folder).state == "running"
    second = runner.execute(folder)
    assert not first, "the second execution waited for the first"
    assert second.state == "running"
    assert "another process" in second.message
    thread.join()
    assert first[0].state == "finished"
    assert len(read(folder / "env.json")["attempts"]) == 1


def test_ten_thousand_folders_are_inspected_in_about_two_seconds(tmp_path):
    done, waiting = prepared(tmp_path), prepared(tmp_path, steps=61)
    runner.execute(done)
    started = time.process_time()
    for _ in range(500):
        runner.inspect_run(done)
        runner.inspect_run(waiting)
    per_folder = (time.process_time() - started) / 1000
    print(f"{per_folder * 1e6:.0f} µs per folder")
    assert per_folder < 400e-6  # twice the aim, for busy machines


def test_the_status_of_a_run_loads_no_arrow_and_the_runner_no_framework():
    code = "import sys, alrc_lab.runner.folder; print(*sorted(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"alrc_lab.runner.folder", "filelock"} <= set(output)
    code = code.replace("runner.folder", "runner.worker")
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    loaded = {name for name in output if name.startswith("alrc_lab.")}
    assert "pyarrow" in output
    assert not {"torch", "jax", "keras"} & set(output)
    assert {name.split(".")[1] for name in loaded} == {"runner"}


# --- disks that will not have it --------------------------------------------------------------------------------------


def test_a_place_that_cannot_be_written_is_told_in_one_sentence(tmp_path):
    (tmp_path / "runs").write_text("not a folder")
    with pytest.raises(OSError, match=r"cannot write .*; a file stands where a folder is needed"):
        prepared(tmp_path)
    assert files(tmp_path) == {"runs": b"not a folder"}


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a folder that not even root may write to: /sys")
def test_a_read_only_place_is_told_in_one_sentence():
    with pytest.raises(OSError, match=r"cannot write /sys/runs.*(choose another|repaired)"):
        prepared(Path("/sys"))


def test_a_full_disk_while_writing_json_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    folder = prepared(tmp_path)
    before = files(folder)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*config\.json: No space left on device; free some space"):
        prepared(tmp_path, sleep_s=1.0)
    assert files(folder) == before
    state = runner.execute(folder)
    assert state.state == "failed"
    assert "No space left on device; free some space" in state.message
    assert not (folder / "result.json").exists()
    monkeypatch.undo()
    assert runner.execute(folder).state == "finished"


def test_a_file_that_may_not_grow_fails_the_run_and_can_be_resumed(tmp_path):
    folder = prepared(tmp_path, steps=400, block=1)
    code = (
        "import resource, sys; from pathlib import Path; from alrc_lab import runner;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));"
        "print(runner.execute(Path(sys.argv[1]), checkpoint_every_s=0.01).message)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(folder)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert "metrics.arrows" in output
    assert "File too large; files may not grow that large here" in output
    assert runner.inspect_run(folder).state == "failed"
    rows = len(runner.read_metrics(folder)["step"])
    assert 0 < rows < 400
    assert runner.execute(folder).summary == counting.expected(counting.config(steps=400))[1]


# --- sweeps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", ["inline", "processes"])
def test_a_failing_run_does_not_end_the_sweep(tmp_path, executor):
    folders = [
        prepared(tmp_path, start=0.2),
        prepared(tmp_path, start=0.25, raise_at=3),
        tmp_path / "runs" / "gone-0123456789",
        prepared(tmp_path, diverge_at=4),
        prepared(tmp_path, start=0.4),
    ]
    seen: list[list[runner.RunState]] = []
    states = runner.sweep(folders, executor=executor, workers=1, on_poll=seen.append, poll_s=0.05)
    assert [state.state for state in states] == ["finished", "failed", "failed", "diverged", "finished"]
    assert [state.folder for state in states] == folders
    assert seen[-1] == states
    assert states == [
        runner.inspect_run(folder) if folder.is_dir() else state for folder, state in zip(folders, states, strict=True)
    ]


def test_inline_and_processes_give_the_same_numbers(tmp_path):
    results: dict[str, list] = {}
    for executor in ("inline", "processes"):
        starts = (0.2, 0.3, 0.4)
        folders = [prepared(tmp_path / executor, start=start, steps=200) for start in starts]
        states = runner.sweep(folders, executor=executor, checkpoint_every_s=0.01)
        results[executor] = [(state.summary, (state.folder / "metrics.arrows").read_bytes()) for state in states]
        for folder in folders:
            assert read(folder / "env.json")["attempts"][-1]["executor"] == executor
    summaries = [[summary for summary, _ in results[executor]] for executor in results]
    assert summaries[0] == summaries[1] == [counting.expected(counting.config(start=s, steps=200))[1] for s in starts]


def test_what_a_run_prints_goes_to_its_log(tmp_path):
    folders = [prepared(tmp_path, say=word, steps=3) for word in ("one", "two")]
    runner.sweep(folders, workers=1)
    for folder, word in zip(folders, ("one", "two"), strict=True):
        lines = (folder / "log.txt").read_text().splitlines()
        assert lines == [*(line for step in "123" for line in (f"{word} {step}", "from below")), "counted"]


def test_nothing_but_answers_comes_from_a_worker(tmp_path):
    folder = prepared(tmp_path, say="hello", say_last=True, steps=3)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "alrc_lab.runner.worker"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, bufsize=1, **pipes) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(json.dumps({"folder": str(folder), "checkpoint_every_s": 20}) + "\n")
        answer = worker.stdout.readline()
        rest, errors = worker.communicate()
    assert json.loads(answer)["state"] == "finished"
    assert (rest, errors, worker.returncode) == ("", "from the very end\n", 0)


def test_one_worker_process_serves_many_runs_with_its_share_of_threads(tmp_path):
    folders = [prepared(tmp_path, start=0.1 + 0.1 * seed, steps=2) for seed in range(3)]
    runner.sweep(folders, workers=1, threads=1)
    attempts = [read(folder / "env.json")["attempts"][0] for folder in folders]
    assert len({attempt["pid"] for attempt in attempts}) == 1
    assert attempts[0]["pid"] != os.getpid()
    assert [attempt["threads"] for attempt in attempts] == [1, 1, 1]


def test_a_display_that_fails_does_not_end_the_runs_but_is_heard_of(tmp_path):
    folder = prepared(tmp_path, steps=20, sleep_s=0.01)

    def show(states):
        raise ZeroDivisionError("display")

    with pytest.raises(ZeroDivisionError, match="display"):
        runner.sweep([folder], executor="inline", on_poll=show, poll_s=0.01)
    assert runner.inspect_run(folder).state == "finished"


def test_polling_shows_a_run_at_work(tmp_path):
    folder = prepared(tmp_path, steps=60, sleep_s=0.02)
    seen: list[runner.RunState] = []
    runner.sweep([folder], executor="inline", on_poll=seen.extend, poll_s=0.1)
    at_work = [state for state in seen if state.state == "running"]
    assert at_work
    assert any(state.total == 60 and 0 < state.step < 60 for state in at_work)
    rates = [state.steps_per_s for state in at_work if state.steps_per_s]
    assert all(0 < rate < 51 for rate in rates)
    assert rates


def test_executors_are_named(tmp_path):
    with pytest.raises(ValueError, match="inline, processes, ray"):
        runner.executors.get("threads")
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        runner.sweep([], workers=0)
    pool = runner.executors.get("processes", 1, 1)
    future = pool.submit(prepared(tmp_path))
    pool.shutdown(wait=False)
    assert future.result(timeout=20).state == "finished"
    pool.shutdown()
    with pytest.raises(RuntimeError):
        pool.submit(prepared(tmp_path))
