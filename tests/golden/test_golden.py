"""Hold `ALRC.reference` against the output of the authors' TensorFlow code, step by step.

`alrc_reference_tf1.npz` was made by running their code: for each case the losses, what it made of them, the
gradients of that by the losses, both moments after each step, and the four settings.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from alrc.rules import ALRC
from drivers import Driver, Make, drive_class, drive_compiled, drive_numpy, drive_numpy32, drive_torch
from jax_driver import drive_jax_jit
from keras_driver import drive_keras
from mutants import MUTANTS

RELATIVE = 1e-4
"""Promised agreement: the golden moments are raw float32 ones, whose difference keeps about this many digits."""

CASES = ("scalar_default", "batch16", "scalar_step")


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).with_name("alrc_reference_tf1.npz")) as stored:
        return dict(stored)


def check_golden(make: Make, golden: dict[str, np.ndarray], case: str, steps: int | None = None) -> None:
    """Drive the stream of a case and compare values, gradients, moments and decisions of every step."""
    want = {key: golden[f"{case}/{key}"][:steps] for key in ("losses", "clipped", "gradient", "mu1", "mu2")}
    settings = [float(golden[f"{case}/{key}"]) for key in ("num_stddev", "decay", "mu1_start", "mu2_start")]
    driver = make(ALRC.reference(*settings))
    got = {key: np.empty(array.shape) for key, array in want.items()}
    for i, losses in enumerate(want["losses"]):
        got["clipped"][i], got["gradient"][i] = driver.step(losses)
        got["mu1"][i], got["mu2"][i], _ = driver.read()
    got["losses"] = want["losses"]
    for key in ("clipped", "gradient", "mu1", "mu2"):
        np.testing.assert_allclose(got[key], want[key], rtol=RELATIVE, err_msg=f"{case}/{key}")
    for found in (got["gradient"] < 1, got["clipped"] < got["losses"]):
        np.testing.assert_array_equal(found, want["gradient"] < 1, err_msg=f"{case}: other elements limited")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "make",
    [drive_numpy, drive_numpy32, drive_torch, drive_jax_jit, *map(drive_keras, ("torch", "jax", "tensorflow"))],
    ids=["float64", "float32", "torch", "jax-jit", "keras-torch", "keras-jax", "keras-tensorflow"],
)
def test_reproduces_the_authors_code(make: Make, case: str, golden: dict[str, np.ndarray]) -> None:
    check_golden(make, golden, case)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by the compiler, about itself
def test_reproduces_the_authors_code_when_compiled(golden: dict[str, np.ndarray]) -> None:
    check_golden(drive_compiled, golden, "batch16")


def test_every_case_limits_something_and_not_everything(golden: dict[str, np.ndarray]) -> None:
    for case in CASES:
        share = np.mean(golden[f"{case}/gradient"] < 1)
        assert 0 < share < 0.5, f"{case} limits {share:.1%}"


# What these streams cannot tell from the truth: they hold no NaN, no sign change and no tiny spread.
BLIND_TO = {"LiteralFormula", "RawMoments", "NonfiniteEnters", "NonfiniteCounted"}


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.__name__ not in BLIND_TO], ids=lambda m: m.__name__)
def test_goes_red_on_a_mutant(mutant: type, golden: dict[str, np.ndarray]) -> None:
    with pytest.raises(AssertionError):
        check_golden(drive_class(mutant), golden, "batch16", steps=600)


def test_goes_red_on_other_settings(golden: dict[str, np.ndarray]) -> None:
    def make(rule: ALRC) -> Driver:
        return drive_numpy(replace(rule, num_stddev=rule.num_stddev + 0.01))

    with pytest.raises(AssertionError):
        check_golden(make, golden, "batch16", steps=600)
