"""Turn a micrograph into what a sparse scan would have seen of it: the spiral, its noise, and the way back.

Everything of the partial-STEM experiment that is arithmetic on images and nothing else: no files, no random state, no
framework. The noise model is the published one; `recover_uniform` undoes it, which is how it was checked. The user's
page is docs/stem-data.md.
"""

import math
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

_Scalar = TypeVar("_Scalar", bound=np.generic)

COVERAGE = 1 / 20
"""The published share of the line in the area, nominal; the pitch of the spiral is its reciprocal, 20 pixels."""

_POINTS = 10_000  # corners of the published polyline
_BLUR_STD = 2.5
_BINOMIAL = np.array([0.25, 0.5, 0.25])
_LEAST_RANGE = 1e-6  # as the published code, for images in [0, 1]
_HUGE = np.finfo(np.float64).max / 4
_LEAST_WEIGHT = 0.02  # of U in the detected intensity; below, a recovered U is mostly rounding


class Coverage(NamedTuple):
    """Say how much of an image a spiral really scans; every share is from 0 to 1."""

    nominal: float
    """What was asked for: the reciprocal of the pitch in pixels."""
    line: float
    """Share of pixels on the line before it is blurred: the published 1/17.9, 1/87.0 and so on."""
    pixels: float
    """Share of pixels with any dwell: those of which the scan says something."""
    dwell: float
    """Mean of the mask."""
    turns: float
    """Turns of the whole spiral, of which the image shows the centre."""


def spiral_mask(size: int, coverage: float = COVERAGE) -> NDArray[np.float32]:
    """Draw the dwell time of an Archimedean spiral scan: the published mask, at any size and coverage.

    The line r = kθ is one pixel wide, from the centre out to a canvas √2 times as large, and blurred by a 3×3
    binomial; the image is the middle of the canvas. At 512 and 1/20 it equals the authors' mask in every bit.

    Args:
        size: Side of the image in pixels, 2 or more.
        coverage: Nominal share of the line, above 0, at most 1; its reciprocal is the pitch in pixels.

    Returns:
        Dwell times from 0 (not scanned) to 1, multiples of 1/16, shape (size, size).

    Raises:
        ValueError: A size or a coverage outside its range.

    Example:
        >>> mask = spiral_mask(64)
        >>> mask.shape, mask.dtype.name, float(mask.max())
        ((64, 64), 'float32', 0.75)

    References:
        J. M. Ede and R. Beanland, Scientific Reports 10, 8332 (2020).
    """
    return _separable(_spiral_line(size, coverage).astype(np.float64), _BINOMIAL).astype(np.float32)


def spiral_coverage(size: int, coverage: float = COVERAGE) -> Coverage:
    """Measure what `spiral_mask` with the same arguments scans; "1/20" is nominal.

    Args:
        size: Side of the image in pixels, 2 or more.
        coverage: Nominal share of the line, above 0, at most 1.

    Returns:
        Nominal and true shares, and the turns.

    Example:
        >>> found = spiral_coverage(512)
        >>> round(1 / found.line, 1), round(100 * found.pixels, 2), round(found.turns, 1)
        (22.1, 17.46, 18.1)
    """
    line, mask = _spiral_line(size, coverage), spiral_mask(size, coverage)
    turns = coverage * math.ceil(math.sqrt(2) * size) / 2
    return Coverage(coverage, float(line.mean()), float((mask > 0).mean()), float(mask.mean(dtype=np.float64)), turns)


def normalise(image: ArrayLike) -> NDArray[np.float32]:
    """Map the range of an image to [-1, 1], after NaN and ±inf became 0.

    An image whose range is at most a millionth of its largest magnitude is constant and becomes zeros. (The published
    code compares the range with 1e-6 itself, which would blank every image given in amperes.)

    Args:
        image: Real, any dtype; shape (..., height, width), each image of leading axes by itself.

    Returns:
        Values in [-1, 1], both ends reached, or zeros; same shape.

    Raises:
        ValueError: The array is complex, empty, or has fewer than two axes.

    Example:
        >>> normalise([[0, 10], [20, 40]]).tolist()
        [[-1.0, -0.5], [0.0, 1.0]]
    """
    array = np.asarray(image)
    if array.ndim < 2 or not array.size or array.dtype.kind not in "biuf":
        raise ValueError(f"an image must be real and of shape (..., height, width), got {array.dtype} {array.shape}.")
    values = array.astype(np.float64)
    if not np.isfinite(values).all():
        np.nan_to_num(values, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    if np.abs(values.max(initial=0) / 2 - values.min(initial=0) / 2) > _HUGE:
        values /= 4  # so that no difference overflows
    low, high = values.min((-2, -1), keepdims=True), values.max((-2, -1), keepdims=True)
    is_flat = high - low <= _LEAST_RANGE * np.maximum(-low, high)
    values -= low
    values /= np.where(is_flat, 1.0, high - low)
    values *= 2
    values -= 1
    return np.where(is_flat, 0.0, values).astype(np.float32)


def is_constant(image: NDArray[Any]) -> bool:
    """Tell whether `normalise` would find no contrast in one image, without copying it.

    Args:
        image: Real, any dtype, shape (height, width).

    Example:
        >>> is_constant(np.full((2, 2), 7)), is_constant(np.array([[7, 8]]))
        (True, False)
    """
    low, high = float(image.min()), float(image.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        return not normalise(image).any()
    return high - low <= _LEAST_RANGE * max(-low, high)


def blur(image: NDArray[np.floating], *, renormalise: bool = False) -> NDArray[np.float32]:
    """Blur by 5×5 weights of a Gaussian with standard deviation 2.5, mirroring at the border without its pixel.

    As it is, this is the target that losses compare with: the normalised outer product of the N(0, 2.5) density at
    -2 to 2. Renormalised, it is the blurred copy that `simulate_scan` mixes noise into.

    Args:
        image: Shape (..., height, width), 3 or more each way.
        renormalise: Whether to map the result to [-1, 1] again.

    Returns:
        Same shape.

    Raises:
        ValueError: An image smaller than 3×3.
    """
    if min(image.shape[-2:]) < 3:
        raise ValueError(f"an image must be 3×3 or larger to be blurred by 5×5, got {image.shape}.")
    density = np.exp(-0.5 * (np.arange(-2, 3) / _BLUR_STD) ** 2)
    blurred = _separable(np.asarray(image, np.float64), density / density.sum())
    return normalise(blurred) if renormalise else blurred.astype(np.float32)


def dihedral(image: NDArray[_Scalar], which: int) -> NDArray[_Scalar]:
    """Apply one of the eight symmetries of the square: the published augmentation, and all of it.

    Args:
        image: Shape (..., side, side).
        which: 0 to 3 turn by so many quarters anticlockwise; 4 to 7 mirror left and right, then do the same.

    Returns:
        A contiguous copy.

    Raises:
        ValueError: `which` is none of the eight, or the image is not square.

    Example:
        >>> dihedral(np.array([[1, 2], [3, 4]]), 1).tolist(), dihedral(np.array([[1, 2], [3, 4]]), 4).tolist()
        ([[2, 4], [1, 3]], [[2, 1], [4, 3]])
    """
    if not 0 <= which < 8:
        raise ValueError(f"which must be from 0 to 7, got {which}.")
    if image.shape[-1] != image.shape[-2]:
        raise ValueError(f"an image must be square to be turned, got {image.shape}.")
    mirrored = image[..., ::-1] if which >= 4 else image
    return np.rot90(mirrored, which % 4, (-2, -1)).copy()


def decimate(image: NDArray[_Scalar]) -> NDArray[_Scalar]:
    """Take every second pixel of every second row, the first included: the published half-size version.

    Args:
        image: Shape (..., height, width).

    Returns:
        A contiguous copy, half the size, rounded up.
    """
    return image[..., ::2, ::2].copy()


def simulate_scan(
    truth: NDArray[np.float32], blurred: NDArray[np.float32], mask: NDArray[np.float32], uniform: NDArray[np.floating]
) -> NDArray[np.float32]:
    """Make the partial scan of an image by the published noise model.

    Detected is m(m t + 2(1 - m) U b); what is not scanned is set to -1; the range of all is mapped to [0, 1]. A short
    dwell m thus pulls to mid-grey and is multiplicatively noisy. A constant result becomes zeros.

    Args:
        truth: The image t in [-1, 1], not blurred, shape (height, width).
        blurred: Its copy b of `blur(truth, renormalise=True)`.
        mask: Dwell times m from 0 to 1.
        uniform: The noise U, uniform in [0, 1), a number for each pixel.

    Returns:
        The scan in [0, 1], 0 where not scanned.

    Raises:
        ValueError: Shapes that differ.
    """
    _check_same_shape(truth=truth, blurred=blurred, mask=mask, uniform=uniform)
    m = mask.astype(np.float64)
    detected = np.where(m > 0, m * (m * truth + 2 * (1 - m) * uniform * blurred), -1.0)
    extent = detected.max() - detected.min()
    return ((detected - detected.min()) / (extent if extent > 0 else 1.0)).astype(np.float32)


def recover_uniform(
    scan: NDArray[np.float32], truth: NDArray[np.float32], blurred: NDArray[np.float32], mask: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Undo `simulate_scan`: find the noise U that made a scan of a known truth.

    With a pixel left out, the scan is (d + 1)/s. Every scanned pixel bounds s, since its U is from 0 to 1; all bounds
    together fix s to a few millionths, or show that no noise of the model makes this scan of this truth.

    Args:
        scan: The scan in [0, 1], shape (height, width).
        truth: As for `simulate_scan`.
        blurred: As for `simulate_scan`.
        mask: As for `simulate_scan`; some pixel must not be scanned, and some must.

    Returns:
        U; NaN where it has too little weight in the scan to be known.

    Raises:
        ValueError: Shapes that differ, a mask of all or nothing, or a scan that the model cannot have made.
    """
    _check_same_shape(scan=scan, truth=truth, blurred=blurred, mask=mask)
    m, q = mask.astype(np.float64), scan.astype(np.float64)
    is_scanned = m > 0
    if is_scanned.all() or not is_scanned.any():
        raise ValueError(f"the mask scans {is_scanned.mean():.0%} of the pixels: some must be scanned, and some not.")
    least, weight = m * m * truth, 2 * m * (1 - m) * blurred
    used = is_scanned & (q > 0)
    bounds = (1 + np.stack([least, least + weight])[:, used]) / q[used]
    low, high = bounds.min(0).max(initial=0.0), bounds.max(0).min(initial=math.inf)
    if q[~is_scanned].any() or low > high * (1 + 1e-5):
        raise ValueError("the scan is none that the noise model makes of this truth with this mask.")
    is_known = used & (np.abs(weight) >= _LEAST_WEIGHT)
    noise = ((low + high) / 2 * q - 1 - least) / np.where(is_known, weight, 1.0)
    return np.where(is_known, noise, np.nan).astype(np.float32)


def _spiral_line(size: int, coverage: float) -> NDArray[np.float32]:
    """Draw the spiral's line, 1 on 0, shape (size, size)."""
    from PIL import Image, ImageDraw  # only its way of putting a line on pixels gives the published mask

    if size < 2:
        raise ValueError(f"size must be 2 or more pixels, got {size}.")
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage must be above 0 and at most 1, such as 1/20, got {coverage}.")
    canvas = math.ceil(math.sqrt(2) * size)
    radius = canvas / 2
    k = 1 / (2 * math.pi * coverage)
    points = _num_corners(radius, radius / k)
    theta = np.arange(points + 1) * (radius / k / points)
    x, y = k * theta * np.cos(theta) + radius, k * theta * np.sin(theta) + radius
    picture = Image.new("F", (canvas, canvas))
    ImageDraw.Draw(picture).line(list(zip(x.tolist(), y.tolist(), strict=True)), fill=1, width=1)
    first = canvas // 2 - size // 2
    return np.asarray(picture)[first : first + size, first : first + size]


def _num_corners(radius: float, angle: float) -> int:
    """Return the published number of corners, or as many as keep each chord within 1/8 of a pixel of its arc."""
    return max(_POINTS, math.ceil(angle * math.sqrt(radius)))  # a chord leaves its arc by r Δθ² / 8


def _separable(image: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Convolve (..., height, width) with the outer product of symmetric weights, mirrored without the border pixel."""
    reach = len(weights) // 2
    for axis in (-2, -1):
        number = image.shape[axis]
        border = [(reach, reach) if image.ndim + axis == i else (0, 0) for i in range(image.ndim)]
        padded = np.pad(image, border, mode="reflect")
        lines = (padded.take(np.arange(i, i + number), axis) for i in range(len(weights)))
        image = sum((w * line for w, line in zip(weights, lines, strict=True)), start=np.zeros(image.shape))
    return image


def _check_same_shape(**images: NDArray[np.generic]) -> None:
    """Refuse images of different shapes."""
    if len({image.shape for image in images.values()}) > 1:
        shapes = ", ".join(f"{name} {image.shape}" for name, image in images.items())
        raise ValueError(f"all must have one shape, got {shapes}.")
