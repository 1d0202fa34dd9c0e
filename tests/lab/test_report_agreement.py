"""Verdicts beside published numbers against SciPy and brute force, and the figure of single runs side by side."""

from __future__ import annotations

import itertools
import json
import math
from io import StringIO

import numpy as np
import pytest
from rich.console import Console
from scipy import stats as scipy_stats

from alrc_lab import report
from alrc_lab.report import plots, tables
from alrc_lab.report.agreement import MEANINGS, agree, judge, legend, published_change, rank_correlation, sentences
from alrc_lab.report.canvas import style
from alrc_lab.report.collect import Published
from alrc_lab.report.side_by_side import side_by_side
from alrc_lab.report.stats import paired
from synthetic_study import write_metrics, write_study

FOUR = {"quartic": ("∞", "4", "3", "2"), "squared": ("∞", "3")}
SIDE = {"seed": 1, "column": "error", "label": "25 × error", "factor": 25, "boxcar": 12}


def edit(path, change):
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def give_values(root, wanted):
    """Overwrite the results: values by cell, one for each seed, in the printed unit."""
    for run in report.load(root).runs:
        if run.cell in wanted and run.status == "finished":
            value = wanted[run.cell][run.seed - 1] / 100
            edit(run.path / "result.json", lambda r, v=value: r["summary"].update(final_error=v))


def printed(study, width):
    console = Console(width=width, file=StringIO(), force_terminal=False)
    console.print(report.render_text(study))
    return console.file.getvalue()


def sample(mean, std, n):
    """Make n values with exactly this mean and standard deviation."""
    values = np.random.default_rng(n).normal(size=n)
    values -= values.mean()
    return mean + values * std / values.std(ddof=1)


@pytest.mark.parametrize(
    ("setting", "baseline"),
    [((3.54, 0.084, 10), (3.88, 0.108, 10)), ((4.58, 0.004, 10), (4.59, 0.006, 10)), ((7.0, 2.0, 4), (3.0, 0.1, 25))],
)
def test_published_change_is_welchs(setting, baseline):
    found = published_change(Published(*setting), Published(*baseline))
    test = scipy_stats.ttest_ind(sample(*setting), sample(*baseline), equal_var=False)
    interval = test.confidence_interval(0.95)
    assert (found.mean, found.low, found.high) == pytest.approx((setting[0] - baseline[0], *interval), rel=1e-9)
    assert found.p_value == pytest.approx(test.pvalue, rel=1e-6)
    pooled = scipy_stats.ttest_ind_from_stats(*setting, *baseline, equal_var=True).pvalue
    if setting[2] != baseline[2]:  # a pooled variance would be told apart
        assert found.p_value != pytest.approx(pooled, rel=0.01)
    assert found.in_percent(found.mean) == pytest.approx(100 * (setting[0] / baseline[0] - 1))


def test_rounding_of_printed_means_widens_the_interval():
    setting, baseline = Published(4.58, 0.004, 10), Published(4.59, 0.006, 10)
    exact, rounded = published_change(setting, baseline), published_change(setting, baseline, 0.01)
    assert exact.p_value < 0.001  # as if the digits were exact
    assert (rounded.low, rounded.high) == pytest.approx((exact.low - 0.01, exact.high + 0.01))
    assert rounded.p_value == pytest.approx(1)
    large = published_change(Published(3.54, 0.084, 10), Published(3.88, 0.108, 10), 0.01)
    closer = published_change(Published(3.55, 0.084, 10), Published(3.88, 0.108, 10))
    assert large.p_value == pytest.approx(closer.p_value)
    for each in (exact, rounded, large):  # interval and p-value say the same
        assert (each.p_value < 0.05) == (not each.low <= 0 <= each.high)


@pytest.mark.parametrize("std_n", [(None, 10), (0.1, None), (0.1, 1), (0.0, 10)])
def test_a_published_value_without_spread_has_no_interval(std_n):
    found = published_change(Published(3.0, *std_n), Published(4.0, 0.0, 10))
    assert (found.mean, found.low, found.high, found.p_value) == (-1.0, None, None, None)
    assert judge(paired({1: 1.0, 2: 1.1}, {1: 2.0, 2: 2.2}), found) == "open"


FALLS, RISES, NONE = Published(3.0, 0.1, 10), Published(5.0, 0.1, 10), Published(4.01, 0.1, 10)
BASE = dict(enumerate([4.0, 4.2, 4.1, 4.4]))
OURS = {
    "falls": {0: 3.5, 1: 3.8, 2: 3.6, 3: 3.8},
    "rises": {0: 4.5, 1: 4.6, 2: 4.6, 3: 5.0},
    "unclear": {0: 4.1, 1: 4.0, 2: 4.0, 3: 4.45},
    "same": BASE,
    "shift": {seed: value - 0.5 for seed, value in BASE.items()},
    "alone": {0: 3.5},
}
CASES = [
    ("falls", FALLS, "same direction"),
    ("rises", RISES, "same direction"),
    ("falls", RISES, "opposite"),
    ("rises", FALLS, "opposite"),
    ("unclear", FALLS, "inconclusive"),
    ("same", FALLS, "inconclusive"),
    ("falls", NONE, "ours alone"),
    ("rises", NONE, "ours alone"),
    ("unclear", NONE, "both detect none"),
    ("same", NONE, "both detect none"),
    ("shift", FALLS, "open"),
    ("alone", FALLS, "open"),
]


def verdicts_of(judging):
    base = Published(4.0, 0.1, 10)
    return [judging(paired(OURS[ours], BASE), published_change(theirs, base, 0.01)) for ours, theirs, _ in CASES]


def test_every_verdict():
    assert verdicts_of(judge) == [verdict for *_, verdict in CASES]
    assert {verdict for *_, verdict in CASES} == set(MEANINGS)


@pytest.mark.parametrize(
    "wrong",
    [
        # The sign alone, the paper's interval ignored, and ours ignored.
        lambda ours, theirs: "same direction" if (ours.mean < 0) == (theirs.mean < 0) else "opposite",
        lambda ours, theirs: judge(ours, published_change(Published(theirs.mean, 0.0, 10), Published(0.0, 1e-9, 10))),
        lambda ours, theirs: judge(paired({0: ours.mean, 1: ours.mean * 1.01}, {0: 0.0, 1: 0.0}), theirs),
    ],
)
def test_a_wrong_judge_is_found(wrong):
    assert verdicts_of(wrong) != [verdict for *_, verdict in CASES]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ([1, 2, 3], [1, 2, 3]),
        ([4, 1, 3, 2], [1, 2, 3, 4]),
        ([1, 2, 2, 5, 7, 7], [1, 3, 3, 3, 9, 8]),
        ([0.1, -3, 2, 9, 5, 4, 8], [1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_few_ranks_are_tested_by_all_permutations(ours, theirs):
    found = rank_correlation(ours, theirs)
    a, b = scipy_stats.rankdata(ours), scipy_stats.rankdata(theirs)
    assert found.rho == pytest.approx(np.corrcoef(a, b)[0, 1])
    every = np.array([np.corrcoef(permuted, b)[0, 1] for permuted in itertools.permutations(a)])
    tails = (every >= found.rho - 1e-9).mean(), (every <= found.rho + 1e-9).mean()
    assert found.is_exact
    assert found.p_value == pytest.approx(min(1, 2 * min(tails)))


def test_many_ranks_are_tested_by_students_approximation():
    rng = np.random.default_rng(5)
    ours = rng.normal(size=23)
    theirs = ours + rng.normal(size=23)
    found, expected = rank_correlation(list(ours), list(theirs)), scipy_stats.spearmanr(ours, theirs)
    assert (found.n, found.is_exact) == (23, False)
    assert (found.rho, found.p_value) == pytest.approx((expected.statistic, expected.pvalue))


def test_ranks_that_say_nothing():
    for ours, theirs in (([], []), ([1, 2], [2, 1]), ([1, 1, 1, 1], [1, 2, 3, 4]), ([1, 2, 3], [5, 5, 5])):
        found = rank_correlation(ours, theirs)
        assert (found.n, found.rho, found.p_value) == (len(ours), None, None)
    with pytest.raises(ValueError, match="got 3 and 2 numbers"):
        rank_correlation([1, 2, 3], [1, 2])


def write_judged(root, **options):
    """Write a study whose verdicts are known: published values of its own, three seeds."""
    write_study(root, panels=FOUR, seeds=3, steps=40, **options)
    means = {"quartic-∞": 4.0, "quartic-4": 3.92, "quartic-3": 3.6, "quartic-2": 3.5, "squared-∞": 5.0}

    def publish(study):
        for cell in study["cells"]:
            mean = means.get(cell["id"])
            cell["published"] = {"mean": mean, "std": 0.05, "n": 10} if mean else None

    edit(root / "study.json", publish)
    base = [6.0, 6.1, 6.3]
    give_values(
        root,
        {
            "quartic-∞": base,
            "quartic-4": [x + 0.5 + 0.01 * i for i, x in enumerate(base)],
            "quartic-3": [x - 1.0 - 0.01 * i for i, x in enumerate(base)],
            "quartic-2": [6.0, 6.2, 6.2],
            "squared-∞": [9.0, 9.1, 9.2],
            "squared-3": [8.0, 8.2, 8.3],
        },
    )
    return root


def test_agreement_of_a_study(tmp_path):
    study = report.load(write_judged(tmp_path))
    found = agree(study)
    told = {each.row.cell.id: each.verdict for each in found.comparisons}
    # squared-3 has no published value, as a row of another rule has none.
    assert told == {"quartic-4": "opposite", "quartic-3": "same direction", "quartic-2": "inconclusive"}
    assert {verdict: n for verdict, n in found.counts.items() if n} == dict.fromkeys(told.values(), 1)
    ours = [6.133, 6.643, 5.123, 6.133, 9.1]
    rho = np.corrcoef(scipy_stats.rankdata([6.13, 6.64, 5.12, 6.13, 9.1]), [4, 3, 2, 1, 5])[0, 1]
    assert [np.mean(list(study.values(cell.id).values())) for cell in study.cells.values() if cell.published] == (
        pytest.approx(ours, abs=2e-3)
    )
    assert (found.means.n, found.means.rho) == (5, pytest.approx(rho))
    # Changes: +8 %, −16 %, 0 % beside −2 %, −10 %, −12.5 %.
    assert (found.changes.n, found.changes.rho) == (3, pytest.approx(0.5))
    text = tables.plain(" ".join(sentences(study, found)))
    assert text.startswith("3 comparisons with the published table: same direction 1, opposite 1, inconclusive 1.")
    assert "All 6 cells of this study are done." in text
    assert "against n = ∞: ρ = 0.50 (3 cells, p = 1.000, exact permutation test)" in text
    assert "ours alone" not in legend(found)  # no word is explained that is not used


def test_a_partial_sweep_says_which_part_is_done(tmp_path):
    columns = ("batch 1", "batch 4")
    missing = {(f"quartic-batch4-{row}", seed): "missing" for row in ("∞", "3", "2") for seed in (1, 2)}
    missing |= {("squared-batch4-3", 2): "missing", ("quartic-batch1-2", 2): "failed"}
    write_study(tmp_path, columns=columns, seeds=2, steps=40, status=missing | {("quartic-batch1-3", 2): "diverged"})
    study = report.load(tmp_path)
    found = agree(study)
    told = tables.plain(sentences(study, found)[1])
    assert told == (
        "5 of 10 cells of this study done. In full: squared error, batch 1. In part: quartic error, batch 1 (2 of 3); "
        "squared error, batch 4 (1 of 2). Not yet: quartic error, batch 4."
    )
    # A cell that lacks a run is not ranked, though it has a verdict as soon as there are two pairs.
    assert (found.means.n, found.changes.n) == (5, 2)
    assert found.counts["open"] == 5
    for width in (80, 100):
        text = printed(study, width)
        assert max(map(len, text.splitlines()[:-1])) <= width
        changes = text.split("change against")[1].split("Does it agree")[0]
        assert ("batch 1  3" in changes, "batch 4" in changes) == (True, False)  # nothing to compare yet


@pytest.fixture
def no_figures(monkeypatch):
    """Leave out what takes seconds to draw."""
    monkeypatch.setattr(plots, "draw", lambda study: [])


def test_text_page_and_json_say_the_same(tmp_path, no_figures):
    study = report.load(write_judged(tmp_path))
    content = json.loads(json.dumps(report.to_json(study), allow_nan=False))["agreement"]
    assert [each["verdict"] for each in content["comparisons"]] == ["opposite", "same direction", "inconclusive"]
    assert content["comparisons"][1]["published_change"]["percent"] == pytest.approx(-10)
    assert content["comparisons"][1]["our_change_percent"] == pytest.approx(-16.47, abs=0.01)
    assert content["rank_correlation"]["changes"]["n"] == 3
    assert content["done"][0] == {"panel": "quartic", "column": "batch 1", "done": 4, "cells": 4}
    page = tables.plain(report.build(tmp_path).read_text(encoding="utf-8"))
    text = " ".join(printed(study, 100).split())
    for sentence in content["sentences"]:
        assert sentence in text
        assert sentence in page
    assert '<td class="left">same direction</td>' in page
    assert "−10.0 % [−11.4, −8.6]" in text
    assert "<td>−10.0 % [−11.4, −8.6]</td>" in page


def test_a_study_without_published_values_says_nothing_of_them(tmp_path, no_figures):
    write_study(tmp_path, panels={"other": ("∞", "5")}, seeds=2, steps=30)
    study = report.load(tmp_path)
    assert agree(study) is None
    assert "agreement" not in report.to_json(study)
    assert "agree" not in printed(study, 100)
    assert "published" not in printed(study, 100).split("Report:")[0].split("No report yet:")[0]
    assert "agree" not in report.build(tmp_path).read_text(encoding="utf-8")


def test_a_study_in_which_nothing_ran_has_no_verdict(tmp_path):
    status = {(f"{panel}-{row}", seed): "missing" for panel, rows in FOUR.items() for row in rows for seed in (1, 2)}
    write_study(tmp_path, panels=FOUR, seeds=2, steps=30, status=status)
    study = report.load(tmp_path)
    found = agree(study)
    assert found.counts["open"] == len(found.comparisons) == 3
    assert found.means.n == found.changes.n == 0
    assert "none (0 cells, 3 done ones are needed)" in tables.plain(" ".join(sentences(study, found)))
    assert "0 of 6 cells of this study done. Not yet: quartic error; squared error." in printed(study, 100)


@pytest.fixture(scope="module")
def unstable(tmp_path_factory):
    """Write a study of two panels, two rates and three limits, which asks for the figure of single runs."""
    root = tmp_path_factory.mktemp("unstable")
    titles = {"adam": "Adam at 0.1 and 0.2", "sgd": "SGD at 0.1 and 0.2"}
    spikes = {"key": "num_spikes", "label": "spikes", "factor": 1, "better": "lower"}
    change = {"side_by_side": SIDE, "metrics": [spikes]}
    change |= {"panels": [{"id": key, "title": title} for key, title in titles.items()]}
    columns = ("stable rate 1", "unstable rate 1")
    rows = dict.fromkeys(titles, ("∞", "2", "3"))
    write_study(root, panels=rows, columns=columns, seeds=2, steps=240, change=change)

    def rename(study):
        for cell in study["cells"]:
            cell["row"] = {"3": "n = 2, ALRC()"}.get(cell["row"], cell["row"])

    edit(root / "study.json", rename)
    for i, run in enumerate(report.load(root).runs):
        edit(run.path / "result.json", lambda r, n=i % 7: r["summary"].update(num_spikes=n))
    return root


def test_single_runs_are_drawn_side_by_side(unstable):
    study = report.load(unstable)
    with style():
        drawing = side_by_side(study)
    frames = drawing.figure.axes
    assert len(frames) == 6
    assert {run.seed for run in drawing.runs} == {1}
    assert len(drawing.runs) == len(study.cells)
    for top, bottom in (frames[:3], frames[3:]), (frames[3:], frames[:3]):
        assert len({axes.get_ylim() for axes in top}) == 1
        assert len({axes.get_xlim() for axes in (*top, *bottom)}) == 1
    assert frames[2].get_title(loc="left") == tables.label("Adam at 0.1 and 0.2, n = 2, ALRC()")
    cell = next(cell for cell in study.cells.values() if (cell.panel, cell.row) == ("sgd", "2"))
    error = study.runs_of(cell.id)[0].metrics("error")["error"]
    x, y = frames[4].lines[0].get_data()
    expected = [math.exp(np.log(25 * error[step - 12 : step]).mean()) for step in x]
    np.testing.assert_allclose(y, expected, rtol=1e-12)
    assert (x[0], x[-1]) == (12, 240)
    arithmetic = [25 * error[step - 12 : step].mean() for step in x]  # what the learning curves show
    assert np.abs(y / arithmetic - 1).max() > 0.01
    assert {line.get_color() for axes in frames for line in axes.lines} == {
        handle.get_color() for handle in drawing.figure.legends[0].legend_handles
    }


def test_every_spike_is_inside_the_frame_and_a_divergence_is_not(tmp_path):
    write_study(
        tmp_path,
        panels={"quartic": ("∞", "2")},
        seeds=1,
        steps=240,
        status={("quartic-∞", 1): "diverged"},
        change={"side_by_side": SIDE},
    )
    study = report.load(tmp_path)
    spiking = study.runs_of("quartic-2")[0]
    rows = spiking.metrics("error", "loss", "limit")
    rows["error"][150:160] = 20.0
    rows["error"][200] = 0.0  # has no logarithm
    write_metrics(spiking.path / "metrics.arrows", rows)
    diverged = study.runs_of("quartic-∞")[0]
    rows = diverged.metrics("error", "loss", "limit")
    rows["error"][-15:-1] *= 1e9
    write_metrics(diverged.path / "metrics.arrows", rows)
    with style():
        drawing = side_by_side(study)
    lost, kept = drawing.figure.axes
    y = kept.lines[0].get_ydata()
    assert np.isnan(y).sum() == 12
    assert np.nanmax(y) < kept.get_ylim()[1]
    cross = [line for line in lost.lines if line.get_marker() == "x"]
    assert len(cross) == 1
    assert np.nanmax(lost.lines[0].get_ydata()) > lost.get_ylim()[1]
    assert cross[0].get_ydata()[0] < lost.get_ylim()[1]


def test_a_study_that_does_not_ask_for_single_runs_has_none(tmp_path):
    write_study(tmp_path, seeds=1, steps=40)
    assert side_by_side(report.load(tmp_path)) is None
    edit(tmp_path / "study.json", lambda s: s.update(side_by_side={"seed": 1}))
    with pytest.raises(report.StudyError, match="lacks the field 'column'"):
        report.load(tmp_path)
    edit(tmp_path / "study.json", lambda s: s.update(side_by_side=SIDE | {"seed": 9}))
    assert side_by_side(report.load(tmp_path)) is None  # no such run
    edit(tmp_path / "study.json", lambda s: s.update(side_by_side=SIDE | {"boxcar": 1000}))
    assert side_by_side(report.load(tmp_path)) is None  # no run is long enough


def test_words_of_a_study_with_several_panels_and_metrics(unstable):
    study = report.load(unstable)
    text = printed(study, 100)
    assert "n = ∞" in text.split("error × 100\n")[1].split("\n")[2]  # not a bare ∞ beside a name
    spikes = tables.tabulate(study, study.further_metrics[0])
    assert tables.decimals(spikes) == 1  # of counts
    assert tables.decimals(tables.tabulate(study)) == 2
    said = tables.plain(tables.verdict(study, tables.tabulate(study)[1]))
    assert "the error (Adam at 0.1 and 0.2)" in said
    assert "adam" not in said
    with style():
        drawings = {drawing.name: drawing for drawing in plots.draw(study)}
    assert list(drawings) == ["learning_curves", "side_by_side", "rule_explained", "differences"]
    titles = [axes.get_title(loc="left") for axes in drawings["differences"].figure.axes]
    assert [tables.plain(title) for title in titles] == [
        f"error × 100, {name} at 0.1 and 0.2, against n = ∞" for name in ("Adam", "SGD")
    ]
