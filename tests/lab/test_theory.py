"""Check the experiments of the theory: known roots, prototype values, controls, and verdicts of broken rules."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("statsmodels", reason="the laboratory is not installed")
from alrc.ops import NUMPY
from alrc.rules import ALRC, GradientDecision, Norm
from alrc_lab.experiments.recorder import MemoryRecorder
from alrc_lab.experiments.theory import (
    bias,
    bias_setting,
    evidence,
    invariants,
    methods,
    network,
    noise,
    scaled_loss,
    scope,
    small_weights,
    stability,
)
from alrc_lab.experiments.theory.criteria import Claim, Criterion, Statistic, essence, verdict
from alrc_lab.experiments.theory.methods import Method

SMALL_BIAS = bias_setting.Config(
    seeds=300,
    steps=4_000,
    norm_thresholds=(0.5, 1.0),
    alrc_thresholds=(),
    agc_thresholds=(),
    methods=("none", "norm"),
    matched_laws=(),
    matched_gradient_thresholds=(),
    matched_alrc_thresholds=(),
)


def run(module: Any, config: Any) -> tuple[dict[str, float], dict[str, str], MemoryRecorder]:
    """Run an experiment as a worker would, from JSON; returns summary, verdicts and what was logged."""
    recorder = MemoryRecorder()
    claims = module.claims(config)
    document = {**asdict(config), "criteria": [essence(claim) for claim in claims]}
    summary = module.run(json.loads(json.dumps(document)), recorder)["summary"]
    return summary, {claim["id"]: verdict(claim, summary) for claim in claims}, recorder


# ------------------------------------------------------------------------------------------------ rules, row by row


@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize(
    "rule",
    [
        ALRC(2.0),
        ALRC(1.0, observe=8),
        ALRC.reference(3.0, mu1_start=1.0, mu2_start=2.0),
        ALRC.paper(3.0, mu1=1.0, mu2=2.0),
    ],
    ids=["auto", "auto-1", "reference", "paper"],
)
def test_rows_are_independent_runs_of_the_rule(rule: ALRC, batch: int) -> None:
    generator = np.random.default_rng(0)
    rows = 5
    method = Method("alrc", rule)
    together, alone = method.start(rows), [rule.init() for _ in range(rows)]
    relearned = 0
    for step in range(150):
        losses = np.exp(generator.standard_normal((rows, batch))) * (1 if step < 80 else 30)
        losses[0] = np.nan if step == 50 else losses[0]
        losses[1] *= 1e9 if step == 60 else 1
        scale, together = method.weigh(losses, together)
        for row in range(rows):
            decision = rule.decide(losses[row], alone[row])
            after = rule.update(losses[row], decision, alone[row])
            relearned += step > 40 and after.count < alone[row].count
            alone[row] = after
            np.testing.assert_allclose(scale[row], decision.scale, rtol=1e-12)
            np.testing.assert_allclose([f[row, 0] for f in together[:3]], [float(f) for f in after[:3]], rtol=1e-12)
    assert relearned == (rows if rule.is_auto else 0)


def test_units_and_layers_are_those_of_the_clipper() -> None:
    torch = pytest.importorskip("torch", reason="compares with the clipper of torch")
    from alrc.rules import AGC
    from alrc.torch import GradientClipper

    generator = np.random.default_rng(1)
    shapes = {"first.weight": (5, 3), "first.bias": (5,), "last.weight": (1, 5), "last.bias": (1,)}
    for key, rule in (("norm", Norm(0.7)), ("agc", AGC(0.05)), ("agc_last", AGC(0.05, exclude=("last.*",)))):
        method = methods.make(key, 0.7 if key == "norm" else 0.05)
        weights = {name: generator.standard_normal((2, *shape)) for name, shape in shapes.items()}
        gradients = {name: generator.standard_normal((2, *shape)) for name, shape in shapes.items()}
        clipped = method.clip(gradients, weights)
        for row in range(2):
            model = torch.nn.Module()
            for part in ("first", "last"):
                layer = torch.nn.Linear(shapes[f"{part}.weight"][1], shapes[f"{part}.weight"][0], dtype=torch.float64)
                model.add_module(part, layer)
            for name, parameter in model.named_parameters():
                parameter.data.copy_(torch.from_numpy(weights[name][row]))
                parameter.grad = torch.from_numpy(gradients[name][row].copy())
            GradientClipper(model, rule).clip_()
            for name, parameter in model.named_parameters():
                np.testing.assert_allclose(clipped[name][row], parameter.grad.numpy(), rtol=1e-12)


def test_the_gradients_of_the_network_are_those_of_differences() -> None:
    generator = np.random.default_rng(2)
    for activation in ("relu", "tanh"):
        net = network.Perceptron(3, 4, activation)
        weights = net.start(2, generator)
        weights = {name: array + 0.1 * generator.standard_normal(array.shape) for name, array in weights.items()}
        x, y = generator.standard_normal((2, 5, 3)), generator.standard_normal((2, 5))
        done = net.forward(weights, x, y)
        mean, each = net.mean_gradient(weights, x, done), net.gradients(weights, x, done)
        for name, array in weights.items():
            place = (slice(None), *(0 for _ in array.shape[1:]))
            ends = []
            for sign in (1, -1):
                moved = {**weights, name: array.copy()}
                moved[name][place] += sign * 1e-6
                ends.append(0.5 * np.mean(net.forward(moved, x, y).residual ** 2, 1))
            np.testing.assert_allclose(mean[name][place], (ends[0] - ends[1]) / 2e-6, rtol=1e-6, atol=1e-9)
            np.testing.assert_allclose(each[name].mean(1), mean[name], rtol=1e-12, atol=1e-15)


# ------------------------------------------------------------------------------------------------ verdicts


def _claim(**changes: Any) -> dict[str, Any]:
    claim = Claim(
        "x", "norm", "A.", Statistic("s", "a"), [Criterion("a", "<", 1.0)], [Criterion("a", ">", 2.0)], "read"
    )
    return replace(claim, **changes).to_json("E3")


@pytest.mark.parametrize(
    ("summary", "expected"),
    [
        ({"a": 0.5}, "consistent"),
        ({"a": 3.0}, "contradicts"),
        ({"a": 1.5}, "inconclusive"),
        ({"a": None}, "inconclusive"),
        ({"a": float("nan")}, "inconclusive"),
        ({}, "inconclusive"),
    ],
)
def test_verdicts(summary: dict[str, Any], expected: str) -> None:
    assert verdict(_claim(), summary) == expected
    assert verdict(_claim(scope=False), summary) == "outside scope"


def test_no_criterion_is_no_evidence_and_both_are_none() -> None:
    assert verdict(_claim(consistent=[]), {"a": 0.5}) == "inconclusive"
    assert verdict(_claim(contradicts=[Criterion("a", "<", 5.0)]), {"a": 0.5}) == "inconclusive"


class Flipped(Norm):
    """Turn every gradient around."""

    def decide(self, measured: Any, state: None = None, ops: Any = NUMPY) -> GradientDecision:
        decision = super().decide(measured, state, ops)
        return GradientDecision(-decision.scale, decision.threshold)


class Idle(Norm):
    """Limit nothing."""

    def decide(self, measured: Any, state: None = None, ops: Any = NUMPY) -> GradientDecision:
        return GradientDecision(np.ones_like(measured), np.inf)


@pytest.fixture
def break_norm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that puts a broken rule in the place of Norm."""
    make = methods.make

    def use(broken: type[Norm]) -> None:
        def wrong(key: str, threshold: float | None = None) -> Method:
            return Method(key, broken(threshold or 1.0)) if key == "norm" else make(key, threshold)

        monkeypatch.setattr(methods, "make", wrong)

    return use


SMALL = {
    "E0": (invariants, invariants.Config(examples=300, walks=20, steps=60)),
    "E1": (
        stability,
        stability.Config(methods=("none", "norm"), thresholds=(0.0, 5.0), seeds=400, steps=400, bound=15.0),
    ),
    "E2": (noise, noise.Config(methods=("norm",), thresholds=(1.0,), seeds=(1_000,), steps=2_000)),
}


@pytest.mark.parametrize(
    ("broken", "experiment", "claims"),
    [
        (None, "E0", []),
        (Idle, "E0", ["E0-cap-norm", "E0-envelope-norm"]),
        (Flipped, "E0", ["E0-factor-norm", "E0-identity-norm"]),
        (None, "E1", []),
        (Idle, "E1", ["E1-norm_df3", "E1-norm_df1p5"]),
        (Flipped, "E1", ["E1-norm_dfinf", "E1-norm_df3", "E1-norm_df1p5"]),
        (None, "E2", ["E2-fall-norm_p40"]),  # the control
        (Idle, "E2", ["E2-bound-norm_p75", "E2-fall-norm_p40", "E2-bound-norm_p40"]),
    ],
    ids=lambda value: getattr(value, "__name__", None) or (value if isinstance(value, str) else ""),
)
def test_a_broken_rule_contradicts(
    break_norm: Any, broken: type[Norm] | None, experiment: str, claims: list[str]
) -> None:
    if broken:
        break_norm(broken)
    _, verdicts, _ = run(*SMALL[experiment])
    found = [name for name, word in verdicts.items() if word == "contradicts" and "none" not in name]
    assert set(claims) <= set(found)
    if broken is None:
        assert found == claims


@pytest.mark.parametrize("broken", [None, Idle, Flipped], ids=["sound", "idle", "flipped"])
def test_the_root_is_where_it_is_predicted_only_with_the_rule(break_norm: Any, broken: type[Norm] | None) -> None:
    if broken:
        break_norm(broken)
    with np.errstate(over="ignore", invalid="ignore"):
        summary, verdicts, _ = run(bias, SMALL_BIAS)
    for threshold, root in (("0p5", 0.5 / 9), ("1", 1 / 9)):
        name = f"norm_{threshold}_rare"
        if broken is None:
            assert summary[f"root_mean_{name}"] == pytest.approx(root, abs=5e-3)
            assert verdicts[f"E3a-{name}"] == "consistent"
            assert verdicts[f"E3b-{name}"] == "contradicts"
            assert verdicts[f"E3b-norm_{threshold}_normal"] == "consistent"
        else:
            assert verdicts[f"E3a-{name}"] == "contradicts"


# ------------------------------------------------------------------------------------------------ the experiments


def test_the_same_configuration_gives_the_same_numbers() -> None:
    first, second = run(*SMALL["E2"]), run(*SMALL["E2"])
    assert first[0] == second[0]
    assert all(np.array_equal(first[2].columns[key], second[2].columns[key]) for key in first[2].columns)


RESUMED = {
    "E1": (
        stability,
        stability.Config(methods=("none", "norm"), thresholds=(0.0, 5.0), seeds=6, steps=400, bound=15.0),
    ),
    "E3": (bias, replace(SMALL_BIAS, seeds=10, steps=100)),
    "E4": (network, network.Config(seeds=3, steps=80, batches=(8,), batch_steps=40)),
    "E7": (scope, scope.Config(seeds=5, steps=100, floor_steps=50)),
}


@pytest.mark.parametrize("experiment", RESUMED)
def test_a_run_that_is_killed_ends_with_the_numbers_of_an_unbroken_one(tmp_path: Path, experiment: str) -> None:
    class Killed(MemoryRecorder):
        def checkpoint(self, step: int, save: Callable[[Path], None]) -> None:
            super().checkpoint(step, save)
            raise KeyboardInterrupt

    module, config = RESUMED[experiment]
    whole, _, recorder = run(module, config)
    with pytest.raises(KeyboardInterrupt):
        module.run(asdict(config), Killed(folder=tmp_path, checkpoint_every_s=0.0))
    again = MemoryRecorder(folder=tmp_path, checkpoint_every_s=0.0)
    assert again.resume() is not None
    np.testing.assert_equal(module.run(asdict(config), again)["summary"], whole)
    np.testing.assert_equal(again.columns, recorder.columns)


def test_curl_is_there_where_clipping_is_and_agrees_over_widths() -> None:
    summary, verdicts, recorder = run(scaled_loss, scaled_loss.Config(points=200, grid=7))
    assert summary["curl_median_none"] < 1e-9
    assert summary["curl_median_alrc_held"] < 1e-9
    # Prototype: 0.056 and 0.025, at points and on a sample that are not recorded; order of magnitude is asked.
    assert 0.056 / 3 < summary["curl_median_0p1"] < 0.056 * 3
    assert 0.025 / 3 < summary["curl_median_0p5"] < 0.025 * 3
    for name in ("0p1", "0p5", "agc_0p1", "alrc"):
        assert summary[f"width_ratio_{name}"] < 1.05  # a kink lies within a width now and then
    assert verdicts["E6-curl-none"] == "consistent"
    assert verdicts["E6-curl-0p1"] == "contradicts"
    assert {"w", "v", "field_w_0p1", "field_v_0p1", "curl_0p1", "curl_0p5", "curl_none"} <= set(recorder.columns)


def test_small_weights_get_larger_relative_steps_and_no_amplification() -> None:
    summary, verdicts, _ = run(small_weights, small_weights.Config(seeds=8, steps=200))
    assert summary["absolute_below_agc"] == pytest.approx(0, abs=1e-9)
    assert summary["absolute_above_agc"] == pytest.approx(1, abs=1e-9)
    assert summary["relative_below_agc"] == pytest.approx(-1, abs=1e-9)
    assert verdicts["E5-relative-agc"] == "consistent"
    assert verdicts["E5-amplified-agc"] == "contradicts"
    assert summary["amplified_share_agc"] == 0
    assert summary["amplified_share_hypothetical"] > 0.5


def test_a_vacuous_test_of_stability_is_refused() -> None:
    with pytest.raises(ValueError, match="no run could fail"):
        stability.Config(steps=10)


def test_bounds_of_the_noise_are_azumas() -> None:
    gamma = methods.steps(1.0, 0.75, 5_000)
    found = [noise.bound(1.0, gamma, first, 0.01) for first in (0, 10, 100, 1_000)]
    assert found == pytest.approx([5.23, 2.50, 1.35, 0.61], abs=0.005)


def test_intervals_against_published_values() -> None:
    assert evidence.share_of(0, 500)["high"] == pytest.approx(0.0074, abs=5e-5)
    assert evidence.holm({"a": 0.01, "b": 0.04, "c": float("nan")}) == pytest.approx({"a_holm": 0.02, "b_holm": 0.04})
    assert evidence.paired_p(np.arange(10) < 6, np.arange(10) < 0) == pytest.approx(2 * 0.5**6)


# ------------------------------------------------------------------------------------------------ prototype values


@pytest.mark.slow
def test_roots_of_the_prototype() -> None:
    """Mean θ_N of THEORY.md: .0557, .1113, .3336, SGD .9994; medians of AGC 5.54e-5 and, not there yet, .058."""
    config = replace(SMALL_BIAS, seeds=1_000, steps=20_000)
    expected = {("norm", 0.5): 0.0557, ("norm", 1.0): 0.1113, ("norm", 3.0): 0.3336, ("none", None): 0.9994}
    for (key, threshold), value in expected.items():
        theta = bias.descend(methods.make(key, threshold), ("rare",), 1_000, 20_000, config)["rare"].theta
        error = theta.std() / np.sqrt(len(theta))
        assert abs(theta.mean() - value) < 4 * np.sqrt(2) * error + 5e-5, (key, threshold)
    for threshold, value, rounding in ((0.5, 5.54e-5, 5e-8), (0.1, 0.058, 5e-4)):
        theta = bias.descend(methods.make("agc", threshold), ("rare",), 1_000, 20_000, config)["rare"].theta
        error = 1.2533 * theta.std() / np.sqrt(len(theta))
        assert abs(np.median(theta) - value) < 4 * np.sqrt(2) * error + rounding


@pytest.mark.slow
def test_growth_of_the_prototype() -> None:
    """Mean ‖θ‖ of THEORY.md: .89, 1.83, 3.08 at n = 10², 10³, 10⁴; 3.95 at 10⁵ is in the quick preset."""
    config = scope.Config(seeds=100, steps=10_000)
    norms = scope.separate(methods.make("norm", 0.1), config, np.array([100, 1_000, 10_000]))
    errors = norms.std(1) / np.sqrt(config.seeds)
    assert np.all(np.abs(norms.mean(1) - [0.89, 1.83, 3.08]) < 4 * np.sqrt(2) * errors + 0.005)


@pytest.mark.slow
def test_noise_of_the_prototype() -> None:
    """99 % quantiles of THEORY.md: 3.05, .81, .41, .17, each of 4,000 seeds."""
    found = noise.pile_up(methods.make("norm", 1.0), 0.75, 4_000, noise.Config())
    assert np.quantile(found, 0.99, axis=1) == pytest.approx([3.05, 0.81, 0.41, 0.17], rel=0.1)


@pytest.mark.slow
def test_stability_of_the_prototype() -> None:
    """Failures of 500 in THEORY.md: SGD 464 to 500, classic and AGC 0, AGC without the last layer 233, 493, 500."""
    config = stability.Config(seeds=100, methods=("none", "norm", "agc", "agc_last"), thresholds=(0.0, 5.0, 0.1, 0.1))
    summary, _, _ = run(stability, config)
    assert all(summary[f"failures_none_{law}"] >= 80 for law in ("dfinf", "df3", "df1p5"))
    assert all(summary[f"failures_{key}_{law}"] == 0 for key in ("norm", "agc") for law in ("dfinf", "df3", "df1p5"))
    last = [summary[f"failures_agc_last_{law}"] for law in ("dfinf", "df3", "df1p5")]
    assert 20 <= last[0] <= 80
    assert last[0] < last[1] <= last[2]
    assert summary["envelope"] == pytest.approx(367, abs=1)
    assert summary["growth_norm_dfinf"] < 1.25
