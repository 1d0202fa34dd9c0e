"""Write a made-up study of claims to disk with NumPy and PyArrow alone; its numbers follow from formulas.

Nothing here comes from `alrc_lab`: a report that reads these folders reads the contract, not its own writer.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from synthetic_study import write_metrics

SHA256 = hashlib.sha256(b"synthetic").hexdigest()
Q, K = 0.1, 10.0
METHODS = ("none", "norm", "agc", "agc_last", "alrc")
LABELS = {"none": "none", "norm": "Norm", "agc": "AGC", "agc_last": "AGC, last layer excluded", "alrc": "ALRC"}
TITLES = {
    "E0": ("Invariants", ""),
    "E1": ("Stability under heavy tails", "stability"),
    "E2": ("Does the noise vanish?", "noise"),
    "E3": ("Where the iterates settle", "bias"),
    "E4": ("Convergence in a network", "network"),
    "E5": ("Steps of small weights", "small_weights"),
    "E6": ("Is there a scaled loss?", "scaled_loss"),
    "E7": ("Outside the assumptions", "scope"),
}


def root_of(limit: float) -> float:
    """Where E[g/c] vanishes for x = K with probability Q, else 0, clipped at `limit`."""
    return limit * Q / (1 - Q)


def claim(
    name: str,
    method: str,
    key: str,
    consistent: tuple[str, str, float] | None,
    contradicts: tuple[str, str, float] | None,
    **others: Any,
) -> dict[str, Any]:
    """Make a claim about one number; conditions are (key, op, than)."""
    experiment = name[:2]

    def conditions(found: tuple[str, str, float] | None) -> list[dict[str, Any]]:
        return [dict(zip(("key", "op", "than"), found, strict=True))] if found else []

    return {
        "id": name,
        "experiment": experiment,
        "run": experiment,
        "method": LABELS[method],
        "setting": "λ = 0.5",
        "sentence": f"The sentence that {name} is about, told at such a length that it has to be broken into lines.",
        "origin": "read",
        "where": "Theorem 1",
        "scope": method != "alrc",
        "statistic": {
            "label": f"mean of {key}",
            "value": key,
            "low": f"{key}_low",
            "high": f"{key}_high",
            "p": None,
            "n": "n",
            "places": 4,
        },
        "consistent": conditions(consistent),
        "contradicts": conditions(contradicts),
        "control": None,
        "reading": "",
    } | others


def claims() -> list[dict[str, Any]]:
    """Make claims with every kind of outcome; the names end in what must come out."""
    p = {"label": "root − θ*", "value": "norm_bias", "low": None, "high": None, "p": "p_root_holm", "n": "n"}
    return [
        claim("E0-consistent", "norm", "violations", ("violations", "<=", 0), ("violations", ">", 0), setting=""),
        claim(
            "E1-contradicts", "none", "failed", ("failed", "<", 0.01), ("failed", ">", 0.01), control="must contradict"
        ),
        claim("E1-consistent", "norm", "settled", ("settled", "<", 0.01), ("settled", ">", 0.01), origin="inference"),
        claim("E2-contradicts", "norm", "growth", ("growth", "<", 1), ("growth", ">=", 1), control="must contradict"),
        claim(
            "E3-consistent", "norm", "norm_root", ("p_root_holm", "<", 0.05), ("p_root_holm", ">", 0.95),
            statistic=p | {"places": 4},
        ),
        claim("E3-contradicts", "norm", "gradient", ("gradient", "<", 0.01), ("gradient_low", ">", 0.01), where=""),
        claim("E3-symmetric-consistent", "norm", "even", ("even", "<", 0.01), None, control="must be consistent"),
        claim("E3-outside", "alrc", "alrc_bias", ("alrc_bias", "<", 0.01), ("alrc_bias", ">", 0.01), reading="a bias"),
        claim("E4-inconclusive", "agc", "plateau", ("plateau", "<", 0.05), ("plateau", ">", 0.2), origin="source"),
        claim("E5-inconclusive", "agc", "lost", ("lost", "<", 1), ("lost", ">", 1)),
        claim("E6-contradicts", "norm", "curl", ("curl", "<", 1e-6), ("curl", ">", 1e-6)),
        claim("E7-outside", "norm", "growth", ("growth", "<", 1), ("growth", ">", 1), scope=False),
    ]  # fmt: skip


SUMMARY = {
    "violations": 0, "failed": 0.998, "settled": 0.0, "growth": 4.2, "norm_root": 0.0556, "p_root_holm": 0.0003,
    "norm_bias": 4.25e-5, "gradient": 0.9444, "even": 0.0012, "alrc_bias": 0.31, "plateau": 0.11, "curl": 0.056,
    "n": 1000,
}  # fmt: skip


def write_claims(
    root: Path,
    *,
    change_study: Callable[[dict[str, Any]], object] | None = None,
    change_config: Callable[[str, dict[str, Any]], object] | None = None,
    change_summary: Callable[[str, dict[str, Any]], object] | None = None,
    missing: tuple[str, ...] = (),
    failed: tuple[str, ...] = (),
) -> Path:
    """Write root/study.json and one run folder for each experiment.

    Args:
        root: Folder to write; made if absent.
        change_study: Changes study.json after the runs were named.
        change_config: Changes a run's config (cell, config) before it is named.
        change_summary: Changes the numbers of a run (cell, summary).
        missing: Cells whose folder is not there.
        failed: Cells that have failure.json in place of a result.

    Returns:
        root.
    """
    study = {
        "schema": 1,
        "study": "theory",
        "preset": "quick",
        "kind": "claims",
        "title": "The theory of clipping on trial",
        "question": "Does clipped gradient descent do what is said of it?",
        "data": {"name": "synthetic", "source": "computed", "path": "", "images": 0, "sha256": SHA256},
        "claims": claims(),
        "experiments": [
            {"id": key, "title": title, "protocol": f"{key} runs one thing. It measures another.", "figure": figure}
            for key, (title, figure) in TITLES.items()
        ],
        "holm": {"families": [{"name": "roots", "claims": ["E3-consistent", "E3-contradicts"], "alpha": 0.05}]},
        "runs": [],
        "differences": ["Fewer seeds than THEORY.md asks for."],
        "notes": ["Every number here is made up."],
        "panels": [],
        "cells": [],
        "a field from the future": {"ignored": True},
    }
    root.mkdir(parents=True, exist_ok=True)
    for cell in TITLES:
        config: dict[str, Any] = {"methods": list(METHODS), "rare": Q}
        config |= {"matched_laws": ["exponential", "lognormal"], "matched_fractions": [0.01, 0.1]}
        config["criteria"] = copy.deepcopy([item for item in study["claims"] if item["run"] == cell])
        if change_config:
            change_config(cell, config)
        inputs = study["data"]
        essence = {"entry": "somewhere:run", "config": config, "data": SHA256}
        text = json.dumps(essence, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        identity = hashlib.sha256(text.encode()).hexdigest()
        folder = f"runs/theory-{cell}-{identity[:10]}"
        study["runs"].append({"folder": folder, "cell": cell, "seed": 0})
        if cell in missing:
            continue
        path = root / folder
        path.mkdir(parents=True)
        document = {"schema": 1, "identity": identity, "entry": "somewhere:run", "config": config, "excluded": []}
        _write(path / "config.json", document | {"inputs": inputs})
        attempt = {"code_version": "0.1.0", "python": "3.12.3", "libraries": {"numpy": "2.0.0"}, "platform": "Linux"}
        _write(path / "env.json", {"attempts": [attempt | {"cpu": "Imaginary 9000", "cores": 2}]})
        if cell in failed:
            _write(path / "failure.json", {"type": "OSError", "message": "disk <full>"})
            continue
        if rows := metrics(cell):
            write_metrics(path / "metrics.arrows", rows)
        summary: dict[str, Any] = dict(SUMMARY)
        summary |= {f"{key}_low": 0.99 * value for key, value in SUMMARY.items()}
        summary |= {f"{key}_high": 1.01 * value for key, value in SUMMARY.items()}
        if change_summary:
            change_summary(cell, summary)
        result = {"status": "finished", "diverged_at": None, "summary": summary, "steps": 10, "wall_s": 7.5}
        _write(path / "result.json", result | {"identity": identity, "finished_at": "2024-05-01T10:02:00Z"})
    if change_study:
        change_study(study)
    _write(root / "study.json", study)
    return root


def metrics(cell: str) -> dict[str, np.ndarray]:
    """Make the columns of an experiment."""
    made = {"E1": _stability, "E2": _noise, "E3": bias, "E4": _network, "E5": _small_weights, "E6": _field}
    made |= {"E7": _scope}
    if cell not in made:
        return {}
    rows = {name: np.asarray(column, dtype=np.float64) for name, column in made[cell]().items()}
    count = len(next(iter(rows.values())))
    steps = rows.pop("step", np.arange(1, count + 1))
    return {"step": np.asarray(steps, dtype=np.int64), **rows, "from_the_future": np.zeros(count)}


def _stability() -> dict[str, Any]:
    steps = np.unique(np.geomspace(1, 5000, 60).astype(int))
    rows: dict[str, Any] = {"step": steps, "envelope": 5 * np.cumsum(np.arange(1, 5001) ** -0.6)[steps - 1]}
    for df, tail in (("inf", 0.2), ("3", 0.6), ("1.5", 1.0)):
        for i, method in enumerate(METHODS):
            wild = {"none": 1.0, "agc_last": 0.55}.get(method, 0.0)
            norm = 4 + 0.8 * tail + 0.3 * i + 30 * wild * tail * (steps / 5000) ** 0.5
            lost = wild * (1 - np.exp(-3 * tail * steps / 300))
            rows[f"max_norm_{method}_df{df}"] = np.where(lost > 0.5, np.nan, norm)
            rows[f"failed_{method}_df{df}"] = lost
            rows[f"residual_{method}_df{df}"] = 0.2 + 0.05 * i + 0.8 * np.exp(-steps / 400) + 0.2 * tail
    return rows


def _noise() -> dict[str, Any]:
    m = np.array([0.0, 10.0, 100.0, 1000.0])
    rows: dict[str, Any] = {"m": m}
    for power, name in ((0.75, "p75"), (0.4, "p40")):
        decay = (1 + m) ** (0.5 - power)
        for quantile, level in (("q50", 1.1), ("q90", 2.0), ("q99", 3.05)):
            rows[f"{quantile}_{name}_norm"] = level * decay
            rows[f"{quantile}_{name}_alrc"] = 1.4 * level * decay
        rows[f"bound_{name}_norm"] = 5.23 * decay
    return rows


def settings() -> np.ndarray:
    """List the settings of E3, one a row: place in METHODS, threshold, predicted root, found root, fraction, law.

    Law 0 is skewed, 1 symmetric, 2 has no mean; 3 and 4 are those of the matched comparison.
    """
    found = [(0, np.inf, 1.0, 0.9994, 0.0, 0)]
    found += [(1, limit, root_of(limit), root_of(limit) * 1.002, Q, 0) for limit in (0.5, 1.0, 3.0)]
    found += [(2, 0.1, 1e-4 / 9, 0.058, 0.9, 0), (2, 0.5, 5e-4 / 9, 5.54e-5, 0.9, 0), (4, 3.0, np.nan, 0.41, 0.05, 0)]
    found += [(index, 1.0, 1.0, 1.001 - 0.001 * index, 0.3, 1) for index in (1, 2, 4)]
    found += [(0, np.inf, np.nan, 37.0, 0.0, 2), (1, 1.0, 1.0, 1.002, 0.5, 2)]
    for law in (3, 4):
        for index, strength in ((1, 0.9), (2, 1.0), (4, 0.5)):
            shares = np.geomspace(0.002, 0.5, 8)
            roots = 1 - strength * shares ** (5 / (7 + law))
            found += [(index, 2 / a, np.nan, root, a, law) for a, root in zip(shares, roots, strict=True)]
    return np.array(found)


def bias() -> dict[str, Any]:
    """Make the columns of E3: an interval is 0.01 wide on either side, or a twentieth of a tiny root."""
    index, limit, predicted, root, share, law = settings().T
    half = np.where(root < 1e-3, root / 20, 0.01)
    shift = np.where(law == 2, np.nan, 1.0)
    return {
        "method_index": index, "threshold": limit, "root_predicted": predicted, "root_mean": root,
        "root_low": root - half, "root_high": root + half, "gradient_mean": root - shift,
        "gradient_low": root - shift - half, "gradient_high": root - shift + half, "fraction_clipped": share,
        "bias": root - shift, "bias_in_deviations": (root - shift) / np.where(law == 4, 1.31, 1.0),
        "symmetric": (law == 1) | (law == 2), "law_index": law, "matched": law > 2,
    }  # fmt: skip


def _network() -> dict[str, Any]:
    steps = np.unique(np.geomspace(1, 20000, 50).astype(int))
    rows: dict[str, Any] = {"step": steps}
    for law, floor in (("skewed", 0.1), ("symmetric", 0.003)):
        for i, method in enumerate(METHODS):
            decay = 1 / (1 + steps / 40)
            rows[f"field_{method}_{law}"] = decay + 0.002 * (1 + i)
            rows[f"gradient_{method}_{law}"] = decay + floor * i * 0.4 + 0.002
            rows[f"loss_{method}_{law}"] = 0.3 + 0.7 * decay + floor * i * 0.2
    return rows


def _small_weights() -> dict[str, Any]:
    norm = np.geomspace(1e-6, 1, 25)
    allowed = {
        "agc": 0.01 * np.maximum(norm, 1e-3),
        "hypothetical": 0.01 * np.ones_like(norm),
        "norm": 0.5 * np.ones_like(norm),
        "alrc": 0.3 * np.ones_like(norm),
    }
    rows: dict[str, Any] = {"weight_norm": norm}
    for variant, step in allowed.items():
        rows |= {f"absolute_{variant}": step, f"relative_{variant}": step / norm, f"ratio_{variant}": step / 2}
    rows["ratio_hypothetical"] = 0.02 / norm**0.5
    return rows


@functools.cache
def _field() -> dict[str, Any]:
    """Compute the clipped field of v · tanh(w x) against skewed targets on a grid, and its curl by differences."""
    axis = np.linspace(-2, 2, 33)
    w, v = (grid.ravel() for grid in np.meshgrid(axis, axis, indexing="ij"))
    x = np.linspace(-1.5, 2.5, 24)
    y = 0.8 * np.tanh(1.2 * x) + np.where(np.arange(24) % 8 == 0, 3.0, 0.0)

    def field(w: np.ndarray, v: np.ndarray, limit: float) -> tuple[np.ndarray, np.ndarray]:
        hidden = np.tanh(w[:, None] * x)
        residual = v[:, None] * hidden - y
        g_w, g_v = residual * v[:, None] * (1 - hidden**2) * x, residual * hidden
        scale = np.minimum(1, limit / np.maximum(np.hypot(g_w, g_v), 1e-12))
        return (scale * g_w).mean(axis=1), (scale * g_v).mean(axis=1)

    rows: dict[str, Any] = {"w": w, "v": v}
    for name, limit in (("0p1", 0.1), ("0p5", 0.5), ("none", np.inf)):
        rows[f"field_w_{name}"], rows[f"field_v_{name}"] = field(w, v, limit)
        step = 1e-5
        across = (field(w, v + step, limit)[0] - field(w, v - step, limit)[0]) / (2 * step)
        along = (field(w + step, v, limit)[1] - field(w - step, v, limit)[1]) / (2 * step)
        rows[f"curl_{name}"] = along - across
    return rows


def _scope() -> dict[str, Any]:
    steps = np.unique(np.geomspace(1, 100_000, 50).astype(int))
    rows: dict[str, Any] = {"step": steps}
    for i, method in enumerate(METHODS):
        rows[f"norm_{method}"] = (1 + 0.1 * i) * np.log1p(steps / 60)
        rows[f"noise_floor_{method}"] = 0.9 * np.exp(-steps / 300) + 0.02 * (1 + i)
    return rows


def read(path: Path) -> dict[str, Any]:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
