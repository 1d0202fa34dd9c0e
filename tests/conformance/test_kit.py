"""Test the conformance kit itself: every test must pass what is right and report what is wrong, for the right reason.

The right ones are a slow stabiliser written here for the purpose, the reference oracle of the library, and torch's
clipping; the wrong ones are those same with one mistake each, and the mutants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

import mutants
from alrc import rules
from alrc.conformance import CRITERIA, TESTS, Criteria, Make, Outcome, Report, Result, Traits, run, table
from alrc.conformance.verdict import Findings
from alrc.reference import alrc_trace
from alrc.torch import ALRC
from alrc.torch.conformance import wrap_gradient_clipper, wrap_loss_limiter, wrap_step_skipper

pytestmark = pytest.mark.filterwarnings("ignore:ALRC met losses:UserWarning")

QUICK = replace(CRITERIA, decay_steps=900, good=40)
"""Shorter streams, for speed."""

# ---------------------------------------------------------------------------------------------------------- the right


class Streak:
    """Limit to the median and six robust deviations of what was accepted; start anew after 20 refused steps.

    Slow, obvious, and right in all eight.
    """

    traits = Traits("loss", is_signed=False)

    def __init__(self, dtype: str) -> None:
        self.accepted: list[float] = []
        self.refused: list[list[float]] = []

    def limit(self) -> float:
        if len(self.accepted) < 16:
            return np.inf
        middle = float(np.median(self.accepted))
        return middle + 6 * 1.4826 * float(np.median(np.abs(np.subtract(self.accepted, middle))))

    def step(self, micro_batches: Sequence[NDArray[Any]]) -> list[Outcome]:
        limit = self.limit()
        self.learn(np.concatenate(micro_batches), limit)
        return [self.decide(batch, limit) for batch in micro_batches]

    def decide(self, batch: NDArray[Any], limit: float) -> Outcome:
        finite = np.where(np.isfinite(batch), batch, 0.0)
        is_large = (finite > limit) & (limit > 0)
        factor = np.where(is_large, limit / np.where(is_large, finite, 1.0), 1.0)
        return Outcome(np.where(is_large, limit, finite), factor * np.isfinite(batch))

    def learn(self, batch: NDArray[Any], limit: float) -> None:
        finite = batch[np.isfinite(batch)]
        taken = finite[finite <= limit].tolist()
        if finite.size:
            self.refused = [] if taken else [*self.refused, finite.tolist()]
        self.accepted = [*self.accepted, *taken][-400:]
        if len(self.refused) == 20:
            self.accepted, self.refused = [loss for step in self.refused for loss in step], []

    def evaluate(self, batch: NDArray[Any]) -> None:
        self.decide(batch, self.limit())

    def skip(self, micro_batches: Sequence[NDArray[Any]]) -> None:
        pass

    def save(self) -> Any:
        return list(self.accepted), list(self.refused)

    def load(self, state: Any) -> None:
        self.accepted, self.refused = state

    def ranks(self, shards: Sequence[Sequence[NDArray[Any]]]) -> list[list[tuple[NDArray[Any], float]]]:
        """Learn from all, answer each."""
        each: list[list[tuple[NDArray[Any], float]]] = [[] for _ in shards]
        for step in zip(*shards, strict=True):
            for steps, outcome in zip(each, self.step(step), strict=True):
                steps.append((outcome.factor, self.limit()))
        return each

    def reads(self) -> list[str]:
        return []

    def traces(self) -> str:
        return ""


class Reference:
    """Step the library's slow oracle, from given moments."""

    traits = Traits("loss")

    def __init__(self, dtype: str) -> None:
        self.moments = (1.0, 1.04)

    def step(self, micro_batches: Sequence[NDArray[Any]]) -> list[Outcome]:
        with np.errstate(all="ignore"):
            trace = alrc_trace([np.concatenate(micro_batches)], start=self.moments)
        self.moments = float(trace.mu1[0]), float(trace.mu2[0])
        ends = np.cumsum([len(batch) for batch in micro_batches])[:-1]
        pairs = zip(np.split(trace.limited[0], ends), np.split(trace.scale[0], ends), strict=True)
        return [Outcome(value, factor) for value, factor in pairs]

    def limit(self) -> float:
        return float(alrc_trace([1.0], start=self.moments).limit[0])

    def evaluate(self, batch: NDArray[Any]) -> None:
        pass

    def save(self) -> Any:
        return self.moments

    def load(self, state: Any) -> None:
        self.moments = state


def complaints(make: Make, test: str, criteria: Criteria = QUICK) -> list[str]:
    """Ask one question and return all that was complained about."""
    found = Findings()
    with np.errstate(all="ignore"):
        TESTS[test][1](make, criteria, found)
    return found.complaints


def test_a_right_one_passes_all_eight() -> None:
    report = run(Streak, "streak", criteria=QUICK)
    assert report.failed == [], report
    assert [result.test for result in report.results] == list(TESTS)
    assert all(result.verdict == "pass" for result in report.results)


@pytest.mark.parametrize("test", ["T1", "T2", "T5", "T6", "T8"])
def test_the_oracle_passes_what_the_published_rule_can(test: str) -> None:
    assert complaints(Reference, test) == []


def test_the_oracle_fails_where_the_published_rule_must() -> None:
    """A limited feed follows a rise slowly; given moments have a unit; processes learn alone."""
    for test, text in (("T3", "after a rise"), ("T4", "times"), ("T7", "processes have")):
        assert any(text in complaint for complaint in complaints(Reference, test)), test


# ---------------------------------------------------------------------------------------------------------- the wrong


class Drops(Streak):
    """Right values, no gradient where limited."""

    def decide(self, batch: NDArray[Any], limit: float) -> Outcome:
        value, factor, _ = super().decide(batch, limit)
        return Outcome(value, np.floor(factor))


class TouchesOthers(Streak):
    """Give all elements of a batch the factor of its largest."""

    def decide(self, batch: NDArray[Any], limit: float) -> Outcome:
        value, factor, _ = super().decide(batch, limit)
        return Outcome(value, np.full(len(batch), factor.min()))


class LetsNanIn(Streak):
    """Learn from NaN."""

    def learn(self, batch: NDArray[Any], limit: float) -> None:
        super().learn(np.where(np.isnan(batch), 1.0, batch), limit)
        if np.isnan(batch).any():
            self.accepted = [np.nan] * 32


class CountsNan(Streak):
    """Take NaN for zero."""

    def learn(self, batch: NDArray[Any], limit: float) -> None:
        super().learn(np.where(np.isfinite(batch), batch, 0.0), limit)


class NeverAccepts(Streak):
    """Refuse for good."""

    def learn(self, batch: NDArray[Any], limit: float) -> None:
        self.refused = []
        super().learn(batch, limit)


class Masked(Streak):
    """Average everything with the rest: mean and six standard deviations of the last 128."""

    def limit(self) -> float:
        return float(np.mean(self.accepted) + 6 * np.std(self.accepted)) if len(self.accepted) > 16 else np.inf

    def learn(self, batch: NDArray[Any], limit: float) -> None:
        self.accepted = [*self.accepted, *batch[np.isfinite(batch)].tolist()][-128:]


class Fixed(Streak):
    """Hold everything against one number."""

    def limit(self) -> float:
        return 1.6


class Amplifies(Streak):
    """Divide whatever the signs."""

    def decide(self, batch: NDArray[Any], limit: float) -> Outcome:
        value, factor, _ = super().decide(batch, limit)
        return Outcome(value, np.where(batch < 0, 2.9, factor))


class UpdatesEachBatch(Streak):
    """Update once per micro-batch."""

    def step(self, micro_batches: Sequence[NDArray[Any]]) -> list[Outcome]:
        return [super(UpdatesEachBatch, self).step([batch])[0] for batch in micro_batches]


class LearnsInEvaluation(Streak):
    """Learn from validation losses."""

    def evaluate(self, batch: NDArray[Any]) -> None:
        self.step([batch])


class LearnsFromSkipped(Streak):
    """Learn from a step that was not made."""

    def skip(self, micro_batches: Sequence[NDArray[Any]]) -> None:
        self.step(micro_batches)


class Forgets(Streak):
    """Keep nothing in a checkpoint."""

    def load(self, state: Any) -> None:
        pass


class Alone(Streak):
    """Learn in each process from what it sees there."""

    def ranks(self, shards: Sequence[Sequence[NDArray[Any]]]) -> list[list[tuple[NDArray[Any], float]]]:
        each = []
        for shard in shards:
            one = Streak("float32")
            each.append([(one.step([batch])[0].factor, one.limit()) for batch in shard])
        return each


class Idle(Streak):
    """Limit nothing."""

    def decide(self, batch: NDArray[Any], limit: float) -> Outcome:
        return super().decide(batch, np.inf)


class Reads(Streak):
    """Wait for the device."""

    def reads(self) -> list[str]:
        return ["item"]


class Untraceable(Streak):
    """Break the graph."""

    def traces(self) -> str:
        return "graph break"


WRONG: list[tuple[type[Streak], str, str]] = [
    (Drops, "T1", "gradient factors 0"),
    (TouchesOthers, "T1", "below the limit were touched"),
    (Idle, "T1", "have the value"),
    (LetsNanIn, "T2", "a 100x spike keeps"),
    (CountsNan, "T2", "moves the limit from"),
    (Masked, "T3", "a 1000x spike moves the limit"),
    (Masked, "T3", "ten steps later: a 100x spike keeps"),
    (NeverAccepts, "T3", "steps after a rise by 10x"),
    (Fixed, "T4", "change a factor"),
    (Fixed, "T4", "mean 1e3, std 1e-2: ordinary elements"),
    (Amplifies, "T4", "multiplier 2.9"),
    (UpdatesEachBatch, "T5", "micro-batches"),
    (LearnsInEvaluation, "T5", "an evaluation"),
    (LearnsFromSkipped, "T5", "a skipped step"),
    (Forgets, "T6", "right after the load"),
    (Alone, "T7", "processes have"),
    (Idle, "T8", "a 100x spike keeps 1"),
    (Reads, "T8", "reads tensors: item"),
    (Untraceable, "T8", "not one graph"),
]


@pytest.mark.parametrize(("wrong", "test", "text"), WRONG, ids=lambda thing: getattr(thing, "__name__", None))
def test_a_wrong_one_is_reported(wrong: type[Streak], test: str, text: str) -> None:
    told = complaints(wrong, test)
    assert any(text in complaint for complaint in told), told


def test_every_question_has_a_wrong_answer() -> None:
    assert {test for _, test, _ in WRONG} == set(TESTS)


FAST = rules.ALRC(betas=(0.95, 0.95), start=(1.0, 1.04))
"""A rule from given moments that forgets them soon."""
MUTANTS: dict[type[ALRC], tuple[str, str]] = {
    mutants.LimitingDisabled: ("T8", "a 100x spike keeps 1"),
    mutants.GradientZeroed: ("T1", "gradient factors 0"),
    mutants.LiteralFormula: ("T2", "factor nan"),
    mutants.BatchMeanLimited: ("T1", "below the limit were touched"),
    mutants.UnlimitedFeed: ("T3", "a 1000x spike moves the limit"),
    mutants.BiasedDecay: ("T4", "1001 is not limited"),
    mutants.RawMoments: ("T4", "1001 is not limited"),
    mutants.UpdateFirst: ("T1", "not the limit"),
    mutants.NonfiniteEnters: ("T2", "a 100x spike keeps 1"),
    mutants.NonfiniteCounted: ("T2", "counts as an element"),
}


@cache
def complaints_about(kind: type[ALRC], test: str) -> tuple[str, ...]:
    """Ask one question of a class with the interface of ALRC; the published presets only accept a rise slowly."""
    make = wrap_loss_limiter(partial(kind.from_rule, FAST), dtypes=["float32"])
    return tuple(complaints(make, test, replace(QUICK, warm_up=400, moved=0.5, decay_steps=0)))


@pytest.mark.slow  # Others of their kind are in the default tier: `test_gradient_truth.py`.
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_mutant_is_reported(mutant: type[ALRC]) -> None:
    test, text = MUTANTS[mutant]
    told = complaints_about(mutant, test)
    assert any(text in complaint for complaint in told), told
    assert not any(text in complaint for complaint in complaints_about(ALRC, test)), "what is right is reported too"


def test_no_mutant_is_forgotten() -> None:
    assert set(MUTANTS) == set(mutants.MUTANTS)


# ----------------------------------------------------------------------------------------------------- the torch kinds


def clip_norm(parameters: list[Tensor]) -> Callable[[], Tensor]:
    return partial(clip_grad_norm_, parameters, 1.6)


def clip_value(parameters: list[Tensor]) -> Callable[[], None]:
    return partial(torch.nn.utils.clip_grad_value_, parameters, 0.3)


def test_torch_clipping_is_true_and_free_but_has_a_unit() -> None:
    report = run(wrap_gradient_clipper(clip_norm), "clip", tests=["T1", "T5", "T6", "T7", "T8", "T4"], criteria=QUICK)
    assert report.failed == ["T4"], report
    verdicts = {result.test: result for result in report.results}
    assert verdicts["T7"].verdict == "n/a"
    assert "average" in verdicts["T7"].reason


def test_a_clipper_that_turns_the_gradient_is_reported() -> None:
    told = complaints(wrap_gradient_clipper(clip_value, limit=lambda clip: 1.0), "T1")
    assert any("turns" in complaint for complaint in told), told


def test_a_clipper_that_reads_and_branches_is_reported() -> None:
    def clip(parameters: list[Tensor]) -> None:
        if clip_grad_norm_(parameters, 1.6).item() > 1e9:
            raise RuntimeError

    told = complaints(wrap_gradient_clipper(lambda parameters: partial(clip, parameters)), "T8")
    assert any("reads tensors: item" in complaint for complaint in told), told
    assert any("not one graph" in complaint for complaint in told), told


def test_a_limiter_that_reads_on_devices_only_is_reported() -> None:
    class Peeks(torch.nn.Module):
        def forward(self, losses: Tensor) -> Tensor:
            return losses * 1.0 if losses.device.type == "cpu" else losses * losses.max().item()

    told = complaints(wrap_loss_limiter(Peeks), "T8")
    assert any("meta" in complaint for complaint in told), told


def test_a_clipper_that_reads_on_devices_only_is_reported() -> None:
    def clip(parameters: list[Tensor]) -> None:
        norm = clip_grad_norm_(parameters, 1.6)
        assert norm.device.type == "cpu" or norm.item()

    told = complaints(wrap_gradient_clipper(lambda parameters: partial(clip, parameters)), "T8")
    assert any("meta" in complaint for complaint in told), told


def test_a_skipper_that_multiplies_nan_by_zero_is_reported() -> None:
    class Skipper:
        def __init__(self, parameters: list[Tensor], is_selecting: bool) -> None:
            self.parameters, self.is_selecting = parameters, is_selecting

        def step(self, loss: Tensor) -> None:
            for parameter in self.parameters:
                assert parameter.grad is not None
                update = torch.where(loss < 8, parameter.grad, 0.0) if self.is_selecting else 0.0
                parameter.data -= update if self.is_selecting else parameter.grad * (loss < 8)

    for is_selecting in (True, False):
        make = wrap_step_skipper(partial(Skipper, is_selecting=is_selecting), lambda skipper, loss: skipper.step(loss))
        assert complaints(make, "T1") == []
        assert any("factor nan" in complaint for complaint in complaints(make, "T2")) is not is_selecting


@pytest.mark.dist
def test_ranks_are_real_processes() -> None:
    shared = wrap_loss_limiter(ALRC, synced=partial(ALRC, sync=True))
    assert complaints(shared, "T7") == []
    alone = wrap_loss_limiter(ALRC, synced=ALRC)
    assert any("processes have" in complaint for complaint in complaints(alone, "T7"))


# ---------------------------------------------------------------------------------------------------------- the report


def test_a_report_prints() -> None:
    report = run(Forgets, tests=["T1", "T6"])
    assert str(report).splitlines()[0] == "Forgets"
    assert str(report).splitlines()[1] == "T1 gradient truth       pass"
    assert str(report).splitlines()[2].startswith("T6 resume               FAIL  ")


def test_a_table_has_reasons_below() -> None:
    results = (Result("T1", "pass", "but"), Result("T7", "n/a", "why"), Result("T8", "FAIL", "because"))
    printed = table([Report("one", results), Report("two", results[:1])]).splitlines()
    assert printed[0] == "| stabiliser | T1 gradient truth | T7 ranks | T8 free, not a no-op |"
    assert printed[2:4] == ["| one | pass* | n/a | **FAIL** |", "| two | pass* |  |  |"]
    assert printed[5:] == ["- **one**", "  - T1: but", "  - T7: why", "  - T8: because", "- **two**", "  - T1: but"]


def test_an_exception_is_a_verdict_and_says_what() -> None:
    class Raises(Streak):
        def step(self, micro_batches: Sequence[NDArray[Any]]) -> list[Outcome]:
            if not np.isfinite(np.concatenate(micro_batches)).all():
                raise ValueError("not finite")
            return super().step(micro_batches)

    [result] = run(Raises, tests=["T2"]).results
    assert result.verdict == "FAIL"
    assert "raised ValueError: not finite" in result.reason


class NoSave(Streak):
    save = None  # type: ignore[assignment]


class NoTraits(Streak):
    traits = None  # type: ignore[assignment]


class OneFactor(Streak):
    def step(self, micro_batches: Sequence[NDArray[Any]]) -> list[Outcome]:
        return [Outcome(np.ones(()), np.ones(())) for _ in micro_batches]


class NoList(Streak):
    def step(self, micro_batches: Sequence[NDArray[Any]]) -> Any:
        return None


class NanLimit(Streak):
    def limit(self) -> float:
        return float("nan")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (NoSave, r"NoSave lacks save\(\); a stabiliser has the methods step\(\), evaluate\(\)"),
        (NoTraits, "NoTraits.traits must be an alrc.conformance.Traits"),
        (OneFactor, r"OneFactor.step must return one Outcome per micro-batch .* returned \[\(\(\), \(\)\)"),
        (NoList, "it returned None"),
        (NanLimit, "NanLimit.limit must return a number"),
    ],
)
def test_what_is_no_stabiliser_is_refused(make: Make, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        run(make)


def test_an_unknown_test_is_refused() -> None:
    with pytest.raises(ValueError, match=r"T1, .* got 'T9'"):
        run(Streak, tests=["T9"])


@pytest.mark.parametrize(
    ("facts", "text"),
    [({"kind": "losses"}, "kind must be one of loss, gradient, step; got 'losses'"), ({"dtypes": ("f4",)}, "got 'f4'")],
)
def test_unknown_facts_are_refused(facts: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Traits(**{"kind": "loss"} | facts)
