"""Draw what trained runs reach beside what methods without training reach on the same data."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from alrc_lab.report import tables
from alrc_lab.report.canvas import Drawing, colours, frame
from alrc_lab.report.collect import Study

_LINE = (0, (1.5, 2.0))


def held_out(study: Study) -> Drawing | None:
    """Draw each metric that the references have: every seed, mean and interval of a setting, and the references.

    The left half starts at 0 and shows all; the right half magnifies the trained settings.
    """
    if study.references is None:
        return None
    metrics = [metric for metric in study.metrics if study.references.values(metric)]
    metrics = [metric for metric in metrics if any(study.values(cell, metric) for cell in study.cells)]
    if not metrics:
        return None
    lines = len(study.cells) + len(study.references.methods)
    figure = Figure(figsize=(9.8, 1.35 + len(metrics) * (0.95 + 0.33 * lines)), layout="constrained")
    grid = figure.subplots(len(metrics), 2, squeeze=False, sharey="row", width_ratios=(1.25, 1))
    for (whole, zoom), metric in zip(grid, metrics, strict=True):
        _draw_metric(study, metric, whole, zoom)
    handles = [
        Line2D([], [], color="#404040", marker="o", linewidth=2.4, markersize=7, label="mean and 95 % interval"),
        Line2D([], [], color="#404040", marker="o", alpha=0.45, linestyle="", markersize=4, label="one seed"),
        Line2D([], [], color="black", marker="D", mfc="white", linestyle=_LINE, label=study.references.title.lower()),
    ]
    frame(figure, study, "Does training beat what needs none?", handles)
    caption = (
        "Each small dot is one seed, the large one their mean with its 95 % t interval over seeds. A diamond and its "
        f"dotted line are a method without training: one mean over {study.references.crops}, which has no interval "
        "over seeds. Left: all, from 0; right: the trained settings, magnified."
    )
    runs = [run for cell in study.cells for run in study.runs_of(cell, "finished")]
    return Drawing("held_out", "Does training beat what needs none?", caption, figure, tuple(runs))


def _draw_metric(study: Study, metric: Mapping[str, Any], whole: Axes, zoom: Axes) -> None:
    """Draw one metric twice, with a line for each setting and then for each reference."""
    assert study.references is not None  # what `held_out` asked first
    palette, rows = colours(study), tables.tabulate(study, metric)
    places = tables.decimals(rows)
    names, seen, texts = [], list[float](), list[str]()
    for y, row in enumerate(rows):
        values = study.values(row.cell.id, metric)
        dots = [values[seed] for seed in sorted(values)]
        estimate, colour = row.estimate, palette[row.cell.row]
        panel = f"{study.panels[row.cell.panel]}, " * (len(study.panels) > 1)
        names.append(panel + tables.name(study, row.cell))
        spread = np.linspace(-0.08, 0.08, len(dots)) if len(dots) > 1 else np.zeros(len(dots))
        for axes in (whole, zoom):
            axes.scatter(dots, y + 0.2 + spread, s=14, color=colour, alpha=0.5, linewidths=0)
            if estimate.low is not None and estimate.high is not None:
                axes.plot([estimate.low, estimate.high], [y - 0.12] * 2, color=colour, lw=2.4, solid_capstyle="butt")
            if estimate.mean is not None:
                axes.plot([estimate.mean], [y - 0.12], "o", color=colour, markersize=6.5)
        seen += [*dots, *(x for x in (estimate.low, estimate.high) if x is not None)]
        interval = tables.interval(estimate.low, estimate.high, places)
        texts.append(f"{tables.number(estimate.mean, places)}  {interval}, n = {estimate.n}")
    low, high = min(seen), max(seen)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    zoom.set_xlim(low - margin, high + margin)
    values = study.references.values(metric)
    for y, (key, value) in enumerate(values.items(), len(rows)):
        names.append(study.references.methods[key])
        texts.append(tables.number(value, places))
        if value is not None:
            for axes in (whole, zoom):
                axes.axvline(value, color="black", linestyle=_LINE, linewidth=0.9, zorder=0.5)
            whole.plot([value], [y], "D", mfc="white", mec="black", markersize=6)
            seen.append(value)
    # The zoom's own limits keep out the lines of references that lie elsewhere.
    start = 0.0 if min(seen) >= 0 else min(seen) * 1.05
    whole.set_xlim(start, max(seen) * 1.04)
    for y, text in enumerate(texts):
        zoom.text(1.02, y, text, transform=zoom.get_yaxis_transform(), va="center", fontsize=8.5)
    for axes in (whole, zoom):
        axes.axhline(len(rows) - 0.5, color="#B0B0B0", linewidth=0.7)
        axes.grid(axis="x", color="#E6E6E6", linewidth=0.7)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    whole.set_yticks(range(len(names)), names)
    whole.set_ylim(len(names) - 0.45, -0.55)
    whole.set_title("\n".join(textwrap.wrap(metric["label"], 44)), loc="left")
    zoom.set_title("trained, magnified", loc="left", fontsize=9.5, color="#505050")
    if metric["better"]:
        whole.set_xlabel(f"{metric['better']} is better", fontsize=9, color="#505050")
