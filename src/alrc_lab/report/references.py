"""Read what methods without training reach on the same data: one run folder for all of them.

They have no seed, so their numbers have no interval over seeds and never enter a paired comparison.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alrc_lab.report.runs import Run, read_run


@dataclass(frozen=True)
class References:
    """Hold methods without training, as their one run folder stands now.

    Attributes:
        title: What they have in common, such as "Without a network".
        methods: Label by key, in the study's order.
        metrics: By the key of a metric of the study, where the summary has it: a name with `{key}` for the method.
        run: The run folder; its steps are the crops that a number is the mean of.
    """

    title: str
    methods: Mapping[str, str]
    metrics: Mapping[str, str]
    run: Run

    @property
    def crops(self) -> str:
        """Say what each number is taken over."""
        return "the held-out crops" if self.run.steps is None else f"{self.run.steps:,} held-out crops"

    def values(self, metric: Mapping[str, Any]) -> dict[str, float | None]:
        """Map method to its value of a metric, in the printed unit; empty if there are none to show."""
        pattern = self.metrics.get(metric["key"])
        if pattern is None:
            return {}
        found = {method: self.run.number(pattern.replace("{key}", method)) for method in self.methods}
        scaled = {key: None if value is None else metric["factor"] * value for key, value in found.items()}
        return scaled if any(value is not None for value in scaled.values()) else {}

    def complaints(self) -> list[str]:
        """Say what is not there to be compared with."""
        if self.run.status != "finished":
            state = "has no result yet" if self.run.status == "missing" else self.run.status
            where = f"{self.run.folder} {state} ({self.run.detail})"
            return [f"{self.title}: {where}, so there is nothing to compare with."]
        names = [pattern.replace("{key}", key) for pattern in self.metrics.values() for key in self.methods]
        lost = [name for name in names if self.run.number(name) is None]
        return [f"{self.title}: {self.run.folder} has no finite {', '.join(lost)}."] if lost else []


def read_references(root: Path, content: Mapping[str, Any], sha256: str) -> References:
    """Read the references of a study.

    Args:
        root: Folder of the study.
        content: The field `references` of study.json.
        sha256: Checksum of the study's data.

    Returns:
        The references; their run may be missing or failed.

    Raises:
        KeyError: If the field is not complete.
        StudyError: If a file of the run has an unknown schema.
    """
    run = read_run(root, {"folder": content["folder"], "cell": "", "seed": 0}, None, sha256)
    methods = {method["key"]: str(method["label"]) for method in content["methods"]}
    return References(str(content["title"]), methods, dict(content["metrics"]), run)
