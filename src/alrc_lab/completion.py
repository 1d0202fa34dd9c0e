"""Complete partial scans with a trained partial-STEM run: from intensities and dwell times to a whole micrograph.

What a microscopist uses of the experiment. How scans become the networks' input is in completion_scan.py, how files are
read and written in completion_files.py. The user's page is docs/complete.md.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from alrc_lab.completion_scan import (
    PreparedScan,
    Span,
    Units,
    Values,
    count_bad,
    dwell_of,
    in_units,
    prepare_scan,
    rms_percent,
    size_words,
)
from alrc_lab.data.scan import spiral_mask
from alrc_lab.experiments.partial_stem import ENTRY, Config, shape_of
from alrc_lab.experiments.partial_stem_networks import CompletionNetwork, build_network
from alrc_lab.experiments.partial_stem_results import FORMAT, WEIGHTS
from alrc_lab.runner import inspect_run
from alrc_lab.runner.folder import CONFIG, read_json

__all__ = ["Completer", "PreparedScan", "Span", "dwell_of", "load_completer", "prepare_scan", "rms_percent"]

_SAME_DWELL = 1 / 255  # a mask saved with 8 bits is still the same mask


def load_completer(run: str | Path, *, device: str = "cpu") -> Completer:
    """Load a trained partial-STEM run.

    Args:
        run: Folder of a finished run, or a `weights.safetensors` that one kept.
        device: Device that completes, as torch names it: "cpu", "cuda", "cuda:1".

    Returns:
        What completes scans of the size that was trained.

    Raises:
        FileNotFoundError: There is no such folder or file.
        ValueError: It is no finished partial-STEM run, its weights cannot be read, or there is no such device.
    """
    file = _weights_of(Path(run))
    description, state = _read_weights(file)
    try:
        config = Config(**description["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} has settings that this alrc does not know ({error}): use a newer alrc") from error
    network = build_network(shape_of(config), config.seed)
    _check_state(file, network, state)
    network.load_state_dict(state)
    try:
        network.to(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {device!r} cannot be used ({reason}): give cpu, or install a torch for it") from error
    mask = spiral_mask(config.crop_size, config.coverage)
    return Completer(network.eval(), config, mask, description, file)


@dataclass(frozen=True, eq=False)
class Completer:
    """Complete partial scans of the size that a run was trained on; made by `load_completer`.

    Attributes:
        network: The trained networks, in eval mode.
        config: Settings of the run.
        mask: Dwell times of the spiral that was trained, shape (side, side); a network knows this one alone.
        description: `config`, `data`, `summary` and `step`, as the run wrote them.
        source: File of the weights.
    """

    network: CompletionNetwork = field(repr=False)
    config: Config
    mask: NDArray[np.float32] = field(repr=False)
    description: dict[str, Any] = field(repr=False)
    source: Path

    def __call__(
        self,
        scan: ArrayLike,
        mask: ArrayLike,
        *,
        values: Values = "detector",
        units: Units = "normalised",
        span: tuple[float, float] | None = None,
    ) -> NDArray[np.float32]:
        """Complete one scan, or several, each by itself.

        Args:
            scan: Real, any dtype, shape (side, side) or (scans, side, side); see `prepare_scan`.
            mask: Dwell times, shape (side, side), or one for each scan; see `dwell_of`.
            values: "detector" for intensities, "normalised" for a scan that `alrc_lab.data.scan.simulate_scan` made.
            units: "normalised" for -1 to 1, "scan" for the intensities of a detector's scan.
            span: Darkest and brightest intensity of the whole field, where they are known.

        Returns:
            The micrographs, of the shape of `scan`. A mask unlike the one of training is told in a warning.

        Raises:
            ValueError: A scan or a mask that cannot be used; says which value, and what to do.
        """
        scans, masks = np.asarray(scan), np.asarray(mask)
        if scans.ndim != 3:
            return self._one(scans, masks, values, units, span)
        if masks.ndim == 3 and len(masks) != len(scans):
            raise ValueError(f"there are {len(scans)} scans and {len(masks)} masks: give one mask, or one for each")
        each = masks if masks.ndim == 3 else [masks] * len(scans)
        made = [self._one(*pair, values, units, span) for pair in zip(scans, each, strict=True)]
        return np.stack(made) if made else np.empty(scans.shape, np.float32)

    @torch.no_grad()
    def complete(self, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run the network on one prepared scan, in float32.

        One at a time, so that no completion depends on what else is completed.

        Args:
            inputs: Scan in [0, 1] and dwell times, shape (2, side, side), as `prepare_scan` makes them.

        Returns:
            The completion, trained towards the blurred micrograph in [-1, 1] but not bounded; shape (side, side).
        """
        self.check_size(inputs.shape[1:])
        device = next(self.network.parameters()).device
        completion = self.network.complete(torch.from_numpy(inputs)[None].to(device))[0, 0].cpu().numpy()
        if not np.isfinite(completion).all():
            raise ValueError(f"the networks of {self.source} gave {count_bad(completion)} that are not finite")
        return completion

    def check_size(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError if a scan has not the size that was trained.

        Args:
            shape: Height and width in pixels.
        """
        side = self.config.crop_size
        if shape != (side, side):
            advice = f"cut out {side}×{side} of it, or use a run of its size"
            if min(shape, default=0) < side:
                advice = "scan a larger field, or use a run of its size"
            raise ValueError(f"this run completes {side}×{side} pixels, the scan has {size_words(shape)}: {advice}")

    def mask_remark(self, mask: NDArray[np.float32]) -> str | None:
        """Say how dwell times differ from those of training, or None if they do not.

        Args:
            mask: Dwell times in [0, 1], shape (side, side).
        """
        if np.abs(mask - self.mask).max() <= _SAME_DWELL:
            return None
        moved = ((mask > 0) != (self.mask > 0)).mean()
        return (
            f"this is not the spiral that the run was trained with (--spiral {1 / self.config.coverage:.6g}): "
            f"{moved:.1%} of the pixels are scanned by one of both only, the longest dwell is {mask.max():.3g} instead "
            f"of {self.mask.max():.3g}; the network knows no other, expect a worse completion"
        )

    def _one(
        self, scan: NDArray[Any], mask: NDArray[Any], values: Values, units: Units, span: tuple[float, float] | None
    ) -> NDArray[np.float32]:
        """Complete one scan."""
        self.check_size(scan.shape)
        prepared = prepare_scan(scan, mask, values=values, span=span)
        remark = self.mask_remark(prepared.inputs[1])
        if remark is not None:
            warnings.warn(remark, UserWarning, stacklevel=3)
        return in_units(units, self.complete(prepared.inputs), scan, prepared)


def _weights_of(run: Path) -> Path:
    """Return the weights of a run, or say why it has none."""
    if run.is_file():
        return run
    if not run.is_dir():
        raise FileNotFoundError(f"there is no run folder and no weights file {run}")
    file = run / WEIGHTS
    if not (run / CONFIG).exists():
        if file.is_file():
            return file
        runs = sorted(path.parent for path in run.glob(f"runs/*/{CONFIG}"))
        hint = f"; name one of its {len(runs)} runs, such as {runs[0]}" if runs else ""
        raise ValueError(f"{run} is not the folder of a run: it has no {CONFIG} and no {WEIGHTS}{hint}")
    entry = (read_json(run / CONFIG) or {}).get("entry")
    if entry != ENTRY:
        raise ValueError(f"{run} is a run of {entry}, not of {ENTRY}: give one of alrc run partial-stem")
    state = inspect_run(run)
    if state.state == "diverged":
        raise ValueError(f"{run} diverged at update {state.diverged_at}, so it has no weights: give another run")
    if not state.is_done:
        more = f" ({state.message})" if state.message else ""
        raise ValueError(f"{run} is {state.state}, not finished{more}: repeat the command that made it")
    if not file.is_file():
        raise ValueError(f"{run} has no {WEIGHTS}: it was made before runs kept them, so train it again elsewhere")
    return file


def _read_weights(file: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read what a run wrote of itself, and its weights."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as content:
            header = content.metadata() or {}
            known = header.get("format")
            state = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 - it is no mapping
    except SafetensorError as error:
        raise ValueError(f"{file} is no whole safetensors file ({error}): copy it again, or give another") from error
    family = FORMAT.rpartition(" ")[0]
    if known != FORMAT and str(known).startswith(family):
        raise ValueError(f"{file} has the format '{known}', this alrc reads '{FORMAT}': use the alrc that wrote it")
    if known != FORMAT:
        raise ValueError(f"{file} holds no weights of alrc run partial-stem: its header has no format '{FORMAT}'")
    try:
        description = {name: json.loads(header[name]) for name in ("config", "data", "summary", "step")}
    except (KeyError, ValueError) as error:
        raise ValueError(f"{file} has a damaged header ({error!r}): copy it again, or give another") from error
    return description, state


def _check_state(file: Path, network: CompletionNetwork, state: dict[str, torch.Tensor]) -> None:
    """Refuse weights that are not those of the networks, or not finite."""
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    if wanted != found:
        differ = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise ValueError(
            f"{file} does not hold the weights that its settings ask for: {len(differ)} differ, such as {differ[0]} "
            f"({found.get(differ[0])} instead of {wanted.get(differ[0])}); give another file"
        )
    bad = sorted(name for name, value in state.items() if not torch.isfinite(value).all())
    if bad:
        raise ValueError(f"{file} holds numbers that are not finite, in {bad[0]}: training was lost; give another run")
