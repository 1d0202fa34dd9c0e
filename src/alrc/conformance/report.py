"""Ask the eight questions, collect the answers, print them side by side."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from alrc.conformance import decisions, streams
from alrc.conformance.criteria import CRITERIA, Criteria
from alrc.conformance.protocol import Make, checked
from alrc.conformance.verdict import Findings, NotApplicableError

__all__ = ["TESTS", "Report", "Result", "run", "table"]

TESTS = {
    "T1": ("gradient truth", decisions.gradient_truth),
    "T2": ("poison", streams.poison),
    "T3": ("masking and shift", streams.masking_and_shift),
    "T4": ("sign and scale", decisions.sign_and_scale),
    "T5": ("one update per step", streams.one_update),
    "T6": ("resume", streams.resume),
    "T7": ("ranks", streams.ranks),
    "T8": ("free, not a no-op", decisions.free_and_effective),
}
"""The eight tests: a short title and the function that asks, by number."""


class Result(NamedTuple):
    """Give the verdict of one test and why."""

    test: str
    """Number of the test, `"T1"` to `"T8"`."""
    verdict: Literal["pass", "FAIL", "n/a"]
    """The verdict; n/a where the question does not apply to such a stabiliser, or it claims nothing of the kind."""
    reason: str
    """One line: what went wrong, with numbers; or why it does not apply; or what a pass leaves open. May be empty."""


@dataclass(frozen=True)
class Report:
    """Hold the verdicts on one stabiliser; printed, one line per test.

    Args:
        name: Name of the stabiliser.
        results: One result per test that was asked, in order.
    """

    name: str
    results: tuple[Result, ...]

    @property
    def failed(self) -> list[str]:
        """Numbers of the tests that failed."""
        return [result.test for result in self.results if result.verdict == "FAIL"]

    def __str__(self) -> str:
        lines = [
            f"{result.test} {TESTS[result.test][0]:<20} {result.verdict:<5} {result.reason}".rstrip()
            for result in self.results
        ]
        return "\n".join([self.name, *lines])


def run(make: Make, name: str = "", *, tests: Iterable[str] = tuple(TESTS), criteria: Criteria = CRITERIA) -> Report:
    """Ask a stabiliser the eight questions.

    Takes seconds: some 30,000 steps. Whatever the stabiliser raises in a test is the reason why it failed that test.

    Args:
        make: Makes a fresh one for the dtype it is given, such as `"float32"`; called many times.
        name: Name in the report; that of its class if empty.
        tests: Which tests to ask, keys of `TESTS`.
        criteria: Thresholds and lengths of streams.

    Returns:
        The report.

    Raises:
        TypeError: If what `make` makes lacks a method, its traits, or returns other shapes than it is given.
        ValueError: If a test is unknown.

    Example:
        >>> from alrc.torch import ALRC
        >>> from alrc.torch.conformance import wrap_loss_limiter
        >>> print(run(wrap_loss_limiter(ALRC), "ALRC()", tests=["T1"]))
        ALRC()
        T1 gradient truth       pass
    """
    wanted = tuple(tests)
    unknown = [test for test in wanted if test not in TESTS]
    if unknown:
        raise ValueError(f"tests must be among {', '.join(TESTS)}; got {', '.join(map(repr, unknown))}.")
    name = name or type(checked(make)).__name__
    return Report(name, tuple(_ask(test, make, criteria) for test in wanted))


def _ask(test: str, make: Make, criteria: Criteria) -> Result:
    """Ask one question, and take an exception for an answer."""
    found = Findings()
    try:
        # The streams are hostile on purpose: what overflows, and what a stabiliser warns of, is no verdict.
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            TESTS[test][1](make, criteria, found)
    except NotApplicableError as reason:
        return Result(test, "n/a", str(reason))
    except Exception as error:
        found.add(f"raised {type(error).__name__}: {' '.join(str(error).split())[:120]}")
    if found.complaints:
        return Result(test, "FAIL", found.summary())
    return Result(test, "pass", "; ".join(found.notes))


def table(reports: Iterable[Report]) -> str:
    """Print reports side by side as a Markdown table, and below it the reasons.

    Args:
        reports: What `run` returned.

    Returns:
        Markdown text: one row per stabiliser, one column per test, then one line per failed or qualified verdict.

    Example:
        >>> print(table([Report("mine", (Result("T1", "pass", ""), Result("T2", "FAIL", "NaN entered the state")))]))
        | stabiliser | T1 gradient truth | T2 poison |
        |---|---|---|
        | mine | pass | **FAIL** |
        <BLANKLINE>
        - **mine**
          - T2: NaN entered the state
    """
    reports = list(reports)
    tests = [test for test in TESTS if any(test == result.test for report in reports for result in report.results)]
    lines = [
        f"| stabiliser | {' | '.join(f'{test} {TESTS[test][0]}' for test in tests)} |",
        "|---" * (len(tests) + 1) + "|",
    ]
    for report in reports:
        verdicts = {result.test: result for result in report.results}
        shown = [_cell(verdicts[test]) if test in verdicts else "" for test in tests]
        lines.append(f"| {report.name} | {' | '.join(shown)} |")
    lines.append("")
    for report in reports:
        told = [f"  - {result.test}: {result.reason}" for result in report.results if result.reason]
        if told:
            lines += [f"- **{report.name}**", *told]
    return "\n".join(lines).rstrip()


def _cell(result: Result) -> str:
    """Show a verdict; an asterisk points at the reason of a pass."""
    if result.verdict == "FAIL":
        return "**FAIL**"
    return f"{result.verdict}*" if result.verdict == "pass" and result.reason else result.verdict
