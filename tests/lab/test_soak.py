"""Sweeps under fire: killed at random, on a full disk, in a folder that may only be read, and started twice."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import counting_experiment as counting
import counting_together as together
import soaking
from alrc_lab import runner
from counting_experiment import check_is_unbroken, files, prepared, read

SEEDS = 3  # of each cell; one of them is long

EXECUTORS = ["inline", "processes", pytest.param("ray", marks=pytest.mark.dist)]

# A small disk of its own: in a mount namespace, so that nobody else sees it and it goes with the process.
ON_A_SMALL_DISK = """
set -e
mount -t tmpfs -o size={size} none "$1"
cp -r "$1.before/." "$1/" 2> /dev/null || true
{then}
"$2" -c "$3" "$1" || true
mount -o remount,rw,size=64m "$1"
mkdir "$1.after"
cp -r "$1/." "$1.after/"
"""
SWEEP = """
import json, sys
from pathlib import Path
from alrc_lab import runner
from counting_experiment import prepared
root = Path(sys.argv[1])
try:
    folders = sorted((root / "runs").iterdir()) if (root / "runs").exists() else [prepared(root)]
    states = runner.sweep(folders, executor={executor!r}, workers=1, checkpoint_every_s=0.01)
    print(json.dumps([state.to_json() for state in states]))
except OSError as error:
    print(json.dumps(str(error)))
"""


def can_mount() -> bool:
    """Tell whether this user may make a mount namespace with a disk in it."""
    if not sys.platform.startswith("linux") or shutil.which("unshare") is None:
        return False
    probe = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


needs_mount = pytest.mark.skipif(not can_mount(), reason="may not mount a small disk here (unshare -rm)")


def sweep_on_small_disk(place: Path, size: str, executor: str, *, then: str = "") -> object:
    """Copy place.before to a disk of a size, sweep there, copy what is left to place.after; what the sweep said."""
    place.mkdir(exist_ok=True)
    script = ON_A_SMALL_DISK.format(size=size, then=then)
    if executor == "ray":
        pytest.importorskip("ray", reason="ray is not installed")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # none in anybody's home
    command = ["unshare", "-rm", "sh", "-c", script, "sh", str(place), sys.executable, SWEEP.format(executor=executor)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def commands_on_small_disk(place: Path, then: str) -> list[tuple[int, str, str]]:
    """Do `alrc status` and `alrc report` there; exit code, standard output and standard error of each."""
    place.mkdir()
    code = (
        "import json, subprocess, sys\n"
        "def ask(name):\n"
        "    command = [sys.executable, '-m', 'alrc_lab', name, sys.argv[1]]\n"
        "    done = subprocess.run(command, capture_output=True, text=True)\n"
        "    return done.returncode, done.stdout, done.stderr\n"
        "print(json.dumps([ask('status'), ask('report')]))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    script = ON_A_SMALL_DISK.format(size="512k", then=then)
    command = ["unshare", "-rm", "sh", "-c", script, "sh", str(place), sys.executable, code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# --- killed at random -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_twelve_kills_lose_nothing_and_the_table_is_that_of_an_undisturbed_sweep(tmp_path):
    sent = soaking.soak(tmp_path / "soaked", 12, seeds=SEEDS, dice=7)
    assert sum(sent.values()) == 12
    assert {name.split()[0] for name in sent} == {"driver", "worker"}
    assert soaking.problems(tmp_path / "soaked", tmp_path / "other", SEEDS) == []


@pytest.mark.slow
def test_twin_what_is_lost_corrupt_or_different_is_found(tmp_path):
    folders = list(soaking.prepare(tmp_path / "soaked", SEEDS, 0.0))
    runner.sweep(folders, executor="inline")
    assert soaking.problems(tmp_path / "soaked", tmp_path / "other", SEEDS) == []

    shutil.rmtree(folders[0])
    result = read(folders[1] / "result.json")
    result["summary"]["mean"] += 1e-6
    (folders[1] / "result.json").write_text(json.dumps(result))
    (folders[3] / ".result.json.17.4").write_text("{")
    metrics = folders[4] / "metrics.arrows"
    metrics.write_bytes(metrics.read_bytes()[: metrics.stat().st_size // 2])
    found = soaking.problems(tmp_path / "soaked", tmp_path / "other", SEEDS)
    assert [line.partition(":")[0] for line in found[:-1]] == [folders[place].name for place in (0, 1, 3, 4)]
    assert found[-1].startswith("the tables differ")


# --- disks ------------------------------------------------------------------------------------------------------------


@needs_mount
@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_disk_that_becomes_full_fails_the_run_in_one_sentence_and_it_goes_on_elsewhere(tmp_path, executor):
    folder = prepared(tmp_path / "disk.before", steps=4000, block=1)
    said = sweep_on_small_disk(tmp_path / "disk", "256k", executor)
    assert isinstance(said, list)
    (state,) = said
    assert state["state"] == "failed"
    assert "No space left on device; free some space, then repeat the command" in state["message"]
    assert "\n" not in state["message"]

    left = tmp_path / "disk.after" / "runs" / folder.name
    assert not (left / "result.json").exists()
    assert runner.inspect_run(left).state in ("failed", "interrupted")  # the disk may have been too full to say why
    assert 0 < len(runner.read_metrics(left)["step"]) < 4000
    assert 0 < runner.inspect_run(left).step < 4000
    assert runner.execute(left).state == "finished"
    check_is_unbroken(left, steps=4000, block=1)


@needs_mount
@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_folder_that_may_only_be_read_is_told_in_one_sentence_and_stays_as_it_was(tmp_path, executor):
    waiting, broken = prepared(tmp_path / "disk.before"), prepared(tmp_path / "disk.before", raise_at=40)
    runner.execute(broken, checkpoint_every_s=0.0)
    before = files(tmp_path / "disk.before")
    said = sweep_on_small_disk(tmp_path / "disk", "1m", executor, then='mount -o remount,ro "$1"')
    assert isinstance(said, list)
    assert {Path(state["folder"]).name for state in said} == {waiting.name, broken.name}
    for state in said:
        assert state["state"] == "failed"
        assert "cannot write" in state["message"]
        assert "the file system is read-only: choose another folder" in state["message"]
        assert "\n" not in state["message"]
    assert files(tmp_path / "disk.after") == before


@needs_mount
def test_a_place_that_may_only_be_read_is_told_before_anything_runs(tmp_path):
    said = sweep_on_small_disk(tmp_path / "disk", "1m", "inline", then='mount -o remount,ro "$1"')
    assert said == (
        f"cannot write {tmp_path / 'disk' / 'runs' / counting.spec().folder_name}: Read-only file system; "
        "the file system is read-only: choose another folder"
    )


@needs_mount
@pytest.mark.parametrize(
    ("then", "reason"),
    [
        ('mount -o remount,ro "$1"', "Read-only file system; the file system is read-only: choose another folder"),
        (
            'head -c 1m /dev/zero > "$1/ballast" || true',
            "No space left on device; free some space, then repeat the command",
        ),
    ],
)
def test_status_works_on_a_disk_that_takes_nothing_and_report_says_why_not(tmp_path, then, reason):
    root = tmp_path / "disk.before"
    folders = list(soaking.prepare(root, 1, 0.0))
    runner.execute(folders[0])
    before = files(root)
    status, report = commands_on_small_disk(tmp_path / "disk", then)
    assert (status[0], status[2]) == (0, "")
    assert "runs: 1 finished, 1 pending" in status[1]
    assert report[0] == 2
    assert report[2].count("\n") == 1
    assert f"cannot write {tmp_path / 'disk' / 'report'}: {reason}" in report[2]
    after = files(tmp_path / "disk.after")
    assert {name: content for name, content in after.items() if name in before} == before


# --- two drivers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("executor", "pack"), [("inline", 1), ("processes", 1), ("processes", 3)])
def test_two_sweeps_of_the_same_folders_do_each_run_once(tmp_path, executor, pack):
    starts = (0.2, 0.3, 0.4)
    folders = [together.prepared(tmp_path, start=start, steps=150, sleep_s=0.005) for start in starts]
    code = (
        "import sys, json; from pathlib import Path; from alrc_lab import runner;"
        "states = runner.sweep(map(Path, sys.argv[3:]), executor=sys.argv[1], workers=1, checkpoint_every_s=0.05,"
        " largest_pack=int(sys.argv[2]));"
        "print(json.dumps([[state.state, state.message] for state in states]))"
    )
    command = [sys.executable, "-c", code, executor, str(pack), *map(str, folders)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdout": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen(command, **pipes) as one, subprocess.Popen(command, **pipes) as other:
        answers = [json.loads(process.communicate()[0]) for process in (one, other)]
    for folder, start, *told in zip(folders, starts, *answers, strict=True):
        check_is_unbroken(folder, start=start, steps=150)
        assert len(read(folder / "env.json")["attempts"]) == 1
        assert ["finished", ""] in told
        assert all(state in (["finished", ""], ["running", "another process is executing this run"]) for state in told)
