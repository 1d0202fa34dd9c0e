"""Drive `alrc.keras.ALRC` on any backend from one process, as `drivers.py` drives the others.

Each backend has a process of its own (keras_server.py). That of tensorflow has an environment of its own too, which
`make test-keras` makes; without it, what needs it is skipped.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import pickle
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alrc
from alrc import rules
from drivers import Driver, Step

SERVER = Path(__file__).with_name("keras_server.py")
TENSORFLOW = Path(__file__).parents[2] / ".venv-tensorflow" / "bin" / "python"


def interpreter(backend: str) -> str:
    """Return the Python that has Keras and a backend, or skip and say what is missing."""
    if importlib.util.find_spec("keras") and importlib.util.find_spec(backend):
        return sys.executable
    if backend == "tensorflow" and TENSORFLOW.exists():
        return str(TENSORFLOW)
    how = "; `make .venv-tensorflow/.installed` makes it an environment" if backend == "tensorflow" else ""
    pytest.skip(f"needs keras and {backend}{how}")


class Server:
    """A process that holds layers of one backend."""

    def __init__(self, backend: str) -> None:
        environment = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(Path(alrc.__file__).parents[1])}
        self.process = subprocess.Popen(
            [interpreter(backend), str(SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        atexit.register(self.close)

    def ask(self, *request: Any) -> Any:
        """Send a request and return the answer, or raise what went wrong there."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        pickle.dump(request, self.process.stdin)
        self.process.stdin.flush()
        is_good, answer = pickle.load(self.process.stdout)
        assert is_good, f"the Keras process failed:\n{answer}"
        return answer

    def close(self) -> None:
        """End the process."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        self.process.wait(20)


server = cache(Server)
"""Return the process of a backend, started when it is first asked for."""


class KerasDriver:
    """Step a layer that lives elsewhere."""

    def __init__(self, backend: str, rule: rules.ALRC, *, double: bool = False) -> None:
        self.server = server(backend)
        self.dtype: Any = np.float64 if double else np.float32
        self.layer = self.server.ask("make", rule, np.dtype(self.dtype).name)

    def step(self, losses: Any, narrow: bool = False) -> Step:
        name = "bfloat16" if narrow else np.dtype(self.dtype).name
        return Step(*self.server.ask("step", self.layer, np.asarray(losses, dtype=self.dtype), name))

    def read(self) -> tuple[float, float, float]:
        return tuple(self.server.ask("read", self.layer))

    def state_dict(self) -> dict[str, Any]:
        return self.server.ask("save", self.layer)

    def load_state_dict(self, stored: dict[str, Any]) -> None:
        # A file between two environments holds what both can read.
        self.server.ask("load", self.layer, {name: np.asarray(value) for name, value in stored.items()})


def drive_keras(backend: str, *, double: bool = False) -> Any:
    """Return what makes drivers of a backend."""

    def make(rule: rules.ALRC) -> Driver:
        return KerasDriver(backend, rule, double=double)

    return make


drive_keras_torch, drive_keras_jax, drive_keras_tensorflow = map(drive_keras, ("torch", "jax", "tensorflow"))
