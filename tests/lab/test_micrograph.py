"""Micrographs of every format, written by the formats' own libraries or byte by byte, and files that are none."""

import json
import os
import pickle
import struct
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile

from alrc_lab.data import DataError, micrograph
from alrc_lab.data.micrograph import MicrographError, file_order, find_micrographs, read_micrograph

IMAGE = (np.arange(12 * 10).reshape(12, 10) * 500).astype(np.uint16)
SIZE = (0.5, 0.25)
DM_CODES = {
    "int16": (1, 2),
    "float32": (2, 6),
    "uint8": (6, 10),
    "uint16": (10, 4),
    "uint32": (11, 5),
    "float64": (12, 7),
}
"""The codes of a dtype as image data, and as elements of an array."""


def signal(image, units="nm"):
    """Describe an array the way RosettaSciIO's writers take it."""
    axis = {"offset": 0.0, "units": units, "_type": "UniformDataAxis", "is_binned": False}
    sizes = (1.0,) * (image.ndim - 2) + SIZE
    axes = [
        axis | {"name": "tzyx"[-image.ndim + i], "size": n, "scale": sizes[i], "index_in_array": i, "navigate": False}
        for i, n in enumerate(image.shape)
    ]
    empty = {name: {} for name in ("original_metadata", "learning_results", "tmp_parameters", "models")}
    metadata = {"General": {"title": "made"}, "Signal": {"signal_type": ""}, "_HyperSpy": {}}
    package = {"package_info": {"package": "rosettasciio", "package_version": "0"}}
    return {
        "data": image,
        "axes": axes,
        "metadata": metadata,
        "attributes": {"ragged": False, "_lazy": False},
        **package,
        **empty,
    }


def write_hspy(path, image):
    from rsciio.hspy import file_writer

    file_writer(str(path), signal(image))


def write_emd(path, image):
    from rsciio.emd import file_writer

    file_writer(str(path), signal(image))


def write_velox(path, image):
    """Write the parts of a Velox file that say what an image is."""
    result = {"PixelSize": {"width": "2.5e-10", "height": "5e-10"}, "PixelUnitX": "m", "Offset": {"x": "0", "y": "0"}}
    other = {
        part: {}
        for part in (
            "Core",
            "Instrument",
            "Acquisition",
            "Optics",
            "Stage",
            "Sample",
            "Scan",
            "Detectors",
            "CustomProperties",
        )
    }
    header = np.frombuffer(json.dumps({"BinaryResult": result, **other}).encode(), np.uint8)
    with h5py.File(path, "w") as file:
        file["Version"] = np.array([b'{"format": "Velox", "version": "1.12"}'], h5py.string_dtype("ascii"))
        group = file.create_group("Data/Image/0123456789abcdef0123456789abcdef")
        group.create_dataset("Data", data=image[:, :, None], chunks=(*image.shape, 1))
        group["Metadata"] = header[:, None]


def dm_bytes(version, image, num_images=1):
    """Write a Gatan file by hand: tags with big-endian names and counts, and little-endian values."""
    data_code, element_code = DM_CODES[image.dtype.name]

    def number(value):
        return struct.pack(">q" if version == 4 else ">l", value)

    def tag(kind, name, body):
        length = number(len(body)) if version == 4 else b""
        return struct.pack(">bh", kind, len(name)) + name.encode() + length + body

    def tags(entries):
        return b"\1\0" + number(len(entries)) + b"".join(entries)

    def group(name, *entries):
        return tag(20, name, tags(entries))

    def value(name, code, form, content):
        return tag(21, name, b"%%%%" + number(1) + number(code) + struct.pack("<" + form, content))

    def array(name, code, content, length):
        return tag(21, name, b"%%%%" + number(3) + number(20) + number(code) + number(length) + content)

    def text(name, content):
        return array(name, 4, content.encode("utf-16-le"), len(content))

    def calibration(name, size, unit):
        return group(name, value("Origin", 6, "f", 0), value("Scale", 6, "f", size), text("Units", unit))

    sizes = SIZE[::-1] + (1.0,) * (image.ndim - 2)
    axes = group("Dimension", *(calibration("", sizes[i], "nm") for i in range(image.ndim)))
    content = group(
        "ImageData",
        group("Calibrations", calibration("Brightness", 1, ""), axes),
        array("Data", element_code, image.tobytes(), image.size),
        value("DataType", 5, "L", data_code),
        group("Dimensions", *(value("", 5, "L", length) for length in image.shape[::-1])),
    )
    images = group("ImageList", *[group("", content, group("ImageTags"), text("Name", "made"))] * num_images)
    return struct.pack(">l", version) + number(len(images)) + struct.pack(">l", 1) + tags([images]) + bytes(8)


WRITERS = {
    ".tif": lambda path, image: tifffile.imwrite(path, image, compression="zlib"),
    ".TIFF": tifffile.imwrite,
    ".npy": np.save,
    ".dm3": lambda path, image: path.write_bytes(dm_bytes(3, image)),
    ".dm4": lambda path, image: path.write_bytes(dm_bytes(4, image)),
    ".emd": write_emd,
    ".hspy": write_hspy,
}


def assert_reads(path, image):
    found = read_micrograph(path)
    assert found.image.dtype == image.dtype
    assert np.array_equal(found.image, image)
    assert found.image.flags.c_contiguous
    assert found.image.flags.writeable
    assert (found.source, found.image.base) == (path, None)
    return found


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "uint32", "float32", "float64"])
@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_and_dtype(tmp_path, suffix, dtype):
    path, image = tmp_path / f"image{suffix}", (IMAGE // 300).astype(dtype)
    WRITERS[suffix](path, image)
    found = assert_reads(path, image)
    assert found.format == suffix[1:].upper().replace("TIFF", "TIF").replace("TIF", "TIFF")
    is_scaled = suffix in {".dm3", ".dm4", ".emd", ".hspy"}
    assert (found.pixel_size, found.unit) == ((SIZE, "nm") if is_scaled else (None, None))
    for wrong in (image.T, image[::-1], image.astype(np.complex64), image + np.ones(1, dtype)):
        with pytest.raises(AssertionError):
            assert_reads(path, wrong)


def test_a_velox_file(tmp_path):
    write_velox(tmp_path / "v.emd", IMAGE)
    found = assert_reads(tmp_path / "v.emd", IMAGE)
    metres = {"m": 1, "nm": 1e-9, "pm": 1e-12, "Å": 1e-10}[found.unit or ""]
    assert np.array(found.pixel_size) * metres == pytest.approx([5e-10, 2.5e-10])


def test_byte_order_axes_of_one_and_memory_order(tmp_path):
    np.save(tmp_path / "big.npy", IMAGE.astype(">f4"))
    assert_reads(tmp_path / "big.npy", IMAGE.astype("=f4"))
    np.save(tmp_path / "thin.npy", np.asfortranarray(IMAGE)[None, :, :, None])
    assert_reads(tmp_path / "thin.npy", IMAGE)
    np.save(tmp_path / "row.npy", IMAGE[:1])
    assert_reads(tmp_path / "row.npy", IMAGE[:1])
    tifffile.imwrite(tmp_path / "big.tif", IMAGE, byteorder=">")
    assert_reads(tmp_path / "big.tif", IMAGE)


def test_pixel_sizes_of_tiff(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, IMAGE, imagej=True, resolution=(4, 2), metadata={"unit": "um"})
    found = read_micrograph(path)
    assert (found.pixel_size, found.unit) == ((0.5, 0.25), "µm")
    tifffile.imwrite(path, IMAGE, imagej=True, resolution=(4, 2), metadata={"unit": "pixel"})
    assert read_micrograph(path).pixel_size is None
    tifffile.imwrite(path, IMAGE, resolution=(72, 72), resolutionunit="INCH")
    assert (read_micrograph(path).pixel_size, read_micrograph(path).unit) == (None, None)
    fei = b"[Scan]\r\nPixelWidth=2e-009\r\nPixelHeight=4e-009\r\n"
    tifffile.imwrite(path, IMAGE, extratags=[(34682, "s", 0, fei.decode(), True)])
    assert (read_micrograph(path).pixel_size, read_micrograph(path).unit) == ((4e-9, 2e-9), "m")


def test_white_is_zero_is_turned_round(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", IMAGE, photometric="miniswhite")
    assert_reads(tmp_path / "a.tif", 65535 - IMAGE)


def test_reduced_copies_are_passed_over(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(IMAGE)
        writer.write(IMAGE[::2, ::2], subfiletype=1)
    assert_reads(tmp_path / "a.tif", IMAGE)


# --- what is no micrograph ---------------------------------------------------------------------------------------


def reason_of(path):
    with pytest.raises(MicrographError) as caught:
        read_micrograph(path)
    assert caught.value.path == path
    assert str(caught.value) == f"{path}: {caught.value.reason}"
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, DataError)
    return caught.value.reason


@pytest.mark.parametrize("suffix", WRITERS)
def test_stacks_are_refused_with_their_shape(tmp_path, suffix):
    path, stack = tmp_path / f"stack{suffix}", np.stack([IMAGE] * 5)
    kwargs = {"photometric": "minisblack"} if "tif" in suffix.lower() else {}
    (tifffile.imwrite if kwargs else WRITERS[suffix])(path, stack, **kwargs)
    assert reason_of(path).startswith("is a stack (5×12×10 of uint16), not one image: save the image you mean")


@pytest.mark.parametrize("suffix", [".npy", ".hspy", ".tif"])
def test_complex_values_are_refused(tmp_path, suffix):
    path = tmp_path / f"wave{suffix}"
    WRITERS[suffix](path, IMAGE.astype(np.complex64))
    assert reason_of(path) == (
        "is complex (12×10 of complex64), such as a Fourier transform or a wave: save its amplitude"
    )


def test_colour_is_refused(tmp_path):
    colour, path = np.zeros((12, 10, 3), np.uint8), tmp_path / "colour.tif"
    tifffile.imwrite(path, colour, photometric="rgb")
    assert reason_of(path) == "is a colour image (RGB, 12×10×3 of uint8): save its intensity as greyscale"
    tifffile.imwrite(path, colour[..., 0], photometric="palette", colormap=np.zeros((3, 256), np.uint16))
    assert reason_of(path).startswith("is a colour image (PALETTE, 12×10 of uint8)")
    np.save(tmp_path / "colour.npy", colour)
    assert reason_of(tmp_path / "colour.npy").startswith("is a colour image (RGB, 12×10×3 of uint8)")
    pixel = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    np.save(tmp_path / "colour.npy", colour.view(pixel)[..., 0])
    assert reason_of(tmp_path / "colour.npy").startswith("is a colour image (RGB, 12×10 of")
    data_type = dm_bytes(3, IMAGE.astype("<u4")).replace(
        struct.pack("<L", 11) + b"\x14", struct.pack("<L", 23) + b"\x14"
    )
    (tmp_path / "colour.dm3").write_bytes(data_type)
    assert reason_of(tmp_path / "colour.dm3") == "is a colour image (RGB): save its intensity as greyscale"


def test_several_images_are_refused(tmp_path):
    with tifffile.TiffWriter(tmp_path / "two.tif") as writer:
        writer.write(IMAGE)
        writer.write(IMAGE[:5])
    assert reason_of(tmp_path / "two.tif").startswith("holds 2 data sets (12×10, 5×10): save the image you mean")
    (tmp_path / "two.dm4").write_bytes(dm_bytes(4, IMAGE, num_images=6))
    assert reason_of(tmp_path / "two.dm4").startswith("holds 6 data sets (12×10, 12×10, 12×10, 12×10, …): save")
    (tmp_path / "none.dm3").write_bytes(dm_bytes(3, IMAGE, num_images=0))
    assert reason_of(tmp_path / "none.dm3") == "holds no image"


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros(7), "is no image (7 of float64): two axes are needed"),
        (np.float64(1), "is no image (one value of float64)"),
        (np.zeros((0, 3)), "is empty (0×3 of float64)"),
        (np.full((2, 2), "x"), "holds no numbers (2×2 of <U1)"),
        (np.array([[{}, {}]], object), "cannot be read:"),
    ],
)
def test_arrays_that_are_no_images(tmp_path, array, words):
    np.save(tmp_path / "a.npy", array)
    assert reason_of(tmp_path / "a.npy").startswith(words)


@pytest.mark.parametrize("suffix", WRITERS)
def test_damaged_files(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    WRITERS[suffix](path, np.random.default_rng(1).integers(0, 60000, (64, 64), np.uint16))
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:20], b"", b"no image at all, but a sentence of some length"):
        path.write_bytes(damaged)
        assert reason_of(path).startswith("cannot be read: ")
    path.unlink()
    assert "No such file or directory" in reason_of(path)
    path.mkdir()
    assert reason_of(path).startswith("cannot be read: ")


def test_other_endings_are_refused(tmp_path):
    assert reason_of(tmp_path / "a.png") == ("ends in '.png': only .tif, .tiff, .npy, .dm3, .dm4, .emd, .hspy are read")


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    write_hspy(tmp_path / "a.hspy", IMAGE)
    for name in ("rsciio", "rsciio.hspy"):
        monkeypatch.setitem(sys.modules, name, None)
    assert reason_of(tmp_path / "a.hspy").endswith("pip install 'alrc[micrographs]'")


@pytest.mark.parametrize("suffix", [".emd", ".hspy"])
def test_huge_stacks_are_refused_unread(monkeypatch, tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    WRITERS[suffix](path, np.stack([IMAGE] * 5))

    def refuse(*args, **kwargs):
        raise AssertionError("the pixels were read")

    import rsciio.emd
    import rsciio.hspy

    monkeypatch.setattr(rsciio.emd, "file_reader", refuse)
    monkeypatch.setattr(rsciio.hspy, "file_reader", refuse)
    assert reason_of(path).startswith("cannot be read: the pixels were read")
    monkeypatch.setattr(micrograph, "_MOST_VALUES", 599)
    assert reason_of(path).startswith("is a stack (")


def test_no_file_stays_open(tmp_path):
    def count():
        return sum(tmp_path in link.readlink().parents for link in Path("/proc/self/fd").iterdir() if link.is_symlink())

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc, to see which files are open")
    for suffix, write in WRITERS.items():
        write(tmp_path / f"image{suffix}", IMAGE)
        read_micrograph(tmp_path / f"image{suffix}")
    assert count() == 0
    with (tmp_path / "image.npy").open("rb"):
        assert count() == 1


def test_the_error_travels_between_processes():
    error = pickle.loads(pickle.dumps(MicrographError(Path("a.tif"), "is a stack")))
    assert (error.path, error.reason, str(error)) == (Path("a.tif"), "is a stack", "a.tif: is a stack")


# --- finding files -----------------------------------------------------------------------------------------------


def test_files_are_found_in_all_folders_in_natural_order(tmp_path):
    names = ["a2.tif", "a10.TIF", "B1.npy", "b/10/x.dm3", "b/9/x.dm4", "ü.hspy"]
    for name in [*names, "notes.txt", ".hidden.tif", ".git/a.tif", "b/._a.tif"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert find_micrographs(tmp_path) == (["a2.tif", "a10.TIF", "B1.npy", "b/9/x.dm4", "b/10/x.dm3", "ü.hspy"], [])


def test_the_order_is_total_and_does_not_depend_on_where_it_starts():
    names = ["a", "A", "a1", "a01", "a001", "1", "01", "", "a1b", "a1b2", "é", "É"]
    assert sorted(names, key=file_order) == sorted(set(names), key=file_order)
    assert len({str(file_order(name)) for name in names}) == len(names)


def test_a_folder_without_micrographs_says_what_it_holds(tmp_path):
    with pytest.raises(DataError, match=r"found: nothing"):
        find_micrographs(tmp_path)
    for name in ("a.png", "b.png", "c"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"holds no \.tif, .* file \(found: 2 \.png, 1 without ending\)"):
        find_micrographs(tmp_path)


def test_a_folder_that_cannot_be_listed_is_reported(monkeypatch, tmp_path):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.tif").write_bytes(b"")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    names, (error,) = find_micrographs(tmp_path)
    assert names == ["a.tif"]
    assert str(error) == f"{tmp_path / 'closed'}: cannot be listed: Permission denied"
