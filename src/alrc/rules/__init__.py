"""The rules, written once: measure → decide → scale, for every framework.

A rule is a frozen dataclass that turns a measured magnitude and a small state into a decision, by operators and the
handful of primitives in `alrc.ops`. It never touches a tensor's memory: a backend measures before and scales after. No
file in here may import a framework, nor `reference.py`, which checks them.
"""

from alrc.rules.alrc import ALRC
from alrc.rules.batch import Batch
from alrc.rules.gradient import AGC, GradientDecision, GradientRule, Measure, Norm, UnitNorms, Value
from alrc.rules.history import AutoClip, NormHistory, NormStatistics, ZClip
from alrc.rules.loss import LARGEST_LOSS, Decision, Huber, Rule
from alrc.rules.shift import Watched, alarm_delay, explained_share, largest_share
from alrc.rules.skips import SkippedStep, TooManySkips
from alrc.rules.step import SkipStep, StepState, StepVerdict

__all__ = [
    "AGC",
    "ALRC",
    "LARGEST_LOSS",
    "AutoClip",
    "Batch",
    "Decision",
    "GradientDecision",
    "GradientRule",
    "Huber",
    "Measure",
    "Norm",
    "NormHistory",
    "NormStatistics",
    "Rule",
    "SkipStep",
    "SkippedStep",
    "StepState",
    "StepVerdict",
    "TooManySkips",
    "UnitNorms",
    "Value",
    "Watched",
    "ZClip",
    "alarm_delay",
    "explained_share",
    "largest_share",
]
