"""Put run folders together that an entry point can train as one program.

The module of an entry point "module:function" may offer more functions, or name another module that does as
`TOGETHER`:

- `pack_key(config) -> str | None`: runs of equal keys can train together; None means alone.
- `run_together(configs, recorders)`: trains them, and yields (place, what `function` would return) as each ends.
- `largest_pack(config) -> int`: how many pay on this machine; without it, whoever packs must say.
- `facts_of(configs) -> dict`: how they are computed on this machine, for the record of the attempt; may be missing.

Nothing here knows what is computed.
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from pathlib import Path
from types import ModuleType
from typing import Any

from alrc_lab.runner.folder import CONFIG, RunState, inspect_run, read_json


def pack(folders: Iterable[Path], largest: int | None = None, workers: int = 1) -> list[list[Path]]:
    """Group run folders that are not done and can train together; runs whose last attempt failed go alone.

    Args:
        folders: Run folders that `prepare` made.
        largest: Runs in a pack at most; 1 packs nothing, None asks the entry point's module.
        workers: How many packs execute at once: a group is split evenly, so that all of them have work.

    Returns:
        Packs of one run or more, by the place of their first run; every folder that is not done is in one of them.

    Raises:
        ValueError: If a number is below 1.
    """
    waiting = list[Path]()
    documents = list[dict[str, Any]]()
    for folder in map(Path, folders):
        state = inspect_run(folder)
        if not state.is_done:
            waiting.append(folder)
            documents.append({} if state.state == "failed" or largest == 1 else _document(folder))
    return [[waiting[place] for place in part] for part in group(documents, largest, workers)]


def group(documents: Sequence[Mapping[str, Any]], largest: int | None = None, workers: int = 1) -> list[list[int]]:
    """Group runs that can train together, as `pack` does, before they have folders.

    Args:
        documents: `entry`, `config` and `inputs` of each run. An empty one goes alone: a run whose last attempt failed
            may have been what ended the others.
        largest: As `pack` takes it.
        workers: As `pack` takes it.

    Returns:
        Packs of one place or more; every place is in one of them.

    Raises:
        ValueError: If a number is below 1.
    """
    for what, number in (("largest", largest), ("workers", workers)):
        if number is not None and number < 1:
            raise ValueError(f"{what} must be at least 1, got {number}")
    groups = dict[Any, list[int]]()
    limits = dict[Any, int]()
    for place, document in enumerate(documents):
        key, limit = _kind_of(place, document, largest, limits)
        groups.setdefault(key, []).append(place)
        limits[key] = limit
    return [part for key, members in groups.items() for part in _split(members, limits[key], workers)]


def together_of(entry: str) -> ModuleType | None:
    """Return the module that can train runs of an entry point together, None if there is none.

    Args:
        entry: "module:function".

    Raises:
        ImportError: If a module cannot be imported.
    """
    module = importlib.import_module(entry.partition(":")[0])
    if hasattr(module, "TOGETHER"):
        module = importlib.import_module(module.TOGETHER)
    return module if hasattr(module, "pack_key") and hasattr(module, "run_together") else None


def members_of(joint: Future[list[RunState]], number: int) -> list[Future[RunState]]:
    """Return one future for each run of a pack; none of them can be cancelled alone.

    Args:
        joint: Future of the states of all.
        number: How many runs the pack has.

    Returns:
        Futures that are done when `joint` is, with its exception if it has one; cancelled if it is.
    """
    members = [Future[RunState]() for _ in range(number)]

    def pass_on(done: Future[list[RunState]]) -> None:
        try:
            states = done.result()
        except CancelledError:
            for member in members:
                member.cancel()
                member.set_running_or_notify_cancel()
        except BaseException as error:
            for member in members:
                member.set_exception(error)
        else:
            for member, state in zip(members, states, strict=True):
                member.set_result(state)

    joint.add_done_callback(pass_on)
    return members


def _document(folder: Path) -> dict[str, Any]:
    """Return what config.json says, nothing if it cannot be read: executing the run will say so."""
    try:
        return read_json(folder / CONFIG) or {}
    except (ValueError, OSError):
        return {}


def _kind_of(place: int, document: Mapping[str, Any], largest: int | None, known: dict[Any, int]) -> tuple[Any, int]:
    """Return what the runs of a pack have in common, and how many there may be; a run's own place packs it alone."""
    alone = place, 1
    if largest == 1 or not document:
        return alone
    try:
        module = together_of(str(document["entry"]))
        own_key = None if module is None else module.pack_key(document["config"])
    except Exception:  # whatever it is, executing the run will say so
        return alone
    if module is None or own_key is None:
        return alone
    # The data is part of a run's identity, so runs of two data sets are not alike.
    key = document["entry"], own_key, str((document.get("inputs") or {}).get("sha256"))
    if largest is not None:
        return key, largest
    return key, known[key] if key in known else _largest_of(module, document["config"])


def _largest_of(module: ModuleType, config: dict[str, Any]) -> int:
    """Ask how many runs pay; one, if the module does not know."""
    ask: Any = getattr(module, "largest_pack", None)
    return max(1, int(ask(config))) if ask is not None else 1


def _split(members: Sequence[int], limit: int, workers: int) -> list[list[int]]:
    """Split runs into packs of nearly equal sizes, at least one for each worker while there are enough."""
    number = max(math.ceil(len(members) / limit), min(workers, len(members)))
    if number < len(members):  # whole rounds of the workers, so that none waits for the last pack
        number = min(len(members), math.ceil(number / workers) * workers)
    edges = [round(i * len(members) / number) for i in range(number + 1)]
    return [list(members[a:b]) for a, b in itertools.pairwise(edges)]
