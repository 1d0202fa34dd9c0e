"""Several named losses, each with an ALRC of its own: a dictionary in, a dictionary out.

Exists because losses of different kinds must not share statistics, and because processes that add up several losses
must do so in one order. Contains no arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from alrc.torch.loss import ALRC, Telemetry

__all__ = ["NamedALRC"]


class NamedALRC(nn.Module):
    """Limit several named losses, each against its own statistics.

    Use it where the losses are of different kinds: reconstruction and KL of a VAE, generator and discriminator of a
    GAN, class and box of a detector. Give all of them at once or some at a time. With `sync`, every call tells the
    other processes about all declared names in the declared order, whichever of them were given (SPEC S24).

    Args:
        names: Names of the losses, or one dictionary from names to instances of `ALRC`. Without dots.
        settings: Arguments of the `ALRC` that is made for each name.

    Raises:
        TypeError: If the dictionary holds something else than `ALRC`, or comes with `settings`.
        ValueError: If a name cannot be used, or comes twice.

    Example:
        >>> import torch
        >>> limits = NamedALRC({"reconstruction": ALRC(start=(1.0, 1.04)), "kl": ALRC(signed=True)})
        >>> limited = limits({"kl": torch.tensor([-0.1]), "reconstruction": torch.tensor([0.5, 2.0])})
        >>> print(limited)
        {'kl': tensor([-0.1000]), 'reconstruction': tensor([0.5000, 1.6000])}
        >>> loss = sum(part.mean() for part in limited.values())
    """

    def __init__(self, *names: str | Mapping[str, ALRC], **settings: Any) -> None:
        super().__init__()
        declared = names[0] if len(names) == 1 and isinstance(names[0], Mapping) else None
        if declared is not None and settings:
            raise TypeError(f"settings come with the instances of ALRC in the dictionary, not beside it: {settings}.")
        keys = list(names if declared is None else declared)
        if not keys:
            raise ValueError('NamedALRC needs at least one name, such as NamedALRC("reconstruction", "kl").')
        limiters = {} if declared is None else dict(declared)
        self.limits = nn.ModuleDict()
        for key in keys:
            if not isinstance(key, str):
                raise TypeError(f"a name must be a string, or the only argument a dictionary; got {key!r}.")
            if key in self.limits:
                raise ValueError(f"the name {key!r} comes twice; give each loss a name of its own.")
            limiter = ALRC(**settings) if declared is None else limiters[key]
            if not isinstance(limiter, ALRC):
                raise TypeError(f"the dictionary must hold instances of ALRC, got {limiter!r} for {key!r}.")
            if any(limiter is other for other in self.limits.values()):
                raise ValueError(f"the ALRC of {key!r} has another name too; each name needs an ALRC of its own.")
            try:
                self.limits[key] = limiter
            except KeyError as error:  # torch builds the names of buffers from them, and of attributes
                raise ValueError(
                    f"{key!r} cannot be a name: torch allows no dot, no empty name and none of a module's own "
                    f"attributes ({error.args[0]}); choose another, such as {key.replace('.', '_') + '_loss'!r}."
                ) from None

    def forward(
        self,
        losses: Mapping[str, Tensor],
        mask: Mapping[str, Tensor] | None = None,
        weight: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Limit the losses and, in train mode, learn from them; see `ALRC.forward`.

        Args:
            losses: Floating-point losses of any shape by name. From a name that is left out nothing is learned.
            mask: False where there is no loss, by name; names may be left out.
            weight: How much each loss counts in the moments, by name; names may be left out.

        Returns:
            Limited losses under the same names, in the same order.

        Raises:
            KeyError: If a name was not declared.
        """
        self._require(losses)
        masks, weights = mask or {}, weight or {}
        self._require(masks)
        self._require(weights)
        limited: dict[str, Tensor] = {}
        for name, limiter in self._items():  # the declared order, which is that of all processes
            if name in losses:
                limited[name] = limiter(losses[name], masks.get(name), weights.get(name))
            elif self.training:
                limiter.idle()
        return {name: limited[name] for name in losses}

    def attach(self, optimizer: Optimizer | Mapping[str, Optimizer]) -> Self:
        """Update the moments once for each step of an optimiser; see `ALRC.attach`.

        Args:
            optimizer: The optimiser of all losses, or a dictionary from names to optimisers, as a GAN has. Names that
                are left out stay as they are.

        Returns:
            This module.
        """
        if isinstance(optimizer, Mapping):
            self._require(optimizer)
        for name, limiter in self._items():
            if not isinstance(optimizer, Mapping):
                limiter.attach(optimizer)
            elif name in optimizer:
                limiter.attach(optimizer[name])
        return self

    def detach(self) -> None:
        """Undo `attach` for all losses."""
        for _, limiter in self._items():
            limiter.detach()

    def discard(self) -> None:
        """Forget what was observed since the last step of each optimiser."""
        for _, limiter in self._items():
            limiter.discard()

    @property
    def last(self) -> dict[str, Telemetry]:
        """What happened to each loss when it was last given; without those that never were."""
        return {name: seen for name, limiter in self._items() if (seen := limiter.last) is not None}

    @property
    def limit(self) -> dict[str, Tensor]:
        """L_max for the next losses of each name, 0-d; inf while nothing can be limited."""
        return {name: limiter.limit for name, limiter in self._items()}

    def __getitem__(self, name: str) -> ALRC:
        self._require([name])
        return cast(ALRC, self.limits[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.limits)

    def _items(self) -> Iterator[tuple[str, ALRC]]:
        """Yield names and their limiters in the declared order."""
        for name, limiter in self.limits.items():
            yield name, cast(ALRC, limiter)

    def _require(self, names: Iterable[str]) -> None:
        """Refuse names that were not declared."""
        for name in names:
            if name not in self.limits:
                known = ", ".join(map(repr, self.limits))
                raise KeyError(f"no loss was declared under the name {name!r}; the names are {known}.")
