"""The data package against independent oracles: hand-written records, painted photographs, reference resizing."""

import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from alrc_lab.data import DataError, cifar10, data_status, load_cifar10, patches

RECORD = 3073
NAMES = [f"data_batch_{number}.bin" for number in range(1, 6)]
GENUINE = Path(os.environ.get("ALRC_DATA", "") or "/nonexistent") / "cifar-10-batches-bin"
needs_cifar10 = pytest.mark.skipif(
    not GENUINE.is_dir(), reason="needs CIFAR-10: ALRC_DATA names no folder that holds cifar-10-batches-bin"
)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """An empty user cache, no ALRC_DATA, and no proxy between the tests and their server."""
    folder = tmp_path / "cache"
    monkeypatch.delenv("ALRC_DATA", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(cifar10, "user_cache_dir", lambda name: str(folder / name))
    return folder / "alrc"


def batch_bytes(count, seed=0):
    """Random whole records with labels 0 to 9."""
    data = np.random.default_rng(seed).integers(0, 256, (count, RECORD), dtype=np.uint8)
    data[:, 0] %= 10
    return data.tobytes()


def write_batches(folder, counts=(2, 1, 1, 3, 1), test=2):
    """Write a small copy in the official layout under `folder`; return the folder of batches."""
    batches = folder / "cifar-10-batches-bin"
    batches.mkdir(parents=True)
    for seed, (name, count) in enumerate([*zip(NAMES, counts, strict=True), ("test_batch.bin", test)]):
        (batches / name).write_bytes(batch_bytes(count, seed))
    return batches


# --- reading -----------------------------------------------------------------------------------------------------


def assert_pixels_are_those_of(data, images, labels):
    """Follow the format's own words byte by byte: a label, then 1,024 red, 1,024 green, 1,024 blue, row-major."""
    assert len(images) == len(labels) == len(data) // RECORD
    for n, channel, row, column in itertools.product(range(len(labels)), range(3), (0, 1, 30, 31), (0, 2, 31)):
        assert labels[n] == data[n * RECORD]
        assert images[n, channel, row, column] == data[n * RECORD + 1 + channel * 1024 + row * 32 + column]


def test_reads_the_official_layout_in_file_order(tmp_path):
    batches = write_batches(tmp_path)
    data = b"".join((batches / name).read_bytes() for name in NAMES)
    found = load_cifar10(tmp_path)
    assert_pixels_are_those_of(data, found.images, found.labels)
    assert found.images.dtype == np.uint8
    assert found.images.flags.c_contiguous
    assert found.images.flags.writeable
    assert found.sha256 == hashlib.sha256(data).hexdigest()
    assert (found.name, found.slug, found.source, found.path) == ("CIFAR-10", "cifar10-8", "path", str(batches))
    assert found.note == "8 of CIFAR-10's 50,000 training images"
    test = load_cifar10(batches, split="test")
    assert_pixels_are_those_of((batches / "test_batch.bin").read_bytes(), test.images, test.labels)
    assert (test.slug, test.note) == ("cifar10-test-2", "2 of CIFAR-10's 10,000 test images")


@pytest.mark.parametrize("wrong", ["rows and columns exchanged", "channels last", "labels shifted"])
def test_the_layout_check_can_fail(tmp_path, wrong):
    batches = write_batches(tmp_path)
    found = load_cifar10(batches, split="test")
    images, labels = found.images, found.labels
    if wrong == "rows and columns exchanged":
        images = images.swapaxes(2, 3)
    elif wrong == "channels last":
        images = images.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2)
    else:
        labels = np.roll(labels, 1) + 1
    with pytest.raises(AssertionError):
        assert_pixels_are_those_of((batches / "test_batch.bin").read_bytes(), images, labels)


def test_describe_is_json_and_the_summary_names_what_matters(tmp_path):
    found = load_cifar10(write_batches(tmp_path))
    described = json.loads(json.dumps(found.describe()))
    expected = "name slug source path images sha256 split note searched"
    assert list(described) == expected.split()
    assert described["images"] == 8
    for part in ("CIFAR-10", "8 train images", "path", str(tmp_path), found.sha256[:12]):
        assert part in str(found)
    assert "[[" not in repr(found)


# --- the search order --------------------------------------------------------------------------------------------


def test_search_order(monkeypatch, tmp_path, cache):
    assert load_cifar10().source == "embedded"
    write_batches(cache, counts=(1, 1, 1, 1, 1))
    assert (load_cifar10().source, len(load_cifar10().images)) == ("cache", 5)
    write_batches(tmp_path / "root", counts=(2, 1, 1, 1, 1))
    monkeypatch.setenv("ALRC_DATA", str(tmp_path / "root"))
    assert (load_cifar10().source, len(load_cifar10().images)) == ("ALRC_DATA", 6)
    mine = write_batches(tmp_path / "mine", counts=(3, 1, 1, 1, 1))
    assert (load_cifar10(mine).source, len(load_cifar10(str(mine)).images)) == ("path", 7)
    assert load_cifar10("embedded").source == "embedded"
    assert [entry["where"] for entry in data_status(mine)] == ["path", "ALRC_DATA", "cache", "embedded"]
    assert [entry["used"] for entry in data_status(mine)] == [True, False, False, False]
    assert [entry["images"] for entry in data_status(mine)][:3] == [7, 6, 5]


def test_a_root_without_cifar_is_passed_over_and_recorded(monkeypatch, tmp_path, cache):
    monkeypatch.setenv("ALRC_DATA", str(tmp_path))
    found = load_cifar10(split="test")
    assert found.source == "embedded"
    assert found.describe()["searched"] == [
        f"ALRC_DATA: {tmp_path} holds no cifar-10-batches-bin",
        f"cache: {cache} does not exist",
    ]


@pytest.mark.parametrize("make", ["nothing", "a file", "an empty folder"])
def test_an_explicit_path_never_falls_through(tmp_path, cache, make):
    write_batches(cache)
    target = tmp_path / "given"
    if make == "a file":
        target.write_bytes(b"x")
    elif make == "an empty folder":
        target.mkdir()
    with pytest.raises(DataError, match=str(target)) as caught:
        load_cifar10(target)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="empty"):
        load_cifar10("")


@pytest.mark.parametrize("is_file", [False, True])
def test_a_missing_alrc_data_folder_is_an_error(monkeypatch, tmp_path, cache, is_file):
    write_batches(cache)
    target = tmp_path / "gone"
    if is_file:
        target.write_bytes(b"x")
    monkeypatch.setenv("ALRC_DATA", str(target))
    with pytest.raises(DataError, match=f"ALRC_DATA names {target}"):
        load_cifar10()
    status = data_status()
    assert not any(entry["used"] for entry in status)
    assert str(target) in status[0]["error"]
    assert status[1]["images"] == 8


def test_a_folder_that_may_not_be_opened_is_reported(monkeypatch, tmp_path):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setenv("ALRC_DATA", str(tmp_path))
    monkeypatch.setattr(Path, "is_dir", refuse)
    assert "Permission denied" in data_status()[0]["error"]
    with pytest.raises(DataError, match="Permission denied"):
        load_cifar10()


def test_an_unknown_split_is_an_error():
    for function in (load_cifar10, data_status):
        with pytest.raises(DataError, match="'valid'"):
            function(split="valid")


# --- damage ------------------------------------------------------------------------------------------------------


def test_damaged_files_are_named_with_size_and_expectation(monkeypatch, tmp_path):
    batches = write_batches(tmp_path)
    monkeypatch.setenv("ALRC_DATA", str(tmp_path))
    file = batches / "data_batch_4.bin"
    good = file.read_bytes()
    bad_label = bytearray(good)
    bad_label[RECORD] = 10
    for bad, expected in [
        (good[:-1], "9,218 bytes, not a positive multiple of 3,073"),
        (good + b"x", "9,220 bytes"),
        (b"", "0 bytes"),
        (bytes(bad_label), "label 10 in record 1"),
    ]:
        file.write_bytes(bad)
        with pytest.raises(DataError, match=expected) as caught:
            load_cifar10()
        assert str(file) in str(caught.value)
        assert "alrc data fetch" in str(caught.value)
        entry = data_status()[0]
        assert (entry["found"], entry["images"], entry["sha256"], entry["used"]) == (True, None, None, False)
        assert entry["error"] == str(caught.value)
    file.unlink()
    (batches / "data_batch_1.bin").unlink()
    with pytest.raises(DataError, match=r"lacks data_batch_1\.bin, data_batch_4\.bin"):
        load_cifar10()
    file.mkdir()
    (batches / "data_batch_1.bin").write_bytes(good)
    with pytest.raises(DataError, match="cannot be read"):
        load_cifar10()
    assert load_cifar10(split="test").source == "ALRC_DATA"


def test_status_reports_where_there_is_nothing_to_report(cache):
    environment, cached, embedded = data_status()
    assert (environment["path"], environment["note"], environment["found"]) == ("", "not set", False)
    assert (cached["path"], cached["found"]) == (str(cache / "cifar-10-batches-bin"), False)
    assert (embedded["used"], embedded["sha256"]) == (True, load_cifar10().sha256)
    assert json.loads(json.dumps([environment, cached, embedded])) == [environment, cached, embedded]


# --- the embedded default ----------------------------------------------------------------------------------------


def test_embedded_bytes_are_the_ones_the_documentation_names():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    for split in ("train", "test"):
        found = load_cifar10("embedded", split=split)
        assert found.images.shape[1:] == (3, 32, 32)
        assert found.images.flags.c_contiguous
        assert found.labels is None
        assert found.sha256 == hashlib.sha256(found.images.tobytes()).hexdigest()
        assert found.sha256 in page
        assert f"{len(found.images):,}" in page
        assert found.slug == {"train": "patches-", "test": "patches-test-"}[split] + str(len(found.images))
    assert 5000 <= len(load_cifar10().images) <= 10_000


def test_embedded_images_can_be_written_to_without_harm():
    images = load_cifar10("embedded").images
    before = load_cifar10("embedded").sha256
    images[:] = 0
    assert load_cifar10("embedded").sha256 == before


def paint(name):
    """A photograph that is dark in its left two thirds and light in its right third."""
    image = np.random.default_rng(len(name)).integers(0, 128, (300, 451, 3), dtype=np.uint8)
    image[:, 2 * 451 // 3 :] += 128
    return image


@pytest.mark.parametrize("is_leaking", [False, True])
def test_no_test_pixel_is_ever_trained_on(monkeypatch, is_leaking):
    monkeypatch.setattr(patches, "_read", paint)
    if is_leaking:
        monkeypatch.setattr(patches, "_region", lambda photograph, split: photograph)
    monkeypatch.setattr(patches, "_LEAST_STD", 0)
    train, test = patches._make.__wrapped__("train"), patches._make.__wrapped__("test")
    assert len(train) >= len(test) > 100
    is_separate = train.max() < 128 <= test.min()
    assert is_separate != is_leaking


def test_patches_are_the_photographs_upright_and_in_colour():
    from skimage import data
    from skimage.transform import downscale_local_mean

    patch = patches._cut(patches._reduce(patches._region(patches._read("astronaut.png"), "train"), 5))[0]
    reference = downscale_local_mean(data.astronaut().astype(float), (5, 5, 1))[:32, :32]
    assert np.abs(patch.transpose(1, 2, 0) - reference).max() <= 0.5
    assert np.abs(patch[::-1].transpose(1, 2, 0) - reference).max() > 50


def test_flat_patches_are_left_out():
    found = load_cifar10("embedded").images
    assert found.std(axis=(1, 2, 3)).min() >= 20


def test_a_missing_photograph_or_package_is_said_plainly(monkeypatch):
    monkeypatch.setattr(patches, "PHOTOGRAPHS", {"nobody.png": (4,)})
    with pytest.raises(DataError, match=r"nobody\.png"):
        patches._make.__wrapped__("train")
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(DataError, match=r"pip install 'alrc\[lab\]'"):
        patches._make.__wrapped__("train")


def test_statistics_against_reference_arithmetic():
    images = load_cifar10("embedded").images[:20]
    errors, fourth = [], []
    grid, half = np.arange(32), np.linspace(0, 31, 16)
    for image in images.astype(float):
        image = (image - image.mean()) / image.std()
        restored = image
        for axis in (1, 2):
            small = np.apply_along_axis(lambda line: np.interp(half, grid, line), axis, restored)
            restored = np.apply_along_axis(lambda line: np.interp(grid, half, line), axis, small)
        errors.append(np.mean((restored - image) ** 2))
        fourth.append(np.mean((restored - image) ** 4))
    found = patches.image_statistics(images)
    assert found.resize_mean == pytest.approx(np.mean(errors), rel=1e-4)
    assert found.resize_95 == pytest.approx(np.percentile(errors, 95), rel=1e-4)
    assert found.resize_fourth_mean == pytest.approx(np.mean(fourth), rel=1e-4)


@pytest.mark.parametrize("slope", [-1.0, -3.0])
def test_spectrum_slope_of_noise_with_a_known_slope(slope):
    rng = np.random.default_rng(1)
    axis = np.fft.fftfreq(128)
    radius = np.hypot(axis[:, None], axis)
    radius[0, 0] = 1
    noise = np.fft.fft2(rng.standard_normal((200, 128, 128))) * radius ** (slope / 2)
    assert patches._spectrum_slope(np.fft.ifft2(noise).real[:, :32, :32]) == pytest.approx(slope, abs=0.15)


def test_comparison_without_cifar10_says_so(monkeypatch):
    monkeypatch.setattr(patches, "_make", patches._make.__wrapped__)
    monkeypatch.setattr(patches, "PHOTOGRAPHS", {"rocket.jpg": (6,)})
    lines = list(patches.comparison())
    assert any(line.startswith("no CIFAR-10 found") for line in lines)
    assert lines[-1].startswith("spectrum_slope")


# --- the genuine data, and the house rules -----------------------------------------------------------------------


@needs_cifar10
def test_genuine_cifar10(monkeypatch):
    monkeypatch.setenv("ALRC_DATA", str(GENUINE.parent))
    found = load_cifar10()
    data = b"".join((GENUINE / name).read_bytes() for name in NAMES)
    assert found.source == "ALRC_DATA"
    assert len(found.images) == len(data) // RECORD
    assert found.sha256 == hashlib.sha256(data).hexdigest()
    assert found.labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]  # a frog, two trucks, a deer, two cars …
    assert np.unique(found.labels).tolist() == list(range(10))


@needs_cifar10
def test_embedded_patches_resemble_genuine_cifar10():
    genuine = patches.image_statistics(load_cifar10(GENUINE).images[:2000])
    embedded = patches.image_statistics(load_cifar10("embedded").images[:2000])
    for key in ("std", "resize_mean", "resize_50", "resize_95", "resize_fourth_mean", "spectrum_slope"):
        assert getattr(embedded, key) == pytest.approx(getattr(genuine, key), rel=0.25), key
    blurred = patches.image_statistics(load_cifar10("embedded").images[:500, :, 8:24, 8:24].repeat(2, 2).repeat(2, 3))
    assert blurred.resize_mean != pytest.approx(genuine.resize_mean, rel=0.25)


@pytest.mark.parametrize(
    ("imports", "expected"), [("alrc_lab.data.patches", []), ("alrc_lab.data, skimage", ["skimage"])]
)
def test_importing_the_package_loads_nothing_heavy(imports, expected):
    heavy = ["alrc_lab.report", "alrc_lab.runner", "jax", "keras", "matplotlib", "skimage", "torch"]
    code = f"import sys, {imports}; print(*[name for name in {heavy} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == expected
