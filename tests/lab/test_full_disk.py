"""A disk that becomes full, at every place where a sweep writes: told in one sentence, and nothing is corrupt."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import counting_experiment as counting
import counting_together as together
from alrc_lab import runner
from alrc_lab.runner import execute
from alrc_lab.runner.attempt import execute_together
from counting_experiment import check_is_unbroken, read, spec

CHANGES = {"steps": 3, "block": 2}
STUDY = {"study": "counting", "preset": "smoke", "data": counting.INPUTS, "panels": [], "cells": [], "runs": []}
LEFT = {"config.json", "env.json", "metrics.arrows", "progress.json", "result.json", "run.lock", "checkpoint"}


class File:
    """A file on a disk that may have no room: it then takes half of what is written."""

    def __init__(self, file: Any, take: Callable[[], None]) -> None:
        self._file, self._take = file, take

    def write(self, content: Any) -> int:
        try:
            self._take()
        except OSError:
            self._file.write(content[: len(content) // 2])
            raise
        return self._file.write(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> File:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


class Disk:
    """Count the places where something is written; at the place `full_at`, or from there on, there is no room."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = self.full_at = 0
        self.stays_full = False
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # real ones take a minute, and save nothing here
        for owner, name in ((Path, "mkdir"), (Path, "replace"), (os, "fsync")):
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name)))
        open_path, open_os = Path.open, os.open

        def open_file(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if not set(mode) & set("wax+"):
                return open_path(path, mode, *arguments, **options)
            if not path.exists():
                self.take()
            return File(open_path(path, mode, *arguments, **options), self.take)

        def open_low(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
            if flags & os.O_CREAT and not os.path.exists(path):  # noqa: PTH110 - what os.open is given
                self.take()
            return open_os(path, flags, *arguments, **options)

        monkeypatch.setattr(Path, "open", open_file)
        monkeypatch.setattr(os, "open", open_low)

    def take(self) -> None:
        """Write something, if there is room."""
        self.calls += 1
        if self.full_at and (self.calls == self.full_at or (self.stays_full and self.calls > self.full_at)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextmanager
    def full(self, place: int, *, stays: bool) -> Iterator[None]:
        """Have no room at a place, counted from now."""
        self.calls, self.full_at, self.stays_full = 0, place, stays
        yield
        self.full_at = 0

    def _counted(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def function(*arguments: Any, **options: Any) -> Any:
            self.take()
            return original(*arguments, **options)

        return function


def sweep_alone(root: Path) -> list[runner.RunState]:
    """What the command does, with one run."""
    runner.write_study(root, STUDY)
    return [execute(runner.prepare(spec(**CHANGES), root), checkpoint_every_s=0.0)]


def sweep_packed(root: Path) -> list[runner.RunState]:
    """What the command does, with a pack of two."""
    folders = [together.prepared(root, start=start, **CHANGES) for start in (0.3, 0.4)]
    return execute_together(folders, checkpoint_every_s=0.0)


def check_all_is_whole(root: Path) -> None:
    """Fail if a file under its final name is torn."""
    for path in root.rglob("*.json"):
        if not path.name.startswith("."):
            read(path)
    for folder in root.glob("runs/*"):
        assert runner.inspect_run(folder).state in ("pending", "interrupted", "failed", "finished")
        columns = runner.read_metrics(folder)
        assert list(columns.get("step", [])) == list(range(1, 1 + len(columns.get("step", []))))


@pytest.mark.parametrize("stays", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("sweep", [sweep_alone, sweep_packed])
def test_wherever_the_disk_is_full_the_reason_is_told_and_nothing_is_corrupt(tmp_path, monkeypatch, sweep, stays):
    disk = Disk(monkeypatch)
    kinds: set[str] = set()
    for place in range(1, 1000):
        root = tmp_path / str(place)
        states: list[runner.RunState] = []
        with disk.full(place, stays=stays):
            try:
                states = sweep(root)
                told = [state.message for state in states if not state.is_done]
            except OSError as error:
                told = [str(error)]
            if disk.calls < place:
                break
        check_all_is_whole(root)
        # The room that lacked for one run of a pack may be there when each is tried alone.
        if not (states and sweep is sweep_packed and not stays):
            assert told or all(state.is_done for state in states)
        for message in told:
            assert "No space left on device; free some space, then repeat the command" in message, place
            assert "\n" not in message
            kinds.add(message.partition("cannot write ")[2].partition(":")[0].rpartition("/")[2])
        for state in sweep(root):
            assert state.state == "finished"
        for folder in root.glob("runs/*"):
            start = read(folder / "config.json")["config"]["start"]
            check_is_unbroken(folder, start=start, **CHANGES)
            assert {path.name for path in folder.iterdir()} <= LEFT, place
    assert place > 40
    assert sweep is sweep_packed or kinds >= {
        "config.json",
        "env.json",
        "metrics.arrows",
        "latest.json",
        "result.json",
        "run.lock",
    }, kinds


def test_a_saver_that_hides_a_full_disk_is_found_out(tmp_path, monkeypatch):
    """As torch does, which raises a RuntimeError of its own."""
    disk = Disk(monkeypatch)
    recorder = runner.FolderRecorder(tmp_path, None)
    recorder.log({"step": counting.np.arange(1, 3)})

    def save(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError("inline_container.cc: unexpected pos 64 vs 0")

    with pytest.raises(RuntimeError, match="unexpected pos"):
        recorder.checkpoint(2, save)

    def save_on_full(path: Path) -> None:
        path.write_text("half")
        disk.calls, disk.full_at, disk.stays_full = 0, 1, True
        raise RuntimeError("inline_container.cc: unexpected pos 64 vs 0")

    with pytest.raises(OSError, match=r"cannot write .*\.ckpt: No space left on device; free some space"):
        recorder.checkpoint(2, save_on_full)
    assert list((tmp_path / "checkpoint").iterdir()) == [], "the draft gave its room back"
    recorder.close()


def test_twin_a_writer_that_tears_its_file_is_caught(tmp_path, monkeypatch):
    disk = Disk(monkeypatch)

    def write_in_place(path: Path, document: dict[str, Any], *, durable: bool = True) -> None:
        with path.open("w") as file:
            file.write(json.dumps(document))

    monkeypatch.setattr(runner.attempt, "write_json", write_in_place)
    with pytest.raises((AssertionError, ValueError)):  # noqa: PT012 - some place is the one
        for place in range(1, 1000):
            with disk.full(place, stays=False):
                with suppress(OSError):
                    sweep_alone(tmp_path / str(place))
                if disk.calls < place:
                    break
            check_all_is_whole(tmp_path / str(place))
