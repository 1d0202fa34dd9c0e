"""What a pack does on a GPU, as far as it can be proven without one: memory that stays, nothing read, nothing changed.

On a CPU a `Replay` calls its function instead of a graph, after the same warm-up and on the same memory. Tests marked
`gpu` do the rest; they have never been run.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alrc_lab.experiments.recorder import MemoryRecorder

torch = pytest.importorskip("torch", reason="the experiment trains with torch")
from torch.nn import functional as F  # noqa: E402 - after the skip
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from alrc.torch.ops import TorchOps  # noqa: E402
from alrc_lab.experiments import cifar10_supersampling as single  # noqa: E402
from alrc_lab.experiments import replicas_graph as graph  # noqa: E402
from alrc_lab.experiments import replicas_network as network  # noqa: E402
from alrc_lab.experiments import supersampling_replicas as replicas  # noqa: E402
from alrc_lab.experiments.replicas_limits import Limits, RowOps  # noqa: E402
from waiting import RefuseReading, WaitedError  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = single.Config(width=4, iterations=48, final_window=20, data="embedded")
IMAGES = np.random.default_rng(7).integers(0, 256, (300, 3, 8, 8), np.uint8)
KINDS = (
    {"seed": 0},
    {"seed": 1, "num_stddev": 2.0, "variant": "auto"},
    {"seed": 2, "num_stddev": 0.05, "variant": "paper", "huber": 0.5},
    {"seed": 2, "learning_rate": 4e-3, "drop_at": 20},
    {"seed": 3, "num_stddev": 0.05},
    {"seed": 4, "num_stddev": 0.05, "variant": "scripts"},
    {"seed": 5, "learning_rate": 1e30},
)
"""Every variant, a rate that drops, and a run that is lost at once."""


def make_pack(way: str | None = None, is_replayed: bool | None = None, **changes: Any) -> Any:
    wanted = [replace(TINY, **(changes | kind)) for kind in KINDS]
    return replicas.Pack([single.Trainer(config, IMAGES) for config in wanted], way, is_replayed)


def check_equal(one: Any, other: Any) -> None:
    """Fail unless two packs train the next block alike, bit for bit, and hold the same afterwards."""
    for rows, others in zip(one.train_block(), other.train_block(), strict=True):
        assert rows.keys() == others.keys()
        for name in rows:
            np.testing.assert_array_equal(rows[name], others[name], err_msg=name)
    for tensor, wanted in zip(one.tensors(), other.tensors(), strict=True):
        np.testing.assert_array_equal(tensor.detach().numpy(), wanted.detach().numpy())


# --- ways to convolve ---


def convolved(way: Callable[..., Any], batch: int, channels: int, outputs: int, size: int) -> list[Any]:
    """Output and gradients of a convolution of three replicas in float64."""
    made = torch.Generator().manual_seed(0)
    shapes = ((batch, 3 * channels, 5, 7), (3 * outputs, channels, size, size), (3 * outputs,))
    given = [torch.randn(shape, dtype=torch.float64, generator=made, requires_grad=True) for shape in shapes]
    found = way(given[0].contiguous(memory_format=torch.channels_last), given[1], given[2], 3)
    return [found, *torch.autograd.grad(found, given, torch.randn(found.shape, dtype=torch.float64, generator=made))]


@pytest.mark.parametrize("way", network.WAYS)
@pytest.mark.parametrize(("batch", "channels", "outputs", "size"), [(1, 3, 4, 5), (2, 4, 6, 3), (3, 2, 3, 1)])
def test_every_way_is_a_convolution_with_groups(way: str, batch: int, channels: int, outputs: int, size: int) -> None:
    def grouped(x: Any, w: Any, b: Any, replicas: int) -> Any:
        return F.conv2d(x, w, b, padding=size // 2, groups=replicas)

    wanted = convolved(grouped, batch, channels, outputs, size)
    found = convolved(network.WAYS[way], batch, channels, outputs, size)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert found[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("is_turned", [True, False])
def test_twin_a_gradient_of_unturned_filters_or_of_another_replica_is_caught(is_turned: bool, monkeypatch: Any) -> None:
    product = network._product
    calls = list[int]()

    def wrong(images: Any, filters: Any) -> Any:
        calls.append(1)
        if len(calls) % 2 == 0:  # in the backward pass
            filters = filters.flip(1, 2) if is_turned else filters.roll(1, 0)
        return product(images, filters)

    monkeypatch.setattr(network, "_product", wrong)
    with pytest.raises(AssertionError):
        test_every_way_is_a_convolution_with_groups("bmm", 2, 4, 6, 3)
    assert calls


@pytest.mark.parametrize("way", network.WAYS)
def test_every_way_has_the_parameters_of_the_single_network(way: str) -> None:
    networks = [single.build_network(4, seed) for seed in range(3)]
    stacked = network.stack_networks(networks, way)
    names = [name for name, _ in networks[0].named_parameters()]
    assert [name for name, _ in stacked.named_parameters()] == names
    images = torch.randn(2, 9, 8, 8)
    for precision in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            found = stacked(images)
            wanted = torch.cat([one(images[:, 3 * i : 3 * i + 3]) for i, one in enumerate(networks)], 1)
        assert found.dtype == wanted.dtype == precision
        tolerance = 1e-5 if precision == torch.float32 else 0.05
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    found.float().sum().backward()
    for name, parameter in stacked.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.stride() == parameter.stride(), f"{name}: fused optimisers rely on one layout"


# --- an update that can be a graph ---


@pytest.mark.parametrize(
    "changes",
    [{}, {"precision": "bfloat16"}, {"optimizer": "sgd", "batch_size": 5}, {"error": "squared", "root_above": None}],
    ids=lambda changes: "-".join(map(str, changes.values())) or "default",
)
def test_updates_on_memory_that_never_moves_are_the_plain_ones(changes: dict[str, Any]) -> None:
    replayed, plain = make_pack(None, True, **changes), make_pack(None, False, **changes)
    for _ in range(2 if "batch_size" in changes else 1):
        check_equal(replayed, plain)
    replayed.release()
    plain.release()
    for one, other in zip(replayed.trainers, plain.trainers, strict=True):
        one, other = one.optimizer.state_dict(), other.optimizer.state_dict()
        assert one["param_groups"] == other["param_groups"]
        torch.testing.assert_close(one["state"], other["state"], rtol=0, atol=0, equal_nan=True)


def keep_the_warm_up(function: Any, buffers: Any, state: Any) -> None:
    for _ in range(graph.WARM_UPS):
        function(*buffers)


def test_twin_a_warm_up_that_leaves_a_trace_is_caught(monkeypatch: Any) -> None:
    monkeypatch.setattr(graph, "_warm_up", keep_the_warm_up)
    with pytest.raises(AssertionError):
        check_equal(make_pack(None, True), make_pack(None, False))


@pytest.mark.parametrize("owner", [Limits, replicas._Optimizers])
def test_twin_memory_that_the_warm_up_does_not_put_back_is_caught(owner: Any, monkeypatch: Any) -> None:
    tensors, is_forgetful = owner.tensors, [True]
    monkeypatch.setattr(owner, "tensors", lambda self: [] if is_forgetful[0] else tensors(self))
    replayed, plain = make_pack(None, True), make_pack(None, False)
    found = replayed.train_block()
    is_forgetful[0] = False
    replayed.train_block = lambda: found
    with pytest.raises(AssertionError):
        check_equal(replayed, plain)


def test_a_graph_is_captured_for_each_pack_and_each_rate(monkeypatch: Any) -> None:
    made = list[list[float]]()

    class Counted(graph.Replay):
        def __init__(self, function: Any, *rest: Any) -> None:
            made.append([one.param_groups[0]["lr"] for _, one in function.__self__._optimizers._spans])
            super().__init__(function, *rest)

    monkeypatch.setattr(replicas, "Replay", Counted)
    pack = make_pack(None, True)
    pack.train_block()
    assert len(made) == 2
    assert 4e-3 in made[0]
    assert 4e-3 not in made[1]
    assert TINY.dropped_rate in made[1]
    make_pack(None, False).train_block()
    assert len(made) == 2


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_what_an_update_needs_never_moves(optimizer: str) -> None:
    pack = make_pack(None, True, optimizer=optimizer)
    check_stays(pack)
    assert pack._replay is not None
    weights, spans = len(list(pack.network.parameters())), len(pack._optimizers._spans)
    moments = 3 * weights * spans if optimizer == "adam" else 0
    assert len(pack.tensors()) == weights + moments + 3 * 3 + 5, "four limiters, of which one has five numbers"


def check_stays(pack: Any) -> None:
    """Fail unless all memory of a pack lies where it lay before, through updates of which the first makes it."""
    before = [tensor.data_ptr() for tensor in pack.tensors()]
    values = [tensor.detach().clone() for tensor in pack.tensors()]
    pack.train_block()
    assert [tensor.data_ptr() for tensor in pack.tensors()] == before
    changed = [not torch.equal(a, b.detach()) for a, b in zip(values, pack.tensors(), strict=True)]
    assert sum(changed) > 0.9 * len(changed), "twin: the list holds what updates change"


def test_twin_memory_that_moves_is_caught(monkeypatch: Any) -> None:
    judge = Limits.judge

    def judge_and_move(self: Any, losses: Any) -> Any:
        limited = judge(self, losses)
        self._states = [type(state)(*(field.clone() for field in state)) for state in self._states]
        return limited

    monkeypatch.setattr(Limits, "judge", judge_and_move)
    with pytest.raises(AssertionError):
        check_stays(make_pack(None, True))


class OneDevice(TorchDispatchMode):
    """Refuse every operator that takes or makes a tensor anywhere but on the meta device: a copy that would wait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_unknown = func.overloadpacket.__name__ == "_fused_sgd_"  # which torch has never taught the meta device
        found = None if is_unknown else func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves((args, kwargs, found)):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                raise WaitedError(f"{func} uses a tensor on {leaf.device}")
        return found


def update_on_meta(pack: Any, batch_size: int) -> None:
    images = torch.zeros(batch_size, 3 * len(KINDS), 8, 8, device="meta")
    record = torch.zeros(len(KINDS), 5, device="meta")
    with OneDevice():
        pack.update(images, images, record)


@pytest.fixture
def meta(monkeypatch: Any) -> None:
    """Let the meta device do what a GPU can: it knows no autocast, and no fused optimiser but by name."""
    monkeypatch.setattr(
        importlib.import_module("torch.optim.sgd"), "_device_dtype_check_for_fused", lambda *a, **k: None
    )
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)


@pytest.mark.parametrize("way", network.WAYS)
@pytest.mark.parametrize("changes", [{}, {"optimizer": "sgd", "batch_size": 3}], ids=["adam", "sgd"])
def test_an_update_runs_where_there_is_nothing_to_read(way: str, changes: dict[str, Any], meta: None) -> None:
    update_on_meta(make_pack(way, False, device="meta", **changes), changes.get("batch_size", 1))


def test_twin_an_update_that_takes_a_number_from_the_host_is_caught(meta: None, monkeypatch: Any) -> None:
    judge = Limits.judge
    monkeypatch.setattr(Limits, "judge", lambda self, losses: judge(self, losses * torch.tensor(1.0)))
    with pytest.raises(WaitedError):
        update_on_meta(make_pack(None, False, device="meta"), 1)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", network.WAYS)
def test_an_update_calls_no_operator_that_reads(precision: str, way: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(RowOps, "select", TorchOps.select)  # which looks on a CPU only
    pack = make_pack(way, False, precision=precision)
    images, record = torch.randn(1, 3 * len(KINDS), 8, 8), torch.zeros(len(KINDS), 5)
    with RefuseReading():
        pack.update(images, images, record)
    assert record.isfinite()[:, 0].all()


def test_twin_an_update_that_reads_is_caught() -> None:
    pack = make_pack(None, False)
    images, record = torch.randn(1, 3 * len(KINDS), 8, 8), torch.zeros(len(KINDS), 5)
    with RefuseReading(), pytest.raises(WaitedError):  # RowOps.select looks
        pack.update(images, images, record)


def test_adam_is_told_when_it_is_captured_and_no_run_learns_of_it(monkeypatch: Any) -> None:
    told = list[bool]()
    step = torch.optim.Adam.step

    def watched(self: Any, closure: Any = None) -> Any:
        told.append(self.param_groups[0]["capturable"])
        return step(self, closure)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    pack = make_pack(None, True)
    monkeypatch.setattr(replicas, "_is_captured", lambda tensor: True)
    images, record = torch.randn(1, 3 * len(KINDS), 8, 8), torch.zeros(len(KINDS), 5)
    pack.update(images, images, record)
    assert told
    assert all(told)
    pack.release()
    for trainer in pack.trainers:
        state = trainer.optimizer.state_dict()
        assert state["param_groups"][0]["capturable"] is False
        assert {tuple(entry) for entry in state["state"].values()} == {("step", "exp_avg", "exp_avg_sq")}
        assert {float(entry["step"]) for entry in state["state"].values()} == {1.0}


# --- what is chosen, and what is said of it ---


def test_a_cpu_convolves_with_groups_and_measures_nothing(monkeypatch: Any) -> None:
    monkeypatch.setattr(graph, "time_ways", None)
    assert graph.choose_way(TINY, 4) == {"convolution": "grouped"}
    assert replicas.facts_of([vars(TINY)] * 4) == {"convolution": "grouped", "graph": False}
    assert make_pack().way == "grouped"


def test_a_gpu_takes_the_fastest_way_of_each_shape_and_asks_once(monkeypatch: Any) -> None:
    answers = [{"grouped": 0.003, "bmm": 0.002}, {}]
    asked = list[int]()

    def time_ways(config: Any, number: int) -> dict[str, float]:
        asked.append(number)
        return answers[len(asked) - 1]

    monkeypatch.setattr(graph, "time_ways", time_ways)
    monkeypatch.setattr(graph, "_choices", {})
    config = replace(TINY, device="cuda")
    chosen = {"convolution": "bmm", "step_ms": {"grouped": 3.0, "bmm": 2.0}}
    assert replicas.facts_of([vars(config)] * 5) == {**chosen, "graph": True}
    assert graph.choose_way(replace(config, seed=9, learning_rate=1.0), 3) == chosen
    assert asked == [5]
    assert graph.choose_way(replace(config, batch_size=4), 7) == {"convolution": "grouped", "step_ms": {}}
    assert asked == [5, 7]


def test_ways_that_fail_are_not_timed(monkeypatch: Any) -> None:
    times = graph.time_ways(replace(TINY, precision="bfloat16"), 2)
    assert list(times) == list(network.WAYS)
    assert all(seconds > 0 for seconds in times.values())

    def fail(*given: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setitem(network.WAYS, "bmm", fail)
    with pytest.warns(UserWarning, match="2 replicas cannot convolve by 'bmm': no room"):
        assert list(graph.time_ways(TINY, 2)) == ["grouped", "each"]


@pytest.mark.parametrize(
    ("changes", "free_gib", "number"),
    [
        ({"width": 64, "precision": "bfloat16"}, 78, 40),
        ({"width": 64, "precision": "bfloat16", "batch_size": 64}, 78, 40),
        ({"width": 64, "batch_size": 64}, 20, 12),
        ({"width": 64, "batch_size": 64}, 6, 1),
    ],
)
def test_a_gpu_packs_what_half_of_its_memory_holds(
    changes: dict[str, Any], free_gib: int, number: int, monkeypatch: Any
) -> None:
    config = vars(replace(TINY, device="cuda", **changes))
    assert torch.cuda.is_available() or replicas.largest_pack(config) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_gib * 2**30, 80 * 2**30))
    assert replicas.largest_pack(config) == number


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_replica_takes_no_more_memory_than_is_counted(precision: str) -> None:
    config = replace(TINY, width=16, batch_size=2, precision=precision)
    weights = sum(parameter.numel() for parameter in single.build_network(16, 0).parameters())
    assert weights == 252 * 16**2 + 166 * 16 + 3
    kept = dict[int, int]()

    def keep(tensor: Any) -> Any:
        if tensor.ndim == 4 and tensor.shape[-1] == 32:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    stacked = network.stack_networks([single.build_network(16, seed) for seed in range(2)])
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"),
    ):
        outputs = stacked(torch.randn(2, 6, 32, 32).contiguous(memory_format=torch.channels_last))
    itemsize = 2 if precision == "bfloat16" else 4
    between = 22 * config.width * 2 * config.batch_size * 32 * 32 * itemsize
    assert 0.9 * between < sum(kept.values()) < 1.1 * between
    del outputs


# --- whole programs ---


def test_the_benchmark_tries_itself_out_without_a_gpu(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    benchmark: Any = importlib.import_module("replicas_gpu")
    options = ["--device", "cpu", "--width", "4", "--seconds", "0.01", "--sizes", "2", "--batches", "1"]
    benchmark.main([*options, "--out", str(tmp_path / "out.json")])
    assert "310 runs of 100,000 updates" in capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert found["gflop_per_image"] == pytest.approx((6 * (252 * 16 + 150 * 4) - 2 * 75 * 4) * 1024 / 1e9, rel=1e-12)
    rows = found["measurements"]
    assert len(rows) == 13
    assert all(row["problem"] is None for row in rows)
    assert {row["way"] for row in rows} == {"alone", *network.WAYS}
    hours = found["table1_hours"]["alone"]["hours"]["batch 1"]
    assert hours == pytest.approx(80 * 100_000 / rows[0]["replica_updates_per_s"] / 3600)
    assert found["table1_hours"]["packed"]["total"] is None, "three batch sizes were not measured"

    def fail(*given: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(benchmark, "Pack", fail)
    monkeypatch.setattr(benchmark, "matmul_rate", fail)
    benchmark.main(options)
    shown = capsys.readouterr().out
    assert shown.count("OutOfMemoryError: no room") == 11
    assert "batch 1 unknown" not in shown, "what was not packed was measured"
    benchmark.main([*options, "--minutes", "0"])
    assert capsys.readouterr().out.count("TimeoutError: the time is up") == 13
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            benchmark.main(["--width", "4"])


@pytest.fixture
def gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_on_a_gpu_no_update_waits(precision: str, gpu: None) -> None:
    def watched(what: Callable[[], None]) -> None:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            what()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    pack = make_pack("grouped", False, device="cuda", precision=precision)
    images = torch.randn(1, 3 * len(KINDS), 8, 8, device="cuda")
    record = torch.zeros(len(KINDS), 5, device="cuda")
    pack.update(images, images, record)
    watched(lambda: pack.update(images, images, record))
    run = single.Trainer(replace(TINY, device="cuda", num_stddev=2.0, precision=precision), IMAGES)
    run.update(images[:, :3], images[:, :3], record[0])
    watched(lambda: run.update(images[:, :3], images[:, :3], record[0]))
    with pytest.raises(RuntimeError, match="synchronizing"):
        watched(lambda: pack.update(images, images * record.sum().item(), record))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_on_a_gpu_packs_stop_resume_lose_runs_and_end(
    precision: str, gpu: None, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(single, "load_images", lambda inputs: type("Loaded", (), {"images": IMAGES}))
    monkeypatch.setattr(graph, "SIZE", 8)
    wanted = [replace(TINY, device="cuda", precision=precision, iterations=600, **kind) for kind in KINDS]
    resolved = [single.resolve_config(config) for config in wanted]
    facts = replicas.facts_of(resolved)
    assert facts["graph"]
    assert facts["convolution"] in facts["step_ms"]
    folders = [tmp_path / str(i) for i in range(len(wanted))]
    recorders = [MemoryRecorder({"sha256": "x"}, folder, checkpoint_every_s=0) for folder in folders]
    first: Any = replicas.run_together(resolved, recorders)
    place, outcome = next(first)
    assert place == len(KINDS) - 1
    assert outcome["diverged_at"] is not None
    # The others have checkpoints by now: one goes on alone, the rest in another pack.
    next(first)
    first.close()
    rest = [MemoryRecorder({"sha256": "x"}, folder) for folder in folders[:-1]]
    outcomes = dict(replicas.run_together(resolved[1:-1], rest[1:]))
    outcomes[-1] = single.run(resolved[0], rest[0])
    assert all(outcome["diverged_at"] is None for outcome in outcomes.values())
    assert {outcome["summary"]["steps"] for outcome in outcomes.values()} == {600}
