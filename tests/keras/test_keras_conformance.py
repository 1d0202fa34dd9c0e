"""Ask the Keras layer the questions of the conformance kit, on the backend of this process."""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="these are the tests of alrc.keras")

from alrc import rules  # noqa: E402 - what cannot be imported is skipped first
from alrc.conformance import CRITERIA, run  # noqa: E402
from alrc.keras import ALRC  # noqa: E402
from alrc.keras.conformance import wrap_loss_limiter  # noqa: E402

QUICK = replace(CRITERIA, decay_steps=900, good=40)
BACKEND = keras.backend.backend()
STARTS = [pytest.mark.dist] if BACKEND == "tensorflow" else []
TESTS = ["T1", "T6", "T8", *(pytest.param(test, marks=pytest.mark.slow) for test in ("T2", "T3", "T4", "T5"))]
"""T7 is asked below, where there are replicas; whole models are fitted on several in test_keras_replicas.py."""

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


def failures(make: Any, test: str, is_signed: bool = False) -> list[str]:
    report = run(wrap_loss_limiter(make, is_signed=is_signed), "alrc", criteria=QUICK, tests=[test])
    return report.failed


@pytest.mark.parametrize("test", TESTS)
def test_default_passes(test: str) -> None:
    assert failures(ALRC, test) == []


@pytest.mark.slow
@pytest.mark.parametrize("test", ["T1", "T2", "T3", "T4", "T5", "T6", "T8"])
def test_signed_passes(test: str) -> None:
    assert failures(lambda: ALRC(signed=True), test, is_signed=True) == []


class LimitingDisabled(ALRC):
    """Learn and limit nothing."""

    def call(self, losses: Any, training: Any = None) -> Any:
        super().call(losses, training=training)
        return losses


class GradientZeroed(ALRC):
    """Select the limit: right values, no gradient."""

    def call(self, losses: Any, training: Any = None) -> Any:
        limit = keras.ops.cast(self.limit, losses.dtype)
        super().call(losses, training=training)
        return keras.ops.where(losses < limit, losses, limit) if training else losses


class LearnsFromValidation(ALRC):
    """Learn whenever it is called."""

    def call(self, losses: Any, training: Any = None) -> Any:
        limited = super().call(losses, training=True)
        return limited if training else losses


class NonfinitePasses(ALRC):
    """Let what is not finite through, in value and gradient."""

    def call(self, losses: Any, training: Any = None) -> Any:
        return super().call(losses, training=training) + 0 * losses


def published() -> Any:
    """Follow the published rule, which a lasting rise of the level blinds."""
    return ALRC.from_rule(rules.ALRC(start=(1.0, 1.04)))


@pytest.mark.parametrize(
    ("wrong", "test"),
    [
        (LimitingDisabled, "T1"),
        (LimitingDisabled, "T8"),
        (GradientZeroed, "T1"),
        pytest.param(LearnsFromValidation, "T5", marks=pytest.mark.slow),
        pytest.param(NonfinitePasses, "T2", marks=pytest.mark.slow),
        pytest.param(published, "T3", marks=pytest.mark.slow),
    ],
)
def test_goes_red_on_a_mutant(wrong: Any, test: str) -> None:
    with np.errstate(all="ignore"):
        assert failures(wrong, test) == [test]


@pytest.fixture
def lonely(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give a layer that learns from one replica, from a folder where a process of its own finds it too."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return importlib.import_module("learns_alone").LearnsAlone


def ask_ranks(synced: Any) -> Any:
    return run(wrap_loss_limiter(ALRC, synced=synced), "alrc", criteria=QUICK, tests=["T7"]).results[0]


@pytest.mark.skipif(BACKEND == "torch", reason="Keras has no replicas on torch")
class TestReplicas:
    pytestmark = STARTS

    def test_decide_as_one_device(self) -> None:
        assert ask_ranks(ALRC) == ("T7", "pass", "")

    def test_go_red_where_they_learn_alone(self, lonely: Any) -> None:
        result = ask_ranks(lonely)
        assert result.verdict == "FAIL"
        assert result.reason.startswith("processes have the limits")

    @pytest.mark.parametrize("number", [3, pytest.param(6, marks=pytest.mark.slow)])
    def test_one_may_get_no_loss(self, number: int) -> None:
        """On jax 3 shards are on 3 devices and 6 on one; on tensorflow there are as many devices as shards."""
        if BACKEND == "jax":
            assert 3 <= len(keras.distribution.list_devices()) < 6
        rng = np.random.default_rng(5)
        shards = [[rng.uniform(0.5, 1.5, 4) for _ in range(12)] for _ in range(number)]
        shards[1][5][2], shards[2][7][0], shards[0][8][:] = 60.0, np.nan, np.nan
        shards[1][9] = shards[1][9][:1]
        shards[2][10] = shards[2][10][:0]
        make = partial(ALRC, start=(1.0, 1.04), betas=(0.9, 0.9))
        stabiliser: Any = wrap_loss_limiter(make, synced=make)("float32")
        each = stabiliser.ranks(shards)
        joined = wrap_loss_limiter(make)("float32")
        for i, batches in enumerate(zip(*shards, strict=True)):
            factor = joined.step([np.concatenate(batches)])[0].factor
            assert [len(steps[i][0]) for steps in each] == [len(batch) for batch in batches]
            np.testing.assert_allclose(np.concatenate([steps[i][0] for steps in each]), factor, rtol=1e-5)
            limits = {steps[i][1] for steps in each}
            assert len(limits) == 1
            assert limits.pop() == pytest.approx(joined.limit(), rel=1e-5)
        assert len(each[0]) == 12


def test_without_a_way_to_run_replicas_shards_learn_alone() -> None:
    result = ask_ranks(None)
    assert result.verdict == "FAIL"
    assert result.reason.startswith("processes have the limits")


@pytest.mark.skipif(BACKEND != "torch", reason="Keras has replicas on the other backends")
def test_ranks_do_not_apply_on_torch() -> None:
    result = ask_ranks(ALRC)
    assert result.verdict == "n/a"
    assert "no replicas on torch" in result.reason
