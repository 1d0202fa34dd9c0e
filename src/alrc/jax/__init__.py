"""Limit losses and gradients in JAX and optax, by the rules of `alrc.rules`.

Pure functions of arrays and a state that the caller carries: they jit, scan, vmap and differentiate. Contains no
arithmetic of a rule and imports no other framework. Nothing here looks at an array's value, but for
`raise_if_too_many_skips`, which is called outside of compiled code.
"""

from alrc.jax.guard import GuardState, SkipEvidence, guard_steps, raise_if_too_many_skips
from alrc.jax.loss import ALRC, Telemetry
from alrc.jax.transforms import ClipState, ScaleByALRCState, clip_by, scale_by_alrc
from alrc.rules.skips import SkippedStep, TooManySkips

__all__ = [
    "ALRC",
    "ClipState",
    "GuardState",
    "ScaleByALRCState",
    "SkipEvidence",
    "SkippedStep",
    "Telemetry",
    "TooManySkips",
    "clip_by",
    "guard_steps",
    "raise_if_too_many_skips",
    "scale_by_alrc",
]
