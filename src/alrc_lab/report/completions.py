"""Show held-out pictures, what each setting made of them, and its errors, large enough to be judged by eye.

Every picture has the same greys from −1 to 1, every error the same colours, and a pixel is never smoothed.
"""

from __future__ import annotations

import itertools
import textwrap
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from alrc_lab.report import tables
from alrc_lab.report.canvas import PIXELS_PER_INCH, Drawing, letterhead
from alrc_lab.report.collect import Run, Study

PICTURE_PX = 200  # about the side of a picture on screen; a whole number of screen pixels each
ERROR_COLOURS = matplotlib.colormaps["RdBu_r"].resampled(81)  # more could not be told apart, and cost bytes
# Inches: around the pictures; between them, for the number above each, and between groups; for the colour bar beneath.
_LEFT, _RIGHT, _HEAD, _FOOT = 0.42, 0.12, 0.5, 0.34
_GAP, _LINE, _GROUP = 0.05, 0.18, 0.18
_BAR = 0.66
_TEXT = 0.165  # a line of a column's title


@dataclass(frozen=True)
class Column:
    """Hold one method's completions of the crops that are shown.

    Attributes:
        title: Name of the setting or method.
        pictures: float64, shape (crops, side, side), nominally in [-1, 1].
        rms_percent: Root mean square of the error of each crop in percent of the full range, shape (crops,).
        is_trained: False for a method without training.
    """

    title: str
    pictures: np.ndarray
    rms_percent: np.ndarray
    is_trained: bool


@dataclass(frozen=True)
class Sheet:
    """Hold everything that the two figures show.

    Attributes:
        names: Name of each crop.
        truth: What losses compare with, shape (crops, side, side), in [-1, 1].
        scan: Partial scan in [0, 1], same shape.
        coverage_percent: Share of pixels that were scanned.
        columns: What each setting and each method made of the scans.
        runs: Whose pictures these are.
        lost: Sentences on what is not shown, and why.
    """

    names: tuple[str, ...]
    truth: np.ndarray
    scan: np.ndarray
    coverage_percent: float
    columns: tuple[Column, ...]
    runs: tuple[Run, ...]
    lost: tuple[str, ...]


def collect_sheet(study: Study) -> Sheet | None:
    """Read the pictures that finished runs of one seed and the references keep.

    Args:
        study: The study; its `completions` say which file and which seed.

    Returns:
        The pictures of one set of crops; None if no run kept any yet. A file that is missing, damaged or about other
        crops is left out and told in `lost`.
    """
    if not study.completions:
        return None
    file, seed = str(study.completions["file"]), study.completions["seed"]
    first: dict[str, np.ndarray] | None = None
    columns, runs, lost = list[Column](), list[Run](), list[str]()
    wanted: list[tuple[Run | None, Mapping[str, str], bool]] = []
    for cell in study.cells.values():
        found = [run for run in study.runs_of(cell.id) if run.seed == seed]
        panel = f"{study.panels[cell.panel]}, " * (len(study.panels) > 1)
        wanted.append((found[0] if found else None, {"completion": panel + tables.name(study, cell)}, True))
    if study.references:
        wanted.append((study.references.run, study.references.methods, False))
    for run, methods, is_trained in wanted:
        title = ", ".join(methods.values())
        if run is None or run.status != "finished":
            lost.append(f"{title}: {f'no seed {seed}' if run is None else f'{run.status} ({run.detail})'}.")
            continue
        try:
            arrays = _read(run.path / file, tuple(methods))
            if first is not None:
                _check_same_crops(first, arrays)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            lost.append(f"{title}: {file} of {run.folder} cannot be shown ({_reason(error)}).")
            continue
        first = arrays if first is None else first
        runs += [run] * is_trained
        for key, label in methods.items():
            rms = arrays.get("rms_percent" if key == "completion" else f"{key}_rms_percent")
            if rms is None or rms.shape != (len(arrays["names"]),):
                rms = 50 * np.sqrt(np.square(arrays[key] - arrays["truth"]).mean((1, 2)))
            columns.append(Column(label, arrays[key], rms, is_trained))
    if first is None or not columns:
        return None
    coverage = 100 * float((first["mask"] > 0).mean())
    names = tuple(str(name) for name in first["names"])
    return Sheet(names, first["truth"], first["scan"], coverage, tuple(columns), tuple(runs), tuple(lost))


def completions(study: Study) -> list[Drawing]:
    """Draw two sheets, one of completions and one of their errors; none if no run kept pictures."""
    sheet = collect_sheet(study)
    if sheet is None:
        return []
    seed = study.completions["seed"]
    lost = "".join(f" Not shown: {sentence}" for sentence in sheet.lost)
    percent = "the number above is the root mean square of its error in percent of the full range"
    scanned = f"{sheet.coverage_percent:.1f}{tables.NBSP}% of{tables.NBSP}pixels"
    title = "What is made of a partial scan?"
    pictures = [("truth", sheet.truth, None), (f"scan, {scanned}", 2 * sheet.scan - 1, None)]
    pictures += [(column.title, column.pictures, column.rms_percent) for column in sheet.columns]
    groups = ["", "", *("" if column.is_trained else _untrained(study) for column in sheet.columns)]
    figure = _lay_out(study, sheet, title, pictures, groups, errors_from=len(pictures))[0]
    caption = (
        f"Held-out crops, the seed {seed} of each setting. The truth is what losses compare with; what was not scanned "
        f"is black. Each picture has the same greys, black at −1 and white at 1; {percent}.{lost}"
    )
    drawings = [Drawing("completions", title, caption, figure, sheet.runs, _width(figure))]
    title = "Where are the completions wrong, and by how much?"
    errors = [("truth", sheet.truth, None)]
    errors += [(column.title, 50 * (column.pictures - sheet.truth), column.rms_percent) for column in sheet.columns]
    figure, limit = _lay_out(study, sheet, title, errors, groups[1:], errors_from=1)
    caption = (
        "Completion minus truth of the same crops, in percent of the full range from −1 to 1: red where it is too "
        "bright, blue where it is too dark. All have one scale, which fits the trained settings; errors beyond "
        f"±{limit:g} % have its last colours, and {percent}.{lost}"
    )
    return [*drawings, Drawing("completion_errors", title, caption, figure, sheet.runs, _width(figure))]


def _lay_out(
    study: Study,
    sheet: Sheet,
    title: str,
    columns: Sequence[tuple[str, np.ndarray, np.ndarray | None]],
    groups: Sequence[str],
    errors_from: int,
) -> tuple[Figure, float]:
    """Place pictures so that each of their pixels is a square of whole pixels; return the end of the error scale."""
    count, side = sheet.truth.shape[:2]
    size = side * max(1, round(PICTURE_PX / side)) / PIXELS_PER_INCH
    has_errors = errors_from < len(columns)
    starts = [_LEFT]
    for before, after in itertools.pairwise(groups):
        starts.append(starts[-1] + size + (_GAP if before == after else _GROUP))
    width = max(_snap(starts[-1] + size + _RIGHT), 6.0)
    titles = [textwrap.wrap(name, max(8, int(size / 0.078))) for name, *_ in columns]
    head = _HEAD + _TEXT * max(map(len, titles)) + 0.24 * any(groups)
    height = _snap(head + count * (size + _LINE) + _FOOT + _BAR * has_errors)
    figure = Figure(figsize=(width, height))
    letterhead(figure, study, title)
    limit = _error_scale(sheet)
    for j, (_, values, rms) in enumerate(columns):
        is_error = j >= errors_from
        left = _snap(starts[j])
        middle = (left + size / 2) / width
        for i in range(count):
            bottom = _snap(height - head - (i + 1) * (size + _LINE))
            axes = figure.add_axes((left / width, bottom / height, size / width, size / height))
            colours, end = (ERROR_COLOURS, limit) if is_error else ("gray", 1.0)
            axes.imshow(values[i], interpolation="nearest", cmap=colours, vmin=-end, vmax=end)
            axes.set_axis_off()
            above = (bottom + size + 0.03) / height
            if rms is not None:
                percent = f"{tables.number(float(rms[i]), 2)} %" if np.isfinite(rms[i]) else tables.UNDEFINED
                figure.text(middle, above, percent, ha="center", fontsize=8.5)
            if j == 0:
                place = ((_LEFT - 0.06) / width, (bottom + size / 2) / height)
                text = "\n".join(_two_lines(sheet.names[i], int(size / 0.058)))
                figure.text(*place, text, rotation=90, ha="right", va="center", fontsize=7.5, color="#404040")
        top = (height - head + 0.03) / height
        figure.text(middle, top, "\n".join(titles[j]), ha="center", va="bottom", fontsize=9.5, linespacing=1.15)
    if any(groups):
        _bracket(figure, groups, starts, size, height - head + 0.06 + _TEXT * max(map(len, titles)))
    if has_errors:
        across = figure.add_axes((0.5 - 2.4 / width, (_FOOT + 0.28) / height, 4.8 / width, 0.13 / height))
        scale = ScalarMappable(Normalize(-limit, limit), ERROR_COLOURS)
        bar = figure.colorbar(scale, cax=across, orientation="horizontal", extend="both")
        bar.set_label("error, % of the full range (blue: too dark, red: too bright)", fontsize=8.5)
        bar.ax.tick_params(labelsize=8.5)
    return figure, limit


def _bracket(figure: Figure, groups: Sequence[str], starts: Sequence[float], size: float, y: float) -> None:
    """Put one name above the columns of a group, at a height in inches."""
    width, height = figure.get_size_inches()
    for group in filter(None, dict.fromkeys(groups)):
        inside = [start for start, name in zip(starts, groups, strict=True) if name == group]
        left, right = inside[0], inside[-1] + size
        figure.add_artist(Line2D([left / width, right / width], [y / height] * 2, color="#707070", linewidth=0.8))
        figure.text((left + right) / 2 / width, (y + 0.03) / height, group, ha="center", va="bottom", fontsize=9.5)


def _read(path: Path, methods: Sequence[str]) -> dict[str, np.ndarray]:
    """Read what a run kept, in double precision; raise ValueError or KeyError if it is not whole."""
    with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
        arrays = {name: content[name] for name in content.files}
    for name in ("names", "truth", "scan", "mask", *methods):
        if name not in arrays:
            raise ValueError(f"it lacks {name!r}")
    shape = arrays["truth"].shape
    if len(shape) != 3 or 0 in shape or arrays["names"].shape != shape[:1]:
        raise ValueError(f"{arrays['names'].size} names do not fit pictures of shape {shape}")
    for name in ("scan", "mask", *methods):
        if arrays[name].shape != shape:
            raise ValueError(f"{name} has shape {arrays[name].shape}, truth {shape}")
    return {name: array if array.dtype.kind == "U" else array.astype(np.float64) for name, array in arrays.items()}


def _check_same_crops(first: Mapping[str, np.ndarray], arrays: Mapping[str, np.ndarray]) -> None:
    """Refuse pictures of other crops than the first run's: side by side they would mislead."""
    for name in ("names", "truth", "scan"):
        if not np.array_equal(first[name], arrays[name]):
            raise ValueError(f"its {name} are not those of the first run")


def _error_scale(sheet: Sheet) -> float:
    """Choose the end of the error scale: a round number beyond which a hundredth of the trained settings' errors lies.

    Others may err so much more that their scale would leave nothing to see of what is compared.
    """
    shown = [column for column in sheet.columns if column.is_trained] or sheet.columns
    found = np.abs(50 * np.stack([column.pictures - sheet.truth for column in shown]))
    found = found[np.isfinite(found)]
    end = float(np.quantile(found, 0.99)) if len(found) else 0.0
    return next((step for step in (1, 2, 5, 10, 15, 20, 25, 30, 40, 50, 75) if step >= end), 100.0)


def _two_lines(name: str, width: int) -> list[str]:
    """Break a crop's name into at most two lines, rather after a comma than elsewhere."""
    if len(name) <= width:
        return [name]
    first, _, rest = name.partition(", ")
    parts = [first + ",", rest] if rest and max(len(first), len(rest)) <= width else textwrap.wrap(name, width)
    return parts[:2]


def _untrained(study: Study) -> str:
    """Name the group of methods without training."""
    return study.references.title if study.references else ""


def _reason(error: Exception) -> str:
    """Say in a few words why a file cannot be shown."""
    return "it is not there" if isinstance(error, FileNotFoundError) else str(error) or type(error).__name__


def _snap(inches: float) -> float:
    """Move a length to whole pixels, so that no row or column of a picture is drawn wider than its neighbours."""
    return round(inches * PIXELS_PER_INCH) / PIXELS_PER_INCH


def _width(figure: Figure) -> int:
    """Give a figure's width in pixels."""
    return round(figure.get_size_inches()[0] * PIXELS_PER_INCH)
