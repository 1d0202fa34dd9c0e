"""A study with several metrics, curves, references and pictures, as partial-STEM has, and what its report says."""

from __future__ import annotations

import csv
import json
import math
import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from scipy import stats as scipy_stats

from alrc_lab import report
from alrc_lab.report import plots, tables
from alrc_lab.report.canvas import save_picture, style
from alrc_lab.report.completions import collect_sheet, completions
from alrc_lab.report.held_out import held_out
from alrc_lab.report.overview import overview
from synthetic_study import SHA256, write_metrics, write_study

ROWS = {"mse": "MSE", "mse-alrc": "MSE + ALRC", "huber": "Huber", "huber-alrc": "Huber + ALRC"}
BASELINES = {"mse": None, "mse-alrc": "mse", "huber": "mse", "huber-alrc": "huber"}
METHODS = {"constant": "best constant", "linear": "linear interpolation (SciPy)"}
METHODS |= {"biharmonic": "biharmonic inpainting (scikit-image)"}
METRIC = {"key": "final_outer", "label": "raw loss L_out at the end", "factor": 1, "better": "lower"}
FURTHER = [
    {"key": "held_out_rms_percent", "label": "RMS error on held-out crops, %", "factor": 1, "better": "lower"},
    {"key": "held_out_outer", "label": "loss L_out on held-out crops", "factor": 1, "better": "lower"},
    {"key": "spike_share_outer", "label": "losses above ALRC's limit, %", "factor": 100, "better": "lower"},
    {"key": "fraction_limited_outer", "label": "losses that ALRC limited, %", "factor": 100, "better": None},
]
REFERENCES = {
    "folder": "runs/baselines-0123456789",
    "title": "Without a network",
    "methods": [{"key": key, "label": label} for key, label in METHODS.items()],
    "metrics": {"held_out_outer": "{key}_outer", "held_out_rms_percent": "{key}_rms_percent"},
}
RMS = {"constant": 15.94, "linear": 10.25, "biharmonic": 9.125}
CROPS, SIDE, SHOWN = 40, 16, 3


def dump(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def edit(path, change):
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    dump(path, content)


def write_run(path, identity, summary, rows, wall_s=10.0):
    """Write a finished run."""
    config = {"schema": 1, "identity": identity, "entry": "x:run", "config": {}, "inputs": {"sha256": SHA256}}
    dump(path / "config.json", config)
    dump(path / "env.json", {"attempts": [{"code_version": "0.1.0", "cpu": "Imaginary 9000", "cores": 2}]})
    write_metrics(path / "metrics.arrows", rows)
    result = {"status": "finished", "summary": summary, "steps": len(rows["step"]), "wall_s": wall_s}
    dump(path / "result.json", result | {"identity": identity})


def make_pictures(seed=0, count=SHOWN, side=SIDE):
    """Make the truth, scan and mask of some crops."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    truth = np.stack([np.sin(9 * (x * rng.uniform(-1, 1) + y) + 3 * i) for i in range(count)]).clip(-1, 1)
    mask = (rng.random((side, side)) < 0.25)[None].repeat(count, 0)
    names = np.array([f"micrograph {i}, row {2 * i}" for i in range(count)])
    halves = {"truth": truth, "scan": (truth + 1) / 2 * mask, "mask": mask}
    return {"names": names} | {name: array.astype(np.float16) for name, array in halves.items()}


def write_stem(root, *, seeds=5, steps=200, shown=None, change=None):
    """Write root/study.json, its run folders and one of references, with numbers made by formula.

    `shown` holds the arrays of `completions.npz` besides completions; `change` overwrites fields of study.json.
    """
    shown = shown or make_pictures()
    truth, runs = shown["truth"].astype(np.float64), []
    for i, cell in enumerate(ROWS):
        for seed in range(seeds):
            common, own = np.random.default_rng(seed), np.random.default_rng([seed, i])
            decay = 1 + 9 * np.exp(-np.arange(steps) / (0.08 * steps))
            level = (4.2, 3.7, 3.6, 3.62)[i] * (1 + 0.05 * common.standard_normal() + 0.01 * own.standard_normal())
            loss = level * decay * np.exp(0.5 * common.standard_normal(steps))
            limit = np.full(steps, np.inf)
            if cell.endswith("alrc"):
                limit[:] = 2.2 * level * decay
            limited = (loss > limit).astype(np.float64)
            inner = 1.3 * level * decay * np.exp(0.4 * own.standard_normal(steps))
            rows = {"step": np.arange(1, steps + 1), "loss_inner": inner, "loss_outer": loss}
            rows |= {"limit_inner": limit, "limit_outer": limit, "limited_outer": limited}
            outer = 1.3 * level
            summary = {"final_outer": float(loss[-40:].mean()), "held_out_outer": outer, "steps": steps}
            summary |= {"held_out_rms_percent": 50 * math.sqrt(outer / 200), "held_out_crops": CROPS}
            summary |= {"spike_share_outer": float((loss > 2.2 * level * decay).mean())}
            summary |= {"fraction_limited_outer": float(limited.mean())}
            folder = f"runs/stem-{cell}-s{seed}"
            write_run(root / folder, f"{i}{seed}" * 32, summary, rows)
            runs.append({"folder": folder, "cell": cell, "seed": seed})
            errors = (0.05 + 0.02 * i) * np.cos(np.arange(truth.size).reshape(truth.shape) + seed)
            pictures = (truth + errors).astype(np.float16)
            rms = 50 * np.sqrt(np.square(pictures - truth).mean((1, 2)))
            np.savez_compressed(root / folder / "completions.npz", **shown, completion=pictures, rms_percent=rms)
    numbers = {f"{key}_rms_percent": value for key, value in RMS.items()}
    numbers |= {f"{key}_outer": 200 * (value / 50) ** 2 for key, value in RMS.items()}
    rows = {"step": np.arange(1, CROPS + 1)} | {key: np.full(CROPS, numbers[f"{key}_outer"]) for key in METHODS}
    path = root / REFERENCES["folder"]
    write_run(path, "f" * 64, numbers, rows)
    made = {key: np.full_like(shown["truth"], 0.1 * i) for i, key in enumerate(METHODS)}
    np.savez_compressed(path / "completions.npz", **shown, **made)
    cells = [
        {"id": cell, "panel": "stem", "row": row, "column": "", "baseline": BASELINES[cell], "published": None}
        for cell, row in ROWS.items()
    ]
    study = {
        "schema": 1,
        "study": "partial-stem",
        "preset": "quick",
        "title": "Partial STEM: completions with and without limiting",
        "question": "Does limiting loss spikes lower the error of completions?",
        "data": {"name": "made-up micrographs", "source": "embedded", "images": 70, "sha256": SHA256},
        "metric": METRIC,
        "metrics": FURTHER,
        "curve": {"column": "loss_outer", "label": "loss L_out", "factor": 1, "boxcar": 20},
        "curves": [{"column": "loss_inner", "label": "loss L_in", "factor": 1, "boxcar": 30}],
        "stream": {"loss": "loss_outer", "limit": "limit_outer"},
        "panels": [{"id": "stem", "title": "Outer generator"}],
        "cells": cells,
        "runs": runs,
        "references": REFERENCES,
        "completions": {"file": "completions.npz", "seed": 0},
    }
    dump(root / "study.json", study | dict(change or {}))
    return Path(root)


@pytest.fixture(scope="module")
def stem(tmp_path_factory):
    return write_stem(tmp_path_factory.mktemp("stem"))


@pytest.fixture(scope="module")
def built(stem):
    return report.build(stem)


def in_results(root, cell, key):
    """Read a number of every run of a cell from its result.json, by nothing of the report."""
    files = sorted(root.glob(f"runs/stem-{cell}-s?/result.json"))
    return np.array([json.loads(file.read_text(encoding="utf-8"))["summary"][key] for file in files])


def interval_of(values):
    """Find the 95 % t interval of a mean with SciPy."""
    error = scipy_stats.sem(values)
    return scipy_stats.t.interval(0.95, len(values) - 1, values.mean(), error) if error else (values[0],) * 2


def records(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def printed(study, width):
    console = Console(width=width, file=StringIO(), force_terminal=False)
    console.print(report.render_text(study))
    return console.file.getvalue()


def drawn(study, draw, index=0):
    """Draw one figure, or one of several that belong together."""
    with style():
        found = draw(study)
    return found[index] if isinstance(found, list) else found


def kept(path):
    """Read what a run kept."""
    with np.load(path / "completions.npz") as content:
        return dict(content)


def check_summary(root, folder):
    """Fail unless summary.csv has, for every metric and condition, what SciPy finds in the results themselves."""
    paths = tables.write_csv(report.load(root), folder)
    lines = {(line["metric"], line["row"]): line for line in records(paths[0])}
    assert len(lines) == (1 + len(FURTHER)) * len(ROWS)
    for metric in (METRIC, *FURTHER):
        for cell, row in ROWS.items():
            line, values = lines[metric["key"], row], metric["factor"] * in_results(root, cell, metric["key"])
            assert int(line["n"]) == len(values)
            assert float(line["mean"]) == pytest.approx(values.mean(), rel=1e-9)
            assert (float(line["low"]), float(line["high"])) == pytest.approx(interval_of(values), rel=1e-9)
            baseline = BASELINES[cell]
            if baseline is None or metric["better"] is None:
                assert line["difference_mean"] == line["difference_p_value"] == ""
                continue
            other = metric["factor"] * in_results(root, baseline, metric["key"])
            assert float(line["difference_mean"]) == pytest.approx((values - other).mean(), rel=1e-9, abs=1e-12)
            if (values != other).any():
                expected = scipy_stats.ttest_rel(values, other).pvalue
                assert float(line["difference_p_value"]) == pytest.approx(expected, rel=1e-6)


def test_each_metric_has_its_own_estimates_and_tests(stem, tmp_path):
    check_summary(stem, tmp_path)


def test_the_check_of_the_summary_can_fail(tmp_path):
    write_stem(tmp_path, seeds=3, steps=80)
    check_summary(tmp_path, tmp_path)
    edit(tmp_path / "study.json", lambda s: s["metrics"][1].update(factor=2))
    with pytest.raises(AssertionError):
        check_summary(tmp_path, tmp_path)


def test_runs_and_references_are_tables_of_their_own(built, stem):
    runs = records(built.parent / "tables" / "runs.csv")
    assert [float(line["spike_share_outer"]) for line in runs if line["cell"] == "huber"] == pytest.approx(
        100 * in_results(stem, "huber", "spike_share_outer")
    )
    references = {(line["metric"], line["method"]): line for line in records(built.parent / "tables/references.csv")}
    assert {key: float(references["held_out_rms_percent", key]["value"]) for key in METHODS} == RMS
    assert {line["crops"] for line in references.values()} == {str(CROPS)}
    assert len(references) == 6


def test_overview_shows_all_metrics_and_what_differs(stem):
    study = report.load(stem)
    found = overview(study, "stem")
    assert found.head == tuple(metric["label"] for metric in (METRIC, *FURTHER))
    for (name, texts), cell in zip(found.settings, ROWS, strict=True):
        assert name == ROWS[cell]
        for text, metric in zip(texts, (METRIC, *FURTHER), strict=True):
            values = metric["factor"] * in_results(stem, cell, metric["key"])
            mean, std, *arrow = tables.plain(text).replace(" ±", "").split()
            assert float(mean) == pytest.approx(values.mean(), abs=0.006)
            assert float(std) == pytest.approx(values.std(ddof=1), abs=0.0006)
            differs = False
            if BASELINES[cell] and metric["better"]:
                other = metric["factor"] * in_results(stem, BASELINES[cell], metric["key"])
                differs = bool((values != other).any()) and scipy_stats.ttest_rel(values, other).pvalue < 0.05
                assert not arrow or arrow == ["↓" if values.mean() < other.mean() else "↑"]
            assert bool(arrow) == differs
    assert [texts[:3] for _, texts in found.references] == [
        ("", "15.94", "20.33"),
        ("", "10.25", "8.40"),
        ("", "9.12", "6.66"),
    ]
    assert found.references_title == (f"Without a network (no training, no seed: one mean over {CROPS} held-out crops)")


def test_the_number_of_comparisons_counts_every_metric(tmp_path, stem):
    assert "number of comparisons (12)." in " ".join(tables.remarks(report.load(stem)))  # 3 of each but the last
    write_stem(tmp_path, seeds=2, steps=60, change={"metrics": [], "references": None})
    assert "number of comparisons (3)." in " ".join(tables.remarks(report.load(tmp_path)))


def test_verdicts_name_metric_and_baseline(stem):
    study = report.load(stem)
    rows = {row.cell.id: row for row in tables.tabulate(study, study.metrics[1])}
    said = tables.plain(tables.verdict(study, rows["mse-alrc"]))
    assert said.startswith("MSE + ALRC lowers the RMS error on held-out crops by ")
    assert re.search(r"by \d\.\d % \[\d.\d, \d.\d\] against MSE, p < 0\.001, 5 pairs\.$", said)
    assert "against Huber, p = " in tables.plain(tables.verdict(study, rows["huber-alrc"]))
    described = tables.tabulate(study, study.metrics[-1])
    assert all(row.difference is None and tables.verdict(study, row) == "" for row in described)


def test_a_baseline_of_zero_has_differences_but_no_percentages(tmp_path):
    change = {"metrics": [FURTHER[-1] | {"better": "lower"}], "references": None}
    write_stem(tmp_path, seeds=3, steps=60, change=change)
    for i, cell in enumerate(ROWS):
        for seed in range(3):
            value = (0.01 + 0.001 * seed) * (i % 2)
            path = tmp_path / f"runs/stem-{cell}-s{seed}/result.json"
            edit(path, lambda r, v=value: r["summary"].update(fraction_limited_outer=v))
    study = report.load(tmp_path)
    rows = tables.tabulate(study, study.metrics[1])
    # Differences 1.0, 1.1, 1.2: mean 1.1, s 0.1, half width t(0.975, 2) · 0.1 / √3 = 4.303 · 0.0577 = 0.248.
    assert tables.plain(tables.verdict(study, rows[1])) == (
        "MSE + ALRC raises the losses that ALRC limited by 1.10 (the baseline is 0) [0.85, 1.35] against MSE, "
        "p = 0.003, 3 pairs."
    )


def test_a_metric_without_number_is_a_dash_and_a_remark(tmp_path):
    write_stem(tmp_path, seeds=2, steps=60, change={"completions": None, "stream": {}})
    lost = [("mse", 0, math.nan), ("huber", 0, None), ("huber", 1, math.inf)]
    for cell, seed, value in lost:
        path = tmp_path / f"runs/stem-{cell}-s{seed}/result.json"
        edit(path, lambda r, v=value: r["summary"].update(held_out_outer=v))
    study = report.load(tmp_path)
    assert study.counts["finished"] == 8
    rows = {row.cell.id: row for row in tables.tabulate(study, study.metrics[2])}
    assert [rows[cell].estimate.n for cell in ROWS] == [1, 2, 0, 2]
    assert rows["mse-alrc"].difference.n == 1
    assert tables.cells(rows["huber"], 2, 1)["mean"] == tables.UNDEFINED
    remarks = " ".join(tables.remarks(study))
    assert "crops, outer generator, MSE: no finite held_out_outer from seed 0; not in that mean." in remarks
    assert "Huber: no finite held_out_outer from seed 0, seed 1; not in that mean." in remarks
    json.dumps(report.to_json(study), allow_nan=False)
    page = report.build(tmp_path).read_text(encoding="utf-8")
    assert not re.search(r"<td[^>]*>(nan|None|inf)", page)
    assert tables.UNDEFINED in page
    for width in (80, 120):
        assert "nan" not in printed(study, width).lower()
    # The first metric decides what counts as failed, as it always did.
    edit(tmp_path / "runs/stem-mse-s0/result.json", lambda r: r["summary"].update(final_outer=math.nan))
    assert report.load(tmp_path).counts["failed"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["metrics"][0].update(better="more"), "metric 'held_out_rms_percent' must be 'lower', 'higher' or"),
        (lambda s: s["metrics"][0].update(key="final_outer"), "metric 'final_outer' is listed twice"),
        (lambda s: s["metrics"][0].pop("label"), "lacks the field 'label'"),
        (lambda s: s["curves"][0].pop("boxcar"), "lacks the field 'boxcar'"),
        (lambda s: s["references"]["metrics"].update(x="{key}"), "unknown metric 'x'; the study has final_outer,"),
        (lambda s: s["references"].pop("methods"), "lacks the field 'methods'"),
        (lambda s: s["completions"].pop("seed"), "lacks the field 'seed'"),
    ],
)
def test_optional_fields_that_contradict_the_study_are_refused(tmp_path, change, message):
    write_stem(tmp_path, seeds=1, steps=60)
    edit(tmp_path / "study.json", change)
    with pytest.raises(report.StudyError, match=re.escape(message)):
        report.load(tmp_path)


def test_each_curve_has_its_panel_and_its_boxcar(stem):
    drawing = drawn(report.load(stem), plots.learning_curves)
    assert [axes.get_title(loc="left") for axes in drawing.figure.axes] == ["loss L_out", "loss L_in"]
    assert "averages 20 (loss L_out) or 30 (loss L_in) steps" in drawing.caption
    study = report.load(stem)
    for axes, column, width in zip(drawing.figure.axes, ("loss_outer", "loss_inner"), (20, 30), strict=True):
        runs = [run.metrics(column)[column] for run in study.runs_of("mse")]
        expected = np.mean([np.convolve(values, np.full(width, 1 / width), "valid") for values in runs], axis=0)
        x, y = axes.lines[0].get_data()
        np.testing.assert_array_equal(x, np.arange(width, 201))
        np.testing.assert_allclose(y, expected, rtol=1e-9)
    assert len(drawing.runs) == 20  # each once, though drawn twice


def test_rule_is_explained_by_a_run_that_limits(stem):
    (run,) = drawn(report.load(stem), plots.rule_explained).runs
    assert (run.cell, run.seed) in {("mse-alrc", 0), ("huber-alrc", 0)}
    assert np.isfinite(run.metrics("limit_outer")["limit_outer"]).all()


def check_held_out(root, axes, key):
    """Fail unless the axes show each seed, SciPy's interval, and each reference at its number."""
    dots = [collection.get_offsets()[:, 0] for collection in axes.collections]
    bars = [line for line in axes.lines if line.get_linewidth() == 2.4]
    for cell, found, bar in zip(ROWS, dots, bars, strict=True):
        values = in_results(root, cell, key)
        np.testing.assert_allclose(np.sort(found), np.sort(values), rtol=1e-12)
        np.testing.assert_allclose(bar.get_xdata(), interval_of(values), rtol=1e-9)
    diamonds = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "D"]
    np.testing.assert_allclose(diamonds, list(RMS.values()))


def test_held_out_figure_shows_seeds_intervals_and_references(stem):
    drawing = drawn(report.load(stem), held_out)
    check_held_out(stem, drawing.figure.axes[0], "held_out_rms_percent")
    labels = [label.get_text() for label in drawing.figure.axes[0].get_yticklabels()]
    assert labels == [*ROWS.values(), *METHODS.values()]
    assert f"one mean over {CROPS} held-out crops, which has no interval over seeds" in drawing.caption
    with pytest.raises(AssertionError):
        check_held_out(stem, drawing.figure.axes[2], "held_out_rms_percent")  # that one shows the loss


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda p: [file.unlink() for file in p.iterdir()], "has no result yet (not started), so there is nothing"),
        (lambda p: (p / "result.json").unlink(), "has no result yet (not started), so there is nothing"),
        (
            lambda p: edit(p / "config.json", lambda c: c["inputs"].update(sha256="f" * 64)),
            f"made from data {'f' * 12}",
        ),
        (lambda p: (p / "result.json").write_text("{"), "result.json is not valid JSON"),
        (lambda p: edit(p / "result.json", lambda r: r["summary"].pop("linear_outer")), "no finite linear_outer."),
        (lambda p: edit(p / "result.json", lambda r: r.update(summary={})), "no finite constant_outer, linear_outer,"),
    ],
)
def test_references_that_are_not_there_are_told(tmp_path, change, told):
    write_stem(tmp_path, seeds=2, steps=60)
    change(tmp_path / REFERENCES["folder"])
    study = report.load(tmp_path)
    written = {path.name for path in tables.write_csv(study, tmp_path)}
    remarks = [remark for remark in tables.remarks(study) if remark.startswith("Without a network: runs/")]
    assert len(remarks) == 1
    assert told in remarks[0]
    has_numbers = "no finite linear_outer." in told
    assert ("references.csv" in written) is has_numbers
    assert ("‡" in printed(study, 100)) is has_numbers
    assert (drawn(study, held_out) is not None) is has_numbers


def picture_of(path, box, side):
    """Cut a picture out of a PNG and undo its enlargement, insisting that each pixel is one flat square."""
    with Image.open(path) as image:
        cut = np.asarray(image.convert("RGB"))[box[1] : box[3], box[0] : box[2]]
    k = cut.shape[0] // side
    assert cut.shape == (k * side, k * side, 3), cut.shape
    squares = cut.reshape(side, k, side, k, 3)
    assert (squares == squares[:, :1, :, :1]).all(), "a pixel is not one flat square"
    return squares[:, 0, :, 0].astype(int), k


def box_of(axes, height):
    left, bottom, right, top = axes.get_position().transformed(axes.figure.transFigure).extents
    scale = 160 / axes.figure.dpi
    return [round(x) for x in (left * scale, height - top * scale, right * scale, height - bottom * scale)]


@pytest.mark.parametrize(("side", "enlarged"), [(16, 12), (96, 2), (250, 1)])
def test_completions_are_shown_pixel_by_pixel_in_fixed_greys(tmp_path, side, enlarged):
    shown = make_pictures(count=2, side=side)
    write_stem(tmp_path, seeds=1, steps=60, shown=shown)
    drawing = drawn(report.load(tmp_path), completions)
    path = save_picture(drawing, tmp_path)
    with Image.open(path) as image:
        width, height = image.size
    assert drawing.width_px == width
    columns = [shown["truth"], 2.0 * shown["scan"].astype(float) - 1]
    for cell in ROWS:
        columns.append(kept(tmp_path / f"runs/stem-{cell}-s0")["completion"])
    columns += [kept(tmp_path / REFERENCES["folder"])[key] for key in METHODS]
    axes = drawing.figure.axes
    assert len(axes) == 2 * len(columns)
    for j, pictures in enumerate(columns):
        for i in range(2):
            found, k = picture_of(path, box_of(axes[2 * j + i], height), side)
            assert k == enlarged
            grey = 255 * (pictures[i].astype(float).clip(-1, 1) + 1) / 2
            np.testing.assert_allclose(found, grey[..., None].repeat(3, 2), atol=2)


def test_the_check_of_pixels_can_fail(tmp_path):
    drawing = np.random.default_rng(0).integers(0, 255, (16, 16)).astype(np.uint8)
    for name, how in (("sharp", Image.Resampling.NEAREST), ("smooth", Image.Resampling.BILINEAR)):
        Image.fromarray(drawing).resize((96, 96), how).save(tmp_path / f"{name}.png")
    picture_of(tmp_path / "sharp.png", (0, 0, 96, 96), 16)
    with pytest.raises(AssertionError, match="flat square"):
        picture_of(tmp_path / "smooth.png", (0, 0, 96, 96), 16)


def test_errors_are_signed_percentages_on_one_scale(stem):
    drawing = drawn(report.load(stem), completions, 1)
    images = [axes.images[0] for axes in drawing.figure.axes if axes.images]
    truth, errors = images[:SHOWN], images[SHOWN:]
    assert {image.get_clim() for image in truth} == {(-1.0, 1.0)}
    ((low, high),) = {image.get_clim() for image in errors}
    assert low == -high
    assert f"beyond ±{high:g} %" in drawing.caption
    texts = [text.get_text() for text in drawing.figure.texts]
    folders = [f"runs/stem-{cell}-s0" for cell in ROWS] + [REFERENCES["folder"]] * 3
    trained = []
    for j, (folder, key) in enumerate(zip(folders, ["completion"] * 4 + list(METHODS), strict=True)):
        arrays = kept(stem / folder)
        wrong = 50 * (arrays[key].astype(float) - arrays["truth"].astype(float))  # 2 of the range are 100 %
        trained += [wrong] if j < 4 else []
        for i in range(SHOWN):
            np.testing.assert_allclose(errors[SHOWN * j + i].get_array(), wrong[i], atol=1e-12)
            assert f"{np.sqrt(np.square(wrong[i]).mean()):.2f} %" in texts
    assert (np.abs(trained) <= high).mean() >= 0.99
    brighter = drawing.figure.axes[SHOWN].images[0].cmap(1.0)
    assert brighter[0] > brighter[2], "what is too bright must be red, as the caption says"


def test_numbers_above_pictures_are_the_kept_ones(tmp_path):
    write_stem(tmp_path, seeds=1, steps=60)
    path = tmp_path / "runs/stem-huber-s0/completions.npz"
    arrays = kept(path.parent) | {"rms_percent": np.array([77.125, np.nan, 3.0])}
    np.savez_compressed(path, **arrays)
    texts = [text.get_text() for text in drawn(report.load(tmp_path), completions).figure.texts]
    assert "77.12 %" in texts
    assert tables.UNDEFINED in texts  # not nan


def test_pictures_that_cannot_be_shown_are_told(tmp_path):
    write_stem(tmp_path, seeds=1, steps=60)
    (tmp_path / "runs/stem-mse-s0/result.json").unlink()
    (tmp_path / "runs/stem-mse-alrc-s0/completions.npz").write_bytes(b"PK\x03\x04 torn")
    path = tmp_path / REFERENCES["folder"] / "completions.npz"
    np.savez_compressed(path, **kept(path.parent) | make_pictures(seed=5))
    sheet = collect_sheet(report.load(tmp_path))
    assert [column.title for column in sheet.columns] == ["Huber", "Huber + ALRC"]
    told = " ".join(sheet.lost)
    assert "MSE: missing (not started)." in told
    assert "MSE + ALRC: completions.npz of runs/stem-mse-alrc-s0 cannot be shown (" in told
    assert (
        f"{', '.join(METHODS.values())}: completions.npz of {REFERENCES['folder']} cannot be shown (its truth" in told
    )
    drawing = drawn(report.load(tmp_path), completions)
    assert told.split(". ")[0] in drawing.caption
    for name, change in (("lacks 'completion'", {"completion": None}), ("has shape", {"scan": np.zeros((1, 2, 2))})):
        path = tmp_path / "runs/stem-huber-s0/completions.npz"
        arrays = kept(tmp_path / "runs/stem-huber-alrc-s0") | change
        np.savez_compressed(path, **{key: value for key, value in arrays.items() if value is not None})
        assert name in " ".join(collect_sheet(report.load(tmp_path)).lost)
    path.unlink()
    np.savez_compressed(tmp_path / REFERENCES["folder"] / "completions.npz", names=np.array(["torn"]))
    assert "runs/stem-huber-s0 cannot be shown (it is not there)" in " ".join(collect_sheet(report.load(tmp_path)).lost)
    (tmp_path / "runs/stem-huber-alrc-s0/completions.npz").unlink()
    assert collect_sheet(report.load(tmp_path)) is None


class Balance(HTMLParser):
    """Insist that every tag is closed in order, and keep the cells of each line of a table."""

    def __init__(self):
        super().__init__()
        self.open, self.lines = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        if tag == "tr":
            self.lines.append(0)
        if tag in ("td", "th"):
            self.lines[-1] += int(dict(attrs).get("colspan", 1))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"
        if tag == "table":
            assert len(set(self.lines)) == 1, f"lines of one table have {sorted(set(self.lines))} cells"
            self.lines = []


def test_page_has_every_metric_and_whole_tables(built):
    page = built.read_text(encoding="utf-8")
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    for metric in (METRIC, *FURTHER):
        assert metric["label"] in page.replace("&#39;", "'")
    assert page.count("Without a network (no training, no seed: one mean over 40 held-out crops)") == 3
    assert 'src="data:image/png;base64,' in page
    assert "figures/completions.png" in page
    assert "figures/completions.svg" not in page
    with pytest.raises(AssertionError, match="cells"):
        Balance().feed(page.replace("<td>15.94</td>", "", 1))


def test_a_report_is_the_same_every_time(built, stem):
    first = {path: path.read_bytes() for path in (stem / "report").rglob("*.*")}
    report.build(stem)
    assert {path: path.read_bytes() for path in (stem / "report").rglob("*.*")} == first


@pytest.mark.parametrize("width", [80, 100, 140])
def test_text_fits_and_never_breaks_a_number(stem, width):
    study = report.load(stem)
    lines = [line.rstrip() for line in printed(study, width).splitlines()]
    assert max(map(len, lines[:-1])) <= width
    assert "…" not in "".join(lines)
    found = overview(study, "stem")
    for name, texts in (*found.settings, *found.references):
        start = name.split(" (")[0].split(" ")[0]
        for text in filter(None, texts):
            assert any(line.startswith(start) and tables.plain(text) in line for line in lines), (name, text)
    assert "Without a network (no training, no seed: one mean over 40 held-out crops)" in " ".join(lines)


def test_a_study_without_the_optional_fields_is_reported_as_before(tmp_path):
    parts = []
    for name, change in (("absent", {}), ("empty", {"metrics": [], "curves": [], "references": None})):
        change |= {"completions": None} if name == "empty" else {}
        write_study(tmp_path / name, panels={"quartic": ("∞", "3")}, seeds=2, steps=30, change=change)
        report.build(tmp_path / name)
        files = sorted((tmp_path / name / "report").rglob("*.*"))
        parts.append({path.name: path.read_bytes() for path in files})
    assert parts[0] == parts[1]
    assert {name for name in parts[0] if name.endswith(".csv")} == {"runs.csv", "summary.csv"}
    header = parts[0]["summary.csv"].decode().split("\n")[0]
    assert header == (
        "panel,column,row,baseline,finished,diverged,failed,missing,mean,std,low,high,difference_n,difference_mean,"
        "difference_low,difference_high,difference_relative,difference_p_value,published_mean,published_std,published_n"
    )
    header = parts[0]["runs.csv"].decode().split("\n")[0]
    assert header == "folder,identity,cell,seed,status,value,detail,steps,wall_s,code_version,hardware"
    assert b"sheet" not in parts[0]["index.html"]
    assert "metrics" not in report.to_json(report.load(tmp_path / "absent"))
