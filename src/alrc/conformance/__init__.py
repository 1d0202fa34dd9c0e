"""The eight toughest tests as a kit: run them against any stabiliser, yours included.

A stabiliser - a loss limiter, a gradient clipper, a step skipper - is wrapped in the five methods of `Stabiliser`;
`run` asks it eight questions and `table` prints the answers beside those of others. `alrc.torch.conformance` wraps
torch stabilisers in one line. Knows no framework and none of the rules: it sees magnitudes go in and factors come out.
"""

from alrc.conformance.criteria import CRITERIA, Criteria
from alrc.conformance.protocol import Make, Outcome, Stabiliser, Traits
from alrc.conformance.report import TESTS, Report, Result, run, table

__all__ = [
    "CRITERIA",
    "TESTS",
    "Criteria",
    "Make",
    "Outcome",
    "Report",
    "Result",
    "Stabiliser",
    "Traits",
    "run",
    "table",
]
