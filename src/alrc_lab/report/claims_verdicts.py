"""Judge claims by the criteria that were written down before their runs, by the rules of docs/design/0010-claims.md.

A verdict follows from two lists of conditions and the numbers of one run; nothing is fitted, tuned or tested here, and
no file is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alrc_lab.report.claims import CONTROLS, PARTS, Claim, ClaimsStudy, Verdict, finite
from alrc_lab.report.runs import Run

NEITHER = "neither criterion holds"
"""The plain reason of an inconclusive verdict: the numbers were there and said neither."""
# What a verdict follows from; a config may leave out the wording.
_DECISIVE = ("statistic", "consistent", "contradicts", "scope", "control")


@dataclass(frozen=True)
class Judgement:
    """Hold a claim with its numbers and what follows from them.

    Attributes:
        claim: The claim.
        verdict: One of `VERDICTS`.
        reading: What its criteria say, whether or not the theory covers it.
        reason: Why the reading is inconclusive; "" if it is not.
        numbers: `value`, `low`, `high`, `p` and `n` in full; None where undefined or not known.
        p_holm: The one Holm-adjusted p-value that the claim names; None if it names none, or several.
        control: "" for no control; else `as required`, `alarm` or `not known`.
        registered: "" if the run's config has the same claim; else what is wrong with that.
    """

    claim: Claim
    verdict: Verdict
    reading: Verdict
    reason: str
    numbers: Mapping[str, float | None]
    p_holm: float | None
    control: str
    registered: str


def judge(study: ClaimsStudy) -> list[Judgement]:
    """Judge every claim of a study by its criteria, in the study's order."""
    return [_judge(study, claim) for claim in study.claims]


def left_out(study: ClaimsStudy) -> list[str]:
    """List the claims that a run's config holds and study.json does not: none may be dropped once it is run."""
    known = {claim.id for claim in study.claims}
    return [
        f"{key}: config.json of {study.runs[cell].folder} holds this claim, study.json leaves it out."
        for cell, config in study.configs.items()
        for key in _registered(config)
        if key not in known
    ]


def _judge(study: ClaimsStudy, claim: Claim) -> Judgement:
    """Judge one claim: its criteria first, then what overrides them."""
    run = study.runs.get(claim.run)
    summary = run.summary if run else {}
    reading, reason = _read_criteria(claim, run, summary)
    adjusted = {key for key in (claim.keys.get("p"), *_condition_keys(claim)) if key and key.endswith("_holm")}
    control = ""
    if claim.control:
        is_known = run is not None and run.status == "finished"
        is_right = reading == CONTROLS[claim.control]
        control = "not known" if not is_known else "as required" if is_right else "alarm"
    return Judgement(
        claim=claim,
        verdict=reading if claim.scope else "outside scope",
        reading=reading,
        reason=reason,
        numbers={part: finite(summary.get(claim.keys.get(part, ""))) for part in PARTS},
        p_holm=finite(summary.get(adjusted.pop())) if len(adjusted) == 1 else None,
        control=control,
        registered=_compare(claim, study.configs.get(claim.run)),
    )


def _read_criteria(claim: Claim, run: Run | None, summary: Mapping[str, Any]) -> tuple[Verdict, str]:
    """Say what the criteria say, and why where that is nothing."""
    if run is None:
        return "inconclusive", f"study.json lists no run {claim.run!r}"
    if run.status != "finished":
        return "inconclusive", f"run {claim.run} is {run.status}: {run.detail}"
    if absent := [key for key in (*_condition_keys(claim), claim.keys["value"]) if key not in summary]:
        return "inconclusive", f"the run's summary has no {absent[0]!r}"
    if broken := [key for key in _condition_keys(claim) if finite(summary[key]) is None]:
        return "inconclusive", f"{broken[0]!r} is not a finite number"
    # An empty list never holds: `all` of nothing is true, but no criterion is no evidence.
    is_consistent, is_contradicted = (
        bool(conditions) and all(condition.holds(summary) for condition in conditions)
        for conditions in (claim.consistent, claim.contradicts)
    )
    if is_consistent and is_contradicted:
        return "inconclusive", "the criteria of consistent and of contradicts hold both: they must exclude each other"
    if is_consistent or is_contradicted:
        return ("consistent" if is_consistent else "contradicts"), ""
    return "inconclusive", NEITHER


def _condition_keys(claim: Claim) -> list[str]:
    """Name the numbers that the criteria of a claim need."""
    return [condition.key for condition in (*claim.consistent, *claim.contradicts)]


def _registered(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the claims that a run's config holds, by id: whole, or the fields that decide."""
    claims = config.get("claims") or config.get("criteria")
    return {claim["id"]: claim for claim in claims if "id" in claim} if isinstance(claims, list) else {}


def _compare(claim: Claim, config: Mapping[str, Any] | None) -> str:
    """Say how a claim differs from the one that its run was started with; "" if it does not."""
    if not config:
        return "not known: there is no config.json yet"
    before = _registered(config).get(claim.id)
    if before is None:
        return "config.json of its run does not hold it, so its criteria may have been written after the run"
    if untold := [key for key in _DECISIVE if key not in before]:
        return f"config.json of its run does not hold its {', '.join(untold)}"
    changed = [key for key in before if before[key] != claim.written.get(key)]
    return f"{', '.join(changed)}: not what config.json of its run says" if changed else ""
