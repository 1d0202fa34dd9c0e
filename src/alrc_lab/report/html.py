"""Write a study's report: one self-contained page, its figures and its tables.

The page needs nothing but itself: figures and style are inside it, and the links to PNG, SVG and CSV are relative.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from alrc_lab.report import agreement, plots, tables
from alrc_lab.report.canvas import save, save_picture
from alrc_lab.report.collect import Run, Study, load
from alrc_lab.report.overview import LEGEND, overview, reference_lines, reference_title


def build(root: Path) -> Path:
    """Write root/report from the run folders of a study, as far as they are.

    The same folders give the same bytes, so a report can be compared and kept under version control.

    Args:
        root: Folder of the study, the DIR of `alrc sweep --out DIR`.

    Returns:
        Path of the page, root/report/index.html; beside it are `figures/` (PNG and SVG) and `tables/` (CSV).

    Raises:
        StudyError: If the study cannot be read; nothing is written then.
    """
    study = load(Path(root))
    path = tables.report_path(study)
    figures = []
    for drawing in plots.draw(study):
        if drawing.is_picture:
            file, kind = save_picture(drawing, path.parent / "figures"), "png"
        else:
            _, file = save(drawing, path.parent / "figures")
            kind = "svg+xml"
        image = base64.b64encode(file.read_bytes()).decode("ascii")
        figures.append({"drawing": drawing, "image": f"data:image/{kind};base64,{image}"})
    tables.write_csv(study, path.parent / "tables")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("template.html").render(
        study=study,
        figures=figures,
        blocks=[block for metric in study.metrics for block in _blocks(study, metric)],
        overviews=[(title, found) for panel, title in study.panels.items() if (found := overview(study, panel))],
        overview_legend=LEGEND,
        agreement=_agreement(study),
        reference_title=reference_title(study),
        runs=_run_lines(study),
        remarks=tables.remarks(study),
        data_line=tables.data_line(study, digits=64),
        counts=tables.counts_sentence(study),
        heading=tables.heading(study),
        software=_software(study),
        short_id=short_id,
    )
    path.write_text(page, encoding="utf-8")
    return path


def _blocks(study: Study, metric: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Lay out a metric of each panel: its rows, its verdicts, and a grid where it has several columns."""
    rows, blocks = tables.tabulate(study, metric), []
    for panel, title in study.panels.items():
        inside = [row for row in rows if row.cell.panel == panel]
        if not tables.is_worth_showing(study, inside):
            continue
        is_grid = tables.is_grid(study, panel)
        places, percent = tables.decimals(inside), tables.percent_decimals(inside)
        is_published = any(row.published for row in inside)
        columns = list(dict.fromkeys(row.cell.column for row in inside))
        baselines = list(dict.fromkeys(tables.label(row.baseline.row) for row in inside if row.baseline))
        at = {(row.cell.row, row.cell.column): tables.grid_cell(row, places) for row in inside}
        blocks.append(
            {
                "title": title if is_grid else ", ".join(filter(None, (title, inside[0].cell.column))),
                "metric": metric,
                "is_first": metric is study.metric,
                "is_grid": is_grid,
                "shows_grid": is_grid and len(study.metrics) == 1,  # the table of all metrics says the same
                "is_published": is_published,
                "columns": columns,
                "grid": [
                    {"row": tables.row_label(study, name), "cells": [at.get((name, column)) for column in columns]}
                    for name in dict.fromkeys(row.cell.row for row in inside)
                ],
                "rows": [tables.cells(row, places, percent) for row in inside],
                "baselines": baselines,
                "references": reference_lines(study, metric, places),
                "before": 4 if metric is study.metric else 1,  # columns of a table before the mean
                "after": is_published + (5 + (len(baselines) > 1)) * bool(baselines),  # and after its interval
                "verdicts": [sentence for row in inside if (sentence := tables.verdict(study, row))],
            }
        )
    return blocks


def _agreement(study: Study) -> dict[str, Any] | None:
    """Lay out how the study agrees with what was published of it; None if nothing was."""
    found = agreement.agree(study)
    if found is None:
        return None
    panels = [
        {
            "title": agreement.title(study, found, panel),
            "is_grid": tables.is_grid(study, panel),
            "lines": agreement.lines(found, panel),
        }
        for panel in study.panels
    ]
    return {
        "sentences": agreement.sentences(study, found),
        "legend": agreement.legend(found) if found.comparisons else "",
        "panels": [panel for panel in panels if panel["lines"]],
    }


def _run_lines(study: Study) -> list[dict[str, Any]]:
    """Write the table of all runs; a value has one digit more than its mean."""
    rows = tables.tabulate(study)
    places = {panel: tables.decimals(row for row in rows if row.cell.panel == panel) + 1 for panel in study.panels}
    return [_run_line(study, run, places[study.cells[run.cell].panel]) for run in study.runs]


def _run_line(study: Study, run: Run, places: int) -> dict[str, Any]:
    """Write what the table of runs says about one run; what is unknown is a dash."""
    cell = study.cells[run.cell]
    environment = run.environment
    commit = (environment.get("git") or {}).get("commit")
    version = str(environment.get("code_version") or tables.UNDEFINED)
    return {
        "id": short_id(run),
        "folder": run.folder,
        "setting": ", ".join(filter(None, (study.panels[cell.panel], cell.column, tables.label(cell.row)))),
        "seed": run.seed,
        "status": run.status,
        "detail": run.detail,
        "value": tables.number(study.value(run, study.metric), places),
        "wall": tables.UNDEFINED if run.wall_s is None else duration(run.wall_s),
        "version": f"{version} ({commit[:10]})" if commit else version,
        "hardware": run.hardware or tables.UNDEFINED,
    }


def short_id(run: Run) -> str:
    """Give the first ten digits of a run's identity; the folder's name where it has none yet."""
    return run.identity[:10] or run.folder.rsplit("/", 1)[-1]


def duration(seconds: float) -> str:
    """Write a duration for people.

    Example:
        >>> duration(41.25), duration(75), duration(3_900)
        ('41.2 s', '1 min 15 s', '1 h 05 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _software(study: Study) -> list[str]:
    """List what the runs were made with, each with the number of runs."""
    counts: Counter[str] = Counter()
    for run in study.runs:
        environment = run.environment
        if environment:
            named = {"Python": environment.get("python"), **(environment.get("libraries") or {})}
            versions = ", ".join(f"{key} {value}" for key, value in named.items() if value)
            counts[f"{versions}; {environment.get('platform', 'unknown platform')}"] += 1
    return [f"{line} ({count} runs)" for line, count in sorted(counts.items())]
