"""Read a study of claims from disk: its sentences, the criteria that judge them, and the numbers of its runs.

Knows study.json of the kind "claims"; runs.py knows run folders. Must not import the runner, the experiments or a
framework: folders written by older code stay readable.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from alrc_lab.report.runs import Run, StudyError, read_run, read_study_file

Verdict = Literal["consistent", "contradicts", "inconclusive", "outside scope"]
VERDICTS: tuple[Verdict, ...] = ("consistent", "contradicts", "inconclusive", "outside scope")
ORIGINS = {"read": "read in the paper", "source": "from another source", "inference": "our inference"}
CONTROLS: dict[str, Verdict] = {"must contradict": "contradicts", "must be consistent": "consistent"}
_OPERATORS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
PARTS = ("value", "low", "high", "p", "n")


@dataclass(frozen=True)
class Condition:
    """Compare one number of a run's summary with a threshold.

    Attributes:
        key: Name of the number.
        op: `<`, `<=`, `>` or `>=`.
        than: The threshold.
    """

    key: str
    op: str
    than: float

    def holds(self, summary: Mapping[str, Any]) -> bool | None:
        """Tell whether the condition holds; None where the number is absent or not finite."""
        value = finite(summary.get(self.key))
        return None if value is None else bool(_OPERATORS[self.op](value, self.than))


@dataclass(frozen=True)
class Claim:
    """Hold one sentence on trial, with what was written about it before the run.

    Attributes:
        id: Name of the claim, such as `E3a-classic`.
        experiment: Id of the experiment that tests it.
        run: Cell id of the run whose numbers judge it.
        method: The method it is tested on; `setting` says more, or is "".
        sentence: The sentence it concerns, in our words.
        origin: Where the sentence is from: a key of `ORIGINS`; `where` names the place, or is "".
        scope: False where the theory says nothing about this method or setting.
        label: What the statistic is.
        keys: Name in the summary of its `value`, `low`, `high`, `p` and `n`, as far as it has them.
        places: Decimals to print.
        consistent: Conditions that make it consistent, if all hold.
        contradicts: Conditions that make it contradict, if all hold.
        control: What its verdict must be for the experiment to be trusted, a key of `CONTROLS`; None for no control.
        remark: What study.json says of a claim outside the scope; "" for nothing.
        written: The claim as study.json has it.
    """

    id: str
    experiment: str
    run: str
    method: str
    setting: str
    sentence: str
    origin: str
    where: str
    scope: bool
    label: str
    keys: Mapping[str, str]
    places: int
    consistent: tuple[Condition, ...]
    contradicts: tuple[Condition, ...]
    control: str | None
    remark: str
    written: Mapping[str, Any]


@dataclass(frozen=True)
class Experiment:
    """Hold what an experiment is called, what it does in two sentences, and the name of its figure."""

    id: str
    title: str
    protocol: str
    figure: str


@dataclass(frozen=True)
class Family:
    """Hold the claims whose p-values were adjusted together by Holm's method, and the level."""

    name: str
    claims: tuple[str, ...]
    alpha: float


@dataclass(frozen=True)
class ClaimsStudy:
    """Hold a study of claims as its folder stands now.

    Attributes:
        root: The folder that holds study.json.
        name: Name of the study; its `preset`, `title` and `question` follow.
        data: `name`, `source`, `sha256` of the data that the runs must name.
        experiments: Experiment by id, in the study's order.
        claims: Every claim, in the study's order.
        runs: Run by cell id; one for each experiment.
        configs: What config.json says a run was made with, by cell id; empty before it exists.
        families: The Holm families.
        differences: Sentences that say where the protocol is not the published one.
        notes: Further sentences.
    """

    root: Path
    name: str
    preset: str
    title: str
    question: str
    data: Mapping[str, Any]
    experiments: Mapping[str, Experiment]
    claims: tuple[Claim, ...]
    runs: Mapping[str, Run]
    configs: Mapping[str, Mapping[str, Any]]
    families: tuple[Family, ...]
    differences: tuple[str, ...]
    notes: tuple[str, ...]


def is_claims(root: Path) -> bool:
    """Tell whether a folder holds a study of claims; False too where study.json cannot be read."""
    try:
        return read_study_file(Path(root)).get("kind") == "claims"
    except StudyError:
        return False


def load(root: Path) -> ClaimsStudy:
    """Read root/study.json and every run folder it lists, at any moment of a sweep.

    Args:
        root: Folder of the study, the DIR of `alrc sweep --out DIR`.

    Returns:
        The study as it stands.

    Raises:
        StudyError: If study.json is absent, malformed, contradicts itself or has an unknown schema.
    """
    root = Path(root)
    path, content = root / "study.json", read_study_file(root)
    try:
        return _study(root, content)
    except KeyError as error:
        raise StudyError(f"{path} lacks the field {error}: run the sweep again to write it anew") from error


def columns(run: Run) -> dict[str, Any]:
    """Read every column of a run's metrics by name, `step` too; empty before anything was logged."""
    path = run.path / "metrics.arrows"
    try:
        with path.open("rb") as file:
            names = pa.ipc.open_stream(file).schema.names
    except (FileNotFoundError, pa.ArrowInvalid, OSError):
        return {}
    return run.metrics(*(name for name in names if name != "step"))


def finite(value: Any) -> float | None:
    """Return a number as it is, and None for anything that is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def _study(root: Path, content: dict[str, Any]) -> ClaimsStudy:
    """Build a study from the content of its file."""
    path = root / "study.json"
    experiments = {
        item["id"]: Experiment(item["id"], item["title"], item["protocol"], item.get("figure") or "")
        for item in content["experiments"]
    }
    claims = tuple(_claim(item, path) for item in content["claims"])
    ids = Counter(claim.id for claim in claims)
    for claim in claims:
        if ids[claim.id] > 1:
            raise StudyError(f"{path}: claim {claim.id!r} is listed {ids[claim.id]} times; give each an id of its own")
        if claim.experiment not in experiments:
            raise StudyError(f"{path}: claim {claim.id!r} names the unknown experiment {claim.experiment!r}")
    holm = content.get("holm") or {}
    families = tuple(
        Family(item["name"], tuple(item["claims"]), float(item["alpha"]))
        for item in (holm["families"] if isinstance(holm, dict) and holm else holm)
    )
    for family in families:
        if unknown := [key for key in family.claims if key not in ids]:
            raise StudyError(f"{path}: the Holm family {family.name!r} names the unknown claim {unknown[0]!r}")
    runs, configs = {}, {}
    for item in content["runs"]:
        cell = item["cell"]
        if cell in runs:
            raise StudyError(f"{path}: cell {cell!r} lists two runs; a claim is judged by one")
        runs[cell], configs[cell] = _run(root, item, content["data"]["sha256"])
    texts = {key: str(content[key]) for key in ("preset", "title", "question")}
    return ClaimsStudy(
        root=root,
        name=str(content["study"]),
        **texts,
        data=content["data"],
        experiments=experiments,
        claims=claims,
        runs=runs,
        configs=configs,
        families=families,
        differences=tuple(content.get("differences", ())),
        notes=tuple(content.get("notes", ())),
    )


def _claim(item: Mapping[str, Any], path: Path) -> Claim:
    """Read one claim, and refuse words this version does not know."""
    statistic, control = item["statistic"], item.get("control")
    for field, value, known in (("origin", item["origin"], ORIGINS), ("control", control, CONTROLS)):
        if value is not None and value not in known:
            raise StudyError(f"{path}: claim {item['id']!r} has the {field} {value!r}; known are {', '.join(known)}")
    if not isinstance(item["scope"], bool):
        raise StudyError(f"{path}: claim {item['id']!r} has the scope {item['scope']!r}; it must be true or false")
    conditions: dict[str, tuple[Condition, ...]] = {}
    for field in ("consistent", "contradicts"):
        found = [Condition(entry["key"], entry["op"], entry["than"]) for entry in item[field]]
        for entry in found:
            if entry.op not in _OPERATORS or finite(entry.than) is None:
                raise StudyError(
                    f"{path}: claim {item['id']!r} has the condition {entry.key} {entry.op} {entry.than!r}; "
                    f"it takes one of {' '.join(_OPERATORS)} and a finite number"
                )
        conditions[field] = tuple(found)
    texts = {key: str(item[key]) for key in ("id", "experiment", "run", "method", "setting", "sentence", "origin")}
    return Claim(
        **texts,
        where=str(item.get("where") or ""),
        scope=item["scope"],
        label=str(statistic["label"]),
        keys={"value": statistic["value"]} | {part: statistic[part] for part in PARTS if statistic.get(part)},
        places=int(statistic["places"]),
        consistent=conditions["consistent"],
        contradicts=conditions["contradicts"],
        control=control,
        remark=str(item.get("reading") or ""),
        written=item,
    )


def _run(root: Path, item: Mapping[str, Any], sha256: str) -> tuple[Run, dict[str, Any]]:
    """Read one run folder and what its config says; distrust numbers whose criteria may be younger than they."""
    run = read_run(root, item, None, sha256)
    try:
        config = json.loads((run.path / "config.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return run, {}
    problem = ""
    if _identity(config) != config.get("identity"):
        problem = "config.json is not what its identity says: it was changed after the run was named"
    elif {"claims", "criteria"} & set(config.get("excluded") or ()):
        problem = "config.json excludes its criteria from the identity, so they may be younger than the numbers"
    if problem and run.status in ("finished", "diverged"):
        run = replace(run, status="failed", detail=problem, summary={})
    return run, config.get("config") or {}


def _identity(config: Mapping[str, Any]) -> str:
    """Compute the identity that belongs to a config.json, as docs/design/0002-run-folders.md has it."""
    excluded = config.get("excluded") or ()
    essence = {
        "entry": config.get("entry"),
        "config": {key: value for key, value in (config.get("config") or {}).items() if key not in excluded},
        "data": (config.get("inputs") or {}).get("sha256"),
    }
    text = json.dumps(essence, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
