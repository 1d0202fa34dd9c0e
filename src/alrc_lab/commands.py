"""Do what the commands promise: one function for each command of the command line.

Each takes plain values, prints for people or (with `json`) one JSON document, and returns the exit code. Parsing flags
and telling errors is cli.py's business, how things look is live.py's.
"""

from __future__ import annotations

import errno
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from rich.console import Console

from alrc_lab import runner
from alrc_lab.completion_commands import complete_scan, simulate_partial_scan
from alrc_lab.data_commands import fetch_data, show_data
from alrc_lab.experiments import DESCRIPTIONS, EXPERIMENTS, PRESETS, STUDIES
from alrc_lab.live import (
    RunsView,
    cells_table,
    data_line,
    duration,
    finish,
    layers_table,
    open_console,
    outcome,
    say,
    states_table,
)
from alrc_lab.runner.folder import plain_errors

MOST_ROWS = 500  # of a table that somebody may read


def list_experiments(*, json: bool = False) -> int:
    """Name the experiments, and the studies with their presets.

    For example:

        alrc list

    Args:
        json: Print one JSON document instead of text.
    """
    document = {
        "experiments": [{"name": name, "description": DESCRIPTIONS.get(name, "")} for name in EXPERIMENTS],
        "studies": [
            {
                "name": name,
                "description": DESCRIPTIONS.get(name, ""),
                "presets": PRESETS[name],
            }
            for name in STUDIES
        ],
    }
    console = open_console(json)
    say(console, "experiments (alrc run NAME):")
    for experiment in document["experiments"]:
        say(console, f"  {experiment['name']:<24} {experiment['description']}")
    say(console, "studies (alrc sweep NAME --preset PRESET):")
    for study in document["studies"]:
        say(console, f"  {study['name']:<24} {study['description']}")
        for preset, description in study["presets"].items():
            say(console, f"    {preset:<22} {description}")
    return finish(json, document)


def run_experiment(experiment: ModuleType, config: Any, *, out: Path, json: bool = False) -> int:
    """Run one experiment in this process, print its numbers, and keep everything in a run folder.

    The folder's name follows from the settings and the data: the same command goes on where it stopped, and does
    nothing when it is done.

    For example:

        alrc run cifar10-supersampling --seed 1

    Args:
        experiment: Module with Config, ENTRY, EXCLUDED, resolve and name_of.
        config: Its settings.
        out: Folder to hold runs/NAME-HASH.
        json: Print one JSON document instead of text.
    """
    console = open_console(json, shows_progress=True)
    resolved, inputs = experiment.resolve(config)
    spec = runner.RunSpec(experiment.ENTRY, resolved, inputs, experiment.EXCLUDED, experiment.name_of(config))
    folder = runner.prepare(spec, out)
    say(console, data_line(inputs))
    state = runner.inspect_run(folder)
    if state.is_done:
        say(console, "this run is already done; these are its numbers")
    else:
        with RunsView(console, [state], workers=1) as view:
            (state,) = runner.sweep([folder], executor="inline", on_poll=view.update)
    for key, number in (state.summary or {}).items():
        say(console, f"  {key}: {'not finite' if number is None else format(number, '.6g')}")
    say(console, outcome(state))
    say(console, f"run folder: {folder}")
    return finish(json, {**state.to_json(), "folder": str(folder), "data": inputs}, int(state.state == "failed"))


def describe_experiment(experiment: ModuleType, config: Any, *, json: bool = False) -> int:
    """Show the layers that an experiment would train, their parameters and their cost; trains nothing.

    For example:

        alrc describe partial-stem --variant code43

    Args:
        experiment: Module with `layers_of`.
        config: Its settings.
        json: Print one JSON document instead of text.
    """
    if not hasattr(experiment, "layers_of"):
        name = experiment.__name__.rpartition(".")[2].replace("_", "-")
        raise ValueError(f"{name} has no table of layers; docs/experiments.md describes its network")
    layers = experiment.layers_of(config)
    console = open_console(json)
    console.print(layers_table(layers))
    total = sum(layer["copies"] * layer["parameters"] for layer in layers)
    gmac = sum(layer["copies"] * layer["mmac"] for layer in layers) / 1e3
    say(console, f"{total:,} parameters; {gmac:.2f} billion multiplications with an addition, forward, for one example")
    return finish(json, {"layers": layers, "parameters": total, "gmac": gmac})


def sweep_study(
    study: str,
    *,
    preset: str = "quick",
    out: Path | None = None,
    data: str | None = None,
    seeds: int | None = None,
    executor: Literal["processes", "inline", "ray"] = "processes",
    workers: int | None = None,
    address: str | None = None,
    gpus_per_run: float = 1.0,
    pack: int = 1,
    dry_run: bool = False,
    json: bool = False,
) -> int:
    """Run every run of a study that is not done yet, then write its report and print its table.

    Says what it will do, and how long that takes, before it starts. Stop it whenever you like: repeating the
    command goes on where it stopped. `--preset paper --dry-run` shows the published protocol and its cost.

    For example:

        alrc sweep table1 --preset quick

    Args:
        study: Name of the study, from `alrc list`.
        preset: Size of the study, from `alrc list`.
        out: Folder for runs and report; by default one under results/ named after study, preset and data.
        data: Path of the data set; by default the first of the places that `alrc data status` lists.
        seeds: Repeats of every cell; by default as many as the preset has.
        executor: `processes` runs several at once, `inline` one after the other in this process, `ray` on a cluster.
        workers: Runs at once; by default one for each core, of the whole cluster if there is one.
        address: Address of a Ray cluster; by default `ray` starts one on this machine.
        gpus_per_run: Part of a GPU that `ray` gives to a run on the device `cuda`.
        pack: Runs that train as one program, where the experiment can: faster for small networks, and their numbers
            differ by rounding. 1 trains each alone, 0 takes as many as pay.
        dry_run: Stop after saying what would be run and how long it would take.
        json: Print one JSON document instead of text; progress goes to standard error.
    """
    for name, number in (("seeds", seeds), ("workers", workers)):
        if number is not None and number < 1:
            raise ValueError(f"--{name} must be at least 1, not {number}")
    if pack < 0:
        raise ValueError(f"--pack must be 1 for none, 0 for as many as pay, or a number of runs; not {pack}")
    module = load_named(STUDIES, study, "study")
    if preset not in PRESETS[study]:
        raise ValueError(f"{study} has no preset '{preset}'; it has {', '.join(PRESETS[study])}")
    plan = module.plan(preset, data=data, seeds=seeds)
    root = Path(plan.default_out) if out is None else out
    console = open_console(json, shows_progress=True)
    say(console, data_line(plan.study["data"]))
    keys = ("entry", "config", "inputs", "excluded", "name")
    specs = [runner.RunSpec(*(run[key] for key in keys)) for run in plan.runs]
    folders = [root / "runs" / spec.folder_name for spec in specs]
    if not dry_run:
        folders = _prepare_runs(plan, specs, root)
    states = [runner.inspect_run(folder) for folder in folders]
    limit = workers
    workers, threads = _share_cores(executor, workers, address)
    document = {"study": study, "preset": preset, "folder": str(root), "data": plan.study["data"]}
    document |= {"executor": executor, "workers": workers, "threads": threads, "total": len(plan.runs), "pack": pack}
    told, seconds = _announce(console, plan, states, workers, threads, pack)
    document |= told
    if dry_run:
        say(console, "dry run: nothing was started and nothing written")
        return finish(json, document | {"dry_run": True})

    view = RunsView(console, states, workers, seconds={folders[place]: cost for place, cost in seconds.items()})
    interrupted = False
    try:
        with view:
            states = runner.sweep(
                folders,
                executor=executor,
                workers=limit if address else workers,  # a cluster may grow
                threads=threads,
                on_poll=view.update,
                address=address,
                gpus_per_run=gpus_per_run,
                largest_pack=pack or None,
            )
    except KeyboardInterrupt:
        interrupted = True
        states = [runner.inspect_run(folder) for folder in folders]
    done = sum(state.is_done for state in states)
    failed = [state for state in states if state.state == "failed"]
    document |= {"done": done, "failed": len(failed), "interrupted": interrupted}
    document |= {"runs": [state.to_json() for state in states]}
    if interrupted:
        say(console, f"interrupted: {done} of {len(states)} runs are done; repeat the command to go on")
        return finish(json, document, 130)
    for state in failed:
        say(console, f"failed: {state.name}: {state.message} ({state.folder / 'failure.json'} has more)")
    others = len(states) - done - len(failed)
    elsewhere = f", {others} held by another process" if others else ""
    say(console, f"{done} of {len(states)} runs are done, {len(failed)} failed{elsewhere}")
    return finish(json, document | _report(console, root), int(done < len(states)))


def show_status(folder: Path, *, json: bool = False) -> int:
    """Show how far the runs in a folder are, while they run or afterwards.

    For example:

        alrc status results/table1-quick-cifar10-8068

    Args:
        folder: Folder of a study, or of one run.
        json: Print one JSON document instead of text.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    if (folder / "config.json").exists():
        members = [folder]
    elif (folder / "study.json").exists():
        study = runner.read_study(folder)
        references = [study["references"]] if "references" in study else []
        members = [folder / run["folder"] for run in references + study["runs"]]
    else:
        members = sorted(path.parent for path in folder.glob("runs/*/config.json"))
    if not members:
        raise FileNotFoundError(f"{folder} holds no run: no study.json, no config.json and no runs/*/config.json")
    states = [runner.inspect_run(member) for member in members]
    counts = {name: sum(state.state == name for state in states) for name in dict.fromkeys(s.state for s in states)}
    console = open_console(json)
    if not json:
        shown = states if len(states) <= MOST_ROWS else [state for state in states if not state.is_done][:MOST_ROWS]
        console.print(states_table(shown))
        if len(shown) < len(states):
            say(console, f"… {len(states) - len(shown):,} more runs; --json tells them all")
    say(console, "runs: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    here = runner.code_version()
    others = [state.name for state in states if state.is_done and state.code_version not in (None, here)]
    if others:
        say(console, f"warning: {len(others)} done run(s) were made by other code than this ({here}): {others[0]} …")
    document = {"folder": str(folder), "counts": counts, "runs": [state.to_json() for state in states]}
    return finish(json, document | {"code_version": here, "made_by_other_code": others}, 1 if "failed" in counts else 0)


def write_report(folder: Path, *, json: bool = False) -> int:
    """Write the report of a study folder again from its runs, and print its table.

    Reads run folders only, so it also works for old runs and while a sweep is running.

    For example:

        alrc report results/table1-quick-cifar10-8068

    Args:
        folder: Folder of a study: the one with study.json in it.
        json: Print one JSON document instead of text.
    """
    if not (folder / "study.json").is_file():
        raise FileNotFoundError(f"{folder} is not the folder of a study: it has no study.json")
    return finish(json, _report(open_console(json), folder))


COMMANDS: dict[str, Callable[..., int]] = {
    "list": list_experiments,
    "describe": describe_experiment,
    "run": run_experiment,
    "sweep": sweep_study,
    "status": show_status,
    "report": write_report,
    "complete": complete_scan,
    "simulate-scan": simulate_partial_scan,
    "data status": show_data,
    "data fetch": fetch_data,
}


def load_named(registry: Mapping[str, str], name: str, kind: str) -> ModuleType:
    """Import the module that a name on the command line stands for.

    Args:
        registry: Names and the modules they stand for.
        name: What was typed.
        kind: What it should be, for the error: "experiment" or "study".

    Returns:
        The module.

    Raises:
        ValueError: If there is no such name; it lists the known ones.
    """
    if name not in registry:
        raise ValueError(f"there is no {kind} '{name}'; known are {', '.join(registry)} (see alrc list)")
    return importlib.import_module(registry[name])


def _prepare_runs(plan: Any, specs: list[runner.RunSpec], root: Path) -> list[Path]:
    """Write study.json, which refuses a folder that holds something else, and then make the run folders."""
    study = {**plan.study, "runs": []}
    for spec, run in zip(specs, plan.runs, strict=True):
        folder = f"runs/{spec.folder_name}"
        if run["cell"] is None:
            study["references"] = {**study["references"], "folder": folder}
        else:
            study["runs"].append({"folder": folder, "cell": run["cell"], "seed": run["seed"]})
    runner.write_study(root, study)
    return [runner.prepare(spec, root) for spec in specs]


def _announce(
    console: Console, plan: Any, states: list[runner.RunState], workers: int, threads: int, pack: int
) -> tuple[dict[str, Any], dict[int, float]]:
    """Say what will be run and how long it will take; return the same as JSON, and what each run costs by its place."""
    total = len(plan.runs)
    waiting = [place for place, state in enumerate(states) if not state.is_done]
    documents = [{} if states[place].state == "failed" else plan.runs[place] for place in waiting]
    packs = [[waiting[i] for i in members] for members in runner.packing.group(documents, pack or None, workers)]
    titles = {panel["id"]: panel["title"] for panel in plan.study["panels"]}
    cells = [
        {
            "cell": cell["id"],
            "panel": titles[cell["panel"]],
            "row": cell["row"],
            "column": cell["column"],
            "runs": sum(run["cell"] == cell["id"] for run in plan.runs),
        }
        for cell in plan.study["cells"]
    ]
    console.print(cells_table(cells))
    largest = max((len(members) for members in packs), default=1)
    what = f", packs of up to {largest} runs" * (largest > 1)
    say(console, f"{total} runs in {len(cells)} cells · {workers} at once{what} · threads each: {threads}")
    if len(waiting) < total:
        say(console, f"{total - len(waiting)} of {total} runs are already done")
    if not waiting:
        return {"cells": cells, "packs": [], "estimate": None}, {}
    say(console, "timing a few steps of each kind of run …")
    estimate = plan.estimate(workers, threads, packs, {place: states[place].step for place in waiting})
    which = f"all {total} runs" if len(waiting) == total else f"what is left, {len(waiting)} runs,"
    say(console, f"estimate for {which} on this machine: about {duration(estimate.seconds)}")
    for line in estimate.detail:
        say(console, f"  {line}")
    told = {"seconds": estimate.seconds, "runs": len(waiting), "detail": list(estimate.detail)}
    return {"cells": cells, "packs": [len(members) for members in packs], "estimate": told}, estimate.runs


def _report(console: Console, root: Path) -> dict[str, Any]:
    """Write the report of a study, print its table, which ends with the report's path, and return both as JSON."""
    from alrc_lab import report  # loads matplotlib, a second that no other command needs

    try:
        index = report.build(root)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        with plain_errors(root / "report"):
            raise
    results = report.load(root)
    console.print(report.render_text(results))
    return {"report": str(index), "results": report.to_json(results)}


def _share_cores(executor: str, workers: int | None, address: str | None) -> tuple[int, int]:
    """Choose how many runs go at once and how many threads each gets, so that cores are neither idle nor shared.

    Must not look at how many runs are left: a resumed run needs the threads it had, to end with the same sums.
    """
    if address is not None and executor == "ray":
        return workers or runner.executors.cluster_cores(address), 1
    cores = runner.available_cores()
    at_once = 1 if executor == "inline" else workers or cores
    return at_once, max(cores // at_once, 1)
