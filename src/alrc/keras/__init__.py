"""Limit losses in Keras 3, on its TensorFlow, JAX and PyTorch backends, by the rule of `alrc.rules`.

Measures losses, lets the rule decide, scales. Contains no arithmetic of a rule and imports keras alone, which imports
its backend. Nothing here reads a tensor's value.
"""

from alrc.keras.loss import ALRC
from alrc.keras.model import LimitedModel

__all__ = ["ALRC", "LimitedModel"]
