"""Draw what clipping does to the solution: where it settles, the mean gradient there, the bias at equal clipping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alrc_lab.report.canvas import Drawing
from alrc_lab.report.claims import ClaimsStudy
from alrc_lab.report.claims_canvas import GRID, INK, WIDTH, frame, handles, log_axis, look, quiet, reference
from alrc_lab.report.runs import Run
from alrc_lab.report.words import number

Rows = Mapping[str, np.ndarray]
_NEEDED = {"method_index", "threshold", "root_predicted", "root_mean", "root_low", "root_high", "symmetric"}
_GRADIENT = {"gradient_mean", "gradient_low", "gradient_high"}


def bias(study: ClaimsStudy, run: Run, rows: Rows) -> Drawing | None:
    """Draw each setting's predicted and found root, and the mean gradient there, skewed above symmetric data."""
    if not rows.keys() >= _NEEDED:
        return None
    kept = np.isfinite(rows["root_low"]) & np.isfinite(rows["root_high"]) & (rows.get("matched", 0 * rows["step"]) == 0)
    if "bias" in rows:  # where the mean does not exist there is no minimiser to be off from
        kept &= np.isfinite(rows["bias"])
    blocks = [np.flatnonzero(kept & (rows["symmetric"] == flag)) for flag in (0, 1)]
    if not any(map(len, blocks)):
        return None
    shown = [(flag, block) for flag, block in enumerate(blocks) if len(block)]
    sizes = [len(block) for _, block in shown]
    has_gradient = rows.keys() >= _GRADIENT
    figure = Figure(figsize=(WIDTH, 1.75 + 0.3 * len(shown) + 0.235 * sum(sizes)), layout="constrained")
    grid = figure.subplots(
        len(shown), 1 + has_gradient, squeeze=False, sharex="col", height_ratios=[size + 0.8 for size in sizes],
        width_ratios=(1.25, 1)[: 1 + has_gradient],
    )  # fmt: skip
    methods = _methods(study, run)
    ends = np.concatenate([rows[name][block] for _, block in shown for name in ("root_mean", "root_predicted")])
    is_log = bool((ends[np.isfinite(ends)] > 0).all())
    floor = float(np.nanmin(ends)) / 5 if is_log else -np.inf  # an interval may reach below what such an axis shows
    for line, (flag, block) in enumerate(shown):
        names = [_setting(methods, rows, i) for i in block]
        title = "symmetric data" if flag else "skewed data: a large value in one example of ten"
        title = title if flag or _config(study, run).get("rare") == 0.1 else "skewed data"
        for j, axes in enumerate(grid[line]):
            part = "gradient" if j else "root"
            if not j and is_log:
                log_axis(axes, "x")
            for y, i in enumerate(block):
                drawn = look(methods(rows["method_index"][i]))
                ends = rows[f"{part}_low"][i], rows[f"{part}_high"][i]
                ends = (max(ends[0], floor), ends[1]) if not j else ends
                colour = drawn.colour if drawn.width < 3 else INK  # pale is for lines below others
                axes.plot(ends, [y, y], color=colour, linewidth=2.2, solid_capstyle="butt", zorder=3)
                axes.plot(rows[f"{part}_mean"][i], y, marker=drawn.marker, color=colour, markersize=5.5, zorder=4)
                if not j and np.isfinite(rows["root_predicted"][i]):
                    axes.plot(
                        rows["root_predicted"][i], y, marker="|", color="#000000", markersize=13, markeredgewidth=1.4,
                        zorder=5,
                    )  # fmt: skip
            _lay_out(axes, names if not j else [""] * len(names), title if not j else "")
            if j:
                for y, i in enumerate(block):
                    told = number(float(rows["gradient_mean"][i]), 3)
                    axes.text(1.02, y, told, transform=axes.get_yaxis_transform(), va="center", fontsize=8.5)
                axes.axvline(0, color=INK, linewidth=1, linestyle=(0, (4, 2)), zorder=1)
            elif "bias" in rows:
                best = float(np.median(rows["root_mean"][block] - rows["bias"][block]))
                axes.axvline(best, color=INK, linewidth=1, linestyle=(0, (4, 2)), zorder=1)
    grid[-1, 0].set_xlabel("θ where the iterates settle", fontsize=9)
    if has_gradient:
        grid[-1, 1].set_xlabel("mean gradient E[g] there", fontsize=9)
    title = "Where does clipped descent settle, and is the mean gradient 0 there?"
    entries = [
        reference("predicted root of E[g/c]", linestyle="", marker="|", markersize=11, markeredgewidth=1.4),
        reference("found, 95 % interval", color=INK, marker="o", markersize=5, linewidth=2.2),
        reference("minimiser; E[g] = 0", color=INK, linestyle=(0, (4, 2)), linewidth=1),
    ]
    frame(figure, study, run, title, entries)
    caption = (
        "Left: where the iterates settle; a dot on its bar is where E[g/c] was predicted to vanish, and its distance "
        "from the dashed line is the bias. Right: the mean gradient there; an interval that holds 0 is what the step "
        "from E[g/c] = 0 to E[g] = 0 asks for."
    )
    return Drawing("bias", title, caption, figure, (run,))


def matched_bias(study: ClaimsStudy, run: Run, rows: Rows) -> Drawing | None:
    """Draw the bias of each rule against the share of examples that it limits, a panel for each law of the data."""
    if not rows.keys() >= {"matched", "fraction_clipped", "method_index", "bias"}:
        return None
    in_deviations = "bias_in_deviations" in rows
    value = rows["bias_in_deviations" if in_deviations else "bias"]
    kept = (rows["matched"] == 1) & (rows["fraction_clipped"] > 0) & np.isfinite(value)
    if not kept.any():
        return None
    laws = rows.get("law_index", np.zeros(len(kept)))
    order = list(dict.fromkeys(laws[kept]))
    config, methods = _config(study, run), _methods(study, run)
    names = config.get("matched_laws") or []
    named = [str(name) for name in names] if len(names) == len(order) else [f"law {law:.0f}" for law in order]
    figure = Figure(figsize=(WIDTH, 3.75), layout="constrained")
    panels = figure.subplots(1, len(order), squeeze=False, sharex=True, sharey=True)[0]
    panels[0].set_xlim(max(100 * float(rows["fraction_clipped"][kept].min()) / 1.3, 0.01), 120)
    drawn: set[str] = set()
    for axes, law, name in zip(panels, order, named if len(order) > 1 or names else [""], strict=True):
        log_axis(axes, "x")
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        axes.axhline(0, color=INK, linewidth=1)
        for wanted in config.get("matched_fractions") or ():
            axes.axvline(100 * wanted, color=INK, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
        for index in dict.fromkeys(rows["method_index"][kept]):
            inside = np.flatnonzero(kept & (laws == law) & (rows["method_index"] == index))
            inside = inside[np.argsort(rows["fraction_clipped"][inside])]
            shown = look(methods(index))
            drawn.add(methods(index))
            x, y = 100 * rows["fraction_clipped"][inside], value[inside]
            axes.plot(x, y, **shown.line(marker=shown.marker, markersize=4.5))
            if rows.keys() >= _GRADIENT:
                with np.errstate(divide="ignore", invalid="ignore"):
                    unit = np.where(rows["bias"][inside] != 0, y / rows["bias"][inside], np.nan)
                low, high = (unit * rows[f"gradient_{end}"][inside] for end in ("low", "high"))
                axes.fill_between(x, low, high, color=shown.colour, alpha=0.18, linewidth=0)
        quiet(axes, name)
        axes.set_xlabel("examples limited, %", fontsize=9)
    unit = "standard deviations of the data" if in_deviations else "units of θ"
    panels[0].set_ylabel(f"bias of the solution\nin {unit}", fontsize=9)
    title = "How far does each rule move the solution, at equal clipping?"
    entries = handles(drawn, markers=True)
    if config.get("matched_fractions"):
        entries.append(reference("compared in the table", color=INK, linestyle=(0, (1, 2)), linewidth=0.8))
    frame(figure, study, run, title, entries)
    caption = (
        "Every point is one threshold of one rule: the mean over seeds of θ minus the minimiser, against the share of "
        "examples limited; bands are 95 % intervals. A rule that lies closer to 0 at the same share distorts the "
        "solution less."
    )
    return Drawing("bias_matched", title, caption, figure, (run,))


def _config(study: ClaimsStudy, run: Run) -> Mapping[str, Any]:
    """Return what a run was made with."""
    return study.configs.get(run.cell) or {}


def _methods(study: ClaimsStudy, run: Run) -> Any:
    """Return the function that names a method by its index."""
    names = _config(study, run).get("methods") or []
    return lambda index: str(names[int(index)]) if 0 <= int(index) < len(names) else f"method {index:.0f}"


def _setting(methods: Any, rows: Rows, i: Any) -> str:
    """Name a row: the method and its threshold."""
    method, threshold = methods(rows["method_index"][i]), rows["threshold"][i]
    if not np.isfinite(threshold):
        return look(method).label
    return f"{look(method).label}, {'n' if method == 'alrc' else 'λ'} = {threshold:g}"


def _lay_out(axes: Axes, names: list[str], title: str) -> None:
    """Put one setting in each line, the first on top."""
    quiet(axes, title)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="both", color=GRID, linewidth=0.7)
