"""Check what the study of Table 1 plans, and one of its runs killed for real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from alrc_lab import report, runner
from alrc_lab.runner import packing

pytest.importorskip("torch", reason="the experiment trains with torch")
import torch

from alrc_lab.experiments import cifar10_supersampling as experiment
from alrc_lab.experiments import supersampling_study, table1
from alrc_lab.experiments.cifar10_supersampling import Config


def test_paper_is_the_published_table() -> None:
    plan = table1.plan("paper", data="embedded")
    assert len(plan.runs) == 310
    assert len(plan.study["cells"]) == 31
    assert set(Counter(run["cell"] for run in plan.runs).values()) == {10}
    for run in plan.runs:
        config = run["config"]
        assert (config["iterations"], config["final_window"], config["width"]) == (100_000, 5_000, 64)
        assert config["learning_rate"] == 1 / 1280
        assert config["drop_at"] == (54_687 if config["batch_size"] == 64 else None)
        assert (config["variant"], config["precision"]) == ("reference", "float32")
    published = {(c["panel"], c["column"], c["row"]): c["published"]["mean"] for c in plan.study["cells"]}
    assert published["quartic", "batch 1", "∞"] == 3.88
    assert published["squared", "batch 64", "3"] == 3.90
    assert ("squared", "batch 64", "2") not in published
    assert sum(published.values()) == pytest.approx(SUM_OF_TABLE_1)
    assert plan.study["differences"][0].startswith("Data:")


SUM_OF_TABLE_1 = (
    (5.55 + 4.96 + 4.58)
    + (5.52 + 4.96 + 4.58 + 3.90)
    + (5.56 + 4.97 + 4.58 + 3.89)
    + (5.55 + 4.98 + 4.59 + 3.89)
    + (3.54 + 3.02 + 2.60 + 1.65)
    + (3.59 + 3.08 + 2.61 + 1.58)
    + (3.61 + 3.13 + 2.64 + 1.57)
    + (3.88 + 3.32 + 2.74 + 1.61)
)


def test_variants_compares_the_default_rule_with_the_authors_library() -> None:
    plan = table1.plan("variants", data="embedded", seeds=2)
    cells = {c["id"]: c["baseline"] for c in plan.study["cells"]}
    for error in ("quartic", "squared"):
        assert cells[f"{error}-b1-n3-auto"] == f"{error}-b1-n3"
        assert cells[f"{error}-b1-n3"] == f"{error}-b1-ninf"
        assert cells[f"{error}-b1-ninf"] is None
    assert [c["published"] is None for c in plan.study["cells"]] == ["auto" in c["id"] for c in plan.study["cells"]]
    variants = {run["cell"]: (run["config"]["variant"], run["config"]["num_stddev"]) for run in plan.runs}
    assert variants["quartic-b1-n3-auto"] == ("auto", 3.0)
    assert variants["quartic-b1-n3"] == ("reference", 3.0)
    assert len({run["name"] for run in plan.runs}) == len(plan.runs) == 12
    assert len({(run["config"]["iterations"], run["config"]["width"]) for run in plan.runs}) == 1


@pytest.mark.parametrize("preset", ["smoke", "quick"])
def test_small_presets_hold_the_five_cells(preset: str) -> None:
    plan = table1.plan(preset, data="embedded")
    cells = {(c["panel"], c["row"]): c["baseline"] for c in plan.study["cells"]}
    quartic, squared = "quartic-b1-ninf", "squared-b1-ninf"
    assert cells == {
        ("quartic", "∞"): None,
        ("quartic", "3"): quartic,
        ("quartic", "2"): quartic,
        ("squared", "∞"): None,
        ("squared", "3"): squared,
    }
    seeds = {cell: {r["seed"] for r in plan.runs if r["cell"] == cell} for cell in (quartic, "quartic-b1-n3")}
    assert seeds[quartic] == seeds["quartic-b1-n3"]
    assert len(seeds[quartic]) > 1
    assert all(run["config"]["num_stddev"] is None for run in plan.runs if run["cell"] == quartic)
    assert any("Width" in sentence for sentence in plan.study["differences"])


def test_medium_is_the_whole_table_in_small() -> None:
    plan, paper = table1.plan("medium", data="embedded"), table1.plan("paper", data="embedded")
    assert {c["id"] for c in plan.study["cells"]} == {c["id"] for c in paper.study["cells"]}
    seeds = Counter(run["cell"] for run in plan.runs)
    assert min(seeds.values()) == 3
    assert seeds["quartic-b1-n3"] == 8
    batches = [run["config"]["batch_size"] for run in plan.runs]
    assert batches == sorted(batches), "what costs little comes first"
    assert all(run["config"]["width"] == 16 for run in plan.runs)
    assert {run["config"]["drop_at"] for run in plan.runs if run["config"]["batch_size"] == 64} == {5469}
    assert len(table1.plan("medium", data="embedded", seeds=2).runs) == 62


def test_seeds_and_errors() -> None:
    assert len(table1.plan("quick", data="embedded", seeds=3).runs) == 15
    with pytest.raises(ValueError, match="0"):
        table1.plan("quick", data="embedded", seeds=0)
    with pytest.raises(ValueError, match="large"):
        table1.plan("large", data="embedded")


def test_estimate_adds_up() -> None:
    plan = table1.plan("smoke", data="embedded")
    one, two = plan.estimate(1, 1), plan.estimate(2, 1)
    assert one.seconds > 0
    assert 0.2 < two.seconds / one.seconds < 2, "half of it, up to the noise of a busy machine"
    assert "3,840 updates" in one.detail[0]
    assert "packs" not in one.detail[0]


def test_estimate_knows_packs_what_is_left_and_what_costs_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, str, int]] = []

    def measured(config: Config, replicas: int = 1) -> float:
        asked.append((config.batch_size, config.optimizer, replicas))
        return 0.001 * config.batch_size / replicas

    monkeypatch.setattr(supersampling_study, "measure_step_s", measured)
    plan = table1.plan("medium", data="embedded", seeds=4)
    packs = packing.group(plan.runs, None, 2)
    estimate = plan.estimate(2, 1, packs)
    assert asked == [(1, "adam", 8), (4, "adam", 4), (16, "adam", 1), (64, "adam", 1)]
    assert estimate.detail[0] == (
        "width 16, batch 1, bfloat16: 0.1 ms a run's update in packs of 8 × 320,000 updates, on 1 thread"
    )
    assert estimate.detail[2] == "width 16, batch 16, bfloat16: 16.0 ms an update × 320,000 updates, on 1 thread"
    of_batch = {batch: sum(run["config"]["batch_size"] == batch for run in plan.runs) for batch in (1, 4, 16, 64)}
    costs = {1: 1 / 8, 4: 1.0, 16: 16.0, 64: 64.0}
    total = sum(10 * costs[batch] * number for batch, number in of_batch.items())
    assert estimate.seconds == pytest.approx(total / 2)
    assert sum(estimate.runs.values()) == pytest.approx(total)

    some = plan.estimate(2, 1, packs[-2:], {packs[-1][0]: 2_500})
    assert sorted(some.runs.values()) == pytest.approx([480, 640])
    assert some.seconds == pytest.approx(640), "one worker waits for the other"
    variants = table1.plan("variants", data="embedded")
    assert len(variants.estimate(2, 1).detail) == 1, "what ALRC it is makes no kind of its own"


def test_a_pack_is_timed_in_its_own_way() -> None:
    config = Config(width=8, iterations=1, num_stddev=3.0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone, together = (supersampling_study.measure_step_s(config, number, 0.0) for number in (1, 3))
    finally:
        torch.set_num_threads(before)
    assert alone > 0
    assert together > 0


def test_a_run_that_diverges_is_a_result_and_stands_in_the_table(tmp_path: Path) -> None:
    plan = table1.plan("smoke", data="embedded", seeds=2)
    wild = {"learning_rate": 30.0, "optimizer": "sgd", "root_above": None, "final_window": 20, "iterations": 60}
    specs, members = [], []
    for run in plan.runs:
        tame = {"final_window": 20, "iterations": 60}
        run["config"] |= wild if run["cell"] == "quartic-b1-ninf" and run["seed"] == 1 else tame
        specs.append(runner.RunSpec(*(run[key] for key in ("entry", "config", "inputs", "excluded", "name"))))
        members.append({"folder": f"runs/{specs[-1].folder_name}", "cell": run["cell"], "seed": run["seed"]})
    runner.write_study(tmp_path, {**plan.study, "runs": members})
    states = runner.sweep([runner.prepare(spec, tmp_path) for spec in specs], executor="inline")
    assert Counter(state.state for state in states) == {"finished": 9, "diverged": 1}
    (lost,) = [state for state in states if state.state == "diverged"]
    assert 0 < lost.diverged_at < 60
    assert lost.summary["final_error"] is None
    document = report.to_json(report.load(tmp_path))
    assert f"step {lost.diverged_at}" in json.dumps(document)
    page = report.build(tmp_path).read_text()
    assert "diverged" in page


@pytest.mark.slow
def test_a_run_that_is_killed_ends_with_the_numbers_of_an_unbroken_one(tmp_path: Path) -> None:
    limited = {"num_stddev": 2, "variant": "auto"}
    config = experiment.Config(width=4, iterations=900, final_window=200, data="embedded", **limited)
    resolved, inputs = experiment.resolve(config)
    assert resolved == asdict(config)
    spec = runner.RunSpec(experiment.ENTRY, resolved, inputs, experiment.EXCLUDED, experiment.name_of(config))
    whole = runner.prepare(spec, tmp_path / "whole")
    killed = runner.prepare(spec, tmp_path / "killed")
    code = "import sys; from pathlib import Path; from alrc_lab import runner; " + (
        "runner.execute(Path(sys.argv[1]), checkpoint_every_s=0.0)"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(killed)]
    latest = killed / "checkpoint" / "latest.json"
    process = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 60
    while not latest.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.15)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (killed / "result.json").exists()
    assert 0 < json.loads(latest.read_text())["step"] < 900
    for folder in (killed, whole):
        subprocess.run([*command[:3], str(folder)], env=environment, check=True, timeout=120)
    states = [runner.inspect_run(folder) for folder in (killed, whole)]
    assert [state.state for state in states] == ["finished", "finished"]
    assert states[0].summary == states[1].summary
    resumed, unbroken = (runner.read_metrics(folder) for folder in (killed, whole))
    assert all(np.array_equal(resumed[key], unbroken[key]) for key in unbroken)
    assert len(json.loads((killed / "env.json").read_text())["attempts"]) == 2
