"""Which runs are put together, and what becomes of the folders of runs that were executed together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import CancelledError, Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import counting_experiment as counting
import counting_together as together
from alrc_lab import runner
from alrc_lab.runner import RunSpec, packing, recording
from alrc_lab.runner.attempt import execute_together
from counting_experiment import INPUTS, check_is_unbroken, prepared, read

STARTS = (0.2, 0.3, 0.4, 0.5)


@pytest.fixture
def companion(monkeypatch) -> Any:
    """The module that counts together; `numbers` tells how many did, each time."""
    monkeypatch.setattr(counting, "TOGETHER", "counting_together", raising=False)
    original = together.run_together

    def run_together(configs, recorders):
        together_module.numbers.append(len(configs))
        yield from original(configs, recorders)

    together_module: Any = together
    monkeypatch.setattr(together_module, "numbers", [], raising=False)
    monkeypatch.setattr(together_module, "run_together", run_together)
    return together_module


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch) -> None:
    """Spare the disk in this process."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# --- which runs ---


def test_runs_of_one_key_and_data_set_are_packed_in_their_order(tmp_path, companion):
    folders = [prepared(tmp_path, rate=rate, start=start) for start in STARTS for rate in (3.9, 3.8)]
    lonely = prepared(tmp_path, say="alone")
    other = runner.prepare(counting.spec(inputs=INPUTS), tmp_path)
    done = prepared(tmp_path, steps=5)
    runner.execute(done)
    packs = packing.pack([*folders, lonely, other, done], largest=10)
    assert packs == [folders[::2], folders[1::2], [lonely], [other]]
    assert packing.pack(folders, largest=1) == [[folder] for folder in folders]


def test_the_module_says_how_many_pay_and_every_worker_gets_a_pack(tmp_path, companion):
    folders = [prepared(tmp_path, start=0.1 + 0.01 * i) for i in range(10)]
    for options, sizes in (
        ({}, [2, 2, 3, 3]),
        ({"workers": 3}, [1, 1, 2, 2, 2, 2]),
        ({"largest": 10, "workers": 2}, [5, 5]),
        ({"largest": 10, "workers": 20}, [1] * 10),
    ):
        assert sorted(len(pack) for pack in packing.pack(folders, **options)) == sizes
    assert packing.pack(folders[:1], largest=10, workers=2) == [folders[:1]]
    for packs in (packing.pack(folders), packing.pack(folders, workers=3), packing.pack(folders, largest=4)):
        assert [folder for pack in packs for folder in pack] == folders


def test_an_experiment_that_offers_nothing_runs_alone(tmp_path):
    folders = [prepared(tmp_path, start=start) for start in STARTS]
    lost = runner.prepare(RunSpec("no_such_module:run", {}, None, (), "lost"), tmp_path)
    gone = tmp_path / "runs" / "gone-0123456789"
    assert packing.pack([*folders, lost, gone]) == [[folder] for folder in [*folders, lost, gone]]


def test_a_run_that_failed_is_tried_again_alone(tmp_path, companion):
    folders = [prepared(tmp_path, start=start) for start in STARTS]
    runner.attempt.note_death(folders[1], "gone", "")
    assert packing.pack(folders, largest=4) == [[folders[0], *folders[2:]], [folders[1]]]


@pytest.mark.parametrize("number", [{"largest": 0}, {"workers": -1}])
def test_impossible_numbers_are_named(number):
    with pytest.raises(ValueError, match=str(next(iter(number.values())))):
        packing.pack([], **number)


# --- what becomes of them ---


def test_folders_of_a_pack_are_those_of_single_runs(tmp_path, companion):
    folders = [prepared(tmp_path, start=start) for start in STARTS]
    states = execute_together(folders, checkpoint_every_s=0.0)
    assert companion.numbers == [4]
    assert [state.folder for state in states] == folders
    for folder, start in zip(folders, STARTS, strict=True):
        check_is_unbroken(folder, start=start)
        assert {path.name for path in folder.iterdir()} == {
            *("config.json", "env.json", "metrics.arrows", "progress.json", "result.json", "run.lock")
        }
        (attempt,) = read(folder / "env.json")["attempts"]
        assert attempt["pack"] == {"number": 4, "runs": [one.name for one in folders], "seeds": [None] * 4}
    before = counting.files(tmp_path / "runs")
    assert execute_together(folders) == states
    assert counting.files(tmp_path / "runs") == before


def test_how_a_pack_is_computed_is_noted_where_the_module_says_so(tmp_path, companion, monkeypatch):
    monkeypatch.setattr(companion, "facts_of", lambda configs: {"way": f"{len(configs)} in turn"}, raising=False)
    folders = [prepared(tmp_path, start=start) for start in STARTS]
    execute_together(folders)
    assert read(folders[0] / "env.json")["attempts"][0]["pack"]["way"] == "4 in turn"


def test_a_run_executed_alone_says_nothing_of_a_pack(tmp_path, companion):
    folder = prepared(tmp_path)
    (state,) = execute_together([folder])
    assert state.state == "finished"
    assert companion.numbers == []
    assert "pack" not in read(folder / "env.json")["attempts"][0]


def test_a_failing_run_costs_its_company_time_and_nothing_else(tmp_path, companion):
    folders = [prepared(tmp_path, start=start, raise_at=40 if start == 0.3 else None) for start in STARTS]
    states = execute_together(folders, checkpoint_every_s=0.0)
    assert [state.state for state in states] == ["finished", "failed", "finished", "finished"]
    assert states[1].message == "ArithmeticError: raised at 40"
    for folder, start in zip(folders, STARTS, strict=True):
        if start != 0.3:
            check_is_unbroken(folder, start=start)


def test_a_pack_that_is_stopped_leaves_finished_runs_done_and_the_others_resumable(tmp_path, companion, monkeypatch):
    numbers = (10, 60, 60, 60)
    folders = [prepared(tmp_path, start=start, steps=n) for start, n in zip(STARTS, numbers, strict=True)]
    original = companion.run_together

    def stopped(configs, recorders):
        outcomes = original(configs, recorders)
        yield next(outcomes)
        real = recorders[1].checkpoint

        def checkpoint(step, save):
            real(step, save)
            if step == 20:
                raise KeyboardInterrupt

        recorders[1].checkpoint = checkpoint
        yield next(outcomes)

    monkeypatch.setattr(companion, "run_together", stopped)
    with pytest.raises(KeyboardInterrupt):
        execute_together(folders, checkpoint_every_s=0.0)
    states = [runner.inspect_run(folder) for folder in folders]
    assert [(state.state, state.step) for state in states] == [
        *(("finished", 10), ("interrupted", 20), ("interrupted", 19), ("interrupted", 19))
    ]
    monkeypatch.setattr(companion, "run_together", original)
    first = counting.files(folders[0])
    execute_together(folders)
    assert companion.numbers == [4, 3], "the run that was done is not in the second pack"
    assert counting.files(folders[0]) == first
    for folder, start, n in zip(folders, STARTS, numbers, strict=True):
        check_is_unbroken(folder, start=start, steps=n)


def test_a_folder_held_by_another_process_is_left_to_it(tmp_path, companion):
    folders = [prepared(tmp_path, start=start) for start in STARTS[:3]]
    with runner.folder.locked(folders[1]) as is_mine:
        assert is_mine
        states = execute_together(folders)
    assert [state.state for state in states] == ["finished", "running", "finished"]
    assert companion.numbers == [2]


def test_changed_missing_and_unpackable_folders_are_states(tmp_path, companion):
    folders = [prepared(tmp_path, start=start) for start in STARTS[:3]]
    document = read(folders[1] / "config.json")
    document["config"]["steps"] = 61
    (folders[1] / "config.json").write_text(json.dumps(document))
    gone = tmp_path / "runs" / "gone-0123456789"
    states = execute_together([*folders, gone])
    assert [state.state for state in states] == ["finished", "failed", "finished", "failed"]
    assert "was changed since it was written" in states[1].message


def test_a_worker_process_executes_a_pack(tmp_path, companion):
    folders = [together.prepared(tmp_path, start=start, say="x") for start in STARTS[:2]]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "alrc_lab.runner.worker"]
    requests = [{"folders": [str(folder) for folder in folders]}, {"folder": str(folders[0])}]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, bufsize=1, **pipes) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        answers = []
        for request in requests:
            worker.stdin.write(json.dumps({**request, "checkpoint_every_s": 20}) + "\n")
            answers.append(json.loads(worker.stdout.readline()))
        worker.stdin.close()
    assert worker.returncode == 0
    packed, alone = answers
    assert [state["state"] for state in packed] == ["finished", "finished"]
    assert alone == packed[0]
    assert (folders[0] / "log.txt").read_text().count("x 60") == 2
    assert read(folders[1] / "env.json")["attempts"][0]["pack"]["number"] == 2


# --- futures ---


def test_every_run_of_a_pack_has_a_future():
    joint = Future[Any]()
    first, second = packing.members_of(joint, 2)
    assert not first.done()
    joint.set_result(["a", "b"])
    assert (first.result(), second.result()) == ("a", "b")
    broken = Future[Any]()
    (member,) = packing.members_of(broken, 1)
    broken.set_exception(ZeroDivisionError("x"))
    with pytest.raises(ZeroDivisionError):
        member.result()
    dropped = Future[Any]()
    (member,) = packing.members_of(dropped, 1)
    dropped.cancel()
    dropped.set_running_or_notify_cancel()
    with pytest.raises(CancelledError):
        member.result()


def test_twin_a_pack_that_mixes_its_runs_up_is_caught(tmp_path, companion, monkeypatch):
    folders = [prepared(tmp_path, start=start) for start in STARTS]
    original = companion.run_together
    monkeypatch.setattr(companion, "run_together", lambda configs, recorders: original(configs[::-1], recorders))
    execute_together(folders)
    with pytest.raises(AssertionError):
        check_is_unbroken(folders[0], start=STARTS[0])


# --- sweeps ---


def packed_folders(root: Path, **changes: dict[str, Any]) -> list[Path]:
    """Folders of runs that can train together in any process; changes by what they start with."""
    return [together.prepared(root, start=start, **changes.get(str(start), {})) for start in STARTS]


@pytest.mark.parametrize("executor", ["inline", "processes"])
def test_a_sweep_packs_and_can_be_told_not_to(tmp_path, executor):
    folders = packed_folders(tmp_path)
    states = runner.sweep(folders, executor=executor, workers=1, largest_pack=4)
    assert [state.state for state in states] == ["finished"] * 4
    for folder, start in zip(folders, STARTS, strict=True):
        check_is_unbroken(folder, start=start)
        (attempt,) = read(folder / "env.json")["attempts"]
        assert (attempt["pack"]["number"], attempt["executor"]) == (4, executor)
    other, *_ = packed_folders(tmp_path, **{"0.2": {"steps": 61}})
    runner.sweep([other, *packed_folders(tmp_path / "other")], executor=executor, workers=1, largest_pack=1)
    assert "pack" not in read(other / "env.json")["attempts"][0]


def test_a_worker_that_dies_costs_its_pack_until_the_command_is_repeated(tmp_path):
    folders = packed_folders(tmp_path, **{"0.3": {"kill_at": 9}, "0.2": {"steps": 5}})
    states = runner.sweep(folders, workers=1, largest_pack=4)
    assert [state.state for state in states] == ["finished", "failed", "failed", "failed"]
    assert all("SIGKILL" in state.message for state in states[1:])
    runner.sweep(folders[2:], workers=1)
    for folder, start in list(zip(folders, STARTS, strict=True))[2:]:
        check_is_unbroken(folder, start=start)
        assert "pack" not in read(folder / "env.json")["attempts"][1]


# --- time ---


def test_a_run_in_company_takes_its_share_of_the_time(tmp_path, companion, monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(recording, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(time, "sleep", lambda seconds: setattr(clock, "now", clock.now + seconds))
    # An update of each in turn takes 6 s with three at work and 4 s with two: 20 rounds, 10 rounds, 30 alone of 2 s.
    folders = [
        prepared(tmp_path, start=start, steps=steps, sleep_s=2.0)
        for start, steps in zip(STARTS, (20, 30, 60), strict=False)
    ]
    states = execute_together(folders, checkpoint_every_s=1e9)
    shares = [state.wall_s for state in states]
    assert shares == pytest.approx([40, 60, 120], abs=4)
    assert sum(shares) == pytest.approx(2.0 * (20 + 30 + 60), abs=0.01), "nothing is counted twice or left out"
    alone = prepared(tmp_path, start=0.9, steps=20, sleep_s=2.0)
    assert runner.execute(alone, checkpoint_every_s=1e9).wall_s == pytest.approx(40)


def test_a_share_survives_the_pack(tmp_path, companion, monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(recording, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(time, "sleep", lambda seconds: setattr(clock, "now", clock.now + seconds))
    folders = [prepared(tmp_path, start=start, steps=20, sleep_s=2.0, raise_at=10) for start in STARTS]
    states = execute_together(folders, checkpoint_every_s=0.0)  # each fails together and alone, both at 10
    assert [state.state for state in states] == ["failed"] * 4
    latest = [read(folder / "checkpoint" / "latest.json") for folder in folders]
    assert [document["step"] for document in latest] == [9] * 4
    assert sum(document["wall_s"] for document in latest) == pytest.approx(2.0 * 9 * 4, abs=8)


# --- before there are folders ---


def test_runs_are_grouped_before_they_have_folders_as_they_are_afterwards(tmp_path):
    specs = [
        RunSpec(together.ENTRY, counting.config(start=start, rate=rate), None, (), "p")
        for start in STARTS
        for rate in (3.8, 3.9)
    ]
    folders = [runner.prepare(spec, tmp_path) for spec in specs]
    for options in ({}, {"workers": 3}, {"largest": 4}, {"largest": 1}):
        places = packing.group([spec.to_json() for spec in specs], **options)
        assert [[folders[place] for place in part] for part in places] == packing.pack(folders, **options)
    assert packing.group([{}, specs[0].to_json(), specs[2].to_json()], 4) == [[0], [1, 2]]
