"""Give the figures of a study of claims one look: how each method is drawn, the strips above and below the axes.

A method has its colour, marker and line style in every figure, so it can be told without seeing colours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from alrc_lab.report import claims_words as words
from alrc_lab.report.canvas import LIMIT, SPIKE
from alrc_lab.report.claims import ClaimsStudy
from alrc_lab.report.runs import Run

WIDTH = 7.4  # inches: a figure fills a column of text without being shrunk below 8 points
GRID = "#E6E6E6"
INK = "#404040"


@dataclass(frozen=True)
class Look:
    """Say how a method is drawn."""

    label: str
    colour: str
    dashes: tuple[float, ...]
    marker: str
    width: float = 1.8

    def line(self, **others: object) -> dict[str, object]:
        """Return what `plot` needs for a line."""
        dashes = (0, self.dashes) if self.dashes else "-"
        order = 2 if self.width > 3 else 2.5
        return {"color": self.colour, "linestyle": dashes, "linewidth": self.width, "zorder": order} | others


# Okabe and Ito's colours, as in the other report.
LOOKS = {
    # Wide and pale, below the others: a rule that never acts lies exactly on it, and both must be seen.
    "none": Look("no clipping", "#A6A6A6", (), "x", 4.0),
    "norm": Look("Norm", LIMIT, (), "o"),
    "agc": Look("AGC", SPIKE, (5, 1.5), "s"),
    "agc_last": Look("AGC, last layer excluded", "#CC79A7", (4, 1.2, 1, 1.2), "^"),
    "alrc": Look("ALRC", "#009E73", (2.5, 1.2), "D"),
    "hypothetical": Look("AGC with c < 1, hypothetical", "#E69F00", (1, 1.5), "v"),
}
OTHER = Look("", "#56B4E9", (3, 1, 1, 1, 1, 1), "P")


def look(method: str) -> Look:
    """Return how a method is drawn; one that is not known is light blue under its own name."""
    return LOOKS.get(method) or Look(method, OTHER.colour, OTHER.dashes, OTHER.marker)


def handles(methods: Iterable[str], *, markers: bool = False) -> list[Line2D]:
    """Make the legend of the methods that a figure shows, in the order of `LOOKS`."""
    order = list(LOOKS)
    shown = sorted(set(methods), key=lambda name: (order.index(name) if name in order else len(order), name))
    return [
        Line2D([], [], **look(name).line(), label=look(name).label, marker=look(name).marker if markers else "")  # pyright: ignore[reportArgumentType]
        for name in shown
    ]


def reference(label: str, **style: object) -> Line2D:
    """Make a legend entry of what is no method: a bound, a prediction."""
    return Line2D([], [], label=label, **({"color": "#000000", "linewidth": 1.2} | style))  # pyright: ignore[reportArgumentType]


def frame(figure: Figure, study: ClaimsStudy, run: Run, title: str, entries: list[Line2D]) -> None:
    """Put title and legend above the axes, and below them the line that names the run."""
    log_ticks(figure)
    width, height = figure.get_size_inches()
    widths = [0.072 * len(str(entry.get_label())) + 0.62 for entry in entries]  # in inches, generously
    per_line = len(entries) if sum(widths) < width else max(1, int(width / max(widths)))
    lines = math.ceil(len(entries) / per_line) if entries else 0
    head, foot = 0.40 + 0.20 * lines, 0.24
    figure.text(0.08 / width, 1 - 0.1 / height, title, va="top", fontsize=12, fontweight="bold")
    if entries:
        anchor = (0.02 / width, 1 - 0.35 / height)
        figure.legend(
            handles=entries, loc="upper left", bbox_to_anchor=anchor, ncols=per_line, borderaxespad=0,
            fontsize=8.5, handlelength=2.6, columnspacing=1.4,
        )  # fmt: skip
    told = f"{words.data_line(study)} · {study.name}, preset {study.preset} · run {run.identity[:10]}"
    figure.text(0.08 / width, 0.08 / height, told, fontsize=7, color="#606060")
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine)  # as every figure here was made
    engine.set(rect=(0, foot / height, 1, 1 - (head + foot) / height), w_pad=0.06, h_pad=0.05)


def log_axis(axes: Axes, which: str) -> None:
    """Scale an axis logarithmically; `log_ticks` labels it once everything is drawn."""
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axes.grid(axis="x" if which == "x" else "y", color=GRID, linewidth=0.7)


def log_ticks(figure: Figure) -> None:
    """Label logarithmic axes: powers of ten as far as there is room, and between them where the axis is short."""
    for axes in figure.axes:
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            if axis.get_scale() != "log":
                continue
            decades = math.log10(high / low)
            subs = (1.0,) if decades > 2 else (1.0, 2.0, 5.0) if decades > 0.8 else tuple(np.arange(1.0, 10.0))
            axis.set_major_locator(LogLocator(subs=subs, numticks=6))
            axis.set_minor_locator(NullLocator())
            axis.set_minor_formatter(NullFormatter())
            if low > 1e-3 and high < 1000:
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def quiet(axes: Axes, title: str = "") -> None:
    """Give a panel its title and small labels."""
    axes.set_title(title, loc="left", fontsize=9.5)
    axes.tick_params(labelsize=8.5)
    axes.xaxis.label.set_fontsize(9)
    axes.yaxis.label.set_fontsize(9)


def positive(values: np.ndarray) -> np.ndarray:
    """Keep what a logarithmic axis can show; NaN in place of the rest."""
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)
