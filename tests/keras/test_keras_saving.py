"""Save, load elsewhere, go on: the same losses, decisions and weights to the last bit."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="these are the tests of alrc.keras")

import alrc  # noqa: E402 - what cannot be imported is skipped first
from alrc.keras import LimitedModel  # noqa: E402

SCRIPT = Path(__file__).with_name("resume_run.py")


def load_script() -> Any:
    """Import the script that the other process runs."""
    spec = importlib.util.spec_from_file_location("resume_run", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run = load_script()


def go_on_elsewhere(file: Path, folder: Path) -> Any:
    """Load a model in another process, fit one epoch, and return what it knows then."""
    answer = folder / "answer.npz"
    environment = {
        **os.environ,
        "KERAS_BACKEND": keras.backend.backend(),
        "PYTHONPATH": str(Path(alrc.__file__).parents[1]),
    }
    made = subprocess.run(
        [sys.executable, str(SCRIPT), str(file), str(answer)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    return np.load(answer)


def test_two_epochs_are_one_and_one_in_another_process(tmp_path: Path) -> None:
    straight = run.make()
    logs = run.fit(straight, 2)
    assert logs[1]["z_alrc_limited"] > 0, "nothing is limited after the load"
    first = run.make()
    run.fit(first, 1)
    first.save(tmp_path / "model.keras")
    answer = go_on_elsewhere(tmp_path / "model.keras", tmp_path)
    assert answer["loss"] == logs[1]["loss"]
    assert answer["limited"] == np.float64(logs[1]["z_alrc_limited"])
    want = run.facts(straight)
    assert {name for name in want if name.startswith("b")} >= {"b rate", "b recent"}
    for name, value in want.items():
        np.testing.assert_array_equal(answer[name], value, err_msg=name)


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    """Forget one limiter's mean, and the next epoch differs."""
    first = run.make()
    run.fit(first, 1)
    twin = keras.models.clone_model(first)
    twin.compile("adam", ["mse", "sparse_categorical_crossentropy"])
    twin.set_weights(first.get_weights())
    twin.limits["z"].mean.assign(0.0)
    assert run.fit(twin, 1)[0]["loss"] != run.fit(first, 1)[0]["loss"]


def test_weights_alone(tmp_path: Path) -> None:
    first, second = run.make(), run.make()
    run.fit(first, 1)
    first.save_weights(tmp_path / "model.weights.h5")
    second.optimizer.build(second.trainable_variables)  # Keras asks for it with any model
    second.load_weights(tmp_path / "model.weights.h5")
    want, got = run.facts(first), run.facts(second)
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def test_configuration_without_compilation(tmp_path: Path) -> None:
    first = run.make()
    run.fit(first, 1)
    first.save(tmp_path / "model.keras")
    second = keras.models.load_model(tmp_path / "model.keras", compile=False)
    assert isinstance(second, LimitedModel)
    want, got = run.facts(first), run.facts(second)
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
    inputs, _ = run.data()
    for ours, theirs in zip(second.predict(inputs, verbose=0), first.predict(inputs, verbose=0), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    second.model.save(tmp_path / "plain.keras")
    plain = keras.models.load_model(tmp_path / "plain.keras")
    assert not isinstance(plain, LimitedModel)
    np.testing.assert_array_equal(plain.predict(inputs, verbose=0)[0], first.predict(inputs, verbose=0)[0])
