"""Put judged claims into words, CSV and JSON.

Text, page, CSV and JSON all start from `judge` and these words, so they cannot disagree. Numbers are rounded here and
only for people: CSV and JSON carry them in full.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alrc_lab.report.claims import ORIGINS, VERDICTS, Claim, ClaimsStudy, Condition
from alrc_lab.report.claims_verdicts import Judgement, judge, left_out
from alrc_lab.report.words import NBSP, UNDEFINED, number, p_value, plain

MEANINGS = {
    "consistent": "every condition written down for this word holds",
    "contradicts": "every condition written down for this word holds",
    "inconclusive": "neither holds, both do, or a number is missing",
    "outside scope": "the theory does not cover the method or setting; the numbers are shown all the same",
}
"""What each verdict means, in a line."""


def written(value: float | None, places: int) -> str:
    """Write a number with fixed decimals, and a small one that would round to 0 with two digits.

    Example:
        >>> written(0.05563, 4), written(5.54e-05, 3), written(0.0, 3), written(None, 3)
        ('0.0556', '5.5e−05', '0.000', '–')
    """
    if value and round(value, places) == 0:
        return f"{value:.1e}".replace("-", "−")
    return number(value, places)


def interval(judged: Judgement) -> str:
    """Write the interval of a claim's statistic; a side that it does not have is open."""
    low, high = judged.numbers["low"], judged.numbers["high"]
    if low is None and high is None:
        return UNDEFINED
    places = judged.claim.places
    left = "(−∞" if low is None else f"[{written(low, places)}"
    right = "∞)" if high is None else f"{written(high, places)}]"
    return f"{left},{NBSP}{right}"


def statistic(judged: Judgement) -> str:
    """Write the statistic with its interval, where it has one."""
    value = written(judged.numbers["value"], judged.claim.places)
    return f"{value} {interval(judged)}" if interval(judged) != UNDEFINED else value


def sample(judged: Judgement) -> str:
    """Write n and the p-value, as far as the claim names them; an adjusted p-value says so."""
    parts = []
    if judged.numbers["n"] is not None:
        parts.append(f"n{NBSP}={NBSP}{judged.numbers['n']:,.0f}")
    if "p" in judged.claim.keys and judged.numbers["p"] is not None:
        is_adjusted = judged.claim.keys["p"].endswith("_holm")
        parts.append(p_value(judged.numbers["p"], named=True) + f"{NBSP}(Holm)" * is_adjusted)
    return ", ".join(parts)


def method(claim: Claim) -> str:
    """Name the method; the word for no method is too short to be understood."""
    return "no clipping" if claim.method == "none" else claim.method


def place(claim: Claim) -> str:
    """Name method and setting."""
    return ", ".join(filter(None, (method(claim), claim.setting)))


def origin(claim: Claim) -> str:
    """Say where the sentence is from, as in "read in the paper: Theorem 1"."""
    return ": ".join(filter(None, (ORIGINS[claim.origin], claim.where)))


def threshold(condition: Condition) -> str:
    """Write a condition as it stood before the run, the threshold in full.

    Example:
        >>> threshold(Condition("tost_p", "<=", 0.05))
        'tost_p ≤ 0.05'
    """
    sign = {"<=": "≤", ">=": "≥"}.get(condition.op, condition.op)
    return f"{condition.key} {sign} {condition.than!r}".replace("-", "−")


def explanation(judged: Judgement) -> str:
    """Say what a verdict leaves open: why it is inconclusive, or what is seen outside the scope; "" for nothing."""
    if judged.verdict != "outside scope":
        return judged.reason
    told = judged.reason or f"by the same criteria the numbers read: {judged.reading}"
    return "; ".join(filter(None, (told, judged.claim.remark.rstrip("."))))


def grouped(judgements: Sequence[Judgement]) -> list[tuple[Claim, list[Judgement]]]:
    """Put claims that differ in method and setting alone together, under the first of them, in the study's order."""
    found: dict[tuple[str, ...], list[Judgement]] = {}
    for judged in judgements:
        claim = judged.claim
        found.setdefault((claim.sentence, claim.origin, claim.where, claim.label), []).append(judged)
    return [(members[0].claim, members) for members in found.values()]


def counts(judgements: Sequence[Judgement]) -> dict[str, int]:
    """Count the verdicts; every word is a key."""
    found = Counter(judged.verdict for judged in judgements)
    return {verdict: found[verdict] for verdict in VERDICTS}


def counts_sentence(study: ClaimsStudy, judgements: Sequence[Judgement]) -> str:
    """Say how many claims there are, how many of each verdict, and how far the runs are."""
    listed = ", ".join(f"{count} {verdict}" for verdict, count in counts(judgements).items())
    done = sum(run.status == "finished" for run in study.runs.values())
    return f"{len(judgements)} claims: {listed}. {done} of {len(study.runs)} runs finished."


def alarms(study: ClaimsStudy, judgements: Sequence[Judgement]) -> list[str]:
    """Say what must be put right before the verdicts are believed; empty if nothing."""
    found = [
        f"{judged.claim.id}: this control {judged.claim.control}, but reads {judged.reading}"
        f"{f' ({judged.reason})' if judged.reason else ''}. Experiment {judged.claim.experiment} cannot tell what it "
        "was made to tell."
        for judged in judgements
        if judged.control == "alarm"
    ]
    found += [
        f"{judged.claim.id}: not preregistered ({judged.registered})."
        for judged in judgements
        if judged.registered and not is_waiting(judged)
    ]
    found += left_out(study)
    found += [f"{judged.claim.id}: {judged.reason}." for judged in judgements if "exclude each other" in judged.reason]
    found += [f"Run {cell} failed: {run.detail}." for cell, run in study.runs.items() if run.status == "failed"]
    return found


def is_waiting(judged: Judgement) -> bool:
    """Tell whether preregistration cannot be checked yet, because the run was not started."""
    return judged.registered.startswith("not known")


def remarks(study: ClaimsStudy, judgements: Sequence[Judgement]) -> list[str]:
    """Say how far the claims are preregistered and the controls as required, and what else to know."""
    same = sum(not judged.registered for judged in judgements)
    waiting = sum(map(is_waiting, judgements))
    found = [
        f"Preregistered: {same} of {len(judgements)} claims stand, with the same criteria, in the config of the run "
        "that judges them, and so in its identity"
        + (f"; {waiting} cannot be checked before their run is started." if waiting else ".")
    ]
    controls = Counter(judged.control for judged in judgements if judged.control)
    if controls:
        unknown = f"; {controls['not known']} not known yet" if controls["not known"] else ""
        found.append(f"Controls: {controls['as required']} of {controls.total()} came out as they must{unknown}.")
    versions = Counter(
        str(run.environment.get("code_version") or "unknown") for run in study.runs.values() if run.status == "finished"
    )
    if len(versions) > 1:
        listed = ", ".join(f"{version} ({count} runs)" for version, count in sorted(versions.items()))
        found.append(f"The runs were made by {len(versions)} versions of the code: {listed}.")
    return found


def corrections(study: ClaimsStudy, judgements: Sequence[Judgement]) -> list[str]:
    """Say which p-values were adjusted together, and how many stay below the level."""
    by_id, found = {judged.claim.id: judged for judged in judgements}, []
    for family in study.families:
        values = [by_id[key].p_holm for key in family.claims]
        known = [value for value in values if value is not None]
        below = sum(value < family.alpha for value in known)
        line = f"Holm, {family.name}: {len(values)} claims, α{NBSP}={NBSP}{family.alpha:g}"
        if known:  # a claim that names several adjusted p-values does not say which of them is this family's
            line += f"; the adjusted p-value is below α in {below}"
            if len(known) < len(values):
                line += f", and not known in {len(values) - len(known)}"
        found.append(f"{line}.")
    return found


def data_line(study: ClaimsStudy, digits: int = 12) -> str:
    """Name the data of a study: its name and checksum, and the number of images where it has any."""
    data = study.data
    images = f" · {data['images']:,} images" if data.get("images") else ""
    return f"Data: {data['name']}{images} · sha256 {data['sha256'][:digits]} · {data['source']}"


def report_path(study: ClaimsStudy) -> Path:
    """Name the page that `build` writes."""
    return study.root / "report" / "index.html"


def to_json(study: ClaimsStudy) -> dict[str, Any]:
    """Give everything the report says as plain JSON values, numbers in full; undefined ones are null."""
    judgements = judge(study)
    return {
        "study": study.name,
        "kind": "claims",
        "preset": study.preset,
        "title": study.title,
        "question": study.question,
        "data": dict(study.data),
        "counts": counts(judgements),
        "alarms": alarms(study, judgements),
        "claims": [_claim_record(judged) for judged in judgements],
        "experiments": [asdict(experiment) for experiment in study.experiments.values()],
        "holm": [asdict(family) for family in study.families],
        "corrections": [plain(line) for line in corrections(study, judgements)],
        "runs": [_run_record(study, cell) for cell in study.runs],
        "remarks": [plain(line) for line in remarks(study, judgements)],
        "differences": list(study.differences),
        "notes": list(study.notes),
        "report": str(report_path(study)) if report_path(study).is_file() else None,
    }


def write_csv(study: ClaimsStudy, folder: Path) -> Path:
    """Write claims.csv, one line a claim, numbers in full; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "claims.csv"
    records = [_claim_record(judged) for judged in judge(study)]
    for record in records:
        for field in ("consistent", "contradicts"):
            record[field] = json.dumps(record[field])
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]) if records else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    return path


def _claim_record(judged: Judgement) -> dict[str, Any]:
    """Flatten a judged claim for CSV and JSON."""
    claim = judged.claim
    names = ("id", "experiment", "run", "method", "setting", "sentence", "origin", "where", "scope")
    return {
        **{name: getattr(claim, name) for name in names},
        "statistic": claim.label,
        **judged.numbers,
        "p_holm": judged.p_holm,
        "verdict": judged.verdict,
        "reading": judged.reading,
        "reason": judged.reason,
        "control": claim.control,
        "control_result": judged.control or None,
        "preregistered": None if is_waiting(judged) else not judged.registered,
        "preregistration_problem": judged.registered or None,
        "consistent": [asdict(condition) for condition in claim.consistent],
        "contradicts": [asdict(condition) for condition in claim.contradicts],
    }


def _run_record(study: ClaimsStudy, cell: str) -> dict[str, Any]:
    """Say in JSON where a run is and all its numbers."""
    run = study.runs[cell]
    return {
        "folder": run.folder,
        "identity": run.identity,
        "cell": cell,
        "seed": run.seed,
        "status": run.status,
        "detail": run.detail,
        "wall_s": run.wall_s,
        "code_version": run.environment.get("code_version"),
        "hardware": run.hardware,
        "summary": dict(run.summary),
    }
