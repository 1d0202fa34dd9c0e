"""From micrograph to partial scan to completion on the command line: files, what they keep, and every complaint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="completions need torch")
pytest.importorskip("tyro", reason="needs the laboratory's dependencies")

import tifffile
from PIL import Image

from alrc_lab import commands
from alrc_lab.cli import EXIT_CODES, main
from alrc_lab.completion import load_completer, prepare_scan
from alrc_lab.completion_commands import complete_scan, simulate_partial_scan
from alrc_lab.completion_files import read_scan
from alrc_lab.completion_scan import Span, in_units, simulate_detector
from alrc_lab.data.micrograph import read_micrograph
from alrc_lab.data.scan import blur, normalise, simulate_scan, spiral_mask
from completion_runs import MASK, SIDE, make_truth, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("study") / "run")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, with a micrograph of odd shape and scale in it."""
    monkeypatch.setitem(commands.COMMANDS, "complete", complete_scan)
    monkeypatch.setitem(commands.COMMANDS, "simulate-scan", simulate_partial_scan)
    monkeypatch.chdir(tmp_path)
    write_micrograph("image.tif")
    return tmp_path


def write_micrograph(name: str, unit: str = "nm", size: tuple[float, float] = (0.04, 0.05)) -> np.ndarray:
    """Write 16-bit numbers, with pixel size and a description."""
    image = np.rint(900 + 800 * np.tile(make_truth(2), (2, 2)))[:100, :120].astype(np.uint16)
    metadata = {"unit": unit, "Info": "grown on Tuesday, µ-metal"}
    tifffile.imwrite(name, image, imagej=True, resolution=(1 / size[1], 1 / size[0]), metadata=metadata)
    return image


def simulate(*words: str) -> int:
    return main(["simulate-scan", "image.tif", "--size", "64", "-o", "scan.tif", *words])


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    """Return what a command said in one line on standard error."""
    text = capsys.readouterr().err
    assert text.count("\n") == 1, text
    return text


class TestSimulateScan:
    def test_writes_what_the_noise_model_makes(self, capsys: pytest.CaptureFixture[str]) -> None:
        image = write_micrograph("image.tif")
        assert simulate("--seed", "5") == 0
        truth = normalise(image[18:82, 28:92])
        noise = np.random.default_rng(5).random((SIDE, SIDE))
        np.testing.assert_array_equal(
            tifffile.imread("scan.tif"), simulate_scan(truth, blur(truth, renormalise=True), MASK, noise)
        )
        np.testing.assert_array_equal(tifffile.imread("scan-mask.tif"), MASK)
        np.testing.assert_array_equal(tifffile.imread("scan-truth.tif"), truth)
        text = capsys.readouterr().out
        assert "part: rows 18 to 81, columns 28 to 91 · intensities from" in text
        assert f"{(MASK > 0).mean():.1%} have any dwell" in text

    def test_as_of_a_detector(self, capsys: pytest.CaptureFixture[str]) -> None:
        image = write_micrograph("image.tif")
        assert simulate("--values", "detector", "--part", "36,5", "--spiral", "12.5", "--json") == 0
        crop = image[36:100, 5:69]
        truth, mask, span = normalise(crop), spiral_mask(SIDE, 1 / 12.5), Span(float(crop.min()), float(crop.max()))
        noise = np.random.default_rng(0).random((SIDE, SIDE))
        wanted = simulate_detector(truth, blur(truth, renormalise=True), mask, noise, span)
        np.testing.assert_array_equal(tifffile.imread("scan.tif"), wanted)
        told = json.loads(capsys.readouterr().out)
        assert told["span"] == list(span)
        assert (told["row"], told["column"], told["coverage"]["nominal"]) == (36, 5, 0.08)

    def test_keeps_scale_and_description(self) -> None:
        assert simulate() == 0
        for name in ("scan.tif", "scan-mask.tif", "scan-truth.tif"):
            found = read_scan(Path(name))
            assert found.pixel_size == pytest.approx((0.04, 0.05), rel=1e-6)
            assert found.unit == "nm"
            assert "grown on Tuesday, µ-metal" in found.description
            assert "seed 0" in found.description
        assert [read_scan(Path(name)).mark for name in ("scan.tif", "scan-mask.tif")] == ["normalised", None]

    def test_takes_what_is_not_finite_as_0(self, capsys: pytest.CaptureFixture[str]) -> None:
        image = make_truth(1) + np.float32(2)
        image[:2, 0] = np.nan, np.inf
        np.save("image.npy", image)
        assert main(["simulate-scan", "image.npy", "--size", "64"]) == 0
        text = capsys.readouterr().out
        assert "warning: 2 pixels that are not finite were taken as 0" in text
        assert "kept of the input: nothing" in text
        assert tifffile.imread("image-scan-truth.tif")[0, 0] == -1

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--size", "101"], "--size must be from 3 to 100, the micrograph has 100×120; got 101"),
            (["--part", "37,0"], "--part 37,0 with --size 64 leaves the micrograph of 100×120: give at most 36,56"),
            (["--part", "middle"], "--part must be centre, or row and column such as 128,0; got 'middle'"),
            (["--part=-1,3"], "got '-1,3'"),
            (["--spiral", "0.05"], "--spiral is the pitch in pixels, 1 or more, such as 20; got 0.05"),
            (["--spiral", "nan"], "got nan"),
            (["--spiral", "1"], "scans every pixel"),
            (["--seed", "-1"], "--seed must be 0 or more, got -1"),
            (["-o", "scan.png"], "--out scan.png must end in .tif or .tiff"),
            (["-o", "nowhere/scan.tif"], "there is no folder nowhere for --out scan.tif"),
            (["-o", "image.tif"], "--out image.tif is an input of this command"),
        ],
    )
    def test_complains(self, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
        assert simulate(*words) == 2
        assert message in shown(capsys)
        assert sorted(path.name for path in Path().iterdir()) == ["image.tif"]

    def test_refuses_to_replace(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert simulate() == 0
        Path("scan.tif").unlink()
        capsys.readouterr()
        assert simulate("--seed", "1") == 2
        assert "scan-mask.tif, scan-truth.tif are there already: give --force" in shown(capsys)
        assert simulate("--seed", "1", "--force") == 0

    def test_wants_contrast(self, capsys: pytest.CaptureFixture[str]) -> None:
        np.save("flat.npy", np.full((64, 64), 3))
        assert main(["simulate-scan", "flat.npy", "--size", "64"]) == 2
        assert "flat.npy has no contrast in rows 0 to 63, columns 0 to 63: choose another --part" in shown(capsys)
        assert main(["simulate-scan", "none.dm4"]) == 2
        assert "there is no file none.dm4" in shown(capsys)


class TestComplete:
    def test_goes_round(self, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert simulate() == 0
        words = [
            "complete",
            str(run),
            "scan.tif",
            "--mask",
            "scan-mask.tif",
            "-o",
            "out.tif",
            "--truth",
            "scan-truth.tif",
        ]
        assert main(words) == 0
        scan, truth = tifffile.imread("scan.tif"), tifffile.imread("scan-truth.tif")
        wanted = load_completer(run)(scan, MASK, values="normalised")
        found = tifffile.imread("out.tif")
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, wanted)
        text = capsys.readouterr().out
        error = 50 * np.sqrt(np.square(wanted - blur(truth)).mean())
        assert f"error: {error:.2f} % RMS of the full range; of the best constant image" in text
        assert "normalised values (as its file says)" in text
        assert "7.25 % RMS error on held-out crops" in text
        assert "warning" not in text
        kept = read_scan(Path("out.tif"))
        assert kept.pixel_size == pytest.approx((0.04, 0.05), rel=1e-6)
        assert "made by: alrc simulate-scan" in kept.description
        assert "grown on Tuesday" in kept.description
        assert "inferred, not measured" in kept.description
        assert kept.mark is None
        with Image.open("out.png") as preview:
            assert preview.width > 3.5 * preview.height

    def test_spiral_is_the_mask(self, run: Path) -> None:
        assert simulate() == 0
        assert main(["complete", str(run), "scan.tif", "--mask", "scan-mask.tif", "--no-preview"]) == 0
        assert main(["complete", str(run), "scan.tif", "--spiral", "20", "-o", "b.tif", "--preview", "c.png"]) == 0
        assert Path("scan-completed.tif").exists()
        assert sorted(path.name for path in Path().glob("*.png")) == ["c.png"]
        np.testing.assert_array_equal(tifffile.imread("scan-completed.tif"), tifffile.imread("b.tif"))

    def test_of_intensities(self, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        scan = np.rint(500 + 90 * make_truth(1)).astype(np.uint16)
        scan[MASK == 0] = 60_000  # whatever the detector said while nothing was scanned
        np.save("scan.npy", scan)
        Image.fromarray((MASK * 255).round().astype(np.uint8)).save("mask.tif")
        words = ["complete", str(run), "scan.npy", "--mask", "mask.tif", "--units", "scan", "--json"]
        assert main(words) == 0
        told = json.loads(capsys.readouterr().out)
        dwell = (np.rint(MASK * 255) / 255).astype(np.float32)
        prepared = prepare_scan(scan, dwell)
        wanted = in_units("scan", load_completer(run).complete(prepared.inputs), scan, prepared)
        np.testing.assert_array_equal(tifffile.imread("scan-completed.tif"), wanted)
        assert told["span"] == list(prepared.span or ())
        assert told["values"] == "detector"
        assert told["warnings"] == []
        assert told["kept"] == []
        assert main([*words[:-1], "--span", "400", "600", "--force"]) == 0
        assert "span of intensities: 400 to 600 (as given)" in capsys.readouterr().out
        assert main([*words[:-1], "--span", "10", "20", "--force"]) == 2
        assert "they must meet" in shown(capsys)

    def test_a_mark_of_a_detector_is_read(self, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert simulate("--values", "detector") == 0
        assert main(["complete", str(run), "scan.tif", "--spiral", "20"]) == 0
        assert "detector values (as its file says)" in capsys.readouterr().out

    def test_a_mask_of_another_scan_is_told(self, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert simulate("--values", "detector") == 0
        assert main(["complete", str(run), "scan.tif", "--spiral", "20"]) == 0
        assert "warning" not in capsys.readouterr().out
        assert main(["complete", str(run), "scan.tif", "--spiral", "19", "--force"]) == 0
        assert "warning: of the pixels outside the mask, " in capsys.readouterr().out

    def test_another_mask_is_told(self, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        np.save("scan.npy", make_truth(3))
        np.save("mask.npy", MASK > 0)
        assert main(["complete", str(run), "scan.npy", "--mask", "mask.npy"]) == 0
        text = capsys.readouterr().out
        assert "warning: this is not the spiral that the run was trained with (--spiral 20)" in text
        assert "detector values (--values auto)" in text

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ([], "give either --mask FILE or --spiral PITCH, such as --spiral 20; got neither"),
            (["--mask", "scan-mask.tif", "--spiral", "20"], "got both"),
            (["--mask", "image.tif"], "the mask is above 0 at all 12,000 pixels"),
            (["--mask", "none.tif"], "there is no file none.tif"),
            (["--mask", "rgb.tif"], "rgb.tif: is a colour image"),
            (["--mask", "stack.npy"], "stack.npy: is a stack (4×64×64 of float64)"),
            (["--mask", "large.npy"], "the scan has 64×64 pixels, the mask 128×128: they must be of one size"),
            (["--spiral", "20", "-o", "out.png"], "--out out.png must end in .tif or .tiff"),
            (["--spiral", "20", "--preview", "out.jpg"], "--preview out.jpg must end in .png"),
            (["--spiral", "20", "-o", "nowhere/out.tif"], "there is no folder nowhere"),
            (["--spiral", "20", "-o", "scan.tif", "--force"], "--out scan.tif is an input of this command"),
            (["--spiral", "20", "-o", "./scan-truth.tif", "--truth", "scan-truth.tif", "--force"], "is an input"),
            (
                ["--spiral", "20", "--no-preview", "--preview", "a.png"],
                "give --preview a.png or --no-preview, not both",
            ),
            (["--spiral", "20", "--units", "scan"], "give --units normalised"),
            (["--spiral", "20", "--span", "0", "1"], "the scan is normalised, so no span is taken"),
            (["--spiral", "10"], "outside the mask are not 0"),
            (["--spiral", "20", "--truth", "large.npy"], "the truth has 128×128 pixels, the completion 64×64"),
            (["--spiral", "20", "--device", "abacus"], "device 'abacus' cannot be used"),
        ],
    )
    def test_complains(self, run: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
        assert simulate() == 0
        np.save("stack.npy", np.zeros((4, 64, 64)))
        np.save("large.npy", np.arange(128.0**2).reshape(128, 128) / 128**2)
        tifffile.imwrite("rgb.tif", np.zeros((64, 64, 3), np.uint8), photometric="rgb")
        there = {path: path.read_bytes() for path in Path().iterdir()}
        capsys.readouterr()
        assert main(["complete", str(run), "scan.tif", *words]) == 2
        assert message in shown(capsys)
        assert {path: path.read_bytes() for path in Path().iterdir()} == there

    @pytest.mark.parametrize(
        ("name", "scan", "message"),
        [
            ("scan.npy", np.zeros((SIDE, SIDE), np.complex64), "scan.npy: is complex"),
            ("scan.npy", np.arange(96.0**2).reshape(96, 96), "completes 64×64 pixels, the scan has 96×96: cut out"),
            ("scan.npy", np.full((SIDE, SIDE), np.nan), "of the scanned pixels,"),
            ("scan.npy", np.zeros((SIDE, 96)), "a spiral needs a square scan, this one has 64×96 pixels"),
            ("scan.png", None, "scan.png: ends in '.png': only .tif"),
            ("torn.tif", None, "torn.tif: cannot be read"),
        ],
    )
    def test_complains_of_scans(
        self, run: Path, capsys: pytest.CaptureFixture[str], name: str, scan: np.ndarray | None, message: str
    ) -> None:
        if scan is None:
            Path(name).write_bytes(b"II*\0torn")
        else:
            np.save(name, scan)
        assert main(["complete", str(run), name, "--spiral", "20"]) == 2
        assert message in shown(capsys)

    def test_nan_can_be_left_out(self, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        scan = make_truth(1).copy()
        scan[30:33] = np.nan
        np.save("scan.npy", scan)
        assert main(["complete", str(run), "scan.npy", "--spiral", "20"]) == 2
        assert "--nan-as-unscanned" in shown(capsys)
        assert main(["complete", str(run), "scan.npy", "--spiral", "20", "--nan-as-unscanned"]) == 0
        assert np.isfinite(tifffile.imread("scan-completed.tif")).all()

    def test_refuses_to_replace(self, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert simulate() == 0
        words = ["complete", str(run), "scan.tif", "--spiral", "20", "-o", "out.tif"]
        Path("out.png").write_text("mine")
        capsys.readouterr()
        assert main(words) == 2
        assert "out.png is there already: give --force" in shown(capsys)
        assert Path("out.png").read_text() == "mine"
        assert main([*words, "--force"]) == 0
        assert Path("out.png").read_bytes().startswith(b"\x89PNG")

    def test_names_what_is_no_run(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert simulate() == 0
        capsys.readouterr()
        assert main(["complete", "nowhere", "scan.tif", "--spiral", "20"]) == 2
        assert "there is no run folder and no weights file nowhere" in shown(capsys)
        assert main(["complete", str(folder), "scan.tif", "--spiral", "20"]) == 2
        assert "is not the folder of a run" in shown(capsys)


@pytest.mark.parametrize(
    ("unit", "size", "told", "wanted"),
    [
        ("nm", (0.25, 0.25), "nm", (0.25, 0.25)),
        ("um", (0.5, 0.125), "µm", (0.5, 0.125)),
        ("angstrom", (0.1, 0.1), "Å", (0.1, 0.1)),
        ("1/nm", (0.02, 0.02), "1/nm", (0.02, 0.02)),
        ("m", (2.5e-10, 5e-10), "nm", (0.25, 0.5)),
    ],
)
def test_pixel_sizes_pass_two_commands(
    run: Path, unit: str, size: tuple[float, float], told: str, wanted: tuple[float, float]
) -> None:
    hspy = pytest.importorskip("rsciio.hspy", reason="needs RosettaSciIO")
    axis = {"offset": 0.0, "units": unit, "_type": "UniformDataAxis", "is_binned": False, "navigate": False, "size": 64}
    axes = [axis | {"name": "yx"[i], "scale": size[i], "index_in_array": i} for i in range(2)]
    empty = {name: {} for name in ("original_metadata", "learning_results", "tmp_parameters", "models")}
    metadata = {"General": {"title": "made"}, "Signal": {"signal_type": ""}, "_HyperSpy": {}}
    package = {"package_info": {"package": "rosettasciio", "package_version": "0"}}
    more = {"attributes": {"ragged": False, "_lazy": False}, "metadata": metadata}
    hspy.file_writer("image.hspy", {"data": make_truth(4), "axes": axes} | package | empty | more)
    assert main(["simulate-scan", "image.hspy", "--size", "64"]) == 0
    assert main(["complete", str(run), "image-scan.tif", "--spiral", "20", "-o", "out.tif"]) == 0
    found = read_micrograph("out.tif")
    assert found.unit == told
    assert found.pixel_size == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("name", ["complete", "simulate-scan"])
def test_help_teaches(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"    alrc {name} " in text, "no example"
    assert EXIT_CODES in text


def loaded_by(module: str) -> set[str]:
    """Return the packages that importing a module loads."""
    code = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


def test_commands_load_no_framework_before_it_is_needed() -> None:
    slow = {"torch", "tifffile", "PIL", "safetensors", "skimage", "h5py"}
    assert not loaded_by("alrc_lab.completion_commands") & slow
    assert "tifffile" in loaded_by("tifffile"), "the check sees nothing"
