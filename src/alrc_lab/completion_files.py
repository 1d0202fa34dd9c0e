"""Read partial scans from files, and write images that carry the pixel size and the words of where they came from.

Images are written as TIFF files of 32-bit floating point with ImageJ's tags, which Fiji, tifffile and RosettaSciIO
read; `read_scan` reads them back. No torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from alrc_lab.data.micrograph import read_micrograph

MARK = "alrc_values"
"""Key among ImageJ's that says what a scan of this program holds: "normalised" or "detector"."""

_ASCII_UNITS = {"µ": "u", "μ": "u", "Å": "angstrom"}
_METRES_TO_NM = 1e9
_PANEL_PIXELS = 320  # least height of a panel of the preview
_MARGIN, _CAPTION = 12, 22  # pixels
_UNKNOWN = (44, 62, 92)  # a colour that no grey is mistaken for


class ScanFile(NamedTuple):
    """Hold an image and what its file says about it."""

    image: NDArray[Any]
    """Pixels as they are, shape (height, width)."""
    format: str
    """Such as "TIFF" or "DM4"."""
    pixel_size: tuple[float, float] | None
    """Height and width of a pixel in `unit`, or None."""
    unit: str | None
    """Such as "nm"; None without a pixel size."""
    description: str
    """Free text of a TIFF file; empty if there is none, and for other formats."""
    mark: str | None
    """What `MARK` says, or None."""

    @property
    def scale_words(self) -> str:
        """The pixel size for people."""
        if self.pixel_size is None:
            return "pixel size not known"
        height, width = self.pixel_size
        numbers = f"{width:.6g}" if height == width else f"{height:.6g} × {width:.6g}"
        return f"pixel size {numbers} {self.unit}"


def read_scan(path: Path) -> ScanFile:
    """Read one greyscale image and its notes.

    Args:
        path: A file of any format that `read_micrograph` reads.

    Returns:
        Image and notes; metres are turned into nanometres, which TIFF can hold.

    Raises:
        FileNotFoundError: There is no such file.
        MicrographError: It holds no greyscale image that can be read.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    found = read_micrograph(path)
    size, unit = found.pixel_size, found.unit
    if size is not None and unit == "m":
        size, unit = (size[0] * _METRES_TO_NM, size[1] * _METRES_TO_NM), "nm"
    description, mark = _tiff_notes(path) if found.format == "TIFF" else ("", None)
    return ScanFile(found.image, found.format, size, unit, description, mark)


def write_image(path: Path, image: NDArray[np.floating], source: ScanFile, notes: Mapping[str, Any]) -> list[str]:
    """Write an image as float32 TIFF, whole or not at all.

    Args:
        path: Where to; a file there is replaced.
        image: Shape (height, width).
        source: Where pixel size and description are taken from.
        notes: What to say of the image, line by line; a `MARK` among them is kept apart, for `read_scan`.

    Returns:
        What was kept of the source, in words.
    """
    import tifffile

    lines = [f"{key}: {value}" for key, value in notes.items() if key != MARK]
    if source.description:
        lines += ["", "description of the input:", source.description]
    metadata: dict[str, Any] = {"axes": "YX", "Info": "\n".join(lines)}
    metadata |= {"min": float(image.min()), "max": float(image.max())}
    metadata |= {MARK: notes[MARK]} if MARK in notes else {}
    kept, resolution = list[str](), None
    if source.pixel_size is not None and source.unit is not None:
        height, width = source.pixel_size
        resolution = (1 / width, 1 / height)
        metadata["unit"] = "".join(_ASCII_UNITS.get(letter, letter) for letter in source.unit)
        kept.append(source.scale_words)
    if source.description:
        kept.append(f"description of {len(source.description):,} letters")

    def save(draft: Path) -> None:
        tifffile.imwrite(draft, image.astype(np.float32), imagej=True, resolution=resolution, metadata=metadata)

    _write_whole(path, save)
    return kept


def write_preview(path: Path, panels: Sequence[tuple[str, NDArray[np.floating]]]) -> None:
    """Draw images of one size side by side, each in greys over its own range, with a caption below.

    Args:
        path: Where to, ends in `.png`; a file there is replaced.
        panels: Caption and image, shape (height, width), of each; NaN is drawn in blue.
    """
    from PIL import Image, ImageDraw, ImageFont

    height, width = panels[0][1].shape
    factor = max(1, -(-_PANEL_PIXELS // height))
    step = width * factor + _MARGIN
    canvas = Image.new("RGB", (step * len(panels) + _MARGIN, height * factor + 2 * _MARGIN + _CAPTION), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    for place, (caption, image) in enumerate(panels):
        grey = Image.fromarray(_grey(image)).resize((width * factor, height * factor), Image.Resampling.NEAREST)
        canvas.paste(grey, (_MARGIN + place * step, _MARGIN))
        pen.text((_MARGIN + place * step, 2 * _MARGIN + height * factor - 4), caption, fill="black", font=font)
    _write_whole(path, lambda draft: canvas.save(draft, "PNG"))


def check_outputs(outputs: Mapping[str, Path], inputs: Sequence[Path], suffixes: Mapping[str, Sequence[str]]) -> None:
    """Refuse to write where it cannot, or where an input lies, before anything is computed.

    Args:
        outputs: Files that will be written, by the flag that names them.
        inputs: Files that are read.
        suffixes: Endings that each output may have, in lower case.

    Raises:
        FileNotFoundError: A folder is missing.
        ValueError: An ending that says another format, one file named twice, or an input.
    """
    places: dict[Path, str] = {}
    for flag, path in outputs.items():
        if path.suffix.lower() not in suffixes[flag]:
            raise ValueError(f"{flag} {path} must end in {' or '.join(suffixes[flag])}")
        if not path.parent.is_dir():
            raise FileNotFoundError(
                f"there is no folder {path.parent} for {flag} {path.name}: make it, or name another"
            )
        place = path.resolve()
        if place in {other.resolve() for other in inputs}:
            raise ValueError(f"{flag} {path} is an input of this command: name another file")
        if place in places:
            raise ValueError(f"{flag} and {places[place]} are both {path}: name another file")
        places[place] = flag


def check_absent(paths: Sequence[Path], force: bool) -> None:
    """Refuse to replace files, unless it is asked for.

    Args:
        paths: Files that will be written.
        force: Whether they may be replaced.

    Raises:
        FileExistsError: One is there.
    """
    there = [str(path) for path in paths if path.exists()]
    if there and not force:
        words = "is" if len(there) == 1 else "are"
        raise FileExistsError(f"{', '.join(there)} {words} there already: give --force to replace, or another --out")


def _tiff_notes(path: Path) -> tuple[str, str | None]:
    """Return the free text of a TIFF file, and what `MARK` says."""
    import tifffile

    with tifffile.TiffFile(path) as tiff:
        imagej = tiff.imagej_metadata
        if imagej is None:
            words = "" if tiff.is_shaped else tiff.pages.first.description  # tifffile's own words, of the shape
            return words.strip(), None
        mark = imagej.get(MARK)
        return str(imagej.get("Info", "")).strip(), None if mark is None else str(mark)


def _grey(image: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Map the range of an image to greys from 0 to 255, shape (height, width, 3)."""
    low, high = float(np.nanmin(image)), float(np.nanmax(image))
    grey = np.rint((image - low) * (255 / (high - low if high > low else 1.0)))
    is_known = np.isfinite(image)[..., None]
    return np.where(is_known, grey[..., None], np.array(_UNKNOWN, np.float64)).astype(np.uint8)


def _write_whole(path: Path, save: Callable[[Path], object]) -> None:
    """Let `save` write a draft beside, and give it its name once it is whole."""
    draft = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        save(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
