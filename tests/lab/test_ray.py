"""Sweeps on a real Ray cluster on this machine: the numbers of `processes`, whoever is killed on the way."""

from __future__ import annotations

import importlib.util
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE

import numpy as np
import psutil
import pytest

import counting_experiment as counting
import counting_together as together
from alrc_lab import runner
from alrc_lab.runner import RunSpec, executors
from counting_experiment import check_is_unbroken, prepared, read

# Ray reads them when it is loaded. A token of its own, so that it keeps none in the home of whoever runs the tests.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
ray = pytest.importorskip("ray", reason="ray is not installed")
pytestmark = pytest.mark.dist
ray_executor = pytest.importorskip("alrc_lab.runner.ray_executor")

PATIENCE_S = 60.0
CLUSTER = """
import sys
import ray
quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
ray.init("local", num_cpus=2, num_gpus=1, object_store_memory=100 * 2**20, **quiet)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""
SLOW = {"steps": 1500, "sleep_s": 0.002, "block": 2}  # at least three seconds: no test comes too late to stop it
STARTS = (0.2, 0.3, 0.4, 0.5)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Start one cluster of two cores and one pretended GPU for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # as a cluster has the same environment everywhere
        with subprocess.Popen([sys.executable, "-c", CLUSTER], stdin=PIPE, stdout=PIPE, text=True) as cluster:
            assert cluster.stdout is not None
            found = cluster.stdout.readline().strip()
            assert ray_executor.connect(found)
            yield found
            ray.shutdown()


@pytest.fixture
def driver(address: str) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start processes that sweep folders on the cluster; end those that the test did not."""
    started: list[subprocess.Popen[str]] = []

    def start(*folders: Path) -> subprocess.Popen[str]:
        code = (
            "import sys; from pathlib import Path; from alrc_lab import runner;"
            "runner.sweep(map(Path, sys.argv[2:]), executor='ray', address=sys.argv[1], checkpoint_every_s=0.05)"
        )
        command = [sys.executable, "-c", code, address, *map(str, folders)]
        started.append(subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, text=True))
        return started[-1]

    yield start
    for process in started:
        with process:
            process.kill()


def wait_until(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def attempts(folder: Path) -> list[dict]:
    path = folder / "env.json"
    return read(path)["attempts"] if path.exists() else []


def has_checkpoint(folder: Path) -> bool:
    return (folder / "checkpoint" / "latest.json").exists()


def has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def on_cuda(root: Path, device: str = "cuda", **changes) -> Path:
    """Prepare a run whose config says where it wants to be; it does not go there."""
    config = counting.config(**changes) | {"device": device}
    return runner.prepare(RunSpec(counting.ENTRY, config, None, counting.EXCLUDED, "count"), root)


def sweep_in_thread(folders: list[Path], **options) -> tuple[threading.Thread, list[runner.RunState]]:
    states: list[runner.RunState] = []
    thread = threading.Thread(
        target=lambda: states.extend(runner.sweep(folders, executor="ray", checkpoint_every_s=0.05, **options))
    )
    thread.start()
    return thread, states


def test_workers_that_are_killed_lose_nothing_and_the_numbers_are_those_of_processes(tmp_path, address):
    folders = [prepared(tmp_path / "ray", start=start, say="at", **SLOW) for start in STARTS]
    polled: list[int] = []
    thread, states = sweep_in_thread(
        folders,
        address=address,
        poll_s=0.05,
        on_poll=lambda now: polled.append(sum(state.state == "running" for state in now)),
    )
    wait_until(lambda: sum(map(has_checkpoint, folders)) == 2)
    first, second = (attempts(folder)[0]["pid"] for folder in folders if has_checkpoint(folder))
    killed = [folder for folder in folders if has_checkpoint(folder)]
    ray_worker = psutil.Process(first).parent()
    assert ray_worker is not None
    assert ray_worker.cmdline()[0].startswith("ray::")
    ray_worker.kill()  # a machine that is lost, or Ray itself when memory runs out
    os.kill(second, signal.SIGKILL)  # the kernel when memory runs out
    thread.join()
    assert has_ended(first)

    assert [state.state for state in states] == ["finished"] * 4
    assert [state.folder for state in states] == folders
    assert max(polled) == 2
    for folder, start in zip(folders, STARTS, strict=True):
        check_is_unbroken(folder, start=start, **SLOW)
        assert len(attempts(folder)) == 1 + (folder in killed)
        assert (folder / "log.txt").read_text().splitlines().count("at 1") == 1  # went on, and did not begin again
        assert {attempt["threads"] for attempt in attempts(folder)} == {1}
        assert not (folder / "failure.json").exists()

    others = [prepared(tmp_path / "processes", start=start, say="at", **(SLOW | {"sleep_s": 0})) for start in STARTS]
    for state, other in zip(states, runner.sweep(others, workers=2), strict=True):
        assert (state.name, state.identity, state.summary) == (other.name, other.identity, other.summary)
        mine, theirs = runner.read_metrics(state.folder), runner.read_metrics(other.folder)
        assert mine.keys() == theirs.keys()
        for column in mine:
            np.testing.assert_array_equal(mine[column], theirs[column])


def test_packs_survive_killed_workers_with_the_numbers_of_processes(tmp_path, address):
    """Two packs at work, one loses its Ray worker and the other its own process; each resumes as the pack it was."""
    slow = {"steps": 400, "sleep_s": 0.002, "block": 2, "say": "at"}

    def many(place: str, **changes) -> list[Path]:
        starts = [(start, rate) for rate in (3.8, 3.9) for start in STARTS]
        return [together.prepared(tmp_path / place, start=s, rate=r, **(slow | changes)) for s, r in starts]

    folders = many("ray")
    thread, states = sweep_in_thread(folders, address=address, largest_pack=4)
    # A group of four is shared out between two workers, here as there.
    to_kill = {0: lambda worker: worker.parent().kill(), 2: lambda worker: worker.kill()}

    def killed_both() -> bool:
        for place in list(to_kill):
            if all(map(has_checkpoint, folders[place : place + 2])):
                to_kill.pop(place)(psutil.Process(attempts(folders[place])[0]["pid"]))
        return not to_kill

    wait_until(killed_both)
    thread.join()
    assert [(state.state, state.folder) for state in states] == [("finished", folder) for folder in folders]

    others = many("processes", sleep_s=0.0)
    runner.sweep(others, workers=2, largest_pack=4)
    for place, (folder, other) in enumerate(zip(folders, others, strict=True)):
        mates = [mate.name for mate in folders[place // 2 * 2 : place // 2 * 2 + 2]]
        tried = attempts(folder)
        assert [attempt["pack"]["runs"] for attempt in tried] == [mates] * (2 if place < 4 else 1)
        assert {(attempt["executor"], attempt["threads"]) for attempt in tried} == {("ray", 1)}
        assert attempts(other)[0]["pack"]["runs"] == mates
        mine, theirs = runner.read_metrics(folder), runner.read_metrics(other)
        assert runner.inspect_run(folder).summary == runner.inspect_run(other).summary
        for column in mine:
            np.testing.assert_array_equal(mine[column], theirs[column])
        assert not (folder / "failure.json").exists()
    for folder in folders[::2]:  # all went on, and none began again
        assert (folder / "log.txt").read_text().splitlines().count("at 1") == 2


def test_a_pack_whose_program_fails_tries_its_runs_alone_and_one_that_kills_is_given_up(tmp_path, address):
    failing = [together.prepared(tmp_path, start=s, raise_at=9 if s == 0.3 else None) for s in STARTS]
    deadly = [together.prepared(tmp_path, start=s, rate=3.8, kill_at=9 if s == 0.3 else None) for s in STARTS]
    states = runner.sweep([*failing, *deadly], executor="ray", address=address, workers=1, largest_pack=4)
    assert [state.state for state in states[:4]] == ["finished", "failed", "finished", "finished"]
    assert states[1].message == "ArithmeticError: raised at 9"
    assert [len(attempts(folder)) for folder in failing] == [2] * 4
    assert [state.state for state in states[4:]] == ["failed"] * 4
    assert all("SIGKILL" in state.message and "given up after 4 attempts" in state.message for state in states[4:])
    again = runner.sweep(deadly, executor="ray", address=address, largest_pack=4)  # each alone
    assert [state.state for state in again] == ["finished", "failed", "finished", "finished"]
    for folder, start in zip(deadly, STARTS, strict=True):
        assert "pack" not in attempts(folder)[-1]
        if start != 0.3:
            check_is_unbroken(folder, start=start, rate=3.8)


def test_a_pack_asks_for_a_part_of_a_gpu_once(tmp_path, address):
    folders = [together.prepared(tmp_path, start=start, device="cuda", **SLOW) for start in STARTS]
    pool = executors.get("ray", None, 1, address=address, gpus_per_run=0.5)
    assert pool.at_once(folders) == 2
    assert pool.at_once([prepared(tmp_path)]) == 2
    pool.shutdown()
    pool = executors.get("ray", 1, 1, address=address, gpus_per_run=1.0)
    assert pool.at_once(folders) == 1
    pool.shutdown()
    seen: dict[Path, str] = {}

    def seen_all() -> bool:
        for folder in folders:
            if folder not in seen and has_checkpoint(folder):
                seen[folder] = psutil.Process(attempts(folder)[0]["pid"]).environ()["CUDA_VISIBLE_DEVICES"]
        return len(seen) == 4

    thread, states = sweep_in_thread(folders, address=address, gpus_per_run=0.5, largest_pack=2)
    wait_until(seen_all)
    thread.join()
    assert set(seen.values()) == {"0"}
    assert [state.state for state in states] == ["finished"] * 4
    assert [attempts(folder)[0]["pack"]["number"] for folder in folders] == [2] * 4


def test_a_run_that_kills_every_worker_is_given_up_and_the_others_end(tmp_path, address):
    folders = [prepared(tmp_path, start=0.2), prepared(tmp_path, kill_at=9), prepared(tmp_path, start=0.4)]
    states = runner.sweep(folders, executor="ray", address=address)
    assert [state.state for state in states] == ["finished", "failed", "finished"]
    assert "SIGKILL" in states[1].message
    assert "given up after 4 attempts" in states[1].message
    assert len(attempts(folders[1])) == 4
    assert read(folders[1] / "failure.json")["type"] == "WorkerDied"
    assert runner.inspect_run(folders[1]).message == f"WorkerDied: {states[1].message}"
    check_is_unbroken(folders[2], start=0.4)


def test_a_run_that_fails_is_not_retried_and_a_folder_that_is_not_there_is_told(tmp_path, address, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [prepared(Path("here"), raise_at=3), Path("here/runs/gone-0123456789"), prepared(Path("here"))]
    states = runner.sweep(folders, executor="ray", address=address)
    assert [(state.state, state.folder) for state in states] == list(
        zip(("failed", "failed", "finished"), folders, strict=True)
    )
    assert "raised at 3" in states[0].message
    assert len(attempts(folders[0])) == 1
    assert "the results must lie where every machine sees them" in states[1].message
    assert not folders[1].exists()


def test_cancelled_runs_can_be_resumed_also_those_that_will_not_stop(tmp_path, address):
    folders = [prepared(tmp_path, start=start, hang=start == 0.3, **SLOW) for start in STARTS]
    pool = executors.get("ray", None, 1, checkpoint_every_s=0.05, address=address)
    futures = [pool.submit(folder) for folder in folders]
    wait_until(lambda: sum(map(has_checkpoint, folders)) == 2)
    workers = [attempts(folder)[0]["pid"] for folder in folders if has_checkpoint(folder)]
    pool.shutdown(cancel=True)
    wait_until(lambda: all(map(has_ended, workers)))
    assert sorted(runner.inspect_run(folder).state for folder in folders) == ["interrupted"] * 2 + ["pending"] * 2
    assert all(future.done() for future in futures)
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit(folders[0])
    for start in STARTS:
        prepared(tmp_path, start=start, **(SLOW | {"sleep_s": 0.0}))
    runner.sweep(folders, executor="ray", address=address)
    for folder, start in zip(folders, STARTS, strict=True):
        check_is_unbroken(folder, start=start, **SLOW)


def test_a_second_driver_leaves_alone_what_the_first_executes_and_the_first_can_be_killed(tmp_path, driver, address):
    folders = [prepared(tmp_path, start=start, **SLOW) for start in STARTS[:2]]
    process = driver(*folders)
    wait_until(lambda: all(map(has_checkpoint, folders)))
    others = runner.sweep(folders, executor="processes", workers=2)
    assert [(state.state, state.message) for state in others] == [
        ("running", "another process is executing this run")
    ] * 2
    workers = [attempts(folder)[0]["pid"] for folder in folders]
    assert [len(attempts(folder)) for folder in folders] == [1, 1]
    process.kill()
    process.wait()
    wait_until(lambda: all(map(has_ended, workers)))  # no orphan computes for days
    # A process counts as ended while its last threads still do: the lock is free some ten milliseconds later.
    wait_until(lambda: [runner.inspect_run(folder).state for folder in folders] == ["interrupted"] * 2)
    assert [len(attempts(folder)) for folder in folders] == [1, 1]
    for start in STARTS[:2]:
        prepared(tmp_path, start=start, **(SLOW | {"sleep_s": 0.0}))
    runner.sweep(folders, executor="ray", address=address, workers=1)
    for folder, start in zip(folders, STARTS, strict=False):
        check_is_unbroken(folder, start=start, **SLOW)
        assert len(attempts(folder)) == 2


def test_two_runs_share_one_gpu(tmp_path, address):
    folders = [on_cuda(tmp_path, start=start, **SLOW) for start in STARTS[:2]]
    thread, states = sweep_in_thread(folders, address=address, gpus_per_run=0.5)
    wait_until(lambda: all(map(has_checkpoint, folders)))  # so they are executed at the same time
    for folder in folders:
        environment = psutil.Process(attempts(folder)[0]["pid"]).environ()
        assert environment["CUDA_VISIBLE_DEVICES"] == "0"
        assert environment["OMP_NUM_THREADS"] == "1"
    for folder in folders:  # nothing of Ray's own folders may hide a package of the run
        path = psutil.Process(attempts(folder)[0]["pid"]).environ()["PYTHONPATH"].split(os.pathsep)
        assert path
        assert not [entry for entry in path if "/ray/" in entry]
    thread.join()
    assert [state.state for state in states] == ["finished"] * 2


def test_what_no_machine_has_is_refused_at_once(tmp_path, address):
    folder = on_cuda(tmp_path)
    with pytest.raises(ValueError, match=r"needs 1 CPU and 2 GPU, and no machine .* there is 2 CPU and 1 GPU"):
        runner.sweep([folder], executor="ray", address=address, gpus_per_run=2)
    with pytest.raises(ValueError, match="needs 3 CPU, and no machine"):
        runner.sweep([prepared(tmp_path)], executor="ray", address=address, threads=3)
    with pytest.raises(ValueError, match=r"'cuda:1', but Ray chooses the GPU"):
        runner.sweep([on_cuda(tmp_path, "cuda:1")], executor="ray", address=address)
    for number in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"gpus_per_run must be .*, got {number}"):
            runner.sweep([folder], executor="ray", address=address, gpus_per_run=number)
    assert runner.inspect_run(folder).state == "pending"
    assert executors.cluster_cores(address) == 2


def test_no_code_travels_but_the_name_of_a_function() -> None:
    pickled = ray.cloudpickle.dumps(ray_executor.execute_on_this_machine)
    assert b"alrc_lab.runner.ray_executor" in pickled
    assert len(pickled) < 200


def test_an_address_is_for_ray_and_ray_must_be_there(monkeypatch):
    with pytest.raises(ValueError, match=r"address '1\.2\.3\.4:6379' is for the executor ray, not processes"):
        executors.get("processes", address="1.2.3.4:6379")
    with pytest.raises(ValueError, match="run the command on a machine of the cluster"):
        executors.get("ray", address="ray://1.2.3.4:10001")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'alrc\[ray\]'"):
        executors.get("ray")
