"""Ask, cell by cell, whether a study's changes agree with those a paper printed, and how alike the two rank.

What each verdict means, and what it must not be taken for, is in `docs/design/0004-statistics.md`. `published_change`,
`judge` and `rank_correlation` are pure functions of numbers; `agree` applies them to a study.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Any, Literal

import numpy as np
from scipy import stats as scipy_stats

from alrc_lab.report import tables
from alrc_lab.report.collect import Published, Study
from alrc_lab.report.stats import CONFIDENCE, PairedDifference
from alrc_lab.report.words import NBSP, interval, label, lower_first, number, p_value, plain

Verdict = Literal["same direction", "opposite", "inconclusive", "ours alone", "both detect none", "open"]
MEANINGS: dict[Verdict, str] = {
    "same direction": "both detect a change, of one sign",
    "opposite": "both detect a change, of opposite signs",
    "inconclusive": "the paper detects a change, our interval holds 0",
    "ours alone": "ours detects a change, the paper's does not",
    "both detect none": "both intervals hold 0, which does not show that there is no change",
    "open": "one side has no interval, such as ours below two pairs",
}
_FEWEST = 3  # cells without which ranks say nothing
_MOST_PERMUTED = 8  # cells whose permutations are all tried: 40,320; above, Student's approximation is close


@dataclass(frozen=True)
class PublishedChange:
    """Hold what a paper's two printed cells say about the change from one to the other.

    Attributes:
        mean: Difference of the printed means, in the metric's printed unit.
        low: Lower end of its 95 % interval, which counts the rounding of the means; None where undefined.
        high: Upper end of it.
        p_value: Two-sided Welch test of the smallest change that the printed digits allow; None where undefined.
        baseline: The baseline's printed mean.
    """

    mean: float
    low: float | None
    high: float | None
    p_value: float | None
    baseline: float

    def in_percent(self, difference: float | None) -> float | None:
        """Express a difference (the mean or an end of the interval) in percent of the baseline's mean."""
        return None if difference is None or not self.baseline else 100.0 * difference / abs(self.baseline)


@dataclass(frozen=True)
class RankCorrelation:
    """Hold Spearman's ρ of n cells; `rho` and `p_value` are None below three cells or where all ranks are equal."""

    n: int
    rho: float | None
    p_value: float | None
    is_exact: bool


@dataclass(frozen=True)
class Comparison:
    """Hold one cell's change beside the published one, and what the two together say."""

    row: tables.Row
    published: PublishedChange
    verdict: Verdict


@dataclass(frozen=True)
class Agreement:
    """Hold how a study agrees with what was published of it.

    Attributes:
        comparisons: One for each cell that has, as its baseline has, a published value, in the study's order.
        means: Rank correlation of the cells' means.
        changes: Rank correlation of the relative changes.
        done: By panel and column: how many cells have only runs that ended, and how many cells there are.
    """

    comparisons: tuple[Comparison, ...]
    means: RankCorrelation
    changes: RankCorrelation
    done: Mapping[tuple[str, str], tuple[int, int]]

    @property
    def counts(self) -> dict[Verdict, int]:
        """Count the comparisons by verdict; every verdict is a key."""
        found = Counter(comparison.verdict for comparison in self.comparisons)
        return {verdict: found[verdict] for verdict in MEANINGS}


def published_change(setting: Published, baseline: Published, unit: float = 0.0) -> PublishedChange:
    """Estimate the change between two printed cells, whose runs are taken as unpaired.

    The interval is Welch's. As printed means are rounded, each may be half a unit of its last digit off: the interval
    is wider by that unit on either side, and the p-value is of a change that is smaller by it.

    Args:
        setting: Mean, standard deviation of one run, and number of runs.
        baseline: The same of the cell it is compared with.
        unit: Last digit of the printed means, such as 0.01; 0 counts no rounding.

    Returns:
        The change, setting − baseline; without interval where a spread or number is not known, or both spreads are 0.

    Example:
        >>> change = published_change(Published(3.5, 0.1, 10), Published(4.0, 0.1, 10))
        >>> round(change.low, 3), round(change.high, 3)
        (-0.594, -0.406)
    """
    mean = setting.mean - baseline.mean
    parts = [(printed.std, printed.n) for printed in (setting, baseline) if printed.std is not None and printed.n]
    variances = [(std**2 / n, n) for std, n in parts if std is not None and n is not None and n > 1]
    total = sum(variance for variance, _ in variances)
    if len(variances) < 2 or not total:
        return PublishedChange(mean, None, None, None, baseline.mean)
    freedom = total**2 / sum(variance**2 / (n - 1) for variance, n in variances)
    error = math.sqrt(total)
    half = float(scipy_stats.t.ppf(0.5 + CONFIDENCE / 2, freedom)) * error + unit
    smallest = max(0.0, abs(mean) - unit)
    p = min(1.0, 2 * float(scipy_stats.t.sf(smallest / error, freedom)))
    return PublishedChange(mean, mean - half, mean + half, p, baseline.mean)


def judge(ours: PairedDifference, published: PublishedChange) -> Verdict:
    """Compare the signs of two changes, where both are told from zero by their 95 % intervals.

    Args:
        ours: Paired difference of our runs.
        published: What the paper printed.

    Returns:
        A key of `MEANINGS`. A sign alone never makes a verdict: an interval that holds 0 has none.
    """
    if ours.mean is None or ours.low is None or ours.high is None or published.low is None or published.high is None:
        return "open"
    theirs_detects = not published.low <= 0 <= published.high
    if ours.low <= 0 <= ours.high:
        return "inconclusive" if theirs_detects else "both detect none"
    if not theirs_detects:
        return "ours alone"
    return "same direction" if (ours.mean > 0) == (published.mean > 0) else "opposite"


def rank_correlation(ours: Sequence[float], published: Sequence[float]) -> RankCorrelation:
    """Correlate two rankings of the same cells: Spearman's ρ, ties sharing their mean rank.

    Args:
        ours: One finite number per cell.
        published: The paper's number of each, in the same order.

    Returns:
        ρ with its two-sided p-value: over all permutations up to 8 cells, by Student's approximation above.

    Raises:
        ValueError: If the lengths differ.

    Example:
        >>> found = rank_correlation([1, 2, 3, 4], [10, 20, 40, 30])
        >>> round(found.rho, 3), round(found.p_value, 3), found.is_exact
        (0.8, 0.333, True)
    """
    if len(ours) != len(published):
        raise ValueError(f"both rankings must be of the same cells, got {len(ours)} and {len(published)} numbers")
    n = len(ours)
    if n < _FEWEST or len(set(ours)) == 1 or len(set(published)) == 1:
        return RankCorrelation(n, None, None, False)
    rho, p = map(float, scipy_stats.spearmanr(ours, published))
    is_exact = n <= _MOST_PERMUTED
    if is_exact:
        ranks = scipy_stats.rankdata(published) - (n + 1) / 2

        def product(permuted: np.ndarray, axis: int = -1) -> np.ndarray:
            return (permuted * ranks).sum(axis)  # ρ, but for a factor that no permutation changes

        test = scipy_stats.permutation_test(
            (scipy_stats.rankdata(ours) - (n + 1) / 2,),
            product,
            permutation_type="pairings",
            vectorized=True,
            n_resamples=math.factorial(n),
        )
        p = min(1.0, float(test.pvalue))
    return RankCorrelation(n, rho, p, is_exact)


def agree(study: Study) -> Agreement | None:
    """Compare every cell that can be with what was published; None if the study has no published value.

    Verdicts are given as the runs stand now. Ranks are of cells that are done, as a cell with a part of its runs may
    yet change its place.
    """
    rows = tables.tabulate(study)
    printed = [row.published for row in rows if row.published]
    if not printed:
        return None
    unit = 10.0 ** -max(_digits(value.mean) for value in printed)
    comparisons = []
    for row in rows:
        if row.published and row.baseline and row.baseline.published and row.difference:
            change = published_change(row.published, row.baseline.published, unit)
            comparisons.append(Comparison(row, change, judge(row.difference, change)))
    ended = {row.cell.id: all(run.status in ("finished", "diverged") for run in row.runs) for row in rows}
    means = [
        (row.estimate.mean, row.published.mean)
        for row in rows
        if row.published and row.estimate.mean is not None and ended[row.cell.id]
    ]
    changes = [
        (ours, theirs)
        for comparison in comparisons
        if ended[comparison.row.cell.id] and ended[comparison.row.cell.baseline or ""]
        for ours, theirs in [_changes(comparison)]
        if ours is not None and theirs is not None
    ]
    done: dict[tuple[str, str], tuple[int, int]] = {}
    for row in rows:
        number_done, number_of = done.get(where := (row.cell.panel, row.cell.column), (0, 0))
        done[where] = (number_done + ended[row.cell.id], number_of + 1)
    return Agreement(
        tuple(comparisons),
        rank_correlation([a for a, _ in means], [b for _, b in means]),
        rank_correlation([a for a, _ in changes], [b for _, b in changes]),
        done,
    )


def sentences(study: Study, found: Agreement) -> list[str]:
    """Say in words how a study agrees: the verdicts, how much of it is done, and both rank correlations."""
    told = [_done(study, found)]
    if found.comparisons:
        always = ("same direction", "opposite")
        counts = ", ".join(f"{verdict}{NBSP}{n}" for verdict, n in found.counts.items() if n or verdict in always)
        plural = "s" * (len(found.comparisons) > 1)
        told.insert(0, f"{len(found.comparisons)} comparison{plural} with the published table: {counts}.")
    against = list(dict.fromkeys(label(each.row.baseline.row) for each in found.comparisons if each.row.baseline))
    mostly = "; it mostly ranks panels and columns of the table" * (len(found.done) > 1)
    means = _ranks(found.means) + mostly * (found.means.rho is not None)
    told.append(f"Rank correlation of the published means and ours: {means}.")
    if found.comparisons:
        baseline = against[0] if len(against) == 1 else "the baseline"
        guide = " Its p-value takes cells as independent, which those that share a baseline are not."
        told.append(
            f"Rank correlation of the relative changes against {baseline}: {_ranks(found.changes)}."
            + guide * (found.changes.rho is not None)
        )
    return told


def legend(found: Agreement) -> str:
    """Explain the verdicts that occur, and what they may be used for."""
    meanings = "; ".join(f"“{verdict}”: {MEANINGS[verdict]}" for verdict, n in found.counts.items() if n)
    return (
        f"{meanings}. A change is detected if its 95 % interval excludes 0: ours is paired by seed, the published one "
        "is Welch's from mean, standard deviation and number of runs, and counts the rounding of the means. Only "
        "directions are compared, as protocol and number of runs decide the sizes and what is detected."
    )


def title(study: Study, found: Agreement, panel: str) -> str:
    """Head the table of a panel."""
    against = {
        each.row.baseline.row for each in found.comparisons if each.row.baseline and each.row.cell.panel == panel
    }
    alone = f" against {label(*against)}" if len(against) == 1 else ""
    return f"{study.panels[panel]}, change{alone}: published and ours"


def lines(found: Agreement, panel: str) -> list[dict[str, str]]:
    """Write the comparisons of a panel for people, by column key; changes are in percent of the baseline."""
    written = []
    for comparison in found.comparisons:
        row, theirs, ours = comparison.row, comparison.published, comparison.row.difference
        if row.cell.panel == panel and ours:
            ends = [theirs.in_percent(x) for x in (theirs.mean, theirs.low, theirs.high)]
            own = [ours.in_percent(x) for x in (ours.mean, ours.low, ours.high)]
            changes = {"published": _change(*ends), "ours": _change(*own), "pairs": str(ours.n)}
            written.append({"column": row.cell.column, "label": row.label} | changes | {"verdict": comparison.verdict})
    return written


def to_json(study: Study) -> dict[str, Any]:
    """Give the agreement as plain JSON values under one key; empty if nothing was published."""
    found = agree(study)
    if found is None:
        return {}
    comparisons = [
        {
            "cell": each.row.cell.id,
            "verdict": each.verdict,
            "published_change": asdict(each.published) | {"percent": _changes(each)[1]},
            "our_change_percent": _changes(each)[0],
        }
        for each in found.comparisons
    ]
    done = [
        {"panel": panel, "column": column, "done": done, "cells": of}
        for (panel, column), (done, of) in found.done.items()
    ]
    ranks = {"means": asdict(found.means), "changes": asdict(found.changes)}
    told = [plain(sentence) for sentence in sentences(study, found)]
    record = {"comparisons": comparisons, "counts": found.counts, "rank_correlation": ranks, "done": done}
    return {"agreement": record | {"sentences": told}}


def _digits(value: float) -> int:
    """Count the decimals with which a number was printed, as far as its value shows them."""
    exponent = Decimal(repr(value)).as_tuple().exponent
    return max(0, -exponent) if isinstance(exponent, int) else 0


def _changes(comparison: Comparison) -> tuple[float | None, float | None]:
    """Give our change and the published one in percent."""
    ours, theirs = comparison.row.difference, comparison.published
    return ours.in_percent(ours.mean) if ours else None, theirs.in_percent(theirs.mean)


def _change(mean: float | None, low: float | None, high: float | None) -> str:
    """Write a change in percent with its interval."""
    if mean is None:
        return tables.UNDEFINED
    return f"{number(mean, 1, signed=True)}{NBSP}% {interval(low, high, 1, signed=True)}"


def _ranks(found: RankCorrelation) -> str:
    """Write a rank correlation."""
    cells = f"{found.n}{NBSP}cell{'s' * (found.n != 1)}"
    if found.rho is None:
        reason = f"{_FEWEST} done ones are needed" if found.n < _FEWEST else "they do not differ"
        return f"none ({cells}, {reason})"
    how = "exact permutation test" if found.is_exact else "t approximation"
    return f"ρ{NBSP}={NBSP}{number(found.rho, 2)} ({cells}, {p_value(found.p_value, named=True)}, {how})"


def _done(study: Study, found: Agreement) -> str:
    """Say which part of the study is done."""
    total, done = sum(of for _, of in found.done.values()), sum(n for n, _ in found.done.values())
    if done == total:
        return f"All {total} cells of this study are done."
    parts: dict[str, list[str]] = {"In full": [], "In part": [], "Not yet": []}
    for kind, places in parts.items():
        for panel, panel_title in study.panels.items():
            named = []
            for column, (n, of) in ((column, each) for (own, column), each in found.done.items() if own == panel):
                if kind == ("In full" if n == of else "In part" if n else "Not yet"):
                    named.append(f", {column}" * tables.is_grid(study, panel) + f" ({n} of {of})" * (kind == "In part"))
            if named:
                places.append(lower_first(panel_title) + "".join(named))
    told = [f"{kind}: {'; '.join(places)}." for kind, places in parts.items() if places]
    return " ".join([f"{done} of {total} cells of this study done.", *told])
