"""Check the study of partial-STEM: its plan, its baselines against numpy and scipy, and what runs keep."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.interpolate import griddata
from scipy.ndimage import convolve
from scipy.optimize import minimize

from alrc_lab import runner
from alrc_lab.data import scan
from alrc_lab.data.stem import load_micrographs
from alrc_lab.experiments.recorder import MemoryRecorder

torch = pytest.importorskip("torch", reason="the experiment trains with torch")
from alrc_lab.experiments import partial_stem, partial_stem_baselines, partial_stem_results  # noqa: E402
from alrc_lab.experiments import partial_stem_study as study  # noqa: E402
from alrc_lab.experiments.partial_stem_networks import build_network  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Make ten small lattices: 14 training crops of 64 and 4 held-out ones."""
    root = tmp_path_factory.mktemp("micrographs")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :128]
    for number in range(10):
        lattice = np.cos(2 * np.pi * x / (20 + number)) * np.cos(2 * np.pi * y / (17 + number))
        np.save(root / f"{number}.npy", rng.poisson(50 * (1 + lattice)))
    return str(root)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Make ten pictures that are large enough for every preset."""
    root = tmp_path_factory.mktemp("large")
    for number in range(10):
        np.save(root / f"{number}.npy", np.random.default_rng(number).integers(0, 255, (512, 512), np.uint8))
    return str(root)


@pytest.fixture(scope="module")
def finished(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the smallest run in a folder of its own."""
    config = partial_stem.Config(64, "eighth-1-1", 16, data=folder)
    resolved, inputs = partial_stem.resolve(config)
    spec = runner.RunSpec(partial_stem.ENTRY, resolved, inputs, partial_stem.EXCLUDED, partial_stem.name_of(config))
    path = runner.prepare(spec, tmp_path_factory.mktemp("runs"))
    assert runner.execute(path).state == "finished"
    return path


# --- the plan ---


def test_conditions_are_paired_and_differ_in_nothing_else(large: str) -> None:
    plan = study.plan("quick", data=large)
    runs = [run for run in plan.runs if run["cell"] is not None]
    assert len(runs) == 20
    assert [run["cell"] for run in runs[:4]] == ["mse", "mse-alrc", "huber", "huber-alrc"]
    assert [run["seed"] for run in runs] == [seed for seed in range(5) for _ in range(4)]
    expected = partial_stem.resolve_config(replace(partial_stem.PRESETS["stem-96"], data=large))
    for run in runs:
        loss, _, limit = run["cell"].partition("-")
        condition = {"loss": loss, "limit": limit or "none", "seed": run["seed"]}
        assert run["config"] == expected | condition
    cells = {cell["id"]: cell["baseline"] for cell in plan.study["cells"]}
    assert cells == {"mse": None, "mse-alrc": "mse", "huber": "mse", "huber-alrc": "huber"}
    assert {metric["key"] for metric in [plan.study["metric"], *plan.study["metrics"]]} <= SUMMARY


SUMMARY = {
    "held_out_crops",
    "held_out_fitted_outer",
    "held_out_fitted_rms_percent",
    "held_out_inner",
    "held_out_outer",
    "held_out_rms_percent",
    "steps",
    *(f"{what}_{name}" for name in ("inner", "outer") for what in ("final", "max", "late_max", "spike_share")),
    *(f"fraction_limited_{name}" for name in ("inner", "outer")),
}


def test_one_run_without_a_cell_holds_the_baselines(folder: str) -> None:
    plan = study.plan("smoke", data=folder, seeds=1)
    (reference,) = [run for run in plan.runs if run["cell"] is None]
    assert reference["entry"] == partial_stem_baselines.ENTRY
    config = partial_stem.PRESETS["smoke"]
    assert reference["config"] == asdict(partial_stem_baselines.Config(64, 0.05, config.held_out_crops, folder))
    assert "folder" not in plan.study["references"], "it is filled in by who makes the folders"


def test_published_size_has_the_fewest_differences(large: str) -> None:
    paper, smoke = (study.plan(preset, data=large).study["differences"] for preset in ("paper", "smoke"))
    assert len(paper) == 3
    assert len(smoke) == 6
    assert "10 micrographs instead of 16,227" in paper[1]


@pytest.mark.parametrize(
    ("arguments", "message"), [({"seeds": 0}, "got 0"), ({"preset": "big"}, "choose one of smoke")]
)
def test_bad_plans_are_refused(folder: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        study.plan(**{"preset": "smoke", "data": folder, **arguments})


def test_estimate_counts_training_alone(folder: str) -> None:
    estimate = study.plan("smoke", data=folder, seeds=3).estimate(workers=2, threads=1)
    assert estimate.seconds > 0
    assert "× 1,200 updates, on 1 thread" in estimate.detail[0]


# --- numbers ---


def test_losses_are_described_as_they_were(folder: str) -> None:
    rng = np.random.default_rng(1)
    losses = rng.exponential(20.0, (200, 2))
    losses[150, 1] = 900.0
    limited = rng.integers(0, 2, (200, 2)).astype(float)
    rows = np.hstack([losses, np.full((200, 2), np.inf), limited])
    found = partial_stem_results.summarise(rows, 10, False)
    for column, name in enumerate(("inner", "outer")):
        mu1, mu2, above = 25.0, 900.0, 0
        for loss in losses[:, column]:
            limit = mu1 + 3 * math.sqrt(mu2 - mu1**2 + 1e-8)
            above += loss > limit
            loss = min(loss, limit)
            mu1, mu2 = 0.999 * mu1 + 0.001 * loss, 0.999 * mu2 + 0.001 * loss**2
        assert found[f"spike_share_{name}"] == above / 200 > 0
        assert found[f"final_{name}"] == pytest.approx(losses[-10:, column].mean())
        assert found[f"max_{name}"] == losses[:, column].max()
        assert found[f"late_max_{name}"] == losses[100:, column].max()
        assert found[f"fraction_limited_{name}"] == limited[:, column].mean()
    assert found["late_max_outer"] == 900
    rows[-1, 0] = np.nan
    lost = partial_stem_results.summarise(rows, 10, True)
    assert math.isnan(lost["final_inner"])
    assert lost["max_inner"] == losses[:-1, 0].max()


def fit(picture: np.ndarray, truth: np.ndarray) -> float:
    """Find the best brightness and contrast by search."""

    def error(ab: np.ndarray) -> float:
        return 200 * float(np.square(ab[0] * picture + ab[1] - truth).mean())

    return float(minimize(error, [0.5, 0.1], method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-10}).fun)


def test_fitted_loss_is_the_least_over_brightness_and_contrast() -> None:
    rng = np.random.default_rng(2)
    truth, picture = rng.normal(size=(2, 1, 8, 9)), rng.normal(3, 2, size=(2, 1, 8, 9))
    picture[1] += 2 * truth[1]
    found = partial_stem_results.fitted_losses_of(torch.from_numpy(picture), torch.from_numpy(truth))
    expected = [fit(p, t) for p, t in zip(picture, truth, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    flat = partial_stem_results.fitted_losses_of(torch.zeros(2, 1, 8, 9), torch.from_numpy(truth))
    np.testing.assert_allclose(flat, 200 * truth.var((1, 2, 3)), rtol=1e-12)


# --- baselines ---


def test_intensities_along_the_line_are_the_blurred_truth_where_nothing_is_noisy() -> None:
    y, x = np.mgrid[:96, :96]
    truth = np.cos(2 * np.pi * x / 60) * np.cos(2 * np.pi * y / 70)
    mask = scan.spiral_mask(96)
    half = np.full(mask.shape, 0.5)  # the mean of the noise
    made = scan.simulate_scan(truth, truth, mask, half)
    values, core = partial_stem_baselines.intensities_along_line(made.astype(float), mask.astype(float))
    np.testing.assert_array_equal(core, mask > 0.2)
    error = (values - scan.blur(truth.astype(np.float32)))[core]
    assert np.abs(error).mean() < 0.03
    wrong, _ = partial_stem_baselines.intensities_along_line(made**1.3, mask.astype(float))
    assert np.abs((wrong - truth)[core]).mean() > 0.03


@pytest.mark.parametrize("method", ["linear", "biharmonic"])
def test_baselines_fill_a_smooth_picture(method: str) -> None:
    y, x = np.mgrid[:96, :96]
    truth = (np.cos(2 * np.pi * x / 80) * np.cos(2 * np.pi * y / 90)).astype(np.float32)
    mask = scan.spiral_mask(96)
    made = scan.simulate_scan(truth, truth, mask, np.full(mask.shape, 0.5)).astype(float)
    found = partial_stem_baselines.METHODS[method](made, mask.astype(float))
    inside = np.s_[12:-12, 12:-12]  # the spiral does not reach into the corners
    assert np.square(found - truth)[inside].mean() < 0.05 * truth.var()


def test_linear_is_scipys_griddata() -> None:
    rng = np.random.default_rng(3)
    mask = scan.spiral_mask(64).astype(float)
    made = np.where(mask > 0, rng.uniform(0.5, 0.7, mask.shape), 0.0)
    values, core = partial_stem_baselines.intensities_along_line(made, mask)
    points, everywhere = np.argwhere(core), tuple(np.mgrid[:64, :64])
    expected = griddata(points, values[core], everywhere, method="linear")
    expected = np.where(np.isnan(expected), griddata(points, values[core], everywhere, method="nearest"), expected)
    weights = np.exp(-0.5 * (np.arange(-2, 3) / 2.5) ** 2)
    kernel = np.outer(weights, weights) / weights.sum() ** 2
    expected = convolve(expected, kernel, mode="mirror")
    np.testing.assert_allclose(partial_stem_baselines.linear(made, mask), expected, atol=1e-12)


def test_baselines_run_sees_the_very_scans_of_the_networks(folder: str, tmp_path: Path) -> None:
    config = partial_stem_baselines.Config(64, held_out_crops=3, data=folder)
    inputs = load_micrographs(folder, crop_size=64).describe()
    recorder = MemoryRecorder(inputs, tmp_path)
    summary = partial_stem_baselines.run(asdict(config), recorder)["summary"]
    network_run = partial_stem.Config(64, "eighth-1-1", 4, held_out_crops=3, data=folder)
    trainer = partial_stem.Trainer(network_run, load_micrographs(folder, crop_size=64))
    theirs = trainer.complete_held_out().pictures
    with np.load(tmp_path / partial_stem_results.COMPLETIONS) as kept:
        assert set(kept) == {"names", "truth", "scan", "mask"} | {
            name for method in ("constant", "linear", "biharmonic") for name in (method, f"{method}_rms_percent")
        }
        for index, picture in enumerate(theirs):
            assert kept["names"][index] == picture.name
            np.testing.assert_array_equal(kept["scan"][index], picture.scan.astype(np.float16))
            rms = 50 * np.sqrt(np.square(kept["linear"][index].astype(float) - picture.truth).mean())
            assert kept["linear_rms_percent"][index] == pytest.approx(rms, rel=1e-2)
    columns = recorder.columns
    assert columns["step"].tolist() == [1, 2, 3]
    for method in ("constant", "linear", "biharmonic"):
        assert summary[f"{method}_outer"] == pytest.approx(columns[method].mean())
        assert summary[f"{method}_rms_percent"] == pytest.approx((50 * np.sqrt(columns[method] / 200)).mean())
        assert (columns[f"{method}_fitted"] <= columns[method] + 1e-9).all()
        assert summary[f"{method}_fitted_outer"] == pytest.approx(columns[f"{method}_fitted"].mean())
    np.testing.assert_allclose(columns["constant"], columns["constant_fitted"])


def test_baselines_refuse_changed_data(folder: str) -> None:
    inputs = load_micrographs(folder, crop_size=64).describe() | {"sha256": "0" * 64}
    with pytest.raises(ValueError, match="the run was planned with 000000000000"):
        partial_stem_baselines.run(asdict(partial_stem_baselines.Config(64, data=folder)), MemoryRecorder(inputs))


# --- what a run keeps ---


def test_kept_weights_are_those_that_were_evaluated(finished: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(finished / "weights.safetensors", "pt") as file:
        header = file.metadata()
    config, data, summary = (json.loads(header[name]) for name in ("config", "data", "summary"))
    assert header["format"] == "alrc partial-stem 1"
    assert json.loads(header["step"]) == 16
    document = json.loads((finished / "config.json").read_text())
    assert (config, data) == (document["config"], document["inputs"])
    assert summary == json.loads((finished / "result.json").read_text())["summary"]
    network = build_network(partial_stem.shape_of(partial_stem.Config(**config)), seed=99).eval()
    network.load_state_dict(load_file(finished / "weights.safetensors"))
    with np.load(finished / "completions.npz") as kept, torch.no_grad():
        inputs = torch.from_numpy(np.stack([kept["scan"], kept["mask"]], 1).astype(np.float32))
        again = network(inputs).full[:, 0].numpy()  # scans were kept in half precision
        assert np.abs(kept["completion"] - again).mean() < 2e-3
        rms = 50 * np.sqrt(np.square(kept["completion"].astype(float) - kept["truth"]).mean((1, 2)))
        np.testing.assert_allclose(kept["rms_percent"], rms, rtol=1e-2)
        assert np.ptp(again) > 0.1, "else any completion would be near"


def test_card_says_what_it_was_trained_on(finished: Path) -> None:
    card = (finished / "MODEL_CARD.md").read_text()
    summary = json.loads((finished / "result.json").read_text())["summary"]
    for words in ("64×64", "412,218 parameters", "10 images", "16 updates", f"{summary['held_out_rms_percent']:.2f} %"):
        assert words in card


def test_a_finished_run_keeps_nothing_else(finished: Path) -> None:
    kept = {"weights.safetensors", "completions.npz", "MODEL_CARD.md"}
    own = {"config.json", "env.json", "result.json", "metrics.arrows", "progress.json", "run.lock"}
    assert {path.name for path in finished.iterdir()} - own == kept


def test_a_diverged_run_keeps_no_weights(folder: str, tmp_path: Path) -> None:
    config = partial_stem.Config(64, "eighth-1-1", 16, diverged_above=1e-3, data=folder)
    resolved, inputs = partial_stem.resolve(config)
    result = partial_stem.run(resolved, MemoryRecorder(inputs, tmp_path))
    assert result["diverged_at"] is not None
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("half", ["first", "second"])
def test_a_run_that_is_killed_ends_with_the_files_of_an_unbroken_one(folder: str, tmp_path: Path, half: str) -> None:
    from safetensors.torch import load_file

    config = partial_stem.Config(64, "eighth-1-1", 192, "huber", "alrc", held_out_crops=2, data=folder)
    resolved, inputs = partial_stem.resolve(config)
    spec = runner.RunSpec(partial_stem.ENTRY, resolved, inputs, partial_stem.EXCLUDED, partial_stem.name_of(config))
    whole, killed = (runner.prepare(spec, tmp_path / name) for name in ("whole", "killed"))
    code = "import sys; from pathlib import Path; from alrc_lab import runner; " + (
        "runner.execute(Path(sys.argv[1]), checkpoint_every_s=0.0)"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(killed)]
    latest = killed / "checkpoint" / "latest.json"
    process = subprocess.Popen(command, env=environment)
    least = 16 if half == "first" else 112  # means are frozen from update 96
    step, deadline = 0, time.monotonic() + 120
    while step < least and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
        step = json.loads(latest.read_text())["step"] if latest.exists() else 0
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert least <= step < 192
    for path in (killed, whole):
        subprocess.run([*command[:3], str(path)], env=environment, check=True, timeout=300)
    states = [runner.inspect_run(path) for path in (killed, whole)]
    assert [state.state for state in states] == ["finished", "finished"]
    assert states[0].summary == states[1].summary
    resumed, unbroken = (runner.read_metrics(path) for path in (killed, whole))
    assert all(np.array_equal(resumed[key], unbroken[key]) for key in unbroken)
    assert (killed / "MODEL_CARD.md").read_bytes() == (whole / "MODEL_CARD.md").read_bytes()
    ours, theirs = (load_file(path / "weights.safetensors") for path in (killed, whole))
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert len(json.loads((killed / "env.json").read_text())["attempts"]) == 2
