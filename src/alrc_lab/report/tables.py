"""Turn a study into rows of numbers, and those into words, CSV and JSON.

Text, HTML, CSV and JSON all start from `tabulate`, so they cannot disagree. Numbers are rounded here and only for
people: CSV and JSON carry them in full.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alrc_lab.report.collect import STATUSES, Cell, Run, Study
from alrc_lab.report.stats import Estimate, PairedDifference, paired, summarise

SIGNIFICANT = 0.05
UNDEFINED = "–"
MARK = "†"
NBSP = "\u00a0"  # keeps a number together with its sign, unit or partner


@dataclass(frozen=True)
class Row:
    """Hold all there is to say about one cell, in the metric's printed unit."""

    cell: Cell
    baseline: Cell | None
    estimate: Estimate
    difference: PairedDifference | None
    runs: tuple[Run, ...]

    def count(self, status: str) -> int:
        """Count the cell's runs of one status."""
        return sum(run.status == status for run in self.runs)


def tabulate(study: Study) -> list[Row]:
    """Summarise every cell and compare it with its baseline, in the study's order."""
    rows = []
    for cell in study.cells.values():
        values = study.values(cell.id)
        baseline = study.cells[cell.baseline] if cell.baseline is not None else None
        difference = paired(values, study.values(baseline.id)) if baseline else None
        estimate = summarise([values[seed] for seed in sorted(values)])
        rows.append(Row(cell, baseline, estimate, difference, tuple(study.runs_of(cell.id))))
    return rows


def number(value: float | None, places: int, *, signed: bool = False) -> str:
    """Write a number with fixed decimals and a true minus sign; a dash where it is undefined.

    Example:
        >>> number(-0.251, 2), number(0.251, 2, signed=True), number(-0.001, 2), number(None, 2)
        ('−0.25', '+0.25', '0.00', '–')
    """
    if value is None:
        return UNDEFINED
    rounded = round(value, places)
    if rounded == 0:
        return f"{0:.{places}f}"
    if abs(rounded) >= 1e6:
        return f"{value:.2e}".replace("-", "−")
    return f"{rounded:{'+' if signed else ''}.{places}f}".replace("-", "−")


def interval(low: float | None, high: float | None, places: int, *, signed: bool = False) -> str:
    """Write an interval in brackets; a dash where it is undefined."""
    if low is None or high is None:
        return UNDEFINED
    return f"[{number(low, places, signed=signed)},{NBSP}{number(high, places, signed=signed)}]"


def p_value(p: float | None, *, named: bool = False) -> str:
    """Write a p-value with three decimals; with `named`, as an equation."""
    if p is None:
        return "p undefined" if named else UNDEFINED
    small = p < 0.001
    written = "0.001" if small else f"{p:.3f}"
    sign = "<" if small else "="
    if named:
        return f"p{NBSP}{sign}{NBSP}{written}"
    return f"<{NBSP}{written}" if small else written


def plus_minus(mean: float | None, std: float | None, places: int) -> str:
    """Write mean ± standard deviation, the latter with one more decimal; without it, the mean alone."""
    if std is None:
        return number(mean, places)
    return f"{number(mean, places)}{NBSP}±{NBSP}{number(std, places + 1)}"


def decimals(rows: Iterable[Row]) -> int:
    """Choose the decimals that show three digits of every mean and one of every half interval."""
    places = 0
    for row in rows:
        estimate = row.estimate
        if estimate.mean:
            places = max(places, 2 - math.floor(math.log10(abs(estimate.mean))))
        if estimate.high is not None and estimate.mean is not None and estimate.high > estimate.mean:
            places = max(places, -math.floor(math.log10(estimate.high - estimate.mean)))
        if row.cell.published:
            places = max(places, 2 - math.floor(math.log10(abs(row.cell.published.mean) or 1)))
    return min(max(places, 0), 6)


def percent_decimals(rows: Iterable[Row]) -> int:
    """Choose one decimal for percentages, two where every interval stays below 1 %."""
    ends: list[float] = []
    for row in rows:
        if row.difference:
            ends += [x for x in map(row.difference.in_percent, _ends(row.difference)) if x is not None]
    return 2 if ends and max(map(abs, ends)) < 1 else 1


def plain(text: str) -> str:
    """Replace the spaces that must not break by ordinary ones, for terminals and files."""
    return text.replace(NBSP, " ")


def label(row: str) -> str:
    """Write a row label in a sentence: a bare number or ∞ is a number of standard deviations n.

    Example:
        >>> print(plain(label("3")), label("Huber"), sep="; ")
        n = 3; Huber
    """
    return f"n{NBSP}={NBSP}{row}" if row == "∞" or row.replace(".", "", 1).isdigit() else row


def heading(study: Study) -> str:
    """Name the column of row labels: n if every label is a number or ∞."""
    return "n" if all(label(cell.row) != cell.row for cell in study.cells.values()) else ""


def is_grid(study: Study, panel: str) -> bool:
    """Tell whether a panel compares several columns, such as batch sizes."""
    return len({cell.column for cell in study.cells.values() if cell.panel == panel}) > 1


def name(study: Study, cell: Cell) -> str:
    """Name a cell within its panel: the row label, after the column where there are several."""
    several = is_grid(study, cell.panel) and cell.column
    return f"{cell.column}, {label(cell.row)}" if several else label(cell.row)


def cells(row: Row, places: int, percent_places: int) -> dict[str, str]:
    """Write a row's numbers for people, by column key; comparisons are empty for a baseline."""
    estimate, difference, printed = row.estimate, row.difference, row.cell.published
    diverged = row.count("diverged")
    texts = {
        "column": row.cell.column,
        "label": row.cell.row + f"{NBSP}{MARK}" * bool(diverged),
        "runs": f"{estimate.n}",
        "mean": number(estimate.mean, places),
        "std": number(estimate.std, places + 1),
        "interval": interval(estimate.low, estimate.high, places),
        "published": plus_minus(printed.mean, printed.std, places) if printed else UNDEFINED,
        **{status: str(row.count(status)) for status in STATUSES},
        "pairs": "",
        "difference": "baseline" if row.baseline is None else "",
        "difference_interval": "",
        "relative": "",
        "p": "",
    }
    if difference:
        percent = difference.in_percent(difference.mean)
        texts |= {
            "pairs": f"{difference.n}",
            "difference": number(difference.mean, places, signed=True),
            "difference_interval": interval(difference.low, difference.high, places, signed=True),
            "relative": number(percent, percent_places, signed=True) + f"{NBSP}%" * (percent is not None),
            "p": p_value(difference.p_value),
        }
    return texts


def grid_cell(row: Row, places: int) -> tuple[str, str]:
    """Write a cell as a paper prints it: ours and published, each mean ± standard deviation."""
    texts = cells(row, places, 1)
    marked = f"{NBSP}{MARK}" * bool(row.count("diverged"))
    return plus_minus(row.estimate.mean, row.estimate.std, places) + marked, texts["published"]


def verdict(study: Study, row: Row) -> str:
    """Say in one sentence what a comparison shows, from its numbers alone; "" for a baseline."""
    difference = row.difference
    if difference is None or row.baseline is None:
        return ""
    what, where = name(study, row.cell), _lower_first(study.panels[row.cell.panel])
    if difference.n < 2 or difference.p_value is None or difference.relative is None:
        reason = f"{difference.n} pair{'s' * (difference.n != 1)} of finished runs, two are needed"
        if difference.n >= 2:
            reason = f"{difference.n} pairs differ by exactly the same amount, which leaves nothing to test"
        return f"{what}: no verdict on the {where} ({reason})."
    places = percent_decimals([row])
    mean, low, high = (difference.in_percent(x) or 0.0 for x in _ends(difference))
    tail = f"{p_value(difference.p_value, named=True)}, {difference.n}{NBSP}pairs"
    if difference.mean == 0 and difference.p_value == 1:
        return f"{what}: the {where} equals that of {label(row.baseline.row)} in each of {difference.n} pairs."
    if difference.p_value >= SIGNIFICANT:
        spread = interval(low, high, places, signed=True)
        return f"{what}: no difference in the {where} detected: {number(mean, places, signed=True)} % {spread}, {tail}."
    falls = mean < 0
    low, high = (-high, -low) if falls else (low, high)
    verb = "lowers" if falls else "raises"
    change = f"{number(abs(mean), places)}{NBSP}%"
    return f"{what} {verb} the {where} by {change} {interval(low, high, places)}, {tail}."


def counts_sentence(study: Study) -> str:
    """Say how many runs there are and what became of them."""
    counts = study.counts
    lost = ", ".join(f"{counts[status]} {status}" for status in STATUSES[1:])
    return f"{counts['finished']} of {len(study.runs)} runs finished; {lost}."


def remarks(study: Study) -> list[str]:
    """Say what the numbers leave out: diverged, failed and missing runs, undefined intervals, comparability."""
    rows, found = tabulate(study), []
    for row in rows:
        gone = [f"seed {run.seed} {run.detail}" for run in row.runs if run.status == "diverged"]
        if gone:
            where = f"{MARK} {_place(study, row.cell)}: {', '.join(gone)}"
            found.append(f"{where}; not in the mean, which is over the survivors alone.")
    for row in rows:
        broken = [f"seed {run.seed} ({run.detail})" for run in row.runs if run.status == "failed"]
        if broken:
            found.append(f"Failed, {_place(study, row.cell)}: {', '.join(broken)}.")
    if any(row.estimate.n == 1 for row in rows):
        found.append("One run has no interval: at least two are needed.")
    if any(row.difference and row.difference.n > 1 for row in rows):
        found.append(
            "Intervals are 95 % t intervals; differences are paired by seed; p-values are two-sided and not corrected "
            f"for the number of comparisons ({sum(row.difference is not None for row in rows)})."
        )
    if not study.follows_publication and any(row.cell.published for row in rows):
        found.append("Published values are beside ours for orientation: the protocols differ, see below.")
    return [*found, *study.warnings]


def data_line(study: Study, digits: int = 12) -> str:
    """Name the data of a study: name, image count, checksum, source."""
    data = study.data
    return f"Data: {data['name']} · {data['images']:,} images · sha256 {data['sha256'][:digits]} · {data['source']}"


def to_json(study: Study) -> dict[str, Any]:
    """Give everything the report says as plain JSON values; undefined numbers are null."""
    rows = []
    for row in tabulate(study):
        cell = asdict(row.cell)
        counts = {status: row.count(status) for status in STATUSES}
        rows.append(
            cell
            | {"estimate": asdict(row.estimate), "runs": counts}
            | {
                "difference": asdict(row.difference) if row.difference else None,
                "verdict": plain(verdict(study, row)),
            }
        )
    return {
        "study": study.name,
        "preset": study.preset,
        "title": study.title,
        "question": study.question,
        "data": dict(study.data),
        "metric": dict(study.metric),
        "counts": study.counts,
        "cells": rows,
        "runs": [_run_record(study, run) for run in study.runs],
        "remarks": [plain(remark) for remark in remarks(study)],
        "differences": list(study.differences),
        "notes": list(study.notes),
        "report": str(report_path(study)) if report_path(study).is_file() else None,
    }


def write_csv(study: Study, folder: Path) -> list[Path]:
    """Write summary.csv (one line a cell) and runs.csv (one line a run); return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    summary = []
    for row in tabulate(study):
        cell, difference, printed = row.cell, row.difference, row.cell.published
        record = {"panel": cell.panel, "column": cell.column, "row": cell.row, "baseline": cell.baseline}
        record |= {status: row.count(status) for status in STATUSES}
        record |= {key: value for key, value in asdict(row.estimate).items() if key != "n"}
        for key in ("n", "mean", "low", "high", "relative", "p_value"):
            record[f"difference_{key}"] = getattr(difference, key) if difference else None
        record |= {f"published_{key}": getattr(printed, key) if printed else None for key in ("mean", "std", "n")}
        summary.append(record)
    paths = [folder / "summary.csv", folder / "runs.csv"]
    for path, records in zip(paths, (summary, [_run_record(study, run) for run in study.runs]), strict=True):
        with path.open("w", newline="", encoding="utf-8") as file:
            fields = list(records[0]) if records else []
            writer = csv.DictWriter(file, fields, lineterminator="\n")
            writer.writeheader()
            writer.writerows(records)
    return paths


def report_path(study: Study) -> Path:
    """Name the page that `build` writes."""
    return study.root / "report" / "index.html"


def _run_record(study: Study, run: Run) -> dict[str, Any]:
    """Flatten a run for CSV and JSON; its value is in the printed unit."""
    value = None if run.value is None else run.value * study.metric["factor"]
    return {
        "folder": run.folder,
        "identity": run.identity,
        "cell": run.cell,
        "seed": run.seed,
        "status": run.status,
        "value": value,
        "detail": run.detail,
        "steps": run.steps,
        "wall_s": run.wall_s,
        "code_version": run.environment.get("code_version"),
        "hardware": run.hardware,
    }


def _ends(difference: PairedDifference) -> Sequence[float | None]:
    """List mean, low and high."""
    return difference.mean, difference.low, difference.high


def _place(study: Study, cell: Cell) -> str:
    """Name a cell within the study."""
    return f"{_lower_first(study.panels[cell.panel])}, {name(study, cell)}"


def _lower_first(text: str) -> str:
    """Begin a title in lower case, for use within a sentence."""
    return text[:1].lower() + text[1:]
