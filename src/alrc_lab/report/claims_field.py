"""Draw the field that clipped descent follows, over the curl that a gradient cannot have."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np
from matplotlib.colors import LogNorm, SymLogNorm
from matplotlib.figure import Figure

from alrc_lab.report.canvas import Drawing
from alrc_lab.report.claims import ClaimsStudy
from alrc_lab.report.claims_canvas import LOOKS, WIDTH, frame, look, quiet
from alrc_lab.report.runs import Run

_ARROWS = 13  # along each side: more would hide the colours


def scaled_loss(study: ClaimsStudy, run: Run, rows: Mapping[str, np.ndarray]) -> Drawing | None:
    """Draw the curl of the mean field in colour with the direction of descent on top, a panel for each rule."""
    names = [name.removeprefix("curl_") for name in rows if name.startswith("curl_")]
    names = [name for name in names if {f"field_w_{name}", f"field_v_{name}"} <= rows.keys()]
    grid = _grid(rows) if {"w", "v"} <= rows.keys() else None
    if not names or grid is None:
        return None
    w, v, order = grid
    names.sort(key=_place)
    fields = {
        name: [rows[f"{kind}_{name}"][order].reshape(len(w), len(v)).T for kind in ("curl", "field_w", "field_v")]
        for name in names
    }
    curls = np.concatenate([curl.ravel() for curl, _, _ in fields.values()])
    curls = curls[np.isfinite(curls)]
    largest = float(np.abs(curls).max(initial=0.0))
    if not largest > 0:
        return None
    is_signed = bool((curls < 0).any())
    across = min(3, len(names))
    down = math.ceil(len(names) / across)
    side = (WIDTH - 1.3) / max(across, 2)
    figure = Figure(figsize=(WIDTH, 0.75 + down * (side + 0.5)), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    if is_signed:
        colours, scale = "PuOr", SymLogNorm(largest / 100, vmin=-largest, vmax=largest)
    else:
        colours, scale = "YlOrBr", LogNorm(largest / 1000, largest)
    places = [_spread(len(axis)) for axis in (w, v)]
    image = None
    for axes, name in zip(panels.flat, names, strict=False):
        curl, field_w, field_v = fields[name]
        shown = curl if is_signed else np.maximum(curl, largest / 1000)  # a logarithmic scale has no place for 0
        image = axes.pcolormesh(w, v, shown, cmap=colours, norm=scale, shading="nearest", rasterized=True)
        at = np.ix_(places[1], places[0])
        length = np.hypot(field_w[at], field_v[at])
        length = np.where(length > 0, length, 1)
        axes.quiver(
            w[places[0]], v[places[1]], -field_w[at] / length, -field_v[at] / length, color="#303030", pivot="mid",
            scale=_ARROWS * 1.35, scale_units="width", width=0.006, headwidth=4.5, headlength=5, headaxislength=4.5,
        )  # fmt: skip
        axes.set_box_aspect(1)
        quiet(axes, f"{_title(name)}\nmedian {np.nanmedian(np.abs(curl)):.2g}".replace("-", "−"))
    for axes in panels.flat[len(names) :]:
        axes.set_visible(False)
    for axes in panels[-1]:
        axes.set_xlabel("w", fontsize=9)
    for axes in panels[:, 0]:
        axes.set_ylabel("v", fontsize=9)
    assert image is not None  # names is not empty
    bar = figure.colorbar(image, ax=panels, shrink=0.82, aspect=22 * down, pad=0.015)
    bar.set_label("curl of E[g/c]" if is_signed else "curl of E[g/c], ‖J − Jᵀ‖ ÷ ‖J‖", fontsize=9)
    if is_signed:
        decades = [10.0**power for power in range(-300, 300) if largest / 100 < 10.0**power <= largest]
        bar.set_ticks([-value for value in reversed(decades)] + [0.0, *decades])
    bar.ax.tick_params(labelsize=8)
    bar.ax.minorticks_off()
    title = "Is clipped descent the descent of any loss?"
    frame(figure, study, run, title, [])
    measure = "∂H_v/∂w − ∂H_w/∂v" if is_signed else "‖J − Jᵀ‖ ÷ ‖J‖, J its Jacobian,"
    caption = (
        f"Colour: the curl {measure} of the mean field H = E[g/c] of a network with two weights, on one scale for all "
        "panels; arrows: the direction of descent, all of one length. A gradient has no curl, so where there is colour "
        "the field is the gradient of no loss."
    )
    return Drawing("scaled_loss", title, caption, figure, (run,))


def _spread(count: int) -> np.ndarray:
    """Choose places for the arrows along a side, evenly and as far from one end as from the other."""
    stride = max(1, round(count / _ARROWS))
    return np.arange((count - 1) % stride // 2, count, stride)


def _grid(rows: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Find the two axes of the grid and the order of its points, w outermost; None if it is no whole grid."""
    w, v = np.unique(rows["w"]), np.unique(rows["v"])
    order = np.lexsort((rows["v"], rows["w"]))
    is_whole = len(order) == len(w) * len(v) and min(len(w), len(v)) > 1
    return (w, v, order) if is_whole else None


def _threshold(name: str) -> float | None:
    """Read a threshold from a column's name: 0p5 is 0.5; None if it is none."""
    return float(name.replace("p", ".")) if re.fullmatch(r"\d+(p\d+)?", name) else None


def _place(name: str) -> tuple[int, float]:
    """Sort no clipping first, then Norm by its threshold, then the others as they come."""
    threshold = _threshold(name)
    return (0, 0.0) if name == "none" else (2, 0.0) if threshold is None else (1, threshold)


def _title(name: str) -> str:
    """Name a field from its columns: 0p5 is Norm at 0.5, agc_0p1 AGC at 0.1."""
    if (threshold := _threshold(name)) is not None:
        return f"Norm, λ = {threshold:g}"
    method, _, rest = name.partition("_")
    if name in LOOKS or not rest:
        return look(name).label
    threshold = _threshold(rest)
    return f"{look(method).label}, {rest.replace('_', ' ') if threshold is None else f'λ = {threshold:g}'}"
