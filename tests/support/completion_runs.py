"""Make folders of finished partial-STEM runs from networks that were not trained, as docs/design/0002 has them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from alrc_lab.data.scan import blur, normalise, simulate_scan, spiral_mask
from alrc_lab.experiments.partial_stem import ENTRY, PRESETS, Config, resolve_config, shape_of
from alrc_lab.experiments.partial_stem_networks import CompletionNetwork, build_network

SIDE = 64
MASK = spiral_mask(SIDE)
DATA = {"name": "made up", "images": 3, "sha256": "ab" * 32, "note": "nothing"}


def make_network(config: Config) -> CompletionNetwork:
    """Build networks with gains and running means as of a first example."""
    return build_network(shape_of(config), config.seed, torch.from_numpy(np.stack([make_scan(9)[0], MASK]))[None])


def make_truth(number: int) -> np.ndarray:
    """Draw a lattice in [-1, 1] with some noise."""
    y, x = np.mgrid[:SIDE, :SIDE]
    lattice = np.cos(x / (2 + number % 5)) * np.cos(y / 3)
    return normalise(lattice + 0.2 * np.random.default_rng(number).standard_normal((SIDE, SIDE)))


def make_scan(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the normalised scan of a lattice, the lattice, its blurred copy, and the noise."""
    truth = make_truth(number)
    blurred, noise = blur(truth, renormalise=True), np.random.default_rng([1, number]).random(MASK.shape)
    return simulate_scan(truth, blurred, MASK, noise), truth, blurred, noise


def write_run(folder: Path, *, seed: int = 0, result: dict[str, Any] | None = None, **settings: Any) -> Path:
    """Write config.json, result.json and weights.safetensors of a run of the smallest network."""
    config = replace(PRESETS["smoke"], seed=seed, **settings)
    resolved = resolve_config(config)
    folder.mkdir(parents=True)
    document = {
        "schema": 1,
        "identity": "0" * 64,
        "entry": ENTRY,
        "config": resolved,
        "excluded": ["data"],
        "inputs": DATA,
    }
    (folder / "config.json").write_text(json.dumps(document))
    ended = {
        "status": "finished",
        "diverged_at": None,
        "summary": {},
        "steps": 100,
        "wall_s": 1.0,
        "identity": "0" * 64,
    }
    (folder / "result.json").write_text(json.dumps(ended | (result or {})))
    write_weights(folder / "weights.safetensors", make_network(config).state_dict(), config=resolved)
    return folder


def write_weights(path: Path, state: dict[str, torch.Tensor], **header: Any) -> None:
    """Write weights with the header that a run gives them; a value of None leaves its key out."""
    summary = {"held_out_rms_percent": 7.25, "held_out_crops": 20}
    words = {"data": DATA, "summary": summary, "step": 100} | header
    words = {"format": "alrc partial-stem 1"} | words
    found = {key: value if key == "format" else json.dumps(value) for key, value in words.items() if value is not None}
    save_file({name: value.contiguous() for name, value in state.items()}, path, metadata=found)
