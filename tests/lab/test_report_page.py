"""The page against an HTML parser, and the figures against the numbers they draw."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from alrc_lab import report
from alrc_lab.report import plots, tables
from alrc_lab.report.canvas import style
from synthetic_study import LOST, PUBLISHED, SHA256, write_metrics, write_study


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("whole"), seeds=4)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("half"), status=LOST)


@pytest.fixture(scope="module")
def built(half):
    return report.build(half)


class Page(HTMLParser):
    """Collect cells and resources, and insist that every tag is closed in order."""

    VOID = frozenset({"meta", "img", "br", "link", "hr", "input"})

    def __init__(self):
        super().__init__()
        self.open, self.cells, self.links, self.ids, self.text = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")
        for key, value in attrs:
            if key in ("src", "href"):
                self.links.append(value)
            if key == "id":
                self.ids.append(value)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data):
        if "td" in self.open or "th" in self.open:
            self.cells[-1] += data
        if "style" not in self.open:
            self.text.append(data)


def check_page(page):
    """Fail unless a page is well formed, self-contained and free of leaked Python values."""
    parser = Page()
    parser.feed(page)
    parser.close()
    assert parser.open == [], f"never closed: {parser.open}"
    leaked = [cell for cell in parser.cells if re.search(r"\b(nan|None|inf|NaN|True|False)\b", cell)]
    assert not leaked, f"leaked into cells: {leaked}"
    outside = [link for link in parser.links if not link.startswith(("data:", "#", "figures/", "tables/"))]
    assert not outside, f"not self-contained: {outside}"
    assert "url(" not in page.replace("url(#", ""), "the style loads something"
    inner = {link[1:] for link in parser.links if link.startswith("#")}
    assert inner <= set(parser.ids), f"dead links: {inner - set(parser.ids)}"
    assert len(parser.ids) == len(set(parser.ids))
    return parser


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("<div><p></div>", "closes <p>"),
        ("<div>", "never closed"),
        ("<table><td>3 ± nan</td></table>", "leaked"),
        ("<table><td>None</td></table>", "leaked"),
        ('<img src="https://example.org/x.png">', "not self-contained"),
        ('<link href="style.css">', "not self-contained"),
        ("<style>a { background: url(x.png) }</style>", "loads something"),
        ('<a href="#gone">x</a>', "dead links"),
    ],
)
def test_the_page_check_can_fail(broken, message):
    with pytest.raises(AssertionError, match=message):
        check_page(broken)


def test_page_is_complete(built, half):
    page = built.read_text(encoding="utf-8")
    parser = check_page(page)
    text = " ".join(" ".join(parser.text).split())
    assert built == half / "report" / "index.html"
    title = "Table 1: errors with and without limiting"
    # Right after the head (title) come the heading and the data.
    assert text.startswith(f"{title} {title} Data: made-up images · 8,068 images · sha256 {SHA256} · embedded")
    study = report.load(half)
    for row in tables.tabulate(study):
        assert row.cell.published.std is not None
        for part in (f"{row.cell.published.mean:.2f}\xa0±\xa0{row.cell.published.std:.3f}", f"{row.estimate.mean:.2f}"):
            assert any(part in cell for cell in parser.cells), part
    for run in study.runs:
        short = run.identity[:10] or run.folder.split("/")[-1]
        assert f"run-{short}" in parser.ids
    for part in (
        "How this differs from the published protocol Width 16 instead of 64.",
        "10 of 15 runs finished",
        "Every number here is made up.",
        "diverged at step 72",
        "Python 3.12.3, numpy 2.0.0, torch 2.6.0",
        "alrc report DIR",
        "0.1.0 (0123456789)",
        "Imaginary 9000, 2 cores",
    ):
        assert part in text, part
    assert "disk &lt;full&gt;" in page
    assert "<full>" not in page


def test_hostile_words_stay_words(tmp_path):
    evil = "<script>alert(1)</script>"
    change = {"title": evil, "question": evil, "differences": [evil], "notes": [evil]}
    write_study(tmp_path, seeds=2, steps=30, change=change)
    page = report.build(tmp_path).read_text(encoding="utf-8")
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 5


def test_grid_of_many_cells(tmp_path):
    columns = ("batch 1", "batch 4", "batch 16", "batch 64")
    rows = {"squared": ("∞", "3", "4"), "quartic": ("∞", "2", "3", "4")}
    write_study(tmp_path, panels=rows, columns=columns, seeds=2, steps=40, change={"differences": []})
    page = report.build(tmp_path).read_text(encoding="utf-8")
    assert page.count('<table class="grid">') == 2
    assert "How this differs" not in page
    check_page(page)


def test_tables_on_disk(built, half):
    with (built.parent / "tables" / "summary.csv").open(encoding="utf-8", newline="") as file:
        summary = {(line["panel"], line["row"]): line for line in csv.DictReader(file)}
    study = report.load(half)
    values = list(study.values("quartic-2").values())
    assert float(summary["quartic", "2"]["mean"]) == pytest.approx(np.mean(values), rel=1e-12)
    assert float(summary["quartic", "2"]["std"]) == pytest.approx(np.std(values, ddof=1), rel=1e-12)
    assert summary["quartic", "∞"]["diverged"] == "1"
    assert summary["quartic", "∞"]["difference_mean"] == ""
    with (built.parent / "tables" / "runs.csv").open(encoding="utf-8", newline="") as file:
        runs = list(csv.DictReader(file))
    assert [line["folder"] for line in runs] == [run.folder for run in study.runs]
    assert {line["status"] for line in runs} == {"finished", "diverged", "failed", "missing"}
    assert all((line["value"] == "") == (line["status"] != "finished") for line in runs)


def test_a_report_is_the_same_every_time(built, half):
    def content():
        return {path: path.read_bytes() for path in sorted((half / "report").rglob("*.*"))}

    first = content()
    assert {path.suffix for path in first} == {".html", ".csv", ".png", ".svg"}
    report.build(half)
    assert content() == first


def test_figures_are_drawn_for_what_is_there(half, whole):
    drawings = {drawing.name: drawing for drawing in plots.draw(report.load(half))}
    assert list(drawings) == ["learning_curves", "rule_explained", "differences"]
    curves = drawings["learning_curves"]
    assert len(curves.figure.axes) == 2
    assert all(axes.get_yscale() == "log" for axes in curves.figure.axes)
    assert [len([line for line in axes.lines if line.get_marker() == "x"]) for axes in curves.figure.axes] == [1, 0]
    assert {run.status for run in curves.runs} == {"finished", "diverged", "failed", "missing"}
    assert "diverged ones up to a cross" in curves.caption
    study = report.load(whole)
    (rule,) = (drawing.runs for drawing in plots.draw(study) if drawing.name == "rule_explained")
    assert (rule[0].seed, study.cells[rule[0].cell].baseline) == (1, "quartic-∞")


def test_learning_curve_is_the_mean_of_the_averaged_runs(whole):
    study = report.load(whole)
    with style():
        axes = plots.learning_curves(study).figure.axes[0]
    expected = []
    for run in study.runs_of("quartic-∞"):
        error = run.metrics("error")["error"]
        expected.append([100 * error[i : i + 20].mean() for i in range(len(error) - 19)])
    x, y = axes.lines[0].get_data()
    np.testing.assert_array_equal(x, np.arange(20, 121))
    np.testing.assert_allclose(y, np.mean(expected, axis=0), rtol=1e-12)


def test_rule_figure_shows_each_limited_loss_falling_to_its_limit(whole):
    study = report.load(whole)
    with style():
        drawing = plots.rule_explained(study)
    rows = drawing.runs[0].metrics("loss", "limit")
    over = rows["loss"] > rows["limit"]
    assert over.any()
    drops = next(lines for lines in drawing.figure.axes[0].collections if hasattr(lines, "get_segments")).get_segments()
    expected = [
        [(step, loss), (step, limit)]
        for step, loss, limit in zip(rows["step"][over], rows["loss"][over], rows["limit"][over], strict=True)
    ]
    np.testing.assert_allclose(drops, expected)
    assert f"{over.sum()} of 120 losses limited" in drawing.figure.axes[0].get_title(loc="left")


def test_rule_figure_of_a_run_that_limits_nothing(tmp_path):
    write_study(tmp_path, panels={"squared": ("∞", "3")}, seeds=1, steps=50)
    study = report.load(tmp_path)
    run = study.runs_of("squared-3")[0]
    rows = run.metrics("loss", "limit")
    write_metrics(run.path / "metrics.arrows", rows | {"limit": np.full(50, 1e3)} | {"error": rows["loss"] / 25})
    with style():
        drawing = plots.rule_explained(study)
    assert "0 of 50 losses limited" in drawing.figure.axes[0].get_title(loc="left")
    assert "over-estimate" not in drawing.caption  # a constant limit settles nothing
    write_metrics(run.path / "metrics.arrows", rows | {"limit": np.full(50, np.inf)})
    with style():
        assert plots.rule_explained(study) is None


def test_published_values_are_drawn_only_where_the_protocol_is_the_papers(tmp_path, whole):
    def dashed(study):
        with style():
            figure = plots.learning_curves(study).figure
        return sum(line.is_dashed() for axes in figure.axes for line in axes.lines)

    write_study(tmp_path, seeds=2, steps=60, change={"differences": []})
    assert dashed(report.load(tmp_path)) == 5
    assert dashed(report.load(whole)) == 0


def test_a_study_without_runs_still_has_a_page(tmp_path):
    write_study(tmp_path, seeds=1, status={(f"{p}-{n}", 1): "missing" for p, n in PUBLISHED})
    page = report.build(tmp_path).read_text(encoding="utf-8")
    check_page(page)
    assert "<figure" not in page
    assert "0 of 5 runs finished" in page


def test_reporting_leaves_matplotlib_alone(half, tmp_path):
    code = f"""
import sys
sys.path.insert(0, "src")
import matplotlib
matplotlib.rcParams["font.size"] = 33.0
before = matplotlib.rcParams.copy()  # not dict(): looking the backend up loads pyplot
from pathlib import Path
from alrc_lab.report import load, plots
from alrc_lab.report.canvas import save
for drawing in plots.draw(load(Path({str(half)!r}))):
    save(drawing, Path({str(tmp_path)!r}))
assert all(matplotlib.rcParams[key] == before[key] for key in before if key != 'backend')
loaded = [name for name in ("matplotlib.pyplot", "torch", "alrc_lab.runner", "alrc_lab.data") if name in sys.modules]
print(loaded)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert len(list(tmp_path.glob("*.png"))) == len(list(tmp_path.glob("*.svg"))) == 3
