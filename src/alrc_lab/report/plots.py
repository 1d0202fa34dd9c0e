"""Draw the figures of a study that show its runs: learning curves, the rule at work, and the paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogFormatterMathtext, LogLocator, MaxNLocator, NullFormatter

from alrc_lab.report import tables
from alrc_lab.report.canvas import LIMIT, SPIKE, Drawing, colours, frame, style
from alrc_lab.report.collect import Run, Study
from alrc_lab.report.completions import completions
from alrc_lab.report.held_out import held_out
from alrc_lab.report.side_by_side import side_by_side
from alrc_lab.report.stats import boxcar

_POINTS = 400  # of a learning curve: more would not be visible
_START = 12  # the first twelfth of a curve falls so steeply that showing it all would hide the rest


class _PlainLabels(LogFormatterMathtext):
    """Label the same ticks as Matplotlib does between powers of ten, with 6 in place of 6×10⁰."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def draw(study: Study) -> list[Drawing]:
    """Draw every figure that the study has data for, the runs' own first, then what others reach, then pictures."""
    with style():
        drawings = (
            learning_curves(study),
            side_by_side(study),
            rule_explained(study),
            differences(study),
            held_out(study),
            *completions(study),
        )
        return [drawing for drawing in drawings if drawing is not None]


def learning_curves(study: Study) -> Drawing | None:
    """Draw the boxcar-averaged error of every setting: mean over its finished runs, with their range."""
    columns, several = study.columns, len(study.curves) > 1
    panels = [panel for panel in study.panels if any(cell.panel == panel for cell in study.cells.values())]
    slots = [(panel, curve) for panel in panels for curve in study.curves]
    single = len(columns) == 1
    shape = (1, len(slots)) if single else (len(slots), len(columns))
    width, height = (max(6.4, 4.9 * shape[1]), 4.5) if single else (2.1 + 2.7 * shape[1], 1.6 + 2.7 * shape[0])
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(*shape, squeeze=False, sharex=True, sharey=False if single else "row")
    palette, drawn, short, crossed = colours(study), [], [], False
    for i, (panel, curve) in enumerate(slots):
        row: dict[Axes, list[float]] = {}
        for j, column in enumerate(columns):
            axes: Axes = grid[0, i] if single else grid[i, j]
            axes.set_yscale("log")
            for cell in study.cells.values():
                if (cell.panel, cell.column) != (panel, column):
                    continue
                curves = [(run, *_averaged(run, curve)) for run in study.runs_of(cell.id)]
                curves = [found for found in curves if len(found[1])]
                drawn += [run for run, *_ in curves]
                short += [run for run, steps, _ in curves if run.status == "finished" and steps[-1] != run.steps]
                crossed |= any(run.status == "diverged" for run, *_ in curves)
                is_metric = curve is study.curve and curve["factor"] == study.metric["factor"]
                if cell.published and study.follows_publication and is_metric:
                    axes.axhline(cell.published.mean, color=palette[cell.row], linestyle=(0, (4, 3)), linewidth=1)
                    row.setdefault(axes, []).append(cell.published.mean)
                order = list(palette).index(cell.row)
                row.setdefault(axes, []).extend(_draw_cell(axes, curves, palette[cell.row], order))
            parts = (curve["label"] if several else "", study.panels[panel] if len(panels) > 1 or not several else "")
            axes.set_title(", ".join(filter(None, (*parts, column))), loc="left", fontsize=10.5)
            axes.margins(x=0.01)
            axes.xaxis.set_major_locator(MaxNLocator(6 if single else 4))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
            axes.tick_params(axis="x", labelsize=9 if single else 8)
            if not axes.lines:
                axes.text(0.5, 0.5, "no run is long enough yet", transform=axes.transAxes, ha="center")
            if i == len(slots) - 1 or single:
                axes.set_xlabel("training step (update)")
            if (i if single else j) == 0 or (several and single):
                axes.set_ylabel(f"{curve['label']} (log scale)")
        extent = [value for values in row.values() for value in values]
        for axes in row:
            if extent:
                _log_axis(axes, min(extent) / 1.08, max(extent) * 1.08)
    if not drawn:
        return None
    handles = [Line2D([], [], color=colour, linewidth=2.2, label=tables.label(row)) for row, colour in palette.items()]
    if any(run.status in ("failed", "missing") for run in drawn):
        handles.append(Line2D([], [], color="#404040", linewidth=0.9, label="one run, unfinished"))
    if crossed:
        handles.append(Line2D([], [], color="#404040", marker="x", linewidth=0.9, label="one run, diverged"))
    title = "How does the error fall in training, with and without limiting?"
    frame(figure, study, title, handles)
    widths = {f"{curve['boxcar']:,}": curve["label"] for curve in study.curves}
    told = " or ".join(f"{width} ({label})" for width, label in widths.items()) if len(widths) > 1 else "".join(widths)
    caption = (
        f"Each curve averages {told} steps of the training error, before any limiting, and then the "
        "finished runs of a setting; the band spans the lowest and the highest of them, and a point stands at the last "
        "step it averages. The steep start leaves the frame."
    )
    if any(run.status != "finished" for run in drawn):
        caption += (
            " Thin lines are single runs: unfinished ones, and diverged ones up to a cross where they end "
            "or leave the frame."
        )
    if study.follows_publication and any(cell.published for cell in study.cells.values()):
        caption += " Dashed lines are the published final errors."
    if ended := len({run.folder for run in short}):
        caption += f" The metrics of {ended} finished runs end before the step that their results report."
    return Drawing("learning_curves", title, caption, figure, tuple({run.folder: run for run in drawn}.values()))


def rule_explained(study: Study) -> Drawing | None:
    """Draw the losses of one run, the limit above them, and what the limit does to the losses that pass it."""
    found = _clearest_run(study)
    if found is None:
        return None
    run, steps, loss, limit = found
    cell = study.cells[run.cell]
    figure = Figure(figsize=(9.8, 7.4), layout="constrained")
    whole, zoom = figure.subplots(2, 1, height_ratios=(1, 1.05))
    start, end = _clearest_window(loss, limit)
    shown = loss[np.isfinite(loss) & (loss > 0)]
    bottom = max(float(np.quantile(shown, 0.02)), float(shown.max()) * 1e-9)
    dense = min(1.0, 6000 / len(loss))  # many dots are drawn smaller
    for axes, window, size in ((whole, slice(None), 3.0 * dense**0.6), (zoom, slice(start, end), 14.0)):
        x, y, top = steps[window], loss[window], limit[window]
        over = np.isfinite(y) & (y > top)
        axes.scatter(x[~over], y[~over], s=size, color="#8C8C8C", linewidths=0, alpha=0.75, rasterized=True)
        drops = [((a, b), (a, c)) for a, b, c in zip(x[over], y[over], top[over], strict=True)]
        axes.add_collection(
            LineCollection(
                drops,
                colors=SPIKE,
                linewidths=0.7 * dense**0.25 if axes is whole else 1.3,
                alpha=0.8,
                rasterized=True,
            )
        )
        axes.scatter(x[over], y[over], s=max(size * 2.4, 2.5), color=SPIKE, linewidths=0, zorder=3, rasterized=True)
        axes.plot(x, np.where(np.isfinite(top), top, np.nan), color=LIMIT, linewidth=1.8, zorder=4)
        if axes is zoom:
            axes.scatter(x[over], top[over], s=26, facecolors="white", edgecolors=SPIKE, linewidths=1.3, zorder=5)
        axes.set_yscale("log")
        inside = np.concatenate([y[np.isfinite(y)], top[np.isfinite(top)]])
        axes.set_ylim(bottom, float(inside.max()) * 1.6)
        margin = 0.006 * len(x) + 1
        axes.set_xlim(x[0] - margin, x[-1] + margin)
        axes.set_ylabel("loss (log scale)")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(_PlainLabels(labelOnlyBase=False))
        axes.grid(axis="y", color="#E6E6E6", linewidth=0.7)
    whole.axvspan(steps[start], steps[end - 1], color=LIMIT, alpha=0.10, linewidth=0)
    middle, on_top = (steps[start] + steps[end - 1]) / 2, whole.get_xaxis_transform()
    whole.plot([middle], [1.0], marker="v", color=LIMIT, markersize=8, transform=on_top, clip_on=False, zorder=6)
    over = np.isfinite(loss) & (loss > limit)
    share = 100 * over.mean()
    whole.set_title(f"The whole run: {over.sum():,} of {len(loss):,} losses limited ({share:.1f} %)", loc="left")
    zoom.set_title(f"Steps {steps[start]:,} to {steps[end - 1]:,}, marked by the triangle above", loc="left")
    zoom.set_xlabel("training step (update)")
    handles = [
        Line2D([], [], color="#8C8C8C", marker="o", markersize=4, linestyle="", label="loss, left as it is"),
        Line2D([], [], color=LIMIT, linewidth=1.8, label="limit"),
        Line2D(
            [],
            [],
            color=SPIKE,
            marker="o",
            markersize=6,
            linestyle="-",
            label="loss above the limit, scaled down",
        ),
        Line2D(
            [],
            [],
            color=SPIKE,
            marker="o",
            markersize=5.5,
            markerfacecolor="white",
            linestyle="",
            label="its new value",
        ),
    ]
    title = "Which losses does the rule limit, and to what?"
    frame(figure, study, title, handles)
    place = ", ".join(filter(None, (tables.lower_first(study.panels[cell.panel]), cell.column, tables.label(cell.row))))
    finite = limit[np.isfinite(limit)]
    is_settling = finite[0] > 1.5 * np.median(finite[len(finite) // 2 :])
    settles = ", starts from an over-estimate and settles while it learns their scale"
    caption = (
        f"Every dot is the loss of one update of one run ({place}, seed {run.seed}); the limit follows the losses "
        f"already seen{settles if is_settling else ''}. A loss above the limit is "
        "scaled down to it, and its gradient by the same factor: the direction of the update is kept, its size bounded."
    )
    hidden = int((~np.isfinite(loss)).sum() + (loss <= 0).sum())
    if hidden:
        caption += f" {hidden:,} losses that are not positive finite numbers are not drawn."
    return Drawing("rule_explained", title, caption, figure, (run,))


def differences(study: Study) -> Drawing | None:
    """Draw each setting's paired differences to its baseline, in percent: every seed, the mean, its interval."""
    rows = [row for row in tables.tabulate(study) if row.difference and row.difference.relative is not None]
    if not rows:
        return None
    panels = [panel for panel in study.panels if any(row.cell.panel == panel for row in rows)]
    sizes = [sum(row.cell.panel == panel for row in rows) for panel in panels]
    figure = Figure(figsize=(9.8, 1.6 + 0.6 * len(panels) + 0.45 * sum(sizes)), layout="constrained")
    heights = [size + 0.6 for size in sizes]
    grid = figure.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    palette, drawn, texts, is_compared = colours(study), [], [], False
    for axes, panel in zip(grid, panels, strict=True):
        inside = [row for row in rows if row.cell.panel == panel]
        places = tables.percent_decimals(rows)
        axes.axvline(0, color="#404040", linewidth=1)
        for y, row in enumerate(inside):
            difference, baseline = row.difference, row.baseline
            assert difference is not None  # what `rows` was chosen by
            assert baseline is not None
            assert difference.baseline
            ours, theirs = study.values(row.cell.id), study.values(baseline.id)
            seeds = sorted(ours.keys() & theirs.keys())
            dots = [100 * (ours[seed] - theirs[seed]) / abs(difference.baseline) for seed in seeds]
            colour = palette[row.cell.row]
            spread = np.linspace(-0.14, 0.14, len(dots)) if len(dots) > 1 else np.zeros(1)
            axes.scatter(dots, y + 0.16 + spread * 0.6, s=16, color=colour, alpha=0.45, linewidths=0)
            mean, low, high = map(difference.in_percent, (difference.mean, difference.low, difference.high))
            if low is not None and high is not None:
                axes.plot([low, high], [y - 0.14] * 2, color=colour, linewidth=2.4, solid_capstyle="butt")
            axes.plot([mean], [y - 0.14], "o", color=colour, markersize=7.5)
            if row.cell.published and baseline.published and study.follows_publication:
                published = 100 * (row.cell.published.mean / baseline.published.mean - 1)
                axes.plot([published], [y - 0.14], "D", mfc="white", mec="black", markersize=6, zorder=4)
                is_compared = True
            numbers = f"{tables.number(mean, places, signed=True)} %  {tables.interval(low, high, places, signed=True)}"
            tail = f"{tables.p_value(difference.p_value, named=True)}, {difference.n} pairs"
            texts.append(axes.text(1.02, y, f"{numbers}\n{tail}", transform=axes.get_yaxis_transform(), va="center"))
            drawn += [run for cell in (row.cell, baseline) for run in study.runs_of(cell.id, "finished")]
        several = len(tables.baselines_of(study, panel)) > 1
        names = [tables.name(study, row.cell) for row in inside]
        if several:
            against = [tables.cells(row, 0, 0)["against"] for row in inside]
            names = [f"{name}\nagainst {baseline}" for name, baseline in zip(names, against, strict=True)]
        axes.set_yticks(range(len(inside)), names)
        axes.set_ylim(len(inside) - 0.45, -0.55)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color="#E6E6E6", linewidth=0.7)
        named = [study.metric["label"]] * (len(study.metrics) > 1)
        if not named or len(panels) > 1:
            named.append(study.panels[panel])
        subject = ", ".join(named)
        alone = "" if several else f", against {tables.label(*tables.baselines_of(study, panel))}"
        axes.set_title(f"{subject}{alone}", loc="left")
    for text in texts:
        text.set_fontsize(8.5)
    better = "left" if study.metric["better"] == "lower" else "right"
    grid[-1].set_xlabel(f"difference in percent of the baseline's mean ({better} of 0 is better)")
    handles = [
        Line2D([], [], color="#404040", marker="o", linewidth=2.4, markersize=7, label="mean and 95 % interval"),
        Line2D([], [], color="#404040", marker="o", alpha=0.45, linestyle="", markersize=4, label="one seed"),
    ]
    if is_compared:
        handles.append(Line2D([], [], mfc="white", mec="black", marker="D", linestyle="", label="published"))
    title = "How much does each setting change the error, seed by seed?"
    frame(figure, study, title, handles)
    caption = (
        "Each small dot is one seed: the setting's run minus the baseline's run of the same seed, in percent of the "
        "baseline's mean. The large dot is their mean with its 95 % t interval; an interval that crosses 0 means that "
        "no difference was detected."
    )
    return Drawing("differences", title, caption, figure, tuple({run.folder: run for run in drawn}.values()))


def _averaged(run: Run, curve: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Read a run's learning curve, thinned to what is visible: last step of each window, average."""
    column, width = curve["column"], int(curve["boxcar"])
    rows = run.metrics(column)
    count = len(rows["step"]) - width + 1
    if count < 1:
        return rows["step"][:0], rows[column][:0]
    stride = max(1, count // _POINTS)
    # Reversed, so that the thinned curve ends at the run's last step.
    values = boxcar(rows[column][::-1], width, stride)[::-1] * curve["factor"]
    return rows["step"][::-1][::stride][: len(values)][::-1], values


def _draw_cell(
    axes: Axes, curves: Sequence[tuple[Run, np.ndarray, np.ndarray]], colour: str, order: int
) -> list[float]:
    """Draw one setting's curves; return values that must lie inside the frame, the steep start not among them."""
    whole = [(steps, values) for run, steps, values in curves if run.status == "finished"]
    inside: list[float] = []
    for run, steps, values in curves:
        settled = values[len(values) // _START :]
        settled = settled[np.isfinite(settled) & (settled > 0)]
        if not len(settled):
            continue
        # A divergence leaves the frame: to show all of it would flatten everything else.
        usual = float(np.median(settled)) * 6
        inside += [float(settled.min()), min(float(settled.max()), usual)]
        if run.status == "finished":
            continue
        axes.plot(steps, values, color=colour, linewidth=0.9, alpha=0.8)
        seen = np.flatnonzero(np.isfinite(values))
        if run.status == "diverged":
            height = min(float(values[seen[-1]]), usual)
            at = seen[np.flatnonzero(values[seen] >= height)[0]]
            axes.plot(steps[at], height, "x", color=colour, markersize=8, markeredgewidth=2, zorder=5)
    if whole:
        # Runs of one study have one length; where they do not, the common part is averaged.
        last = min(steps[-1] for steps, _ in whole)
        grid = next(steps for steps, _ in whole if steps[-1] == last)
        stack = np.stack([np.interp(grid, steps, values) for steps, values in whole])
        # Curves often coincide: thinner lines over wider ones leave both visible.
        width = max(0.9, 2.6 - 0.5 * order)
        axes.plot(grid, stack.mean(axis=0), color=colour, linewidth=width, zorder=3 + 0.01 * order)
        if len(whole) > 1:
            axes.fill_between(grid, stack.min(axis=0), stack.max(axis=0), color=colour, alpha=0.11, linewidth=0)
    return inside


def _clearest_run(study: Study) -> tuple[Run, np.ndarray, np.ndarray, np.ndarray] | None:
    """Find the run that shows the rule best: of every compared setting's first, that with most limited losses."""
    best, most = None, -1
    if not {"loss", "limit"} <= study.stream.keys():
        return None
    for cell in study.cells.values():
        if cell.baseline is None:
            continue
        for run in study.runs_of(cell.id, "finished", "diverged", "missing"):
            rows = run.metrics(study.stream["loss"], study.stream["limit"])
            loss, limit = rows[study.stream["loss"]], rows[study.stream["limit"]]
            if not np.isfinite(limit).any():
                continue
            count = int((np.isfinite(limit) & (loss > limit)).sum())
            if count > most:
                best, most = (run, rows["step"], loss, limit), count
            break
    return best


def _clearest_window(loss: np.ndarray, limit: np.ndarray) -> tuple[int, int]:
    """Find the stretch of a few hundred losses, past the start, whose spikes stand out most."""
    n = len(loss)
    over = np.isfinite(loss) & (loss > limit)
    # Wide enough for about a dozen spikes, narrow enough to tell one from the next.
    width = min(n, max(60, min(400, n // 12, 12 * n // max(1, int(over.sum())))))
    excess = np.log(np.maximum(loss, 1e-300) / limit, out=np.zeros(n), where=over)
    excess[: n // 8] = 0.0
    scores = boxcar(excess, width)
    if not scores.any():
        return n - width, n
    # The best windows hold the same spikes; the middle one of them keeps the spikes away from its ends.
    best = int(np.argmax(scores))
    beyond = np.flatnonzero(scores[best:] < scores[best] * (1 - 1e-9))
    start = best + (int(beyond[0]) if len(beyond) else len(scores) - best) // 2
    return start, start + width


def _log_axis(axes: Axes, low: float, high: float) -> None:
    """Scale y logarithmically from low to high, with plain numbers as labels."""
    axes.set_ylim(low, high)
    subs = (1.0, 2.0, 5.0) if high > 6 * low else (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.7)
