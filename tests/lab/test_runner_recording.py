"""Metrics that survive being cut anywhere, checkpoints that fit them, and the recorders that experiments see."""

from __future__ import annotations

import inspect
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

import counting_experiment as counting
from alrc_lab import runner
from alrc_lab.experiments.recorder import MemoryRecorder, Recorder
from alrc_lab.runner import FolderRecorder, MetricsWriter, recording
from alrc_lab.runner.folder import remove_drafts
from counting_experiment import INPUTS, files, prepared, read


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch) -> None:
    """Spare the disk in this process: fsync protects from power failures, which no test can cause."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# --- metrics ----------------------------------------------------------------------------------------------------------


def block(first: int, count: int) -> dict[str, np.ndarray]:
    steps = np.arange(first, first + count)
    return {"step": steps, "loss": np.sqrt(steps), "limit": np.sqrt(steps).astype(np.float32)}


def written(folder: Path) -> list[tuple[int, int]]:
    """Write four blocks; returns length of the file and number of rows after each."""
    writer = MetricsWriter(folder / "metrics.arrows")
    found = []
    for first, count in ((1, 4), (5, 1), (6, 7), (13, 2)):
        writer.append(block(first, count))
        found.append(((folder / "metrics.arrows").stat().st_size, first + count - 1))
    writer.finish()
    return found


def check_every_torn_tail(folder: Path, read_metrics) -> None:
    """Cut the file at every byte: exactly the blocks that are whole must be read."""
    marks = written(folder)
    whole = (folder / "metrics.arrows").read_bytes()
    for cut in range(len(whole) + 1):
        (folder / "metrics.arrows").write_bytes(whole[:cut])
        rows = max([rows for length, rows in marks if length <= cut], default=0)
        found = read_metrics(folder)
        if rows or found:
            assert found["step"].tolist() == list(range(1, rows + 1)), f"cut at {cut} of {len(whole)}"
            np.testing.assert_array_equal(found["loss"], np.sqrt(np.arange(1, rows + 1)))


def test_a_torn_tail_is_cut_off_wherever_it_is_torn(tmp_path):
    check_every_torn_tail(tmp_path, runner.read_metrics)


def reader_that_pads_what_is_missing(folder: Path) -> dict[str, np.ndarray]:
    """Known-wrong: takes a torn block for whole, with zeros where bytes are missing."""
    raw = (folder / "metrics.arrows").read_bytes() + bytes(4096)
    try:
        table = pa.ipc.open_stream(raw).read_all()
    except (pa.ArrowException, OSError):
        return {}
    return {name: table.column(name).to_numpy() for name in table.column_names}


def reader_that_gives_up(folder: Path) -> dict[str, np.ndarray]:
    """Known-wrong: a torn tail costs the whole file."""
    try:
        table = pa.ipc.open_stream((folder / "metrics.arrows").read_bytes()).read_all()
    except (pa.ArrowException, OSError):
        return {"step": np.empty(0), "loss": np.empty(0)}
    return {name: table.column(name).to_numpy() for name in table.column_names}


@pytest.mark.parametrize("reader", [reader_that_pads_what_is_missing, reader_that_gives_up])
def test_twin_readers_that_are_wrong_about_torn_tails_are_caught(tmp_path, reader):
    with pytest.raises(AssertionError):
        check_every_torn_tail(tmp_path, reader)


def test_metrics_of_a_run_that_logged_nothing(tmp_path):
    assert runner.read_metrics(tmp_path) == {}
    MetricsWriter(tmp_path / "metrics.arrows").finish()
    assert runner.read_metrics(tmp_path) == {}


def test_a_disk_that_takes_a_block_in_pieces_gets_all_of_it(tmp_path, monkeypatch):
    writer = MetricsWriter(tmp_path / "metrics.arrows")
    file = writer._file
    monkeypatch.setattr(writer, "_file", SimpleNamespace(write=lambda rest: file.write(rest[:7]), close=file.close))
    writer.append(block(1, 4))
    writer.close()
    assert runner.read_metrics(tmp_path)["step"].tolist() == [1, 2, 3, 4]


def test_the_stream_is_byte_for_byte_what_arrow_writes(tmp_path):
    written(tmp_path)
    schema = pa.schema([("step", pa.int64()), ("loss", pa.float64()), ("limit", pa.float32())])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as stream:
        for first, count in ((1, 4), (5, 1), (6, 7), (13, 2)):
            stream.write(pa.record_batch([pa.array(column) for column in block(first, count).values()], schema=schema))
    assert (tmp_path / "metrics.arrows").read_bytes() == sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"loss": np.ones(2)}, "needs a column 'step'"),
        ({"step": np.arange(5, 7), "loss": np.ones(3), "limit": np.ones(3, np.float32)}, "one length"),
        ({"step": np.ones((1, 1), int), "loss": np.ones((1, 1)), "limit": np.ones((1, 1))}, "1-D"),
        ({"step": np.array([5.0]), "loss": np.ones(1), "limit": np.ones(1)}, "whole numbers"),
        ({"step": np.array([4]), "loss": np.ones(1), "limit": np.ones(1, np.float32)}, "grow from 1, beyond .* 4"),
        ({"step": np.array([6, 6]), "loss": np.ones(2), "limit": np.ones(2, np.float32)}, "grow"),
        ({"step": np.array([5]), "loss": np.ones(1)}, r"first call had step \(int64\), loss \(double\), limit"),
        ({"step": np.array([5]), "loss": np.ones(1), "limit": np.ones(1)}, "limit"),
        ({"step": np.array([5]), "loss": np.array(["x"]), "limit": np.ones(1, np.float32)}, "'loss' holds"),
    ],
)
def test_rows_of_another_form_are_refused_and_nothing_is_written(tmp_path, columns, says):
    writer = MetricsWriter(tmp_path / "metrics.arrows")
    writer.append(block(1, 4))
    with pytest.raises(ValueError, match=says):
        writer.append(columns)
    writer.append(block(5, 1))
    writer.finish()
    assert runner.read_metrics(tmp_path)["step"].tolist() == [1, 2, 3, 4, 5]


# --- checkpoints ------------------------------------------------------------------------------------------------------


def interrupted(folder: Path) -> None:
    """Leave a folder as a kill after step 5 does: a checkpoint at 3, two more rows, a torn tail."""
    recorder = FolderRecorder(folder, INPUTS)
    assert recorder.resume() is None
    recorder.log(block(1, 3))
    recorder.checkpoint(2, lambda path: path.write_text("two"))
    recorder.checkpoint(3, lambda path: path.write_text("three"))
    recorder.log(block(4, 2))
    recorder.close()
    with (folder / "metrics.arrows").open("ab") as file:
        file.write(b"\xff\xff\xff\xff\x10")


def test_resuming_cuts_the_metrics_back_to_the_checkpoint(tmp_path):
    interrupted(tmp_path)
    assert read(tmp_path / "checkpoint" / "latest.json").items() >= {"step": 3, "file": "step-000000003.ckpt"}.items()
    assert {path.name for path in (tmp_path / "checkpoint").iterdir()} == {"latest.json", "step-000000003.ckpt"}
    recorder = FolderRecorder(tmp_path, INPUTS)
    found = recorder.resume()
    assert found is not None
    assert (found[0], found[1].read_text(), recorder.inputs) == (3, "three", INPUTS)
    assert runner.read_metrics(tmp_path)["step"].tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="beyond the last one logged"):
        recorder.log(block(3, 2))
    recorder.log(block(4, 3))
    recorder.finish()
    assert runner.read_metrics(tmp_path)["loss"].tolist() == np.sqrt(np.arange(1, 7)).tolist()


def test_an_entry_that_never_asks_to_resume_starts_from_zero(tmp_path):
    interrupted(tmp_path)
    recorder = FolderRecorder(tmp_path, INPUTS)
    recorder.log(block(1, 1))
    recorder.finish()
    assert runner.read_metrics(tmp_path)["step"].tolist() == [1]
    with pytest.raises(RuntimeError, match="before log"):
        recorder.resume()


@pytest.mark.parametrize("damage", ["shorter", "missing", "garbled"])
def test_a_checkpoint_that_does_not_fit_says_what_to_delete(tmp_path, damage):
    folder = prepared(tmp_path)
    interrupted(folder)
    if damage == "shorter":
        os.truncate(folder / "metrics.arrows", 100)
    elif damage == "missing":
        (folder / "checkpoint" / "step-000000003.ckpt").unlink()
    else:
        (folder / "metrics.arrows").write_bytes(b"\0" * 4000)
    before = files(folder)
    state = runner.execute(folder)
    assert state.state == "failed"
    assert "Delete" in state.message
    assert str(folder / "checkpoint") in state.message
    assert files(folder).items() >= before.items()  # bad input loses nothing
    for path in (folder / "checkpoint").iterdir():
        path.unlink()
    assert runner.execute(folder).summary == counting.expected(counting.config())[1]


def test_a_save_that_writes_elsewhere_or_raises_keeps_the_last_checkpoint(tmp_path):
    interrupted(tmp_path)
    recorder = FolderRecorder(tmp_path, INPUTS)
    recorder.resume()
    with pytest.raises(ValueError, match="suffix of its own"):
        recorder.checkpoint(4, lambda path: np.savez(path, x=np.ones(1)))

    def half(path: Path) -> None:
        path.write_text("ha")
        raise OSError("the power of cheese")

    with pytest.raises(OSError, match="cheese"):
        recorder.checkpoint(4, half)
    recorder.close()
    again = FolderRecorder(tmp_path, INPUTS)
    found = again.resume()
    assert found is not None
    assert found[1].read_text() == "three"
    again.checkpoint(4, lambda path: path.write_text("four"))
    again.close()
    assert {path.name for path in (tmp_path / "checkpoint").iterdir()} == {"latest.json", "step-000000004.ckpt"}


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """A clock for the recorder that stands still until it is moved."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(recording, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/fd to see which file is synced")
def test_a_checkpoint_survives_a_power_failure_at_any_moment(tmp_path, monkeypatch):
    """Everything latest.json promises must be on the disk before latest.json is."""
    events = []

    def fsync(descriptor: int) -> None:
        events.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink().name.split(".json.")[0]))

    def replace(self: Path, target: Path, original=Path.replace) -> Path:
        events.append(("rename to", target.name))
        return original(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    recorder = FolderRecorder(tmp_path, None)
    recorder.log(block(1, 3))
    recorder.checkpoint(3, lambda path: path.write_text("three"))
    recorder.close()
    assert events == [
        ("sync", "metrics.arrows"),
        ("sync", "draft"),
        ("rename to", "step-000000003.ckpt"),
        ("sync", "checkpoint"),
        ("sync", ".latest"),
        ("rename to", "latest.json"),
        ("sync", "checkpoint"),
    ]


def test_wall_time_counts_all_attempts_without_lost_work(tmp_path, clock):
    recorder = FolderRecorder(tmp_path, None)
    clock.now += 100
    recorder.checkpoint(1, lambda path: path.write_text("one"))
    clock.now += 30  # lost
    recorder.close()
    again = FolderRecorder(tmp_path, None)
    again.resume()
    clock.now += 5
    assert again.wall_s == 105
    again.close()


def test_a_checkpoint_is_due_when_its_time_has_come(tmp_path, clock):
    recorder = FolderRecorder(tmp_path, None)
    for _ in range(2):
        clock.now += 19.9
        assert not recorder.is_checkpoint_due()
        clock.now += 0.2
        assert recorder.is_checkpoint_due()
        recorder.checkpoint(1, lambda path: path.write_text("one"))
    recorder.close()


def test_progress_is_written_at_most_twice_a_second_with_the_rate_of_the_last_seconds(tmp_path, clock, monkeypatch):
    seen = []
    monkeypatch.setattr(recording, "write_json", lambda path, document, durable: seen.append(document))
    recorder = FolderRecorder(tmp_path, None)
    for step in range(1, 40_001):
        clock.now += 1 / 1000 if step <= 20_000 else 1 / 500
        recorder.progress(step, 40_000)
    assert len(seen) in (120, 121)
    assert {document["total"] for document in seen} == {40_000}
    assert seen[0]["steps_per_s"] is None
    assert seen[20]["steps_per_s"] == pytest.approx(1000)
    assert seen[-1]["steps_per_s"] == pytest.approx(500)


# --- the recorder of the experiments ----------------------------------------------------------------------------------


def test_both_recorders_keep_the_protocol(tmp_path):
    for recorder in (MemoryRecorder(), FolderRecorder(tmp_path, None)):
        assert isinstance(recorder, Recorder)
        for name in ("resume", "log", "is_checkpoint_due", "checkpoint", "progress"):
            wanted = list(inspect.signature(getattr(Recorder, name)).parameters)
            assert list(inspect.signature(getattr(type(recorder), name)).parameters) == wanted
    assert not isinstance(object(), Recorder)


def test_an_experiment_can_be_called_as_a_function(tmp_path):
    recorder = MemoryRecorder(INPUTS)
    outcome = counting.run(counting.config(), recorder)
    column, summary = counting.expected(counting.config())
    assert outcome["summary"] == summary
    np.testing.assert_array_equal(recorder.columns["x"], column)
    assert recorder.last_progress == (60, 60)

    first = MemoryRecorder(INPUTS, tmp_path / "checkpoints", checkpoint_every_s=0.0)
    with pytest.raises(ArithmeticError):
        counting.run(counting.config(raise_at=33), first)
    second = MemoryRecorder(INPUTS, tmp_path / "checkpoints")
    assert counting.run(counting.config(), second)["summary"] == summary
    assert second.columns["step"].tolist() == list(range(33, 61))
    with pytest.raises(ValueError, match="one length"):
        recorder.log({"step": np.array([61]), "x": np.ones(2)})


# --- files that stay --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [lambda folder: FolderRecorder(folder, INPUTS), lambda folder: MemoryRecorder(INPUTS, folder)]
)
def test_kept_files_stay_and_are_replaced(tmp_path, make) -> None:
    recorder = make(tmp_path)
    for text in ("first", "second"):
        recorder.keep("weights.bin", lambda path, text=text: path.write_text(text))
    assert (tmp_path / "weights.bin").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["weights.bin"]


def test_a_kept_file_is_whole_or_not_there(tmp_path) -> None:
    recorder = FolderRecorder(tmp_path, INPUTS)

    def breaks(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError("no space")

    with pytest.raises(RuntimeError, match="no space"):
        recorder.keep("weights.bin", breaks)
    assert not (tmp_path / "weights.bin").exists()
    remove_drafts(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["result.json", "a/b", "../x", ".hidden", "checkpoint"])
def test_names_that_are_not_free_are_refused(tmp_path, name) -> None:
    with pytest.raises(ValueError, match="plain name of a file"):
        FolderRecorder(tmp_path, INPUTS).keep(name, lambda path: path.write_text("x"))


def test_a_saver_that_writes_elsewhere_is_told(tmp_path) -> None:
    with pytest.raises(ValueError, match="must write to exactly"):
        FolderRecorder(tmp_path, INPUTS).keep("a.npz", lambda path: None)
