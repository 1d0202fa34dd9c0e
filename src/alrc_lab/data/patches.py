"""Make the embedded default: 32×32 patches of the photographs that come with scikit-image.

An experiment must run on a machine with no data set and no network. The photographs are reduced by whole-number
factors first, so that a patch holds as much of the world, and as much fine detail, as a CIFAR-10 image does. All
arithmetic is on integers: the same photographs give the same bytes everywhere.

`python -m alrc_lab.data.patches [FOLDER]` prints how close the patches come to the CIFAR-10 copy it finds.
"""

import functools
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from alrc_lab.data.image_set import DataError, Split

SIDE = 32
"""Patch height and width in pixels."""

_COARSE = (4, 5, 6, 8)
PHOTOGRAPHS: dict[str, tuple[int, ...]] = {
    "astronaut.png": _COARSE,
    "chelsea.png": _COARSE,
    "coffee.png": _COARSE,
    "rocket.jpg": _COARSE,
    "motorcycle_left.png": (1, 2, 3, 4),  # richer in detail: reduced as far as the others it is harsher than CIFAR
}
"""The photographs, in order, and the factors by which each is reduced."""

_PATCHES_PER_FACTOR = 350  # about as many patches of each photograph at each factor, where it is large enough
_LEAST_STRIDE = 2  # neighbours one pixel apart are nearly the same image
_LEAST_STD = 20  # grey levels; CIFAR-10 has almost no flat images, and standardising one amplifies its noise


def natural_patches(split: Split = "train") -> NDArray[np.uint8]:
    """Return the embedded patches, in a fixed, well-mixed order.

    The left two thirds of each photograph give the train patches, the right third the test patches: no test pixel
    is ever trained on. Takes a fraction of a second, once a process.

    Args:
        split: "train" or "test".

    Returns:
        uint8, shape (N, 3, 32, 32), RGB; a copy the caller may write to.

    Raises:
        DataError: scikit-image is not installed, or comes without one of the photographs.

    Example:
        >>> natural_patches("test").shape[1:]
        (3, 32, 32)
    """
    return _make(split).copy()


@functools.lru_cache(maxsize=2)
def _make(split: Split) -> NDArray[np.uint8]:
    """Cut, select and mix the patches of one split."""
    patches = np.concatenate(
        [
            _cut(_reduce(_region(photograph, split), factor))
            for name, factors in PHOTOGRAPHS.items()
            for photograph in [_read(name)]
            for factor in factors
        ]
    )
    # Multiples of the golden ratio, modulo one, in integers: any beginning of the list is a fair sample of it.
    places = np.arange(len(patches), dtype=np.uint64) * np.uint64(2654435769) % np.uint64(2**32)
    return np.ascontiguousarray(patches[np.argsort(places, kind="stable")])


def _read(name: str) -> NDArray[np.uint8]:
    """Read one photograph, uint8 (height, width, 3), from the installed package, never from the network."""
    try:
        import skimage
        from skimage.io import imread
    except ImportError as error:
        raise DataError(f"the embedded patches need scikit-image ({error}): pip install 'alrc[lab]'") from error
    file = Path(skimage.__file__).parent / "data" / name
    if not file.is_file():
        raise DataError(
            f"scikit-image {version('scikit-image')} comes without {file}, which the embedded patches are cut from: "
            "install the version that constraints.txt names, or give a folder with CIFAR-10"
        )
    return np.asarray(imread(file), dtype=np.uint8)[..., :3]


def _region(photograph: NDArray[np.uint8], split: Split) -> NDArray[np.uint8]:
    """Return the columns of a photograph that belong to a split."""
    border = 2 * photograph.shape[1] // 3
    return photograph[:, :border] if split == "train" else photograph[:, border:]


def _reduce(photograph: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """Replace each block of factor × factor pixels by its mean, rounded half up."""
    height, width = photograph.shape[0] // factor, photograph.shape[1] // factor
    blocks = photograph[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    area = factor * factor
    return ((2 * blocks.sum(axis=(1, 3), dtype=np.uint32) + area) // (2 * area)).astype(np.uint8)


def _cut(photograph: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Cut patches (N, 3, 32, 32) on a square grid just dense enough, and leave out the flat ones."""
    rows, columns = photograph.shape[0] - SIDE, photograph.shape[1] - SIDE
    if min(rows, columns) < 0:
        return np.empty((0, 3, SIDE, SIDE), np.uint8)
    stride = _LEAST_STRIDE
    while (rows // (stride + 1) + 1) * (columns // (stride + 1) + 1) >= _PATCHES_PER_FACTOR:
        stride += 1
    windows = np.lib.stride_tricks.sliding_window_view(photograph, (SIDE, SIDE), axis=(0, 1))
    patches = windows[::stride, ::stride].reshape(-1, 3, SIDE, SIDE)
    values = patches.reshape(len(patches), -1).astype(np.int64)
    count = values.shape[1]
    is_varied = count * (values**2).sum(1) - values.sum(1) ** 2 >= (_LEAST_STD * count) ** 2
    return patches[is_varied]


class Statistics(NamedTuple):
    """Say in a few numbers how hard a set of images is to restore, and why.

    `resize_*` are of each image's mean squared (or, where named, fourth-power) error after it was standardised,
    reduced to 16×16 and enlarged again, both bilinearly with aligned corners: the share of its variance that is
    fine detail, and the error a network has to remove.
    """

    images: int
    mean: float
    """Mean grey level."""
    std: float
    """Mean over images of the standard deviation within an image, in grey levels."""
    std_5: float
    """5th percentile of the same."""
    resize_mean: float
    resize_5: float
    resize_50: float
    resize_95: float
    resize_99: float
    resize_fourth_mean: float
    spectrum_slope: float
    """Of log power against log radial frequency, 2 to 14 cycles an image, grey values under a Hann window."""


def image_statistics(images: NDArray[np.uint8]) -> Statistics:
    """Measure images the way docs/data.md compares them.

    Args:
        images: uint8, shape (N, 3, 32, 32).

    Returns:
        The numbers; see `Statistics`.

    Example:
        >>> ramp = np.broadcast_to(np.arange(32, dtype=np.uint8), (1, 3, 32, 32))
        >>> round(image_statistics(ramp).resize_mean, 6)  # bilinear resizing restores a ramp exactly
        0.0
    """
    pixels = images.astype(np.float32)
    std = pixels.std(axis=(1, 2, 3))
    least = 1 / np.sqrt(np.float32(pixels[0].size))
    standard = pixels - pixels.mean(axis=(1, 2, 3), keepdims=True)
    standard /= np.maximum(std, least)[:, None, None, None]
    there_and_back = (_bilinear(SIDE // 2, SIDE) @ _bilinear(SIDE, SIDE // 2)).astype(np.float32)
    rows_done = np.tensordot(standard, there_and_back, axes=(2, 1))
    error = np.tensordot(rows_done, there_and_back, axes=(2, 1)) - standard
    squared = (error**2).mean(axis=(1, 2, 3))
    return Statistics(
        images=len(images),
        mean=float(pixels.mean()),
        std=float(std.mean()),
        std_5=float(np.percentile(std, 5)),
        resize_mean=float(squared.mean()),
        resize_5=float(np.percentile(squared, 5)),
        resize_50=float(np.percentile(squared, 50)),
        resize_95=float(np.percentile(squared, 95)),
        resize_99=float(np.percentile(squared, 99)),
        resize_fourth_mean=float((error**4).mean()),
        spectrum_slope=_spectrum_slope(standard.mean(axis=1)),
    )


def _bilinear(old: int, new: int) -> NDArray[np.float64]:
    """Return the (new, old) matrix of linear interpolation with aligned ends."""
    position = np.arange(new) * (old - 1) / (new - 1)
    return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(old)))


def _spectrum_slope(grey: NDArray[np.float32]) -> float:
    """Fit a line to the log of the mean radial power spectrum of (N, 32, 32) grey images."""
    window = np.hanning(SIDE + 2)[1:-1]
    centred = (grey - grey.mean(axis=(1, 2), keepdims=True)) * np.outer(window, window)
    power = (np.abs(np.fft.fft2(centred)) ** 2).mean(axis=0)
    axis = np.fft.fftfreq(SIDE, 1 / SIDE)
    radius = np.rint(np.hypot(axis[:, None], axis)).astype(int)
    frequency = np.arange(2, 15)
    radial = [power[radius == k].mean() for k in frequency]
    return float(np.polyfit(np.log(frequency), np.log(radial), 1)[0])


def comparison(folder: str | None = None) -> Iterator[str]:
    """Yield the lines of a table: the embedded patches beside the CIFAR-10 copy that the search order finds.

    Args:
        folder: Where to look for CIFAR-10 first.
    """
    from alrc_lab.data.cifar10 import load_cifar10

    sets = [load_cifar10("embedded"), load_cifar10("embedded", split="test")]
    found = load_cifar10(folder)
    sets += [] if found.source == "embedded" else [found, load_cifar10(folder, split="test")]
    columns = [image_statistics(image_set.images) for image_set in sets]
    yield from (image_set.summary() for image_set in sets)
    if found.source == "embedded":
        yield "no CIFAR-10 found to compare with: " + "; ".join(found.searched)
    for field in Statistics._fields:
        yield f"{field:<20}" + "".join(f"{getattr(column, field):>12.4g}" for column in columns)


if __name__ == "__main__":
    try:
        print(*comparison(*sys.argv[1:2]), sep="\n")
    except DataError as error:
        sys.exit(f"error: {error}")
