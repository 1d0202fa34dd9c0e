"""Known-wrong implementations of ALRC: each check must go red on the ones it is there for.

All have the interface of `alrc.torch.ALRC`. Every one is a mistake that somebody published or nearly made.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from alrc import rules
from alrc.ops import NUMPY, Ops
from alrc.rules import Batch, Decision
from alrc.torch import ALRC


class LimitingDisabled(ALRC):
    """Learn the moments and limit nothing."""

    def forward(self, losses: Tensor) -> Tensor:
        super().forward(losses)
        return losses.clone()


class GradientZeroed(ALRC):
    """Select the limit instead of scaling: right values, no gradient where limited."""

    def forward(self, losses: Tensor) -> Tensor:
        limit = self.limit.to(losses.dtype)
        super().forward(losses)
        return torch.where(losses < limit, losses, limit)


class LiteralFormula(ALRC):
    """Apply L · (L_max / L) wherever L > L_max, whatever the signs and whether finite or not."""

    def forward(self, losses: Tensor) -> Tensor:
        with torch.no_grad():
            limit = self.mean + self.rule.num_stddev * self.var.sqrt() + 0 * losses
        super().forward(losses.detach())
        return torch.where(losses > limit, losses * (limit / losses).detach(), losses)


class BatchMeanLimited(ALRC):
    """Limit the mean of a batch, and all its losses by that one factor."""

    def forward(self, losses: Tensor) -> Tensor:
        mean = losses.detach().mean()
        return losses * (super().forward(mean) / mean)


class _OtherRule(ALRC):
    """Apply a wrong rule through the right module."""

    @classmethod
    def wrong(cls, rule: rules.ALRC) -> rules.ALRC:
        """Return the wrong rule for the same settings."""
        raise NotImplementedError

    @classmethod
    def from_rule(cls, rule: rules.ALRC, sync: Any = False) -> Self:
        return super().from_rule(cls.wrong(rule), sync)


class UnlimitedFeed(_OtherRule):
    """Feed the moments with unlimited losses where limited ones are asked for."""

    @classmethod
    def wrong(cls, rule: rules.ALRC) -> rules.ALRC:
        return replace(rule, feed="unlimited")


class _BiasedDecayRule(rules.ALRC):
    """Keep β - 0.002 of the old raw moments and add 1 - β of the new: 0.997 and 0.001 for β = 0.999."""

    def commit(self, batch: Batch, state: Any, ops: Ops = NUMPY, when: Any = None) -> Any:
        after = super().commit(batch, state, ops, when)
        mean = after.mu1 - 0.002 * state.mu1
        return after._replace(mean=mean, var=after.mu2 - 0.002 * state.mu2 - mean * mean)


class BiasedDecay(_OtherRule):
    """Decay the moments by weights that do not sum to one."""

    @classmethod
    def wrong(cls, rule: rules.ALRC) -> rules.ALRC:
        return _BiasedDecayRule(**vars(rule))


class _RawMomentsRule(rules.ALRC):
    """Average L and L² and subtract, in the precision of the state."""

    def commit(self, batch: Batch, state: Any, ops: Ops = NUMPY, when: Any = None) -> Any:
        after = super().commit(batch, state, ops, when)
        weight = 1 - self.betas[0]
        mean = (1 - weight) * state.mu1 + weight * batch.mean
        square = (1 - weight) * state.mu2 + weight * (batch.mean * batch.mean + (0 if batch.var is None else batch.var))
        return after._replace(mean=mean, var=square - mean * mean)


class RawMoments(_OtherRule):
    """Keep raw moments in float32."""

    @classmethod
    def wrong(cls, rule: rules.ALRC) -> rules.ALRC:
        return _RawMomentsRule(**vars(rule))


class _UpdateFirstRule(rules.ALRC):
    """Take the losses into the moments, then make the limit that holds them."""

    def decide(self, losses: Any, state: Any, ops: Ops = NUMPY) -> Decision:
        first = super().decide(losses, state, ops)
        return super().decide(losses, super().update(losses, first, state, ops), ops)


class UpdateFirst(_OtherRule):
    """Limit after the update instead of before it."""

    @classmethod
    def wrong(cls, rule: rules.ALRC) -> rules.ALRC:
        return _UpdateFirstRule(**vars(rule))


class _PoisonedRule(rules.ALRC):
    """Average whatever comes in, NaN included."""

    def measure(self, losses: Any, decision: Decision, state: Any, ops: Ops = NUMPY, weight: Any = None) -> Batch:
        batch = super().measure(losses, decision, state, ops, weight)
        return batch._replace(mean=batch.mean + 0 * ops.total(losses))


class NonfiniteEnters(_OtherRule):
    """Let NaN and infinity enter the moments."""

    @classmethod
    def wrong(cls, rule: rules.ALRC) -> rules.ALRC:
        return _PoisonedRule(**vars(rule))


class _DilutedRule(rules.ALRC):
    """Take what is not finite for a loss of zero."""

    def measure(self, losses: Any, decision: Decision, state: Any, ops: Ops = NUMPY, weight: Any = None) -> Batch:
        finite = ops.replace_nonfinite(losses, 0.0)
        return super().measure(finite, super().decide(finite, state, ops), state, ops, weight)


class NonfiniteCounted(_OtherRule):
    """Keep NaN out of the sums and forget to leave it out of the number of losses."""

    @classmethod
    def wrong(cls, rule: rules.ALRC) -> rules.ALRC:
        return _DilutedRule(**vars(rule))


MUTANTS: tuple[type[ALRC], ...] = (
    LimitingDisabled,
    GradientZeroed,
    LiteralFormula,
    BatchMeanLimited,
    UnlimitedFeed,
    BiasedDecay,
    RawMoments,
    UpdateFirst,
    NonfiniteEnters,
    NonfiniteCounted,
)
