"""The published variants by name, for every class that applies a rule.

Exists so that the frameworks cannot disagree about them. Must import no framework.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

from alrc.rules.alrc import ALRC

__all__ = ["Presets"]


class Presets:
    """Give a class that has `from_rule` the presets of `alrc.rules.ALRC`."""

    from_rule: ClassVar[Callable[..., Any]]
    """Makes what applies a pure rule; each framework says how."""

    @classmethod
    def paper(
        cls,
        num_stddev: float = 3.0,
        betas: tuple[float, float] = (0.999, 0.999),
        mu1: float = 25.0,
        mu2: float = 900.0,
    ) -> Self:
        """Follow Algorithm 1 of the paper to the letter; see `alrc.rules.ALRC.paper`."""
        return cls.from_rule(ALRC.paper(num_stddev, betas, mu1, mu2))

    @classmethod
    def reference(
        cls,
        num_stddev: float = 3.0,
        decay: float = 0.999,
        mu1_start: float = 25.0,
        mu2_start: float = 900.0,
    ) -> Self:
        """Follow the code the authors published; see `alrc.rules.ALRC.reference`."""
        return cls.from_rule(ALRC.reference(num_stddev, decay, mu1_start, mu2_start))

    @classmethod
    def cifar_scripts(cls, num_stddev: float = 3.0) -> Self:
        """Follow the authors' squared-error CIFAR-10 scripts; see `alrc.rules.ALRC.cifar_scripts`."""
        return cls.from_rule(ALRC.cifar_scripts(num_stddev))
