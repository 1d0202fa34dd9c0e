"""Write a made-up study to disk, exactly as docs/design/0002-run-folders.md has it, with NumPy and PyArrow alone.

Nothing here comes from `alrc_lab`: a report that reads these folders reads the contract, not its own writer.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

SHA256 = hashlib.sha256(b"a made-up data set").hexdigest()
PUBLISHED = {
    ("quartic", "∞"): (3.88, 0.108),
    ("quartic", "3"): (3.59, 0.055),
    ("quartic", "2"): (3.54, 0.084),
    ("squared", "∞"): (5.55, 0.041),
    ("squared", "3"): (5.52, 0.054),
}
# One run of each kind that has no number.
LOST = {
    ("quartic-∞", 2): "diverged",
    ("quartic-3", 1): "torn",
    ("squared-3", 3): "failed",
    ("squared-∞", 3): "missing",
    ("quartic-2", 3): "empty",
}
QUICK = {"quartic": ("∞", "3", "2"), "squared": ("∞", "3")}


def write_study(
    root: Path,
    *,
    panels: Mapping[str, Sequence[str]] = QUICK,
    columns: Sequence[str] = ("batch 1",),
    seeds: int = 3,
    steps: int = 120,
    boxcar: int = 20,
    status: Mapping[tuple[str, int], str] | None = None,
    change: Mapping[str, Any] | None = None,
) -> Path:
    """Write root/study.json and its run folders.

    Args:
        root: Folder to write; made if absent.
        panels: Row labels by panel id; the first of a panel is its baseline.
        columns: Column labels; with more than one every cell's id names it.
        seeds: Runs per cell, seeded 1, 2, …
        steps: Updates per run.
        boxcar: Width of the learning curves' average; the metric averages as many last errors.
        status: What becomes of a run, by (cell, seed): "diverged", "failed", "torn" (killed in the middle of a
            write), "empty" (made, nothing logged) or "missing" (no folder). The others finish.
        change: Fields of study.json to overwrite.

    Returns:
        root.
    """
    status = status or {}
    cells, runs = [], []
    for panel, rows in panels.items():
        for column in columns:
            for row in rows:
                batch = "" if len(columns) == 1 else "-" + column.replace(" ", "")
                cell, published = f"{panel}{batch}-{row}", PUBLISHED.get((panel, row))
                cells.append(
                    {
                        "id": cell,
                        "panel": panel,
                        "row": row,
                        "column": column,
                        "baseline": None if row == rows[0] else f"{panel}{batch}-{rows[0]}",
                        "published": {"mean": published[0], "std": published[1], "n": 10} if published else None,
                    }
                )
                for seed in range(1, seeds + 1):
                    state = status.get((cell, seed), "finished")
                    config = {
                        "panel": panel,
                        "batch": column,
                        "num_stddev": row,
                        "seed": seed,
                        "steps": steps,
                    }
                    folder = write_run(root, cell, config, state, boxcar)
                    runs.append({"folder": folder, "cell": cell, "seed": seed})
    study = {
        "schema": 1,
        "study": "table1",
        "preset": "quick",
        "title": "Table 1: errors with and without limiting",
        "question": "Does limiting loss spikes lower the error of supersampling networks?",
        "data": {
            "name": "made-up images",
            "source": "embedded",
            "path": "/nowhere/made-up",
            "images": 8068,
            "sha256": SHA256,
        },
        "metric": {
            "key": "final_error",
            "label": "error × 100",
            "factor": 100,
            "better": "lower",
            "window": boxcar,
        },
        "curve": {"column": "error", "label": "error × 100", "factor": 100, "boxcar": boxcar},
        "stream": {"loss": "loss", "limit": "limit"},
        "panels": [{"id": panel, "title": f"{panel.capitalize()} error"} for panel in panels],
        "cells": cells,
        "runs": runs,
        "differences": ["Width 16 instead of 64.", f"{steps:,} iterations instead of 100,000."],
        "notes": ["Every number here is made up."],
        "a field from the future": {"ignored": True},
    } | dict(change or {})
    root.mkdir(parents=True, exist_ok=True)
    _write(root / "study.json", study)
    return root


def write_run(root: Path, cell: str, config: dict[str, Any], state: str, window: int) -> str:
    """Write one run folder in the given state and return its name below root."""
    entry = "somewhere:run"
    identity = hashlib.sha256(
        json.dumps({"entry": entry, "config": config, "data": SHA256}, sort_keys=True).encode()
    ).hexdigest()
    folder = f"runs/{cell.replace('∞', 'none')}-{identity[:10]}"
    path = root / folder
    if state == "missing":
        return folder
    path.mkdir(parents=True)
    inputs = {"name": "made-up images", "sha256": SHA256, "images": 8068}
    _write(
        path / "config.json",
        {
            "schema": 1,
            "identity": identity,
            "entry": entry,
            "config": config,
            "excluded": [],
            "inputs": inputs,
        },
    )
    attempt = {
        "started_at": "2024-05-01T10:00:00Z",
        "code_version": "0.1.0",
        "git": {"commit": "0123456789abcdef", "dirty": False},
        "python": "3.12.3",
        "platform": "Linux-6.1-x86_64",
        "cpu": "Imaginary 9000",
        "cores": 2,
        "threads": 1,
        "libraries": {"numpy": "2.0.0", "torch": "2.6.0"},
        "executor": "processes",
        "pid": 4711,
    }
    _write(path / "env.json", {"attempts": [attempt | {"code_version": "0.0.9"}, attempt]})
    if state == "empty":
        return folder
    rows = stream(config)
    steps = config["steps"]
    diverged_at = None
    if state == "diverged":
        diverged_at = steps * 3 // 5
        grow = np.maximum(np.arange(steps) - diverged_at * 0.85, 0)
        rows["error"] *= np.exp(grow * 60 / steps)
        rows["loss"] *= np.exp(grow * 60 / steps)
        rows = {name: column[:diverged_at] for name, column in rows.items()}
        rows["error"][-1] = rows["loss"][-1] = np.nan
    elif state in ("failed", "torn"):
        rows = {name: column[: steps // 2] for name, column in rows.items()}
    write_metrics(path / "metrics.arrows", rows, torn=state == "torn")
    if state == "failed":
        _write(
            path / "failure.json",
            {
                "type": "OSError",
                "message": "disk <full>",
                "traceback": "…",
                "failed_at": "2024-05-01T10:01:00Z",
            },
        )
    elif state == "torn":
        _write(
            path / "progress.json",
            {"step": steps // 2, "total": steps, "steps_per_s": 100.0, "updated_at": "…"},
        )
    else:
        summary = {"final_error": float(rows["error"][-window:].mean())}
        _write(
            path / "result.json",
            {
                "status": state,
                "diverged_at": diverged_at,
                "summary": {"final_error": None} if state == "diverged" else summary,
                "steps": len(rows["step"]),
                "wall_s": steps / 100,
                "identity": identity,
                "finished_at": "2024-05-01T10:02:00Z",
            },
        )
    return folder


def stream(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Make the columns of a run whose losses spike and whose limit follows the published recursion."""
    steps, seed = config["steps"], config["seed"]
    common = np.random.default_rng([seed, len(config["panel"])])  # the same for every row label: runs are paired
    own = np.random.default_rng([seed, *config["num_stddev"].encode()])
    quartic = config["panel"] == "quartic"
    spread = (1.25 if quartic else 0.6) / math.sqrt(float(config["batch"].split()[-1]))
    level = (0.022 if quartic else 0.045) * (1 + 8 * np.exp(-np.arange(steps) / (0.06 * steps)))
    level *= {"∞": 1.0, "3": 0.93, "2": 0.92}.get(config["num_stddev"], 1.0) if quartic else 1.0
    level *= 1 + 0.04 * common.standard_normal() + 0.02 * own.standard_normal()
    error = level * np.exp(spread * common.standard_normal(steps))
    loss = 25 * error
    limit = np.full(steps, np.inf)
    if config["num_stddev"] != "∞":
        mu1, mu2, n = 25.0, 900.0, float(config["num_stddev"])
        for i in range(steps):
            limit[i] = mu1 + n * math.sqrt(mu2 - mu1**2 + 1e-8)
            limited = min(loss[i], limit[i])
            mu1 += 0.001 * (limited - mu1)
            mu2 += 0.001 * (limited**2 - mu2)
    return {
        "step": np.arange(1, steps + 1, dtype=np.int64),
        "error": error,
        "loss": loss,
        "loss_max": loss,
        "limit": limit,
        "fraction_limited": (loss > limit).astype(np.float64),
    }


def write_metrics(path: Path, rows: Mapping[str, np.ndarray], *, blocks: int = 4, torn: bool = False) -> None:
    """Write an Arrow stream in several batches; a torn one has no end marker and half of a last batch."""
    table = pa.table(dict(rows))
    sink = pa.BufferOutputStream()
    writer = pa.ipc.new_stream(sink, table.schema)
    ends = np.linspace(0, table.num_rows, blocks + 1).astype(int)
    for start, end in itertools.pairwise(ends):
        writer.write_table(table.slice(start, end - start))
    if not torn:
        writer.close()
        path.write_bytes(sink.getvalue().to_pybytes())
        return
    whole = sink.tell()
    writer.write_table(table.slice(0, table.num_rows // blocks))
    path.write_bytes(sink.getvalue().to_pybytes()[: whole + 100])


def _write(path: Path, content: Any) -> None:
    """Write JSON as the runner does: readable, with the characters as they are."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
