"""The page of a study of claims against an HTML parser, and its figures against the numbers they draw."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from alrc_lab import report
from alrc_lab.report import claims_plots
from alrc_lab.report.canvas import style
from alrc_lab.report.claims import columns
from synthetic_claims import SHA256, SUMMARY, claims, metrics, settings, write_claims
from synthetic_study import write_metrics

DRAWN = {
    "E1": ["stability"], "E2": ["noise"], "E3": ["bias", "bias_matched"], "E4": ["network"],
    "E5": ["small_weights"], "E6": ["scaled_loss"], "E7": ["scope"],
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_claims(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def built(whole):
    return report.build(whole)


class Page(HTMLParser):
    """Collect what a page holds, and insist that every tag is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.ids, self.words, self.badges, self.alone = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"
        outside = [link for link in self.links if not link.startswith(("data:", "#", "figures/", "tables/"))]
        assert not outside, f"not self-contained: {outside}"
        dead = {link[1:] for link in self.links if link.startswith("#")} - set(self.ids)
        assert not dead, f"dead links: {dead}"
        assert len(self.ids) == len(set(self.ids)), "an id stands twice"
        leaked = re.search(r"\b(nan|None|inf|True|False)\b", " ".join(self.words))
        assert not leaked, f"leaked: {leaked}"

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        for key, value in attrs:
            if key in ("src", "href"):
                self.links.append(value)
            if key == "id":
                self.ids.append(value)
            if key == "class" and value.startswith("badge"):
                self.badges.append(value.split()[1])

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).replace("\xa0", " ").split())


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("<div><p></div>", "closes <p>"),
        ("<div>", "never closed"),
        ("<b>3 nan</b>", "leaked"),
        ('<img src="https://example.org/x.png">', "not self-contained"),
        ('<a href="#gone">x</a>', "dead links"),
        ('<b id="x"></b><b id="x"></b>', "stands twice"),
    ],
)
def test_the_page_check_can_fail(broken, message):
    with pytest.raises(AssertionError, match=message):
        Page(broken)


def test_page_is_complete(built, whole):
    page = Page(built.read_text(encoding="utf-8"))
    assert built == whole / "report" / "index.html"
    title = "The theory of clipping on trial"
    assert page.text.startswith(f"{title} {title} Data: synthetic · sha256")
    assert page.badges == [claim["id"].split("-")[-1].replace("outside", "outside-scope") for claim in claims()]
    for claim in claims():
        assert claim["sentence"] in page.text
        assert f"claim-{claim['id']}" in page.ids
        for condition in (*claim["consistent"], *claim["contradicts"]):
            assert f"{condition['key']} {condition['op']}".replace("<=", "≤").replace(">=", "≥") in page.text
    for part in (
        SHA256,
        "Read in the paper: Theorem 1. Statistic: root − θ*.",
        "Our inference: Theorem 1",
        "From another source",
        "0.9444 [0.9350, 0.9538]",
        "contradicts if gradient_low > 0.01",
        "control, must contradict: as required",
        "the run's summary has no 'lost'",
        "by the same criteria the numbers read: contradicts; a bias",
        "Fewer seeds than THEORY.md asks for.",
        "Holm, roots: 2 claims",
    ):
        assert part in page.text, part
    assert not re.search(r"\bprove[sdn]?\b|the paper defines|A[123] says", page.text)


def test_the_headline_figure_is_first_and_drawn_once(built):
    text = built.read_text(encoding="utf-8")
    order = re.findall(r'<figure id="(\w+)"', text)
    assert order == ["bias", "bias_matched", *(name for key in DRAWN if key != "E3" for name in DRAWN[key])]
    assert text.index('<figure id="bias"') < text.index("All claims at a glance") < text.index('id="E0"')


def test_alarms_stand_above_the_figures(tmp_path):
    others = tuple(key for key in DRAWN if key not in ("E1", "E6"))
    root = write_claims(tmp_path, missing=others, change_summary=lambda _, summary: summary.update(failed=0.0))
    text = report.build(root).read_text(encoding="utf-8")
    assert text.index("this control must contradict, but reads consistent") < text.index("<figure")
    assert "1 alarm<" in text
    assert Page(text).badges.count("consistent") == 3


def test_hostile_words_stay_words(tmp_path):
    evil = "<script>alert(1)</script>"

    def change(study):
        study |= {"title": evil, "question": evil, "notes": [evil]}
        study["claims"][0] |= {"sentence": evil, "method": evil, "where": evil}
        study["experiments"][0] |= {"title": evil, "protocol": evil}

    text = report.build(write_claims(tmp_path, change_study=change, missing=tuple(DRAWN))).read_text(encoding="utf-8")
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 8
    assert "<figure" not in text, "there is nothing to draw"


def test_claims_on_disk(built):
    with (built.parent / "tables" / "claims.csv").open(encoding="utf-8", newline="") as file:
        found = {line["id"]: line for line in csv.DictReader(file)}
    assert list(found) == [claim["id"] for claim in claims()]
    assert float(found["E3-consistent"]["value"]) == 4.25e-5
    assert float(found["E3-contradicts"]["high"]) == 1.01 * SUMMARY["gradient"]
    assert found["E3-contradicts"]["p"] == ""
    assert json.loads(found["E6-contradicts"]["contradicts"]) == [{"key": "curl", "op": ">", "than": 1e-6}]
    assert [line["preregistered"] for line in found.values()] == ["True"] * len(found)


def test_a_report_is_the_same_every_time(tmp_path):
    root = write_claims(tmp_path, missing=("E1", "E2", "E3", "E4", "E5"))

    def content():
        return {path: path.read_bytes() for path in sorted((root / "report").rglob("*.*"))}

    report.build(root)
    first = content()
    assert {path.suffix for path in first} == {".html", ".csv", ".png", ".svg"}
    report.build(root)
    assert content() == first


# ----------------------------------------------------------------------------------------------------------- figures


def draw(function, root, cell):
    study = report.load(root)
    with style():
        return function(study, study.runs[cell], columns(study.runs[cell]))


def rewrite(root, cell, change):
    """Change the columns of a run that is on disk."""
    rows = metrics(cell)
    change(rows)
    write_metrics(report.load(root).runs[cell].path / "metrics.arrows", rows)


def test_every_figure_is_drawn(whole):
    found = claims_plots.draw(report.load(whole))
    assert {key: [drawing.name for drawing in drawings] for key, drawings in found.items()} == DRAWN
    for drawings in found.values():
        for drawing in drawings:
            assert drawing.title.endswith("?"), "a title asks what the figure answers"
            assert 40 < len(drawing.caption) < 420


def test_bias_draws_the_roots_and_the_gradients(whole):
    root, gradient, root_even, _ = draw(claims_plots.bias, whole, "E3").figure.axes
    rows, table = metrics("E3"), settings()
    skewed, even = table[table[:, 5] == 0], table[table[:, 5] == 1]
    for axes, wanted in ((root, skewed), (root_even, even)):
        dots = [line.get_xdata()[0] for line in axes.lines if line.get_marker() in tuple("xosD")]
        np.testing.assert_allclose(dots, wanted[:, 3])
        ticks = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "|"]
        np.testing.assert_allclose(ticks, wanted[np.isfinite(wanted[:, 2]), 2])
    assert [text.get_text() for text in root.get_yticklabels()][:2] == ["no clipping", "Norm, λ = 0.5"]
    assert [text.get_text() for text in root.get_yticklabels()][-1] == "ALRC, n = 3"
    told = [float(text.get_text().replace("−", "-")) for text in gradient.texts]
    np.testing.assert_allclose(told, rows["gradient_mean"][: len(skewed)], atol=5e-4)
    (best,) = {line.get_xdata()[0] for line in root.lines if list(line.get_ydata()) == [0, 1]}
    assert best == pytest.approx(1.0)


def test_matched_bias_draws_each_rule_in_deviations(whole):
    panels = draw(claims_plots.matched_bias, whole, "E3").figure.axes
    assert [axes.get_title(loc="left") for axes in panels] == ["exponential", "lognormal"]
    table = settings()
    for axes, law, deviation in zip(panels, (3, 4), (1.0, 1.31), strict=True):
        drawn = [line for line in axes.lines if line.get_marker() in tuple("osD")]
        for line, method in zip(drawn, (1, 2, 4), strict=True):
            inside = table[(table[:, 5] == law) & (table[:, 0] == method)]
            np.testing.assert_allclose(line.get_xdata(), 100 * inside[:, 4])
            np.testing.assert_allclose(line.get_ydata(), (inside[:, 3] - 1) / deviation)


def test_curl_is_the_colour_and_descent_the_arrows(whole):
    figure = draw(claims_plots.scaled_loss, whole, "E6").figure
    rows = metrics("E6")
    titles = [axes.get_title(loc="left").split("\n")[0] for axes in figure.axes[:3]]
    assert titles == ["no clipping", "Norm, λ = 0.1", "Norm, λ = 0.5"]
    for axes, name in zip(figure.axes, ("none", "0p1", "0p5"), strict=False):
        mesh, arrows = axes.collections
        curl = rows[f"curl_{name}"].reshape(33, 33).T
        np.testing.assert_array_equal(mesh.get_array().reshape(33, 33), curl)
        at = {(w, v): i for i, (w, v) in enumerate(zip(rows["w"], rows["v"], strict=True))}
        for (w, v), u in zip(arrows.get_offsets(), np.ravel(arrows.U) + 1j * np.ravel(arrows.V), strict=True):
            i = at[w, v]
            descent = -(rows[f"field_w_{name}"][i] + 1j * rows[f"field_v_{name}"][i])
            assert u == pytest.approx(descent / (abs(descent) or 1))
    colours = figure.axes[0].collections[0]
    np.testing.assert_allclose(colours.norm(0.0), 0.5)  # no curl is white


def test_a_curl_without_sign_is_drawn_as_a_share(tmp_path):
    root = write_claims(tmp_path, missing=("E1", "E2", "E3", "E4", "E5"))

    def change(rows):
        for name in [name for name in rows if name.startswith("curl_")]:
            rows[name] = np.abs(rows[name])
        rows["curl_alrc_held"] = rows["curl_none"]
        rows |= {f"field_{part}_alrc_held": rows[f"field_{part}_none"] for part in "wv"}

    rewrite(root, "E6", change)
    drawing = draw(claims_plots.scaled_loss, root, "E6")
    assert "‖J − Jᵀ‖ ÷ ‖J‖" in drawing.caption
    assert drawing.figure.axes[3].get_title(loc="left").startswith("ALRC, held")


def test_lines_are_the_columns(whole):
    def lines(axes):
        return {line.get_linestyle() + line.get_color(): line.get_ydata() for line in axes.lines}

    panels = draw(claims_plots.stability, whole, "E1").figure.axes
    assert [axes.get_title(loc="left") for axes in panels[:3]] == [
        "normal (df = ∞)",
        "Student's t, df = 3",
        "Student's t, df = 1.5",
    ]
    rows = metrics("E1")
    drawn = list(lines(panels[4]).values())
    for method, values in zip(("none", "norm", "agc", "agc_last", "alrc"), drawn, strict=True):
        np.testing.assert_array_equal(values, rows[f"failed_{method}_df3"])
    left, right = draw(claims_plots.noise, whole, "E2").figure.axes
    assert "control" in right.get_title(loc="left")
    assert "control" not in left.get_title(loc="left")
    drawn = [line.get_ydata() for line in left.lines]
    np.testing.assert_array_equal(drawn[0], metrics("E2")["q50_p75_norm"])
    assert len(drawn) == 5  # two quantiles of two methods and a bound


def test_network_draws_main_settings_alone_and_leaves_no_gaps(tmp_path):
    root = write_claims(tmp_path, missing=tuple(key for key in DRAWN if key != "E4"))

    def change(rows):
        rows["field_norm_b8_skewed"] = rows["field_norm_skewed"]
        rows["field_norm_skewed"] = np.where(rows["step"] % 2 == 0, np.nan, rows["field_norm_skewed"])

    rewrite(root, "E4", change)
    drawing = draw(claims_plots.network, root, "E4")
    lines = drawing.figure.axes[0].lines
    assert len(lines) == 5
    assert all(np.isfinite(line.get_ydata()).all() for line in lines)
    assert "batch sizes are in the tables alone" in drawing.caption


@pytest.mark.parametrize(
    ("cell", "function", "lost", "panels"),
    [
        ("E1", claims_plots.stability, "residual_", 6),
        ("E2", claims_plots.noise, "_p40", 1),
        ("E3", claims_plots.bias, "gradient_", 2),
        ("E4", claims_plots.network, "loss_", 4),
        ("E5", claims_plots.small_weights, "ratio_", 2),
        ("E6", claims_plots.scaled_loss, "_0p5", 3),
        ("E7", claims_plots.scope, "noise_floor_", 1),
    ],
)
def test_a_missing_column_leaves_its_panel_out(tmp_path, cell, function, lost, panels):
    root = write_claims(tmp_path, missing=tuple(key for key in DRAWN if key != cell))
    before = len(draw(function, root, cell).figure.axes)

    def lose(rows):
        for name in [name for name in rows if lost in name]:
            del rows[name]

    rewrite(root, cell, lose)
    assert len(draw(function, root, cell).figure.axes) == panels < before

    def lose_all(rows):
        for name in [name for name in rows if name != "step"]:
            del rows[name]

    rewrite(root, cell, lose_all)
    assert draw(function, root, cell) is None
    assert claims_plots.draw(report.load(root)) == {cell: []}


def test_bias_needs_the_columns_of_the_contract_alone(tmp_path):
    root = write_claims(tmp_path, missing=("E1", "E2", "E4", "E5", "E6", "E7"))

    def lose(rows):
        inside = (settings()[:, 5] == 0) | (settings()[:, 5] == 1)
        for name in list(rows):
            rows[name] = rows[name][inside]
        for name in ("law_index", "matched", "bias_in_deviations"):
            del rows[name]

    rewrite(root, "E3", lose)
    assert len(draw(claims_plots.bias, root, "E3").figure.axes) == 4
    assert draw(claims_plots.matched_bias, root, "E3") is None


def test_a_run_killed_while_writing_draws_what_is_there(tmp_path):
    root = write_claims(tmp_path, missing=tuple(key for key in DRAWN if key != "E7"))
    path = report.load(root).runs["E7"].path / "metrics.arrows"
    write_metrics(path, metrics("E7"), torn=True)
    assert draw(claims_plots.scope, root, "E7") is not None
    path.write_bytes(b"")
    assert claims_plots.draw(report.load(root)) == {}
