"""Ask the JAX rule the eight questions, and check that the wrapper measures: what is wrong must be reported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax", reason="needs JAX")
import jax
import jax.numpy as jnp

from alrc import rules
from alrc.conformance import CRITERIA, TESTS, Make, run
from alrc.jax import ALRC
from alrc.jax.conformance import wrap_loss_limiter
from alrc.ops import NUMPY, Ops

QUICK = replace(CRITERIA, decay_steps=900, good=40)
"""Shorter streams, for speed."""


def make_of(**settings: Any) -> Make:
    """Wrap a rule together with the one that learns on several devices."""
    is_signed = settings.get("signed", False)
    return wrap_loss_limiter(
        ALRC(**settings), is_signed=is_signed, synced=lambda name: ALRC(axis_name=name, **settings)
    )


DEFAULT, SIGNED = make_of(), make_of(signed=True)
"""Made once: what one test has compiled serves the next."""


def reason(make: Make, test: str, criteria: Any = QUICK) -> str:
    """Return why a test fails; empty if it does not."""
    [result] = run(make, tests=[test], criteria=criteria).results
    return result.reason if result.verdict == "FAIL" else ""


@pytest.mark.parametrize("test", TESTS)
def test_the_default_rule_passes(test: str) -> None:
    report = run(DEFAULT, "ALRC()", tests=[test], criteria=QUICK)
    assert [result.verdict for result in report.results] == ["pass"], report


@pytest.mark.slow
@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize("make", [DEFAULT, SIGNED], ids=["ALRC()", "ALRC(signed=True)"])
def test_passes_at_full_length(make: Make, test: str) -> None:
    report = run(make, "ALRC", tests=[test])
    assert [result.verdict for result in report.results] == ["pass"], report


def test_passes_operation_by_operation() -> None:
    make = wrap_loss_limiter(ALRC(start=(1.0, 1.04)), jit=False)
    assert reason(make, "T1", replace(QUICK, warm_up=5)) == ""


# ---------------------------------------------------------------------------------------------------------- the wrong


@dataclass(frozen=True)
class LimitingDisabled(rules.ALRC):
    """Learn the moments and limit nothing."""

    def decide(self, losses: Any, state: Any, ops: Ops = NUMPY) -> rules.Decision:
        return super().decide(losses, state, ops)._replace(limited=losses, scale=0 * losses + 1)


@dataclass(frozen=True)
class GradientZeroed(rules.ALRC):
    """Select the limit instead of scaling: right values, no gradient where limited."""

    def decide(self, losses: Any, state: Any, ops: Ops = NUMPY) -> rules.Decision:
        decision = super().decide(losses, state, ops)
        return decision._replace(scale=jnp.floor(decision.scale))


class Fixed:
    """Limit to 1.6, with a state that counts; the least that can be wrapped."""

    def init(self) -> Any:
        return jnp.zeros((), jnp.int32)

    def __call__(self, losses: Any, state: Any) -> Any:
        factor = jax.lax.stop_gradient(jnp.where(losses > 1.6, 1.6 / losses, 1.0))
        return losses * factor, state + 1


class Telling(Fixed):
    """Tell the host of each step."""

    def __call__(self, losses: Any, state: Any) -> Any:
        jax.debug.callback(lambda _: None, losses)
        return super().__call__(losses, state)


class Looking(Fixed):
    """Look at a value, which is not there under jit."""

    def __call__(self, losses: Any, state: Any) -> Any:
        return super().__call__(losses, state) if losses.max() > 1.6 else (losses, state)


class Growing(Fixed):
    """Keep every step in the state."""

    def init(self) -> Any:
        return jnp.zeros(0)

    def __call__(self, losses: Any, state: Any) -> Any:
        return super().__call__(losses, 0)[0], jnp.append(state, losses.mean())


class Forgetting(Fixed):
    """Give the state another type after the first step."""

    def __call__(self, losses: Any, state: Any) -> Any:
        return super().__call__(losses, 0)[0], state + losses.max()


class Simple:
    """Hide `observe` and `commit`."""

    def __init__(self, rule: ALRC) -> None:
        self.init, self.apply, self.limit = rule.init, rule.apply, rule.limit

    def __call__(self, losses: Any, state: Any) -> Any:
        return self.apply(losses, state)


@pytest.mark.parametrize(
    ("mutant", "test", "complaint"),
    [
        (LimitingDisabled, "T1", "limited losses have the value"),
        (LimitingDisabled, "T8", "a 100x spike keeps 1 of its gradient"),
        (GradientZeroed, "T1", "gradient factors 0"),
    ],
)
def test_a_wrong_rule_fails(mutant: type[rules.ALRC], test: str, complaint: str) -> None:
    assert complaint in reason(wrap_loss_limiter(ALRC.from_rule(mutant(start=(1.0, 1.04)))), test)


@pytest.mark.parametrize(
    ("limiter", "reads", "traces"),
    [
        (Fixed, [], ""),
        (Telling, ["debug_callback"], ""),
        (Looking, ["TracerBoolConversionError"], "TracerBoolConversionError: Attempted boolean conversion"),
        (Growing, [], "is traced 10 times while nothing but the numbers changes"),
        (Forgetting, [], "is traced 2 times while nothing but the numbers changes"),
    ],
)
def test_what_reads_or_is_traced_again_is_seen(limiter: Callable[[], Any], reads: list[str], traces: str) -> None:
    stabiliser: Any = wrap_loss_limiter(limiter())("float32")
    assert stabiliser.reads() == reads
    told = stabiliser.traces()
    assert told.startswith(traces)
    assert bool(told) == bool(traces)


def test_micro_batches_without_observe_are_updates() -> None:
    make = wrap_loss_limiter(Simple(ALRC(start=(1.0, 1.04))))
    assert "2 micro-batches: limit" in reason(make, "T5")


def test_devices_that_learn_alone_fail() -> None:
    rule = ALRC(start=(1.0, 1.04), betas=(0.9, 0.9))
    assert "processes have the limits" in reason(wrap_loss_limiter(rule, synced=lambda name: rule), "T7")
    assert "processes have the limits" in reason(wrap_loss_limiter(rule), "T7")


def test_ranks_are_devices_or_members_of_a_mapped_axis() -> None:
    shards = [[np.array([1.0, 2.0]), np.array([1.0])], [np.array([50.0, np.nan]), np.array([3.0, 1.0])]]
    rule = ALRC(start=(1.0, 1.04), betas=(0.9, 0.9))
    stabiliser: Any = wrap_loss_limiter(rule, synced=lambda name: replaced(rule, name))("float32")
    joined: Any = wrap_loss_limiter(rule)("float32")
    want = [(joined.step([np.concatenate(step)])[0].factor, joined.limit()) for step in zip(*shards, strict=True)]
    for number in (jax.device_count(), 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax, "device_count", lambda number=number: number)
            each = stabiliser.ranks(shards)
        for i, (factor, limit) in enumerate(want):
            np.testing.assert_allclose(np.concatenate([steps[i][0] for steps in each]), factor, rtol=1e-6)
            assert each[0][i][1] == each[1][i][1] == pytest.approx(limit, rel=1e-6)


def replaced(rule: ALRC, axis_name: str) -> ALRC:
    return ALRC.from_rule(rule.rule, axis_name)


def test_a_limit_that_is_not_told_is_found() -> None:
    stabiliser = wrap_loss_limiter(Fixed())("float32")
    stabiliser.step([np.array([1.0, 2.0])])
    assert stabiliser.limit() == pytest.approx(1.6)
    assert wrap_loss_limiter(Simple(ALRC()))("float32").limit() == np.inf


def test_a_state_without_a_dictionary_is_kept_itself() -> None:
    first, second = (wrap_loss_limiter(Simple(ALRC(start=(1.0, 1.04))))("float32") for _ in range(2))
    first.step([np.array([1.0, 2.0])])
    second.load(first.save())
    assert isinstance(first.save().mean, np.ndarray)
    assert first.limit() == second.limit() != pytest.approx(1.6, rel=1e-6)
