"""Complete partial scans without a network: what any completion should be held against.

The same scans of the same held-out crops as the networks', compared with the same targets. Every method gets the same
estimate of intensities along the spiral; only what it puts between the turns differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import interpolate

from alrc_lab.data.scan import COVERAGE, spiral_mask
from alrc_lab.experiments.partial_stem import load_images
from alrc_lab.experiments.partial_stem_examples import held_out_examples
from alrc_lab.experiments.partial_stem_policy import LOSS_SCALE, blur_target, rms_error_percent
from alrc_lab.experiments.partial_stem_results import COMPLETIONS, Picture, fitted_losses_of, save_pictures
from alrc_lab.experiments.recorder import Recorder

ENTRY = "alrc_lab.experiments.partial_stem_baselines:run"
EXCLUDED = ("data",)

CORE_DWELL = 0.2
"""Dwell time above which a pixel counts as on the line of the spiral: its blurred rim has less."""

_CROPS_PER_BLOCK = 25

Image = NDArray[np.float64]


@dataclass(frozen=True)
class Config:
    """Settings of the baselines; those of the runs that they are held against."""

    crop_size: int = 512
    """Side of a crop in pixels."""
    coverage: float = COVERAGE
    """Nominal share of pixels on the spiral; its reciprocal is the pitch in pixels."""
    held_out_crops: int = 200
    """Largest number of test crops, spread evenly over all."""
    data: str | None = None
    """Folder of micrographs, or "embedded" for simulated ones; none searches ALRC_DATA, then takes the simulated."""


def name_of(config: Config) -> str:
    """Name the run for people."""
    return f"stem{config.crop_size}-baselines"


def resolve_config(config: Config) -> dict[str, Any]:
    """Return the settings, ready for JSON."""
    return asdict(config)


def intensities_along_line(scan: Image, mask: Image) -> tuple[Image, NDArray[np.bool_]]:
    """Estimate the blurred micrograph on the line of a spiral scan.

    A scan is (d + 1) / s with the detected d = m (m t + 2 (1 - m) U b), m the dwell time. Where m is smallest, d is
    nearly 0, which tells s. Both t and b have the same average over neighbours, and so has d / m; neighbours are
    averaged with the target's own weights times m, for noise is least where the dwell is longest.

    Args:
        scan: In [0, 1], shape (height, width); 0 where nothing was scanned.
        mask: Dwell times in [0, 1], same shape.

    Returns:
        Intensities in about [-1, 1], of use where the line is; and where that is.
    """
    rim = mask == mask[mask > 0].min()
    detected = np.where(mask > 0, scan / np.median(scan[rim]) - 1, 0.0)
    return _blurred(detected) / np.maximum(_blurred(mask), 1e-9), mask > CORE_DWELL


def linear(scan: Image, mask: Image) -> Image:
    """Interpolate linearly between the turns of the spiral; outside of them take the nearest."""
    values, core = intensities_along_line(scan, mask)
    points, everywhere = np.argwhere(core), np.indices(core.shape).reshape(2, -1).T
    found = interpolate.LinearNDInterpolator(points, values[core])(everywhere)
    outside = np.isnan(found)
    found[outside] = interpolate.NearestNDInterpolator(points, values[core])(everywhere[outside])
    return _blurred(found.reshape(core.shape))


def biharmonic(scan: Image, mask: Image) -> Image:
    """Continue smoothly from the line of the spiral: scikit-image's biharmonic inpainting."""
    from skimage.restoration import inpaint_biharmonic

    values, core = intensities_along_line(scan, mask)
    return _blurred(inpaint_biharmonic(np.where(core, values, 0.0), ~core))


METHODS: dict[str, Callable[[Image, Image], Image]] = {"linear": linear, "biharmonic": biharmonic}
"""Methods that see the scan; the best constant, which needs the truth, is the third."""


def complete(scan: Image, mask: Image, truth: Image) -> dict[str, Image]:
    """Complete a scan by every method.

    Args:
        scan: In [0, 1], shape (height, width).
        mask: Dwell times in [0, 1], same shape.
        truth: The target; the best constant is its mean.

    Returns:
        Completion by method: `constant`, `linear`, `biharmonic`.
    """
    found = {"constant": np.full(truth.shape, truth.mean())}
    return found | {name: method(scan, mask) for name, method in METHODS.items()}


def run(config: dict[str, Any], recorder: Recorder) -> dict[str, Any]:
    """Complete every held-out scan by every method, and record each error.

    Args:
        config: A `Config` as a dictionary.
        recorder: Where rows, pictures and progress go; its `inputs` name the data.

    Returns:
        `summary`: for each method `METHOD_outer`, 200 times the mean squared error, `METHOD_rms_percent`, and the same
        after the best change of brightness and contrast, `METHOD_fitted_outer` and `METHOD_fitted_rms_percent`.
    """
    settings = Config(**config)
    micrographs = load_images(settings.crop_size, recorder.inputs)
    mask = spiral_mask(settings.crop_size, settings.coverage)
    total = len(micrographs.held_out_indices("test", settings.held_out_crops))
    rows, pictures = list[dict[str, float]](), list[Picture]()
    for step, (name, is_shown, (inputs, targets)) in enumerate(
        held_out_examples(micrographs, mask, settings.held_out_crops), start=1
    ):
        scan, truth = inputs[0, 0].double().numpy(), targets.full[0, 0].double().numpy()
        found = complete(scan, mask.astype(np.float64), truth)
        losses = {method: LOSS_SCALE * float(np.square(image - truth).mean()) for method, image in found.items()}
        stack = torch.from_numpy(np.stack(list(found.values())))[:, None]
        fitted = fitted_losses_of(stack, torch.from_numpy(truth).expand_as(stack)).tolist()
        rows.append(losses | {f"{method}_fitted": loss for method, loss in zip(found, fitted, strict=True)})
        if is_shown:
            float32 = {method: image.astype(np.float32) for method, image in found.items()}
            pictures.append(Picture(name, truth.astype(np.float32), scan.astype(np.float32), mask, float32, losses))
        if step % _CROPS_PER_BLOCK == 0 or step == total:
            first = (step - 1) // _CROPS_PER_BLOCK * _CROPS_PER_BLOCK
            columns = {key: np.array([row[key] for row in rows[first:]]) for key in rows[0]}
            recorder.log({"step": np.arange(first + 1, step + 1), **columns})
        recorder.progress(step, total)
    recorder.keep(COMPLETIONS, lambda path: save_pictures(path, pictures))
    summary: dict[str, float] = {"held_out_crops": total}
    for key in rows[0]:
        losses_of_key = torch.tensor([row[key] for row in rows], dtype=torch.float64)
        summary[f"{key}_outer"] = float(losses_of_key.mean())
        summary[f"{key}_rms_percent"] = float(rms_error_percent(losses_of_key).mean())
    return {"diverged_at": None, "summary": summary}


def _blurred(image: Image) -> Image:
    """Average neighbours with the weights of the target."""
    return blur_target(torch.from_numpy(image)).numpy()
