"""Read a study and its run folders from disk, finished or not.

With runs.py, and completions.py for pictures, the only place that knows the files of `docs/design/0002-run-folders.md`;
everything after it works on a `Study`. Must not import the runner, the experiments or a framework: folders written by
older code stay readable.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alrc_lab.report.references import References, read_references
from alrc_lab.report.runs import SCHEMA, STATUSES, Run, Status, StudyError, read_run, read_study_file

__all__ = ["SCHEMA", "STATUSES", "Cell", "Published", "Run", "Status", "Study", "StudyError", "load"]


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
        further_metrics: What else is compared, in the form of `metric`; `better` is None for what only describes.
        further_curves: Further learning curves, in the form of `curve`.
        references: Methods without training, or None.
        completions: `file` that finished runs keep pictures in and the `seed` to show; empty if there is none.
        side_by_side: `seed`, `column`, `label`, `factor`, `boxcar` of the figure of single runs, or empty.
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
    further_metrics: tuple[Mapping[str, Any], ...] = ()
    further_curves: tuple[Mapping[str, Any], ...] = ()
    references: References | None = None
    completions: Mapping[str, Any] = field(default_factory=dict)
    side_by_side: Mapping[str, Any] = field(default_factory=dict)

    @property
    def metrics(self) -> tuple[Mapping[str, Any], ...]:
        """List every metric; the first is the one that a finished run must have."""
        return (self.metric, *self.further_metrics)

    @property
    def curves(self) -> tuple[Mapping[str, Any], ...]:
        """List every learning curve, the metric's own first."""
        return (self.curve, *self.further_curves)

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

    def values(self, cell: str, metric: Mapping[str, Any] | None = None) -> dict[int, float]:
        """Map seed to a metric (by default the first), in the printed unit, over the finished runs that have it."""
        metric = metric or self.metric
        found = {run.seed: self.value(run, metric) for run in self.runs_of(cell, "finished")}
        return {seed: value for seed, value in found.items() if value is not None}

    def value(self, run: Run, metric: Mapping[str, Any]) -> float | None:
        """Return a run's value of a metric, in the printed unit; None if it has none."""
        value = run.value if metric is self.metric else run.number(metric["key"])
        return None if value is None else metric["factor"] * value

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
    content = read_study_file(root)
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
    metrics, curves = content.get("metrics") or [], content.get("curves") or []
    for holder, names in (
        *((each, ("key", "label", "factor", "better")) for each in (metric, *metrics)),
        *((each, ("column", "label", "factor", "boxcar")) for each in (curve, *curves)),
        (data, ("name", "source", "images", "sha256")),
    ):
        for name in names:
            holder[name]
    if metric["better"] not in ("lower", "higher"):
        raise StudyError(f"{path}: metric.better must be 'lower' or 'higher', got {metric['better']!r}")
    _check_further(metric, metrics, content, path)
    runs, seen = [], set()
    for item in content["runs"]:
        cell, seed = item["cell"], item["seed"]
        if cell not in cells:
            raise StudyError(f"{path}: run {item['folder']!r} names the unknown cell {cell!r}")
        if (cell, seed) in seen:
            raise StudyError(f"{path}: cell {cell!r} lists seed {seed} twice; each seed may count once")
        seen.add((cell, seed))
        runs.append(read_run(root, item, metric["key"], data["sha256"]))
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
        further_metrics=tuple(metrics),
        further_curves=tuple(curves),
        references=read_references(root, content["references"], data["sha256"]) if content.get("references") else None,
        completions=content.get("completions") or {},
        side_by_side=content.get("side_by_side") or {},
    )


def _check_further(
    metric: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], content: Mapping[str, Any], path: Path
) -> None:
    """Refuse further metrics, and references to metrics, that contradict the rest of a study."""
    keys = [each["key"] for each in (metric, *metrics)]
    for each in metrics:
        if each["better"] not in ("lower", "higher", None):
            told = f"must be 'lower', 'higher' or null, got {each['better']!r}"
            raise StudyError(f"{path}: better of metric {each['key']!r} {told}")
        if keys.count(each["key"]) > 1:
            raise StudyError(f"{path}: metric {each['key']!r} is listed twice; each may be listed once")
    for key in (content.get("references") or {}).get("metrics", ()):
        if key not in keys:
            raise StudyError(f"{path}: the references name the unknown metric {key!r}; the study has {', '.join(keys)}")
    for key, names in (
        ("completions", ("file", "seed")),
        ("side_by_side", ("seed", "column", "label", "factor", "boxcar")),
    ):
        for name in names if content.get(key) else ():
            content[key][name]
