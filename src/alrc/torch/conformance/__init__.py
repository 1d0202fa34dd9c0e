"""Wrap torch stabilisers for `alrc.conformance`, in one line each, and measure what they really do.

Factors are measured, not asked for: by autograd for losses, from gradients before and after for clippers, from weights
before and after for step skippers. Not imported by `alrc.torch`, since training needs none of it.
"""

from alrc.torch.conformance.losses import wrap_loss_limiter
from alrc.torch.conformance.parameters import wrap_gradient_clipper, wrap_step_skipper

__all__ = ["wrap_gradient_clipper", "wrap_loss_limiter", "wrap_step_skipper"]
