"""Run the Keras examples as a reader would."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

pytest.importorskip("keras", reason="these are the tests of alrc.keras")

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_fit_with_one_changed_line() -> None:
    numbers = runpy.run_path(str(EXAMPLES / "keras_fit.py"))["main"]()
    assert 0 < numbers["limited"] < 0.1
    assert numbers["loss"] < 3.0
    assert 3.0 < numbers["limit"] < 12.0


def test_custom_step() -> None:
    numbers = runpy.run_path(str(EXAMPLES / "keras_custom_step.py"))["main"]()
    assert numbers["restored"] == numbers["limit"]
    assert numbers["last"] < numbers["first"]
    assert numbers["count"] == 3 * 75
