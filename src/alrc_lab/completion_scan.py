"""Turn a partial scan and its mask into what networks were trained on, and completions into intensities.

The steps are those that make training examples in data/scan.py. No torch, no files: arrays in, arrays out.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from alrc_lab.data.scan import blur, normalise

__all__ = [
    "PreparedScan",
    "Span",
    "Units",
    "Values",
    "count_bad",
    "dwell_of",
    "in_units",
    "mask_doubt",
    "prepare_scan",
    "rms_percent",
    "simulate_detector",
    "size_words",
]

Values = Literal["detector", "normalised"]
"""What a scan holds: intensities as a detector gives them, or what the published noise model made of a micrograph."""
Units = Literal["normalised", "scan"]
"""What a completion is given in: -1 to 1, or the intensities of the scan."""

_STRONG = 0.5  # of the longest dwell; shorter ones are too noisy to tell the range of intensities
_LEAST_RANGE = 1e-6


class Span(NamedTuple):
    """Hold the intensities of the darkest and of the brightest pixel of a field, in the units of its scan."""

    low: float
    """What becomes -1."""
    high: float
    """What becomes 1."""


class PreparedScan(NamedTuple):
    """Hold what a network is given, and what was taken for the range of intensities."""

    inputs: NDArray[np.float32]
    """Scan in [0, 1], 0 where not scanned, and dwell times; shape (2, side, side)."""
    span: Span | None
    """Of a detector's scan; None for one that was normalised before."""
    strong: int
    """Number of pixels whose dwell is at least half the longest: those that the span was taken from."""


def dwell_of(mask: ArrayLike) -> NDArray[np.float32]:
    """Read a mask as dwell times.

    Args:
        mask: Floating point in [0, 1]: dwell times as they are. Boolean, or whole numbers 0 and 1: scanned or not.
            8 or 16 bits without sign, with larger values: dwell times times 255 or 65535.

    Returns:
        Dwell times in [0, 1], same shape.

    Raises:
        ValueError: Values outside these, no scanned pixel, or nothing else.

    Example:
        >>> dwell_of(np.array([[0, 255], [51, 0]], np.uint8)).round(3).tolist()
        [[0.0, 1.0], [0.20000000298023224, 0.0]]
    """
    array = np.asarray(mask)
    if array.ndim != 2 or array.dtype.kind not in "biuf":
        raise ValueError(f"a mask must be one image of real numbers, not {_shape_and_dtype(array)}")
    bad = count_bad(array)
    if bad:
        raise ValueError(f"the mask has {bad} that are not finite: write 0 where nothing was scanned")
    low, high = float(array.min(initial=0)), float(array.max(initial=0))
    top = {"uint8": 255, "uint16": 65535}.get(array.dtype.name, 1) if high > 1 else 1
    if low < 0 or high > top:
        raise ValueError(
            f"dwell times of the mask are from {low:.6g} to {high:.6g}: they must be from 0 to 1, "
            "or 8-bit or 16-bit numbers without sign"
        )
    dwell = (array / top).astype(np.float32)
    if not dwell.any():
        raise ValueError(f"the mask is 0 at all {dwell.size:,} pixels: nothing was scanned; is it the right file?")
    if dwell.all():
        raise ValueError(f"the mask is above 0 at all {dwell.size:,} pixels: there is nothing to complete")
    return dwell


def prepare_scan(
    scan: ArrayLike,
    mask: ArrayLike,
    *,
    values: Values = "detector",
    span: tuple[float, float] | None = None,
    nan_as_unscanned: bool = False,
) -> PreparedScan:
    """Turn a scan into what networks were trained on.

    Of a detector's intensities, low to high become t = -1 to 1; then d = m t where the dwell m is above 0, and -1
    elsewhere, and the range of all becomes [0, 1]: what `simulate_scan` does with what a detector would see. A t beyond
    2 - m, the most that the noise model can give, is cut.

    Args:
        scan: Intensities, any real dtype, shape (height, width); what lies outside the mask is not looked at. Values
            are per time, as a microscope's images are: divide counts by the dwell first. If `values` is "normalised":
            in [0, 1] and 0 outside the mask.
        mask: What `dwell_of` reads, of the same shape.
        values: What the scan holds.
        span: Darkest and brightest intensity of the whole field; None takes those of the pixels of long dwell.
        nan_as_unscanned: Whether scanned pixels that are not finite are taken out of the mask, instead of refused.

    Returns:
        Input of the networks, and the span.

    Raises:
        ValueError: A scan, a mask or a span that cannot be used.
    """
    array, m = np.asarray(scan), dwell_of(mask)
    if array.ndim != 2 or array.dtype.kind not in "biuf":
        raise ValueError(f"a scan must be one image of real numbers, not {_shape_and_dtype(array)}")
    if array.shape != m.shape:
        raise ValueError(
            f"the scan has {size_words(array.shape)} pixels, the mask {size_words(m.shape)}: they must be of one size"
        )
    if values not in get_args(Values):
        raise ValueError(f"values must be one of {', '.join(get_args(Values))}, got {values!r}")
    m = _without_bad(array, m, nan_as_unscanned)
    is_scanned = m > 0
    seen, strong = array[is_scanned].astype(np.float64), m[is_scanned] >= _STRONG * m.max()
    if np.ptp(seen) <= _LEAST_RANGE * np.abs(seen).max():
        raise ValueError(f"all {seen.size:,} scanned pixels have the value {seen[0]:.6g}: there is no contrast")
    if values == "normalised":
        if span is not None:
            raise ValueError(f"the scan is normalised, so no span is taken; got {tuple(span)}")
        return PreparedScan(np.stack([_checked_normalised(array, m), m]), None, int(strong.sum()))
    found = _span_of(seen, strong, span)
    middle, half = (found.low + found.high) / 2, (found.high - found.low) / 2
    dwell = m[is_scanned].astype(np.float64)
    t = np.clip((seen - middle) / half, dwell - 2, 2 - dwell)
    detected = np.full(m.shape, -1.0)
    detected[is_scanned] = dwell * t
    scaled = (detected + 1) / (detected.max() + 1)
    return PreparedScan(np.stack([scaled.astype(np.float32), m]), found, int(strong.sum()))


def mask_doubt(scan: NDArray[Any], mask: NDArray[np.float32]) -> str | None:
    """Say why a mask seems to be another scan's: most of what lies outside has one value, but not all.

    Args:
        scan: As it is in its file, shape (height, width).
        mask: Dwell times, same shape.

    Returns:
        One sentence, or None where there is no reason.
    """
    values, counts = np.unique(scan[mask == 0], return_counts=True)
    share = counts.max() / counts.sum()
    if not 0.5 <= share < 1:
        return None
    common = float(values[counts.argmax()])
    return (
        f"of the pixels outside the mask, {1 - share:.1%} do not have the value {common:g} of the others: is it the "
        "mask of this scan?"
    )


def simulate_detector(
    truth: NDArray[np.float32],
    blurred: NDArray[np.float32],
    mask: NDArray[np.float32],
    uniform: NDArray[np.floating],
    span: Span,
) -> NDArray[np.float32]:
    """Make the intensities that a detector would see, by the published noise model: m t + 2(1 - m) U b.

    With the same span `prepare_scan` makes of them what `simulate_scan` does.

    Args:
        truth: The image t in [-1, 1], not blurred, shape (height, width).
        blurred: Its copy b of `blur(truth, renormalise=True)`.
        mask: Dwell times m from 0 to 1.
        uniform: The noise U, uniform in [0, 1), a number for each pixel.
        span: Intensities that -1 and 1 stand for.

    Returns:
        Intensities where m is above 0, and 0 elsewhere.
    """
    m = mask.astype(np.float64)
    signal = m * truth + 2 * (1 - m) * uniform * blurred
    intensities = (span.low + span.high) / 2 + (span.high - span.low) / 2 * signal
    return np.where(m > 0, intensities, 0.0).astype(np.float32)


def in_units(
    units: Units, completion: NDArray[np.float32], scan: NDArray[Any], prepared: PreparedScan
) -> NDArray[np.float32]:
    """Give a completion in the units that are asked for.

    In those of the scan, -1 to 1 become the span, and then a number is added, so that the mean over the scanned pixels,
    weighted by dwell, is that of the scan. No factor is fitted: a completion is smoother than a scan, and would be
    stretched.

    Args:
        units: "normalised" or "scan".
        completion: What the networks gave, shape (side, side).
        scan: The detector's intensities.
        prepared: What `prepare_scan` made of them.

    Returns:
        Same shape.

    Raises:
        ValueError: The scan is a normalised one, which has no intensities.
    """
    if units not in get_args(Units):
        raise ValueError(f"units must be one of {', '.join(get_args(Units))}, got {units!r}")
    if units == "normalised":
        return completion
    if prepared.span is None:
        raise ValueError("a normalised scan has no intensities to go back to: give --units normalised")
    low, high = prepared.span
    image = (low + high) / 2 + (high - low) / 2 * completion.astype(np.float64)
    dwell = prepared.inputs[1].astype(np.float64)
    is_scanned = dwell > 0
    image += np.average(scan[is_scanned] - image[is_scanned], weights=dwell[is_scanned])
    return image.astype(np.float32)


def rms_percent(completion: NDArray[np.floating], truth: ArrayLike) -> tuple[float, float]:
    """Compare a completion with a micrograph that is known, as the experiment does: with its blurred copy.

    Args:
        completion: In [-1, 1], shape (side, side).
        truth: The whole micrograph, any real dtype, same shape.

    Returns:
        Root mean squared error in percent of the full range, and that of the best constant image.
    """
    target = blur(normalise(truth)).astype(np.float64)
    if target.shape != completion.shape:
        words = f"{size_words(target.shape)} pixels, the completion {size_words(completion.shape)}"
        raise ValueError(f"the truth has {words}: they must be of one size")
    return 50 * float(np.sqrt(np.square(completion - target).mean())), 50 * float(target.std())


def _span_of(seen: NDArray[np.float64], strong: NDArray[np.bool_], span: tuple[float, float] | None) -> Span:
    """Return the span that is given or that pixels of long dwell have."""
    if span is not None:
        low, high = span
        if not (np.isfinite([low, high]).all() and high - low > _LEAST_RANGE * max(abs(low), abs(high))):
            raise ValueError(f"the span must go from a lower to a higher intensity, got {low:g} to {high:g}")
        if not (seen[strong].max() > low and seen[strong].min() < high):
            raise ValueError(
                f"the span goes from {low:g} to {high:g}, the pixels of long dwell from {seen[strong].min():.6g} to "
                f"{seen[strong].max():.6g}: they must meet"
            )
        return Span(float(low), float(high))
    low, high = float(seen[strong].min()), float(seen[strong].max())
    if high - low <= _LEAST_RANGE * max(abs(low), abs(high)):
        raise ValueError(
            f"all {strong.sum():,} pixels of long dwell have the value {low:.6g}: give the span of intensities"
        )
    return Span(low, high)


def _without_bad(scan: NDArray[Any], m: NDArray[np.float32], as_unscanned: bool) -> NDArray[np.float32]:
    """Refuse scanned pixels that are not finite, or take them out of the mask."""
    bad = count_bad(scan[m > 0])
    if not bad:
        return m
    if not as_unscanned:
        raise ValueError(
            f"of the scanned pixels, {bad} are not finite (NaN or infinite): repair them, or take them out of the mask "
            "(--nan-as-unscanned does)"
        )
    kept = np.where(np.isfinite(scan), m, np.float32(0))
    if not kept.any():
        raise ValueError("no scanned pixel is finite (all are NaN or infinite): there is nothing to complete from")
    return kept


def _checked_normalised(scan: NDArray[Any], m: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a normalised scan with its largest value at 1, or say why it is none."""
    values = np.where(np.isfinite(scan) | (m > 0), scan, 0).astype(np.float32)
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 1:
        raise ValueError(
            f"a normalised scan is from 0 to 1, this one from {low:.6g} to {high:.6g}: give --values detector for "
            "intensities of a detector"
        )
    outside = int(np.count_nonzero(values[m == 0]))
    if outside:
        raise ValueError(
            f"{outside:,} pixels outside the mask are not 0, as they are in a normalised scan: it is another mask's, "
            "or holds intensities (--values detector)"
        )
    lost = int(np.count_nonzero((values == 0) & (m > 0) & (m < 1)))
    if lost:
        raise ValueError(
            f"{lost:,} of {np.count_nonzero(m):,} pixels of the mask are 0, which no normalised scan has there: it is "
            "another mask's, or holds intensities (--values detector)"
        )
    return values / np.float32(high)


def count_bad(array: NDArray[Any]) -> str:
    """Count what is not finite, in words; empty if nothing is.

    Args:
        array: Any dtype and shape.

    Returns:
        Such as "3 of 9,216 pixels".
    """
    number = int(array.size - np.isfinite(array).sum()) if array.dtype.kind == "f" else 0
    return f"{number:,} of {array.size:,} pixels" if number else ""


def size_words(shape: tuple[int, ...]) -> str:
    """Write a size the way people do.

    Args:
        shape: Of an array.

    Returns:
        Such as "96×96".
    """
    return "×".join(map(str, shape)) if shape else "one value"


def _shape_and_dtype(array: NDArray[Any]) -> str:
    """Name what was given instead of an image."""
    return f"{size_words(array.shape)} of {array.dtype}"
