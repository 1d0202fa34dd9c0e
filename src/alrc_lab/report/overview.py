"""Gather every metric of a study in one small table, because a table for each of them hides the answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alrc_lab.report import tables
from alrc_lab.report.collect import Study
from alrc_lab.report.words import NBSP, UNDEFINED, number, plus_minus

LEGEND = (
    f"Mean ± standard deviation of one run. ↓ and ↑: below or above its baseline, p < {tables.SIGNIFICANT:g} in a "
    "paired test, not corrected for the number of comparisons."
)


@dataclass(frozen=True)
class Overview:
    """Hold the table of one panel: a line for each setting, then one for each method without training.

    Attributes:
        head: Label of each metric.
        settings: Name of each cell and its numbers, one for each metric.
        references: The same of each reference; "" where it does not have the metric.
        references_title: What the references have in common; "" if there is none to show.
    """

    head: tuple[str, ...]
    settings: tuple[tuple[str, tuple[str, ...]], ...]
    references: tuple[tuple[str, tuple[str, ...]], ...]
    references_title: str


def overview(study: Study, panel: str) -> Overview | None:
    """Gather all metrics of a panel; None if it has but one, whose own table says it all, or no result."""
    inside = [cell.id for cell in study.cells.values() if cell.panel == panel]
    if len(study.metrics) == 1 or not (study.references or any(map(study.values, inside))):
        return None
    columns = [[row for row in tables.tabulate(study, metric) if row.cell.panel == panel] for metric in study.metrics]
    places = [tables.decimals(rows) for rows in columns]
    settings = [
        (tables.name(study, rows[0].cell) + _lost(rows[0]), tuple(map(_text, rows, places)))
        for rows in zip(*columns, strict=True)
    ]
    references = []
    if study.references:
        found = [study.references.values(metric) for metric in study.metrics]
        for key, label in study.references.methods.items() if any(found) else ():
            texts = [number(values[key], n) if key in values else "" for values, n in zip(found, places, strict=True)]
            references.append((label, tuple(texts)))
    head = tuple(metric["label"] for metric in study.metrics)
    return Overview(head, tuple(settings), tuple(references), reference_title(study))


def reference_title(study: Study) -> str:
    """Head the references' part of a table: what they are, what their numbers are taken over; "" without numbers."""
    if study.references is None or not any(map(study.references.values, study.metrics)):
        return ""
    return f"{study.references.title} (no training, no seed: one mean over {study.references.crops})"


def reference_lines(study: Study, metric: Mapping[str, Any], places: int) -> list[tuple[str, str]]:
    """Write each reference's value of a metric; empty if it has none."""
    if study.references is None:
        return []
    values = study.references.values(metric)
    return [(study.references.methods[key], number(value, places)) for key, value in values.items()]


def _text(row: tables.Row, places: int) -> str:
    """Write mean ± standard deviation with an arrow where the setting differs from its baseline."""
    text, difference = plus_minus(row.estimate.mean, row.estimate.std, places), row.difference
    if difference is None or difference.mean is None or difference.p_value is None:
        return text
    if difference.p_value >= tables.SIGNIFICANT or text == UNDEFINED:
        return text
    return f"{text}{NBSP}{'↓' if difference.mean < 0 else '↑'}"


def _lost(row: tables.Row) -> str:
    """Mark a setting that lost runs to divergence."""
    return f"{NBSP}{tables.MARK}" * bool(row.count("diverged"))
