"""The arithmetic of partial scans against naive loops, SciPy, and the authors' own mask and scan."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import tifffile

from alrc_lab.data import scan

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def rng():
    return np.random.default_rng(5)


# --- the spiral --------------------------------------------------------------------------------------------------


def assert_is_the_authors_mask(mask):
    golden = tifffile.imread(GOLDEN / "stem_spiral_mask_512.tif")
    assert (mask.dtype, mask.shape) == (golden.dtype, golden.shape)
    assert np.array_equal(mask, golden)


def test_the_spiral_is_the_authors_in_every_bit():
    assert_is_the_authors_mask(scan.spiral_mask(512, 1 / 20))
    assert_is_the_authors_mask(scan.spiral_mask(512))


@pytest.mark.parametrize("wrong", ["transposed", "shifted", "not blurred", "another pitch", "one bit"])
def test_the_check_of_the_mask_can_fail(wrong):
    mask = scan.spiral_mask(512, 1 / 20.01 if wrong == "another pitch" else 1 / 20)
    if wrong == "transposed":
        mask = mask.T
    elif wrong == "shifted":
        mask = np.roll(mask, 1, 0)
    elif wrong == "not blurred":
        mask = scan._spiral_line(512, 1 / 20)
    elif wrong == "one bit":
        mask[256, 300] = np.nextafter(mask[256, 300], np.float32(1))
    with pytest.raises(AssertionError):
        assert_is_the_authors_mask(mask)


@pytest.mark.parametrize(("size", "pitch"), [(96, 20), (257, 7), (900, 3)])
def test_the_line_follows_the_curve(monkeypatch, size, pitch):
    """Compare with the radial distance of each pixel's centre to the nearest arm of r = pitch θ / 2π."""
    canvas = math.ceil(math.sqrt(2) * size)
    first = canvas // 2 - size // 2
    y, x = np.mgrid[first : first + size, first : first + size] + 0.5 - canvas / 2
    turns = np.hypot(x, y) / pitch - np.arctan2(y, x) / (2 * math.pi)
    distance = np.abs(turns - np.rint(turns)) * pitch
    is_outside = np.hypot(x, y) > pitch  # nearer to the centre an arm runs along the radius

    def is_on_the_curve(coverage):
        line = scan._spiral_line(size, coverage) > 0
        return distance[line & is_outside].max() < 1.2 and line[is_outside & (distance < 0.05)].mean() > 0.9

    assert is_on_the_curve(1 / pitch)
    assert not is_on_the_curve(1 / (pitch + 0.5))
    if size == 900:  # as few corners as the published mask has would cut across arms so close
        monkeypatch.setattr(scan, "_num_corners", lambda radius, angle: 10_000)
        assert not is_on_the_curve(1 / pitch)


@pytest.mark.parametrize(
    ("nominal", "true"), [(16, 17.9), (25, 27.3), (36, 38.2), (49, 50.0), (64, 60.5), (81, 73.7), (100, 87.0)]
)
def test_line_coverages_are_the_published_ones(nominal, true):
    assert round(1 / scan.spiral_coverage(512, 1 / nominal).line, 1) == true


def test_coverage_is_counted(rng):
    found = scan.spiral_coverage(96, 1 / 20)
    mask = scan.spiral_mask(96, 1 / 20)
    assert found.pixels == sum(value > 0 for value in mask.flat) / 96**2
    assert found.dwell == pytest.approx(math.fsum(mask.flat) / 96**2)
    assert (found.nominal, round(found.turns, 9)) == (1 / 20, 3.4)
    assert round(1 / found.line, 1) == 15.9
    assert np.array_equal(mask * 16, np.rint(mask * 16))


@pytest.mark.parametrize("arguments", [(1,), (64, 0), (64, -0.1), (64, 20), (64, math.nan)])
def test_impossible_spirals_are_refused(arguments):
    with pytest.raises(ValueError, match=str(arguments[-1])):
        scan.spiral_mask(*arguments)


@pytest.mark.parametrize("size", [2, 3, 31, 64])
@pytest.mark.parametrize("coverage", [1, 0.3, 1 / 1000])
def test_any_size_and_coverage_gives_a_mask(size, coverage):
    mask = scan.spiral_mask(size, coverage)
    assert mask.shape == (size, size)
    assert 0 < mask.max() <= 1
    assert mask.min() >= 0


# --- normalisation -----------------------------------------------------------------------------------------------


def normalised(image):
    """Follow the words of `normalise`, one value at a time."""
    values = [[float(v) if math.isfinite(v) else 0.0 for v in row] for row in image.tolist()]
    flat = list(itertools.chain(*values))
    low, high = min(flat), max(flat)
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        return np.zeros(image.shape)
    return np.array([[2 * (v - low) / (high - low) - 1 for v in row] for row in values])


IMAGES = {
    "float32": np.array([[0.25, -3, 7], [1, 2, 7]], np.float32),
    "float16": np.array([[60000, -60000], [0, 1]], np.float16),
    "uint32": np.array([[2**32 - 1, 0], [2**31, 5]], np.uint32),
    "int64": np.array([[-(2**62), 2**62], [0, 2**61]], np.int64),
    "bool": np.array([[True, False], [False, False]]),
    "not finite": np.array([[np.nan, np.inf], [-np.inf, 5], [2, 3]]),
    "amperes": np.array([[1e-12, 2e-12], [3e-12, 5e-12]]),
    "big-endian": np.array([[1, 2], [3, 9]], ">u2"),
    "counts on a pedestal": np.array([[60000, 60001]], np.uint16),
    "constant": np.full((2, 2), 0.1, np.float32),
    "all zero": np.zeros((2, 2), np.uint8),
    "nothing finite": np.full((2, 2), np.nan),
    "rounding only": np.array([[1, 1 + 1e-9]]),
}


def assert_normalises(function, image):
    found = function(image)
    assert found.dtype == np.float32
    assert np.abs(found - normalised(image)).max() < 1e-6
    assert found.any() != scan.is_constant(image)
    if found.any():
        assert (found.min(), found.max()) == (-1, 1)


@pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES.keys())
def test_normalise(image):
    before = image.copy()
    assert_normalises(scan.normalise, image)
    assert np.array_equal(image, before, equal_nan=image.dtype.kind == "f")


@pytest.mark.parametrize("image", ["not finite", "amperes", "uint32", "rounding only"])
def test_the_check_of_normalise_can_fail(image):
    def wrong(values):
        if image == "uint32":  # the difference overflows
            return (2 * (values.astype(np.int32) - np.int32(values.min())) / values.max() - 1).astype(np.float32)
        values = np.where(np.isfinite(values), values, 7.0)  # not the 0 that was asked for
        extent = np.ptp(values)
        limit = {"amperes": 1e-6}.get(image, 0)
        return np.float32(0 * values if extent <= limit else 2 * (values - values.min()) / extent - 1)

    with pytest.raises(AssertionError):
        assert_normalises(wrong, IMAGES[image])


def test_normalise_at_the_ends_of_the_number_range():
    huge = np.finfo(np.float64).max
    assert scan.normalise([[-huge, 0, huge]]).tolist() == [[-1, 0, 1]]
    assert scan.normalise([[0, 5e-324]]).tolist() == [[-1, 1]]
    assert not scan.is_constant(np.array([[-huge, huge]]))


def test_images_of_a_stack_are_normalised_one_by_one(rng):
    stack = rng.normal(size=(3, 5, 4)) * [[[1]], [[100]], [[0]]]
    assert np.array_equal(scan.normalise(stack), [scan.normalise(image) for image in stack])


@pytest.mark.parametrize("image", [np.zeros(3), np.zeros((2, 2), complex), np.zeros((0, 2)), np.full((2, 2), "a")])
def test_what_is_no_image_is_refused(image):
    with pytest.raises(ValueError, match="must be real"):
        scan.normalise(image)


# --- blur, symmetries, half size ---------------------------------------------------------------------------------


def blurred_by_loops(image, std=2.5, mirror=lambda i, n: -i if i < 0 else 2 * (n - 1) - i if i >= n else i):
    """Sum 25 weighted neighbours of each pixel, border mirrored without its own pixel."""
    weight = np.array([[math.exp(-(i * i + j * j) / (2 * std**2)) for j in range(-2, 3)] for i in range(-2, 3)])
    weight /= weight.sum()
    height, width = image.shape
    result = np.zeros(image.shape)
    for y, x, i, j in itertools.product(range(height), range(width), range(-2, 3), range(-2, 3)):
        result[y, x] += weight[i + 2, j + 2] * image[mirror(y + i, height), mirror(x + j, width)]
    return result


def test_blur_against_loops_and_scipy(rng):
    image = scan.normalise(rng.normal(size=(9, 12)))
    found = scan.blur(image)
    assert found.dtype == np.float32
    assert np.abs(found - blurred_by_loops(image)).max() < 1e-6
    pdf = np.exp(-0.5 * (np.arange(-2, 3) / 2.5) ** 2) / (2.5 * math.sqrt(2 * math.pi))
    kernel = np.outer(pdf, pdf) / np.outer(pdf, pdf).sum()
    assert np.abs(found - scipy.ndimage.correlate(image.astype(float), kernel, mode="mirror")).max() < 1e-6
    assert np.array_equal(scan.blur(np.stack([image, image[::-1]])), [found, scan.blur(image[::-1])])
    assert np.abs(scan.blur(image, renormalise=True) - normalised(blurred_by_loops(image))).max() < 1e-6


@pytest.mark.parametrize(
    "wrong",
    [
        {"std": 1.1},  # what OpenCV takes for 5×5 when it is not told
        {"mirror": lambda i, n: -i - 1 if i < 0 else 2 * n - 1 - i if i >= n else i},  # with the border pixel
        {"mirror": lambda i, n: min(max(i, 0), n - 1)},
    ],
)
def test_the_check_of_blur_can_fail(rng, wrong):
    image = scan.normalise(rng.normal(size=(9, 12)))
    assert np.abs(scan.blur(image) - blurred_by_loops(image, **wrong)).max() > 1e-3


def test_blur_needs_three_pixels():
    assert scan.blur(np.eye(3)).shape == (3, 3)
    with pytest.raises(ValueError, match=r"\(2, 9\)"):
        scan.blur(np.zeros((2, 9)))


def where_pixels_go(which, size):
    """Source (row, column) of each pixel of the result, by the words of the docstring."""
    for row, column in itertools.product(range(size), repeat=2):
        y, x = row, column
        for _ in range(which % 4):
            y, x = x, size - 1 - y  # undoes a quarter anticlockwise
        yield (row, column), (y, size - 1 - x if which >= 4 else x)


@pytest.mark.parametrize("which", range(8))
def test_dihedral(rng, which):
    image = rng.normal(size=(2, 4, 4))
    found = scan.dihedral(image, which)
    assert all((found[:, *to] == image[:, *source]).all() for to, source in where_pixels_go(which, 4))
    assert found.flags.c_contiguous
    assert not np.shares_memory(found, image)
    other = scan.dihedral(image, (which + 1) % 8)
    assert not all((other[:, *to] == image[:, *source]).all() for to, source in where_pixels_go(which, 4))


def test_the_eight_are_different_and_complete():
    image = np.arange(9).reshape(3, 3)
    group = {scan.dihedral(image, which).tobytes() for which in range(8)}
    assert len(group) == 8
    again = {scan.dihedral(scan.dihedral(image, a), b).tobytes() for a, b in itertools.product(range(8), repeat=2)}
    assert again == group
    for wrong in (-1, 8):
        with pytest.raises(ValueError, match=str(wrong)):
            scan.dihedral(image, wrong)
    with pytest.raises(ValueError, match="square"):
        scan.dihedral(np.zeros((2, 3)), 0)


@pytest.mark.parametrize("shape", [(6, 8), (5, 7)])
def test_decimate(shape):
    image = np.arange(math.prod(shape)).reshape(shape)
    loops = [[image[y, x] for x in range(0, shape[1], 2)] for y in range(0, shape[0], 2)]
    assert scan.decimate(image).tolist() == loops
    assert image[1::2, 1::2].tolist() != loops
    assert scan.decimate(image).flags.c_contiguous


# --- the noise model ---------------------------------------------------------------------------------------------


@pytest.fixture
def scene(rng):
    """Truth, blurred copy, mask and noise of a small image."""
    truth = scan.normalise(scipy.ndimage.gaussian_filter(rng.normal(size=(64, 64)), 2))
    return truth, scan.blur(truth, renormalise=True), scan.spiral_mask(64), rng.random((64, 64))


def scan_by_loops(t, b, m, u, factor=2.0, is_blurred=False):
    """Follow the published formulas one pixel at a time."""
    t = b if is_blurred else t
    q = [
        [
            -1.0 if m[i, j] == 0 else m[i, j] * (m[i, j] * t[i, j] + factor * (1 - m[i, j]) * u[i, j] * b[i, j])
            for j in range(len(t))
        ]
        for i in range(len(t))
    ]
    low, high = min(map(min, q)), max(map(max, q))
    return np.array([[(value - low) / (high - low) for value in row] for row in q])


def test_scan_against_loops(scene):
    found = scan.simulate_scan(*scene)
    assert found.dtype == np.float32
    assert np.abs(found - scan_by_loops(*scene)).max() < 1e-6
    assert np.abs(found - scan_by_loops(*scene, factor=1.0)).max() > 1e-2
    assert np.abs(found - scan_by_loops(*scene, is_blurred=True)).max() > 1e-2
    assert (found.min(), found.max()) == (0, 1)
    assert np.array_equal(found == 0, scene[2] == 0)


def assert_recovers(noise, uniform):
    is_known = np.isfinite(noise)
    assert is_known.sum() > 300
    assert np.abs(noise - uniform)[is_known].max() < 2e-2  # rounding of the scan, divided by the weight of U
    assert np.abs(noise - uniform)[is_known].mean() < 2e-3


def test_noise_is_recovered(scene):
    truth, blurred, mask, uniform = scene
    noise = scan.recover_uniform(scan.simulate_scan(*scene), truth, blurred, mask)
    assert_recovers(noise, uniform)
    assert np.isnan(noise[mask == 0]).all()
    with pytest.raises(AssertionError):
        assert_recovers(noise, 1 - uniform)


def test_a_scan_of_something_else_is_refused(scene):
    truth, blurred, mask, uniform = scene
    made = scan.simulate_scan(*scene)
    wrong = {
        "another truth": (made, truth.T, blurred.T, mask),
        "blurred copy not renormalised": (made, truth, scan.blur(truth), mask),
        "noise above one": (scan.simulate_scan(truth, blurred, mask, 1.5 * uniform), truth, blurred, mask),
        "something where nothing was scanned": (np.maximum(made, 0.1), truth, blurred, mask),
    }
    for arguments in wrong.values():
        with pytest.raises(ValueError, match="none that the noise model makes"):
            scan.recover_uniform(*arguments)


@pytest.mark.parametrize("mask", [np.zeros((64, 64), np.float32), np.ones((64, 64), np.float32)])
def test_a_mask_of_all_or_nothing_is_refused(scene, mask):
    truth, blurred, _, uniform = scene
    made = scan.simulate_scan(truth, blurred, mask, uniform)
    assert np.array_equal(made, np.zeros_like(truth) if not mask.any() else (truth + 1) / 2)
    with pytest.raises(ValueError, match="some must be scanned"):
        scan.recover_uniform(made, truth, blurred, mask)


def test_a_blank_truth_scans_without_complaint(scene):
    blank = np.zeros_like(scene[0])
    assert np.array_equal(scan.simulate_scan(blank, blank, *scene[2:]), scene[2] > 0)


def test_shapes_must_agree(scene):
    truth, blurred, mask, uniform = scene
    with pytest.raises(ValueError, match=r"mask \(32, 32\)"):
        scan.simulate_scan(truth, blurred, scan.spiral_mask(32), uniform)
    with pytest.raises(ValueError, match=r"scan \(64, 32\)"):
        scan.recover_uniform(truth[:, :32], truth, blurred, mask)


# --- the authors' scan -------------------------------------------------------------------------------------------


@pytest.fixture
def published(alrc_data):
    """The authors' partial scan of a micrograph, the micrograph, its blurred copy, and the authors' mask."""
    file = alrc_data / "stem" / "warwick_a1.tif"
    if not file.is_file():
        pytest.skip(f"needs the truth of the published scan: {file} is missing")
    truth = scan.normalise(tifffile.imread(file))
    scanned = tifffile.imread(GOLDEN / "stem_partial_scan_of_warwick_a1.tif")
    return scanned, truth, scan.blur(truth, renormalise=True), tifffile.imread(GOLDEN / "stem_spiral_mask_512.tif")


def assert_is_uniform(noise):
    """Percentiles as they were found in all ten published scans, and a Kolmogorov distance that 99.9 % pass."""
    values = np.sort(noise[np.isfinite(noise)])
    assert len(values) > 45_000
    assert np.round(np.percentile(values, [1, 25, 50, 75, 99]), 2).tolist() == [0.01, 0.25, 0.50, 0.75, 0.99]
    distance = np.abs(values - (np.arange(len(values)) + 0.5) / len(values)).max()
    assert distance < 1.95 / math.sqrt(len(values))


def test_the_published_scan_is_one_of_this_noise_model(published):
    scanned, truth, blurred, mask = published
    noise = scan.recover_uniform(*published)
    assert_is_uniform(noise)
    is_known = np.isfinite(noise)
    again = scan.simulate_scan(truth, blurred, mask, np.where(is_known, noise, 0.5))
    assert np.abs(again - scanned)[is_known].max() < 1e-6
    assert abs(np.corrcoef(noise[is_known], blurred[is_known])[0, 1]) < 0.02
    with pytest.raises(AssertionError):
        assert_is_uniform(noise**1.05)


def test_slope_and_intercept_of_the_published_scan_are_one_number(published):
    scanned, truth, blurred, mask = published
    on = mask > 0
    expected = (mask * (mask * truth + (1 - mask) * blurred))[on].astype(np.float64)
    slope, intercept = np.polyfit(expected, scanned[on].astype(np.float64), 1)
    assert slope == pytest.approx(intercept, rel=2e-3)
    slope, intercept = np.polyfit((mask * truth)[on].astype(np.float64), scanned[on].astype(np.float64), 1)
    assert slope != pytest.approx(intercept, rel=5e-3)


@pytest.mark.parametrize("wrong", ["turned", "blurred truth", "not renormalised", "another mask"])
def test_the_published_scan_is_of_nothing_else(published, wrong):
    scanned, truth, blurred, mask = published
    if wrong == "turned":
        truth, blurred = truth[::-1], blurred[::-1]
    elif wrong == "blurred truth":
        truth = blurred
    elif wrong == "not renormalised":
        blurred = scan.blur(truth)
    else:
        mask = np.roll(mask, 1, 1) * (mask > 0)
    with pytest.raises(ValueError, match="noise model"):
        scan.recover_uniform(scanned, truth, blurred, mask)
