"""The rules, written once: measure → decide → scale, for every framework.

A rule is a frozen dataclass that turns a measured magnitude and a small state into a decision, by operators and the
handful of primitives in `alrc.ops`. It never touches a tensor's memory: a backend measures before and scales after. No
file in here may import a framework, nor `reference.py`, which checks them.
"""

from alrc.rules.alrc import ALRC
from alrc.rules.batch import Batch
from alrc.rules.loss import LARGEST_LOSS, Decision, Huber, Rule
from alrc.rules.shift import Watched, alarm_delay, explained_share, largest_share

__all__ = [
    "ALRC",
    "LARGEST_LOSS",
    "Batch",
    "Decision",
    "Huber",
    "Rule",
    "Watched",
    "alarm_delay",
    "explained_share",
    "largest_share",
]
