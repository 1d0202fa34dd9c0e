"""Say before a run what its numbers will mean: claims, their conditions, and the verdict that follows.

A claim is data. It stands in study.json and, without its wording, in the configuration of the run that it concerns, so
it is part of that run's identity. The report computes verdicts by itself; the function here is for the tests.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

_COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}

Verdict = Literal["consistent", "contradicts", "inconclusive", "outside scope"]


@dataclass(frozen=True)
class Criterion:
    """Compare a number of a run's summary with one that was chosen before."""

    key: str
    """Name of the number."""
    op: Literal["<", "<=", ">", ">="]
    """How it is to compare."""
    than: float
    """With what."""


@dataclass(frozen=True)
class Statistic:
    """Name the numbers of a summary that a reader is shown; None where there is none."""

    label: str
    """What the number is, in words."""
    value: str
    """Key of the number."""
    low: str | None = None
    """Key of the lower end of its interval."""
    high: str | None = None
    """Key of the upper end."""
    p: str | None = None
    """Key of the p-value, adjusted where a family is."""
    n: str | None = None
    """Key of the number of runs, or checks."""
    places: int = 4
    """Decimal places to print."""


def estimate(label: str, keys: Sequence[str], n: str, *, p: str | None = None, places: int = 4) -> Statistic:
    """Return the statistic whose number and ends of interval have these three keys."""
    value, low, high = keys
    return Statistic(label, value, low, high, p, n, places)


@dataclass(frozen=True)
class Claim:
    """Hold one sentence on trial and what would speak for and against it."""

    id: str
    """Name of the claim."""
    method: str
    """Key of the method it is about."""
    sentence: str
    """The sentence, in our words."""
    statistic: Statistic
    """What is shown."""
    consistent: Sequence[Criterion]
    """All must hold for `consistent`."""
    contradicts: Sequence[Criterion]
    """All must hold for `contradicts`."""
    origin: Literal["read", "source", "inference"]
    """Whether the sentence was read in the paper, read in another source, or inferred."""
    where: str = ""
    """Where it stands."""
    setting: str = ""
    """Setting it was asked for."""
    scope: bool = True
    """Whether the theory covers method and setting."""
    control: Literal["must contradict", "must be consistent"] | None = None
    """What a control must give for the experiment to be worth anything."""
    reading: str = ""
    """What the statistic is to be read as where the theory says nothing."""

    def to_json(self, experiment: str, run: str | None = None) -> dict[str, Any]:
        """Return the claim as study.json holds it.

        Args:
            experiment: Identifier of the experiment, E0 to E7.
            run: Cell of the run whose summary holds the numbers; none if it is the experiment.

        Returns:
            A dictionary of JSON values.
        """
        from alrc_lab.experiments.theory.methods import LABELS

        document = asdict(self)
        document["method"] = LABELS[self.method]
        document["consistent"] = [asdict(criterion) for criterion in self.consistent]
        document["contradicts"] = [asdict(criterion) for criterion in self.contradicts]
        head = {"id": document.pop("id"), "experiment": experiment, "run": run or experiment}
        return {**head, **document}


def essence(claim: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a claim that decides its verdict: what a run's configuration holds as its criteria."""
    return {key: claim[key] for key in ("id", "statistic", "consistent", "contradicts", "scope", "control")}


def verdict(claim: Mapping[str, Any], summary: Mapping[str, Any]) -> Verdict:
    """Return what the numbers of a run say about a claim.

    Args:
        claim: As study.json holds it.
        summary: Numbers of the run; one that is missing or not finite decides nothing.

    Returns:
        One of the four words; `inconclusive` also if the conditions of both sides hold.
    """

    def hold(conditions: Sequence[Mapping[str, Any]]) -> bool:
        values = [summary.get(condition["key"]) for condition in conditions]
        return bool(conditions) and all(
            value is not None and _COMPARE[condition["op"]](value, condition["than"])
            for value, condition in zip(values, conditions, strict=True)
        )

    if not claim["scope"]:
        return "outside scope"
    named = [summary.get(condition["key"]) for condition in [*claim["consistent"], *claim["contradicts"]]]
    if not all(value is not None and math.isfinite(value) for value in named):
        return "inconclusive"
    speaks_for, speaks_against = hold(claim["consistent"]), hold(claim["contradicts"])
    if speaks_for == speaks_against:
        return "inconclusive"
    return "consistent" if speaks_for else "contradicts"
