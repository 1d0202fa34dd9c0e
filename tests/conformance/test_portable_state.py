"""Begin a run in one framework, go on in another: the same decisions as if it had stayed (SPEC S16, S26)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from alrc.rules import ALRC
from drivers import Driver, Make, drive_numpy, drive_torch
from jax_driver import drive_jax_jit
from keras_driver import drive_keras

MAKES: dict[str, Make] = {
    "numpy": drive_numpy,
    "torch": drive_torch,
    "jax": drive_jax_jit,
    "keras-torch": drive_keras("torch"),
    "keras-jax": drive_keras("jax"),
    "keras-tensorflow": drive_keras("tensorflow"),
}
RULES = {
    "auto": ALRC(observe=8),
    "signed": ALRC(observe=8, signed=True, num_stddev_below=3.0),
    "reference": ALRC.reference(mu1_start=3.0, mu2_start=12.0),
    "paper": ALRC.paper(mu1=3.0, mu2=12.0, betas=(0.99, 0.98)),
}
HALF = 60


def losses_of(seed: int = 11) -> np.ndarray:
    """Make a stream with spikes, of which one comes right after the half and another rises for good."""
    rng = np.random.default_rng(seed)
    losses = np.exp(rng.normal(0, 0.3, (2 * HALF, 6)))
    losses[[20, 45, HALF, HALF + 20], 1] *= 100
    losses[HALF + 30 :] *= 8
    return losses.astype(np.float32)


def run(driver: Driver, losses: np.ndarray) -> np.ndarray:
    """Step through some losses and return the gradient factors."""
    return np.array([driver.step(batch).gradient for batch in losses])


def hand_over(first: Make, second: Make, rule: ALRC, losses: np.ndarray) -> tuple[np.ndarray, Driver]:
    """Run the first half in one framework and the second in another."""
    begun, going_on = first(rule), second(rule)
    factors = run(begun, losses[:HALF])
    going_on.load_state_dict(begun.state_dict())
    return np.concatenate([factors, run(going_on, losses[HALF:])]), going_on


def check(first: Make, second: Make, rule: ALRC) -> None:
    """Compare a run that changes frameworks with one in numpy alone."""
    losses, stayed = losses_of(), drive_numpy(rule)
    want = run(stayed, losses)
    assert np.all(np.any(want[[HALF, HALF + 20]] < 1, axis=1)), "the second half must limit something"
    got, driver = hand_over(first, second, rule, losses)
    np.testing.assert_array_equal(got < 1, want < 1, err_msg="other losses are limited")
    np.testing.assert_allclose(got, want, rtol=2e-5)
    np.testing.assert_allclose(driver.read(), stayed.read(), rtol=2e-5)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("second", [name for name in MAKES if name != "torch"])
def test_from_torch_to_everywhere(second: str, rule: ALRC) -> None:
    check(drive_torch, MAKES[second], rule)


@pytest.mark.parametrize("first", [name for name in MAKES if name != "torch"])
def test_from_everywhere_to_torch(first: str) -> None:
    check(MAKES[first], drive_torch, RULES["auto"])


@pytest.mark.parametrize(("first", "second"), [("jax", "keras-tensorflow"), ("keras-jax", "jax")])
def test_between_others(first: str, second: str) -> None:
    check(MAKES[first], MAKES[second], RULES["auto"])


class Forgetful:
    """Load nothing, as a state that is not portable would have it."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    def __getattr__(self, name: str) -> Any:
        return getattr(self.driver, name)

    def load_state_dict(self, stored: dict[str, Any]) -> None:
        pass


def test_a_state_that_is_not_handed_over_is_noticed() -> None:
    with pytest.raises(AssertionError, match="other losses are limited"):
        check(drive_torch, lambda rule: Forgetful(drive_numpy(rule)), RULES["auto"])


@pytest.mark.parametrize("name", [name for name in MAKES if name != "numpy"])
def test_a_state_of_other_settings_is_refused(name: str) -> None:
    stored = drive_numpy(ALRC(observe=16)).state_dict()
    driver = MAKES[name](ALRC(observe=8))
    with pytest.raises(
        (ValueError, RuntimeError, AssertionError), match=r"recent.*(shape|size)|size mismatch for recent"
    ):
        driver.load_state_dict(stored)
    with pytest.raises((ValueError, RuntimeError, AssertionError), match=r"version 2.*version 1"):
        MAKES[name](RULES["reference"]).load_state_dict(stored)
