"""Give every figure one look: palette, settings, the strips above and below the axes, and its files.

Uses Matplotlib's objects directly, without pyplot and without lasting changes to its settings, so that drawing a report
has no effect on the process that asks for it. The same study gives the same bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from PIL import Image

from alrc_lab.report import tables
from alrc_lab.report.collect import Run, Study

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

# Okabe and Ito's palette without its yellow, which is too light for lines; baselines are grey.
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
BASELINE = "#4A4A4A"
SPIKE = "#D55E00"
LIMIT = "#0072B2"
PIXELS_PER_INCH = 160
_STYLE: dict[RcKeyType, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#707070",
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": "#404040",
    "ytick.color": "#404040",
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.dpi": PIXELS_PER_INCH,
    "svg.hashsalt": "alrc",
    "svg.fonttype": "path",
}


@dataclass(frozen=True)
class Drawing:
    """Hold a figure with what must stand beneath it.

    Attributes:
        name: File name without suffix.
        title: The question the figure answers.
        caption: Two or three sentences: what is drawn and how to read it.
        figure: The figure.
        runs: Every run that is drawn.
        width_px: Of a sheet of pictures, the width at which its pixels are the screen's; None for drawn lines.
    """

    name: str
    title: str
    caption: str
    figure: Figure
    runs: tuple[Run, ...]
    width_px: int | None = None

    @property
    def is_picture(self) -> bool:
        """Tell whether this is made of pixels, and would gain nothing from being an SVG."""
        return self.width_px is not None


def save_picture(drawing: Drawing, folder: Path) -> Path:
    """Write a sheet of pictures as a small PNG, pixel for pixel as it was laid out, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path, content = folder / f"{drawing.name}.png", io.BytesIO()
    with style():
        drawing.figure.savefig(content, metadata={"Software": None})
    with Image.open(content) as image:
        flat = image.convert("RGB")
    red, green, blue = flat.split()
    # A third of the bytes: greys as they are, or 256 colours that no eye tells from all of them.
    is_grey = red.tobytes() == green.tobytes() == blue.tobytes()
    colours = {"method": Image.Quantize.MAXCOVERAGE, "dither": Image.Dither.NONE}
    small = flat.convert("L") if is_grey else flat.quantize(256, **colours)
    small.save(path, optimize=True)
    return path


def save(drawing: Drawing, folder: Path) -> tuple[Path, Path]:
    """Write a drawing as PNG and SVG, without dates, and return the two paths."""
    folder.mkdir(parents=True, exist_ok=True)
    png, svg = folder / f"{drawing.name}.png", folder / f"{drawing.name}.svg"
    with style():
        drawing.figure.savefig(png, metadata={"Software": None})
        drawing.figure.savefig(svg, metadata={"Date": None, "Creator": None})
    return png, svg


@contextmanager
def style() -> Iterator[None]:
    """Draw with the report's settings and leave Matplotlib's as they were."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def colours(study: Study) -> dict[str, str]:
    """Give each row label its colour; rows that are only ever baselines are grey."""
    compared = dict.fromkeys(cell.row for cell in study.cells.values() if cell.baseline is not None)
    order = dict.fromkeys(cell.row for cell in study.cells.values())
    wheel = {row: _PALETTE[i % len(_PALETTE)] for i, row in enumerate(compared)}
    return {row: wheel.get(row, BASELINE) for row in order}


def letterhead(figure: Figure, study: Study, title: str) -> None:
    """Write the title into a figure's upper left corner and the line that names its data into the lower one."""
    width, height = figure.get_size_inches()
    figure.text(0.1 / width, 1 - 0.1 / height, title, va="top", fontsize=13.5, fontweight="bold")
    source = f"{tables.data_line(study)} · {study.name}, preset {study.preset}"
    figure.text(0.1 / width, 0.09 / height, source, fontsize=7.5, color="#606060")


def frame(figure: Figure, study: Study, title: str, handles: list[Line2D]) -> None:
    """Put title and legend above the axes and the line that names the data below, each in a strip of its own."""
    letterhead(figure, study, title)
    width, height = figure.get_size_inches()
    widths = [0.085 * len(str(handle.get_label())) + 0.75 for handle in handles]  # in inches, generously
    per_line = len(handles) if sum(widths) < width else max(1, int(width / max(widths)))
    head, foot = 0.42 + 0.23 * math.ceil(len(handles) / per_line), 0.26
    anchor = (0.04 / width, 1 - 0.36 / height)
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=anchor, ncols=per_line, borderaxespad=0)
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine)  # as every figure here was made
    engine.set(rect=(0, foot / height, 1, 1 - (head + foot) / height), w_pad=0.1, h_pad=0.06)
