"""Limit losses and gradients in PyTorch, by the rules of `alrc.rules`.

Measures tensors, lets a rule decide, scales. Contains no arithmetic of a rule and imports no other framework. Nothing
here reads a tensor's value, so nothing waits for the device; but for `StepGuard` in mode "host", which says so.
"""

from alrc.rules.skips import SkippedStep, TooManySkips
from alrc.torch.gradient import GradientClipper, GradientTelemetry
from alrc.torch.guard import StepGuard, StepTelemetry
from alrc.torch.huber import Huber, estimate_start
from alrc.torch.loss import ALRC, Telemetry
from alrc.torch.monitor import Monitor
from alrc.torch.named import NamedALRC

__all__ = [
    "ALRC",
    "GradientClipper",
    "GradientTelemetry",
    "Huber",
    "Monitor",
    "NamedALRC",
    "SkippedStep",
    "StepGuard",
    "StepTelemetry",
    "Telemetry",
    "TooManySkips",
    "estimate_start",
]
