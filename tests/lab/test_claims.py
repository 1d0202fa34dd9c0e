"""Reading a made-up study of claims, the verdicts that its numbers must give, and what text and JSON say of them."""

from __future__ import annotations

import json
import re
from io import StringIO

import pytest
from rich.console import Console

from alrc_lab import report, runner
from alrc_lab.report import claims_words as words
from alrc_lab.report.claims import VERDICTS, Condition
from alrc_lab.report.claims_verdicts import judge
from synthetic_claims import SUMMARY, TITLES, claims, read, write_claims

FLIPPED = {"<": ">=", "<=": ">", ">": "<=", ">=": "<"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_claims(tmp_path_factory.mktemp("whole"))


def judged(root):
    return {judgement.claim.id: judgement for judgement in judge(report.load(root))}


def alarms(root):
    study = report.load(root)
    return words.alarms(study, judge(study))


def printed(root, width):
    console = Console(width=width, file=StringIO(), force_terminal=False)
    console.print(report.render_text(report.load(root)))
    return console.file.getvalue()


def both(change):
    """Change a claim in study.json and, before the run is named, in its config, which stay equal."""

    def in_study(study):
        for claim in study["claims"]:
            change(claim)

    def in_config(_, config):
        for claim in config["criteria"]:
            change(claim)

    return {"change_study": in_study, "change_config": in_config}


# --------------------------------------------------------------------------------------------------------- verdicts


def test_every_verdict_is_the_one_that_its_numbers_give(whole):
    found = judged(whole)
    assert {key: judgement.verdict for key, judgement in found.items()} == {
        key: {"outside": "outside scope"}.get(key.split("-")[-1], key.split("-")[-1]) for key in found
    }
    assert set(VERDICTS) == {judgement.verdict for judgement in found.values()}, "one word is not tried"
    assert found["E4-inconclusive"].reason == "neither criterion holds"
    assert found["E5-inconclusive"].reason == "the run's summary has no 'lost'"
    assert (found["E3-outside"].reading, found["E7-outside"].reading) == ("contradicts", "contradicts")
    assert alarms(whole) == []


def test_numbers_are_those_of_the_summary(whole):
    numbers = judged(whole)["E3-contradicts"].numbers
    assert numbers == {
        "value": SUMMARY["gradient"],
        "low": 0.99 * SUMMARY["gradient"],
        "high": 1.01 * SUMMARY["gradient"],
        "p": None,
        "n": 1000,
    }
    assert judged(whole)["E3-consistent"].p_holm == 0.0003
    assert judged(whole)["E5-inconclusive"].numbers["value"] is None


def test_flipped_conditions_flip_the_verdicts(tmp_path, whole):
    def flip(claim):
        for condition in (*claim["consistent"], *claim["contradicts"]):
            condition["op"] = FLIPPED[condition["op"]]

    before, after = judged(whole), judged(write_claims(tmp_path, **both(flip)))
    other = {"consistent": "contradicts", "contradicts": "consistent"}
    flipped = [key for key in before if before[key].verdict in other and before[key].claim.contradicts]
    assert len(flipped) == 7
    for key in flipped:
        assert after[key].verdict == other[before[key].verdict], key


@pytest.mark.parametrize(
    ("op", "than", "holds"),
    [("<", 1.0, False), ("<=", 1.0, True), (">", 1.0, False), (">=", 1.0, True), ("<", 1.1, True), (">", 0.9, True)],
)
def test_a_condition_at_its_threshold(op, than, holds):
    assert Condition("x", op, than).holds({"x": 1.0}) is holds
    assert Condition("x", op, than).holds({"x": None}) is None
    assert Condition("x", op, than).holds({"x": float("nan")}) is None
    assert Condition("x", op, than).holds({}) is None


def test_a_key_that_is_gone_or_not_finite_is_inconclusive(tmp_path):
    def lose(cell, summary):
        if cell == "E6":
            del summary["curl"]
        if cell == "E1":
            summary["failed"] = None

    found = judged(write_claims(tmp_path, change_summary=lose))
    assert (found["E6-contradicts"].verdict, found["E1-contradicts"].verdict) == ("inconclusive", "inconclusive")
    assert found["E6-contradicts"].reason == "the run's summary has no 'curl'"
    assert found["E1-contradicts"].reason == "'failed' is not a finite number"
    assert found["E1-consistent"].verdict == "consistent"


def test_one_condition_of_two_is_not_enough(tmp_path):
    def add(claim):
        if claim["id"] in ("E0-consistent", "E6-contradicts"):
            field = claim["id"].split("-")[1]
            claim[field].append({"key": "n", "op": ">", "than": 10_000})

    found = judged(write_claims(tmp_path, **both(add)))
    assert {found["E0-consistent"].verdict, found["E6-contradicts"].verdict} == {"inconclusive"}


def test_no_condition_never_holds(tmp_path):
    def empty(claim):
        claim["consistent"] = []

    found = judged(write_claims(tmp_path, **both(empty)))
    assert found["E0-consistent"].verdict == "inconclusive"
    assert found["E6-contradicts"].verdict == "contradicts"


def test_criteria_that_hold_both_are_inconclusive_and_an_alarm(tmp_path):
    def clash(claim):
        if claim["id"] == "E0-consistent":
            claim["contradicts"] = claim["consistent"]

    write_claims(tmp_path, **both(clash))
    assert judged(tmp_path)["E0-consistent"].verdict == "inconclusive"
    (alarm,) = alarms(tmp_path)
    assert re.match("E0-consistent: .*exclude each other", alarm)


# ---------------------------------------------------------------------------------------------------------- controls


def test_a_control_that_does_not_fail_is_an_alarm_at_the_top(tmp_path):
    root = write_claims(tmp_path, change_summary=lambda _, summary: summary.update(failed=0.0))
    assert judged(root)["E1-contradicts"].control == "alarm"
    (alarm,) = alarms(root)
    assert alarm.startswith("E1-contradicts: this control must contradict, but reads consistent.")
    text = printed(root, 80)
    assert text.index("ALARM · E1-contradicts") < text.index("E0 · Invariants")


def test_a_control_whose_run_is_missing_is_not_known(tmp_path):
    root = write_claims(tmp_path, missing=("E1",))
    found = judged(root)["E1-contradicts"]
    assert (found.verdict, found.control) == ("inconclusive", "not known")
    assert found.reason == "run E1 is missing: not started"
    assert alarms(root) == []
    assert "Controls: 2 of 3 came out as they must; 1 not known yet." in " ".join(printed(root, 80).split())


def test_a_control_out_of_scope_is_judged_by_what_it_reads(tmp_path):
    root = write_claims(tmp_path, **both(lambda claim: claim.update(scope=False)))
    found = judged(root)
    assert {judgement.verdict for judgement in found.values()} == {"outside scope"}
    assert found["E1-contradicts"].control == "as required"


# --------------------------------------------------------------------------------------------------- preregistration


def test_claims_that_equal_those_of_the_config_are_preregistered(whole):
    assert {judgement.registered for judgement in judged(whole).values()} == {""}
    assert "Preregistered: 12 of 12 claims" in printed(whole, 80)


def change_of(key, **fields):
    def change(study):
        next(claim for claim in study["claims"] if claim["id"] == key).update(fields)

    return change


@pytest.mark.parametrize(
    ("change", "alarm"),
    [
        (
            change_of("E6-contradicts", contradicts=[{"key": "curl", "op": ">", "than": 1.0}]),
            "E6-contradicts: not preregistered (contradicts: not what config.json of its run says).",
        ),
        (change_of("E6-contradicts", scope=False), "E6-contradicts: not preregistered (scope: not what"),
        (change_of("E6-contradicts", sentence="Another."), "E6-contradicts: not preregistered (sentence: not what"),
        (change_of("E6-contradicts", run="E7"), "E6-contradicts: not preregistered (config.json of its run does not"),
        (
            lambda study: study["claims"].pop(0),
            "E0-consistent: config.json of runs/theory-E0",
        ),
    ],
)  # fmt: skip
def test_a_claim_changed_after_its_run_is_an_alarm(tmp_path, change, alarm):
    root = write_claims(tmp_path, change_study=change)
    assert any(found.startswith(alarm) for found in alarms(root)), alarms(root)
    assert "ALARM" in printed(root, 80)


def test_a_config_without_the_wording_will_do_but_not_without_the_criteria(tmp_path, whole):
    def without(*fields):
        def change(_, config):
            for claim in config["criteria"]:
                for field in fields:
                    del claim[field]

        return change

    wordless = write_claims(tmp_path / "a", change_config=without("sentence", "method", "where", "origin", "reading"))
    assert alarms(wordless) == []
    loose = write_claims(tmp_path / "b", change_config=without("contradicts"))
    assert len(alarms(loose)) == len(judged(whole))
    none = write_claims(tmp_path / "c", change_config=lambda _, config: config.pop("criteria"))
    assert len(alarms(none)) == len(judged(whole))


def test_a_config_changed_after_the_run_judges_nothing(tmp_path):
    root = write_claims(tmp_path)
    path = report.load(root).runs["E6"].path / "config.json"
    content = read(path)
    content["config"]["criteria"][0]["contradicts"][0]["than"] = 1.0
    path.write_text(json.dumps(content))
    assert judged(root)["E6-contradicts"].verdict == "inconclusive"
    assert any("Run E6 failed: config.json is not what its identity says" in alarm for alarm in alarms(root))


def test_excluded_criteria_judge_nothing(tmp_path):
    root = write_claims(tmp_path)
    path = report.load(root).runs["E6"].path
    content = read(path / "config.json")
    config = {key: value for key, value in content["config"].items() if key != "criteria"}
    spec = runner.RunSpec(content["entry"], config, content["inputs"], (), "x")
    content |= {"excluded": ["criteria"], "identity": spec.identity}
    (path / "config.json").write_text(json.dumps(content))
    (path / "result.json").write_text(json.dumps(read(path / "result.json") | {"identity": spec.identity}))
    (alarm,) = alarms(root)
    assert "excludes its criteria from the identity" in alarm


def test_the_identity_is_the_runners(tmp_path):
    study = report.load(write_claims(tmp_path))
    for run in study.runs.values():
        content = read(run.path / "config.json")
        spec = runner.RunSpec(content["entry"], content["config"], content["inputs"], tuple(content["excluded"]), "x")
        assert spec.identity == run.identity
        assert run.status == "finished"


# ------------------------------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(schema=2), "has schema 2; this version of alrc reads schema 1"),
        (lambda s: s.pop("experiments"), "lacks the field 'experiments'"),
        (lambda s: s["claims"][0].pop("scope"), "lacks the field 'scope'"),
        (lambda s: s["claims"][0].update(scope="yes"), "has the scope 'yes'; it must be true or false"),
        (lambda s: s["claims"][0].update(origin="rumour"), "has the origin 'rumour'; known are read, source"),
        (lambda s: s["claims"][0].update(control="may fail"), "has the control 'may fail'"),
        (lambda s: s["claims"][0].update(experiment="E9"), "names the unknown experiment 'E9'"),
        (lambda s: s["claims"][1].update(id="E0-consistent"), "claim 'E0-consistent' is listed 2 times"),
        (lambda s: s["claims"][0]["consistent"][0].update(op="=="), "violations == 0; it takes one of < <= > >="),
        (lambda s: s["claims"][0]["consistent"][0].update(than="few"), "violations <= 'few'; it takes one of"),
        (lambda s: s["holm"]["families"][0]["claims"].append("E9"), "names the unknown claim 'E9'"),
        (lambda s: s["runs"][1].update(cell="E0"), "cell 'E0' lists two runs"),
    ],
)  # fmt: skip
def test_a_study_that_contradicts_itself_is_refused(tmp_path, change, message):
    root = write_claims(tmp_path, change_study=change)
    with pytest.raises(report.StudyError, match=re.escape(message)):
        report.load(root)
    with pytest.raises(report.StudyError):
        report.build(root)
    assert not (root / "report").exists()


def test_a_run_that_is_not_listed_leaves_its_claims_inconclusive(tmp_path):
    root = write_claims(tmp_path, change_study=lambda study: study["runs"].pop(6))
    found = judged(root)["E6-contradicts"]
    assert (found.verdict, found.reason) == ("inconclusive", "study.json lists no run 'E6'")


def test_a_failed_run_is_an_alarm(tmp_path):
    root = write_claims(tmp_path, failed=("E7",))
    assert alarms(root) == ["Run E7 failed: OSError: disk <full>."]
    assert judged(root)["E7-outside"].verdict == "outside scope"
    assert "7 of 8 runs finished" in " ".join(printed(root, 80).split())


def test_a_claim_with_two_adjusted_p_values_is_counted_in_neither_family(tmp_path):
    def add(claim):
        if claim["id"] == "E3-consistent":
            claim["contradicts"][0]["key"] = "p_even_holm"

    write_claims(tmp_path, change_summary=lambda _, summary: summary.update(p_even_holm=0.5), **both(add))
    assert judged(tmp_path)["E3-consistent"].p_holm is None
    assert "Holm, roots: 2 claims, α = 0.05." in " ".join(printed(tmp_path, 80).split())


def test_other_studies_are_read_as_before(tmp_path):
    root = write_claims(tmp_path, change_study=lambda study: study.pop("kind"))
    with pytest.raises(report.StudyError, match="lacks the field"):
        report.load(root)


# -------------------------------------------------------------------------------------------------- text, JSON, words


@pytest.mark.parametrize("width", [80, 100, 130])
def test_text_fits_and_says_everything(whole, width):
    lines = printed(whole, width).splitlines()
    assert max(len(line.rstrip()) for line in lines if "Report" not in line and "report" not in line) <= width
    text = "\n".join(lines)
    for key, judgement in judged(whole).items():
        assert key in text
        value = words.statistic(judgement).replace(words.NBSP, " ")
        assert any(value in line for line in lines), f"{value} is on no line"
    for title, _ in TITLES.values():
        assert title in text
    for word in VERDICTS:
        assert word in text
    assert "n = 1,000, p < 0.001 (Holm)" in text
    assert "12 claims: 4 consistent, 4 contradicts, 2 inconclusive, 2 outside scope." in " ".join(text.split())
    assert "Holm, roots: 2 claims, α = 0.05; the adjusted p-value is below α in 1, and not known in 1." in " ".join(
        text.split()
    )
    assert "Every number here is made up." in text


def test_json_holds_everything_in_full_and_no_nan(whole):
    content = json.loads(json.dumps(report.to_json(report.load(whole)), allow_nan=False))
    found = {claim["id"]: claim for claim in content["claims"]}
    assert found["E3-consistent"]["value"] == 4.25e-5
    assert found["E3-contradicts"]["low"] == 0.99 * SUMMARY["gradient"]
    assert found["E3-consistent"]["p"] == 0.0003
    assert found["E5-inconclusive"]["value"] is None
    assert content["counts"] == {"consistent": 4, "contradicts": 4, "inconclusive": 2, "outside scope": 2}
    assert [claim["consistent"] for claim in content["claims"]] == [claim["consistent"] for claim in claims()]
    assert all(claim["preregistered"] for claim in content["claims"])
    assert content["runs"][3]["summary"]["gradient"] == SUMMARY["gradient"]
