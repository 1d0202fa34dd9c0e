"""Find micrographs, split them by image, cut them into crops, and always say which and how many.

The order is that of CIFAR-10 without the cache: an explicit folder, the folder `stem` in the one that ALRC_DATA names,
the simulated default. Every file is read once at the start, and what cannot be used is skipped and counted, so that
nothing unreadable is met later. Pixels are kept up to a bound and read again when needed.
"""

import collections
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from alrc_lab.data.image_set import DataError, Source
from alrc_lab.data.micrograph import ImageSource, MicrographError, PixelCache, find_micrographs, read_micrograph
from alrc_lab.data.scan import dihedral, is_constant, normalise

FOLDER = "stem"
Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = get_args(Part)
_TRAIN_END, _VALIDATION_END = 75, 85  # percent of the images, in file order


class Skipped(NamedTuple):
    """Say which image was left out and why."""

    name: str
    """Path inside the folder."""
    kind: Literal["unreadable", "blank", "too small"]
    """What the reason comes down to, for counting."""
    reason: str
    """One line."""


class _Crop(NamedTuple):
    """One square of one image."""

    image: int
    row: int
    column: int


class _Place(NamedTuple):
    """One place of the search order: a folder, or why there is none (`error`: why searching stops)."""

    where: Source
    path: str
    folder: Path | None = None
    note: str = ""
    error: str | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class MicrographSet:
    """Serve crops of micrographs, and know where they came from; made by `load_micrographs`.

    Crops do not overlap, and those of an image are all in one part.

    Attributes:
        name: Words for tables and figures.
        source: The place in the search order that held the images.
        path: The folder they were read from; "embedded" for the simulated default.
        crop_size: Side of a crop in pixels.
        images: How many images give crops, by part: "train", "validation" and "test".
        blank_crops: How many crops have no contrast, by part; they are served as zeros.
        sha256: Of the bytes of every file that has contrast, in file order; of the pixels of simulated ones.
        skipped: What was left out, in file order.
        searched: What was looked for first and not found, one sentence a place.
    """

    name: str
    source: Source
    path: str
    crop_size: int
    images: dict[Part, int]
    blank_crops: dict[Part, int]
    sha256: str
    skipped: tuple[Skipped, ...] = field(repr=False)
    searched: tuple[str, ...] = field(repr=False)
    _crops: dict[Part, list[_Crop]] = field(repr=False)
    _pixels: PixelCache = field(repr=False)

    def num_crops(self, part: Part) -> int:
        """Count the crops of a part."""
        return len(self._crops[part])

    def crop(self, part: Part, index: int) -> NDArray[np.float32]:
        """Return a crop by its place in file order, normalised: for the same arguments always the same.

        Args:
            part: "train", "validation" or "test".
            index: From 0 to `num_crops(part)` - 1.

        Returns:
            Values in [-1, 1], or zeros where the crop has no contrast; shape (crop_size, crop_size).

        Raises:
            DataError: More than ten images have become unreadable since the set was loaded. Up to then their crops
                are zeros, as in the published code, and `lost` and a warning name them.
        """
        image, row, column = self._crops[part][index]
        pixels = self._pixels.of(image)
        return normalise(pixels[row : row + self.crop_size, column : column + self.crop_size])

    def sample(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """Draw a training crop and one of its eight orientations, both uniformly: the published augmentation.

        Args:
            rng: Gives two integers.

        Returns:
            As `crop`.
        """
        index, which = int(rng.integers(self.num_crops("train"))), int(rng.integers(8))
        return dihedral(self.crop("train", index), which)

    def held_out(self, part: Part = "test", most: int | None = None) -> Iterator[NDArray[np.float32]]:
        """Yield the crops of a part in file order, upright; or only some, spread evenly over all.

        Args:
            part: "test" or "validation".
            most: Largest number of crops; None for all.
        """
        for index in self.held_out_indices(part, most):
            yield self.crop(part, index)

    def held_out_indices(self, part: Part = "test", most: int | None = None) -> list[int]:
        """Return which crops `held_out` yields, by their place in file order."""
        number = self.num_crops(part)
        chosen = number if most is None else min(most, number)
        return [i * number // chosen for i in range(chosen)]

    def name_of(self, part: Part, index: int) -> str:
        """Name a crop for people: its image, and its rows and columns."""
        image, row, column = self._crops[part][index]
        size = self.crop_size
        return f"{self._pixels.images[image].name} [{row}:{row + size}, {column}:{column + size}]"

    @property
    def lost(self) -> dict[str, str]:
        """Images that became unreadable after the set was loaded, and why."""
        return dict(self._pixels.lost)

    @property
    def note(self) -> str:
        """One plain sentence: how many images and crops, and what was left out."""
        size, blank = self.crop_size, sum(self.blank_crops.values())
        parts = ", ".join(f"{self.images[part]} {part} ({self.num_crops(part):,} crops)" for part in PARTS)
        skipped = ", ".join(f"{number:,} {kind}" for kind, number in self._count_skipped().items())
        remarks = [f"skipped {skipped}"] * bool(skipped) + [f"blank crops: {blank:,}"] * bool(blank)
        return "; ".join([f"{parts} of {size}×{size}", *remarks])

    def describe(self) -> dict[str, Any]:
        """Return everything but the pixels, ready for JSON: what a run records as its `inputs`."""
        images = sum(self.images.values())
        return {
            "name": self.name,
            "slug": f"{self.name.replace(' ', '-')}-{images}",
            "source": self.source,
            "path": self.path,
            "images": images,
            "sha256": self.sha256,
            "note": self.note,
            "searched": list(self.searched),
            "crop_size": self.crop_size,
            "parts": {
                part: {"images": self.images[part], "crops": self.num_crops(part), "blank": self.blank_crops[part]}
                for part in PARTS
            },
            "skipped": self._count_skipped(),
            "skipped_images": [f"{each.name}: {each.reason}" for each in self.skipped[:100]],
        }

    def summary(self) -> str:
        """Return one line to print: name, count, source, path, start of the checksum, and the note."""
        place = self.source if self.path == self.source else f"{self.source}: {self.path}"
        return f"{sum(self.images.values()):,} {self.name} ({place}), sha256 {self.sha256[:12]}: {self.note}"

    def __str__(self) -> str:
        return self.summary()

    def _count_skipped(self) -> dict[str, int]:
        """Count what was left out by its kind."""
        return dict(collections.Counter(each.kind for each in self.skipped))


def load_micrographs(
    path: str | os.PathLike[str] | None = None, *, crop_size: int, cache_bytes: int = 2**29
) -> MicrographSet:
    """Load the first folder of the search order, or the simulated micrographs where there is none.

    Reads every file once, to know that it can be read. Images are given to parts before those smaller than a crop are
    left out, so that none changes its part with the size of the crops.

    Args:
        path: A folder of micrographs, searched with all folders in it; "embedded" for the simulated ones; None to
            search ALRC_DATA and then take the simulated ones.
        crop_size: Side of a crop in pixels.
        cache_bytes: Bytes of pixels to keep in memory.

    Returns:
        The set; print it.

    Raises:
        DataError: `path` or ALRC_DATA names a folder that is missing, or a part is left without a crop.
    """
    if crop_size < 3:
        raise DataError(f"crop_size is {crop_size}: give the side of a crop in pixels, such as 96")
    searched: list[str] = []
    for place in _places(path):
        if place.error is not None:
            raise DataError(place.error)
        if place.folder is not None or place.where == "embedded":
            return _load(place, tuple(searched), crop_size, cache_bytes)
        searched.append(f"{place.where}: {place.note}")
    raise AssertionError("the search order ends with the simulated default")


def micrograph_status(path: str | os.PathLike[str] | None = None, *, crop_size: int = 96) -> list[dict[str, Any]]:
    """Say for each place of the search order what it holds, in the form of `data_status`.

    The simulated micrographs are not made for this: their entry has neither count nor checksum.

    Args:
        path: As for `load_micrographs`; adds a first entry.
        crop_size: Side of the crops to count.

    Returns:
        One JSON-ready dict a place: `where`, `path`, `found`, `images`, `sha256`, `note`, `error` and `used`.
    """
    entries: list[dict[str, Any]] = []
    is_settled = False
    for place in _places(path):
        found = place.folder is not None or place.where == "embedded"
        images, sha256, note, error = None, None, place.note, place.error
        if place.folder is not None:
            try:
                loaded = _load(place, (), crop_size, 0)
                images, sha256, note = sum(loaded.images.values()), loaded.sha256, loaded.note
            except DataError as problem:
                error = str(problem)
        entry = {"where": place.where, "path": place.path, "found": found, "images": images, "sha256": sha256}
        entries.append(entry | {"note": note, "error": error, "used": found and error is None and not is_settled})
        is_settled = is_settled or found or error is not None
    return entries


def part_of(index: int, number: int) -> Part:
    """Say to which part an image belongs: 75 % train, 10 % validation, 15 % test, none of them empty.

    Args:
        index: Place of the image in file order, from 0.
        number: Images in all, 3 or more.

    Example:
        >>> [part_of(index, 4) for index in range(4)]
        ['train', 'train', 'validation', 'test']
    """
    train_end = min(max(number * _TRAIN_END // 100, 1), number - 2)
    validation_end = min(max(number * _VALIDATION_END // 100, train_end + 1), number - 1)
    return "train" if index < train_end else "validation" if index < validation_end else "test"


def _load(place: _Place, searched: tuple[str, ...], crop_size: int, cache_bytes: int) -> MicrographSet:
    """Read every image once, give each that has contrast to a part, and lay out the crops."""
    skipped: list[tuple[int, Skipped]] = []
    grids: list[tuple[int, list[_Crop], int]] = []
    digest, pixels_of = hashlib.sha256(), PixelCache(cache_bytes)
    images, unlisted = _images_at(place)
    skipped += [(-1, Skipped(str(error.path), "unreadable", error.reason)) for error in unlisted]
    for order, image in enumerate(images):
        try:
            pixels = image.read()
            content = _content(place, image, pixels)
        except MicrographError as error:
            skipped.append((order, Skipped(image.name, "unreadable", error.reason)))
            continue
        if is_constant(pixels):
            skipped.append((order, Skipped(image.name, "blank", "has no contrast: all its finite pixels are the same")))
            continue
        digest.update(content)
        grids.append((order, *_grid(pixels_of.add(image, pixels), pixels, crop_size)))
    crops: dict[Part, list[_Crop]] = {part: [] for part in PARTS}
    number, blank = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
    for index, (order, grid, num_blank) in enumerate(grids):
        image, part = pixels_of.images[index], part_of(index, max(3, len(grids)))
        if not grid:
            reason = f"{image.shape[0]}×{image.shape[1]} is less than a crop of {crop_size}×{crop_size}"
            skipped.append((order, Skipped(image.name, "too small", reason)))
            continue
        crops[part] += grid
        number[part] += 1
        blank[part] += num_blank
    left_out = tuple(each for _, each in sorted(skipped))
    if not all(crops.values()):
        have = ", ".join(f"{number[part]} {part}" for part in PARTS)
        why = f", skipped {len(left_out)}, the first: {left_out[0].name}: {left_out[0].reason}" if left_out else ""
        raise DataError(
            f"{place.path} has too few micrographs of {crop_size}×{crop_size} or more, each part needs one "
            f"({have}{why}): add images, or use smaller crops"
        )
    return MicrographSet(
        name="simulated micrographs" if place.folder is None else "micrographs",
        source=place.where,
        path=place.path,
        crop_size=crop_size,
        images=number,
        blank_crops=blank,
        sha256=digest.hexdigest(),
        skipped=left_out,
        searched=searched,
        _crops=crops,
        _pixels=pixels_of,
    )


def _images_at(place: _Place) -> tuple[list[ImageSource], list[MicrographError]]:
    """Return the images of a place, not yet read, in file order, and an error for each folder that cannot be listed."""
    if place.folder is None:
        from alrc_lab.data.simulated import simulated_micrographs

        return [ImageSource(name, lambda image=image: image) for name, image in simulated_micrographs()], []
    folder = place.folder
    names, unlisted = find_micrographs(folder)
    return [ImageSource(name, lambda name=name: read_micrograph(folder / name).image) for name in names], unlisted


def _content(place: _Place, image: ImageSource, pixels: NDArray[Any]) -> bytes:
    """Return the bytes that the checksum is taken of."""
    if place.folder is None:
        return np.ascontiguousarray(pixels).tobytes()
    file = place.folder / image.name
    try:
        return file.read_bytes()
    except OSError as error:
        raise MicrographError(file, f"cannot be read: {error.strerror}") from error


def _grid(index: int, pixels: NDArray[Any], size: int) -> tuple[list[_Crop], int]:
    """Lay crops side by side from the upper left corner of an image, and count those without contrast."""
    rows, columns = (range(0, length - size + 1, size) for length in pixels.shape)
    crops = [_Crop(index, row, column) for row in rows for column in columns]
    return crops, sum(is_constant(pixels[row : row + size, column : column + size]) for _, row, column in crops)


def _places(path: str | os.PathLike[str] | None) -> list[_Place]:
    """Return the search order as it stands on this machine now."""
    embedded = _Place("embedded", "embedded", note="simulated when first used")
    if path is not None and os.fspath(path) == "embedded":
        return [embedded]
    value = os.environ.get("ALRC_DATA", "")
    places: list[_Place] = []
    if path is not None:
        words = "data path {} {}: give a folder of micrographs, or 'embedded'"
        places.append(_folder_place("path", os.fspath(path), words))
    if not value:
        return [*places, _Place("ALRC_DATA", "", note="not set"), embedded]
    root = _folder_place("ALRC_DATA", value, "ALRC_DATA names {}, which {}: correct or unset it")
    if root.folder is None:
        return [*places, root, embedded]
    folder = root.folder / FOLDER
    is_there = folder.is_dir()
    held = _Place("ALRC_DATA", str(folder if is_there else root.path), folder if is_there else None)
    return [*places, held if is_there else held._replace(note=f"{root.path} holds no {FOLDER}"), embedded]


def _folder_place(where: Source, value: str, words: str) -> _Place:
    """Locate a folder that must exist; `words` say so of a path and a problem."""
    root = Path(value).expanduser().absolute()
    if not value:
        return _Place(where, value, error=words.format("''", "is empty"))
    if root.is_dir():
        return _Place(where, str(root), root)
    problem = "is not a folder" if root.exists() else "does not exist"
    return _Place(where, str(root), error=words.format(root, problem))
