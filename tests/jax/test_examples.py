"""Run the JAX examples as a user does, and check that they limit what they spoil and learn all the same."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

pytest.importorskip("jax", reason="needs JAX")
pytest.importorskip("optax", reason="the examples train with optax")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_flax(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("flax", reason="the example is a flax model")
    pytest.importorskip("skimage", reason="the example sharpens photographs of scikit-image")
    example = runpy.run_path(str(EXAMPLES / "jax_flax.py"))
    report = example["main"]()
    assert report["mostly_limited"] == len(example["BAD"]) == 4
    assert report["last_loss"] < 0.2 * report["first_loss"]
    assert "100% limited" in capsys.readouterr().out


def test_equinox(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("equinox", reason="the example is an equinox model")
    example = runpy.run_path(str(EXAMPLES / "jax_equinox.py"))
    report = example["main"]()
    assert report["mostly_limited"] == len(example["GARBAGE"]) == 4
    assert report["nonfinite"] == example["MICRO"]
    assert report["updates"] == example["STEPS"]
    assert report["last_loss"] < 0.5 * report["first_loss"]
    assert "2 not finite" in capsys.readouterr().out
