"""Check what the studies of learning rates and batch sizes plan, and the two numbers that say how wild a run was."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from alrc_lab import report, runner

pytest.importorskip("torch", reason="the experiment trains with torch")
from alrc_lab.experiments import batch_size, cifar10_supersampling, unstable_lr
from alrc_lab.experiments.cifar10_supersampling import Config
from alrc_lab.experiments.supersampling_replicas import pack_key


def test_unstable_rates_are_those_of_the_authors() -> None:
    plan = unstable_lr.plan("paper", data="embedded")
    rates = {(run["config"]["optimizer"], run["config"]["learning_rate"]) for run in plan.runs}
    assert rates == {("adam", 1e-4), ("adam", 2e-3), ("sgd", 1e-4), ("sgd", 3e-3)}
    for run in plan.runs:
        config = run["config"]
        assert (config["error"], config["batch_size"], config["width"]) == ("squared", 1, 64)
        assert (config["iterations"], config["precision"], config["num_stddev"]) in {
            (100_000, "float32", None),
            (100_000, "float32", 2.0),
        }
    limits = {(run["config"]["num_stddev"], run["config"]["variant"]) for run in plan.runs}
    assert {(2.0, "scripts"), (2.0, "auto")} == {limit for limit in limits if limit[0]}


def test_each_limited_cell_is_paired_with_the_same_rate_without_a_limit() -> None:
    plan = unstable_lr.plan("smoke", data="embedded")
    cells = {cell["id"]: cell for cell in plan.study["cells"]}
    for cell in cells.values():
        if cell["row"] != "∞":
            baseline = cells[cell["baseline"]]
            assert (baseline["panel"], baseline["column"], baseline["row"]) == (cell["panel"], cell["column"], "∞")
    assert Counter(cell["column"] for cell in cells.values()) == {"stable rate": 6, "unstable rate": 6}
    assert len({run["name"] for run in plan.runs}) == len(plan.runs) == 24


def test_batch_sizes_differ_in_nothing_else() -> None:
    plan = batch_size.plan("quick", data="embedded", seeds=2)
    own = {"batch_size", "num_stddev", "seed"}
    rest = {str({key: value for key, value in run["config"].items() if key not in own}) for run in plan.runs}
    assert len(rest) == 1
    assert [run["config"]["batch_size"] for run in plan.runs] == [1] * 4 + [2] * 4 + [4] * 4 + [8] * 4 + [16] * 4
    assert {run["config"]["num_stddev"] for run in plan.runs} == {None, 3.0}
    assert {run["config"]["variant"] for run in plan.runs} == {"auto"}


@pytest.mark.parametrize("study", [unstable_lr, batch_size])
def test_every_preset_is_planned_and_wrong_ones_are_refused(study: Any) -> None:
    for preset in study.PRESETS:
        plan = study.plan(preset, data="embedded")
        assert plan.study["preset"] == preset
        assert plan.default_out.startswith(f"results/{plan.study['study']}-{preset}-")
        seeds = {
            cell["id"]: sorted(r["seed"] for r in plan.runs if r["cell"] == cell["id"]) for cell in plan.study["cells"]
        }
        assert all(found == list(range(len(found))) and len(found) > 1 for found in seeds.values())
        kinds = {(run["config"]["batch_size"], run["config"]["optimizer"]) for run in plan.runs}
        assert len({pack_key(run["config"]) for run in plan.runs}) == len(kinds), "runs of one shape train together"
    with pytest.raises(ValueError, match="huge"):
        study.plan("huge", data="embedded")
    with pytest.raises(ValueError, match="0"):
        study.plan("smoke", data="embedded", seeds=0)


@pytest.mark.parametrize("study", [unstable_lr, batch_size])
def test_a_small_study_is_run_together_and_reported(study: Any, tmp_path: Path) -> None:
    plan = study.plan("smoke", data="embedded", seeds=2)
    specs, members = [], []
    for run in plan.runs:
        run["config"] |= {"iterations": 20, "final_window": 5}
        specs.append(runner.RunSpec(*(run[key] for key in ("entry", "config", "inputs", "excluded", "name"))))
        members.append({"folder": f"runs/{specs[-1].folder_name}", "cell": run["cell"], "seed": run["seed"]})
    runner.write_study(tmp_path, {**plan.study, "runs": members})
    states = runner.sweep([runner.prepare(spec, tmp_path) for spec in specs], executor="inline")
    assert {state.state for state in states} == {"finished"}
    document = report.to_json(report.load(tmp_path))
    for cell in document["cells"]:
        assert cell["estimate"]["n"] == 2
        assert all(found["estimate"]["n"] == 2 for found in cell["metrics"].values())


def wildness(errors: np.ndarray, iterations: int | None = None) -> tuple[float, int]:
    """Say how wild a run of these errors was."""
    config = Config(iterations=iterations or len(errors), final_window=1)
    trainer: Any = SimpleNamespace(config=config, errors=errors.astype(np.float32), step=len(errors), num_limited=0.0)
    summary = cifar10_supersampling.outcome_of(trainer, None)["summary"]
    return summary["worst_stretch"], summary["num_spikes"]


def test_spikes_are_counted_as_a_person_would() -> None:
    errors = np.ones(2_000)  # stretches of 10
    assert wildness(errors) == (1.0, 0)
    errors[:200] = 50.0  # the first tenth does not count
    assert wildness(errors) == (1.0, 0)
    errors[500] = 20.0
    assert wildness(errors) == (pytest.approx(2.9), 1)
    errors[500:560] = 4.0  # long, but one
    assert wildness(errors) == (4.0, 1)
    errors[1995] = 20.0
    assert wildness(errors) == (4.0, 2)
    errors[200] = 20.0  # the first that counts
    assert wildness(errors) == (4.0, 3)
    errors[600:610] = 1.4  # not enough to be one
    assert wildness(errors) == (4.0, 3)


def test_spikes_of_random_runs_are_those_of_a_slow_count() -> None:
    rng = np.random.default_rng(0)
    counts = set[int]()
    for _ in range(30):
        errors = rng.lognormal(0, 1.5, 1_000).astype(np.float32)
        means = [errors[a : a + 5].astype(float).mean() for a in range(100, 1_000, 5)]
        high = [mean > 1.5 * np.median(means) for mean in means]
        spikes = sum(key for key, _ in itertools.groupby(high))
        counts.add(spikes)
        assert wildness(errors) == (pytest.approx(max(means)), spikes)
    assert len(counts) > 3


def test_a_run_too_short_for_a_stretch_has_no_spike() -> None:
    assert wildness(np.ones(50), iterations=2_000) == (0.0, 0)
    assert wildness(np.ones(1)) == (1.0, 0)
