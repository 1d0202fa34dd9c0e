"""Learn from the losses of all replicas: state and decisions are those of one device on the joined batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="these are the tests of alrc.keras")

import alrc  # noqa: E402 - what cannot be imported is skipped first

SCRIPT = Path(__file__).with_name("replica_run.py")
BACKEND = keras.backend.backend()
NAMES = ("start", "auto", "paper", "both sides")

pytestmark = pytest.mark.skipif(BACKEND == "torch", reason="Keras has no replicas on torch")


def fit(number: int, how: str, folder: Path) -> Any:
    """Fit in a process of its own, whose devices are parts of one CPU."""
    environment = {**os.environ, "KERAS_BACKEND": BACKEND, "PYTHONPATH": str(Path(alrc.__file__).parents[1])}
    answer = folder / f"{number}-{how}.npz"
    command = [sys.executable, str(SCRIPT), str(number), how, str(answer)]
    made = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return np.load(answer)


def check(found: Any) -> None:
    """Compare the state after two epochs, and the share of limited losses."""
    for name in NAMES:
        parts = [key.split("/")[2] for key in found.files if key.startswith(f"alone/{name}/")]
        assert {"mean", "var", "count", "limited"} <= {*parts}
        assert found[f"alone/{name}/limited"][-1] > 0, "nothing was limited"
        for part in parts:
            told = f"{name}: {part}"
            alone, together = found[f"alone/{name}/{part}"], found[f"together/{name}/{part}"]
            np.testing.assert_allclose(together, alone, rtol=1e-6, atol=1e-6, err_msg=told)
        if f"replicas/{name}" in found.files:
            replicas = found[f"replicas/{name}"]
            assert len(replicas) > 1
            assert np.ptp(replicas) == 0, "the replicas disagree"


@pytest.mark.parametrize("number", [2, pytest.param(4, marks=pytest.mark.dist)])
def test_is_one_device_on_the_joined_batch(number: int, tmp_path: Path) -> None:
    check(fit(number, "joined", tmp_path))


@pytest.mark.skipif(BACKEND == "jax", reason="on jax the joined batch is one array: there is nothing to leave out")
@pytest.mark.dist
def test_goes_red_where_each_replica_learns_alone(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        check(fit(2, "apart", tmp_path))
