"""Check what the study `theory` plans, and that its smallest preset runs in the runner."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("statsmodels", reason="the laboratory is not installed")
from alrc_lab import runner
from alrc_lab.experiments.theory import study
from alrc_lab.experiments.theory.criteria import essence, verdict


def test_every_experiment_is_one_run_with_its_criteria() -> None:
    for preset in study.PRESETS:
        plan = study.plan(preset)
        assert [run["cell"] for run in plan.runs] == [f"E{i}" for i in range(8)]
        claims = plan.study["claims"]
        assert len({claim["id"] for claim in claims}) == len(claims)
        for run in plan.runs:
            own = [essence(claim) for claim in claims if claim["run"] == run["cell"]]
            assert run["config"]["criteria"] == own
            assert own
        json.dumps(plan.study, allow_nan=False)


def test_criteria_are_part_of_a_runs_identity() -> None:
    run = study.plan("smoke").runs[3]
    keys = ("entry", "config", "inputs", "excluded", "name")
    before = runner.RunSpec(*(run[key] for key in keys)).identity
    run["config"]["criteria"][0]["consistent"][0]["than"] = 0.5
    assert runner.RunSpec(*(run[key] for key in keys)).identity != before


def test_claims_exclude_each_other_and_name_their_source() -> None:
    claims = study.plan("quick").study["claims"]
    words = {"consistent", "contradicts", "inconclusive", "outside scope"}
    for claim in claims:
        assert claim["origin"] in {"read", "source", "inference"}
        assert claim["consistent"]
        assert claim["contradicts"]
        assert claim["sentence"].endswith(".")
        assert verdict(claim, {}) in words
        if claim["method"] in {"ALRC"}:
            assert not claim["scope"]
    controls = {claim["control"] for claim in claims}
    assert {"must contradict", "must be consistent"} <= controls


def test_every_family_has_its_claims() -> None:
    plan = study.plan("quick")
    known = {claim["id"] for claim in plan.study["claims"]}
    for family in plan.study["holm"]["families"]:
        assert family["claims"], family["name"]
        assert set(family["claims"]) <= known


def test_seeds_and_errors() -> None:
    plan = study.plan("quick", seeds=7)
    assert plan.runs[1]["config"]["seeds"] == 7
    assert plan.runs[2]["config"]["seeds"] == (7, 7, 7, 7)
    with pytest.raises(ValueError, match="1"):
        study.plan("quick", seeds=1)
    with pytest.raises(ValueError, match="medium"):
        study.plan("medium")


def test_estimate_adds_up() -> None:
    plan = study.plan("smoke")
    one, two = plan.estimate(1, 1), plan.estimate(2, 1)
    assert one.seconds > 0
    assert 0.1 < two.seconds / one.seconds < 2, "half of it, up to the noise of a busy machine"
    assert len(one.detail) == 8


def test_the_smallest_preset_runs_and_holds_every_number_a_claim_names(tmp_path: Path) -> None:
    plan = study.plan("smoke")
    keys = ("entry", "config", "inputs", "excluded", "name")
    for run in plan.runs:
        folder = runner.prepare(runner.RunSpec(*(run[key] for key in keys)), tmp_path)
        state = runner.execute(folder)
        assert state.state == "finished", state.message
        columns = runner.read_metrics(folder)
        assert np.all(np.diff(columns["step"]) > 0)
        for claim in plan.study["claims"]:
            if claim["run"] == run["cell"]:
                named = [claim["statistic"][key] for key in ("value", "low", "high", "p", "n")]
                named += [criterion["key"] for criterion in [*claim["consistent"], *claim["contradicts"]]]
                missing = [key for key in named if key and key not in state.summary]
                # So few seeds may reach no common share of limited examples.
                assert not missing or claim["id"].startswith("E3m-"), (claim["id"], missing)
