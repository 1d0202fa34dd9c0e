"""Check the partial-STEM experiment against numpy, piece by piece, and its runs for exact repetition."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from alrc.reference import alrc_trace
from alrc_lab.data import scan
from alrc_lab.data.stem import load_micrographs
from alrc_lab.experiments.recorder import MemoryRecorder
from alrc_lab.runner.spec import RunSpec

torch = pytest.importorskip("torch", reason="the experiment trains with torch")
from alrc_lab.experiments import partial_stem as experiment  # noqa: E402 - after the skip
from alrc_lab.experiments.partial_stem_layers import MeanOnlyNorm  # noqa: E402
from alrc_lab.experiments.partial_stem_policy import CompletionLosses, Policy  # noqa: E402

Config = experiment.Config
TINY = Config(64, "eighth-1-1", 24, held_out_crops=3)  # half time, 12, is in the middle of a block
CONDITIONS = [(loss, limit) for loss in ("mse", "huber") for limit in ("none", "alrc")]
COLUMNS = ["step", *experiment.Trainer.measured, *experiment.Trainer.rates]


@pytest.fixture(scope="module", autouse=True)
def short_blocks() -> Iterator[None]:
    """Let a block be eight updates, so that a run of three is short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment.Stream, "updates_per_block", 8)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Make ten small lattices, noisy, some in amperes: 14 training crops and 4 held-out ones."""
    root = tmp_path_factory.mktemp("micrographs")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :128]
    for number in range(10):
        lattice = np.cos(2 * np.pi * x / (8 + number)) * np.cos(2 * np.pi * y / (9 + number))
        np.save(root / f"{number}.npy", rng.poisson(30 * (1 + lattice)) * (1e-12 if number % 2 else 1))
    return str(root)


@pytest.fixture
def tiny(folder: str) -> Any:
    """Give the smallest run, on the lattices."""
    return replace(TINY, data=folder)


def run(config: Any, folder: Path | None = None, **options: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Run the experiment in memory."""
    resolved, inputs = experiment.resolve(config)
    recorder = MemoryRecorder(inputs, folder, **options)
    result = experiment.run(resolved, recorder)
    return result, recorder.columns


def make_trainer(config: Any) -> Any:
    """Make a trainer on the data of a configuration."""
    return experiment.Trainer(config, load_micrographs(config.data, crop_size=config.crop_size))


def differing(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> list[str]:
    """Name the columns that are not equal in every bit."""
    assert list(a) == list(b) == COLUMNS
    return [name for name in a if a[name].tobytes() != b[name].tobytes()]


# --- what a run records ---


def test_smoke_preset_records_what_it_should(folder: str) -> None:
    config = replace(experiment.PRESETS["smoke"], data=folder, loss="huber", limit="alrc")
    result, columns = run(config)
    assert list(columns) == COLUMNS
    assert list(columns["step"]) == list(range(1, 101))
    policy = Policy(100)
    for name in ("learning_rate", "beta1"):
        np.testing.assert_allclose(columns[name], [getattr(policy.at(i), name) for i in range(100)], rtol=1e-6)
        assert columns[name][-1] < columns[name][0]
    summary = result["summary"]
    assert result["diverged_at"] is None
    assert summary["steps"] == 100
    for name in ("inner", "outer"):
        losses, limits, limited = (columns[f"{what}_{name}"] for what in ("loss", "limit", "limited"))
        assert (limited == (losses > limits)).all()
        assert 0 < limited.mean() < 1
        assert losses.max() > 100, "losses are recorded before anything is done to them"
        assert losses[-5:].mean() < losses[:5].mean()
        assert summary[f"final_{name}"] == pytest.approx(losses[-5:].mean(dtype=np.float64), rel=1e-12)
        assert summary[f"max_{name}"] == losses.max()
        assert summary[f"fraction_limited_{name}"] == pytest.approx(limited.mean())
        assert math.isfinite(summary[f"held_out_{name}"])
    assert summary["held_out_crops"] == 4


def test_without_alrc_nothing_is_limited(tiny: Any) -> None:
    _, columns = run(replace(tiny, iterations=4))
    for name in ("inner", "outer"):
        assert np.isposinf(columns[f"limit_{name}"]).all()
        assert not columns[f"limited_{name}"].any()


# Rates of generators and trainer, beta1 and frozen means, of 32 updates: 16, and two in each of eight stages.
STAGES = [max(0, i - 16) // 2 for i in range(32)]
RATES = [(3e-4 * (1 - s / 8), 6e-4 * (1 - s / 8), 0.9 - 0.05 * s, i >= 16) for i, s in enumerate(STAGES)]


def rates_used(config: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float, float, bool]]:
    """Return learning rates of generators and trainer, beta1, and whether means are frozen, at each update of a run."""
    used: list[tuple[float, float, float, bool]] = []

    class Watched(experiment.Trainer):
        def update(self, inputs: Any, targets: Any, record: Any) -> None:
            generators, trainer = self.optimizer.param_groups
            assert generators["betas"] == trainer["betas"]
            frozen = {layer.is_frozen for layer in self.network.modules() if isinstance(layer, MeanOnlyNorm)}
            assert len(frozen) == 1
            used.append((generators["lr"], trainer["lr"], generators["betas"][0], frozen.pop()))
            super().update(inputs, targets, record)

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "Trainer", Watched)
        run(config)
    return used


def test_each_update_has_its_own_rates(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    np.testing.assert_allclose(rates_used(replace(tiny, iterations=32), monkeypatch), RATES, rtol=1e-12)


@pytest.mark.parametrize("name", ["freeze", "set_rates"])
def test_forgotten_rates_are_reported(tiny: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, name, lambda *arguments: None)
    assert not np.allclose(rates_used(replace(tiny, iterations=32), monkeypatch), RATES, rtol=1e-12)


def test_held_out_numbers_are_those_of_the_crops(tiny: Any) -> None:
    config = replace(tiny, held_out_crops=3)
    trainer = make_trainer(config)
    trainer.train_block()
    found = trainer.complete_held_out().summary()
    assert trainer.network.training
    trainer.network.eval()
    mask, inner, outer = scan.spiral_mask(64), [], []
    for index, place in enumerate([0, 1, 2]):  # 3 of 4 crops, spread evenly
        truth = trainer.stream.micrographs.crop("test", place)
        noise = np.random.default_rng([2, index]).random((64, 64))
        inputs = np.stack([scan.simulate_scan(truth, scan.blur(truth, renormalise=True), mask, noise), mask])
        with torch.no_grad():
            half, full = (each[0, 0].double().numpy() for each in trainer.network(torch.from_numpy(inputs[None])))
        inner.append(200 * ((half - scan.blur(scan.decimate(truth))) ** 2).mean())
        outer.append(200 * ((full - scan.blur(truth)) ** 2).mean())
    assert found["held_out_inner"] == pytest.approx(np.mean(inner), rel=1e-4)
    assert found["held_out_outer"] == pytest.approx(np.mean(outer), rel=1e-4)
    assert found["held_out_rms_percent"] == pytest.approx(np.mean(50 * np.sqrt(np.array(outer) / 200)), rel=1e-4)
    assert found["held_out_crops"] == 3


# --- examples ---


def test_examples_are_scans_of_augmented_crops(tiny: Any) -> None:
    stream = experiment.Stream(replace(tiny, coverage=1 / 16, seed=7), load_micrographs(tiny.data, crop_size=64))
    mask = scan.spiral_mask(64, 1 / 16)
    for index in (0, 2, 1):
        inputs, targets = stream.block(index)
        for i in (0, 7):
            rng = np.random.default_rng([1, 8 * index + i, 7])
            truth = stream.micrographs.sample(rng)
            expected = scan.simulate_scan(truth, scan.blur(truth, renormalise=True), mask, rng.random((64, 64)))
            np.testing.assert_array_equal(inputs[i], np.stack([expected, mask]))
            np.testing.assert_allclose(targets.full[i, 0], scan.blur(truth), atol=1e-5)
            np.testing.assert_allclose(targets.half[i, 0], scan.blur(scan.decimate(truth)), atol=1e-5)


def seen_by(config: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[list[bytes], np.ndarray]:
    """Return inputs and targets that a run trains on, and its first raw losses."""
    seen: list[bytes] = []

    class Watched(experiment.Trainer):
        def update(self, inputs: Any, targets: Any, record: Any) -> None:
            assert len(inputs) == 1
            seen.append(b"".join(part.numpy().tobytes() for part in (inputs, *targets)))
            super().update(inputs, targets, record)

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "Trainer", Watched)
        _, columns = run(config)
    return seen, np.array([columns["loss_inner"][0], columns["loss_outer"][0]])


def test_seeds_are_paired(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(tiny, iterations=10)
    plain, first = seen_by(config, monkeypatch)
    assert len(set(plain)) == len(plain) == 10
    for loss, limit in CONDITIONS[1:]:
        seen, same = seen_by(replace(config, loss=loss, limit=limit), monkeypatch)
        assert seen == plain
        assert (same == first).all(), "weights are paired too"
    for other in (
        {"mean_form": "image"},
        {"variant": "code43"},
        {"widths": "eighth-2-1"},
        {"precision": "bfloat16"},
        {"seed": 0, "held_out_crops": 1},
    ):
        assert seen_by(replace(config, **{"iterations": 4, **other}), monkeypatch)[0] == plain[:4], other
    assert not set(seen_by(replace(config, iterations=4, seed=1), monkeypatch)[0]) & set(plain), (
        "another seed sees other examples"
    )


# --- what is minimised ---


def disagreements(columns: dict[str, np.ndarray]) -> list[str]:
    """Compare limits and decisions with the slow reference, fed with the recorded raw losses."""
    found = []
    for name in ("inner", "outer"):
        losses = columns[f"loss_{name}"].astype(np.float64)
        trace = alrc_trace(losses, start=(25.0, 900.0), eps=1e-8)
        if not np.allclose(columns[f"limit_{name}"], trace.limit, rtol=2e-5):
            found.append(f"limit_{name}")
        if (columns[f"limited_{name}"] != (losses > trace.limit)).any():
            found.append(f"limited_{name}")
    return found


class HuberFirst(experiment.Trainer):
    """Huberise before ALRC."""

    def limit(self, losses: Any) -> Any:
        assert self.huber is not None
        return CompletionLosses(*(self.limiters[name](self.huber(part)) for name, part in losses._asdict().items()))


class Shared(experiment.Trainer):
    """Let both losses teach one ALRC."""

    def __init__(self, config: Any, micrographs: Any) -> None:
        super().__init__(config, micrographs)
        self.limiters["inner"] = self.limiters["outer"]


class Swapped(experiment.Trainer):
    """Give each ALRC the other's loss."""

    def limit(self, losses: Any) -> Any:
        return CompletionLosses(*reversed(super().limit(CompletionLosses(*reversed(losses)))))


@pytest.mark.parametrize("loss", ["mse", "huber"])
def test_alrc_obeys_the_reference_rule(tiny: Any, loss: Any) -> None:
    _, columns = run(replace(tiny, loss=loss, limit="alrc", iterations=72))
    assert disagreements(columns) == []
    for name in ("inner", "outer"):
        assert columns[f"limit_{name}"][0] == pytest.approx(74.7494, rel=1e-5)
        assert columns[f"limited_{name}"].any()
        assert not columns[f"limited_{name}"].all()


@pytest.mark.parametrize("wrong", [HuberFirst, Shared, Swapped])
def test_a_wrong_order_or_a_shared_state_is_reported(tiny: Any, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "Trainer", wrong)
    _, columns = run(replace(tiny, loss="huber", limit="alrc"))
    assert any(name.startswith("limit_") for name in disagreements(columns))


def gradient_error(trainer: Any) -> float:
    """Compare one update's gradients with those of raw losses times the factors of the rule, by hand.

    With raw losses L above the limit c > 1: d min(√c, …) = ½ / √c · c / L · dL; one loss is far above, one just below.
    """
    (inputs, targets) = trainer.stream.block(0)
    inputs, targets = inputs[:1], type(targets)(*(4 * target[:1] for target in targets))
    raw = [float(loss.detach()) for loss in trainer.losses_of(inputs, targets)]
    ceilings = {"inner": raw[0] / 5, "outer": 2 * raw[1]}
    for name, ceiling in ceilings.items():
        trainer.limiters[name].mean.fill_(ceiling - 3.0)
        trainer.limiters[name].var.fill_(1.0)
    trainer.optimizer = torch.optim.SGD(trainer.network.parameters(), 0.0)
    record = torch.zeros(6)
    trainer.update(inputs, targets, record)
    np.testing.assert_allclose(record[:2], raw, rtol=1e-5)
    inner, outer = trainer.losses_of(inputs, targets)
    c = ceilings["inner"]
    total = 0.5 / math.sqrt(c) * (c / raw[0]) * inner.sum() + 0.5 / math.sqrt(raw[1]) * outer.sum()
    parameters = list(trainer.network.parameters())
    expected = torch.autograd.grad(total, parameters)
    errors = [(p.grad - e).norm() / e.norm() for p, e in zip(parameters, expected, strict=True) if e.norm() > 0]
    return float(max(errors))


def test_alrc_comes_before_huber(tiny: Any) -> None:
    config = replace(tiny, loss="huber", limit="alrc")
    assert gradient_error(make_trainer(config)) < 1e-3
    micrographs = load_micrographs(tiny.data, crop_size=64)
    assert gradient_error(HuberFirst(config, micrographs)) > 0.1
    assert gradient_error(Swapped(config, micrographs)) > 0.1


@pytest.mark.parametrize(
    ("limit", "settings"),
    [
        ("alrc", {"start": (25.0, 900.0), "betas": (0.999, 0.999), "feed": "limited", "eps": 1e-8}),
        ("paper", {"start": (25.0, 900.0), "betas": (0.999, 0.999), "feed": "unlimited", "second_moment": "mean"}),
        ("auto", {"start": "auto"}),
    ],
)
def test_each_limit_is_the_rule_of_its_name(tiny: Any, limit: Any, settings: dict[str, Any]) -> None:
    losses = np.random.default_rng(0).exponential(30.0, 200)
    traces = {name: alrc_trace(losses, **case) for name, case in (("own", settings), ("none", {"start": (1e6, 1e13)}))}
    limiters = experiment.make_limiters(replace(tiny, limit=limit))
    limited = [float(limiters["outer"](torch.tensor([loss], dtype=torch.float64))[0]) for loss in losses]
    expected = {name: [float(each) for each in trace.limited] for name, trace in traces.items()}
    np.testing.assert_allclose(limited, expected["own"], rtol=1e-4)
    assert not np.allclose(limited, expected["none"], rtol=1e-4)
    assert limiters["inner"] is not limiters["outer"]


@pytest.mark.parametrize("variant", ["paper", "code43"])
def test_variants(tiny: Any, variant: Any) -> None:
    trainer = make_trainer(replace(tiny, variant=variant))
    is_paper = variant == "paper"
    names = [name for name, _ in trainer.network.named_parameters()]
    assert any(name.endswith("bias") for name in names) != is_paper
    assert trainer.policy.at(23).beta1 == pytest.approx(0.55 if is_paper else 0.9)
    assert [group["rate_factor"] for group in trainer.optimizer.param_groups] == [1.0, 2.0 if is_paper else 1.0]
    gains = torch.cat([p.detach() for name, p in trainer.network.named_parameters() if name.endswith("gain")])
    assert bool((gains == 1).all()) != is_paper, "only the paper's start depends on the first example"
    assert experiment.resolve_config(trainer.config)["mean_form"] == ("frozen" if is_paper else "image")
    assert trainer.network.shape.mean_form == ("frozen" if is_paper else "image")


def test_seed_and_precision_reach_the_network(tiny: Any) -> None:
    trainers = [make_trainer(replace(tiny, **settings)) for settings in ({}, {"precision": "bfloat16"}, {"seed": 1})]
    same, halved, other = [[p.detach() for p in trainer.network.parameters()] for trainer in trainers]
    assert all(torch.equal(p, q) for p, q in zip(same, halved, strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(same, other, strict=True) if p.ndim == 4)
    examples = trainers[0].stream.block(0)
    (_, exact), (_, rounded) = (trainer.losses_of(*examples) for trainer in trainers[:2])
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, rounded, rtol=0.1, atol=0)


def test_code43_weighs_the_trainers_gradients(tiny: Any) -> None:
    trainer = make_trainer(replace(tiny, variant="code43"))
    inputs, targets = trainer.stream.block(0)
    inputs, targets = inputs[:1], type(targets)(*(target[:1] for target in targets))
    trainer.optimizer = torch.optim.SGD(trainer.network.parameters(), 0.0)
    trainer.update(inputs, targets, torch.zeros(6))
    parts = {"trainer": 2.0, "inner": 1.0, "outer": 1.0}
    total = sum(loss.sum() for loss in trainer.losses_of(inputs, targets))
    for name, factor in parts.items():
        parameter = next(getattr(trainer.network, name).parameters())
        (expected,) = torch.autograd.grad(total, [parameter], retain_graph=True)
        torch.testing.assert_close(parameter.grad, factor * expected, rtol=1e-3, atol=1e-5)


# --- whole runs ---


def test_two_runs_are_identical_and_seeds_are_not(tiny: Any) -> None:
    config = replace(tiny, loss="huber", limit="alrc", iterations=10)
    (first, a), (second, b), (_, c) = run(config), run(config), run(replace(config, seed=1))
    assert first == second
    assert differing(a, b) == []
    assert differing(a, c)[:2] == ["loss_inner", "loss_outer"]


class Unbroken(NamedTuple):
    """Hold a run that was not interrupted, and the folder of all its checkpoints."""

    config: Any
    folder: Path
    result: dict[str, Any]
    columns: dict[str, np.ndarray]


def run_unbroken(config: Any, folder: Path) -> Unbroken:
    """Run with a checkpoint after each block."""
    return Unbroken(config, folder, *run(config, folder, checkpoint_every_s=0))


@pytest.fixture(scope="module")
def unbroken(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    """Run once for all that is to be resumed wrongly."""
    return run_unbroken(replace(TINY, data=folder, limit="alrc"), tmp_path_factory.mktemp("unbroken"))


def differences_after_resuming(whole: Unbroken, step: int, folder: Path) -> list[str]:
    """Take a run up from its checkpoint after an update, and name what is then different."""
    (file,) = whole.folder.glob(f"step-{step:09d}.ckpt")
    folder.mkdir()
    (folder / file.name).write_bytes(file.read_bytes())
    result, rest = run(whole.config, folder)
    assert rest["step"][0] == step + 1
    found = differing(rest, {name: column[step:] for name, column in whole.columns.items()})
    summaries = result["summary"], whole.result["summary"]
    return found + [name for name in summaries[1] if summaries[0][name] != summaries[1][name]]


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "huber", "limit": "alrc"},
        {"loss": "huber", "limit": "alrc", "precision": "bfloat16"},
        {"limit": "alrc", "mean_form": "running"},
        {"variant": "code43"},
    ],
)
def test_resumes_exactly_before_and_after_the_freeze(tiny: Any, tmp_path: Path, settings: dict[str, Any]) -> None:
    whole = run_unbroken(replace(tiny, **settings), tmp_path / "whole")
    for step in (8, 16):
        assert differences_after_resuming(whole, step, tmp_path / f"from {step}") == []


@pytest.mark.parametrize("forgotten", ["network", "optimizer", "limiters", "means", "freeze", "rows"])
def test_a_resume_that_forgets_something_is_reported(
    unbroken: Unbroken, tmp_path: Path, forgotten: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Forgetful(experiment.Trainer):
        def load(self, path: Path) -> None:
            state = torch.load(path, weights_only=True)
            if forgotten == "means":
                for name, value in state["network"].items():
                    value.mul_(0 if name.endswith("norm.mean") else 1)
            elif forgotten == "rows":
                state["rows"].zero_()
            elif forgotten == "freeze":
                monkeypatch.setattr(experiment, "freeze", lambda network, is_frozen: None)
            else:
                state[forgotten] = getattr(self, forgotten).state_dict()
            torch.save(state, path)
            super().load(path)

    monkeypatch.setattr(experiment, "Trainer", Forgetful)
    assert differences_after_resuming(unbroken, 16, tmp_path / "forgetful")


def test_divergence_ends_a_run_early_and_is_named(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    result, columns = run(replace(tiny, diverged_above=1.0))
    assert result["diverged_at"] == columns["step"][-1] == 8
    assert math.isnan(result["summary"]["final_outer"])
    assert "held_out_outer" not in result["summary"]

    class Lost(experiment.Trainer):
        def losses_of(self, inputs: Any, targets: Any) -> Any:
            inner, outer = super().losses_of(inputs, targets)
            is_lost = self.rows[:, 0].any()  # from the second block on
            return CompletionLosses(inner * math.nan if is_lost else inner, outer)

    monkeypatch.setattr(experiment, "Trainer", Lost)
    result, columns = run(replace(tiny, limit="alrc"))
    assert result["diverged_at"] == columns["step"][-1] == 9
    assert np.isnan(columns["loss_inner"][-1])
    assert np.isfinite(columns["loss_inner"][:-1]).all()
    assert math.isfinite(result["summary"]["max_inner"])
    spike = np.array([[1.0, 1.0], [1.0, 1e9], [1.0, 2.0]])
    assert not experiment.is_diverged(spike, 1e3), "one spike is no divergence"
    assert experiment.is_diverged(np.array([[1.0, 2e3], [1.0, 2e3]]), 1e3)


def test_identity_is_the_data_and_not_its_place(tiny: Any) -> None:
    resolved, inputs = experiment.resolve(tiny)
    assert resolved["final_window"] == 1
    assert Config(**resolved) == replace(tiny, final_window=1, mean_form="frozen")

    def identity(config: dict[str, Any], **others: Any) -> str:
        spec = RunSpec(experiment.ENTRY, config, {**inputs, **others}, experiment.EXCLUDED, experiment.name_of(tiny))
        return spec.identity

    assert identity(resolved) == identity({**resolved, "data": "elsewhere"}, path="elsewhere")
    assert identity(resolved) != identity(resolved, sha256="0" * 64)
    for name, value in {"crop_size": 96, "loss": "huber", "limit": "alrc", "seed": 1, "mean_form": "image"}.items():
        assert identity(resolved) != identity({**resolved, name: value})


def test_names_tell_conditions_apart() -> None:
    configs = [replace(TINY, loss=loss, limit=limit, seed=seed) for loss, limit in CONDITIONS for seed in (0, 1)]
    configs += [replace(TINY, variant="code43"), replace(TINY, mean_form="image"), replace(TINY, crop_size=96)]
    names = [experiment.name_of(config) for config in configs]
    assert len(set(names)) == len(names)
    assert names[:3] == ["stem64-mse-s0", "stem64-mse-s1", "stem64-mse-alrc-s0"]


def test_presets() -> None:
    assert list(experiment.PRESETS) == ["smoke", "stem-96", "stem-128", "stem-256", "stem-512-paper"]
    for name, config in experiment.PRESETS.items():
        assert name == "smoke" or name.split("-")[1] == str(config.crop_size)
    paper = replace(experiment.PRESETS["stem-512-paper"], held_out_crops=200)
    assert asdict(paper) == asdict(Config())


def test_changed_data_is_refused(tiny: Any) -> None:
    resolved, inputs = experiment.resolve(tiny)
    with pytest.raises(ValueError, match="SHA-256"):
        experiment.run(resolved, MemoryRecorder({**inputs, "sha256": "0" * 64}))


def test_a_step_is_timed(tiny: Any) -> None:
    micrographs = load_micrographs(tiny.data, crop_size=64)
    assert experiment.measure_step_s(replace(tiny, iterations=1), micrographs, 0.0) > 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"crop_size": 100}, "multiples of 32.*got 100"),
        ({"widths": "half"}, "widths must be one of full, quarter-6-3, .*got 'half'"),
        ({"loss": "mae"}, "loss must be one of mse, huber, got 'mae'"),
        ({"loss": None}, "loss must be one of mse, huber, got None"),
        ({"limit": 3}, "limit must be one of none, alrc, paper, auto, got 3"),
        ({"variant": "code"}, "variant must be one of paper, code43, got 'code'"),
        ({"mean_form": "batch"}, "mean_form must be one of frozen, image, running, got 'batch'"),
        ({"precision": "float16"}, "precision must be one of float32, bfloat16, got 'float16'"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"held_out_crops": 0}, "held_out_crops must be at least 1, got 0"),
        ({"coverage": 20.0}, "coverage must be above 0 and at most 1, such as 1/20, got 20"),
        ({"final_window": 9, "iterations": 5}, "from 1 to iterations = 5, got 9"),
        ({"seed": -1}, "got -1"),
    ],
)
def test_invalid_settings_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Config(**settings)
