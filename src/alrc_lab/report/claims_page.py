"""Write the page of a study of claims: its headline figure, then each experiment with its figure and its verdicts.

The page needs nothing but itself: figures and style are inside it, and the links to PNG, SVG and CSV are relative.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import jinja2

from alrc_lab.report import claims_words as words
from alrc_lab.report.canvas import Drawing, save
from alrc_lab.report.claims import VERDICTS, ClaimsStudy, Condition, load
from alrc_lab.report.claims_plots import draw
from alrc_lab.report.claims_verdicts import Judgement, judge
from alrc_lab.report.html import duration, short_id
from alrc_lab.report.words import UNDEFINED

_HEADLINE = "bias"  # the experiment with this figure is shown first


def build(root: Path) -> Path:
    """Write root/report from the run folders of a study of claims, as far as they are.

    The same folders give the same bytes, so a report can be compared and kept under version control.

    Args:
        root: Folder of the study, the DIR of `alrc sweep --out DIR`.

    Returns:
        Path of the page, root/report/index.html; beside it are `figures/` (PNG and SVG) and `tables/claims.csv`.

    Raises:
        StudyError: If the study cannot be read; nothing is written then.
    """
    study = load(Path(root))
    judgements, path = judge(study), words.report_path(study)
    figures = {
        experiment: [_embed(drawing, path.parent / "figures") for drawing in drawings]
        for experiment, drawings in draw(study).items()
    }
    words.write_csv(study, path.parent / "tables")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    top = [key for key, experiment in study.experiments.items() if experiment.figure == _HEADLINE and key in figures]
    page = environment.get_template("claims.html").render(
        study=study,
        data_line=words.data_line(study, digits=64),
        counts_sentence=words.counts_sentence(study, judgements),
        alarms=words.alarms(study, judgements),
        headline=[figure for key in top for figure in figures[key]],
        verdicts=VERDICTS,
        meanings=words.MEANINGS,
        remarks=words.remarks(study, judgements),
        corrections=words.corrections(study, judgements),
        sections=[
            _section(study, key, judgements, figures.get(key, []), is_top=key in top) for key in study.experiments
        ],
        runs=[_run_line(study, cell) for cell in study.runs],
    )
    path.write_text(page.lstrip(), encoding="utf-8")
    return path


def _embed(drawing: Drawing, folder: Path) -> dict[str, Any]:
    """Write a figure and return it with its picture as the page holds it."""
    _, svg = save(drawing, folder)
    image = base64.b64encode(svg.read_bytes()).decode("ascii")
    return {"drawing": drawing, "image": f"data:image/svg+xml;base64,{image}"}


def _section(
    study: ClaimsStudy, key: str, judgements: list[Judgement], figures: list[dict[str, Any]], *, is_top: bool
) -> dict[str, Any]:
    """Lay out one experiment: its figures, unless they stand at the top, and its claims."""
    experiment = study.experiments[key]
    inside = [judged for judged in judgements if judged.claim.experiment == key]
    return {
        "id": key,
        "title": experiment.title,
        "protocol": experiment.protocol,
        "counts": list(words.counts(inside).values()),
        "figures": [] if is_top else figures,
        "above": [figure["drawing"].name for figure in figures] if is_top else [],
        "groups": [
            {
                "sentence": claim.sentence,
                "origin": words.origin(claim),
                "label": claim.label,
                "lines": [_line(study, judged) for judged in members],
            }
            for claim, members in words.grouped(inside)
        ],
    }


def _line(study: ClaimsStudy, judged: Judgement) -> dict[str, Any]:
    """Lay out one claim."""
    claim = judged.claim
    run = study.runs.get(claim.run)
    interval = words.interval(judged)
    return {
        "judged": judged,
        "id": claim.id,
        "method": words.method(claim),
        "setting": claim.setting,
        "value": words.written(judged.numbers["value"], claim.places),
        "interval": "" if interval == UNDEFINED else interval,
        "sample": words.sample(judged),
        "criteria": [
            (name, [_condition(condition, run.summary if run else {}) for condition in conditions])
            for name, conditions in (("consistent", claim.consistent), ("contradicts", claim.contradicts))
        ],
        "explanation": words.explanation(judged),
        "control": f"control, {claim.control}: {judged.control}" if claim.control else "",
        "registered": "" if words.is_waiting(judged) else judged.registered,
    }


def _condition(condition: Condition, summary: Any) -> tuple[str, str]:
    """Write a condition and the class of how it came out."""
    held = condition.holds(summary)
    return words.threshold(condition), {True: "held", False: "failed-to", None: "unknown"}[held]


def _run_line(study: ClaimsStudy, cell: str) -> dict[str, Any]:
    """Write what the table of runs says about one run; what is unknown is a dash."""
    run = study.runs[cell]
    commit = (run.environment.get("git") or {}).get("commit")
    version = str(run.environment.get("code_version") or UNDEFINED)
    return {
        "cell": cell,
        "id": short_id(run),
        "status": run.status,
        "detail": run.detail,
        "wall": UNDEFINED if run.wall_s is None else duration(run.wall_s),
        "version": f"{version} ({commit[:10]})" if commit else version,
        "hardware": run.hardware or UNDEFINED,
    }
