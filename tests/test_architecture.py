"""Check who may import whom, that `import alrc` has no side effect, and the sizes and names of files.

The rules are the table below. Each check has a twin that feeds it a small tree with a violation, which it must report.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCE = REPOSITORY / "src"

FRAMEWORKS = {
    "torch",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "keras",
    "tensorflow",
    "lightning",
    "transformers",
    "accelerate",
}
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}
MAX_LINES = 600
WARN_LINES = 400


@dataclass(frozen=True)
class Rule:
    """What the modules under one prefix may import.

    Args:
        ours: Modules of this repository; "a.*" means a and everything below it, "a" means a alone.
        packages: Packages from elsewhere, allowed anywhere in a file. None: any that is not a framework.
        lazy: Packages allowed inside functions only.
    """

    ours: tuple[str, ...] = ()
    packages: frozenset[str] | None = frozenset({"numpy"})
    lazy: frozenset[str] = frozenset()


LAB_SHELL = Rule(("alrc_lab.*", "alrc.*"), None)
BACKEND = ("alrc", "alrc.ops", "alrc.rules.*", "alrc.moments")

IMPORT_NAMES = {"scikit-image": "skimage", "pillow": "PIL", "rosettasciio": "rsciio"}

# The longest matching prefix decides. "x.__init__" is the package file of x and nothing below it.
RULES = {
    "alrc.__init__": Rule(("alrc.ops", "alrc.moments", "alrc.rules", "alrc.reference")),
    "alrc.ops": Rule(),
    "alrc.moments": Rule(),
    "alrc.rules": Rule(("alrc.ops", "alrc.moments", "alrc.rules.*")),
    "alrc.reference": Rule(),
    "alrc.conformance": Rule(("alrc.conformance.*",)),
    "alrc.torch": Rule((*BACKEND, "alrc.torch.*"), frozenset({"numpy", "torch"})),
    # Wraps stabilisers for the kit; no other backend knows it.
    "alrc.torch.conformance": Rule(("alrc.conformance.*", "alrc.torch.conformance.*"), frozenset({"numpy", "torch"})),
    "alrc.jax": Rule((*BACKEND, "alrc.jax.*"), frozenset({"numpy", "jax", "optax"})),
    "alrc.jax.conformance": Rule(("alrc.conformance.*", "alrc.jax.*", *BACKEND), frozenset({"numpy", "jax"})),
    # Its replicas can only be asked in tensorflow's own words.
    "alrc.keras": Rule((*BACKEND, "alrc.keras.*"), frozenset({"numpy", "keras"}), lazy=frozenset({"tensorflow"})),
    "alrc.keras.conformance": Rule(
        ("alrc.conformance.*", "alrc.keras.*", *BACKEND),
        frozenset({"numpy", "keras"}),
        lazy=frozenset({"tensorflow", "jax", "torch"}),
    ),
    "alrc.integrations.__init__": Rule(packages=frozenset()),
    "alrc.integrations.lightning": Rule((*BACKEND, "alrc.torch.*"), frozenset({"torch", "lightning"})),
    "alrc.integrations.transformers": Rule((*BACKEND, "alrc.torch.*"), frozenset({"torch", "transformers"})),
    "alrc_lab.__init__": Rule(),
    "alrc_lab.data": Rule(("alrc_lab.data.*",), None),
    "alrc_lab.experiments.__init__": Rule(packages=frozenset()),
    "alrc_lab.experiments.recorder": Rule(),
    "alrc_lab.experiments": Rule(
        ("alrc_lab.experiments.*", "alrc_lab.data.*", "alrc.*"),
        frozenset({"numpy", "scipy", "torch", "jax", "keras"}),
        lazy=frozenset({"safetensors", "skimage"}),
    ),
    "alrc_lab.experiments.theory": Rule(
        ("alrc_lab.experiments.*", "alrc_lab.data.*", "alrc.*"),
        frozenset({"numpy", "scipy", "statsmodels"}),
    ),
    "alrc_lab.completion": Rule(
        ("alrc_lab.completion_scan", "alrc_lab.data.*", "alrc_lab.experiments.*", "alrc_lab.runner.*"),
        frozenset({"numpy", "torch"}),
        lazy=frozenset({"safetensors"}),
    ),
    "alrc_lab.completion_scan": Rule(("alrc_lab.data.*",)),
    "alrc_lab.completion_files": Rule(("alrc_lab.data.*",), lazy=frozenset({"PIL", "tifffile"})),
    "alrc_lab.completion_commands": LAB_SHELL,
    "alrc_lab.runner": Rule(("alrc_lab.runner.*",), None, lazy=frozenset({"torch"})),
    "alrc_lab.report": Rule(("alrc_lab.report.*",), None),
    # cli.py must load without the laboratory's dependencies, so that it can name what is missing.
    "alrc_lab.cli": Rule(("alrc_lab.*",), frozenset(), lazy=frozenset({"rich", "tyro"})),
    "alrc_lab.commands": LAB_SHELL,
    "alrc_lab.data_commands": LAB_SHELL,
    "alrc_lab.live": LAB_SHELL,
    "alrc_lab.__main__": LAB_SHELL,
}

# Their frameworks are extras of their own.
BACKENDS = [
    rule for name, rule in RULES.items() if name.startswith(("alrc.torch", "alrc.jax", "alrc.keras", "alrc.integ"))
]


@dataclass(frozen=True)
class Import:
    """One imported module, where it stands, and whether it is loaded only when a function is called."""

    module: str
    line: int
    is_lazy: bool
    is_for_types: bool


def module_name(path: Path, source: Path) -> str:
    """Name a file the way the table does: a.b for a/b.py, a.b.__init__ for a/b/__init__.py."""
    return ".".join(path.relative_to(source).with_suffix("").parts)


def imports_of(path: Path, source: Path) -> Iterator[Import]:
    """Yield every import statement of a file, also inside functions and under TYPE_CHECKING."""
    package = module_name(path, source).split(".")[:-1]

    def visit(node: ast.AST, is_lazy: bool, is_for_types: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, is_lazy, is_for_types)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                parts = source.joinpath(*inner.split("."))
                is_module = parts.is_dir() or parts.with_suffix(".py").exists()
                yield Import(inner if is_module else origin, node.lineno, is_lazy, is_for_types)
        is_guard = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, is_lazy or is_function, is_for_types or is_guard)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), False, False)


def matches(module: str, pattern: str) -> bool:
    """Tell whether "a.b" falls under the pattern "a.b" or "a.*"."""
    stem = pattern.removesuffix(".*")
    return module == stem or (pattern.endswith(".*") and module.startswith(f"{stem}."))


def rule_for(name: str) -> Rule | None:
    """Find the rule with the longest prefix of a module's name."""
    fitting = [prefix for prefix in RULES if name == prefix or name.startswith(f"{prefix}.")]
    return RULES[max(fitting, key=len)] if fitting else None


def import_violations(source: Path) -> list[str]:
    """Compare every import under a source folder with the table."""
    ours = {path.name for path in source.iterdir() if path.is_dir()} | {"alrc", "alrc_lab"}
    found = []
    for path in sorted(source.rglob("*.py")):
        name = module_name(path, source)
        rule = rule_for(name)
        if rule is None:
            found.append(f"{name}: no rule says what it may import; add one to the table")
            continue
        for item in imports_of(path, source):
            top = item.module.split(".")[0]
            if top in sys.stdlib_module_names:
                continue
            if top in ours:
                is_allowed = any(matches(item.module, pattern) for pattern in rule.ours)
            elif rule.packages is None:
                is_allowed = top not in FRAMEWORKS
            else:
                is_allowed = top in rule.packages
            if (
                not is_allowed
                and not (top in rule.lazy and item.is_lazy)
                and not (item.is_for_types and top not in ours)
            ):
                when = "inside a function" if item.is_lazy else "at module level"
                found.append(f"{name}:{item.line} imports {item.module} {when}")
    return list(dict.fromkeys(found))


def size_violations(folders: list[Path]) -> list[str]:
    """List the Python files that are too long or whose name says nothing."""
    found = []
    for path in sorted(file for folder in folders for file in folder.rglob("*.py")):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_LINES:
            found.append(f"{path.name} has {lines} lines, more than {MAX_LINES}")
        elif lines > WARN_LINES:
            found.append(f"{path.name} has {lines} lines, more than {WARN_LINES}: time to split it")
        names = {path.stem, path.parent.name}
        if names & FORBIDDEN_NAMES:
            found.append(f"{path.parent.name}/{path.name}: a name that says nothing")
    return found


def declared_packages(project: str, extra: str) -> set[str]:
    """Return the import names of the packages that a pyproject.toml declares for an extra, or "" for the core."""
    table = tomllib.loads(project)["project"]
    wanted = table["optional-dependencies"].get(extra, []) if extra else table["dependencies"]
    names = {re.split(r"[\s<>=!~;\[]", line)[0] for line in wanted} - {"alrc"}
    return {IMPORT_NAMES.get(name, name).replace("-", "_") for name in names}


def dependency_violations(source: Path, project: str) -> list[str]:
    """List the packages that are imported but not declared, or declared but not imported."""
    found = []
    core = declared_packages(project, "")
    lab = (
        declared_packages(project, "lab")
        | declared_packages(project, "micrographs")
        | declared_packages(project, "ray")
    )
    declared = {"alrc": core, "alrc_lab": core | lab}
    for package, allowed in declared.items():
        imported = {
            item.module.split(".")[0]
            for path in (source / package).rglob("*.py")
            for item in imports_of(path, source)
            if rule_for(module_name(path, source)) not in BACKENDS
        } - {*sys.stdlib_module_names, "alrc", "alrc_lab"}
        found += [f"{package} imports {name}, which is not declared" for name in sorted(imported - allowed)]
        found += [f"{name} is declared for {package}, which does not import it" for name in sorted(allowed - imported)]
    return found


# Runs in a process of its own. numpy comes first, because what it does to the process is not alrc's doing.
PROBE = """
import json, os, random, signal, sys, warnings
import numpy as np

def look():
    return {
        "numpy's random state": repr(np.random.get_state()),
        "random's state": repr(random.getstate()),
        "numpy's error state": repr(np.geterr()),
        "numpy's print options": repr(np.get_printoptions()),
        "warning filters": repr(warnings.filters),
        "environment": repr(dict(os.environ)),
        "sys.path": repr(sys.path),
        "signal handlers": repr([signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]),
    }

before, loaded = look(), set(sys.modules)
import alrc
after = look()
changed = [name for name in before if before[name] != after[name]]
new = {name.partition(".")[0] for name in set(sys.modules) - loaded}
with open(sys.argv[1], "w") as file:
    json.dump({"changed": changed, "loaded": sorted(new)}, file)
"""


def side_effects(source: Path, scratch: Path) -> list[str]:
    """Import `alrc` from a source folder in a fresh process and list what that did."""
    answer = scratch / "answer.json"
    environment = os.environ | {"PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.run(
        [sys.executable, "-c", PROBE, str(answer)], env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    seen = json.loads(answer.read_text())
    found = [f"loads {name}" for name in seen["loaded"] if name in FRAMEWORKS | {"alrc_lab"}]
    found += [f"changes {name}" for name in seen["changed"]]
    found += [f"writes to {name}" for name in ("stdout", "stderr") if getattr(process, name)]
    return found


def make_tree(root: Path, files: dict[str, str]) -> Path:
    """Write a small source tree."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def test_imports_follow_the_table() -> None:
    assert list(SOURCE.rglob("*.py")), "nothing to check"
    assert import_violations(SOURCE) == []


def test_files_are_short_and_well_named() -> None:
    # A long list of cases is easier to read in one file than in two, so tests only have the upper limit.
    assert size_violations([SOURCE]) == []
    others = size_violations([REPOSITORY / name for name in ("tests", "benchmarks") if (REPOSITORY / name).exists()])
    assert [line for line in others if not line.endswith("time to split it")] == []


def test_every_dependency_is_declared_and_needed() -> None:
    assert dependency_violations(SOURCE, (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")) == []


def test_import_has_no_side_effect(tmp_path: Path) -> None:
    assert side_effects(SOURCE, tmp_path) == []


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("alrc/rules.py", "from alrc.reference import trace", "alrc.rules:1 imports alrc.reference at module level"),
        ("alrc/rules.py", "from .reference import trace", "alrc.rules:1 imports alrc.reference at module level"),
        ("alrc/rules.py", "from . import reference", "alrc.rules:1 imports alrc.reference at module level"),
        ("alrc/rules.py", "from alrc import reference", "alrc.rules:1 imports alrc.reference at module level"),
        ("alrc/reference.py", "import alrc.rules", "alrc.reference:1 imports alrc.rules at module level"),
        (
            "alrc/reference.py",
            "def f():\n    import alrc.rules",
            "alrc.reference:2 imports alrc.rules inside a function",
        ),
        ("alrc/moments.py", "import torch", "alrc.moments:1 imports torch at module level"),
        ("alrc/moments.py", "import scipy.stats", "alrc.moments:1 imports scipy.stats at module level"),
        ("alrc/__init__.py", "from alrc.torch import ALRC", "alrc.__init__:1 imports alrc.torch at module level"),
        ("alrc/__init__.py", "import alrc_lab.data", "alrc.__init__:1 imports alrc_lab.data at module level"),
        ("alrc/torch.py", "import alrc.jax", "alrc.torch:1 imports alrc.jax at module level"),
        ("alrc/torch.py", "if 1:\n    import keras", "alrc.torch:2 imports keras at module level"),
        (
            "alrc_lab/runner/folder.py",
            "from alrc_lab.report import load",
            "alrc_lab.runner.folder:1 imports alrc_lab.report at module level",
        ),
        ("alrc_lab/runner/folder.py", "import torch", "alrc_lab.runner.folder:1 imports torch at module level"),
        ("alrc_lab/report/stats.py", "import torch", "alrc_lab.report.stats:1 imports torch at module level"),
        (
            "alrc_lab/report/stats.py",
            "from alrc_lab import experiments",
            "alrc_lab.report.stats:1 imports alrc_lab.experiments at module level",
        ),
        (
            "alrc_lab/data/cifar10.py",
            "from alrc_lab.runner import x",
            "alrc_lab.data.cifar10:1 imports alrc_lab.runner at module level",
        ),
        (
            "alrc_lab/experiments/one.py",
            "def f():\n    from alrc_lab import runner",
            "alrc_lab.experiments.one:2 imports alrc_lab.runner inside a function",
        ),
        (
            "alrc_lab/experiments/__init__.py",
            "import torch",
            "alrc_lab.experiments.__init__:1 imports torch at module level",
        ),
        ("alrc_lab/cli.py", "import tyro", "alrc_lab.cli:1 imports tyro at module level"),
        ("alrc_lab/plots.py", "import json", "alrc_lab.plots: no rule says what it may import; add one to the table"),
    ],
)
def test_a_forbidden_import_is_reported(tmp_path: Path, name: str, text: str, complaint: str) -> None:
    tree = {f"alrc/{part}.py": "" for part in ("__init__", "rules", "reference", "torch", "jax")}
    tree |= {f"alrc_lab/{part}/__init__.py": "" for part in ("data", "experiments", "runner", "report")}
    assert import_violations(make_tree(tmp_path, tree | {name: text})) == [complaint]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("alrc/torch.py", "import torch\nfrom alrc import rules\nfrom alrc.moments import Moments"),
        ("alrc_lab/runner/folder.py", "def threads():\n    import torch"),
        ("alrc_lab/experiments/one.py", "import torch\nfrom alrc.torch import ALRC\nfrom alrc_lab.data import load"),
        ("alrc_lab/cli.py", "def main():\n    import tyro\n    from alrc_lab.commands import COMMANDS"),
    ],
)
def test_an_allowed_import_is_not_reported(tmp_path: Path, name: str, text: str) -> None:
    tree = {f"alrc/{part}.py": "" for part in ("__init__", "rules", "moments", "torch")}
    tree |= {"alrc_lab/data/__init__.py": "", "alrc_lab/commands.py": ""}
    assert import_violations(make_tree(tmp_path, tree | {name: text})) == []


@pytest.mark.parametrize(
    ("name", "lines", "complaint"),
    [
        ("alrc/rules.py", 601, "more than 600"),
        ("alrc/rules.py", 401, "more than 400"),
        ("alrc/utils.py", 1, "a name that says nothing"),
        ("alrc_lab/common/stats.py", 1, "a name that says nothing"),
    ],
)
def test_a_long_or_vague_file_is_reported(tmp_path: Path, name: str, lines: int, complaint: str) -> None:
    found = size_violations([make_tree(tmp_path, {name: "x = 1\n" * lines})])
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("core", "lab", "complaints"),
    [
        ("import numpy", "import skimage.io", []),
        ("import numpy, scipy", "import skimage", ["alrc imports scipy, which is not declared"]),
        ("import numpy", "import skimage\ndef f():\n    import rich", ["alrc_lab imports rich, which is not declared"]),
        ("import numpy", "", ["skimage is declared for alrc_lab, which does not import it"]),
        ("", "import skimage", ["numpy is declared for alrc, which does not import it"]),
    ],
)
def test_a_wrong_dependency_is_reported(tmp_path: Path, core: str, lab: str, complaints: list[str]) -> None:
    project = '[project]\ndependencies = ["numpy>=1.26"]\noptional-dependencies.lab = ["scikit-image>=0.24"]\n'
    tree = {"alrc/rules.py": core, "alrc_lab/data/one.py": lab, "alrc/torch.py": "import torch"}
    tree["alrc_lab/commands.py"] = "import numpy, skimage" if not core else "import numpy"
    found = dependency_violations(make_tree(tmp_path, tree), project)
    assert found == complaints


@pytest.mark.parametrize(
    ("text", "effect"),
    [
        ("import torch", "loads torch"),
        ("print('hello')", "writes to stdout"),
        ("import sys; sys.stderr.write('hello')", "writes to stderr"),
        ("import numpy; numpy.random.seed(0)", "changes numpy's random state"),
        ("import random; random.random()", "changes random's state"),
        ("import numpy; numpy.seterr(all='ignore')", "changes numpy's error state"),
        ("import warnings; warnings.simplefilter('ignore')", "changes warning filters"),
        ("import os; os.environ['OMP_NUM_THREADS'] = '1'", "changes environment"),
    ],
)
def test_a_side_effect_is_reported(tmp_path: Path, text: str, effect: str) -> None:
    source = make_tree(tmp_path / "src", {"alrc/__init__.py": text, "torch.py": ""})
    assert side_effects(source, tmp_path) == [effect]


def test_a_clean_import_is_not_reported(tmp_path: Path) -> None:
    assert side_effects(make_tree(tmp_path / "src", {"alrc/__init__.py": "import numpy"}), tmp_path) == []
