"""Check partial-STEM's networks against the layer table of the specification, typed in anew, and their wiring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the experiment trains with torch")
from torch import nn  # noqa: E402 - after the skip

from alrc_lab.experiments import partial_stem_networks as networks  # noqa: E402
from alrc_lab.experiments.partial_stem_layers import MeanOnlyNorm, NormalisedConvolution, freeze  # noqa: E402
from alrc_lab.experiments.partial_stem_networks import NetworkShape  # noqa: E402

TINY = NetworkShape((4, 5, 6, 7, 8), (3, 4), 5, 2, 2)
TINY43 = TINY.as_code43()

# name, op, kernel, stride, in, out, side in, side out, copies, parameters of one with V, b and g, MMAC of one
SPECIFIED = [
    ("I0", "conv", 5, 1, 2, 64, 256, 256, 1, 3_264, 210),
    ("I1", "conv", 3, 2, 64, 128, 256, 128, 1, 73_984, 1208),
    ("I2", "conv", 3, 2, 128, 256, 128, 64, 1, 295_424, 1208),
    ("I3", "conv", 3, 2, 256, 512, 64, 32, 1, 1_180_672, 1208),
    ("I4", "conv", 3, 2, 512, 768, 32, 16, 1, 3_540_480, 906),
    ("IR1-IR6", "conv", 3, 1, 768, 768, 16, 16, 18, 5_309_952, 1359),
    ("ID1", "deconv", 3, 2, 768, 512, 16, 32, 1, 3_539_968, 906),
    ("ID2", "deconv", 3, 2, 512, 256, 32, 64, 1, 1_180_160, 1208),
    ("ID3", "deconv", 3, 2, 256, 128, 64, 128, 1, 295_168, 1208),
    ("ID4", "deconv", 3, 2, 128, 64, 128, 256, 1, 73_856, 1208),
    ("T1", "conv", 3, 1, 64, 64, 256, 256, 1, 36_992, 2416),
    ("T2", "conv", 3, 1, 64, 1, 256, 256, 1, 578, 38),
    ("O0", "conv", 5, 1, 2, 32, 512, 512, 1, 1_664, 419),
    ("O1", "conv", 3, 2, 32, 64, 512, 256, 1, 18_560, 1208),
    ("OR1-OR3", "conv", 3, 1, 64, 64, 256, 256, 9, 36_992, 2416),
    ("OD1", "deconv", 3, 2, 64, 32, 256, 512, 1, 18_496, 1208),
    ("O2", "conv", 3, 1, 32, 32, 512, 512, 1, 9_280, 2416),
    ("O3", "conv", 3, 1, 32, 1, 512, 512, 1, 290, 76),
]


# --- the table ---


def check_table(shape: NetworkShape, side: int = 512) -> None:
    """Compare the table with the specification's, which rounds to millions of multiplications."""
    rows = networks.layer_table(shape, side)
    assert [row[1:11] for row in rows] == [row[:10] for row in SPECIFIED]
    assert [row.mmac for row in rows] == pytest.approx([row[10] for row in SPECIFIED], abs=0.51)


def test_table_is_the_specified_one() -> None:
    code = NetworkShape.full().as_code43()
    check_table(code)
    for wrong in ({"first_weight_norm": "output"}, {"has_biases": False}, {"inner_blocks": 5}, {"trainer": 32}):
        with pytest.raises(AssertionError):
            check_table(replace(code, **wrong))
    with pytest.raises(AssertionError):
        check_table(code, 256)


@pytest.mark.parametrize(("side", "gflop"), [(512, 126.5), (256, 31.6), (128, 7.9), (96, 4.4)])
def test_cost_is_the_specified_one(side: int, gflop: float) -> None:
    total = sum(2e-3 * row.copies * row.mmac for row in networks.layer_table(NetworkShape.full(), side))
    assert total == pytest.approx(gflop, abs=0.06)


@pytest.mark.parametrize(
    ("changes", "inner", "trainer", "outer", "total"),
    [
        ({"has_biases": True, "first_weight_norm": "none"}, 105_762_112, 37_570, 381_218, 106_180_900),
        ({}, 105_745_664, 37_505, 380_481, 106_163_650),
        ({"has_biases": True}, 105_762_176, 37_570, 381_218, 106_180_964),
    ],
    ids=["code", "paper", "paper with biases"],
)
def test_parameters_of_the_full_networks(changes: Any, inner: int, trainer: int, outer: int, total: int) -> None:
    shape = replace(NetworkShape.full(), **changes)
    counts = networks.count_parameters(shape)
    assert counts == {"inner": inner, "trainer": trainer, "outer": outer, "total": total}
    assert sum(row.copies * row.parameters for row in networks.layer_table(shape)) == total


def test_code43_counts_like_the_table() -> None:
    assert networks.count_parameters(NetworkShape.full().as_code43())["total"] == 106_180_900


@pytest.mark.parametrize(
    ("shape", "millions"),
    [
        (NetworkShape.quarter(), 6.64),
        (NetworkShape.quarter(inner_blocks=3, outer_blocks=2), 3.65),
        (NetworkShape.eighth(inner_blocks=2), 0.66),
        (NetworkShape.eighth(), 0.41),
    ],
)
def test_parameters_of_small_networks(shape: NetworkShape, millions: float) -> None:
    for each in (shape, shape.as_code43()):
        assert networks.count_parameters(each)["total"] / 1e6 == pytest.approx(millions, abs=0.0055)


# --- what is built ---


def check_built(network: nn.Module, shape: NetworkShape) -> None:
    """Compare every layer that runs with its row: order, sizes, parameters, settings."""
    seen: list[Any] = []

    def watch(layer: Any, args: Any, result: Any) -> None:
        name = layer_names[layer]
        gain, norm = layer.gain is not None, layer.norm.form if layer.norm is not None else "none"
        assert (layer.weight_norm != "none") == gain
        sizes = (args[0].shape[1], result.shape[1], args[0].shape[2], result.shape[2])
        numbers = sum(p.numel() for p in layer.parameters())
        seen.append(
            (name, layer.direction.shape[2], layer.stride, *sizes, numbers, layer.weight_norm, norm, layer.slope)
        )

    layer_names = {m: name for name, m in network.named_modules() if isinstance(m, NormalisedConvolution)}
    hooks = [layer.register_forward_hook(watch) for layer in layer_names]
    network(torch.rand(1, 2, 96, 96))
    for hook in hooks:
        hook.remove()
    expected = []
    for row in networks.layer_table(shape, 96):
        where = f"outer.{'first' if row.name in {'O0', 'O1'} else 'rest'}" if row.part == "outer" else row.part
        short = row.name[:2]
        names = [f"{where}.{row.name}"]
        if row.copies > 1:
            names = [f"{where}.{short}{i // 3 + 1}.layers.{i % 3}" for i in range(row.copies)]
        facts = (row.kernel, row.stride, *row[5:9], row.parameters, row.weight_norm, row.mean_form, row.slope)
        expected += [(name, *facts) for name in names]
    assert seen == expected


@pytest.mark.parametrize("shape", [TINY, TINY43, replace(TINY, mean_form="none", has_biases=True)])
def test_networks_are_what_the_table_says(shape: NetworkShape) -> None:
    network = networks.build_network(shape, 0)
    check_built(network, shape)
    for wrong in (replace(shape, slope=0.3), replace(shape, has_biases=not shape.has_biases), TINY.quarter()):
        with pytest.raises(AssertionError):
            check_built(network, wrong)


def test_variants_differ_as_documented() -> None:
    rows = {row.name: row for row in networks.layer_table(NetworkShape.full())}
    assert {row.weight_norm for row in rows.values()} == {"output"}
    assert {row.mean_form for name, row in rows.items() if name not in {"T2", "O3"}} == {"frozen"}
    assert {name: row.slope for name, row in rows.items() if row.slope != 0} == {"T2": None, "O3": None}
    rows = {row.name: row for row in networks.layer_table(NetworkShape.full().as_code43())}
    deconvolutions = {"ID1", "ID2", "ID3", "ID4", "OD1"}
    assert {name for name, row in rows.items() if row.mean_form != "none"} == deconvolutions
    assert {rows[name].mean_form for name in deconvolutions} == {"image"}
    assert {name for name, row in rows.items() if row.weight_norm == "input"} == deconvolutions
    assert {name for name, row in rows.items() if row.weight_norm == "none"} == {"I0"}
    assert {name for name, row in rows.items() if row.slope == 0.1} == {"I0", "O0", "O1"}
    assert {name for name, row in rows.items() if row.slope is None} == {"T2", "O3"}
    assert {row.slope for row in rows.values()} == {0.1, 0.01, None}


def by_hand(network: Any, inputs: Any) -> tuple[Any, Any]:
    """Wire the layers by name as the specification does."""
    layer = dict(network.named_modules())

    def block(x: Any, name: str) -> Any:
        y = x
        for i in range(3):
            y = layer[f"{name}.layers.{i}"](y)
        return x + y

    x = inputs[:, :, ::2, ::2]
    for name in ("I0", "I1", "I2", "I3", "I4"):
        x = layer[f"inner.{name}"](x)
    x = block(block(x, "inner.IR1"), "inner.IR2")
    for name in ("ID1", "ID2", "ID3", "ID4"):
        x = layer[f"inner.{name}"](x)
    half = layer["trainer.T2"](layer["trainer.T1"](x))
    y = layer["outer.first.O1"](layer["outer.first.O0"](inputs)) + x
    y = block(block(y, "outer.rest.OR1"), "outer.rest.OR2")
    for name in ("OD1", "O2", "O3"):
        y = layer[f"outer.rest.{name}"](y)
    return half, y


def check_wiring(change: Callable[[Any], None]) -> None:
    """Compare the networks, changed, with layers called by hand."""
    network = networks.build_network(replace(TINY, mean_form="image"), 0)
    inputs = torch.rand(2, 2, 64, 32)
    half, full = by_hand(network, inputs)
    change(network)
    found = network(inputs)
    torch.testing.assert_close(found.half, half)
    torch.testing.assert_close(found.full, full)
    torch.testing.assert_close(network.complete(inputs), full)
    assert found.half.shape == (2, 1, 32, 16)
    assert found.full.shape == (2, 1, 64, 32)


def test_wiring() -> None:
    check_wiring(lambda network: None)


def _average(network: Any) -> None:
    network._features = lambda x: network.inner(nn.functional.avg_pool2d(x, 2))


def _without_features(network: Any) -> None:
    network.outer.forward = lambda x, features: network.outer.rest(network.outer.first(x))


def _without_identity(network: Any) -> None:
    network.inner.IR1.forward = network.inner.IR1.layers.forward


@pytest.mark.parametrize("change", [_average, _without_features, _without_identity])
def test_wrong_wiring_is_reported(change: Any) -> None:
    with pytest.raises(AssertionError):
        check_wiring(change)


# --- the start ---


def test_weights_follow_from_the_seed() -> None:
    first, again, other = (networks.build_network(TINY43, seed) for seed in (3, 3, 4))
    torch.rand(3)
    for (name, p), q, r in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert name.endswith("direction") != torch.equal(p, r), name
    wide = networks.build_network(NetworkShape.eighth(), 0)
    directions = torch.cat([p.flatten() for name, p in wide.named_parameters() if name.endswith("direction")])
    assert float(directions.detach().std()) == pytest.approx(0.05, rel=0.01)
    assert all((p == 1).all() for name, p in wide.named_parameters() if name.endswith("gain"))
    assert not any(p.any() for name, p in first.named_parameters() if name.endswith("bias"))


def test_an_example_gives_unit_variance() -> None:
    example = torch.rand(1, 2, 96, 96)
    network = networks.build_network(NetworkShape.eighth(), 0, example)
    for output in network(example):
        assert float(output.detach().std()) == pytest.approx(1, rel=0.01)
    bare = networks.build_network(NetworkShape.eighth(), 0)
    assert abs(float(bare(example).full.detach().std()) - 1) > 0.05


def test_freezing_after_one_step_hardly_changes_the_result() -> None:
    example = torch.rand(1, 2, 96, 96)
    network = networks.build_network(NetworkShape.eighth(), 0, example)
    before = network(example).full.detach()
    freeze(network)
    torch.testing.assert_close(network(example).full.detach(), before, rtol=1e-3, atol=1e-3)
    norms = [module for module in network.modules() if isinstance(module, MeanOnlyNorm)]
    assert len(norms) == len([name for name, _ in network.named_buffers()]) > 10
    for norm in norms:
        assert norm.mean is not None
        norm.mean.zero_()
    assert (network(example).full - before).abs().max() > 0.1, "the running means are used"


def test_states_travel() -> None:
    network = networks.build_network(TINY, 0, torch.rand(1, 2, 32, 32))
    network(torch.rand(1, 2, 64, 64))
    other = networks.build_network(TINY, 1, channels_last=False)
    other.load_state_dict(network.state_dict())
    x = torch.rand(1, 2, 64, 64)
    torch.testing.assert_close(other.eval()(x).full, network.eval()(x).full)


# --- who learns from which loss ---


def reach(network: Any) -> dict[str, tuple[bool, bool]]:
    """Tell for each network whether its weights have a part in the half and in the full completion."""
    half, full = network(torch.rand(1, 2, 64, 64))
    found = {}
    for part in ("inner", "trainer", "outer"):
        weights = [p for name, p in getattr(network, part).named_parameters()]
        gradients = [
            torch.autograd.grad(y.square().mean(), weights, allow_unused=True, retain_graph=True) for y in (half, full)
        ]
        for grads in gradients:
            assert len({g is None for g in grads}) == 1
        found[part] = (gradients[0][0] is not None, gradients[1][0] is not None)
    return found


def test_who_learns_from_which_loss() -> None:
    network = networks.build_network(TINY43, 0)
    expected = {"inner": (True, True), "trainer": (True, False), "outer": (False, True)}
    assert reach(network) == expected
    forward = network.forward

    def leaking(inputs: Any) -> Any:
        half, full = forward(inputs)
        return networks.Completion(half, full + half.mean())

    network.forward = leaking
    assert reach(network) != expected


def test_one_backward_pass_gives_each_its_own() -> None:
    network = networks.build_network(TINY43, 0)
    x = torch.rand(1, 2, 64, 64)
    half, full = (y.square().mean() for y in network(x))
    (half + full).backward(retain_graph=True)
    for part, losses in (("inner", (half, full)), ("trainer", (half,)), ("outer", (full,))):
        weights = list(getattr(network, part).parameters())
        wanted = [torch.autograd.grad(loss, weights, retain_graph=True) for loss in losses]
        for p, *gradients in zip(weights, *wanted, strict=True):
            torch.testing.assert_close(p.grad, sum(gradients), rtol=1e-4, atol=1e-6)


# --- ways of running ---


@pytest.mark.parametrize("variant", ["paper", "code43"])
def test_compiles_into_one_graph(variant: str) -> None:
    torch.compiler.reset()
    shape = replace(TINY if variant == "paper" else TINY43, inner_blocks=1, outer_blocks=1)
    network, other = networks.build_network(shape, 0), networks.build_network(shape, 0)
    compiled = torch.compile(other, backend="eager" if variant == "paper" else "aot_eager", fullgraph=True)
    x = torch.rand(1, 2, 64, 64)
    for frozen in (False, True)[: 2 if variant == "paper" else 1]:
        for each in (network, other):
            each.zero_grad()
            freeze(each, frozen)
        for result in (network(x), compiled(x)):
            sum(y.square().mean() for y in result).backward()
        for (name, p), q in zip(network.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    for p, q in zip(network.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(p, q)


def test_runs_in_half_precision() -> None:
    x = torch.rand(1, 2, 96, 96)
    network = networks.build_network(replace(NetworkShape.eighth(), mean_form="image"), 0, x)
    expected = network(x).full.detach()
    with torch.autocast("cpu", torch.bfloat16):
        found = network(x).full
    assert found.dtype == torch.bfloat16
    assert float((found.detach().float() - expected).std()) < 0.1 * float(expected.std())
    found.float().square().mean().backward()
    gradients = [p.grad for p in [*network.inner.parameters(), *network.outer.parameters()]]
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


# --- errors ---


@pytest.mark.parametrize("size", [(64, 48), (16, 64), (100, 100), (0, 32)])
def test_sizes_that_cannot_be_halved_are_named(size: tuple[int, int]) -> None:
    network = networks.build_network(TINY, 0)
    wrong = next(side for side in size if side < 32 or side % 32)
    with pytest.raises(ValueError, match=rf"multiples of 32 pixels, got {wrong};"):
        network(torch.zeros(1, 2, *size))
    with pytest.raises(ValueError, match=rf"got {wrong};"):
        networks.layer_table(TINY, wrong)


@pytest.mark.parametrize("shape", [(2, 64, 64), (1, 1, 64, 64), (1, 3, 64, 64)])
def test_other_inputs_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="2, height, width"):
        networks.build_network(TINY, 0)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("changes", "value"),
    [
        ({"inner": (4, 5, 6, 7)}, "4, 5, 6, 7"),
        ({"inner": (4, 5, 0, 7, 8)}, "4, 5, 0"),
        ({"outer": (3, 5)}, "the outer one's second, 5"),
        ({"trainer": 0}, "and 0"),
        ({"inner_blocks": -1}, "-1"),
    ],
)
def test_impossible_shapes_are_named(changes: Any, value: str) -> None:
    with pytest.raises(ValueError, match=value):
        replace(TINY, **changes)


def test_networks_without_blocks() -> None:
    shape = replace(TINY, inner_blocks=0, outer_blocks=0)
    assert not [row for row in networks.layer_table(shape) if "R" in row.name]
    assert networks.build_network(shape, 0)(torch.zeros(1, 2, 32, 32)).full.shape[-1] == 32
