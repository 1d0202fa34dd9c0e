"""Check that named losses are limited each on its own: the oracle is one ALRC per name."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from alrc.torch import ALRC, NamedALRC
from alrc.torch.learner import Learner
from bitwise import same

NAMES = ("reconstruction", "kl", "adversarial")
UNITS = {"reconstruction": 1.0, "kl": 1e-3, "adversarial": 500.0}


def spiky(steps: int, *shape: int) -> Tensor:
    """Make losses around 1 of which about a tenth are far out."""
    return torch.randn(steps, *shape).mul(0.3).exp() * torch.where(torch.rand(steps, *shape) < 0.1, 20, 1)


def streams(steps: int) -> list[dict[str, Tensor]]:
    """Make one spiky stream per name, in units of its own."""
    each = {name: spiky(steps, 4) * unit for name, unit in UNITS.items()}
    return [{name: stream[step] for name, stream in each.items()} for step in range(steps)]


class Sharing(NamedALRC):
    """Hold all losses against one state: what a single ALRC on all of them does."""

    def __init__(self, *names: str, **settings: Any) -> None:
        super().__init__(*names, **settings)
        for name in names[1:]:
            self.limits[name] = self.limits[names[0]]


def check_each_on_its_own(limits: NamedALRC) -> None:
    """Compare values, gradients and states with separate modules, given in another order, some of them left out."""
    apart = {name: ALRC(observe=4) for name in NAMES}
    limited_any = False
    for step, losses in enumerate(streams(40)):
        given = {name: losses[name].clone().requires_grad_() for name in NAMES[:: -1 if step % 2 else 1]}
        if step % 3 == 0:
            del given["kl"]
        got = limits(given)
        assert list(got) == list(given)
        sum(part.mean() for part in got.values()).backward()
        for name, leaf in given.items():
            other = leaf.detach().clone().requires_grad_()
            wanted = apart[name](other)
            wanted.mean().backward()
            assert same(got[name], wanted)
            assert same(leaf.grad, other.grad)
            limited_any |= bool((wanted < other).any())
        for name in NAMES:
            assert same(limits[name].state_dict(), apart[name].state_dict())
    assert limited_any, "the streams limit nothing"


def test_each_name_has_a_state_of_its_own() -> None:
    check_each_on_its_own(NamedALRC(*NAMES, observe=4))


def test_a_module_that_shares_its_state_is_caught() -> None:
    with pytest.raises(AssertionError):
        check_each_on_its_own(Sharing(*NAMES, observe=4))


def test_settings_and_instances() -> None:
    one = NamedALRC("a", "b", num_stddev=2.0, observe=8)
    assert one["a"] is not one["b"]
    assert one["a"].rule == one["b"].rule == ALRC(2.0, observe=8).rule
    kept = {"a": ALRC.reference(), "b": ALRC(signed=True)}
    two = NamedALRC(kept)
    assert two["a"] is kept["a"]
    assert two["b"] is kept["b"]
    assert list(two) == ["a", "b"]
    assert "b" in two
    assert "c" not in two


def test_masks_and_weights_go_to_their_names() -> None:
    limits = NamedALRC("a", "b", start=(1.0, 1.04))
    alone = ALRC(start=(1.0, 1.04))
    losses, mask, weight = torch.tensor([1.0, 4.0, math.nan]), torch.tensor([True, True, False]), torch.ones(3) / 3
    got = limits({"a": losses, "b": losses}, mask={"a": mask}, weight={"a": weight})
    assert same(got["a"], alone(losses, mask=mask, weight=weight))
    assert same(limits["a"].state_dict(), alone.state_dict())
    assert limits.last["a"].nonfinite == 0
    assert limits.last["b"].nonfinite == 1
    limits({"b": losses}, mask={"a": mask})  # a mask of a loss that is not given today harms nobody


def test_tells_of_each_name() -> None:
    limits = NamedALRC("a", "b", start=(1.0, 1.04))
    assert limits.last == {}
    torch.testing.assert_close(limits.limit, {"a": torch.tensor(1.6), "b": torch.tensor(1.6)})
    limits({"b": torch.tensor([1.0, 3.2])})
    assert list(limits.last) == ["b"]
    torch.testing.assert_close(limits.last["b"].scale, torch.tensor([1.0, 0.5]))
    limits({"a": torch.tensor([1.0])})
    assert list(limits.last) == ["a", "b"], "what was seen of b is forgotten"


def test_eval_mode_passes_through() -> None:
    limits = NamedALRC("a", "b", start=(1.0, 1.04)).eval()
    losses = {"b": torch.tensor(9.0), "a": torch.tensor(8.0)}
    got = limits(losses)
    assert list(got) == ["b", "a"]
    assert got["a"] is losses["a"]
    assert limits["a"].count == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda limits, one: limits({"a": one, "c": one}),
        lambda limits, one: limits({"a": one}, mask={"c": one > 0}),
        lambda limits, one: limits({"a": one}, weight={"c": one}),
        lambda limits, one: limits["c"],
        lambda limits, one: limits.attach({"c": torch.optim.SGD([one], lr=0.1)}),
    ],
    ids=["losses", "mask", "weight", "index", "attach"],
)
def test_an_unknown_name_is_an_error_that_lists_the_known(call: Any) -> None:
    limits = NamedALRC("a", "b")
    with pytest.raises(KeyError, match=r"'c'; the names are 'a', 'b'"):
        call(limits, torch.tensor([1.0]))
    assert limits["a"].count == 0, "learned from a call that failed"


@pytest.mark.parametrize("name", ["kl.prior", "", "values", "forward", "type"])
def test_a_name_that_cannot_be_one_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be a name") as caught:
        NamedALRC("a", name)
    assert repr(name) in str(caught.value)
    NamedALRC("a", f"{name.replace('.', '_')}_loss")  # what the message proposes


@pytest.mark.parametrize(
    ("names", "settings", "error", "message"),
    [
        ((), {}, ValueError, "at least one name"),
        (({},), {}, ValueError, "at least one name"),
        (("a", "a"), {}, ValueError, "'a' comes twice"),
        (({"a": nn.Linear(1, 1)},), {}, TypeError, "instances of ALRC, got Linear"),
        (({"a": ALRC()},), {"observe": 4}, TypeError, "observe"),
        (({"a": ALRC()}, "b"), {}, TypeError, "must be a string, or the only argument a dictionary"),
        ((3,), {}, TypeError, "must be a string"),
        (("a",), {"num_stddev": -1}, ValueError, "num_stddev"),
    ],
)
def test_refuses_what_makes_no_sense(names: Any, settings: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        NamedALRC(*names, **settings)


def test_refuses_one_instance_under_two_names() -> None:
    shared = ALRC()
    with pytest.raises(ValueError, match="the ALRC of 'b' has another name too"):
        NamedALRC({"a": shared, "b": shared})


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_state_is_stored_loaded_and_copied(duplicate: Any) -> None:
    limits = NamedALRC(*NAMES, observe=4)
    for losses in streams(10):
        limits(losses)
    fresh = NamedALRC(*NAMES, observe=4)
    fresh.load_state_dict(limits.state_dict())
    assert "limits.kl.mean" in limits.state_dict()
    for other in (fresh, duplicate(limits)):
        assert same(other.state_dict(), limits.state_dict())
    assert not list(limits.parameters())


@pytest.fixture
def gan() -> tuple[NamedALRC, nn.Linear, nn.Linear, dict[str, torch.optim.Optimizer]]:
    generator, discriminator = nn.Linear(2, 1), nn.Linear(2, 1)
    optimizers: dict[str, torch.optim.Optimizer] = {
        "generator": torch.optim.SGD(generator.parameters(), lr=0.0),
        "discriminator": torch.optim.SGD(discriminator.parameters(), lr=0.0),
    }
    return NamedALRC("generator", "discriminator", observe=4), generator, discriminator, optimizers


def test_each_name_follows_its_optimiser(gan: Any) -> None:
    limits, generator, discriminator, optimizers = gan
    assert limits.attach(optimizers) is limits
    inputs = torch.rand(3, 2)

    def backward(name: str, network: nn.Linear) -> None:
        limits({name: network(inputs).square()})[name].mean().backward()

    for _ in range(2):
        backward("discriminator", discriminator)
    optimizers["discriminator"].step()
    assert [int(limits[name].count) for name in limits] == [0, 1]
    backward("generator", generator)
    optimizers["discriminator"].step()
    assert [int(limits[name].count) for name in limits] == [0, 1]
    optimizers["generator"].step()
    assert [int(limits[name].count) for name in limits] == [1, 1]
    backward("generator", generator)
    limits.discard()
    optimizers["generator"].step()
    assert [int(limits[name].count) for name in limits] == [1, 1]
    limits.detach()
    backward("generator", generator)
    assert [int(limits[name].count) for name in limits] == [2, 1]


def test_one_optimiser_serves_all_names(gan: Any) -> None:
    limits, generator, discriminator, _ = gan
    optimizer = torch.optim.SGD([*generator.parameters(), *discriminator.parameters()], lr=0.0)
    limits.attach(optimizer)
    inputs = torch.rand(3, 2)
    for _ in range(3):
        parts = {"generator": generator(inputs).square(), "discriminator": discriminator(inputs).square()}
        sum(part.mean() for part in limits(parts).values()).backward()
    assert [int(limits[name].count) for name in limits] == [0, 0]
    optimizer.step()
    assert [int(limits[name].count) for name in limits] == [1, 1]
    limits.attach({"generator": torch.optim.SGD(generator.parameters(), lr=0.0)})
    limits({"discriminator": discriminator(inputs).square()})["discriminator"].mean().backward()
    optimizer.step()
    assert [int(limits[name].count) for name in limits] == [1, 2], "a name that is left out must stay attached"


def test_processes_are_told_in_the_declared_order() -> None:
    """Whichever names are given, in whichever order: a name that is left out tells that there is nothing."""
    limits = NamedALRC(*NAMES)
    told: list[str] = []

    def note(what: str) -> Any:
        return lambda self, *given: told.append(f"{what} {next(name for name in NAMES if limits[name] is self)}")

    one = torch.tensor([1.0])
    with mock.patch.object(Learner, "_take", note("take")), mock.patch.object(Learner, "idle", note("idle")):
        limits({"adversarial": one, "kl": one})
        assert told == ["idle reconstruction", "take kl", "take adversarial"]
        told.clear()
        limits.eval()({"kl": one})
        assert told == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles() -> None:
    torch._dynamo.reset()
    limits = NamedALRC("a", "b", observe=4)
    eager = copy.deepcopy(limits)
    compiled = torch.compile(limits, fullgraph=True, backend="aot_eager", dynamic=False)
    for step, losses in enumerate(spiky(8, 2, 3)):
        given = {"a": losses[0], "b": losses[1]}
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            torch.testing.assert_close(compiled(given), eager(given))
    torch.testing.assert_close(limits.state_dict(), eager.state_dict())
    torch._dynamo.reset()
