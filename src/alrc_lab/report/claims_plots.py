"""Draw the figures of a study of claims from the metrics of its runs, one function for each figure.

A column that is not there leaves its panel or line out; a figure without any data is not drawn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
from matplotlib.figure import Figure

from alrc_lab.report.canvas import Drawing, style
from alrc_lab.report.claims import ClaimsStudy, columns
from alrc_lab.report.claims_bias import bias, matched_bias
from alrc_lab.report.claims_canvas import GRID, LOOKS, WIDTH, frame, handles, log_axis, look, positive, quiet, reference
from alrc_lab.report.claims_field import scaled_loss
from alrc_lab.report.runs import Run

Rows = Mapping[str, np.ndarray]
Draw = Callable[[ClaimsStudy, Run, Rows], Drawing | None]


def draw(study: ClaimsStudy) -> dict[str, list[Drawing]]:
    """Draw every figure that a study has data for, by the id of its experiment."""
    found: dict[str, list[Drawing]] = {}
    with style():
        for experiment in study.experiments.values():
            for cell in cells_of(study, experiment.id):
                rows = columns(study.runs[cell])
                if rows and len(rows["step"]):
                    drawings = (function(study, study.runs[cell], rows) for function in FIGURES[experiment.figure])
                    found.setdefault(experiment.id, []).extend(filter(None, drawings))
    return found


def cells_of(study: ClaimsStudy, experiment: str) -> list[str]:
    """List the cells whose run may hold an experiment's figure: the one named like it, or those its claims name."""
    if study.experiments[experiment].figure not in FIGURES:
        return []
    named = dict.fromkeys(claim.run for claim in study.claims if claim.experiment == experiment)
    return [cell for cell in ([experiment] if experiment in study.runs else named) if cell in study.runs]


def stability(study: ClaimsStudy, run: Run, rows: Rows) -> Drawing | None:
    """Draw how far the weights went, how many runs were lost, and what was learned, for each tail."""
    found = _matched(rows, r"(max_norm|failed|residual)_(\w+?)_df(\w+(?:\.\d+)?)")
    tails = sorted({tail for _, _, tail in found}, key=_number, reverse=True)
    kinds = [kind for kind in ("max_norm", "failed", "residual") if any(key[0] == kind for key in found)]
    if not found:
        return None
    figure, grid = _panels(len(kinds), len(tails), 1.75, sharey="row")
    labels = {
        "max_norm": "largest ‖θ‖ so far",
        "failed": "share of runs lost",
        "residual": "median |residual|",
    }
    for i, kind in enumerate(kinds):
        for j, tail in enumerate(tails):
            axes = grid[i, j]
            log_axis(axes, "x")
            if kind != "failed":
                log_axis(axes, "y")
            else:
                axes.set_ylim(-0.04, 1.04)
                axes.grid(axis="y", color=GRID, linewidth=0.7)
            for (_, method, _), values in _of(found, kind, tail):
                axes.plot(rows["step"], values if kind == "failed" else positive(values), **look(method).line())
            if kind == "max_norm" and "envelope" in rows:
                axes.plot(rows["step"], positive(rows["envelope"]), color="#000000", linewidth=1, linestyle=(0, (6, 3)))
            quiet(axes, _tail(tail) if i == 0 else "")
            if j == 0:
                axes.set_ylabel(labels[kind], fontsize=9)
            if i == len(kinds) - 1:
                axes.set_xlabel("update n", fontsize=9)
    title = "Do the weights stay bounded when the data have heavy tails?"
    entries = handles(method for _, method, _ in found)
    if "envelope" in rows and "max_norm" in kinds:
        entries.append(reference("bound λ Σγ", linestyle=(0, (6, 3)), linewidth=1))
    frame(figure, study, run, title, entries)
    caption = (
        "Median over seeds of the largest norm so far, the share of runs lost (not finite, or beyond the bound), and "
        "the median residual; a column is a tail of inputs and noise, df its degrees of freedom. A stable method is "
        "flat in the first row long before the dashed envelope, and still falls in the last: weights that do not move "
        "are stable too."
    )
    return Drawing("stability", title, caption, figure, (run,))


def noise(study: ClaimsStudy, run: Run, rows: Rows) -> Drawing | None:
    """Draw the quantiles of the noise that is still to come after update m, for each step exponent."""
    found = _matched(rows, r"(q50|q90|q99|bound)_(p\d+)(?:_(\w+))?")
    if not found or "m" not in rows:
        return None
    powers = sorted({power for _, power, _ in found}, reverse=True)
    methods = list(dict.fromkeys(method or "norm" for _, _, method in found))
    quantiles = {"q50": (1.0, 3.5), "q90": (1.4, 4.2), "q99": (2.0, 5.0)}
    if len(methods) > 1:
        del quantiles["q90"]  # three lines for each of several methods hide one another
    figure, grid = _panels(1, len(powers), 3.1, sharey="row")
    for power, axes in zip(powers, grid[0], strict=True):
        axes.set_xscale("function", functions=(np.log1p, np.expm1))
        log_axis(axes, "y")
        for (kind, _, method), values in ((key, values) for key, values in found.items() if key[1] == power):
            shown = look(method or "norm")
            if kind == "bound":
                axes.plot(rows["m"], positive(values), color=shown.colour, linewidth=1, linestyle=(0, (8, 4)))
            elif kind in quantiles:
                width, size = quantiles[kind]
                line = shown.line(linewidth=width, marker=shown.marker, markersize=size)
                axes.plot(rows["m"], positive(values), **line)
                if (method or "norm") == methods[0]:
                    axes.annotate(
                        f"{kind[1:]} %", (rows["m"][-1], values[-1]), xytext=(5, 0), textcoords="offset points",
                        va="center", fontsize=7.5, color=shown.colour, annotation_clip=False,
                    )  # fmt: skip
        axes.set_xticks(rows["m"], [f"{value:,.0f}" for value in rows["m"]])
        exponent = _exponent(power)
        told = r"\Sigma\gamma^2 < \infty" if exponent > 0.5 else r"\Sigma\gamma^2 = \infty"
        quiet(axes, rf"$\gamma_n \propto (n+1)^{{-{exponent:g}}}$, ${told}$" + ": control" * (exponent <= 0.5))
        axes.set_xlabel("m: noise from update m on", fontsize=9)
    grid[0, 0].set_ylabel("largest partial sum of the noise", fontsize=9)
    title = "Does the noise that is still to come vanish?"
    entries = handles(methods, markers=True)
    if any(kind == "bound" for kind, _, _ in found):
        entries.append(reference("bound (Azuma or Pinelis)", linestyle=(0, (8, 4)), linewidth=1, color="#606060"))
    frame(figure, study, run, title, entries)
    told = ", ".join(f"{name[1:]} %" for name in quantiles)
    caption = (
        f"Quantiles over seeds (from thin to thick {told}) of the largest partial sum of γM from update m on. Where "
        "Σγ² is finite they must fall with m and stay below the bound; where it is not, nothing promises that."
    )
    return Drawing("noise", title, caption, figure, (run,))


def network(study: ClaimsStudy, run: Run, rows: Rows) -> Drawing | None:
    """Draw the scaled mean gradient, the mean gradient and the loss along training."""
    columns = _matched(rows, r"(field|gradient|loss)_(\w+)_(skewed|symmetric)")
    found = {key: values for key, values in columns.items() if key[1] in LOOKS}
    if not found:
        return None
    kinds = [kind for kind in ("field", "gradient", "loss") if any(key[0] == kind for key in found)]
    laws = [law for law in ("skewed", "symmetric") if any(key[2] == law for key in found)]
    figure, grid = _panels(len(kinds), len(laws), 1.75, sharey="row")
    labels = {"field": "‖E[g/c]‖, of its start", "gradient": "‖E[g]‖, of its start", "loss": "loss"}
    for i, kind in enumerate(kinds):
        for j, law in enumerate(laws):
            axes = grid[i, j]
            log_axis(axes, "x")
            log_axis(axes, "y")
            for (_, method, _), values in _of(found, kind, law):
                kept = np.isfinite(values)  # settings are not all looked at in the same steps
                axes.plot(rows["step"][kept], positive(values[kept]), **look(method).line())
            quiet(axes, f"{law} noise" if i == 0 else "")
            if j == 0:
                axes.set_ylabel(labels[kind], fontsize=9)
            if i == len(kinds) - 1:
                axes.set_xlabel("update n", fontsize=9)
    title = "In a network, which of the two mean gradients vanishes?"
    frame(figure, study, run, title, handles(method for _, method, _ in found))
    caption = (
        "Median over seeds, on a finite data set, so that both means are exact sums. Theorem 1 is about the first row; "
        "where the second stays up while the first falls, the scaled mean gradient vanishes and the mean gradient "
        "does not."
    )
    if len(found) < len(columns):
        caption += " Further thresholds and batch sizes are in the tables alone."
    return Drawing("network", title, caption, figure, (run,))


def small_weights(study: ClaimsStudy, run: Run, rows: Rows) -> Drawing | None:
    """Draw the step that is allowed at each size of the weights: absolute, relative, and against no clipping."""
    found = _matched(rows, r"(absolute|relative|ratio)_(\w+)")
    if not found or "weight_norm" not in rows:
        return None
    kinds = [kind for kind in ("absolute", "relative", "ratio") if any(key[0] == kind for key in found)]
    figure, grid = _panels(1, len(kinds), 2.9)
    labels = {
        "absolute": "absolute step",
        "relative": "step ÷ ‖W‖",
        "ratio": "after ÷ before; > 1 enlarges",
    }
    for j, kind in enumerate(kinds):
        axes = grid[0, j]
        log_axis(axes, "x")
        log_axis(axes, "y")
        for order, (key, values) in enumerate((key, values) for key, values in found.items() if key[0] == kind):
            shown = look(key[1])
            axes.plot(
                rows["weight_norm"], positive(values), **shown.line(), marker=shown.marker, markersize=4,
                markevery=(order, max(1, len(values) // 6)),
            )  # fmt: skip
        if kind == "ratio":
            axes.axhline(1, color="#000000", linewidth=1)
        quiet(axes, labels[kind])
        axes.set_xlabel("‖W‖ of the unit", fontsize=9)
    title = "Do small weights get larger steps?"
    frame(figure, study, run, title, handles((key[1] for key in found), markers=True))
    caption = (
        "One unit with a gradient that is always clipped, at weights from tiny to usual size. A literally larger step "
        "would lie above 1 in the last panel; larger only in relation to the weights is what the middle panel shows."
    )
    return Drawing("small_weights", title, caption, figure, (run,))


def scope(study: ClaimsStudy, run: Run, rows: Rows) -> Drawing | None:
    """Draw what happens where the assumptions fail: separable data, and a step size that never falls."""
    found = _matched(rows, r"(norm|noise_floor)_(\w+)")
    if not found:
        return None
    kinds = [kind for kind in ("norm", "noise_floor") if any(key[0] == kind for key in found)]
    figure, grid = _panels(1, len(kinds), 2.9, sharex=False)
    labels = {"norm": ("separable classes: no finite root", "mean ‖θ‖")}
    labels |= {"noise_floor": ("constant step size", "median |θ − θ*|")}
    for j, kind in enumerate(kinds):
        axes = grid[0, j]
        log_axis(axes, "x")
        if kind == "noise_floor":
            log_axis(axes, "y")
        else:
            axes.grid(axis="y", color=GRID, linewidth=0.7)
        for key, values in found.items():
            if key[0] == kind:
                axes.plot(rows["step"], values if kind == "norm" else positive(values), **look(key[1]).line())
        quiet(axes, labels[kind][0])
        axes.set_ylabel(labels[kind][1], fontsize=9)
        axes.set_xlabel("update n", fontsize=9)
    title = "What happens where no root, or no falling step size, exists?"
    frame(figure, study, run, title, handles(key[1] for key in found))
    caption = (
        "Left: on separable classes the loss has no finite minimiser, and a norm that goes on growing has not "
        "converged. Right: with a constant step size the iterates settle to a noise floor, not to a point. Both lie "
        "outside what the theory is known to claim."
    )
    return Drawing("scope", title, caption, figure, (run,))


FIGURES: dict[str, tuple[Draw, ...]] = {
    "stability": (stability,),
    "noise": (noise,),
    "bias": (bias, matched_bias),
    "network": (network,),
    "small_weights": (small_weights,),
    "scaled_loss": (scaled_loss,),
    "scope": (scope,),
}


def _panels(
    rows: int, columns: int, height: float, *, sharex: bool = True, sharey: Literal["none", "row"] = "none"
) -> tuple[Figure, np.ndarray]:
    """Make a figure of panels that share what they say at their edges."""
    figure = Figure(figsize=(WIDTH, 0.95 + height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey)


def _matched(rows: Rows, pattern: str) -> dict[tuple[str, ...], np.ndarray]:
    """Find the columns whose whole name fits a pattern and that hold a finite number, by the pattern's groups."""
    fitting = ((re.fullmatch(pattern, name), values) for name, values in rows.items())
    return {match.groups(): values for match, values in fitting if match and np.isfinite(values).any()}


def _of(found: Mapping[tuple[str, ...], np.ndarray], kind: str, last: str) -> list[tuple[tuple[str, ...], np.ndarray]]:
    """List the columns of one panel."""
    return [(key, values) for key, values in found.items() if (key[0], key[-1]) == (kind, last)]


def _number(text: str) -> float:
    """Read a number from a column's name: inf, 1.5 or 1p5."""
    return float(text.replace("p", "."))


def _tail(text: str) -> str:
    """Name a tail."""
    value = _number(text)
    return "normal (df = ∞)" if np.isinf(value) else f"Student's t, df = {value:g}"


def _exponent(text: str) -> float:
    """Read a step exponent from a column's name: p75 is 0.75."""
    return float(f"0.{text[1:]}")
