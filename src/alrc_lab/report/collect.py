"""Read a study and its run folders from disk, finished or not.

The only place that knows the files of `docs/design/0002-run-folders.md`; everything after it works on a `Study`.
Must not import the runner, the experiments or a framework: folders written by older code stay readable.
"""

from __future__ import annotations

import json
import math
from collections import Counter
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
class Published:
    """Hold the number a paper printed for a cell, in the metric's printed unit."""

    mean: float
    std: float | None
    n: int | None


@dataclass(frozen=True)
class Cell:
    """Hold one setting of a study: what its runs, which differ in their seed alone, have in common."""

    id: str
    panel: str
    row: str
    column: str
    baseline: str | None
    published: Published | None


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
        wall_s: Seconds the run took, or None.
        environment: The last entry of env.json's attempts; empty if there is none.
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


@dataclass(frozen=True)
class Study:
    """Hold a study as its folder stands now.

    Attributes:
        root: The folder that holds study.json.
        name: Name of the study; its `preset`, `title` and `question` follow.
        data: `name`, `source`, `images`, `sha256` of the data set.
        metric: `key`, `label`, `factor`, `better`, `window` of the number that is compared.
        curve: `column`, `label`, `factor`, `boxcar` of the learning curves.
        stream: Names of the columns `loss` and `limit`; empty if the study limits nothing.
        panels: Title by panel id, in the study's order.
        cells: Cell by id, in the study's order.
        runs: Every run that the study lists.
        differences: Sentences that say where the protocol is not the paper's.
        notes: Further sentences.
    """

    root: Path
    name: str
    preset: str
    title: str
    question: str
    data: Mapping[str, Any]
    metric: Mapping[str, Any]
    curve: Mapping[str, Any]
    stream: Mapping[str, str]
    panels: Mapping[str, str]
    cells: Mapping[str, Cell]
    runs: tuple[Run, ...]
    differences: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """List the column labels in the order in which cells first name them."""
        return tuple(dict.fromkeys(cell.column for cell in self.cells.values()))

    @property
    def counts(self) -> dict[Status, int]:
        """Count the runs by status; every status is a key."""
        found = Counter(run.status for run in self.runs)
        return {status: found[status] for status in STATUSES}

    @property
    def follows_publication(self) -> bool:
        """Tell whether published numbers may be compared with ours: the study lists no difference."""
        return not self.differences

    def runs_of(self, cell: str, *statuses: Status) -> list[Run]:
        """List the runs of a cell by seed, only those with one of the statuses if any is given."""
        return sorted(
            (run for run in self.runs if run.cell == cell and (not statuses or run.status in statuses)),
            key=lambda run: run.seed,
        )

    def values(self, cell: str) -> dict[int, float]:
        """Map seed to metric, in the printed unit, over the finished runs of a cell."""
        factor = self.metric["factor"]
        return {run.seed: factor * run.value for run in self.runs_of(cell, "finished") if run.value is not None}

    @property
    def warnings(self) -> tuple[str, ...]:
        """Say what makes runs of this study less comparable than they look."""
        done = [run for run in self.runs if run.status in ("finished", "diverged")]
        found = []
        for name, of in (
            ("versions of the code", lambda run: run.environment.get("code_version")),
            ("kinds of hardware", lambda run: run.hardware),
        ):
            counts = Counter(str(of(run) or "unknown") for run in done)
            if len(counts) > 1:
                listed = ", ".join(f"{key} ({count} runs)" for key, count in sorted(counts.items()))
                found.append(f"The runs were made by {len(counts)} {name}: {listed}.")
        return tuple(found)


def load(root: Path) -> Study:
    """Read root/study.json and every run folder it lists.

    Works at any moment of a sweep: a run without result counts as missing, one with failure.json as failed. A result
    that does not belong to its config, was made from other data than the study names, or lacks a finite metric counts
    as failed too, and its `detail` says why.

    Args:
        root: Folder of the study, the DIR of `alrc sweep --out DIR`.

    Returns:
        The study as it stands.

    Raises:
        StudyError: If study.json is absent, malformed, contradicts itself or has an unknown schema.
    """
    root = Path(root)
    path = root / "study.json"
    if not path.is_file():
        raise StudyError(f"{root} holds no study.json: name a folder that `alrc sweep --out` made")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StudyError(f"{path} is not valid JSON ({error}): run the sweep again to write it anew") from error
    _check_schema(content, path)
    try:
        return _study(root, content)
    except KeyError as error:
        raise StudyError(f"{path} lacks the field {error}: run the sweep again to write it anew") from error


def _study(root: Path, content: dict[str, Any]) -> Study:
    """Build a study from the content of its file."""
    path = root / "study.json"
    panels = {panel["id"]: panel["title"] for panel in content["panels"]}
    cells: dict[str, Cell] = {}
    for item in content["cells"]:
        known = {name: item[name] for name in ("id", "panel", "row", "column", "baseline")}
        printed = item["published"]
        published = Published(printed["mean"], printed.get("std"), printed.get("n")) if printed else None
        cells[item["id"]] = Cell(**known, published=published)
        if item["panel"] not in panels:
            raise StudyError(f"{path}: cell {item['id']!r} names the unknown panel {item['panel']!r}")
    for cell in cells.values():
        if cell.baseline is not None and cell.baseline not in cells:
            raise StudyError(f"{path}: cell {cell.id!r} names the unknown baseline {cell.baseline!r}")
    metric, curve, data = content["metric"], content["curve"], content["data"]
    for holder, names in (
        (metric, ("key", "label", "factor", "better")),
        (curve, ("column", "label", "factor", "boxcar")),
        (data, ("name", "source", "images", "sha256")),
    ):
        for name in names:
            holder[name]
    if metric["better"] not in ("lower", "higher"):
        raise StudyError(f"{path}: metric.better must be 'lower' or 'higher', got {metric['better']!r}")
    runs, seen = [], set()
    for item in content["runs"]:
        cell, seed = item["cell"], item["seed"]
        if cell not in cells:
            raise StudyError(f"{path}: run {item['folder']!r} names the unknown cell {cell!r}")
        if (cell, seed) in seen:
            raise StudyError(f"{path}: cell {cell!r} lists seed {seed} twice; each seed may count once")
        seen.add((cell, seed))
        runs.append(_run(root, item, metric["key"], data["sha256"]))
    texts = {key: str(content[key]) for key in ("preset", "title", "question")}
    return Study(
        root=root,
        name=str(content["study"]),
        **texts,
        data=data,
        metric=metric,
        curve=curve,
        stream=content.get("stream") or {},
        panels=panels,
        cells=cells,
        runs=tuple(runs),
        differences=tuple(content.get("differences", ())),
        notes=tuple(content.get("notes", ())),
    )


def _run(root: Path, item: Mapping[str, Any], key: str, sha256: str) -> Run:
    """Read one run folder, whatever is in it."""
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
            _check_schema(files[name], path / f"{name}.json")
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
        return Run(**base, status="finished", value=float(result["summary"][key]))
    if failure is not None:
        told = f"{failure.get('type', 'Error')}: {failure.get('message', 'no message')}"
        return Run(**base, status="failed", detail=failure.get("unreadable", told))
    progress = files["progress"]
    reached = f"reached step {progress['step']:,} of {progress['total']:,}" if progress else "not started"
    return Run(**base, status="missing", detail=reached)


def _distrust(config: dict[str, Any], result: dict[str, Any], key: str, sha256: str) -> str:
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
    value = (result.get("summary") or {}).get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return f"the summary has no finite {key!r}, but {value!r}"
    return ""


def _check_schema(content: Any, path: Path) -> None:
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
