"""Hold SkipStep against a plain implementation with lists, and against the known ways in which such rules fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from alrc.ops import NUMPY, Ops
from alrc.rules import SkipStep, StepState, StepVerdict, alarm_delay
from alrc.rules.step import RELEARNED


class PlainSkipStep:
    """Do what SkipStep says, with a list of dictionaries and numpy's own statistics."""

    def __init__(
        self, num_stddev: float = 6.0, window: int = 128, min_history: int = 64, min_rise: float = 0.01
    ) -> None:
        self.num_stddev, self.window, self.min_history, self.min_rise = num_stddev, window, min_history, min_rise
        self.past: list[dict[str, Any]] = []
        self.rate = 0.0
        self.share = 1 / (1 + num_stddev**2) + (1 - 1 / (1 + num_stddev**2)) / 3
        self.seen = 0

    def limit(self, name: str) -> float:
        trusted = [entry[name] for entry in self.past[-self.window :] if entry["trusted"]]
        if self.seen < self.min_history or len(trusted) < 2:
            return np.inf
        mean, std = np.mean(trusted), np.std(trusted, ddof=1)
        margin = max(self.num_stddev * std, self.min_rise * abs(mean))
        return mean + margin if margin > 0 else np.inf

    def step(self, loss: float, norm: float) -> bool:
        values = {"loss": loss, "norm": norm}
        if not all(abs(value) <= 1e15 for value in values.values()):
            return True
        is_rejected = any(value > self.limit(name) for name, value in values.items())
        self.past.append({**values, "trusted": not is_rejected})
        self.seen += 1
        self.rate += (is_rejected - self.rate) / 32
        if self.seen == self.min_history:
            self.cap(self.past[-self.min_history :], 0.95)
        if self.rate > self.share:
            self.rate = 0.0
            for entry in self.past:
                entry["trusted"] = False
            for entry in self.past[-13:]:
                entry["trusted"] = True
            self.cap(self.past[-13:], 0.75)
        return is_rejected

    def cap(self, entries: list[dict[str, Any]], quantile: float) -> None:
        for name in ("loss", "norm"):
            values = [entry[name] for entry in entries]
            middle = np.quantile(values, 0.5, method="lower")
            upper = np.quantile(values, quantile, method="lower")
            for entry in entries:
                entry[name] = min(entry[name], middle + 4 * (upper - middle))


def run(rule: SkipStep, losses: Sequence[float], norms: Sequence[float] | None = None) -> tuple[Any, Any, StepState]:
    """Run a rule over a stream and return which updates it rejects, all limits, and the last state."""
    state, rejected, limits = rule.init(), [], []
    with np.errstate(all="raise", invalid="ignore"):
        for index, loss in enumerate(losses):
            measured = np.float64(loss), None if norms is None else np.float64(norms[index])
            verdict = rule.decide(measured, state)
            state = rule.update(measured, verdict, state)
            rejected.append(bool(verdict.is_skipped))
            limits.append(verdict.limits)
    return np.array(rejected), np.array(limits), state


def noise(size: int, spread: float = 0.1) -> Any:
    """Return a stream around 1."""
    return 1 + spread * np.random.default_rng(3).standard_normal(size)


class Unprotected(SkipStep):
    """Trust what was rejected, as a plain rolling window does."""

    def update(self, measured: Any, verdict: StepVerdict, state: StepState, ops: Ops = NUMPY) -> StepState:
        return super().update(measured, verdict._replace(is_skipped=verdict.is_skipped & False), state, ops)


class Stubborn(SkipStep):
    """Never learn a level anew."""

    def update(self, measured: Any, verdict: StepVerdict, state: StepState, ops: Ops = NUMPY) -> StepState:
        return super().update(measured, verdict, state, ops)._replace(rate=np.zeros(()))


class Poisoned(SkipStep):
    """Take in whatever comes."""

    def update(self, measured: Any, verdict: StepVerdict, state: StepState, ops: Ops = NUMPY) -> StepState:
        return super().update(measured, verdict._replace(is_finite=np.bool_(True)), state, ops)


def eventful(size: int = 900) -> tuple[Any, Any]:
    """Return losses and norms with spikes, shifts, mixtures and things that are not finite."""
    rng = np.random.default_rng(11)
    losses, norms = np.exp(0.3 * rng.standard_normal((2, size)))
    losses[[5, 30, 200, 210, 700]] *= 1000
    norms[[40, 205, 333]] *= 300
    losses[300:] *= 10
    norms[450:] /= 20
    norms[520:560:2] *= 50
    losses[600:640] = losses[600]
    losses[[0, 50, 400]] = np.nan, np.inf, -np.inf
    norms[[1, 51, 401, 402]] = np.nan, np.inf, 3e38, 1.8e308
    return losses, norms


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_stddev": 3.0, "window": 64, "min_history": 13}, {"window": 33, "min_history": 33, "min_rise": 0.0}],
    ids=["default", "short", "full"],
)
def test_equals_the_plain_implementation(settings: dict[str, Any]) -> None:
    rule, plain = SkipStep(**settings), PlainSkipStep(**settings)
    losses, norms = eventful()
    state = rule.init()
    number = 0
    for loss, norm in zip(losses, norms, strict=True):
        verdict = rule.decide((loss, norm), state)
        np.testing.assert_allclose(verdict.limits, [plain.limit("loss"), plain.limit("norm")], rtol=1e-9)
        is_rejected = plain.step(loss, norm)
        number += is_rejected
        assert verdict.is_skipped == is_rejected
        state = rule.update((loss, norm), verdict, state)
        assert state.rate == pytest.approx(plain.rate, abs=1e-12)
        assert state.count == plain.seen
    assert 20 < number < 300, "the stream is to exercise both answers"


@pytest.mark.parametrize("wrong", [Unprotected, Stubborn], ids=lambda kind: kind.__name__)
def test_the_plain_implementation_catches_mutants(wrong: type[SkipStep]) -> None:
    losses, norms = eventful()
    plain = PlainSkipStep()
    expected = [plain.step(loss, norm) for loss, norm in zip(losses, norms, strict=True)]
    assert run(SkipStep(), losses, norms)[0].tolist() == expected
    assert run(wrong(), losses, norms)[0].tolist() != expected


def test_equals_mean_and_std_of_the_window_while_nothing_happens() -> None:
    losses = noise(400)
    _, limits, _ = run(SkipStep(), losses)
    for step in range(64, 400):
        window = losses[max(0, step - 128) : step]
        assert limits[step, 0] == pytest.approx(window.mean() + 6 * window.std(ddof=1), rel=1e-12)
    assert np.all(np.isinf(limits[:64]))


def hides_a_spike(make: Callable[[], SkipStep]) -> bool:
    """Tell whether a 100-fold loss ten steps after a 1,000-fold one is accepted."""
    losses = noise(240)
    losses[200], losses[210] = 1000, 100
    return not run(make(), losses)[0][210]


def test_a_spike_does_not_hide_the_next() -> None:
    assert not hides_a_spike(SkipStep)
    assert hides_a_spike(Unprotected)


def test_a_spike_leaves_the_limit_where_it_was() -> None:
    losses = noise(260)
    losses[200] = 1000
    _, limits, _ = run(SkipStep(), losses)
    assert limits[201:210, 0] == pytest.approx(limits[200, 0], rel=0.01)


def rejections_after_a_shift(make: Callable[[], SkipStep], factor: float = 10.0) -> int:
    """Count the updates that are rejected after the level has risen for good."""
    losses = noise(400)
    losses[200:] *= factor
    return int(run(make(), losses)[0].sum())


@pytest.mark.parametrize("factor", [3.0, 10.0, 1e6])
def test_a_shift_is_accepted_after_the_stated_number_of_updates(factor: float) -> None:
    assert rejections_after_a_shift(SkipStep, factor) == alarm_delay(6.0) == 14


def test_a_small_shift_is_accepted_sooner() -> None:
    assert 0 < rejections_after_a_shift(SkipStep, 1.8) < 14


def test_a_rule_that_never_accepts_a_shift_is_caught() -> None:
    assert rejections_after_a_shift(Stubborn) > 100, "until its window holds nothing to compare with"


def test_a_spike_right_after_a_shift_is_rejected() -> None:
    losses = noise(400)
    losses[200:] *= 10
    losses[220] *= 100
    assert np.flatnonzero(run(SkipStep(), losses)[0]).tolist() == [*range(200, 214), 220]


def test_every_rule_learns_anew_from_updates_of_the_new_level_alone() -> None:
    assert min(alarm_delay(n) for n in np.geomspace(0.1, 1000, 50)) == RELEARNED


def test_a_decay_is_followed() -> None:
    losses = noise(6000) * 0.1 ** np.minimum(np.arange(6000) / 5000, 1)
    rejected, limits, _ = run(SkipStep(), losses)
    assert not rejected.any()
    assert np.max(limits[64:, 0] / (0.1 ** np.minimum(np.arange(64, 6000) / 5000, 1))) < 2.5


def test_a_constant_history_forgives_a_whisper_and_not_a_shout() -> None:
    whisper, shout = np.ones(200), np.ones(200)
    whisper[100:] += 1e-6
    shout[100] = 1.1
    for scale in (1e-8, 1.0, 1e8):
        assert not run(SkipStep(), scale * whisper)[0].any()
        assert np.flatnonzero(run(SkipStep(), scale * shout)[0]).tolist() == [100]
    assert run(SkipStep(min_rise=0.0), whisper)[0].any(), "the twin: mean + 6 · 0"


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_constant_losses_that_are_not_positive(value: float) -> None:
    losses = np.full(200, value)
    losses[150] = 0.5
    rejected = run(SkipStep(), losses)[0]
    # Nothing says how large a loss is beside zeros; beside -1, 0.5 is far.
    assert np.flatnonzero(rejected).tolist() == ([] if value == 0 else [150])


def test_decisions_do_not_depend_on_the_unit() -> None:
    losses, norms = eventful()
    expected = run(SkipStep(), losses, norms)[0]
    for scale in (2.0**-27, 2.0**27):
        assert np.array_equal(run(SkipStep(), scale * losses, norms / scale)[0], expected)


@pytest.mark.parametrize("index", [0, 1], ids=["loss", "norm"])
def test_what_is_not_measured_is_not_judged(index: int) -> None:
    rule, state = SkipStep(), SkipStep().init()
    values = noise(200)
    values[150] = 50
    rejected = []
    for value in values:
        measured = (value, None) if index == 0 else (None, value)
        verdict = rule.decide(measured, state)
        state = rule.update(measured, verdict, state)
        rejected.append(bool(verdict.is_skipped))
        assert np.isinf(verdict.limits[1 - index])
    assert np.flatnonzero(rejected).tolist() == [150]


POISON = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "max": np.finfo(np.float32).max}


def is_poisoned(make: Callable[[], SkipStep], value: float, step: int) -> bool:
    """Tell whether a poisonous update changes the state, or what is decided about the 200 that follow and a spike."""
    losses = noise(300)
    losses[290] = 100
    clean, _, _ = run(make(), losses)
    rule, state, rejected = make(), make().init(), []
    with np.errstate(all="ignore"):
        for index, loss in enumerate(losses):
            if index == step:
                for measured in ((value, np.float64(1)), (np.float64(1), value)):
                    verdict = rule.decide(measured, state)
                    after = rule.update(measured, verdict, state)
                    same = all(np.array_equal(old, new) for old, new in zip(state, after, strict=True))
                    if not (verdict.is_skipped and same):
                        return True
            verdict = rule.decide((loss, None), state)
            state = rule.update((loss, None), verdict, state)
            rejected.append(bool(verdict.is_skipped))
    assert clean[290]
    return rejected != clean.tolist()


@pytest.mark.parametrize("step", [0, 20, 80])
@pytest.mark.parametrize("value", POISON.values(), ids=POISON)
def test_what_is_not_finite_leaves_no_trace(value: float, step: int) -> None:
    assert not is_poisoned(SkipStep, np.float64(value), step)
    assert is_poisoned(Poisoned, np.float64(value), step)


def test_spikes_before_the_first_limit_do_not_blind() -> None:
    losses = noise(150)
    losses[[10, 40, 63]], losses[100] = 1000, 100
    rejected, limits, _ = run(SkipStep(), losses)
    assert rejected[100]
    assert losses[:64].mean() + 6 * losses[:64].std(ddof=1) > 100, "the twin: mean and std of all of them are blind"
    assert limits[64, 0] < 3


def test_a_second_kind_of_batch_is_learned_and_not_shut_out() -> None:
    losses = noise(400)
    losses[::10] *= 20  # every tenth batch is another task
    assert not run(SkipStep(), losses)[0].any()


def test_torch_decides_the_same_in_float32() -> None:
    torch = pytest.importorskip("torch", reason="compares with torch")
    from alrc.torch.ops import EAGER, TRACED

    losses, norms = eventful()
    expected, limits, last = run(SkipStep(), losses, norms)
    for ops in (EAGER, TRACED):
        rule = SkipStep()
        arrays = [torch.from_numpy(array) for array in rule.init()]
        state = StepState(*(array.float() if array.is_floating_point() else array for array in arrays))
        kinds = [(array.shape, array.dtype) for array in state]
        for index, pair in enumerate(zip(losses, norms, strict=True)):
            measured = tuple(torch.tensor(value, dtype=torch.float32) for value in pair)
            verdict = rule.decide(measured, state, ops)
            state = rule.update(measured, verdict, state, ops)
            assert bool(verdict.is_skipped) == expected[index]
            np.testing.assert_allclose(verdict.limits, limits[index], rtol=1e-4)
        assert [(array.shape, array.dtype) for array in state] == kinds
        np.testing.assert_allclose(state.values, last.values, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_stddev": 0.0}, "num_stddev must be a positive finite number, got 0.0"),
        ({"num_stddev": np.nan}, "num_stddev must be a positive finite number, got nan"),
        ({"window": 31}, "window must be a whole number of updates, at least 32, got 31"),
        ({"min_history": 12}, "min_history must be a whole number from 13 to window=128, got 12"),
        ({"min_history": 129}, "min_history must be a whole number from 13 to window=128, got 129"),
        ({"min_rise": -0.1}, "min_rise must be a finite number ≥ 0, got -0.1"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SkipStep(**settings)
