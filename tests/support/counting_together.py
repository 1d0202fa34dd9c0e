"""The counting experiment for runs that train together: an update of each in turn, so that a kill meets all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import counting_experiment as counting
from alrc_lab.runner import RunSpec, prepare

ENTRY = "counting_together:run"
run = counting.run


def pack_key(config: dict[str, Any]) -> str | None:
    """Runs of one rate and device go together."""
    return None if config["say"] == "alone" else f"{config['rate']} {config.get('device')}"


def largest_pack(config: dict[str, Any]) -> int:
    """Say that three pay."""
    return 3


def run_together(configs: Sequence[dict[str, Any]], recorders: Sequence[Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Count for all in turn, and yield what `run` returns of each as it ends."""
    members = {
        place: counting.updates_of(config, recorder)
        for place, (config, recorder) in enumerate(zip(configs, recorders, strict=True))
    }
    while members:
        for place, updates in list(members.items()):
            outcome = next(updates)
            if outcome is not None:
                del members[place]
                yield place, outcome


def prepared(root: Path, **changes: Any) -> Path:
    """The folder of such a run, ready to be executed; `device` is noted and not gone to."""
    device = {name: changes.pop(name) for name in ("device",) if name in changes}
    return prepare(RunSpec(ENTRY, counting.config(**changes) | device, None, counting.EXCLUDED, "count"), root)
