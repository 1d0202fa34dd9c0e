"""Fixtures for every test: fixed seeds, one thread for torch, and the way to real data."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest

# Derandomised: a red test stays red when it is run again. No deadline: a busy machine is not a defect.
hypothesis.settings.register_profile("alrc", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("alrc")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Start every test from the same random state, and torch on one thread; a framework not yet loaded stays so."""
    random.seed(20)
    np.random.seed(20)  # noqa: NPY002 - the global generator is the one to pin
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(20)
        torch.set_num_threads(1)


@pytest.fixture
def alrc_data() -> Path:
    """Give the folder that ALRC_DATA names, or skip and say why."""
    named = os.environ.get("ALRC_DATA")
    if not named:
        pytest.skip("needs real data: set ALRC_DATA to a folder that holds cifar-10-batches-bin/ and stem/")
    root = Path(named)
    if not root.is_dir():
        pytest.fail(f"ALRC_DATA names {root}, which is not a folder")
    return root
