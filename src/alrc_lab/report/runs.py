"""Read a run folder from disk, whatever is in it.

The only place that knows the files of docs/design/0002-run-folders.md; what stands in study.json is for who reads it to
know. Must not import the runner, the experiments or a framework: folders written by older code stay readable.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

SCHEMA = 1
Status = Literal["finished", "diverged", "failed", "missing"]
STATUSES: tuple[Status, ...] = ("finished", "diverged", "failed", "missing")


class StudyError(ValueError):
    """Say which file of a study cannot be reported, why, and what to do."""


@dataclass(frozen=True)
class Run:
    """Hold what a run folder says, except its metrics, which are read when asked for.

    Attributes:
        folder: Path below the study's root, as study.json has it.
        path: The folder itself.
        cell: Id of the cell the run belongs to.
        seed: Seed of the run; runs are paired by it.
        status: `finished`, `diverged`, `failed` (an error, or a result that cannot be trusted) or
            `missing` (no result yet).
        detail: What to tell about a status other than finished; "" if finished.
        value: The study's metric, unscaled; None unless finished.
        diverged_at: Step of the divergence, or None.
        identity: SHA-256 of the run; "" while there is no config.json.
        steps: Number of updates the result reports, or None.
        wall_s: Seconds the run took, its share of a pack's, or None.
        environment: The last entry of env.json's attempts; empty if there is none.
        summary: Numbers of result.json by name; empty unless finished.
    """

    folder: str
    path: Path
    cell: str
    seed: int
    status: Status
    detail: str = ""
    value: float | None = None
    diverged_at: int | None = None
    identity: str = ""
    steps: int | None = None
    wall_s: float | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)

    def number(self, key: str) -> float | None:
        """Look a number of the summary up, unscaled; None if it is not there or not finite."""
        return _finite(self.summary.get(key))

    def metrics(self, *names: str) -> dict[str, np.ndarray]:
        """Read columns of metrics.arrows, as far as whole record batches go.

        A run that is being written or was killed leaves a stream without end marker or with a torn last batch; what
        precedes it is whole and is used.

        Args:
            names: Columns wanted besides `step`.

        Returns:
            `step` (int64) and each column (float64), all of one length; empty arrays if nothing was logged yet.

        Raises:
            StudyError: If the stream lacks a column; names those it has.
        """
        path = self.path / "metrics.arrows"
        wanted = ("step", *names)
        parts: dict[str, list[np.ndarray]] = {name: [] for name in wanted}
        for batch in _whole_batches(path):
            for name in wanted:
                if name not in batch.schema.names:
                    raise StudyError(f"{path}: no column {name!r}; it has {', '.join(batch.schema.names)}")
                parts[name].append(batch.column(name).to_numpy(zero_copy_only=False))
        kinds = {name: np.int64 if name == "step" else np.float64 for name in wanted}
        return {name: np.concatenate([np.empty(0, kinds[name]), *parts[name]]) for name in wanted}

    @property
    def hardware(self) -> str:
        """Name processor and cores of the last attempt; "" if unknown."""
        cpu, cores = self.environment.get("cpu"), self.environment.get("cores")
        return ", ".join([str(cpu)] * bool(cpu) + [f"{cores} cores"] * bool(cores))


def read_run(root: Path, item: Mapping[str, Any], key: str | None, sha256: str) -> Run:
    """Read one run folder.

    Args:
        root: Folder of the study.
        item: `folder` below root, `cell` and `seed`, as study.json has them.
        key: Name in the result's summary without which a finished run counts as failed; None asks for none.
        sha256: Checksum of the data that the run must have been made from.

    Returns:
        The run, whatever has become of it.

    Raises:
        StudyError: If a file has an unknown schema.
    """
    path = root / item["folder"]
    files = {}
    for name in ("config", "env", "result", "failure", "progress"):
        try:
            files[name] = json.loads((path / f"{name}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            files[name] = None
        except ValueError as error:
            # Half-written progress is of no consequence; anything else is told in the run's detail.
            files[name] = None if name == "progress" else {"unreadable": f"{name}.json is not valid JSON ({error})"}
    config, result, failure = files["config"] or {}, files["result"], files["failure"]
    for name in ("config", "result"):
        if files[name] and "schema" in files[name]:
            check_schema(files[name], path / f"{name}.json")
    attempts = (files["env"] or {}).get("attempts") or [{}]
    base = {
        "folder": item["folder"],
        "path": path,
        "cell": item["cell"],
        "seed": int(item["seed"]),
        "identity": config.get("identity", ""),
        "environment": attempts[-1],
    }
    if result is not None:
        base |= {"steps": result.get("steps"), "wall_s": result.get("wall_s")}
        if problem := _distrust(config, result, key, sha256):
            return Run(**base, status="failed", detail=problem)
        if result["status"] == "diverged":
            at = result.get("diverged_at")
            where = "at an unrecorded step" if at is None else f"at step {at:,}"
            return Run(**base, status="diverged", detail=f"diverged {where}", diverged_at=at)
        summary = result.get("summary") or {}
        return Run(**base, status="finished", value=None if key is None else float(summary[key]), summary=summary)
    if failure is not None:
        told = f"{failure.get('type', 'Error')}: {failure.get('message', 'no message')}"
        return Run(**base, status="failed", detail=failure.get("unreadable", told))
    progress = files["progress"]
    reached = f"reached step {progress['step']:,} of {progress['total']:,}" if progress else "not started"
    return Run(**base, status="missing", detail=reached)


def _distrust(config: dict[str, Any], result: dict[str, Any], key: str | None, sha256: str) -> str:
    """Say why a result must not enter a table; "" if it may."""
    for content in (config, result):
        if "unreadable" in content:
            return content["unreadable"]
    if config.get("identity") != result.get("identity"):
        return "result.json and config.json name different identities"
    made_from = (config.get("inputs") or {}).get("sha256")
    if made_from != sha256:
        return f"made from data {str(made_from)[:12]}, the study names {str(sha256)[:12]}"
    if result.get("status") == "diverged":
        return ""
    if result.get("status") != "finished":
        return f"unknown status {result.get('status')!r} in result.json"
    summary = result.get("summary") or {}
    if key is not None and _finite(summary.get(key)) is None:
        return f"the summary has no finite {key!r}, but {summary.get(key)!r}"
    return ""


def _finite(value: Any) -> float | None:
    """Return a finite number as float; None for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def read_study_file(root: Path) -> dict[str, Any]:
    """Read root/study.json, or say why not.

    Raises:
        StudyError: If it is absent, no JSON, or has an unknown schema.
    """
    path = root / "study.json"
    if not path.is_file():
        raise StudyError(f"{root} holds no study.json: name a folder that `alrc sweep --out` made")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StudyError(f"{path} is not valid JSON ({error}): run the sweep again to write it anew") from error
    check_schema(content, path)
    return content


def check_schema(content: Any, path: Path) -> None:
    """Refuse a file whose schema this version does not know."""
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise StudyError(f"{path} has schema {schema!r}; this version of alrc reads schema {SCHEMA}: update alrc")


def _whole_batches(path: Path) -> list[pa.RecordBatch]:
    """Read the whole record batches of a stream that may end anywhere."""
    batches: list[pa.RecordBatch] = []
    if not path.is_file():
        return batches
    with path.open("rb") as file:
        try:
            reader = pa.ipc.open_stream(file)
            while True:
                batches.append(reader.read_next_batch())
        except (StopIteration, pa.ArrowInvalid, OSError):
            return batches
