"""Turn words on the command line into commands, and errors into one line and an exit code.

At module level it imports the standard library alone, so that a bare `pip install alrc` can still say which packages
the laboratory needs. What the commands do is in commands.py.
"""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

OVERVIEW = """\
usage: alrc COMMAND [options]        alrc COMMAND --help explains a command and gives an example

Train with and without adaptive learning rate clipping, compare, and report.

{commands}

Start here:
  alrc sweep table1 --preset quick

Every command takes --json: one JSON document on standard output and nothing else there.

{exit_codes}"""

EXIT_CODES = """\
Exit codes:
  0    done; a run that diverged is a result, not a failure
  1    at least one run failed or is not done; the others are, and repeating the command tries it again
  2    bad input, or something is missing; one line says what, and what to do
  130  interrupted; repeat the command to go on"""

OURS = frozenset({"alrc", "alrc_lab"})
ASK = frozenset({"-h", "--help"})

BOUND = frozenset({"run", "describe"})
"""Commands whose flags are the settings of an experiment."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The words after `alrc`; those of this process by default.

    Returns:
        The exit code, as EXIT_CODES explains it. A defect of this program is raised, with its traceback.
    """
    try:
        return _dispatch(list(sys.argv[1:] if argv is None else argv))
    except SystemExit as stop:  # the flag parser has said what it had to say
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        return _complain("interrupted; repeat the command to go on", 130)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in OURS:
            raise
        return _complain(f"the laboratory needs the package '{error.name}': pip install 'alrc[lab]'", 2)
    except Exception as error:
        if not _is_for_people(error):
            raise
        return _complain(" ".join(str(error).split()), 2)


def _dispatch(words: list[str]) -> int:
    """Find the command, let tyro read its flags, and run it."""
    import tyro

    from alrc_lab.commands import COMMANDS

    if words == ["--version"]:
        print(f"alrc {metadata.version('alrc')}")
        return 0
    size = 2 if words[:1] == ["data"] and words[1:2] and words[1] not in ASK else 1
    name, flags = " ".join(words[:size]), words[size:]
    if name in {"", "data", *ASK}:
        lines = [f"  {known:<13} {_about(function).partition(chr(10))[0]}" for known, function in COMMANDS.items()]
        print(OVERVIEW.format(commands="\n".join(lines), exit_codes=EXIT_CODES))
        return 0 if ASK & set(words) else 2
    if name not in COMMANDS:
        raise ValueError(f"there is no command '{name}'; the commands are {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    about = f"{_about(command)}\n\n{EXIT_CODES}"
    marks: tuple[Any, ...] = (
        tyro.conf.PositionalRequiredArgs,
        tyro.conf.FlagCreatePairsOff,
        tyro.conf.DisallowNone,
    )
    if name in BOUND:
        if not flags or flags[0] in ASK:
            print(f"usage: alrc {name} EXPERIMENT [--preset NAME] [options]\n\n{about}\n\n{_experiments()}")
            return 0 if flags else 2
        command, name, flags = _bind_experiment(name, flags[0], flags[1:])
        marks = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    return tyro.cli(command, prog=f"alrc {name}", description=about, args=flags, config=marks)


def _bind_experiment(name: str, experiment_name: str, flags: list[str]) -> tuple[Callable[..., int], str, list[str]]:
    """Make a command whose flags are the fields of an experiment's Config, with a preset's defaults if one is named.

    Returns:
        The command, its name, and the flags that are left.
    """
    from alrc_lab.commands import COMMANDS, load_named
    from alrc_lab.experiments import EXPERIMENTS

    experiment = load_named(EXPERIMENTS, experiment_name, "experiment")
    presets = getattr(experiment, "PRESETS", {})
    default, name_here, rest = experiment.Config(), f"{name} {experiment_name}", flags
    flag, equals, preset = flags[0].partition("=") if flags else ("", "", "")
    if flag == "--preset":
        preset, rest = (preset, flags[1:]) if equals else (" ".join(flags[1:2]), flags[2:])
        if preset not in presets:
            known = f"it has {', '.join(presets)}" if presets else "it has none; name its settings one by one"
            raise ValueError(f"{experiment_name} has no preset '{preset}'; {known}")
        default, name_here = presets[preset], f"{name_here} --preset {preset}"
    elif any(word.partition("=")[0] == "--preset" for word in flags):
        raise ValueError(f"--preset comes first: alrc {name} {experiment_name} --preset NAME [options]")

    def run(config: Any = default, *, out: Path = Path("results"), json: bool = False) -> int:
        """Run the experiment.

        Args:
            config: Settings of the experiment.
            out: Folder to hold runs/NAME-HASH.
            json: Print one JSON document instead of text; progress goes to standard error.
        """
        return COMMANDS["run"](experiment, config, out=out, json=json)

    def describe(config: Any = default, *, json: bool = False) -> int:
        """Show what the experiment would train.

        Args:
            config: Settings of the experiment.
            json: Print one JSON document instead of text.
        """
        return COMMANDS["describe"](experiment, config, json=json)

    command = {"run": run, "describe": describe}[name]
    command.__annotations__["config"] = experiment.Config
    return command, name_here, rest


def _experiments() -> str:
    """List the experiments for the help of `alrc run`."""
    from alrc_lab.experiments import DESCRIPTIONS, EXPERIMENTS

    lines = [f"  {name:<24} {DESCRIPTIONS.get(name, '')}" for name in EXPERIMENTS]
    return "\n".join(["Experiments (add --help for the flags and presets of one):", *lines])


def _about(command: Callable[..., int]) -> str:
    """Return what a command's docstring says before it comes to the arguments."""
    return inspect.cleandoc(command.__doc__ or "").partition("Args:")[0].rstrip()


def _is_for_people(error: Exception) -> bool:
    """Tell a message meant for people, from this project or the file system, from a defect that needs its traceback."""
    if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in OURS:
        return True
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    raised_in = str(frames[-1].f_globals.get("__name__", "")) if frames else ""
    return isinstance(error, ValueError) and raised_in.partition(".")[0] in OURS


def _complain(message: str, code: int) -> int:
    """Write one line to standard error and return the exit code."""
    print(f"alrc: {message}", file=sys.stderr)
    return code
