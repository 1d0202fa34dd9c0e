"""What identifies a run, what its folder is called, and which runs belong to a study."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import counting_experiment as counting
from alrc_lab import runner
from alrc_lab.runner import RunSpec
from counting_experiment import INPUTS, prepared, read, spec

# --- identity ---------------------------------------------------------------------------------------------------------


def test_identity_is_the_sha256_of_the_canonical_json_that_the_contract_names():
    mine = RunSpec("m:f", {"b": 1e-3, "a": [1, None, "µ"], "workers": 2}, INPUTS, ("workers",), "n")
    text = '{"config":{"a":[1,null,"µ"],"b":0.001},"data":"' + "ab" * 32 + '","entry":"m:f"}'
    assert mine.identity == hashlib.sha256(text.encode()).hexdigest()
    assert mine.folder_name == "n-" + mine.identity[:10]


def test_identity_ignores_order_excluded_fields_and_the_place_of_the_data_and_nothing_else():
    base = spec(inputs=INPUTS)
    turned = RunSpec(base.entry, dict(reversed(base.config.items())), INPUTS, tuple(reversed(base.excluded)), base.name)
    assert turned.identity == base.identity
    assert spec(inputs=INPUTS | {"path": "/there"}, sleep_s=9.0, block=1).identity == base.identity
    assert dataclasses.replace(base, name="other").identity == base.identity

    others = {
        "steps": 61,
        "start": 0.31,
        "rate": 3.8,
        "say": "hi",
        "say_last": True,
        "raise_at": 1,
        "diverge_at": 1,
        "exit_at": 1,
    }
    others |= {"kill_at": 1}
    assert others.keys() | set(counting.EXCLUDED) == base.config.keys()
    found = {spec(inputs=INPUTS, **{key: value}).identity for key, value in others.items()}
    found |= {spec(inputs=INPUTS | {"sha256": "cd" * 32}).identity, spec(inputs=None).identity, base.identity}
    found |= {dataclasses.replace(base, entry="counting_experiment:other").identity}
    assert len(found) == len(others) + 4


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(min_size=1), JSON, max_size=5), st.randoms())
def test_identity_survives_a_round_trip_through_the_file(config, random):
    shuffled = list(config.items())
    random.shuffle(shuffled)
    before = RunSpec("m:f", config, None, (), "n").identity
    assert RunSpec("m:f", json.loads(json.dumps(dict(shuffled))), None, (), "n").identity == before


def test_identity_cannot_change_behind_the_specs_back():
    config = {"nested": {"rate": 1.0}}
    mine = RunSpec("m:f", config, None, (), "n")
    before = mine.identity
    config["nested"]["rate"] = 2.0
    assert mine.identity == before


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"config": {"a": {"b": [1.0, float("nan")]}}}, r"config\.a\.b\[1\] is nan.*null"),
        ({"config": {"a": float("inf")}}, r"config\.a is inf"),
        ({"config": {"a": Path("x")}}, r"config\.a is a .*Path"),
        ({"config": {"a": {1: 2}}}, r"config\.a has the key 1"),
        ({"entry": "no colon"}, "no colon"),
        ({"name": "a/b"}, "a/b"),
        ({"name": "../b"}, r"\.\./b"),
        ({"name": ""}, "''"),
        ({"excluded": ("wrokers",)}, "wrokers"),
        ({"inputs": {"name": "x"}}, "sha256"),
    ],
)
def test_what_cannot_be_written_down_is_refused(changes, says):
    good = {"entry": "m:f", "config": {"a": 1}, "inputs": None, "excluded": (), "name": "n"}
    RunSpec(**good)
    with pytest.raises(ValueError, match=says):
        RunSpec(**(good | changes))


# --- prepare and the study file ---------------------------------------------------------------------------------------


def test_prepare_writes_the_contract_and_repeating_it_changes_nothing(tmp_path):
    mine = spec(inputs=INPUTS)
    folder = runner.prepare(mine, tmp_path)
    assert folder == tmp_path / "runs" / mine.folder_name
    assert read(folder / "config.json") == {
        "schema": 1,
        "identity": mine.identity,
        "entry": mine.entry,
        "config": mine.config,
        "excluded": list(mine.excluded),
        "inputs": INPUTS,
    }
    before = (folder / "config.json").stat().st_mtime_ns
    assert runner.prepare(mine, tmp_path) == folder
    assert (folder / "config.json").stat().st_mtime_ns == before
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_prepare_takes_new_excluded_fields_and_data_places_until_the_run_is_done(tmp_path):
    folder = runner.prepare(spec(inputs=INPUTS), tmp_path)
    moved = spec(inputs=INPUTS | {"path": "/there"}, sleep_s=0.5)
    assert runner.prepare(moved, tmp_path) == folder
    assert read(folder / "config.json")["config"]["sleep_s"] == 0.5
    assert read(folder / "config.json")["inputs"]["path"] == "/there"
    (folder / "result.json").write_text("{}")
    runner.prepare(spec(inputs=INPUTS), tmp_path)
    assert read(folder / "config.json")["config"]["sleep_s"] == 0.5


def test_prepare_refuses_a_folder_with_another_run(tmp_path):
    folder = prepared(tmp_path)
    document = read(folder / "config.json") | {"identity": "0" * 64}
    (folder / "config.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"holds another run \(identity 0000"):
        prepared(tmp_path)


def study(**changes) -> dict:
    run = {"folder": "runs/a", "cell": "c1", "seed": 0}
    return {
        "study": "table1",
        "preset": "smoke",
        "title": "t",
        "data": {"sha256": "ab"},
        "panels": [{"id": "p", "title": "P"}],
        "cells": [{"id": "c1", "panel": "p"}],
        "runs": [run],
    } | changes


def test_study_grows_and_never_loses_a_run(tmp_path):
    more = [{"folder": f"runs/{name}", "cell": "c2", "seed": seed} for seed, name in enumerate("bc")]
    runner.write_study(tmp_path / "new", study())
    runner.write_study(tmp_path / "new", study(title="u", cells=[{"id": "c2", "panel": "p"}], runs=more))
    found = runner.read_study(tmp_path / "new")
    assert [run["folder"] for run in found["runs"]] == ["runs/b", "runs/c", "runs/a"]
    assert [cell["id"] for cell in found["cells"]] == ["c2", "c1"]
    assert (found["title"], found["schema"], len(found["panels"])) == ("u", 1, 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"study": "table2"},
        {"preset": "quick"},
        {"data": {"sha256": "cd"}},
        {"runs": [{"folder": "runs/other-settings", "cell": "c1", "seed": 0}]},
    ],
)
def test_study_of_something_else_is_refused_and_left_alone(tmp_path, changes):
    runner.write_study(tmp_path, study())
    before = (tmp_path / "study.json").read_bytes()
    with pytest.raises(ValueError, match="choose another --out"):
        runner.write_study(tmp_path, study(**changes))
    assert (tmp_path / "study.json").read_bytes() == before


def test_study_that_is_missing_broken_or_too_new_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="alrc sweep"):
        runner.read_study(tmp_path)
    (tmp_path / "study.json").write_text('{"schema": 2}')
    with pytest.raises(ValueError, match="schema 2"):
        runner.read_study(tmp_path)
    (tmp_path / "study.json").write_text('{"schema"')
    with pytest.raises(ValueError, match="not valid JSON"):
        runner.read_study(tmp_path)
