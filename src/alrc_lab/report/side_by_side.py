"""Draw single runs side by side, as the authors' README does: without a limit on the left, with one beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from alrc_lab.report import tables
from alrc_lab.report.canvas import Drawing, frame
from alrc_lab.report.collect import Run, Study
from alrc_lab.report.stats import boxcar

# Of Okabe and Ito's colours those that the other figures give to settings last, as a colour is a column here.
_COLOURS = ("#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_POINTS = 2_000  # of a curve: enough that no spike falls between two
_START = 12  # as in the learning curves, the first twelfth may leave the frame
_HIGHEST = 30  # times the median: a divergence beyond it leaves the frame


@dataclass(frozen=True)
class _Curve:
    """Hold one run's averaged errors."""

    run: Run
    steps: np.ndarray
    values: np.ndarray

    @property
    def extent(self) -> list[float]:
        """List what must lie inside the frame: all that follows the steep start, every spike of it."""
        settled = self.values[len(self.values) // _START :]
        settled = settled[np.isfinite(settled)]
        if not len(settled):
            return []
        highest = _HIGHEST * float(np.median(settled)) if self.run.status == "diverged" else math.inf
        return [float(settled.min()), min(float(settled.max()), highest)]


def side_by_side(study: Study) -> Drawing | None:
    """Draw one run of every cell: a row of frames for each panel, a frame for each row label, a colour for each column.

    All frames of a row have the same axes. A curve is the running mean of the errors' logarithms, so that one huge
    error does not stand for its whole window.

    Args:
        study: A study whose study.json has `side_by_side`.

    Returns:
        The drawing; None if the study asks for none, or no run of the seed is long enough yet.
    """
    asked = study.side_by_side
    if not asked:
        return None
    labels = list(dict.fromkeys(cell.row for cell in study.cells.values()))
    panels = [panel for panel in study.panels if any(cell.panel == panel for cell in study.cells.values())]
    size = (max(6.4, 1.2 + 3.2 * len(labels)), 1.5 + 2.6 * len(panels))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(panels), len(labels), squeeze=False, sharex=True, sharey="row")
    colours = {column: _COLOURS[i % len(_COLOURS)] for i, column in enumerate(study.columns)}
    drawn = list[Run]()
    for axes_row, panel in zip(grid, panels, strict=True):
        extent = list[float]()
        for axes, row in zip(axes_row, labels, strict=True):
            for cell in study.cells.values():
                found = [run for run in study.runs_of(cell.id) if run.seed == asked["seed"]]
                if (cell.panel, cell.row) == (panel, row) and found:
                    curve = _averaged(study, found[0])
                    if len(curve.values):
                        _draw(axes, curve, colours[cell.column], list(colours).index(cell.column))
                        extent += curve.extent
                        drawn.append(curve.run)
            axes.set_title(f"{study.panels[panel]}, {tables.label(row)}", loc="left", fontsize=10)
            if not axes.lines:
                axes.text(0.5, 0.5, "no run is long enough yet", transform=axes.transAxes, ha="center")
        _set_axes(axes_row, extent)
        axes_row[0].set_ylabel(f"{asked['label']} (log scale)")
    if not drawn:
        return None
    for axes in grid[-1]:
        axes.set_xlabel("training step (update)")
    handles = [Line2D([], [], color=colour, linewidth=2.2, label=column) for column, colour in colours.items()]
    if any(run.status == "diverged" for run in drawn):
        handles.append(Line2D([], [], color="#404040", marker="x", linewidth=0.9, label="diverged"))
    title = "What do single runs look like, side by side?"
    frame(figure, study, title, handles)
    unfinished = sum(run.status in ("failed", "missing") for run in drawn)
    caption = (
        f"Each curve is one run (seed {asked['seed']}): the mean of the logarithm of {asked['label']} over "
        f"{int(asked['boxcar']):,} updates, before any limiting. All frames of a row have the same axes; the steep "
        "start leaves the frame. Spikes of a single run may be chance: what all seeds say is in the tables."
        + f" Of {len(drawn)} runs {unfinished} have not finished; they are drawn as far as they are."
        * bool(unfinished)
    )
    return Drawing("side_by_side", title, caption, figure, tuple(drawn))


def _averaged(study: Study, run: Run) -> _Curve:
    """Average the logarithms of a run's errors; a window with an error that is not positive and finite has no mean."""
    asked = study.side_by_side
    rows, width = run.metrics(asked["column"]), int(asked["boxcar"])
    errors = asked["factor"] * rows[asked["column"]]
    stride = max(1, min(width, (len(errors) - width + 1) // _POINTS))
    logarithms = np.log10(errors, out=np.full(len(errors), np.nan), where=np.isfinite(errors) & (errors > 0))
    # Reversed, so that the thinned curve ends at the run's last step.
    means = boxcar(logarithms[::-1], width, stride)[::-1]
    return _Curve(run, rows["step"][::-1][::stride][: len(means)][::-1], 10.0**means)


def _draw(axes: Axes, curve: _Curve, colour: str, order: int) -> None:
    """Draw one run; a diverged one has a cross where it ends or leaves the frame."""
    axes.plot(curve.steps, curve.values, color=colour, linewidth=1.1, zorder=3 + 0.1 * order)
    seen = np.flatnonzero(np.isfinite(curve.values))
    if curve.run.status == "diverged" and len(seen):
        height = min(float(curve.values[seen[-1]]), curve.extent[1])
        at = seen[np.flatnonzero(curve.values[seen] >= height)[0]]
        axes.plot(curve.steps[at], height, "x", color=colour, markersize=8, markeredgewidth=2, zorder=5)


def _set_axes(axes_row: np.ndarray, extent: list[float]) -> None:
    """Give the frames of a row one logarithmic axis with plain numbers."""
    for axes in axes_row:
        axes.set_yscale("log")
        axes.margins(x=0.01)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="y", color="#E6E6E6", linewidth=0.7)
        if extent:
            low, high = min(extent) / 1.08, max(extent) * 1.08
            axes.set_ylim(low, high)
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high > 6 * low else (1.0, 1.5, 2, 3, 4, 6)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.yaxis.set_major_locator(NullLocator())
            axes.yaxis.set_minor_locator(NullLocator())
