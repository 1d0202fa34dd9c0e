"""Limit losses and gradients in PyTorch, by the rules of `alrc.rules`.

Measures tensors, lets a rule decide, scales. Contains no arithmetic of a rule and imports no other framework. Nothing
here reads a tensor's value, so nothing waits for the device.
"""

from alrc.torch.huber import Huber, estimate_start
from alrc.torch.loss import ALRC, Telemetry

__all__ = ["ALRC", "Huber", "Telemetry", "estimate_start"]
