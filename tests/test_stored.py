"""Check the state dictionary that every framework reads: what it holds, what it refuses, and that nothing is lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from alrc.moments import Moments
from alrc.rules import ALRC, Watched

RULES = {"auto": ALRC(observe=8), "given": ALRC.reference(mu1_start=1.0, mu2_start=1.04)}


def used(rule: ALRC) -> Any:
    """Return a state that has seen spikes."""
    rng, state = np.random.default_rng(3), rule.init()
    for step in range(40):
        losses = np.exp(rng.normal(0, 0.3, 6)) * (50 if step % 9 == 8 else 1)
        state = rule.update(losses, rule.decide(losses, state), state)
    return state


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_a_state_comes_back_bit_for_bit(rule: ALRC) -> None:
    state = used(rule)
    stored = rule.state_dict(state)
    assert all(isinstance(value, np.ndarray) for value in stored.values())
    back = rule.load_state_dict(stored)
    assert type(back) is type(state)
    for one, other in zip(back, state, strict=True):
        np.testing.assert_array_equal(one, other)
    spike = np.array([1.0, 100.0])
    np.testing.assert_array_equal(rule.decide(spike, back).scale, rule.decide(spike, state).scale)


@pytest.mark.parametrize(
    ("rule", "kind", "version", "entries"),
    [
        (RULES["given"], Moments, 1, {"mean", "var", "count", "version"}),
        (RULES["auto"], Watched, 2, {"mean", "var", "count", "version", "rate", "recent"}),
    ],
)
def test_the_schema_is_that_of_the_specification(rule: ALRC, kind: type, version: int, entries: set[str]) -> None:
    for state in (rule.init(), used(rule)):
        assert isinstance(state, kind)
        stored = rule.state_dict(state)
        assert set(stored) == entries
        assert stored["version"] == version
        assert stored["count"].dtype == stored["version"].dtype == np.int64
        shapes = {name: value.shape for name, value in stored.items() if value.shape}
        assert shapes == ({"recent": (2, 8)} if version == 2 else {})


def test_a_stored_state_is_a_copy() -> None:
    state = used(RULES["auto"])
    stored = RULES["auto"].state_dict(state)
    before = state.recent.copy()
    stored["recent"][:] = 7
    np.testing.assert_array_equal(state.recent, before)


def test_types_are_converted_and_values_are_not() -> None:
    rule = RULES["auto"]
    state = used(rule)
    stored = {name: value.astype(np.float32) for name, value in rule.state_dict(state).items()}
    back = rule.load_state_dict(stored)
    assert back.count.dtype == np.int64
    assert back.count == state.count
    assert back.mean == np.float32(state.mean)


@pytest.mark.parametrize(
    ("change", "error", "complaint"),
    [
        ({"version": None}, KeyError, "no entry 'version'; its entries are"),
        ({"mean": None}, KeyError, "lacks mean"),
        ({"version": np.array(1)}, ValueError, "has version 1, but this ALRC reads version 2"),
        ({"version": np.array(3)}, ValueError, "has version 3"),
        ({"mu1": np.array(1.0)}, ValueError, "belong to no ALRC: mu1"),
        ({"recent": np.zeros((2, 32))}, ValueError, r"recent has shape \(2, 32\), .* needs \(2, 8\).*observe"),
        ({"mean": np.zeros(1)}, ValueError, r"mean has shape \(1,\)"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], error: type[Exception], complaint: str) -> None:
    rule = RULES["auto"]
    stored: dict[str, Any] = {**rule.state_dict(used(rule)), **change}
    with pytest.raises(error, match=complaint):
        rule.load_state_dict({name: value for name, value in stored.items() if value is not None})
