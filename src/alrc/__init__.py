"""Adaptive learning rate clipping: limit loss spikes, keep the directions of their gradients.

This package is the framework-free core: the moments, the rules and the slow reference they are checked against. It
imports numpy and no framework. The one line for a training loop lives in `alrc.torch`.
"""

from alrc.moments import Moments, estimate_start
from alrc.ops import NUMPY, NumpyOps, Ops
from alrc.reference import Trace, alrc_trace
from alrc.rules import ALRC, Decision, Huber, Rule

__all__ = [
    "ALRC",
    "NUMPY",
    "Decision",
    "Huber",
    "Moments",
    "NumpyOps",
    "Ops",
    "Rule",
    "Trace",
    "alrc_trace",
    "estimate_start",
]

__version__ = "0.1.0"
