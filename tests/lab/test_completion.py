"""Completions of partial scans beside networks called by hand, and what is said of scans and runs that are none."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="completions need torch")
pytest.importorskip("tifffile", reason="needs the laboratory's dependencies")

import tifffile
import torch

from alrc_lab.completion import load_completer
from alrc_lab.completion_scan import (
    PreparedScan,
    Span,
    dwell_of,
    in_units,
    mask_doubt,
    prepare_scan,
    rms_percent,
    simulate_detector,
)
from alrc_lab.data.scan import spiral_mask
from alrc_lab.experiments import partial_stem
from alrc_lab.experiments.partial_stem import PRESETS, Config
from alrc_lab.experiments.partial_stem_policy import blur_target
from alrc_lab.experiments.recorder import MemoryRecorder
from completion_runs import MASK, SIDE, make_network, make_scan, make_truth, write_run, write_weights

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
IS_SCANNED = MASK > 0
STRONG = 0.5 * float(MASK.max()) <= MASK


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("study") / "runs" / "stem64-mse-s0-0000000000")


def by_hand(q: np.ndarray, m: np.ndarray, config: Config = PRESETS["smoke"]) -> np.ndarray:
    """Complete with the networks themselves."""
    with torch.no_grad():
        return make_network(config).eval()(torch.from_numpy(np.stack([q, m]))[None]).full[0, 0].numpy()


class TestCompletions:
    @pytest.mark.parametrize("name", ["", "weights.safetensors"])
    def test_equal_the_networks_in_every_bit(self, run: Path, name: str) -> None:
        complete = load_completer(run / name)
        scan = make_scan(1)[0]
        found = complete(scan, MASK, values="normalised")
        assert found.dtype == np.float32
        assert found.shape == (SIDE, SIDE)
        np.testing.assert_array_equal(found, by_hand(scan, MASK))
        assert complete.config.crop_size == SIDE
        assert complete.description["step"] == 100
        np.testing.assert_array_equal(complete.mask, MASK)

    @pytest.mark.parametrize("settings", [{"variant": "code43"}, {"mean_form": "image"}, {"coverage": 0.1}])
    def test_follow_the_settings_of_the_run(self, tmp_path: Path, settings: dict) -> None:
        complete = load_completer(write_run(tmp_path / "run", seed=3, **settings))
        scan = make_scan(2)[0]
        config = Config(64, "eighth-1-1", 100, held_out_crops=20, seed=3, **settings)
        made = complete.complete(np.stack([scan, MASK]))
        np.testing.assert_array_equal(made, by_hand(scan, MASK, config))
        np.testing.assert_array_equal(complete.mask, spiral_mask(64, settings.get("coverage", 1 / 20)))

    def test_of_several_are_those_of_each(self, run: Path) -> None:
        complete = load_completer(run)
        scans = np.stack([make_scan(number)[0] for number in range(3)])
        together = complete(scans, MASK, values="normalised")
        alone = [complete(scan, MASK, values="normalised") for scan in scans]
        np.testing.assert_array_equal(together, alone)
        np.testing.assert_array_equal(complete(scans, np.stack([MASK] * 3), values="normalised"), alone)
        assert complete(scans[:0], MASK).shape == (0, SIDE, SIDE)
        with pytest.raises(ValueError, match="3 scans and 2 masks"):
            complete(scans, np.stack([MASK] * 2))

    def test_are_those_that_the_run_itself_judged(self, tmp_path: Path) -> None:
        for number in range(8):
            np.save(tmp_path / f"lattice {number}.npy", np.tile(make_truth(number), (1, 2)))
        config = Config(64, "eighth-1-1", 6, held_out_crops=6, data=str(tmp_path), seed=2)
        resolved, inputs = partial_stem.resolve(config)
        partial_stem.run(resolved, MemoryRecorder(inputs, tmp_path / "run"))
        complete = load_completer(tmp_path / "run")
        with np.load(tmp_path / "run" / "completions.npz") as kept:
            scans, masks, wanted = (kept[name].astype(np.float32) for name in ("scan", "mask", "completion"))
        found = complete(scans, masks, values="normalised")  # scans were kept in half precision
        np.testing.assert_allclose(found, wanted, atol=0.02 * np.ptp(wanted))
        assert np.corrcoef(found.ravel(), wanted.ravel())[0, 1] > 0.9999

    def test_use_no_gradient_and_leave_the_state_alone(self, run: Path) -> None:
        complete = load_completer(run)
        before = {name: value.clone() for name, value in complete.network.state_dict().items()}
        complete(make_scan(0)[0], MASK, values="normalised")
        assert all(torch.equal(before[name], value) for name, value in complete.network.state_dict().items())


def agrees_with_training(prepare: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> bool:
    """Tell whether what is made of a detector's intensities is, in every bit, what training made of the same."""
    for number in range(3):
        q, truth, blurred, noise = make_scan(number)
        m = MASK.astype(np.float64)
        seen = m * truth + 2 * (1 - m) * noise * blurred
        if not np.array_equal(prepare(np.where(IS_SCANNED, seen, 99.0), MASK), q):
            return False
    return True


def scaled(detected: np.ndarray) -> np.ndarray:
    return ((detected - detected.min()) / np.ptp(detected)).astype(np.float32)


def find_brightest(scan: np.ndarray, prepared: PreparedScan) -> float:
    """Return the largest dwell-weighted intensity, pixel by pixel."""
    assert prepared.span is not None
    low, high = prepared.span
    largest = -1.0
    for m, intensity in zip(MASK[IS_SCANNED].tolist(), scan[IS_SCANNED].tolist(), strict=True):
        t = (intensity - (low + high) / 2) / ((high - low) / 2)
        largest = max(largest, m * min(max(t, m - 2), 2 - m))
    return largest


class TestPreparation:
    def test_makes_what_training_made(self) -> None:
        assert agrees_with_training(lambda scan, mask: prepare_scan(scan, mask, span=(-1, 1)).inputs[0])

    @pytest.mark.parametrize(
        "wrong",
        [
            lambda scan, mask: scaled(np.where(mask > 0, scan, -1)),  # not weighted by dwell
            lambda scan, mask: np.where(mask > 0, scaled(np.where(mask > 0, mask * scan, 0)), 0),  # scaled before -1
            lambda scan, mask: scaled(mask.astype(np.float64) * np.where(mask > 0, scan, -1)),  # -1 weighted too
            lambda scan, mask: prepare_scan(scan, mask).inputs[0],  # a span that was guessed
        ],
        ids=["no dwell", "early", "all weighted", "guessed"],
    )
    def test_of_another_order_is_seen(self, wrong: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
        assert not agrees_with_training(wrong)

    def test_undoes_any_gain_and_offset(self) -> None:
        q, *parts = make_scan(4)
        scan = simulate_detector(parts[0], parts[1], MASK, parts[2], Span(-3e4, 5e4))
        found = prepare_scan(scan, MASK, span=(-3e4, 5e4))
        np.testing.assert_allclose(found.inputs[0], q, atol=2e-6)
        guessed = prepare_scan(scan, MASK)
        other = prepare_scan(scan.astype(np.float64) * 7 + 1e6, MASK)
        np.testing.assert_allclose(other.inputs, guessed.inputs, atol=2e-6)
        assert guessed.span is not None
        np.testing.assert_allclose(other.span, np.array(guessed.span) * 7 + 1e6)

    def test_takes_whole_numbers_and_looks_at_nothing_outside(self) -> None:
        scan = np.random.default_rng(0).integers(0, 60_000, MASK.shape).astype(np.uint16)
        other = scan.astype(np.float64)
        other[~IS_SCANNED] = np.nan
        np.testing.assert_array_equal(prepare_scan(scan, MASK).inputs, prepare_scan(other, MASK).inputs)

    def test_span_is_that_of_long_dwell(self) -> None:
        rng = np.random.default_rng(1)
        scan = rng.uniform(10, 20, MASK.shape)
        scan[IS_SCANNED & ~STRONG] = rng.uniform(-900, 900, int((IS_SCANNED & ~STRONG).sum()))
        found = prepare_scan(scan, MASK)
        assert found.span == (scan[STRONG].min(), scan[STRONG].max())
        assert found.strong == STRONG.sum()
        q = found.inputs[0]
        assert q.min() == 0
        assert q.max() == 1
        assert not q[~IS_SCANNED].any()
        d = q.astype(np.float64) * (1 + find_brightest(scan, found)) - 1  # intensities of short dwell are cut
        assert (np.abs(d[IS_SCANNED]) <= (MASK * (2 - MASK))[IS_SCANNED] + 1e-6).all()

    def test_published_scan_passes_as_it_is(self) -> None:
        scan = tifffile.imread(GOLDEN / "stem_partial_scan_of_warwick_a1.tif")
        mask = tifffile.imread(GOLDEN / "stem_spiral_mask_512.tif")
        found = prepare_scan(scan, mask, values="normalised")
        np.testing.assert_array_equal(found.inputs, np.stack([scan, mask]))
        assert found.span is None

    def test_pixels_that_are_not_finite_can_be_left_out(self) -> None:
        scan = make_scan(5)[0].copy()
        row, column = np.argwhere(IS_SCANNED)[[5, 70]].T
        scan[row, column] = np.nan, np.inf
        with pytest.raises(ValueError, match=rf"2 of {IS_SCANNED.sum()} pixels are not finite .*--nan-as-unscanned"):
            prepare_scan(scan, MASK)
        fewer = MASK.copy()
        fewer[row, column] = 0
        for values in ("detector", "normalised"):
            found = prepare_scan(scan, MASK, values=values, nan_as_unscanned=True)
            np.testing.assert_array_equal(found.inputs[1], fewer)
            repaired = np.where(np.isfinite(scan), scan, 0)
            np.testing.assert_array_equal(found.inputs, prepare_scan(repaired, fewer, values=values).inputs)
        with pytest.raises(ValueError, match="no scanned pixel is finite"):
            prepare_scan(np.full(MASK.shape, np.nan), MASK, nan_as_unscanned=True)


class TestUnits:
    def test_of_the_scan_have_its_span_and_its_mean(self) -> None:
        rng = np.random.default_rng(3)
        scan, completion = rng.uniform(100, 300, MASK.shape), rng.uniform(-1, 1, MASK.shape).astype(np.float32)
        prepared = prepare_scan(scan, MASK, span=(100, 300))
        found = in_units("scan", completion, scan, prepared)
        slope, _ = np.polyfit(completion.ravel(), found.ravel(), 1)
        assert slope == pytest.approx(100, rel=1e-5)
        weights = MASK[IS_SCANNED].astype(np.float64)
        wanted = (weights * scan[IS_SCANNED]).sum() / weights.sum()
        assert np.average(found[IS_SCANNED], weights=weights) == pytest.approx(wanted, rel=1e-6)
        np.testing.assert_array_equal(in_units("normalised", completion, scan, prepared), completion)

    def test_a_perfect_completion_comes_back_in_intensities(self) -> None:
        truth = make_truth(1)
        scan = 40 + 5 * truth.astype(np.float64)
        found = in_units("scan", truth, scan, prepare_scan(scan, MASK, span=(35, 45)))
        np.testing.assert_allclose(found, scan, rtol=1e-6)

    def test_a_normalised_scan_has_none(self, run: Path) -> None:
        with pytest.raises(ValueError, match="no intensities to go back to: give --units normalised"):
            load_completer(run)(make_scan(0)[0], MASK, values="normalised", units="scan")

    def test_error_is_that_of_the_experiment(self) -> None:
        truth, completion = make_truth(2), make_truth(3)
        target = blur_target(torch.from_numpy(truth)[None, None])
        losses = 200 * (torch.from_numpy(completion) - target).square().mean()
        error, constant = rms_percent(completion, truth * 7 + 3)
        assert error == pytest.approx(50 * float((losses / 200).sqrt()), rel=1e-5)
        assert constant == pytest.approx(50 * float(target.std(correction=0)), rel=1e-5)


class TestMasks:
    @pytest.mark.parametrize(
        ("mask", "wanted"),
        [
            (np.array([[0, 0.25], [1, 0]]), [[0, 0.25], [1, 0]]),
            (np.array([[False, True], [True, False]]), [[0, 1], [1, 0]]),
            (np.array([[0, 1], [1, 0]], np.uint8), [[0, 1], [1, 0]]),
            (np.array([[0, 1], [1, 0]], np.int64), [[0, 1], [1, 0]]),
            (np.array([[0, 51], [255, 0]], np.uint8), [[0, 0.2], [1, 0]]),
            (np.array([[0, 13107], [65535, 0]], np.uint16), [[0, 0.2], [1, 0]]),
        ],
    )
    def test_kinds(self, mask: np.ndarray, wanted: list) -> None:
        found = dwell_of(mask)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, np.array(wanted, np.float32))

    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            (np.zeros((2, 3)), "is 0 at all 6 pixels"),
            (np.ones((2, 3), bool), "is above 0 at all 6 pixels"),
            (np.array([[0, 1.5]]), "from 0 to 1.5: they must be from 0 to 1"),
            (np.array([[-0.5, 1]]), "from -0.5 to 1"),
            (np.array([[0, 7]], np.int32), "from 0 to 7"),
            (np.array([[0, np.nan]]), "1 of 2 pixels that are not finite"),
            (np.zeros((2, 3, 3), np.uint8), "not 2×3×3 of uint8"),
            (np.array([[0, 1j]]), "not 1×2 of complex128"),
        ],
    )
    def test_that_are_none(self, mask: np.ndarray, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            dwell_of(mask)

    @pytest.mark.parametrize("nothing", [0.0, -3.5, np.nan])
    def test_of_another_scan_is_doubted(self, nothing: float) -> None:
        scan = np.where(IS_SCANNED, make_truth(2), nothing)
        assert mask_doubt(scan, MASK) is None
        assert mask_doubt(make_truth(2), MASK) is None  # a whole image tells nothing
        other = mask_doubt(scan, np.roll(MASK, 3, axis=1))
        assert other is not None
        share = (IS_SCANNED & ~(np.roll(MASK, 3, axis=1) > 0)).sum() / (MASK == 0).sum()
        assert f"of the pixels outside the mask, {share:.1%} do not have the value {nothing:g} of the others" in other

    def test_unlike_the_trained_one_is_told(self, run: Path) -> None:
        complete = load_completer(run)
        scan = make_scan(0)[0]
        in_8_bits = np.rint(MASK * 255).astype(np.uint8)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            complete(scan, in_8_bits, values="normalised")
        with pytest.warns(
            UserWarning, match=r"trained with \(--spiral 20\): 0\.0% .*longest dwell is 1 instead of 0\.75"
        ):
            complete(scan, IS_SCANNED, values="normalised")
        other = spiral_mask(SIDE, 1 / 10)
        with pytest.warns(UserWarning, match="is not the spiral"):
            complete(np.where(other > 0, make_truth(0), 0), other)


@pytest.mark.parametrize(
    ("scan", "options", "message"),
    [
        (np.zeros((SIDE, SIDE), complex), {}, "not 64×64 of complex128"),
        (np.zeros((SIDE, SIDE, 3)), {}, "not 64×64×3"),
        (np.zeros((32, 64)), {}, "has 32×64 pixels, the mask 64×64"),
        (np.full((SIDE, SIDE), 7), {}, f"all {IS_SCANNED.sum()} scanned pixels have the value 7"),
        (np.zeros((SIDE, SIDE)), {}, "have the value 0"),
        (MASK * 300, {"values": "normalised"}, r"from 0 to 225: give --values detector"),
        (MASK - 0.5, {"values": "normalised"}, r"from -0\.5"),
        (
            np.linspace(0.1, 0.2, SIDE * SIDE).reshape(SIDE, SIDE),
            {"values": "normalised"},
            "outside the mask are not 0",
        ),
        (
            np.where(np.arange(SIDE) < 40, MASK, 0),
            {"values": "normalised"},
            "pixels of the mask are 0, which no normalised",
        ),
        (MASK, {"values": "normalised", "span": (0, 1)}, r"so no span is taken; got \(0, 1\)"),
        (MASK, {"values": "counts"}, "values must be one of detector, normalised, got 'counts'"),
        (MASK, {"span": (1, 1)}, "from a lower to a higher intensity, got 1 to 1"),
        (MASK, {"span": (0, np.inf)}, "got 0 to inf"),
        (MASK, {"span": (4, 5)}, "the span goes from 4 to 5, the pixels of long dwell from"),
        (np.where(STRONG, 3.0, MASK), {}, "pixels of long dwell have the value 3: give the span"),
    ],
    ids=range(15),
)
def test_scans_that_are_none(scan: np.ndarray, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_scan(scan, MASK, **options)


def test_units_that_are_none() -> None:
    with pytest.raises(ValueError, match="units must be one of normalised, scan, got 'volts'"):
        in_units("volts", MASK, MASK, PreparedScan(np.stack([MASK, MASK]), Span(0, 1), 1))  # type: ignore[arg-type]


class TestSize:
    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            ((512, 512), "completes 64×64 pixels, the scan has 512×512: cut out 64×64 of it"),
            ((32, 64), "the scan has 32×64: scan a larger field"),
            ((), "the scan has one value"),
        ],
    )
    def test_is_that_of_training(self, run: Path, shape: tuple[int, ...], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            load_completer(run)(np.zeros(shape), MASK)


class TestRuns:
    def test_that_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"there is no run folder and no weights file .*nowhere"):
            load_completer(tmp_path / "nowhere")

    def test_of_a_study_is_named(self, run: Path) -> None:
        with pytest.raises(ValueError, match=r"name one of its 1 runs, such as .*stem64-mse-s0-0000000000"):
            load_completer(run.parents[1])
        with pytest.raises(
            ValueError, match=r"not the folder of a run: it has no config\.json and no weights\.safetensors$"
        ):
            load_completer(run.parent)

    def test_of_another_experiment(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run")
        document = json.loads((run / "config.json").read_text())
        document["entry"] = "alrc_lab.experiments.cifar10_supersampling:run"
        (run / "config.json").write_text(json.dumps(document))
        with pytest.raises(ValueError, match=r"is a run of alrc_lab\.experiments\.cifar10_supersampling:run, not of"):
            load_completer(run)

    def test_that_did_not_finish(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run")
        (run / "result.json").unlink()
        with pytest.raises(ValueError, match="is pending, not finished: repeat the command"):
            load_completer(run)
        (run / "failure.json").write_text(json.dumps({"type": "OSError", "message": "disk full"}))
        with pytest.raises(ValueError, match=r"is failed, not finished \(OSError: disk full\)"):
            load_completer(run)

    def test_that_diverged(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run", result={"status": "diverged", "diverged_at": 12})
        with pytest.raises(ValueError, match="diverged at update 12, so it has no weights: give another run"):
            load_completer(run)

    def test_without_weights(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run")
        (run / "weights.safetensors").unlink()
        with pytest.raises(ValueError, match=r"has no weights\.safetensors: it was made before runs kept them"):
            load_completer(run)

    @pytest.mark.parametrize("device", ["abacus", "cuda:99"])
    def test_on_a_device_that_is_missing(self, run: Path, device: str) -> None:
        with pytest.raises(ValueError, match=f"device '{device}' cannot be used .*: give cpu"):
            load_completer(run, device=device)


class TestWeights:
    def test_torn_file(self, run: Path, tmp_path: Path) -> None:
        whole = (run / "weights.safetensors").read_bytes()
        for length in (0, 5, 300, len(whole) - 1):
            (tmp_path / "torn.safetensors").write_bytes(whole[:length])
            with pytest.raises(ValueError, match=r"torn\.safetensors is no whole safetensors file \(.*copy it again"):
                load_completer(tmp_path / "torn.safetensors")
        (tmp_path / "other.tif").write_bytes(b"II*\0" + bytes(500))
        with pytest.raises(ValueError, match="is no whole safetensors file"):
            load_completer(tmp_path / "other.tif")

    @pytest.mark.parametrize(
        ("header", "message"),
        [
            ({"format": "pt"}, "holds no weights of alrc run partial-stem"),
            ({"format": None}, "holds no weights of alrc run partial-stem"),
            (
                {"format": "alrc partial-stem 2"},
                "has the format 'alrc partial-stem 2', this alrc reads 'alrc partial-stem 1'",
            ),
            ({"config": None}, r"has a damaged header \(KeyError\('config'\)\)"),
            ({"config": {"colour": "red"}}, "settings that this alrc does not know .*colour"),
            ({"config": {"crop_size": 63}}, "settings that this alrc does not know .*multiples of 32"),
            (
                {"config": {"crop_size": 64, "widths": "eighth-2-1"}},
                r"does not hold the weights .* differ, such as inner\.",
            ),
        ],
    )
    def test_of_another_kind(self, run: Path, tmp_path: Path, header: dict, message: str) -> None:
        state = load_completer(run).network.state_dict()
        write_weights(
            tmp_path / "other.safetensors", state, **({"config": load_completer(run).description["config"]} | header)
        )
        with pytest.raises(ValueError, match=message):
            load_completer(tmp_path / "other.safetensors")

    def test_that_are_not_finite(self, run: Path, tmp_path: Path) -> None:
        complete = load_completer(run)
        state = {name: value.clone() for name, value in complete.network.state_dict().items()}
        state["outer.rest.O3.direction"][0, 0, 0, 0] = torch.nan
        write_weights(tmp_path / "lost.safetensors", state, config=complete.description["config"])
        with pytest.raises(ValueError, match=r"not finite, in outer\.rest\.O3\.direction: training was lost"):
            load_completer(tmp_path / "lost.safetensors")

    def test_that_overflow(self, run: Path) -> None:
        complete = load_completer(run)
        with torch.no_grad():
            complete.network.state_dict()["outer.rest.O3.gain"].fill_(3e38)
        with pytest.raises(ValueError, match="of 4,096 pixels that are not finite"):
            complete(make_scan(0)[0], MASK, values="normalised")
