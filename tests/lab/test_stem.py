"""The set of micrographs: which are found, how they are split and cut, and what becomes of those that are no use."""

import dataclasses
import hashlib
import json
import sys
import types
import warnings

import numpy as np
import pytest
import tifffile

from alrc_lab.data import DataError, micrograph, stem
from alrc_lab.data.scan import dihedral, normalise
from alrc_lab.data.stem import PARTS, load_micrographs, micrograph_status, part_of
from alrc_lab.live import data_line


@pytest.fixture(autouse=True)
def no_real_data(monkeypatch, request):
    """No ALRC_DATA but for the test of real micrographs, and a simulated default that costs nothing."""
    if "alrc_data" not in request.fixturenames:
        monkeypatch.delenv("ALRC_DATA", raising=False)
    module = types.ModuleType("alrc_lab.data.simulated")
    module.simulated_micrographs = lambda: [(f"{i:03d} made", image(i, (256, 256), np.float32)) for i in range(8)]
    monkeypatch.setitem(sys.modules, "alrc_lab.data.simulated", module)


def image(seed, shape=(40, 50), dtype=np.uint16):
    """Random numbers that no other seed gives."""
    return (np.random.default_rng(seed).random(shape) * 1000).astype(dtype)


def write(folder, number=20, shape=(40, 50)):
    """Write micrographs a1.tif, a2.tif, … in two folders."""
    for i in range(number):
        file = folder / f"f{i // 10}" / f"a{i}.tif"
        file.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(file, image(i, shape))
    return folder


def crops_of(found, part):
    return [found.crop(part, i) for i in range(found.num_crops(part))]


# --- splitting ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "expected"),
    [(3, (1, 1, 1)), (4, (2, 1, 1)), (7, (5, 1, 1)), (10, (7, 1, 2)), (20, (15, 2, 3)), (70, (52, 7, 11))],
)
def test_parts_are_75_10_15_percent_in_order_and_never_empty(number, expected):
    parts = [part_of(i, number) for i in range(number)]
    assert parts == sorted(parts, key=PARTS.index)
    assert tuple(parts.count(part) for part in PARTS) == expected


@pytest.mark.parametrize("number", [16_227, 1000, 333])
def test_parts_of_many_images_are_the_published_ones(number):
    parts = [part_of(i, number) for i in range(number)]
    for part, share in zip(PARTS, (0.75, 0.10, 0.15), strict=True):
        assert abs(parts.count(part) - share * number) <= 1


def assert_no_image_is_in_two_parts(found):
    """Look at the pixels: every crop of a part must come from an image of which no other part has a crop."""
    origin = {}
    for seed in range(20):
        whole = image(seed)
        for row, column in ((0, 0), (0, 16), (0, 32), (16, 0), (16, 16), (16, 32)):
            origin[normalise(whole[row : row + 16, column : column + 16]).tobytes()] = seed
    seen = {part: {origin[crop.tobytes()] for crop in crops_of(found, part)} for part in PARTS}
    assert sum(map(len, seen.values())) == len(set.union(*seen.values()))
    assert sorted(seen["train"]) == list(range(15))
    assert sorted(seen["test"]) == [17, 18, 19]


def test_images_are_split_in_natural_order_and_never_crops(tmp_path):
    found = load_micrographs(write(tmp_path), crop_size=16)
    assert_no_image_is_in_two_parts(found)
    assert [found.name_of("train", i) for i in (0, 1, 3, 6)] == [
        "f0/a0.tif [0:16, 0:16]",
        "f0/a0.tif [0:16, 16:32]",
        "f0/a0.tif [16:32, 0:16]",
        "f0/a1.tif [0:16, 0:16]",
    ]
    assert found.name_of("test", 17) == "f1/a19.tif [16:32, 32:48]"
    pooled = [crop for part in PARTS for crop in found._crops[part]]
    by_crop = {"train": pooled[:88], "validation": pooled[88:101], "test": pooled[101:]}
    with pytest.raises(AssertionError):
        assert_no_image_is_in_two_parts(dataclasses.replace(found, _crops=by_crop))
    shuffled = {part: found._crops[other] for part, other in zip(PARTS, PARTS[::-1], strict=True)}
    with pytest.raises(AssertionError):
        assert_no_image_is_in_two_parts(dataclasses.replace(found, _crops=shuffled))


def test_an_image_does_not_change_its_part_with_the_size_of_the_crops(tmp_path):
    for i in range(20):
        tifffile.imwrite(tmp_path / f"{i}.tif", image(i, (20, 20) if i % 3 == 1 else (40, 40)))

    def part_of_image(size):
        found = load_micrographs(tmp_path, crop_size=size)
        return {found.name_of(part, i).split()[0]: part for part in PARTS for i in range(found.num_crops(part))}

    small, large = part_of_image(16), part_of_image(32)
    assert len(small) == 20
    assert len(large) == 13
    assert large.items() <= small.items()


# --- crops -------------------------------------------------------------------------------------------------------


def assert_crops_tile_their_images(found, size):
    """Cut each image with plain slices, left to right and top to bottom, every pixel at most once."""
    expected = [
        normalise(image(seed)[y * size : (y + 1) * size, x * size : (x + 1) * size])
        for seed in range(15)
        for y in range(40 // size)
        for x in range(50 // size)
    ]
    crops = crops_of(found, "train")
    assert len(crops) == len(expected)
    assert all(np.array_equal(*pair) for pair in zip(crops, expected, strict=True))
    assert {(crop.dtype.name, crop.min(), crop.max()) for crop in crops} == {("float32", -1, 1)}


@pytest.mark.parametrize("size", [16, 25, 40])
def test_crops_tile_their_images(tmp_path, size):
    found = load_micrographs(write(tmp_path), crop_size=size)
    assert_crops_tile_their_images(found, size)
    shifted = {part: [crop._replace(column=crop.column + 1) for crop in found._crops[part]] for part in PARTS}
    with pytest.raises(AssertionError):
        assert_crops_tile_their_images(dataclasses.replace(found, _crops=shifted), size)


def test_samples_are_all_training_crops_in_all_orientations_and_nothing_else(tmp_path):
    found = load_micrographs(write(tmp_path, 4), crop_size=20)
    known = {dihedral(crop, w).tobytes(): (i, w) for i, crop in enumerate(crops_of(found, "train")) for w in range(8)}
    assert len(known) == 64
    rng = np.random.default_rng(3)
    counts = np.zeros((8, 8))
    for _ in range(3200):
        counts[known[found.sample(rng).tobytes()]] += 1
    chi_squared = ((counts - 50) ** 2 / 50).sum()
    assert chi_squared < 103  # 63 degrees of freedom: 99.9 % are below


def test_samples_depend_on_the_generator_alone(tmp_path):
    found = load_micrographs(write(tmp_path, 4), crop_size=20)
    one, two = np.random.default_rng(1), np.random.default_rng(1)
    first = [found.sample(one) for _ in range(5)]
    crops_of(found, "test")
    assert np.array_equal(first, [found.sample(two) for _ in range(5)])
    assert not np.array_equal(first, [found.sample(two) for _ in range(5)])


def test_held_out_crops_are_the_same_each_time(tmp_path):
    found = load_micrographs(write(tmp_path), crop_size=16)
    crops = crops_of(found, "test")
    assert len(crops) == 18
    assert np.array_equal(list(found.held_out()), crops)
    assert np.array_equal(list(found.held_out("validation", 99)), crops_of(found, "validation"))
    assert np.array_equal(list(found.held_out("test", 4)), [crops[i] for i in (0, 4, 9, 13)])
    assert list(found.held_out("test", 0)) == []


# --- what is no use ----------------------------------------------------------------------------------------------


def spoil(folder):
    """Put files between the good ones that are of no use, each for another reason."""
    (folder / "a00 damaged.tif").write_bytes(b"II*\0 and nothing more")
    np.save(folder / "a00 stack.npy", np.zeros((3, 40, 50)))
    np.save(folder / "a00 constant.npy", np.full((40, 50), 7, np.uint8))
    np.save(folder / "a00 not a number.npy", np.full((40, 50), np.nan))
    np.save(folder / "z small.npy", image(99, (40, 12)))
    np.save(folder / "z pickle.npy", np.array([{}], object))
    return folder


def test_what_is_no_use_is_skipped_and_counted(tmp_path):
    clean = load_micrographs(write(tmp_path / "clean"), crop_size=16)
    found = load_micrographs(spoil(write(tmp_path / "spoilt")), crop_size=16)
    assert [(each.name, each.kind) for each in found.skipped] == [
        ("a00 constant.npy", "blank"),
        ("a00 damaged.tif", "unreadable"),
        ("a00 not a number.npy", "blank"),
        ("a00 stack.npy", "unreadable"),
        ("z pickle.npy", "unreadable"),
        ("z small.npy", "too small"),
    ]
    reasons = {each.name: each.reason for each in found.skipped}
    assert reasons["a00 stack.npy"].startswith("is a stack (3×40×50 of float64)")
    assert reasons["z small.npy"] == "40×12 is less than a crop of 16×16"
    assert all("\n" not in reason for reason in reasons.values())
    assert found.describe()["skipped"] == {"blank": 2, "unreadable": 3, "too small": 1}
    assert found.note.endswith("; skipped 2 blank, 3 unreadable, 1 too small")
    assert np.array_equal(crops_of(found, "train"), crops_of(clean, "train"))
    assert clean.describe()["skipped"] == {}


def test_crops_without_contrast_are_zeros_and_counted(tmp_path):
    write(tmp_path)
    half = image(0)
    half[:16, :16] = 5
    tifffile.imwrite(tmp_path / "f0" / "a0.tif", half)
    found = load_micrographs(tmp_path, crop_size=16)
    assert not found.crop("train", 0).any()
    assert found.crop("train", 1).any()
    assert found.blank_crops == {"train": 1, "validation": 0, "test": 0}
    assert found.note.endswith("; blank crops: 1")


def test_a_folder_that_cannot_be_listed_is_counted(monkeypatch, tmp_path):
    write(tmp_path)
    error = micrograph.MicrographError(tmp_path / "closed", "cannot be listed: Permission denied")
    real = micrograph.find_micrographs
    monkeypatch.setattr(stem, "find_micrographs", lambda folder: (real(folder)[0], [error]))
    found = load_micrographs(tmp_path, crop_size=16)
    assert found.describe()["skipped_images"] == [f"{tmp_path / 'closed'}: cannot be listed: Permission denied"]


def test_too_few_images_say_why(tmp_path):
    write(tmp_path, 2)
    with pytest.raises(DataError, match=r"too few micrographs of 16×16 .* \(1 train, 1 validation, 0 test\): add"):
        load_micrographs(tmp_path, crop_size=16)
    write(tmp_path, 5)
    words = r"\(0 train, 0 validation, 0 test, skipped 5, the first: f0/a0.tif: 40×50 is less than a crop of 64×64\)"
    with pytest.raises(DataError, match=words):
        load_micrographs(tmp_path, crop_size=64)
    with pytest.raises(DataError, match="crop_size is 0"):
        load_micrographs(tmp_path, crop_size=0)


# --- memory, and files that go away ------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 9000, 2**29])
def test_pixels_are_kept_up_to_a_bound(monkeypatch, tmp_path, limit):
    reads = []
    real = micrograph.read_micrograph
    monkeypatch.setattr(stem, "read_micrograph", lambda path: reads.append(path.name) or real(path))
    found = load_micrographs(write(tmp_path, 10), crop_size=16, cache_bytes=limit)
    assert len(reads) == 10
    crops = crops_of(found, "train")
    kept = found._pixels._kept
    assert sum(pixels.nbytes for pixels in kept.values()) == found._pixels._held <= limit
    assert len(kept) == {0: 0, 9000: 2, 2**29: 10}[limit]
    assert len(reads) == {0: 10 + 7 * 6, 9000: 10 + 7, 2**29: 10}[limit]
    assert np.array_equal(crops, crops_of(load_micrographs(tmp_path, crop_size=16), "train"))


def test_the_image_used_longest_ago_is_let_go(tmp_path):
    found = load_micrographs(write(tmp_path, 5), crop_size=40, cache_bytes=3 * 4000)
    for index in (0, 1, 2, 0):
        found.crop("train", index)
    assert list(found._pixels._kept) == [1, 2, 0]
    found.crop("test", 0)
    assert list(found._pixels._kept) == [2, 0, 4]


def test_an_image_that_goes_away_is_zeros_with_one_warning(tmp_path):
    found = load_micrographs(write(tmp_path), crop_size=16, cache_bytes=0)
    before = found.crop("train", 12)
    (tmp_path / "f0" / "a0.tif").unlink()
    with pytest.warns(RuntimeWarning, match=r"zeros stand in for a micrograph: .*a0\.tif: cannot be read") as caught:
        assert not found.crop("train", 0).any()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not found.crop("train", 1).any()
    assert list(found.lost) == ["f0/a0.tif"]
    assert np.array_equal(found.crop("train", 12), before)
    tifffile.imwrite(tmp_path / "f0" / "a1.tif", image(1, (30, 30)))
    with pytest.warns(RuntimeWarning, match=r"a1\.tif has now the shape \(30, 30\), it had \(40, 50\)"):
        found.crop("train", 6)


def test_a_folder_that_goes_away_ends_the_run(tmp_path):
    found = load_micrographs(write(tmp_path), crop_size=40, cache_bytes=0)
    for i in range(10):
        (tmp_path / "f0" / f"a{i}.tif").unlink()
        with pytest.warns(RuntimeWarning, match="zeros stand in"):
            found.crop("train", i)
    (tmp_path / "f1" / "a10.tif").unlink()
    with (
        pytest.warns(RuntimeWarning, match="zeros stand in"),
        pytest.raises(
            DataError, match=r"11 micrographs became unreadable .*a10\.tif.*Bring the folder back and resume"
        ),
    ):
        found.crop("train", 10)
    assert found.crop("train", 11).any()


# --- provenance --------------------------------------------------------------------------------------------------


def test_the_checksum_is_of_the_files_in_their_order(tmp_path):
    folder = write(tmp_path)
    files = [folder / f"f{i // 10}" / f"a{i}.tif" for i in range(20)]
    found = load_micrographs(folder, crop_size=16)
    assert found.sha256 == hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    assert load_micrographs(folder, crop_size=40).sha256 == found.sha256
    assert load_micrographs(spoil(folder), crop_size=12).sha256 != found.sha256  # one more image is of use
    tifffile.imwrite(files[3], image(333))
    assert load_micrographs(folder, crop_size=16).sha256 != found.sha256


def test_describe_is_json_and_the_summary_is_one_line(tmp_path):
    found = load_micrographs(spoil(write(tmp_path)), crop_size=16)
    described = json.loads(json.dumps(found.describe()))
    assert described["parts"]["validation"] == {"images": 2, "crops": 12, "blank": 0}
    assert (described["images"], described["slug"], described["crop_size"]) == (20, "micrographs-20", 16)
    assert data_line(described) == f"data: micrographs · 20 images · sha256 {found.sha256[:12]} · path: {tmp_path}"
    assert str(found) == (
        f"20 micrographs (path: {tmp_path}), sha256 {found.sha256[:12]}: 15 train (90 crops), 2 validation (12 crops), "
        "3 test (18 crops) of 16×16; skipped 2 blank, 3 unreadable, 1 too small"
    )
    assert len(repr(found)) < 500


def test_the_search_order(monkeypatch, tmp_path):
    found = load_micrographs(crop_size=64)
    assert (found.source, found.path, found.searched) == ("embedded", "embedded", ("ALRC_DATA: not set",))
    assert found.describe()["slug"] == "simulated-micrographs-8"
    expected = hashlib.sha256(b"".join(image(i, (256, 256), np.float32).tobytes() for i in range(8)))
    assert found.sha256 == expected.hexdigest()
    assert np.array_equal(found.crop("train", 17), normalise(image(1, (256, 256), np.float32)[:64, 64:128]))
    assert found.name_of("test", 0) == "007 made [0:64, 0:64]"
    monkeypatch.setenv("ALRC_DATA", str(tmp_path))
    assert load_micrographs(crop_size=64).searched == (f"ALRC_DATA: {tmp_path} holds no stem",)
    write(tmp_path / "stem")
    found = load_micrographs(crop_size=16)
    assert (found.source, found.path, found.searched) == ("ALRC_DATA", str(tmp_path / "stem"), ())
    write(tmp_path / "mine", 4)
    found = load_micrographs(tmp_path / "mine", crop_size=16)
    assert (found.source, sum(found.images.values())) == ("path", 4)
    assert load_micrographs("embedded", crop_size=16).source == "embedded"


def test_a_named_folder_never_falls_through(monkeypatch, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for name, words in (("gone", "does not exist"), ("file", "is not a folder"), ("empty", "holds no .tif")):
        with pytest.raises(DataError, match=words) as caught:
            load_micrographs(tmp_path / name, crop_size=16)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="data path '' is empty"):
        load_micrographs("", crop_size=16)
    monkeypatch.setenv("ALRC_DATA", str(tmp_path / "gone"))
    with pytest.raises(DataError, match=f"ALRC_DATA names {tmp_path / 'gone'}, which does not exist"):
        load_micrographs(crop_size=16)


def test_status_says_what_each_place_holds(monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules["alrc_lab.data.simulated"], "simulated_micrographs", None)  # it is not called
    environment, default = micrograph_status()
    assert (environment["where"], environment["note"], environment["used"]) == ("ALRC_DATA", "not set", False)
    assert (default["where"], default["used"], default["note"]) == ("embedded", True, "simulated when first used")
    write(tmp_path / "stem")
    monkeypatch.setenv("ALRC_DATA", str(tmp_path))
    environment, default = micrograph_status(crop_size=16)
    found = load_micrographs(crop_size=16)
    assert (environment["images"], environment["sha256"], environment["note"]) == (20, found.sha256, found.note)
    assert (environment["used"], default["used"]) == (True, False)
    given, environment, default = micrograph_status(tmp_path / "gone", crop_size=16)
    assert "does not exist" in given["error"]
    assert not any(entry["used"] for entry in (given, environment, default))
    small = micrograph_status(crop_size=64)[0]
    assert "too few micrographs" in small["error"]
    assert json.loads(json.dumps(small)) == small
    assert [entry["where"] for entry in micrograph_status("embedded")] == ["embedded"]


# --- real micrographs --------------------------------------------------------------------------------------------


def test_the_real_micrographs(alrc_data):
    if not (alrc_data / "stem").is_dir():
        pytest.skip(f"needs real micrographs: {alrc_data} holds no stem/")
    found = load_micrographs(alrc_data / "stem", crop_size=256)
    names = sorted(file.name for file in (alrc_data / "stem").iterdir())
    assert found.skipped == ()
    assert found.images == {"train": 52, "validation": 7, "test": 11}
    dtypes = {name: tifffile.imread(alrc_data / "stem" / name).dtype for name in names}
    kinds = {prefix: {dtypes[name] for name in names if name.startswith(prefix)} for prefix in ("acstem", "warwick")}
    assert kinds == {"acstem": {np.dtype("u4")}, "warwick": {np.dtype("f4")}}
    kept = found._pixels._kept
    assert {i: pixels.dtype for i, pixels in kept.items()} == {
        i: dtypes[source.name] for i, source in enumerate(found._pixels.images)
    }
    in_test = {found.name_of("test", i).split()[0] for i in range(found.num_crops("test"))}
    assert in_test == {name for name in names if name.startswith("warwick")} | {"haadf_35.tif"}
    assert sum(found.blank_crops.values()) == 0
    for crop in (*found.held_out("test", 5), found.sample(np.random.default_rng(0))):
        assert (crop.shape, crop.dtype.name, crop.min(), crop.max()) == ((256, 256), "float32", -1, 1)
    large = load_micrographs(alrc_data / "stem", crop_size=512)
    assert large.describe()["skipped"] == {"too small": 3}
