"""Turn a study into rows of numbers, and those into words, CSV and JSON.

Text, HTML, CSV and JSON all start from `tabulate`, so they cannot disagree. Numbers are rounded here and only for
people: CSV and JSON carry them in full.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alrc_lab.report.collect import STATUSES, Cell, Published, Run, Study
from alrc_lab.report.stats import Estimate, PairedDifference, paired, summarise
from alrc_lab.report.words import NBSP, UNDEFINED, interval, label, lower_first, number, p_value, plain, plus_minus

SIGNIFICANT = 0.05
MARK = "†"


@dataclass(frozen=True)
class Row:
    """Hold all there is to say about one cell and one metric, in the metric's printed unit."""

    cell: Cell
    label: str
    baseline: Cell | None
    estimate: Estimate
    difference: PairedDifference | None
    runs: tuple[Run, ...]
    metric: Mapping[str, Any]
    published: Published | None

    def count(self, status: str) -> int:
        """Count the cell's runs of one status."""
        return sum(run.status == status for run in self.runs)


def tabulate(study: Study, metric: Mapping[str, Any] | None = None) -> list[Row]:
    """Summarise a metric, by default the first, of every cell and compare it with its baseline, in the study's order.

    A metric of which neither less nor more is better only describes: it is not compared.
    """
    metric, rows = metric or study.metric, []
    for cell in study.cells.values():
        values = study.values(cell.id, metric)
        baseline = study.cells[cell.baseline] if cell.baseline is not None and metric["better"] else None
        difference = paired(values, study.values(baseline.id, metric)) if baseline else None
        estimate = summarise([values[seed] for seed in sorted(values)])
        published = cell.published if metric is study.metric else None
        named, runs = row_label(study, cell.row), tuple(study.runs_of(cell.id))
        rows.append(Row(cell, named, baseline, estimate, difference, runs, metric, published))
    return rows


def decimals(rows: Iterable[Row]) -> int:
    """Choose the decimals that show three digits of every mean and one of every half interval; of counts, one."""
    rows, places = list(rows), 0
    for row in rows:
        estimate = row.estimate
        if estimate.mean:
            places = max(places, 2 - math.floor(math.log10(abs(estimate.mean))))
        if estimate.high is not None and estimate.mean is not None and estimate.high > estimate.mean:
            places = max(places, -math.floor(math.log10(estimate.high - estimate.mean)))
        if row.published:
            places = max(places, 2 - math.floor(math.log10(abs(row.published.mean) or 1)))
    return min(max(places, 0), 1 if _are_counts(rows) else 6)


def percent_decimals(rows: Iterable[Row]) -> int:
    """Choose one decimal for percentages, two where every interval stays below 1 %."""
    ends: list[float] = []
    for row in rows:
        if row.difference:
            ends += [x for x in map(row.difference.in_percent, _ends(row.difference)) if x is not None]
    return 2 if ends and max(map(abs, ends)) < 1 else 1


def heading(study: Study) -> str:
    """Name the column of row labels: n if every label is a number or ∞."""
    return "n" if all(label(cell.row) != cell.row for cell in study.cells.values()) else ""


def row_label(study: Study, row: str) -> str:
    """Write a row label in a table: under the heading n as it is, else as in a sentence."""
    return row if heading(study) else label(row)


def is_worth_showing(study: Study, rows: Sequence[Row]) -> bool:
    """Tell whether the rows of a panel have a cell and, unless they are of the first metric, a finished run."""
    return any(row.metric is study.metric or row.count("finished") for row in rows)


def is_grid(study: Study, panel: str) -> bool:
    """Tell whether a panel compares several columns, such as batch sizes."""
    return len({cell.column for cell in study.cells.values() if cell.panel == panel}) > 1


def baselines_of(study: Study, panel: str) -> list[str]:
    """List the row labels that cells of a panel are compared with."""
    found = (study.cells[cell.baseline] for cell in study.cells.values() if cell.panel == panel and cell.baseline)
    return list(dict.fromkeys(cell.row for cell in found))


def name(study: Study, cell: Cell) -> str:
    """Name a cell within its panel: the row label, after the column where there are several."""
    several = is_grid(study, cell.panel) and cell.column
    return f"{cell.column}, {label(cell.row)}" if several else label(cell.row)


def cells(row: Row, places: int, percent_places: int) -> dict[str, str]:
    """Write a row's numbers for people, by column key; comparisons are empty for a baseline."""
    estimate, difference, printed = row.estimate, row.difference, row.published
    diverged = row.count("diverged")
    texts = {
        "column": row.cell.column,
        "label": row.label + f"{NBSP}{MARK}" * bool(diverged),
        "runs": f"{estimate.n}",
        "mean": number(estimate.mean, places),
        "std": number(estimate.std, places + 1),
        "interval": interval(estimate.low, estimate.high, places),
        "published": plus_minus(printed.mean, printed.std, places) if printed else UNDEFINED,
        **{status: str(row.count(status)) for status in STATUSES},
        "pairs": "",
        "against": label(row.baseline.row) if row.baseline else "",
        "difference": "baseline" if row.baseline is None and row.metric["better"] else "",
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
    what, where = name(study, row.cell), _subject(study, row)
    against = f" against {label(row.baseline.row)}" * (len(baselines_of(study, row.cell.panel)) > 1)
    if difference.n < 2 or difference.p_value is None:
        reason = f"{difference.n} pair{'s' * (difference.n != 1)} of finished runs, two are needed"
        if difference.n >= 2:
            reason = f"{difference.n} pairs differ by exactly the same amount, which leaves nothing to test"
        return f"{what}: no verdict on the {where}{against} ({reason})."
    places, unit = percent_decimals([row]), "%"
    mean, low, high = (difference.in_percent(x) or 0.0 for x in _ends(difference))
    tail = f"{against}, {p_value(difference.p_value, named=True)}, {difference.n}{NBSP}pairs"
    if difference.mean == 0 and difference.p_value == 1:
        return f"{what}: no change in the {where} from {label(row.baseline.row)} in any of {difference.n} pairs."
    if difference.relative is None:  # nothing can be given in percent of a baseline of 0
        mean, low, high = (x or 0.0 for x in _ends(difference))
        places, unit = decimals([row]), "(the baseline is 0)"
    if difference.p_value >= SIGNIFICANT:
        spread = f"{number(mean, places, signed=True)} {unit} {interval(low, high, places, signed=True)}"
        return f"{what}: no difference in the {where} detected: {spread}{tail}."
    falls = mean < 0
    low, high = (-high, -low) if falls else (low, high)
    verb = "lowers" if falls else "raises"
    change = f"{number(abs(mean), places)}{NBSP}{unit}"
    return f"{what} {verb} the {where} by {change} {interval(low, high, places)}{tail}."


def counts_sentence(study: Study) -> str:
    """Say how many runs there are and what became of them."""
    counts = study.counts
    lost = ", ".join(f"{counts[status]} {status}" for status in STATUSES[1:])
    return f"{counts['finished']} of {len(study.runs)} runs finished; {lost}."


def remarks(study: Study) -> list[str]:
    """Say what the numbers leave out: diverged, failed and missing runs, undefined intervals, comparability."""
    rows, found = tabulate(study), []
    compared = [row for metric in study.metrics for row in tabulate(study, metric) if row.difference is not None]
    for row in rows:
        gone = [f"seed {run.seed} {run.detail}" for run in row.runs if run.status == "diverged"]
        if gone:
            where = f"{MARK} {_place(study, row.cell)}: {', '.join(gone)}"
            found.append(f"{where}; not in the mean, which is over the survivors alone.")
    for row in rows:
        broken = [f"seed {run.seed} ({run.detail})" for run in row.runs if run.status == "failed"]
        if broken:
            found.append(f"Failed, {_place(study, row.cell)}: {', '.join(broken)}.")
    for metric in study.further_metrics:
        for cell in study.cells.values():
            without = [run for run in study.runs_of(cell.id, "finished") if study.value(run, metric) is None]
            if without:
                seeds = ", ".join(f"seed {run.seed}" for run in without)
                what = f"{metric['label']}, {_place(study, cell)}"
                found.append(f"{what}: no finite {metric['key']} from {seeds}; not in that mean.")
    if any(row.estimate.n == 1 for row in rows):
        found.append("One run has no interval: at least two are needed.")
    if any(row.difference and row.difference.n > 1 for row in rows):
        found.append(
            "Intervals are 95 % t intervals; differences are paired by seed; p-values are two-sided and not corrected "
            f"for the number of comparisons ({len(compared)})."
        )
    if study.references:
        if any(map(study.references.values, study.metrics)):
            found.append(
                f"{study.references.title}: each number is one mean over {study.references.crops}, without training or "
                "seed. It has no interval over seeds, and n crops are not n runs."
            )
        found += study.references.complaints()
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
    further = {metric["key"]: tabulate(study, metric) for metric in study.further_metrics}
    for i, row in enumerate(tabulate(study)):
        counts = {status: row.count(status) for status in STATUSES}
        record = asdict(row.cell) | {"estimate": None, "runs": counts} | _judged(study, row)
        if further:
            record["metrics"] = {key: _judged(study, found[i]) for key, found in further.items()}
        rows.append(record)
    references = study.references
    several: dict[str, Any] = {"metrics": [dict(metric) for metric in study.metrics]} if further else {}
    if references:
        values = {metric["key"]: references.values(metric) for metric in study.metrics}
        several["references"] = {
            "title": references.title,
            "methods": dict(references.methods),
            "folder": references.run.folder,
            "status": references.run.status,
            "crops": references.run.steps,
            "values": {key: found for key, found in values.items() if found},
        }
    return {
        "study": study.name,
        "preset": study.preset,
        "title": study.title,
        "question": study.question,
        "data": dict(study.data),
        "metric": dict(study.metric),
        **several,
        "counts": study.counts,
        "cells": rows,
        "runs": [_run_record(study, run) for run in study.runs],
        "remarks": [plain(remark) for remark in remarks(study)],
        "differences": list(study.differences),
        "notes": list(study.notes),
        "report": str(report_path(study)) if report_path(study).is_file() else None,
    }


def write_csv(study: Study, folder: Path) -> list[Path]:
    """Write summary.csv, runs.csv and, where a study has references, references.csv; return their paths.

    A line of the summary is a cell and, where a study has several metrics, one of them; a line of runs.csv is a run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    summary, several = [], len(study.metrics) > 1
    for row in (row for metric in study.metrics for row in tabulate(study, metric)):
        cell, difference, printed = row.cell, row.difference, row.published
        record: dict[str, Any] = {"metric": row.metric["key"], "label": row.metric["label"]} if several else {}
        record |= {"panel": cell.panel, "column": cell.column, "row": cell.row, "baseline": cell.baseline}
        record |= {status: row.count(status) for status in STATUSES}
        record |= {"n": row.estimate.n} if several else {}
        record |= {key: value for key, value in asdict(row.estimate).items() if key != "n"}
        for key in ("n", "mean", "low", "high", "relative", "p_value"):
            record[f"difference_{key}"] = getattr(difference, key) if difference else None
        record |= {f"published_{key}": getattr(printed, key) if printed else None for key in ("mean", "std", "n")}
        summary.append(record)
    tables = {"summary": summary, "runs": [_run_record(study, run) for run in study.runs]}
    if study.references and any(map(study.references.values, study.metrics)):
        tables["references"] = [
            {"metric": metric["key"], "label": metric["label"], "method": key, "title": study.references.methods[key]}
            | {"value": value, "crops": study.references.run.steps}
            for metric in study.metrics
            for key, value in study.references.values(metric).items()
        ]
    paths = [folder / f"{name}.csv" for name in tables]
    for path, records in zip(paths, tables.values(), strict=True):
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
    """Flatten a run for CSV and JSON; its values are in the printed unit, further ones under their keys."""
    record = {
        "folder": run.folder,
        "identity": run.identity,
        "cell": run.cell,
        "seed": run.seed,
        "status": run.status,
        "value": study.value(run, study.metric),
        "detail": run.detail,
        "steps": run.steps,
        "wall_s": run.wall_s,
        "code_version": run.environment.get("code_version"),
        "hardware": run.hardware,
    }
    further = {metric["key"]: study.value(run, metric) for metric in study.further_metrics}
    return record | {key: value for key, value in further.items() if key not in record}


def _judged(study: Study, row: Row) -> dict[str, Any]:
    """Give estimate, difference and verdict as JSON values."""
    difference = asdict(row.difference) if row.difference else None
    return {"estimate": asdict(row.estimate), "difference": difference, "verdict": plain(verdict(study, row))}


def _are_counts(rows: Sequence[Row]) -> bool:
    """Tell whether a metric counts something: all its values are whole, and not all are 0."""
    values = [run.number(row.metric["key"]) for row in rows for run in row.runs if row.metric["factor"] == 1]
    found = [value for value in values if value is not None]
    return any(found) and all(value == round(value) for value in found)


def _ends(difference: PairedDifference) -> Sequence[float | None]:
    """List mean, low and high."""
    return difference.mean, difference.low, difference.high


def _place(study: Study, cell: Cell) -> str:
    """Name a cell within the study."""
    return f"{lower_first(study.panels[cell.panel])}, {name(study, cell)}"


def _subject(study: Study, row: Row) -> str:
    """Name in a sentence what is compared: the panel, or of several metrics the metric without its unit or factor."""
    panel = lower_first(study.panels[row.cell.panel])
    if len(study.metrics) == 1:
        return panel
    metric = lower_first(re.sub(r"[ ,(]*%\)?$| × \d+$", "", row.metric["label"]))
    return f"{metric} ({panel})" if len(study.panels) > 1 else metric
