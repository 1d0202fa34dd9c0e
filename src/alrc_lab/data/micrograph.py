"""Find the files of micrographs, and read one of any of the usual formats, or say in one line why it is not one.

A micrograph here is one real greyscale image. Shapes are looked at before pixels are read, so that a four-dimensional
data set in the same folder is refused and not loaded; the pixels of many are kept as far as memory is given. TIFF and
NPY are read by tifffile and numpy, the microscopes' own formats by RosettaSciIO.
"""

import collections
import math
import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from alrc_lab.data.image_set import DataError

_UNITS = {"micron": "µm", "um": "µm", "μm": "µm", "a": "Å", "å": "Å", "angstrom": "Å", "ångström": "Å"}
"""Spellings of units, in lower case, and the one used here."""

_MOST_LOST = 10  # files that may become unreadable while a run is under way
_MOST_VALUES = 2**28  # in a stack that is read before it is refused
_AS_ONE = "save the image you mean as a greyscale TIFF or NPY file of its own"


class MicrographError(DataError):
    """Say which file is no micrograph that can be read, and why.

    Attributes:
        path: The file.
        reason: What was found and what to do, without the path.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[type["MicrographError"], tuple[Path, str]]:
        return type(self), (self.path, self.reason)


@dataclass(frozen=True, eq=False)
class Micrograph:
    """Hold one image as it is in its file, and what the file says about it.

    Attributes:
        image: Real, shape (height, width), in the dtype of the file, in native byte order; the caller may write to it.
        source: The file.
        format: "TIFF", "NPY", "DM3", "DM4", "EMD" or "HSPY".
        pixel_size: Height and width of a pixel in `unit`; None where the file does not say.
        unit: As the file has it, such as "nm", "µm", "Å" or "1/nm"; None without a pixel size.
    """

    image: NDArray[Any] = field(repr=False)
    source: Path
    format: str
    pixel_size: tuple[float, float] | None = None
    unit: str | None = None


def find_micrographs(folder: Path) -> tuple[list[str], list[MicrographError]]:
    """List the files of a folder, and of all folders in it, whose names end as those of micrographs.

    What begins with a dot is left out, and links to folders are not followed.

    Args:
        folder: An existing folder.

    Returns:
        Paths inside the folder, in `file_order`, and an error for each folder that cannot be listed.

    Raises:
        DataError: There is no such file.
    """
    found, unlisted = list[str](), list[MicrographError]()
    others: collections.Counter[str] = collections.Counter()

    def complain(error: OSError) -> None:
        unlisted.append(MicrographError(Path(error.filename), f"cannot be listed: {error.strerror}"))

    for root, folders, files in os.walk(folder, onerror=complain):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in (Path(root, name) for name in files if not name.startswith(".")):
            if file.suffix.lower() in SUFFIXES:
                found.append(file.relative_to(folder).as_posix())
            else:
                others[file.suffix.lower()] += 1
    if not found:
        there = ", ".join(f"{count:,} {suffix or 'without ending'}" for suffix, count in others.most_common(3))
        there = "; ".join([there or "nothing", *map(str, unlisted)])
        raise DataError(f"{folder} holds no {', '.join(SUFFIXES)} file (found: {there}): give another folder")
    return sorted(found, key=file_order), unlisted


def file_order(name: str) -> tuple[list[str | int], str]:
    """Return the sorting key of a path inside a folder: numbers by value, letters without case.

    Args:
        name: The path, with slashes.

    Example:
        >>> sorted(["b/1.tif", "a10.tif", "A2.tif"], key=file_order)
        ['A2.tif', 'a10.tif', 'b/1.tif']
    """
    words = re.split(r"([0-9]+)", name.casefold())
    return [int(word) if i % 2 else word for i, word in enumerate(words)], name


class ImageSource(NamedTuple):
    """Say how to get an image again, and what it was when it was first read."""

    name: str
    """Path inside its folder, or a name."""
    read: Callable[[], NDArray[Any]]
    """Returns the pixels, shape (height, width)."""
    shape: tuple[int, ...] = ()
    """Empty until the image was read."""


class PixelCache:
    """Keep the pixels of the images used last, up to a bound, and stand in for those that are gone.

    Args:
        most: Bytes of pixels to keep.

    Attributes:
        images: What was added, by place.
        lost: Names of images that could be read once and no longer, and why.
    """

    def __init__(self, most: int) -> None:
        self.images: list[ImageSource] = []
        self.lost: dict[str, str] = {}
        self._most, self._held = most, 0
        self._kept: collections.OrderedDict[int, NDArray[Any]] = collections.OrderedDict()

    def add(self, image: ImageSource, pixels: NDArray[Any]) -> int:
        """Take an image that was read and return its place."""
        self.images.append(image._replace(shape=pixels.shape))
        self._keep(len(self.images) - 1, pixels)
        return len(self.images) - 1

    def of(self, index: int) -> NDArray[Any]:
        """Return the pixels of an image, shape (height, width)."""
        if index in self._kept:
            self._kept.move_to_end(index)
            return self._kept[index]
        image = self.images[index]
        try:
            pixels = image.read()
            if pixels.shape != image.shape:
                raise DataError(f"{image.name} has now the shape {pixels.shape}, it had {image.shape}")
        except DataError as error:
            return self._stand_in(image, error)
        self._keep(index, pixels)
        return pixels

    def _keep(self, index: int, pixels: NDArray[Any]) -> None:
        """Keep pixels, and let go of those not used for longest."""
        self._kept[index] = pixels
        self._held += pixels.nbytes
        while self._held > self._most:
            self._held -= self._kept.popitem(last=False)[1].nbytes

    def _stand_in(self, image: ImageSource, error: DataError) -> NDArray[Any]:
        """Return zeros for an image that could be read before, unless too many are gone."""
        if image.name not in self.lost:
            self.lost[image.name] = str(error)
            warnings.warn(f"zeros stand in for a micrograph: {error}", RuntimeWarning, stacklevel=4)
        if len(self.lost) > _MOST_LOST:
            raise DataError(
                f"{len(self.lost)} micrographs became unreadable since they were loaded, the last: {error}. "
                "Bring the folder back and resume"
            ) from error
        return np.zeros(image.shape, np.float32)


@dataclass(frozen=True)
class _Found:
    """One data set of a file, with its pixels not yet read."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], Any]
    pixel_size: tuple[float, float] | None = None
    unit: str | None = None
    colour: str = ""


def read_micrograph(path: str | Path) -> Micrograph:
    """Read the one two-dimensional greyscale image of a file.

    Axes of length one are dropped. A stack, a colour image, complex values or several images in a file are refused:
    which of them is meant only their owner knows.

    Args:
        path: A file with one of the endings in `SUFFIXES`, in upper or lower case.

    Returns:
        The image in the dtype of the file, and its pixel size where the file says one.

    Raises:
        MicrographError: The file cannot be read, or holds something else; with what was found and what to do.
    """
    file = Path(path)
    opener = _OPENERS.get(file.suffix.lower())
    if opener is None:
        raise MicrographError(file, f"ends in {file.suffix!r}: only {', '.join(SUFFIXES)} are read")
    try:
        found = _only(file, opener(file))
        pixels = np.asarray(found.read())
    except MicrographError:
        raise
    except ImportError as error:
        extra = "micrographs" if (error.name or "").startswith("rsciio") else "lab"
        advice = f": pip install 'alrc[{extra}]'" if error.name else ""
        raise MicrographError(file, f"cannot be read: {' '.join(str(error).split())}{advice}") from error
    except Exception as error:  # readers of damaged files raise whatever they stumble over
        raise MicrographError(file, _words_of(error)) from error
    image = np.array(pixels.reshape(_squeezed(found.shape)), pixels.dtype.newbyteorder("="), order="C")
    name = file.suffix[1:].upper()
    return Micrograph(image, file, "TIFF" if name == "TIF" else name, *_scale(found))


def _only(file: Path, found: Sequence[_Found]) -> _Found:
    """Return the one data set of a file that is a greyscale image, or say what there is instead."""
    if not found:
        raise MicrographError(file, "holds no image")
    if len(found) > 1:
        shapes = ", ".join(_shape_words(each.shape) for each in found[:4]) + ", …" * (len(found) > 4)
        raise MicrographError(file, f"holds {len(found)} data sets ({shapes}): {_AS_ONE}")
    one = found[0]
    shape, words = _squeezed(one.shape), f"{_shape_words(one.shape)} of {one.dtype}"
    if one.dtype.names or one.colour or (len(shape) == 3 and one.dtype == np.uint8 and shape[-1] in (3, 4)):
        colour = one.colour or "RGB"
        raise MicrographError(file, f"is a colour image ({colour}, {words}): save its intensity as greyscale")
    if one.dtype.kind == "c":
        raise MicrographError(file, f"is complex ({words}), such as a Fourier transform or a wave: save its amplitude")
    if one.dtype.kind not in "biuf":
        raise MicrographError(file, f"holds no numbers ({words})")
    if len(shape) > 2:
        raise MicrographError(file, f"is a stack ({words}), not one image: {_AS_ONE}")
    if len(shape) < 2:
        raise MicrographError(file, f"is no image ({words}): two axes are needed")
    if 0 in shape:
        raise MicrographError(file, f"is empty ({words})")
    return one


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Drop axes of length one where there are more than two."""
    return shape if len(shape) <= 2 else tuple(length for length in shape if length != 1)


def _shape_words(shape: tuple[int, ...]) -> str:
    """Write a shape the way people do."""
    return "×".join(map(str, shape)) if shape else "one value"


def _scale(found: _Found) -> tuple[tuple[float, float] | None, str | None]:
    """Return pixel size and unit where both make sense."""
    unit = (found.unit or "").strip()
    unit = _UNITS.get(unit.lower(), unit)
    is_told = found.pixel_size is not None and all(np.isfinite(size) and size > 0 for size in found.pixel_size)
    if not is_told or unit.lower() in {"", "undefined", "<undefined>", "none", "px", "pixel", "pixels"}:
        return None, None
    return found.pixel_size, unit


def _words_of(error: Exception) -> str:
    """Put whatever a reader raised into one line."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    if "RGB" in text:  # RosettaSciIO refuses DM's colour images in words of its own
        return "is a colour image (RGB): save its intensity as greyscale"
    return f"cannot be read: {text or 'no reason given'} ({type(error).__name__})"


def _open_npy(file: Path) -> list[_Found]:
    """Look into a NumPy file."""
    array = np.load(file, mmap_mode="r", allow_pickle=False)
    return [_Found(array.shape, array.dtype, lambda: array)]


def _open_tiff(file: Path) -> list[_Found]:
    """Look into a TIFF: its series, without reduced copies."""
    import tifffile

    with tifffile.TiffFile(file) as tiff:
        series = list(enumerate(tiff.series))
        full = [(i, each) for i, each in series if not each.keyframe.is_reduced] or series
        size, unit = _tiff_scale(tiff)
        return [_tiff_found(file, i, each, size, unit) for i, each in full]


def _tiff_found(file: Path, index: int, series: Any, size: tuple[float, float] | None, unit: str | None) -> _Found:
    """Describe one series of a TIFF by its place in the file."""
    import tifffile

    kind = series.keyframe.photometric
    is_grey = kind in (tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.MINISWHITE)
    is_inverted = kind == tifffile.PHOTOMETRIC.MINISWHITE and series.dtype.kind == "u"

    def read() -> NDArray[Any]:
        pixels = tifffile.imread(file, series=index)
        return ~pixels if is_inverted else pixels

    return _Found(tuple(series.shape), series.dtype, read, size, unit, "" if is_grey else kind.name)


def _tiff_scale(tiff: Any) -> tuple[tuple[float, float] | None, str | None]:
    """Return what FEI's or ImageJ's tags say of the pixel size; the bare resolution tags are for printers."""
    fei = (tiff.fei_metadata or {}).get("Scan", {})
    if "PixelWidth" in fei and "PixelHeight" in fei:
        return (float(fei["PixelHeight"]), float(fei["PixelWidth"])), "m"
    tags = tiff.pages[0].tags
    if tiff.imagej_metadata and "unit" in tiff.imagej_metadata and "XResolution" in tags and "YResolution" in tags:
        (columns, width), (rows, height) = tags["XResolution"].value, tags["YResolution"].value
        if columns and rows:
            return (height / rows, width / columns), str(tiff.imagej_metadata["unit"]).replace("\\u00B5", "µ")
    return None, None


def _open_dm(file: Path) -> list[_Found]:
    """Look into one of Gatan's files."""
    from rsciio.digitalmicrograph import file_reader

    return [_found(each) for each in file_reader(str(file), lazy=True)]


def _open_emd(file: Path) -> list[_Found]:
    """Look into an EMD file, Velox's or Berkeley's."""
    from rsciio.emd import file_reader

    return _huge(file) or [_found(each) for each in file_reader(str(file), select_type="images")]


def _open_hspy(file: Path) -> list[_Found]:
    """Look into one of HyperSpy's files."""
    from rsciio.hspy import file_reader

    return _huge(file) or [_found(each) for each in file_reader(str(file))]


def _huge(file: Path) -> list[_Found]:
    """Describe the stacks of an HDF5 file that are better not read; its lazy readers would keep every file open."""
    import h5py

    found: list[_Found] = []

    def look(name: str, item: Any) -> None:
        shape = tuple(item.shape or ()) if isinstance(item, h5py.Dataset) else ()
        if len(_squeezed(shape)) > 2 and math.prod(shape) > _MOST_VALUES:
            found.append(_Found(shape, item.dtype, lambda: None))

    with h5py.File(file, "r") as content:
        content.visititems(look)
    return found[:1]


def _found(signal: dict[str, Any]) -> _Found:
    """Describe one of RosettaSciIO's data sets; its pixels may be a lazy array."""
    data, axes = signal["data"], sorted(signal["axes"], key=lambda axis: axis.get("index_in_array", 0))
    image_axes = [axis for axis in axes if axis.get("size", 2) != 1] if len(axes) > 2 else axes
    size, unit = None, None
    if len(image_axes) == 2 and all("scale" in axis for axis in image_axes):
        rows, columns = image_axes
        if str(rows.get("units")) == str(columns.get("units")):
            size, unit = (float(rows["scale"]), float(columns["scale"])), str(rows.get("units"))
    return _Found(tuple(data.shape), data.dtype, lambda: np.asarray(data), size, unit)


_OPENERS: dict[str, Callable[[Path], list[_Found]]] = {
    ".tif": _open_tiff,
    ".tiff": _open_tiff,
    ".npy": _open_npy,
    ".dm3": _open_dm,
    ".dm4": _open_dm,
    ".emd": _open_emd,
    ".hspy": _open_hspy,
}
SUFFIXES = tuple(_OPENERS)
"""Endings of the files that are read."""
