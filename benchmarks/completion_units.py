"""Which way back from a completion to intensities is best, for several kinds of noise: the table of docs/complete.md.

Run with `python benchmarks/completion_units.py RUN [RUN ...]`: folders of finished runs of one size. Prints
RMS errors in percent of the full range over held-out crops, means over the runs with their range.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from numpy.typing import NDArray

from alrc_lab.completion import Completer, load_completer
from alrc_lab.completion_scan import in_units, prepare_scan
from alrc_lab.data.scan import blur, simulate_scan
from alrc_lab.data.stem import MicrographSet, load_micrographs

CROPS = 200
DOSES = (8, 33, 165)
"""Electrons of the brightest pixel at the longest dwell."""

Image = NDArray[np.float64]


def signals(truth: Image, blurred: Image, dwell: Image, uniform: Image, rng: np.random.Generator) -> dict[str, Image]:
    """Make what a detector may give of a crop, in units in which its range is [-1, 1]."""
    found = {"noise of training": dwell * truth + 2 * (1 - dwell) * uniform * blurred, "no noise": truth}
    for dose in DOSES:
        per_time = dose / (2.2 * dwell.max())  # t + 1.2 is 2.2 where brightest
        counts = rng.poisson((truth + 1.2) * per_time * dwell)
        found[f"shot noise, {dose} electrons"] = counts / np.maximum(dwell, 1e-9) / per_time - 1.2
    return found


def errors_of(completer: Completer, micrographs: MicrographSet) -> dict[str, NDArray[np.float64]]:
    """Return RMS errors as given, with the mean added, with mean and factor fitted, and that factor, by signal."""
    dwell = completer.mask.astype(np.float64)
    is_scanned, root = dwell > 0, np.sqrt(dwell[dwell > 0])
    found: dict[str, list[list[float]]] = {}
    for index, truth in enumerate(micrographs.held_out("test", CROPS)):
        rng = np.random.default_rng([2, index])
        uniform, blurred, target = (
            rng.random(truth.shape),
            blur(truth, renormalise=True),
            blur(truth).astype(np.float64),
        )

        def rms(image: NDArray[np.floating], target: Image = target) -> float:
            return 50 * float(np.sqrt(np.square(image - target).mean()))

        scan = simulate_scan(truth, blurred, completer.mask, uniform)
        found.setdefault("best constant", []).append([50 * float(target.std())] * 4)
        found.setdefault("normalised scan", []).append([rms(completer.complete(np.stack([scan, completer.mask])))] * 4)
        made = signals(truth.astype(np.float64), blurred.astype(np.float64), dwell, uniform, rng)
        cases: list[tuple[str, Image, tuple[float, float] | None]]
        cases = [(name, signal, None) for name, signal in made.items()]
        middle = made[f"shot noise, {DOSES[1]} electrons"]
        cases.append(("the same, span of all pixels", middle, (middle[is_scanned].min(), middle[is_scanned].max())))
        for name, signal, span in cases:
            prepared = prepare_scan(np.where(is_scanned, signal, 0.0), completer.mask, span=span)
            assert prepared.span is not None
            (low, high), completion = prepared.span, completer.complete(prepared.inputs).astype(np.float64)
            half = (high - low) / 2
            columns = np.stack([completion[is_scanned], np.ones(is_scanned.sum())], 1) * root[:, None]
            slope, shift = np.linalg.lstsq(columns, signal[is_scanned] * root, rcond=None)[0]
            centred = in_units("scan", completion.astype(np.float32), signal, prepared)
            row = [rms((low + high) / 2 + half * completion), rms(centred), rms(slope * completion + shift)]
            found.setdefault(name, []).append([*row, float(slope / half)])
    return {name: np.mean(rows, 0) for name, rows in found.items()}


def main(*runs: str) -> None:
    """Print the table."""
    if not runs:
        raise SystemExit(__doc__)
    torch.set_num_threads(1)
    completers = [load_completer(run) for run in runs]
    micrographs = load_micrographs(None, crop_size=completers[0].config.crop_size)
    print(f"{micrographs}\n{len(runs)} runs; means, and the least and largest of them\n")
    tables = [errors_of(completer, micrographs) for completer in completers]
    print(f"{'intensities':<32} {'as given':>18} {'+ mean':>18} {'+ mean and factor':>18} {'factor':>18}")
    for name in tables[0]:
        stack = np.stack([table[name] for table in tables])
        cells = [
            f"{m:.2f} ({a:.2f}-{b:.2f})" for m, a, b in zip(stack.mean(0), stack.min(0), stack.max(0), strict=True)
        ]
        print(f"{name:<32} " + " ".join(f"{cell:>18}" for cell in cells))


if __name__ == "__main__":
    main(*sys.argv[1:])
