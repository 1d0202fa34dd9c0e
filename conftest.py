"""What must be so before any framework is imported, and what is left out where one is not installed."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

NEEDS = {"torch": "torch", "jax": "optax", "keras": "keras"}
"""The package whose absence takes a folder of `src/alrc` out of the examples that are run."""
NEEDS |= {"integrations/lightning.py": "lightning", "integrations/transformers.py": "transformers"}

SOURCE = Path(__file__).parent / "src" / "alrc"


def is_installed(package: str) -> bool:
    """Return whether a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def default_backend() -> str:
    """Return the backend of Keras in this process: that of the environment, or the first that is installed."""
    return os.environ.get("KERAS_BACKEND") or next(filter(is_installed, ("torch", "jax", "tensorflow")), "")


# Several devices on one CPU, for the tests of moments across devices; one thread each, as for torch.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if default_backend():
    os.environ["KERAS_BACKEND"] = default_backend()


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out the examples of a backend whose framework is not installed."""
    if SOURCE not in collection_path.parents:
        return None
    inside = collection_path.relative_to(SOURCE).as_posix()
    missing = [part for part, package in NEEDS.items() if inside.startswith(part) and not is_installed(package)]
    return True if missing else None


def pytest_report_header() -> list[str]:
    """Say which frameworks there are, and what is left out without the others."""
    packages = ("torch", "jax", "optax", "flax", "equinox", "keras", "tensorflow", "lightning", "transformers")
    missing = [package for package in (*packages, "accelerate") if not is_installed(package)]
    lines = [f"keras backend: {os.environ.get('KERAS_BACKEND') or 'none installed'}"] if is_installed("keras") else []
    return lines + ([f"not installed, tests that need them are skipped: {', '.join(missing)}"] if missing else [])


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Repeat at the end what was left out, where it is read."""
    left_out = sorted({part for part, package in NEEDS.items() if not is_installed(package)})
    if left_out:
        terminalreporter.write_line(f"examples left out for want of a framework: alrc/{', alrc/'.join(left_out)}")
