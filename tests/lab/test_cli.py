"""Check the command line with a tiny experiment of its own: flags, words, JSON, and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("tyro", reason="needs the laboratory's dependencies")

import alrc_lab
from alrc_lab import commands, experiments
from alrc_lab import data as data_sets
from alrc_lab.cli import EXIT_CODES, main
from alrc_lab.data import DataError

# An experiment and a study in a file of their own, so that worker processes can import them too.
SPECIMEN = '''
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

ENTRY, EXCLUDED = "specimen:run", ("data", "fail_file")
INPUTS = {"name": "made up", "source": "embedded", "path": "embedded", "images": 1234, "sha256": "ab" * 32}


@dataclass(frozen=True)
class Config:
    """Settings of the specimen."""

    seed: int = 0
    """Seed of the run."""
    steps: int = 3
    """Updates to make."""
    slope: float | None = 0.5
    """Slope of the curve."""
    end: str = "finish"
    """How to end: finish, diverge, fail, stop."""
    data: str | None = None
    """Where the data is."""
    fail_file: str = ""
    """Fail while this file exists."""


def resolve(config):
    return asdict(config), INPUTS


def name_of(config):
    return f"specimen-{config.end}-s{config.seed}"


def run(config, recorder):
    recorder.log({"step": np.arange(1, config["steps"] + 1), "error": np.full(config["steps"], 1.5)})
    recorder.progress(config["steps"], config["steps"])
    if config["end"] == "fail" or (config["fail_file"] and Path(config["fail_file"]).exists()):
        raise RuntimeError("the specimen was told to fail")
    if config["end"] == "stop":
        raise KeyboardInterrupt
    is_diverged = config["end"] == "diverge"
    summary = {"error": float("nan") if is_diverged else 1.5, "seed": config["seed"]}
    return {"diverged_at": 2 if is_diverged else None, "summary": summary}


def plan(preset, *, data=None, seeds=None):
    seeds = seeds or {"tiny": 2, "huge": 8}[preset]
    ends = json.loads(data) if data else ["finish", "diverge"]
    cell = {"panel": "p", "column": "batch 1", "baseline": None, "published": None}
    cells = [{**cell, "id": end, "row": end} for end in ends]
    runs = []
    for seed in range(seeds):
        for end in ends:
            config = Config(seed=seed, end=end)
            runs.append({"entry": ENTRY, "config": asdict(config), "inputs": INPUTS, "excluded": EXCLUDED,
                         "name": name_of(config), "cell": end, "seed": seed})
    study = {"study": "specimens", "preset": preset, "title": "Specimens", "question": "Do they?", "data": INPUTS,
             "panels": [{"id": "p", "title": "Panel"}], "cells": cells, "differences": [], "notes": []}
    def estimate(workers, threads, packs, steps):
        told = [f"width 1: 2 ms a step, packs {packs}, steps {steps}"]
        return SimpleNamespace(seconds=365.0, detail=told, runs={place: 1.0 for pack in packs for place in pack})

    return SimpleNamespace(study=study, runs=runs, default_out=f"results/specimens-{preset}", estimate=estimate)
'''

TOGETHER = """

def pack_key(config):
    return "all"


def largest_pack(config):
    return 3


def run_together(configs, recorders):
    for place, (config, recorder) in enumerate(zip(configs, recorders, strict=True)):
        yield place, run(config, recorder)
"""


@pytest.fixture(autouse=True)
def specimen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the specimen in the laboratory, work in an empty folder, and replace the report by a quick one."""
    (tmp_path / "specimen.py").write_text(SPECIMEN, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "specimen", raising=False)
    for registry, name in ((experiments.EXPERIMENTS, "specimen"), (experiments.STUDIES, "specimens")):
        monkeypatch.setitem(registry, name, "specimen")
    monkeypatch.setitem(experiments.DESCRIPTIONS, "specimens", "a study for tests")
    monkeypatch.setitem(experiments.PRESETS, "specimens", {"tiny": "two cells, two seeds", "huge": "eight seeds"})
    quick_report = SimpleNamespace(
        build=lambda root: Path(root) / "report" / "index.html",
        load=lambda root: {"runs": len(json.loads((Path(root) / "study.json").read_text())["runs"])},
        render_text=lambda study: f"a table of {study['runs']} runs\nReport: index.html",
        to_json=lambda study: study,
    )
    monkeypatch.setattr(alrc_lab, "report", quick_report, raising=False)  # imported when it is needed
    monkeypatch.delenv("COLUMNS", raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def sweep(*words: str, data: list[str] | None = None) -> int:
    extra = ["--data", json.dumps(data)] if data else []
    return main(["sweep", "specimens", "--preset", "tiny", "--executor", "inline", *extra, *words])


class TestHelp:
    def test_overview_names_every_command_and_exit_code(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--help"]) == 0
        shown = capsys.readouterr().out
        for name in commands.COMMANDS:
            assert f"  {name} " in shown
        assert EXIT_CODES in shown
        assert main([]) == 2

    @pytest.mark.parametrize("name", list(commands.COMMANDS))
    def test_every_command_teaches(self, capsys: pytest.CaptureFixture[str], name: str) -> None:
        assert main([*name.split(), "--help"]) == 0
        shown = capsys.readouterr().out
        assert f"    alrc {name}" in shown, "no example"
        assert "130  interrupted" in shown

    def test_sweep_explains_every_flag(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["sweep", "--help"]) == 0
        shown = capsys.readouterr().out
        for flag in ("--preset", "--out", "--data", "--seeds", "--executor", "--workers", "--dry-run", "--json"):
            assert flag in shown

    def test_run_shows_the_fields_of_the_experiment(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["run", "specimen", "--help"]) == 0
        shown = capsys.readouterr().out
        assert "--slope" in shown
        assert "Slope of the curve." in shown
        assert main(["run", "--help"]) == 0
        assert "specimen" in capsys.readouterr().out


class TestBadInput:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["dance"], "there is no command 'dance'"),
            (["data", "steal"], "there is no command 'data steal'"),
            (["run", "nothing"], "there is no experiment 'nothing'; known are"),
            (["sweep", "nothing"], "there is no study 'nothing'; known are"),
            (["sweep", "specimens", "--preset", "vast"], "no preset 'vast'; it has tiny, huge"),
            (["sweep", "specimens", "--preset", "tiny", "--seeds", "0"], "--seeds must be at least 1, not 0"),
            (["sweep", "specimens", "--preset", "tiny", "--workers", "-2"], "--workers must be at least 1, not -2"),
            (["status", "nowhere"], "there is no folder nowhere"),
            (["status", "."], "holds no run"),
            (["report", "."], "has no study.json"),
        ],
    )
    def test_one_line_and_exit_code_2(self, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
        assert main(words) == 2
        seen = capsys.readouterr()
        assert message in seen.err
        assert seen.err.count("\n") == 1
        assert seen.out == ""

    @pytest.mark.parametrize(
        "words", [["sweep", "specimens", "--wrong"], ["run", "specimen", "--seed", "x"], ["sweep"]]
    )
    def test_flags_that_do_not_fit(self, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
        assert main(words) == 2
        assert capsys.readouterr().out == ""

    def test_a_folder_of_another_study_is_left_alone(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert sweep("--out", "here") == 0
        before = sorted(Path("here").rglob("*"))
        capsys.readouterr()
        assert main(["sweep", "specimens", "--preset", "huge", "--out", "here"]) == 2
        assert "choose another --out" in capsys.readouterr().err
        assert sorted(Path("here").rglob("*")) == before

    def test_a_file_in_the_way(self, capsys: pytest.CaptureFixture[str]) -> None:
        Path("here").write_text("mine")
        assert sweep("--out", "here") == 2
        assert "here" in capsys.readouterr().err
        assert Path("here").read_text() == "mine"

    def test_data_errors_are_for_people(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(**callbacks: Any) -> Path:
            raise DataError("no network:\nplace the file by hand")

        monkeypatch.setattr(data_sets, "fetch_cifar10", refuse)
        assert main(["data", "fetch", "cifar10"]) == 2
        assert capsys.readouterr().err == "alrc: no network: place the file by hand\n"

    def test_a_defect_keeps_its_traceback(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # Raised by other code than this project's: nobody wrote that message for the user.
        with pytest.raises(json.JSONDecodeError):
            main(["sweep", "specimens", "--preset", "tiny", "--data", "{"])
        monkeypatch.setattr(commands.runner, "inspect_run", lambda folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sweep()

    @pytest.mark.parametrize("name", ["tyro", "rich.console"])
    def test_a_missing_package_is_named(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, "alrc_lab.commands")
        assert main(["--help"]) == 2
        seen = capsys.readouterr()
        assert seen.err.count("\n") == 1
        assert name.partition(".")[0] in seen.err
        assert "pip install 'alrc[lab]'" in seen.err

    def test_the_entry_point_loads_without_the_laboratory(self) -> None:
        probe = "import alrc_lab.cli, sys; print({'tyro', 'rich', 'torch', 'pyarrow'} & set(sys.modules))"
        seen = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
        assert seen.stdout == "set()\n"


class TestList:
    def test_text_and_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["list"]) == 0
        assert "two cells, two seeds" in capsys.readouterr().out
        assert main(["list", "--json"]) == 0
        seen = capsys.readouterr()
        document = json.loads(seen.out)
        assert "specimen" in [experiment["name"] for experiment in document["experiments"]]
        assert {"tiny", "huge"} <= {preset for study in document["studies"] for preset in study["presets"]}


class TestRun:
    def test_prints_data_numbers_and_folder_and_does_it_once(self, capsys: pytest.CaptureFixture[str]) -> None:
        words = ["run", "specimen", "--seed", "7", "--slope", "None", "--out", "here"]
        assert main(words) == 0
        shown = capsys.readouterr().out
        assert "data: made up · 1,234 images · sha256 abababababab · embedded\n" in shown
        assert "error: 1.5" in shown
        (folder,) = Path("here/runs").iterdir()
        assert str(folder) in shown
        assert json.loads((folder / "config.json").read_text())["config"]["slope"] is None
        stamp = (folder / "result.json").stat().st_mtime_ns
        assert main(words) == 0
        assert "already done" in capsys.readouterr().out
        assert (folder / "result.json").stat().st_mtime_ns == stamp

    def test_json_is_the_only_thing_on_stdout(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["run", "specimen", "--end", "diverge", "--json"]) == 0
        seen = capsys.readouterr()
        document = json.loads(seen.out, parse_constant=pytest.fail)
        assert document["state"] == "diverged"
        assert document["summary"]["error"] is None
        assert document["data"]["images"] == 1234
        assert "data: made up" in seen.err

    def test_a_failure_is_exit_code_1(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["run", "specimen", "--end", "fail"]) == 1
        assert "the specimen was told to fail" in capsys.readouterr().out

    def test_ctrl_c_is_exit_code_130(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["run", "specimen", "--end", "stop"]) == 130
        assert "repeat the command to go on" in capsys.readouterr().err


class TestSweep:
    def test_says_what_it_does_then_does_it_then_reports(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert sweep() == 0
        shown = capsys.readouterr().out
        told = [
            "data: made up · 1,234 images",
            "4 runs in 2 cells",
            "estimate for all 4 runs on this machine: about 6 min 05 s",
            "width 1: 2 ms a step",
            "finished  specimen-finish-s0: 3 steps",
            "diverged  specimen-diverge-s0: at step 2",
            "4 of 4 runs are done, 0 failed",
            "a table of 4 runs",
            "Report: ",
        ]
        places = [shown.find(line) for line in told]
        assert -1 not in places, told[places.index(-1)]
        assert sorted(places[:4]) == places[:4]
        assert sorted(places[-3:]) == places[-3:]
        study = json.loads(Path("results/specimens-tiny/study.json").read_text())
        assert [(run["cell"], run["seed"]) for run in study["runs"]] == [
            ("finish", 0),
            ("diverge", 0),
            ("finish", 1),
            ("diverge", 1),
        ]
        assert all((Path("results/specimens-tiny") / run["folder"] / "result.json").exists() for run in study["runs"])

    def test_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert sweep("--json", "--out", "here") == 0
        seen = capsys.readouterr()
        document = json.loads(seen.out, parse_constant=pytest.fail)
        assert (document["total"], document["done"], document["failed"]) == (4, 4, 0)
        assert document["report"] == "here/report/index.html"
        assert document["estimate"]["seconds"] == 365
        assert {run["state"] for run in document["runs"]} == {"finished", "diverged"}
        assert "finished  specimen-finish-s0" in seen.err

    def test_repeating_skips_what_is_done(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert sweep("--out", "here", "--seeds", "1") == 0
        capsys.readouterr()
        assert sweep("--out", "here") == 0
        shown = capsys.readouterr().out
        assert "2 of 4 runs are already done" in shown
        assert "estimate for what is left, 2 runs, on this machine: about 6 min 05 s" in shown
        assert "packs [[2], [3]]" in shown
        assert "specimen-finish-s0:" not in shown, "announced a run that had been done before"
        assert sweep("--out", "here") == 0
        shown = capsys.readouterr().out
        assert "4 of 4 runs are already done" in shown
        assert "estimate" not in shown

    def test_dry_run_counts_cells_and_writes_nothing(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["sweep", "specimens", "--preset", "huge", "--dry-run", "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert [(cell["cell"], cell["runs"]) for cell in document["cells"]] == [("finish", 8), ("diverge", 8)]
        assert (document["total"], document["dry_run"]) == (16, True)
        assert list(Path().iterdir()) == []
        assert main(["sweep", "specimens", "--preset", "huge", "--dry-run"]) == 0
        shown = capsys.readouterr().out
        assert "16 runs in 2 cells" in shown
        assert "about 6 min 05 s" in shown

    def test_an_estimate_knows_packs_and_what_is_left(self, capsys: pytest.CaptureFixture[str]) -> None:
        Path("../specimen.py").write_text(SPECIMEN + TOGETHER, encoding="utf-8")
        words = ["--pack", "0", "--out", "here"]
        assert sweep("--dry-run", *words, data=["finish", "diverge", "fail"]) == 0
        shown = capsys.readouterr().out
        assert "6 runs in 3 cells · 1 at once, packs of up to 3 runs · threads" in shown
        assert "packs [[0, 1, 2], [3, 4, 5]]" in shown
        assert sweep("--seeds", "1", *words, data=["finish", "diverge", "fail"]) == 1
        capsys.readouterr()
        assert sweep("--dry-run", "--json", *words, data=["finish", "diverge", "fail"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["estimate"]["runs"] == 4
        # What failed goes alone, and what is done is not counted.
        assert "packs [[2], [3, 4, 5]], steps {2: 0, 3: 0, 4: 0, 5: 0}" in document["estimate"]["detail"][0]
        assert document["packs"] == [1, 3]
        assert sweep(*words, data=["finish", "diverge", "fail"]) == 1
        packs = [
            json.loads(path.read_text())["attempts"][-1].get("pack") for path in Path("here").glob("runs/*/env.json")
        ]
        assert sum(pack is not None and pack["number"] == 3 for pack in packs) == 4, (
            "all but those that failed and were tried alone"
        )

    def test_a_failure_does_not_end_the_sweep(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert sweep(data=["fail", "finish"]) == 1
        shown = capsys.readouterr().out
        assert "2 of 4 runs are done, 2 failed" in shown
        assert "failed: specimen-fail-s1: " in shown
        assert "the specimen was told to fail" in shown
        assert "a table of 4 runs" in shown

    def test_ctrl_c_says_how_much_is_done(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert sweep(data=["finish", "stop"]) == 130
        assert "interrupted: 1 of 4 runs are done; repeat the command to go on" in capsys.readouterr().out
        assert sweep("--json", data=["finish", "stop"]) == 130
        assert json.loads(capsys.readouterr().out)["interrupted"] is True

    def test_processes(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["sweep", "specimens", "--preset", "tiny", "--workers", "2", "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert (document["executor"], document["workers"], document["done"]) == ("processes", 2, 4)


class TestStatus:
    def test_of_a_study_and_of_a_run(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert sweep("--out", "here", data=["finish", "fail"]) == 1
        capsys.readouterr()
        assert main(["status", "here"]) == 1
        shown = capsys.readouterr().out
        assert "runs: 2 finished, 2 failed" in shown
        assert "the specimen was told to fail" in shown
        assert main(["status", "here", "--json"]) == 1
        seen = capsys.readouterr()
        assert json.loads(seen.out)["counts"] == {"finished": 2, "failed": 2}
        assert seen.err == ""
        folder = next(Path("here/runs").glob("specimen-finish-s0-*"))
        assert main(["status", str(folder)]) == 0
        assert "runs: 1 finished" in capsys.readouterr().out

    def test_warns_of_other_code(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        assert sweep("--out", "here") == 0
        capsys.readouterr()
        assert main(["status", "here"]) == 0
        assert "other code" not in capsys.readouterr().out
        monkeypatch.setattr(commands.runner, "code_version", lambda: "9.9.9+newer")
        assert main(["status", "here"]) == 0
        assert "4 done run(s) were made by other code than this (9.9.9+newer)" in capsys.readouterr().out


class TestReportAndData:
    def test_report(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert sweep("--out", "here") == 0
        capsys.readouterr()
        assert main(["report", "here"]) == 0
        assert "a table of 4 runs\nReport: " in capsys.readouterr().out
        assert main(["report", "here", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["results"] == {"runs": 4}

    def test_data_status(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        found = {"where": "ALRC_DATA", "path": "/d", "found": True, "images": 8068, "sha256": "cd" * 32}
        lost = {"where": "cache", "path": "/c", "found": False, "images": None, "sha256": None}
        places = [
            {**found, "note": "a part", "error": None, "used": True},
            {**lost, "note": "does not exist", "error": None, "used": False},
        ]
        monkeypatch.setattr(data_sets, "data_status", lambda: places)
        monkeypatch.setattr(data_sets, "micrograph_status", lambda: places[:1])
        assert main(["data", "status"]) == 0
        shown = capsys.readouterr().out
        assert "→ ALRC_DATA  8,068 images, sha256 cdcdcdcdcdcd · /d\n    a part\n" in shown
        assert "  cache      nothing · /c\n    does not exist\n" in shown
        assert main(["data", "status", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"places": places, "micrographs": places[:1]}
