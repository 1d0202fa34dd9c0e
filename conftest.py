"""What must be so before any framework is imported, and what is left out where one is not installed."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent
LABORATORY = (
    "filelock",
    "jinja2",
    "matplotlib",
    "platformdirs",
    "polars",
    "psutil",
    "pyarrow",
    "rich",
    "scipy",
    "tyro",
)
NEEDS = {
    "src/alrc/torch": ("torch",),
    "src/alrc/jax": ("jax", "optax"),
    "src/alrc/keras": ("keras",),
    "src/alrc/integrations/lightning.py": ("lightning",),
    "src/alrc/integrations/transformers.py": ("transformers",),
    "src/alrc_lab": LABORATORY,
    "tests/lab": LABORATORY,
}
"""Packages whose absence takes something out of what is collected. Other tests say themselves what they need."""


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


def missing_for(path: Path) -> list[str]:
    """Name the packages that a file or folder needs and that are not installed."""
    inside = path.relative_to(ROOT).as_posix() if ROOT in path.parents else ""
    needed = [packages for part, packages in NEEDS.items() if f"{inside}/".startswith(f"{part}/")]
    return [package for packages in needed for package in packages if not is_installed(package)]


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out scripts that tests start, and what needs a package that is not installed."""
    is_test = collection_path.name.startswith(("test_", "conftest"))
    is_script = ROOT / "tests" in collection_path.parents and collection_path.suffix == ".py" and not is_test
    return True if is_script or missing_for(collection_path) else None


def pytest_report_header() -> list[str]:
    """Say which frameworks there are, and what is left out without the others."""
    packages = ("torch", "jax", "optax", "flax", "equinox", "keras", "tensorflow", "lightning", "transformers")
    missing = [package for package in (*packages, "accelerate") if not is_installed(package)]
    lines = [f"keras backend: {os.environ.get('KERAS_BACKEND') or 'none installed'}"] if is_installed("keras") else []
    return lines + ([f"not installed, tests that need them are skipped: {', '.join(missing)}"] if missing else [])


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Repeat at the end what was left out, where it is read."""
    for part, packages in NEEDS.items():
        if missing := [package for package in packages if not is_installed(package)]:
            terminalreporter.write_line(f"left out: {part}, for want of {', '.join(missing)}")
