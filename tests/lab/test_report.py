"""Reading a made-up study from disk, and what the report says about it in words, text and JSON."""

from __future__ import annotations

import json
import math
import re
from io import StringIO

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from alrc_lab import report
from alrc_lab.report import tables
from synthetic_study import LOST, PUBLISHED, SHA256, write_metrics, write_study


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("whole"), seeds=4)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("half"), status=LOST)


def printed(study, width):
    console = Console(width=width, file=StringIO(), force_terminal=False)
    console.print(report.render_text(study))
    return console.file.getvalue()


def edit(path, change):
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def test_load_reads_values_in_printed_units(whole):
    study = report.load(whole)
    assert study.counts == {"finished": 20, "diverged": 0, "failed": 0, "missing": 0}
    for cell in study.cells:
        for run in study.runs_of(cell):
            with pa.OSFile(str(run.path / "metrics.arrows")) as file, pa.ipc.open_stream(file) as stream:
                error = stream.read_all()["error"].to_numpy()
            assert study.values(cell)[run.seed] == pytest.approx(100 * error[-20:].mean(), rel=1e-12)
            assert run.environment["code_version"] == "0.1.0"  # of the last attempt
            assert run.hardware == "Imaginary 9000, 2 cores"
    quartic = study.cells["quartic-3"]
    assert (quartic.published.mean, quartic.published.std) == PUBLISHED["quartic", "3"]
    assert (study.columns, quartic.baseline) == (("batch 1",), "quartic-∞")


def test_load_works_on_a_half_finished_sweep(half):
    study = report.load(half)
    assert study.counts == {"finished": 10, "diverged": 1, "failed": 1, "missing": 3}
    told = {(run.cell, run.seed): (run.status, run.detail) for run in study.runs}
    assert told["quartic-∞", 2] == ("diverged", "diverged at step 72")
    assert told["quartic-3", 1] == ("missing", "reached step 60 of 120")
    assert told["squared-3", 3] == ("failed", "OSError: disk <full>")
    assert told["squared-∞", 3] == told["quartic-2", 3] == ("missing", "not started")


def test_a_torn_stream_gives_every_whole_batch(tmp_path, half):
    study = report.load(half)
    torn = study.runs_of("quartic-3")[0].metrics("error", "limit")
    assert len(torn["step"]) == len(torn["error"]) == 60
    assert torn["step"].dtype == np.int64
    rows = {"step": np.arange(1, 101), "error": np.linspace(0, 1, 100)}
    folder = study.runs_of("quartic-3")[0].path.parent / "cut"
    folder.mkdir()
    path = folder / "metrics.arrows"
    write_metrics(path, rows)
    content = path.read_bytes()
    run = report.Run("runs/cut", folder, "quartic-3", 1, "missing")
    lengths = set()
    for cut in range(0, len(content) + 1, 7):
        path.write_bytes(content[:cut])
        found = run.metrics("error")
        lengths.add(len(found["step"]))
        np.testing.assert_array_equal(found["step"], rows["step"][: len(found["step"])])
        np.testing.assert_array_equal(found["error"], rows["error"][: len(found["step"])])
    assert lengths == {0, 25, 50, 75, 100}
    with pytest.raises(report.StudyError, match=r"no column 'lost'; it has step, error"):
        run.metrics("lost")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(schema=2), "has schema 2; this version of alrc reads schema 1"),
        (lambda s: s.pop("schema"), "has schema None"),
        (lambda s: s.pop("panels"), "lacks the field 'panels'"),
        (lambda s: s["metric"].pop("factor"), "lacks the field 'factor'"),
        (lambda s: s["metric"].update(better="more"), "must be 'lower' or 'higher', got 'more'"),
        (lambda s: s["cells"][0].update(panel="x"), "unknown panel 'x'"),
        (lambda s: s["cells"][1].update(baseline="x"), "unknown baseline 'x'"),
        (lambda s: s["runs"][0].update(cell="x"), "unknown cell 'x'"),
        (lambda s: s["runs"][1].update(seed=1), "lists seed 1 twice"),
    ],
)
def test_a_study_that_contradicts_itself_is_refused(tmp_path, change, message):
    write_study(tmp_path, seeds=2, steps=30)
    edit(tmp_path / "study.json", change)
    with pytest.raises(report.StudyError, match=re.escape(message)):
        report.load(tmp_path)


def test_a_folder_without_study_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(report.StudyError, match=r"holds no study\.json"):
        report.build(tmp_path)
    (tmp_path / "study.json").write_text("{half")
    with pytest.raises(report.StudyError, match="not valid JSON"):
        report.build(tmp_path)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("file", "change", "detail"),
    [
        ("result.json", lambda r: r.update(identity="0" * 64), "different identities"),
        ("result.json", lambda r: r["summary"].update(final_error=None), "no finite 'final_error', but None"),
        ("result.json", lambda r: r["summary"].update(final_error=math.inf), "no finite 'final_error', but inf"),
        ("result.json", lambda r: r.update(summary={}), "no finite 'final_error'"),
        ("result.json", lambda r: r.update(status="odd"), "unknown status 'odd'"),
        ("config.json", lambda c: c["inputs"].update(sha256="f" * 64), f"made from data {'f' * 12}"),
    ],
)
def test_a_result_that_cannot_be_trusted_counts_as_failed(tmp_path, file, change, detail):
    write_study(tmp_path, seeds=2, steps=30)
    edit(report.load(tmp_path).runs[0].path / file, change)
    study = report.load(tmp_path)
    assert study.runs[0].status == "failed"
    assert detail in study.runs[0].detail
    assert list(study.values(study.runs[0].cell)) == [2]


def test_unreadable_and_unknown_run_files(tmp_path):
    write_study(tmp_path, seeds=1, steps=30)
    first = report.load(tmp_path).runs[0].path
    (first / "result.json").write_text('{"status": ')
    assert "result.json is not valid JSON" in report.load(tmp_path).runs[0].detail
    edit(first / "config.json", lambda c: c.update(schema=9))
    with pytest.raises(report.StudyError, match=r"config\.json has schema 9"):
        report.load(tmp_path)


def test_runs_made_by_several_code_versions_are_told(tmp_path):
    write_study(tmp_path, seeds=1, steps=30)
    assert report.load(tmp_path).warnings == ()
    path = report.load(tmp_path).runs[0].path / "env.json"
    edit(path, lambda e: e["attempts"][-1].update(code_version="0.2.0"))
    assert report.load(tmp_path).warnings == (
        "The runs were made by 2 versions of the code: 0.1.0 (4 runs), 0.2.0 (1 runs).",
    )


def test_verdicts_say_what_the_numbers_say(tmp_path):
    write_study(tmp_path, seeds=6, steps=30)
    wanted = {
        "quartic-∞": [4.0, 4.1, 4.2, 4.3, 4.4, 4.5],
        "quartic-3": [3.8, 3.8, 4.0, 4.0, 4.1, 4.3],
        "quartic-2": [4.2, 3.9, 4.4, 4.1, 4.6, 4.3],
        "squared-∞": [5.0] * 6,
        "squared-3": [5.1, 5.2, 5.15, 5.1, 5.2, 5.15],
    }
    for run in report.load(tmp_path).runs:
        value = wanted[run.cell][run.seed - 1] / 100
        edit(run.path / "result.json", lambda r, v=value: r["summary"].update(final_error=v))
    study = report.load(tmp_path)
    said = [tables.plain(tables.verdict(study, row)) for row in tables.tabulate(study)]
    # Differences −0.2 −0.3 −0.2 −0.3 −0.3 −0.2: mean −0.25, s 0.0548, half width 2.5706 · 0.0548 / √6 = 0.0575.
    assert said == [
        "",
        "n = 3 lowers the quartic error by 5.9 % [4.5, 7.2], p < 0.001, 6 pairs.",
        "n = 2: no difference in the quartic error detected: +0.0 % [−5.4, +5.4], p = 1.000, 6 pairs.".replace(
            "+0.0", "0.0"
        ),
        "",
        "n = 3 raises the squared error by 3.0 % [2.1, 3.9], p < 0.001, 6 pairs.",
    ]


def test_verdicts_without_enough_pairs(half):
    study = report.load(half)
    rows = {row.cell.id: row for row in tables.tabulate(study)}
    assert rows["quartic-3"].difference.n == 1  # seed 1 torn, seed 2 of the baseline diverged
    assert "no verdict on the quartic error (1 pair of finished runs, two are needed)" in tables.plain(
        tables.verdict(study, rows["quartic-3"])
    )


@pytest.mark.parametrize(
    ("value", "places", "expected"),
    [(3.5901, 2, "3.59"), (-0.0004, 2, "0.00"), (-1.5, 1, "−1.5"), (None, 2, "–"), (2.5e7, 2, "2.50e+07")],
)
def test_numbers_for_people(value, places, expected):
    assert tables.number(value, places) == expected


@pytest.mark.parametrize("width", [80, 100, 120])
def test_text_never_breaks_a_number(half, width):
    study = report.load(half)
    lines = printed(study, width).splitlines()
    assert lines[0] == f"Data: made-up images · 8,068 images · sha256 {SHA256[:12]} · embedded"
    assert max(len(line.rstrip()) for line in lines if "No report" not in line and "Report:" not in line) <= width
    text = "\n".join(lines)
    assert "…" not in text
    for row in tables.tabulate(study):
        texts = tables.cells(
            row, tables.decimals(r for r in tables.tabulate(study) if r.cell.panel == row.cell.panel), 1
        )
        shown = [tables.plain(texts[key]) for key in ("mean", "interval", "published", "difference")]
        line = next((line for line in lines if all(part in line for part in shown[:3])), None)
        assert line, f"{shown} is on no line of\n{text}"
    assert "10 of 15 runs finished; 1 diverged, 1 failed, 3 missing." in " ".join(text.split())
    assert "∞ †" in text
    assert "seed 2 diverged at step 72; not in the mean" in text
    assert "OSError: disk <full>" in text
    assert "Not the paper's protocol:" in text
    assert "· Width 16 instead of 64." in text


def test_text_of_a_whole_study_is_one_table_a_panel_at_100_columns(whole):
    study = report.load(whole)
    results = printed(study, 100).partition("published and ours")[0]
    assert results.count("95 % interval") == 2 * printed(study, 80).count("vs n = ∞")
    assert (
        "diverged" not in printed(study, 100).split("\n", 3)[3]
    )  # no columns of zeros: the second line has the counts
    assert "paired by seed" in printed(study, 100)


def test_json_holds_everything_and_no_nan(half):
    content = json.loads(json.dumps(report.to_json(report.load(half)), allow_nan=False))
    assert content["counts"] == {"finished": 10, "diverged": 1, "failed": 1, "missing": 3}
    cells = {cell["id"]: cell for cell in content["cells"]}
    assert cells["quartic-3"]["difference"]["n"] == 1
    assert cells["quartic-∞"]["difference"] is None
    assert len(content["runs"]) == 15


def test_grid_of_many_cells_in_text(tmp_path):
    columns = ("batch 1", "batch 4", "batch 16", "batch 64")
    rows = {"squared": ("∞", "3", "4"), "quartic": ("∞", "2", "3", "4")}
    write_study(tmp_path, panels=rows, columns=columns, seeds=2, steps=40)
    study = report.load(tmp_path)
    assert len(study.cells) == 28
    text = printed(study, 80)
    assert max(map(len, text.splitlines()[:-1])) <= 80
    assert "…" not in text
    assert re.search(r"n +batch 1 +batch 4 +batch 16 +batch 64", text)
