"""Runs that train together must be the runs that they are alone: up to rounding, whoever lies beside them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alrc_lab.experiments.recorder import MemoryRecorder

torch = pytest.importorskip("torch", reason="the experiment trains with torch")
from alrc import rules  # noqa: E402 - after the skip
from alrc.torch import ALRC  # noqa: E402
from alrc_lab.experiments import cifar10_supersampling as single  # noqa: E402
from alrc_lab.experiments import replicas_limits as limits  # noqa: E402
from alrc_lab.experiments import supersampling_replicas as replicas  # noqa: E402

Config = single.Config
TINY = Config(width=4, iterations=400, final_window=100, data="embedded")
IMAGES = np.random.default_rng(7).integers(0, 256, (300, 3, 12, 12), np.uint8)
KINDS = (
    {"seed": 0},
    {"seed": 1, "num_stddev": 2.0, "variant": "auto"},
    {"seed": 1, "num_stddev": 1.0, "variant": "auto"},
    {"seed": 2, "num_stddev": 0.05, "variant": "paper", "huber": 0.5},
    {"seed": 2, "learning_rate": 4e-3, "drop_at": 30},
    {"seed": 3, "num_stddev": 0.05},
    {"seed": 4, "num_stddev": 0.05, "variant": "scripts"},
)
"""Every variant, with thresholds so low that limits are reached."""


def configs(**changes: Any) -> list[Any]:
    return [replace(TINY, **(changes | kind)) for kind in KINDS]


class DoubleTrainer(single.Trainer):
    """A run in float64, images and records aside, which shows whether two programs are one computation."""

    def __init__(self, config: Any, images: np.ndarray) -> None:
        super().__init__(config, images)
        self.network.double()
        kind = type(self.optimizer)
        self.optimizer = kind(self.network.parameters(), config.learning_rate, fused=True)
        if self.limiter is not None:
            self.limiter.double()
        block = self.stream.block
        self.stream.block = lambda index: tuple(part.double() for part in block(index))  # type: ignore[method-assign]

    def losses_of(self, inputs: Any, targets: Any) -> Any:
        errors = (self.network(inputs) - targets).pow(self.power).mean((1, 2, 3))
        losses = single.LOSS_SCALE * errors
        is_high = losses >= self.config.root_above
        return errors, torch.where(is_high, torch.where(is_high, losses, 1.0).sqrt(), losses)


def train_alone(trainer: Any, steps: int) -> np.ndarray:
    """Losses, limits and decisions of a run alone, shape (steps, columns)."""
    records = []
    inputs, targets = trainer.stream.block(0)
    for i in range(steps):
        if i == trainer.config.drop_at:
            trainer.optimizer.param_groups[0]["lr"] = trainer.config.dropped_rate
        record = torch.full((5,), torch.inf, dtype=inputs.dtype)
        record[4] = 0
        trainer.update(inputs[i], targets[i], record)
        records.append(record.numpy())
    return np.array(records)


def train_pack(pack: Any, steps: int) -> np.ndarray:
    """The same of all replicas, shape (replicas, steps, columns)."""
    blocks = [trainer.stream.block(0) for trainer in pack.trainers]
    records = torch.zeros((steps, len(blocks), 5), dtype=blocks[0][0].dtype)
    for i in range(steps):
        pack._optimizers.drop_rates([i] * len(blocks))
        inputs, targets = (replicas.side_by_side([block[side][i] for block in blocks]) for side in (0, 1))
        pack.update(inputs, targets, records[i])
    return records.numpy().swapaxes(0, 1)


def check_is_same(pack: Any, trainers: list[Any], steps: int, rtol: float) -> np.ndarray:
    """Fail unless every replica is its run; returns the records of the runs."""
    alone = np.stack([train_alone(trainer, steps) for trainer in trainers])
    together = train_pack(pack, steps)
    np.testing.assert_array_equal(alone[..., 4], together[..., 4], err_msg="decisions")
    np.testing.assert_allclose(together, alone, rtol=rtol)
    return alone


def make_pack(kind: type, wanted: list[Any]) -> Any:
    return replicas.Pack([kind(config, IMAGES) for config in wanted])


# --- equality ---


@pytest.mark.parametrize("batch_size", [1, 2])
def test_in_float64_a_replica_is_its_run(batch_size: int) -> None:
    wanted = configs(batch_size=batch_size)
    pack, trainers = make_pack(DoubleTrainer, wanted), [DoubleTrainer(config, IMAGES) for config in wanted]
    alone = check_is_same(pack, trainers, 110, 1e-9)
    assert all((alone[i, :, 4] > 0).any() for i in (1, 2, 3, 5, 6)), "every limiter had something to do"
    pack.release()
    for trainer, mine in zip(trainers, pack.trainers, strict=True):
        for one, other in zip(trainer.network.parameters(), mine.network.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)
        if trainer.limiter is not None:
            torch.testing.assert_close(trainer.limiter.state_dict(), mine.limiter.state_dict(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("changes", [{}, {"error": "squared", "batch_size": 3}, {"optimizer": "sgd"}])
def test_in_float32_a_replica_begins_as_its_run(changes: dict[str, Any]) -> None:
    wanted = configs(**changes)
    check_is_same(make_pack(single.Trainer, wanted), [single.Trainer(c, IMAGES) for c in wanted], 30, 1e-4)


@pytest.mark.parametrize("way", ["bmm", "each"])
def test_every_way_to_convolve_is_the_run_too(way: str) -> None:
    wanted = configs()
    pack = replicas.Pack([DoubleTrainer(config, IMAGES) for config in wanted], way)
    check_is_same(pack, [DoubleTrainer(config, IMAGES) for config in wanted], 35, 1e-9)


def test_in_bfloat16_a_replica_begins_near_its_run() -> None:
    wanted = configs(precision="bfloat16")
    check_is_same(make_pack(single.Trainer, wanted), [single.Trainer(c, IMAGES) for c in wanted], 4, 3e-2)


def swap_streams(pack: Any) -> None:
    first, second = pack.trainers[0], pack.trainers[1]
    first.stream, second.stream = second.stream, first.stream


def share_limits(pack: Any) -> None:
    judge = pack.limits.judge

    def judge_all(losses: Any) -> Any:
        for i, state in enumerate(pack.limits._states):
            pack.limits._states[i] = type(state)(*(field.clone() for field in state))
            pack.limits._states[i].mean[:] = state.mean.mean()
        return judge(losses)

    pack.limits.judge = judge_all


def share_adam(pack: Any) -> None:
    step = pack._optimizers.step

    def step_all() -> None:
        step()
        for span, optimizer in pack._optimizers._spans:
            for state in optimizer.state.values():
                state["exp_avg"][:] = (
                    state["exp_avg"]
                    .unflatten(0, (len(span), -1))
                    .mean(0)
                    .repeat(len(span), *[1] * (state["exp_avg"].ndim - 1))
                )

    pack._optimizers.step = step_all


def forget_the_batch(pack: Any) -> None:
    pack.config = replace(pack.config, batch_size=2)


def mix_channels(pack: Any) -> None:
    with torch.no_grad():
        first = next(pack.network.parameters())
        first[:4], first[4:8] = first[4:8].clone(), first[:4].clone()


@pytest.mark.parametrize("mutate", [swap_streams, share_limits, share_adam, forget_the_batch, mix_channels])
def test_twin_replicas_that_touch_each_other_are_caught(mutate: Any) -> None:
    wanted = configs()
    if mutate is share_limits:
        wanted = [replace(TINY, num_stddev=0.05, seed=seed) for seed in range(3)]
    if mutate is forget_the_batch:
        wanted = configs(optimizer="sgd")  # Adam would not notice a factor
    pack = make_pack(single.Trainer, wanted)
    mutate(pack)
    trainers = [single.Trainer(config, IMAGES) for config in wanted]
    with pytest.raises(AssertionError):
        check_is_same(pack, trainers, 10, 1e-4)


def test_runs_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="2 other kinds"):
        make_pack(single.Trainer, [TINY, replace(TINY, width=5)])
    keys = {replicas.pack_key(vars(config)) for config in (*configs(), replace(TINY, iterations=150))}
    assert len(keys) == 1
    for change in ({"error": "squared"}, {"batch_size": 4}, {"precision": "bfloat16"}, {"optimizer": "sgd"}):
        assert replicas.pack_key(vars(replace(TINY, **change))) not in keys


@pytest.mark.parametrize(
    ("changes", "number"),
    [
        ({"width": 16}, 8),
        ({"width": 16, "precision": "bfloat16"}, 16),
        ({"width": 8}, 16),
        ({"width": 8, "precision": "bfloat16"}, 32),
        ({"width": 4}, 32),
        ({"width": 16, "batch_size": 4}, 1),
        ({"width": 64}, 1),
        ({"width": 16, "device": "cuda"}, 1),
    ],
)
def test_a_pack_is_as_large_as_has_been_measured_to_pay(changes: dict[str, Any], number: int) -> None:
    assert replicas.largest_pack(vars(replace(TINY, **changes))) == number


# --- ALRC for all rows at once ---


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize(
    "rule",
    [
        rules.ALRC(2.0),
        rules.ALRC(2.0, observe=7),
        rules.ALRC.reference(0.5, mu1_start=1.0, mu2_start=2.0),
        rules.ALRC.paper(0.5, mu1=1.0, mu2=2.0),
        rules.ALRC.cifar_scripts(0.5),
    ],
    ids=["auto", "auto-7", "reference", "paper", "scripts"],
)
def test_rows_are_the_rule_of_one_run(rule: Any, batch_size: int) -> None:
    rows, steps = 4, 120
    random = np.random.default_rng(3)
    losses = random.lognormal(0.0, 0.6, (steps, rows, batch_size))
    losses[60:, 0] += 20  # a shift: the moments are learned anew (S19)
    losses[40, 1] = 1e30
    losses[41, 2] = np.nan
    losses[42, 3, 0] = np.inf
    found = limits.Limits(
        [ALRC.from_rule(rule).double() for _ in range(rows)], [None] * rows, torch.device("cpu"), torch.float64
    )
    states = [rule.init() for _ in range(rows)]
    number = 0
    for update in losses:
        with np.errstate(all="ignore"):
            judged = found.judge(torch.from_numpy(update))
            for row in range(rows):
                decision = rule.decide(update[row], states[row])
                states[row] = rule.update(update[row], decision, states[row])
                np.testing.assert_allclose(judged.factor[row], decision.scale, rtol=1e-9)
                is_none = decision.ceiling >= rules.LARGEST_LOSS
                np.testing.assert_allclose(judged.limit[row], np.inf if is_none else decision.ceiling, rtol=1e-9)
                number += int(((decision.scale > 0) & (decision.scale < 1)).sum())
    assert number > 10
    own = [ALRC.from_rule(rule).double() for _ in range(rows)]
    found.write_back(own)
    for row in range(rows):
        for name, value in zip(states[row]._fields, states[row], strict=True):
            np.testing.assert_allclose(getattr(own[row], name), value, rtol=1e-9, err_msg=name)


# --- whole runs ---


@pytest.fixture
def tiny_images(monkeypatch) -> None:
    """Let runs read small images instead of the data set's."""
    loaded = type("Loaded", (), {"images": IMAGES})
    monkeypatch.setattr(single, "load_images", lambda inputs: loaded)


def run_all(wanted: list[Any], recorders: list[Any]) -> list[dict[str, Any]]:
    resolved = [single.resolve_config(config) for config in wanted]
    outcomes = dict(replicas.run_together(resolved, recorders))
    return [outcomes[i] for i in range(len(wanted))]


def recorder_of(folder: Path | None = None, **options: Any) -> MemoryRecorder:
    return MemoryRecorder({"sha256": "x"}, folder, **options)


def test_a_lost_replica_ends_alone(tiny_images: None) -> None:
    wanted = [replace(TINY, seed=0), replace(TINY, seed=1, learning_rate=1e30), replace(TINY, seed=2, iterations=300)]
    together, kept = [recorder_of() for _ in wanted], []
    resolved = [single.resolve_config(config) for config in wanted]
    for place, outcome in replicas.run_together(resolved, together):
        kept.append((place, outcome))
    assert [place for place, _ in kept] == [1, 2, 0]
    outcomes = dict(kept)
    assert outcomes[1]["diverged_at"] == together[1].columns["step"][-1] < 20
    assert math.isnan(outcomes[1]["summary"]["final_error"])
    for place in (0, 2):
        alone = recorder_of()
        expected = single.run(resolved[place], alone)
        assert outcomes[place]["diverged_at"] is None
        assert outcomes[place]["summary"]["steps"] == expected["summary"]["steps"] == wanted[place].iterations
        np.testing.assert_array_equal(together[place].columns["step"], alone.columns["step"])
        np.testing.assert_allclose(together[place].columns["error"][:30], alone.columns["error"][:30], rtol=1e-4)
        np.testing.assert_allclose(
            outcomes[place]["summary"]["final_error"], expected["summary"]["final_error"], rtol=0.1
        )


class StopError(Exception):
    pass


class Stopped(MemoryRecorder):
    """Ends the program after a checkpoint."""

    def checkpoint(self, step: int, save: Any) -> None:
        super().checkpoint(step, save)
        raise StopError


def test_a_stopped_pack_goes_on_in_another_or_alone(tiny_images: None, tmp_path: Path) -> None:
    wanted = [replace(config, iterations=320, drop_at=None) for config in configs()[:4]]
    whole = [recorder_of() for _ in wanted]
    outcomes = run_all(wanted, whole)
    folders = [tmp_path / str(i) for i in range(len(wanted))]
    # The last but one stops the program: the last has no checkpoint and starts from zero, beside others that do not.
    kinds = [MemoryRecorder, MemoryRecorder, Stopped, MemoryRecorder]
    with pytest.raises(StopError):
        run_all(
            wanted,
            [kind({"sha256": "x"}, folder, checkpoint_every_s=0) for kind, folder in zip(kinds, folders, strict=True)],
        )
    assert [folder.exists() for folder in folders] == [True, True, True, False]
    rest = [recorder_of(folder) for folder in folders]
    single_run = single.run(single.resolve_config(wanted[0]), rest[0])
    again = [single_run, *run_all(wanted[1:], rest[1:])]
    for i, (outcome, recorder) in enumerate(zip(again, rest, strict=True)):
        first = 1 if i == 3 else 257
        columns = recorder.columns
        np.testing.assert_array_equal(columns["step"], np.arange(first, 321))
        near = slice(0, 10)
        for name in ("error", "limit"):
            np.testing.assert_allclose(columns[name][near], whole[i].columns[name][first - 1 :][near], rtol=1e-3)
        assert outcome["summary"].keys() == outcomes[i]["summary"].keys()
        assert outcome["summary"]["steps"] == 320
    assert torch.load(folders[1] / "step-000000256.ckpt", weights_only=True)["step"] == 256


def final_errors(seeds: range, size: int, **changes: Any) -> np.ndarray:
    """Final errors of runs of many seeds, `size` in a pack; 1 trains each alone."""
    found = []
    for first in range(seeds.start, seeds.stop, size):
        wanted = [replace(TINY, seed=seed, **changes) for seed in range(first, first + size)]
        recorders = [recorder_of() for _ in wanted]
        if size == 1:
            outcomes = [single.run(single.resolve_config(wanted[0]), recorders[0])]
        else:
            outcomes = run_all(wanted, recorders)
        found += [outcome["summary"]["final_error"] for outcome in outcomes]
    return np.array(found)


@pytest.mark.slow
def test_final_errors_of_packs_are_distributed_as_those_of_single_runs(tiny_images: None) -> None:
    stats = pytest.importorskip("scipy.stats", reason="compares two samples")
    alone, packed = final_errors(range(32), 1), final_errors(range(32), 8)
    assert stats.ks_2samp(alone, packed).pvalue > 0.05
    assert abs(stats.ttest_rel(alone, packed).statistic) < 3
    # Twin: runs that learn at half the rate are another distribution.
    slower = final_errors(range(32), 8, learning_rate=TINY.learning_rate / 2)
    assert stats.ks_2samp(alone, slower).pvalue < 0.01


# --- on a GPU: never run so far ---


@pytest.fixture
def gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def gpu_trainers(**changes: Any) -> list[DoubleTrainer]:
    return [DoubleTrainer(config, IMAGES) for config in configs(device="cuda", iterations=100, **changes)]


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["grouped", "bmm", "each"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_on_a_gpu_a_graph_is_the_eager_pack(way: str, optimizer: str, gpu: None) -> None:
    one, other = (replicas.Pack(gpu_trainers(optimizer=optimizer), way, is_graph) for is_graph in (True, False))
    places = [tensor.data_ptr() for tensor in one.tensors()]
    for rows, others in zip(one.train_block(), other.train_block(), strict=True):
        for name in rows:
            np.testing.assert_allclose(rows[name], others[name], rtol=1e-6, err_msg=name)
    assert [tensor.data_ptr() for tensor in one.tensors()] == places
    for tensor, wanted in zip(one.tensors(), other.tensors(), strict=True):
        torch.testing.assert_close(tensor, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["grouped", "bmm", "each"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_on_a_gpu_a_replica_is_its_run(way: str, batch_size: int, gpu: None) -> None:
    pack = replicas.Pack(gpu_trainers(batch_size=batch_size), way)
    alone = [trainer.train_block() for trainer in gpu_trainers(batch_size=batch_size)]
    for rows, others in zip(pack.train_block(), alone, strict=True):
        for name in rows:
            # A run keeps its records in float32.
            np.testing.assert_allclose(rows[name], others[name], rtol=1e-5, err_msg=name)
