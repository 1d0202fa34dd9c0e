"""What a partial-STEM run ends with: numbers, pictures to judge by eye, and weights that can be used.

Losses are judged raw, before anything limited them, in the same way whatever the condition was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alrc.reference import alrc_trace
from alrc_lab.experiments.partial_stem_examples import HeldOutExample
from alrc_lab.experiments.partial_stem_networks import Completion, CompletionNetwork, count_parameters
from alrc_lab.experiments.partial_stem_policy import LOSS_SCALE, losses_of, rms_error_percent
from alrc_lab.experiments.recorder import Recorder

FORMAT = "alrc partial-stem 1"
"""What the header of kept weights says they are; another number is another order of their contents."""

WEIGHTS, COMPLETIONS, CARD = "weights.safetensors", "completions.npz", "MODEL_CARD.md"
"""Files that a finished run keeps."""

REFERENCE_START, REFERENCE_BETAS = (25.0, 900.0), (0.999, 0.999)
HALF_MAX = float(np.finfo(np.float16).max)


class Picture(NamedTuple):
    """Hold one held-out crop and what was made of it; each of shape (side, side)."""

    name: str
    """The image, and where in it."""
    truth: NDArray[np.float32]
    """What losses compare with: the crop in [-1, 1], blurred."""
    scan: NDArray[np.float32]
    """Partial scan in [0, 1]; 0 where nothing was scanned."""
    mask: NDArray[np.float32]
    """Dwell times in [0, 1]."""
    completions: dict[str, NDArray[np.float32]]
    """Completion by method."""
    losses: dict[str, float]
    """200 times the mean squared error by method."""


@dataclass(frozen=True)
class HeldOut:
    """Hold the losses of all held-out crops, and pictures of some.

    Args:
        inner: 200 times the mean squared error at half size, shape (crops,).
        outer: The same at full size.
        fitted: As `outer`, after each completion was moved and scaled as fits its target best.
        pictures: Of `SHOWN` crops.
    """

    inner: Tensor
    outer: Tensor
    fitted: Tensor
    pictures: Sequence[Picture]

    def summary(self) -> dict[str, float]:
        """Return means over the crops; `_rms_percent` is the mean of each crop's root mean squared error."""
        losses = {"inner": self.inner, "outer": self.outer, "fitted_outer": self.fitted}
        found = {f"held_out_{name}": float(value.double().mean()) for name, value in losses.items()}
        for name, value in (("rms_percent", self.outer), ("fitted_rms_percent", self.fitted)):
            found[f"held_out_{name}"] = float(rms_error_percent(value.double()).mean())
        return found | {"held_out_crops": len(self.outer)}


@torch.no_grad()
def collect_held_out(complete: Callable[[Tensor], Completion], examples: Iterable[HeldOutExample]) -> HeldOut:
    """Complete held-out scans and compare.

    Args:
        complete: Makes both completions of scan and mask, shape (1, 2, side, side).
        examples: The scans.

    Returns:
        Losses of all, pictures of those that are shown.
    """
    losses, pictures = list[Tensor](), list[Picture]()
    for name, is_shown, (inputs, targets) in examples:
        completion = complete(inputs)
        full = completion.full.to(targets.full.dtype)
        losses.append(torch.stack([*losses_of(completion, targets), fitted_losses_of(full, targets.full)]).cpu())
        if is_shown:
            truth, scan, mask, made = (x.cpu().numpy() for x in (targets.full[0, 0], *inputs[0], full[0, 0]))
            pictures.append(
                Picture(name, truth, scan, mask, {"completion": made}, {"completion": losses[-1][1].item()})
            )
    inner, outer, fitted = torch.cat(losses, 1)
    return HeldOut(inner, outer, fitted, pictures)


def fitted_losses_of(pictures: Tensor, targets: Tensor) -> Tensor:
    """Compare pictures with their targets after each was moved and scaled as fits best: an error of structure alone.

    A scan does not tell the whole crop's range, so what is right up to brightness and contrast is also worth knowing.

    Args:
        pictures: Shape (batch, 1, height, width).
        targets: Same shape.

    Returns:
        200 times the mean squared error that is left, shape (batch,); of a constant picture, that of the best constant.

    Example:
        >>> truth = torch.tensor([[[[-1.0, 1.0, 0.5]]]])
        >>> fitted_losses_of(3 * truth + 2, truth).abs().max() < 1e-9
        tensor(True)
    """
    p, t = (x.flatten(1).double() for x in (pictures, targets))
    p, t = p - p.mean(1, keepdim=True), t - t.mean(1, keepdim=True)
    covariance, variance = (p * t).mean(1), p.square().mean(1)
    explained = torch.where(variance > 0, covariance.square() / variance.clamp_min(1e-300), 0.0)
    return LOSS_SCALE * (t.square().mean(1) - explained).clamp_min(0.0)


def summarise(rows: NDArray[np.float64], window: int, has_diverged: bool) -> dict[str, float]:
    """Describe the losses of a run.

    Args:
        rows: Inner and outer raw losses, their limits, and whether each was limited, shape (updates, 6 or more).
        window: Losses at the end that make the final ones.
        has_diverged: Whether training was lost; the final losses are then NaN.

    Returns:
        For `inner` and `outer`: `final_*`, the mean of the last `window`; `max_*`; `late_max_*`, the largest of the
        second half; `spike_share_*`, the share that is above the limit which ALRC (25, 900, 0.999, n = 3) would have
        had; `fraction_limited_*`, the share that was limited; and `steps`.
    """
    found: dict[str, float] = {"steps": len(rows)}
    for name, losses, limited in zip(("inner", "outer"), rows.T[:2], rows.T[4:6], strict=True):
        finite = losses[np.isfinite(losses)]
        late = losses[len(losses) // 2 :]
        trace = alrc_trace(finite, start=REFERENCE_START, betas=REFERENCE_BETAS, eps=1e-8)
        found[f"final_{name}"] = float("nan") if has_diverged else float(losses[-window:].mean())
        found[f"max_{name}"] = float(finite.max(initial=0.0))
        found[f"late_max_{name}"] = float(late[np.isfinite(late)].max(initial=0.0))
        found[f"spike_share_{name}"] = float((finite > trace.limit).mean()) if len(finite) else 0.0
        found[f"fraction_limited_{name}"] = float(limited.mean())
    return found


def keep_results(
    recorder: Recorder, network: CompletionNetwork, held_out: HeldOut, description: dict[str, Any]
) -> None:
    """Keep the pictures, the weights, and a card that describes them.

    Args:
        recorder: Keeps the files.
        network: The trained networks.
        held_out: What they made of held-out crops.
        description: `config`, `data`, `summary` and `step`, ready for JSON; the header of the weights.
    """
    from safetensors.torch import save

    state = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    header = {"format": FORMAT} | {name: json.dumps(value) for name, value in description.items()}
    card, weights = model_card(network, description), save(state, metadata=header)
    recorder.keep(COMPLETIONS, lambda path: save_pictures(path, held_out.pictures))
    recorder.keep(WEIGHTS, lambda path: path.write_bytes(weights))
    recorder.keep(CARD, lambda path: path.write_text(card, encoding="utf-8"))


def save_pictures(path: Path, pictures: Sequence[Picture]) -> None:
    """Write pictures in half precision, to be drawn by a report.

    Args:
        path: Where to; ends in `.npz`. It holds `names`, `truth`, `scan`, `mask`, and for each method its pictures
            under its name and their errors as `METHOD_rms_percent`; what is called `completion` is the networks'.
        pictures: What to write; all of one size, with the same methods.
    """
    arrays: dict[str, Any] = {"names": np.array([picture.name for picture in pictures])}
    for part in ("truth", "scan", "mask"):
        arrays[part] = np.stack([getattr(picture, part) for picture in pictures]).astype(np.float16)
    for method in pictures[0].completions:
        stack = np.stack([picture.completions[method] for picture in pictures])
        losses = torch.tensor([picture.losses[method] for picture in pictures], dtype=torch.float64)
        arrays[method] = stack.clip(-HALF_MAX, HALF_MAX).astype(np.float16)
        arrays["rms_percent" if method == "completion" else f"{method}_rms_percent"] = rms_error_percent(losses).numpy()
    np.savez_compressed(path, **arrays)


def model_card(network: CompletionNetwork, description: dict[str, Any]) -> str:
    """Describe trained networks to whoever finds the file: data, training, error, use and limits, in Markdown."""
    config, data, summary = (description[name] for name in ("config", "data", "summary"))
    side, precision = config["crop_size"], config["precision"]
    limit = "ALRC (25, 900, 0.999, n = 3) on each loss" if config["limit"] == "alrc" else "none"
    loss = "200 · mean squared error" + ", Huberised above 1" * (config["loss"] == "huber")
    lines = [
        f"# Completion of partial STEM scans, {side}×{side}",
        "",
        f"Completes scanning transmission electron micrographs of which a spiral of nominal coverage "
        f"1/{1 / config['coverage']:.3g} was scanned. Method: Ede & Beanland 2020; trained by `alrc`.",
        "",
        "| | |",
        "|---|---|",
        f"| Networks | {config['widths']}, variant {config['variant']}, {config['mean_form']} means, "
        f"{count_parameters(network.shape)['total']:,} parameters |",
        f"| Data | {data['name']}: {data['images']:,} images, {data['note']}; sha256 {data['sha256']} |",
        f"| Training | {description['step']:,} updates of one crop, {precision}, seed {config['seed']} |",
        f"| Loss | {loss}; limited by {limit} |",
        f"| Loss at the end, inner / outer | {summary['final_inner']:.3f} / {summary['final_outer']:.3f} |",
        f"| Error on {summary['held_out_crops']:,} held-out crops | {summary['held_out_rms_percent']:.2f} % RMS of the "
        f"full range ({summary['held_out_fitted_rms_percent']:.2f} % up to brightness and contrast) |",
        "",
        f"    alrc complete {WEIGHTS} scan.tif --spiral {1 / config['coverage']:.3g} -o completed.tif",
        "",
        "What lies between the turns of the spiral is inferred from what micrographs of the training set look like. It",
        "may be wrong and still look right: do not measure in it. Specimens, magnifications and noise unlike those of",
        "the training set give larger errors than the one above.",
    ]
    return "\n".join(lines) + "\n"
