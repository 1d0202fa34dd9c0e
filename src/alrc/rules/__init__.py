"""The rules, written once: measure → decide → scale, for every framework.

A rule is a frozen dataclass that turns a measured magnitude and a small state into a decision, by operators and the
handful of primitives in `alrc.ops`. It never touches a tensor's memory: a backend measures before and scales after. No
file in here may import a framework, nor `reference.py`, which checks them.
"""

from alrc.rules.loss import ALRC, LARGEST_LOSS, Decision, Huber, Rule

__all__ = ["ALRC", "LARGEST_LOSS", "Decision", "Huber", "Rule"]
