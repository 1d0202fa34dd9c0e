"""Ask the Keras layer the questions of the conformance kit, on the backend of this process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="these are the tests of alrc.keras")

from alrc import rules  # noqa: E402 - what cannot be imported is skipped first
from alrc.conformance import CRITERIA, run  # noqa: E402
from alrc.keras import ALRC  # noqa: E402
from alrc.keras.conformance import wrap_loss_limiter  # noqa: E402

QUICK = replace(CRITERIA, decay_steps=900, good=40)
IS_SLOW = [pytest.mark.slow] if keras.backend.backend() == "torch" else []
TESTS = ["T1", "T6", "T8", *(pytest.param(test, marks=pytest.mark.slow) for test in ("T2", "T3", "T4", "T5"))]
"""T7 is asked of replicas in test_keras_replicas.py, since only whole models have them."""

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
