"""Check that the documentation tells the truth: its code runs, its links lead somewhere, its commands exist.

Also that every public name says what it takes and returns. Each check has a twin that feeds it something wrong.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import re
import shlex
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
README = REPOSITORY / "README.md"
DOCUMENTS = sorted(
    [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md"), *(REPOSITORY / "src").rglob("*.md")]
)

OPTIONAL = {"torch", "jax", "optax", "flax", "equinox", "keras", "lightning", "transformers", "accelerate"}
"""Frameworks without which a document's other examples still run."""
LABORATORY = {"abtem", "matplotlib", "rich", "tyro"}
"""Packages that `alrc_lab` needs, as far as they show whether it is installed with what it needs."""

# --------------------------------------------------------------------------------------------------- reading Markdown


@dataclasses.dataclass(frozen=True)
class Block:
    """One fenced block: the words after its fence, its text, and the line its text starts on."""

    info: str
    text: str
    line: int


def read(path: Path) -> str:
    """Read a document, or fail with its name."""
    assert path.is_file(), f"{path.name} is missing: it is promised to readers and checked by this test"
    return path.read_text(encoding="utf-8")


def blocks_of(text: str) -> list[Block]:
    """Find the fenced blocks of a Markdown text."""
    found, opened, info, lines = [], 0, "", list[str]()
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("```"):
            if opened:
                found.append(Block(info, textwrap.dedent("\n".join(lines)), opened + 1))
                opened = 0
            else:
                opened, info, lines = number, line.strip().removeprefix("```").strip(), []
        elif opened:
            lines.append(line)
    return found


def prose_of(text: str) -> str:
    """Return a Markdown text without its fenced blocks and code spans."""
    outside = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", outside)


def anchors_of(text: str) -> set[str]:
    """Name the anchors of the headings of a Markdown text."""
    outside = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ +(.+?) *$", outside, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


# ------------------------------------------------------------------------------------------------------- the checks


def missing_frameworks(text: str) -> set[str]:
    """Name the frameworks that a block of Python imports and that are not installed."""
    found = set[str]()
    for node in ast.walk(ast.parse(text)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for module in modules:
            parts = module.split(".")
            found |= {parts[0]} | ({parts[-1]} if parts[0] == "alrc" else set())
    found |= LABORATORY if "alrc_lab" in found else set()
    return {name for name in found & (OPTIONAL | LABORATORY) if importlib.util.find_spec(name) is None}


def run_blocks(path: Path) -> tuple[int, set[str]]:
    """Run the Python blocks of a document in order, in one namespace.

    Return how many there were, and for want of which frameworks others were left out.
    """
    namespace: dict[str, Any] = {"__name__": f"document_{path.stem}"}
    ran, missing = 0, set[str]()
    for block in blocks_of(read(path)):
        words = block.info.replace(",", " ").split()
        if words[:1] == ["python"] and "no-run" not in words:
            if lacks := missing_frameworks(block.text):
                missing |= lacks
                continue
            # Leading newlines make a traceback name the line of the document.
            code = compile("\n" * (block.line - 1) + block.text, str(path), "exec")
            try:
                exec(code, namespace)
            except NameError:
                if not missing:  # else it goes on where one that was left out stopped
                    raise
                continue
            ran += 1
    return ran, missing


def broken_links(path: Path) -> list[str]:
    """List the relative links and images of a document that lead nowhere."""
    text = prose_of(read(path))
    targets = re.findall(r"\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)", text)
    targets += re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, flags=re.MULTILINE)
    targets += re.findall(r"<(?:img|a|source)\b[^>]*?\b(?:src|href|srcset)=\"([^\"]+)\"", text)
    found = []
    for target in targets:
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue
        name, _, anchor = target.partition("#")
        other = (path.parent / name).resolve() if name else path
        if not other.exists():
            found.append(f"{path.name}: {target} does not exist")
        elif anchor and other.suffix == ".md" and anchor not in anchors_of(read(other)):
            found.append(f"{path.name}: {target} has no such heading")
    return found


def commands_in(text: str) -> Iterator[list[str]]:
    """Yield the `make` and `alrc` commands that a Markdown text shows, in blocks and in code spans."""
    lines = [
        line for block in blocks_of(text) if not block.info.startswith("python") for line in block.text.splitlines()
    ]
    outside = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines += re.findall(r"`([^`\n]+)`", outside)
    for line in lines:
        bare = re.sub(r"^\s*(\$ |> )?((\w+)=\S* +)*(\.venv/bin/)?", "", line).partition(" #")[0]
        if re.match(r"(make|alrc) +[a-z-]", bare, flags=re.IGNORECASE):
            yield shlex.split(bare.partition("&&")[0].partition("|")[0])


def unknown_commands(text: str, makefile: str, commands: dict[str, Callable[..., int]], names: set[str]) -> list[str]:
    """List the commands in a text that do not exist, or are given names or flags that do not exist."""
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, flags=re.MULTILINE))
    found = []
    for program, *words in commands_in(text):
        if program == "make":
            found += [f"make {word}" for word in words if "=" not in word and word not in targets]
            continue
        command = " ".join(words[: 2 if words[0] == "data" else 1])
        if command not in commands:
            found.append(f"alrc {command}")
            continue
        if command in {"run", "sweep"} and len(words) > 1 and words[1].islower() and words[1] not in names:
            found.append(f"alrc {command} {words[1]}")
        known = {f"--{parameter.replace('_', '-')}" for parameter in inspect.signature(commands[command]).parameters}
        flags = [word.partition("=")[0] for word in words if word.startswith("--")]
        if command != "run":  # its flags are the fields of the experiment
            found += [f"alrc {command} {flag}" for flag in flags if flag not in known | {"--help"}]
    return found


def named_arguments(docstring: str, section: str) -> set[str]:
    """Return the names that a Google section of a docstring explains."""
    match = re.search(rf"^{section}:\n((?:(?:    .*)?\n?)*)", docstring, flags=re.MULTILINE)
    return set(re.findall(r"^ {4}\*{0,2}(\w+)(?: \([^)]*\))?:", match.group(1), flags=re.MULTILINE)) if match else set()


def described_fields(kind: type) -> set[str]:
    """Return the fields of a class that are followed by a string of their own."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = set()
    for field, text in zip(body.body, body.body[1:], strict=False):
        is_text = (
            isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
        )
        if is_text and isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            found.add(field.target.id)
    return found


def undocumented(module: ModuleType) -> list[str]:
    """List what the docstrings of a module's public names leave out or invent."""
    found = []
    for name in module.__all__:
        thing = getattr(module, name)
        where = f"{module.__name__}.{name}"
        if inspect.isfunction(thing):
            found += [f"{where}: {lack}" for lack in _lacks_of_function(thing, is_strict=True)]
        elif inspect.isclass(thing):
            found += [f"{where}: {lack}" for lack in _lacks_of_class(thing)]
            for key, member in vars(thing).items():
                function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
                if isinstance(member, property):
                    function = member.fget
                if not key.startswith("_") and inspect.isfunction(function):
                    lacks = _lacks_of_function(function, is_strict=False)
                    found += [f"{where}.{key}: {lack}" for lack in lacks]
    return found


def _lacks_of_function(function: Callable[..., Any], *, is_strict: bool) -> Iterator[str]:
    """Compare a docstring with a signature; a method may leave a section out, but not get one wrong."""
    text = inspect.getdoc(function) if function.__doc__ else None
    if not text:
        yield "no docstring"
        return
    signature = inspect.signature(function)
    takes = {name for name in signature.parameters if name not in {"self", "cls"}}
    told = named_arguments(text, "Args")
    if told or is_strict:
        yield from (f"Args says nothing of {name}" for name in sorted(takes - told))
        yield from (f"Args explains {name}, which it does not take" for name in sorted(told - takes))
    if (
        is_strict
        and signature.return_annotation not in (None, "None")
        and not re.search(r"^(Returns|Yields):", text, re.M)
    ):
        yield "no Returns"


def _lacks_of_class(kind: type) -> Iterator[str]:
    """Compare the docstring of a class with what its constructor takes."""
    if not kind.__doc__:
        yield "no docstring"
        return
    text = inspect.cleandoc(kind.__doc__)
    if getattr(kind, "_is_protocol", False):
        return
    if dataclasses.is_dataclass(kind):
        takes = {field.name for field in dataclasses.fields(kind) if field.init}
    elif hasattr(kind, "_fields"):
        takes = set(kind._fields)  # type: ignore[attr-defined]
    elif "__init__" in vars(kind):
        takes = set(inspect.signature(kind).parameters)
    else:
        return
    told = named_arguments(text, "Args") | named_arguments(text, "Attributes") | described_fields(kind)
    yield from (f"nothing about {name}" for name in sorted(takes - told))


def unexplained(project: str, text: str) -> list[str]:
    """Compare the dependencies of a pyproject.toml with the tables of reasons, one section for each extra."""
    table = tomllib.loads(project)["project"]
    found = []
    for extra, lines in {"": table["dependencies"], **table["optional-dependencies"]}.items():
        names = {re.split(r"[\s<>=!~;\[]", line)[0] for line in lines} - {"alrc"}
        heading = f"`alrc[{extra}]`" if extra else "`pip install alrc`"
        section = re.search(rf"^## [^\n]*{re.escape(heading)}(.*?)(?=^## |\Z)", text, flags=re.DOTALL | re.MULTILINE)
        told = set(re.findall(r"^\| ([\w-]+) \| [^|\s]", section.group(1), flags=re.MULTILINE)) if section else set()
        told.discard("package")
        found += [f"{heading}: no reason for {name}" for name in sorted(names - told)]
        found += [f"{heading}: {name} is no dependency" for name in sorted(told - names)]
    return found


# ------------------------------------------------------------------------------------------------ the real documents


# Keras reads torch's weights in a way that numpy is going to leave behind.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.parametrize("path", [README, *(p for p in DOCUMENTS if p != README)], ids=lambda path: path.name)
def test_code_in_documents_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran, missing = run_blocks(path)
    assert ran or path != README, "README.md has no example that can be pasted and run"
    if missing:
        pytest.skip(f"the examples that need {', '.join(sorted(missing))} were left out; {ran} others ran")


@pytest.mark.parametrize("path", [README, *(p for p in DOCUMENTS if p != README)], ids=lambda path: path.name)
def test_links_in_documents_lead_somewhere(path: Path) -> None:
    assert broken_links(path) == []


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_commands_in_documents_exist(name: str) -> None:
    pytest.importorskip("tyro", reason="the laboratory is not installed")
    commands = importlib.import_module("alrc_lab.commands").COMMANDS
    experiments = importlib.import_module("alrc_lab.experiments")
    text = read(REPOSITORY / name)
    assert list(commands_in(text)), f"{name} shows no command"
    names = {*experiments.EXPERIMENTS, *experiments.STUDIES}
    assert unknown_commands(text, read(REPOSITORY / "Makefile"), commands, names) == []


def test_readme_names_its_two_commands() -> None:
    shown = {tuple(words) for words in commands_in(read(README))}
    assert ("make", "demo") in shown
    assert ("make", "test") in shown


PUBLIC = ["alrc", "alrc.ops", "alrc.moments", "alrc.rules", "alrc.reference", "alrc.conformance"]
PUBLIC += ["alrc.torch", "alrc.torch.conformance", "alrc.jax", "alrc.jax.conformance"]
PUBLIC += ["alrc.keras", "alrc.keras.conformance", "alrc.integrations.lightning", "alrc.integrations.transformers"]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        pytest.skip(f"{error.name} is not installed")
    assert module.__all__, f"{name} has no public name"
    assert undocumented(module) == []


def test_every_dependency_has_a_reason() -> None:
    project = read(REPOSITORY / "pyproject.toml")
    assert unexplained(project, read(REPOSITORY / "docs" / "design" / "0001-dependencies.md")) == []


# ------------------------------------------------------------------------------------------------ the failing twins


def write(folder: Path, text: str) -> Path:
    path = folder / "page.md"
    path.write_text(text, encoding="utf-8")
    return path


def test_code_that_fails_is_reported(tmp_path: Path) -> None:
    page = write(tmp_path, "# Page\n\n```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as caught:
        run_blocks(page)
    assert caught.traceback[-1].lineno == 7  # counted from 0: the eighth line of the page


def test_only_marked_code_is_left_out(tmp_path: Path) -> None:
    page = write(tmp_path, "```python no-run\n1 / 0\n```\n```bash\nfalse\n```\n```python\nx = 1\n```\n")
    assert run_blocks(page) == (1, set())


@pytest.mark.parametrize("line", ["import flax.nnx", "from equinox import nn", "from alrc.keras import ALRC"])
def test_code_for_a_framework_that_is_missing_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in OPTIONAL else find_spec(name))
    ran, missing = run_blocks(write(tmp_path, f"```python\nx = 1\n```\n```python\n{line}\n1 / 0\n```\n"))
    assert ran == 1
    assert len(missing) == 1


def test_a_missing_document_is_named(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"page\.md is missing"):
        read(tmp_path / "page.md")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[a](nowhere.md)", "nowhere.md does not exist"),
        ("![a](figures/nowhere.png 'title')", None),  # not Markdown: titles stand in double quotes
        ('![a](figures/nowhere.png "title")', "figures/nowhere.png does not exist"),
        ('<img src="nowhere.svg" alt="a">', "nowhere.svg does not exist"),
        ("[a]: nowhere.md", "nowhere.md does not exist"),
        ("[a](#no-such-heading)", "#no-such-heading has no such heading"),
        ("[a](page.md#a-heading)\n\n# A heading!", None),
        ("[a](https://example.org/nowhere) `[b](nowhere.md)`", None),
    ],
)
def test_a_broken_link_is_reported(tmp_path: Path, text: str, complaint: str | None) -> None:
    assert broken_links(write(tmp_path, text)) == ([f"page.md: {complaint}"] if complaint else [])


def _fake_sweep(study: str, *, preset: str = "quick", dry_run: bool = False) -> int:
    raise NotImplementedError(study, preset, dry_run)


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("```bash\nmake demo\nALRC_DATA=/data make PYTHON=python3.12 test   # a comment\n```", []),
        ("`make nothing` and `alrc sweep table1 --dry-run`", ["make nothing"]),
        ("please make nothing of it", []),
        ("```\n$ alrc dance\n```", ["alrc dance"]),
        ("`alrc data steal`", ["alrc data steal"]),
        ("`.venv/bin/alrc sweep table1 --presets quick`", ["alrc sweep --presets"]),
        ("`alrc sweep table9`", ["alrc sweep table9"]),
        ("`alrc sweep STUDY --preset paper`", []),
    ],
)
def test_an_unknown_command_is_reported(text: str, unknown: list[str]) -> None:
    makefile = ".PHONY: demo test\ndemo: x\n\techo\ntest:\n\techo\n"
    assert unknown_commands(text, makefile, {"sweep": _fake_sweep}, {"table1"}) == unknown


def test_a_dependency_without_reason_is_reported() -> None:
    project = '[project]\ndependencies = ["numpy>=1.26"]\noptional-dependencies.lab = ["rich>=13", "alrc[torch]"]\n'
    told = (
        "## The core: `pip install alrc`\n\n| package | reason |\n|---|---|\n| numpy | arrays |\n\n## `alrc[lab]`\n\n"
    )
    assert unexplained(project, f"{told}| rich | tables |\n") == []
    assert unexplained(project, f"{told}| rich | |\n") == ["`alrc[lab]`: no reason for rich"]
    assert unexplained(project, f"{told}| rich | a |\n| tyro | b |\n") == ["`alrc[lab]`: tyro is no dependency"]


PROMISE = "Do.\n\n        Args:\n            a: One.\n        "


@pytest.mark.parametrize(
    ("text", "complaints"),
    [
        ("def thing(): pass", ["no docstring"]),
        ("def thing(a) -> None:\n    'Do.'", ["Args says nothing of a"]),
        (f"def thing(a) -> int:\n        '''{PROMISE}'''", ["no Returns"]),
        (f"def thing() -> None:\n        '''{PROMISE}'''", ["Args explains a, which it does not take"]),
        (f"def thing(a) -> int:\n        '''{PROMISE}\n        Returns:\n            Two.\n        '''", []),
        ("class thing:\n    def __init__(self, a): pass", ["no docstring"]),
        ("class thing:\n    'Be.'\n    def __init__(self, a): pass", ["nothing about a"]),
        (f"class thing:\n        '''{PROMISE}'''\n        def __init__(self, a): pass", []),
        (
            "import typing\nclass thing(typing.NamedTuple):\n    'Be.'\n    a: int\n    'One.'\n    b: int",
            ["nothing about b"],
        ),
        ("class thing:\n    'Be.'\n    @property\n    def a(self): pass", ["no docstring"]),
        (f"class thing:\n    'Be.'\n    def do(self, a):\n        '''{PROMISE}'''", []),
        (
            f"class thing:\n    'Be.'\n    @classmethod\n    def do(cls, b):\n        '''{PROMISE}'''",
            ["Args says nothing of b", "Args explains a, which it does not take"],
        ),
    ],
    ids=range(12),
)
def test_a_poor_docstring_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, complaints: list[str]
) -> None:
    (tmp_path / "specimen.py").write_text(f"{text}\n\n__all__ = ['thing']\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "specimen", raising=False)
    found = undocumented(importlib.import_module("specimen"))
    monkeypatch.delitem(sys.modules, "specimen")
    assert [line.partition(": ")[2] for line in found] == complaints
