"""Name a run by what determines its numbers, and write it down before anything runs.

The name of a folder follows from its content, so "resume" is the same command again, and two runs that differ in any
number never share a folder. Also keeps the study file, which says how runs belong together.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from alrc_lab.runner.folder import (
    CONFIG,
    RESULT,
    SCHEMA,
    check_schema,
    plain_errors,
    read_json,
    write_json,
)

_STUDY = "study.json"
_ENTRY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,99}")


@dataclass(frozen=True)
class RunSpec:
    """Say what a run is: an entry point, a config and the data set it reads.

    Example:
        >>> spec = RunSpec("mine:run", {"rate": 0.1, "workers": 2}, None, ("workers",), "mine")
        >>> spec.folder_name
        'mine-3dd950b6ad'
        >>> spec.identity == RunSpec("mine:run", {"workers": 8, "rate": 0.1}, None, ("workers",), "mine").identity
        True

    Args:
        entry: "module:function", called with (config, recorder).
        config: Resolved settings, defaults included: JSON values, finite numbers, None for "none".
        inputs: The resolved data set with at least `sha256`, or None for an entry point that reads none.
        excluded: Names of config fields that cannot change a number.
        name: Begin of the folder's name: letters, digits and . _ + = -, at most 100.

    Raises:
        ValueError: If one of them cannot be written down faithfully; names the field and its value.
    """

    entry: str
    config: dict[str, Any]
    inputs: dict[str, Any] | None
    excluded: tuple[str, ...]
    name: str

    def __post_init__(self) -> None:
        if not _ENTRY.fullmatch(self.entry):
            raise ValueError(f"entry must look like 'package.module:function', got {self.entry!r}")
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                "a run's name becomes a folder's name: use letters, digits and . _ + = -, at most 100; "
                f"got {self.name!r}"
            )
        if self.inputs is not None and not isinstance(self.inputs.get("sha256"), str):
            raise ValueError(f"inputs must name the data's sha256, got {self.inputs!r}; use None if there is no data")
        unknown = [field for field in self.excluded if field not in self.config]
        if unknown:
            raise ValueError(f"excluded names {unknown[0]!r}, but config has no such field: {', '.join(self.config)}")
        # Copies, so that the identity cannot change behind a frozen object's back.
        object.__setattr__(self, "config", _plain(self.config, "config"))
        object.__setattr__(self, "inputs", None if self.inputs is None else _plain(self.inputs, "inputs"))
        object.__setattr__(self, "excluded", tuple(self.excluded))

    @property
    def identity(self) -> str:
        """SHA-256 of what determines the numbers, 64 hex digits."""
        return identity_of(self.to_json())

    @property
    def folder_name(self) -> str:
        """Name of the run folder: the run's name and the first ten digits of its identity."""
        return f"{self.name}-{self.identity[:10]}"

    def to_json(self) -> dict[str, Any]:
        """Return the content of config.json, save its identity."""
        return {
            "schema": SCHEMA,
            "entry": self.entry,
            "config": self.config,
            "excluded": list(self.excluded),
            "inputs": self.inputs,
        }


def identity_of(document: Mapping[str, Any]) -> str:
    """Return the identity that belongs to the content of a config.json.

    Args:
        document: `entry`, `config`, `excluded` and `inputs`.

    Returns:
        SHA-256 of the canonical JSON of entry, config without the excluded fields, and the data's checksum.
    """
    config = {key: value for key, value in document["config"].items() if key not in document["excluded"]}
    data = document["inputs"]["sha256"] if document["inputs"] else None
    essence = {"entry": document["entry"], "config": config, "data": data}
    text = json.dumps(essence, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def prepare(spec: RunSpec, root: Path) -> Path:
    """Make the folder of a run, or find it as it was left.

    Repeating it is harmless. A run without result gets the newest excluded fields and the newest place of its data,
    neither of which can change its numbers; a run with a result is left untouched.

    Args:
        spec: The run.
        root: Folder that holds, or gets, `runs/`.

    Returns:
        The run folder, with config.json in it.

    Raises:
        ValueError: If the folder holds another run, or its config.json cannot be read.
        OSError: In one sentence, if it cannot be written.
    """
    folder = Path(root) / "runs" / spec.folder_name
    path = folder / CONFIG
    document = {"identity": spec.identity, **spec.to_json()}
    found = read_json(path)
    if found is not None and found.get("identity") != spec.identity:
        raise ValueError(
            f"{path} holds another run (identity {str(found.get('identity'))[:16]}…, wanted {spec.identity[:16]}…): "
            "choose another folder for the results, or move this one away"
        )
    if found == document or (found is not None and (folder / RESULT).exists()):
        return folder
    with plain_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(path, document)
    return folder


def write_study(root: Path, study: Mapping[str, Any]) -> None:
    """Write or extend the study file of a results folder.

    Runs, cells and panels that are listed already stay listed after the new ones; everything else is replaced. So a
    sweep with fewer seeds, or a newer wording, never loses runs.

    Args:
        root: The results folder, DIR of `alrc sweep --out DIR`.
        study: The study as docs/design/0002-run-folders.md has it; `schema` is added.

    Raises:
        ValueError: If the folder belongs to another study, preset or data set, or holds the same cell and seed with
            other settings; nothing is written then.
        OSError: In one sentence, if it cannot be written.
    """
    root = Path(root)
    path = root / _STUDY
    with plain_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        guard = FileLock(root / ".study.lock")
        guard.acquire(timeout=10)
    try:
        merged = {**_plain(dict(study), "study"), "schema": SCHEMA}
        if path.exists():
            found = read_study(root)
            for what, old, new in (
                ("study", found.get("study"), merged.get("study")),
                ("preset", found.get("preset"), merged.get("preset")),
                ("data", (found.get("data") or {}).get("sha256"), (merged.get("data") or {}).get("sha256")),
            ):
                if old != new:
                    raise ValueError(f"{root} holds results with {what} {old!r}, not {new!r}: choose another --out")
            for field, key in (("panels", "id"), ("cells", "id"), ("runs", "folder")):
                merged[field] = _union(merged.get(field) or [], found.get(field) or [], key)
            _check_seeds(root, merged["runs"])
        write_json(path, merged)
    finally:
        guard.release()


def read_study(root: Path) -> dict[str, Any]:
    """Read the study file of a results folder.

    Raises:
        FileNotFoundError: If there is none; says how to make one.
        ValueError: If it is not valid JSON or has an unknown schema.
    """
    path = Path(root) / _STUDY
    study = read_json(path)
    if study is None:
        raise FileNotFoundError(f"{root} holds no {_STUDY}: name a folder that `alrc sweep --out` made")
    check_schema(study, path)
    return study


def _union(new: list[dict[str, Any]], old: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Return the new entries in their order, then the old ones that none of them replaces."""
    known = {entry[key] for entry in new}
    return [*new, *(entry for entry in old if entry[key] not in known)]


def _check_seeds(root: Path, runs: list[dict[str, Any]]) -> None:
    """Refuse two runs for one cell and seed: a table could count only one of them."""
    seen: dict[tuple[Any, Any], str] = {}
    for run in runs:
        where = (run.get("cell"), run.get("seed"))
        if where in seen:
            raise ValueError(
                f"{root} holds cell {where[0]!r}, seed {where[1]} with other settings ({run['folder']}, "
                f"now {seen[where]}): choose another --out"
            )
        seen[where] = run["folder"]


def _plain(value: Any, where: str) -> Any:
    """Copy a value of JSON types, tuples as lists; ValueError names the first thing JSON cannot say."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}, which JSON cannot say; use null (None) for 'none'")
        return float(value)
    if isinstance(value, list | tuple):
        return [_plain(member, f"{where}[{place}]") for place, member in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r}; keys must be strings")
        return {key: _plain(member, f"{where}.{key}") for key, member in value.items()}
    raise ValueError(f"{where} is a {type(value).__name__} ({value!r}); use numbers, strings, lists, dicts or None")
