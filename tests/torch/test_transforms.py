"""Check the module under torch.compile, functional_call, vmap and grad: the same results as without them."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters
from torch.func import functional_call, grad, stack_module_state, vmap

from alrc.torch import ALRC, Huber

START = (1.0, 1.04)

# The tracing compiler warns about its own way of making an autograd context.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Start from an empty cache and empty counters, and leave them so."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def spiky(steps: int, *shape: int) -> Tensor:
    """Make losses of which about a tenth are limited."""
    return torch.randn(steps, *shape).mul(0.3).exp() * torch.where(torch.rand(steps, *shape) < 0.1, 20, 1)


def train(apply: Callable[[Tensor], Tensor], stream: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Apply to every batch, going backward; return values and gradients."""
    seen = []
    for losses in stream:
        leaf = losses.clone().requires_grad_()
        value = apply(leaf)
        value.backward()
        assert leaf.grad is not None
        seen.append((value.detach(), leaf.grad))
    return seen


def check_compiled(module: nn.Module, backend: str, recompiles: str = "fail_on_recompile") -> None:
    """Compare module and mean with and without the compiler, over 50 steps that must not compile again."""
    eager = copy.deepcopy(module)
    stream = spiky(51, 6)
    compiled = torch.compile(lambda losses: module(losses).mean(), fullgraph=True, backend=backend)
    got = train(compiled, stream[:1])
    with torch.compiler.set_stance(recompiles):
        got += train(compiled, stream[1:])
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1
    want = train(lambda losses: eager(losses).mean(), stream)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    torch.testing.assert_close(module.state_dict(), eager.state_dict(), rtol=1e-6, atol=0)
    assert any(torch.any(gradient < 1 / 6) for _, gradient in want), "the stream limits nothing"


@pytest.mark.parametrize(
    "make", [lambda: ALRC(observe=4), lambda: ALRC.paper(3.0, (0.9, 0.95), 1.2, 2.0)], ids=["default", "paper"]
)
def test_compiles_once_to_one_graph(make: Callable[[], ALRC], fresh_compiler: None) -> None:
    module = make()
    check_compiled(module, "aot_eager")
    assert module.last is not None
    assert module.last.scale.shape == (6,)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # The backend's import of its own parts.
def test_compiles_once_to_machine_code(fresh_compiler: None) -> None:
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("needs a C++ compiler")
    check_compiled(ALRC(observe=4), "inductor")


class Counting(ALRC):
    """Keep the number of steps in Python, where the compiler takes each for another program."""

    steps = 0

    def forward(self, losses: Tensor) -> Tensor:
        self.steps += 1
        return super().forward(losses) * (1 + 0 * self.steps)


class Printing(ALRC):
    """Do what cannot be traced."""

    def forward(self, losses: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(losses)


def test_compiling_again_and_breaking_the_graph_are_caught(fresh_compiler: None) -> None:
    with pytest.raises(RuntimeError, match="recompile"):
        check_compiled(Counting(observe=4), "aot_eager")
    torch._dynamo.reset()
    with pytest.raises(Unsupported):
        check_compiled(Printing(observe=4), "aot_eager")


def test_functional_call_leaves_the_module_alone() -> None:
    module, twin = ALRC(start=START), ALRC(start=START)
    losses = torch.tensor([0.5, 2.0, 4.0], requires_grad=True)
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    limited = functional_call(module, buffers, (losses,))
    limited.sum().backward()
    assert losses.grad is not None
    torch.testing.assert_close(losses.grad, torch.tensor([1, 0.8, 0.4]))
    assert torch.equal(limited, twin(losses))
    assert dict(module.named_buffers()) == dict(ALRC(start=START).named_buffers())
    assert {name: buffer.item() for name, buffer in buffers.items()} == {
        name: buffer.item() for name, buffer in twin.named_buffers()
    }


def replicas() -> list[ALRC]:
    """Make three modules with different states."""
    return [ALRC(start=(mean, mean**2 + 0.04)) for mean in (1.0, 2.0, 3.0)]


def unstacked(state: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    """Take replica `i` out of a stacked state."""
    return {name: value[i] for name, value in state.items()}


@pytest.mark.parametrize("shape", [(), (5,), (2, 4)], ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["own losses", "shared losses"])
def test_vmap_over_replicas_is_a_loop(shape: tuple[int, ...], shared: bool) -> None:
    modules = replicas()
    _, state = stack_module_state(modules)
    stream = spiky(6, *((1,) if shared else (3,)), *shape) * 3
    base = copy.deepcopy(modules[0])

    def apply(state: dict[str, Tensor], losses: Tensor) -> Tensor:
        return functional_call(base, state, (losses,))

    limited_some = False
    for losses in stream:
        own = losses[0] if shared else losses
        limited = vmap(apply, in_dims=(0, None if shared else 0))(state, own)
        for i, module in enumerate(modules):
            want = module(losses[0 if shared else i])
            torch.testing.assert_close(limited[i], want)
            torch.testing.assert_close(unstacked(state, i), module.state_dict())
            assert module.last is not None
            limited_some |= bool(module.last.fraction_limited > 0)
    assert limited_some


def test_vmap_of_grad_is_a_loop_of_backward() -> None:
    modules = replicas()
    _, state = stack_module_state(modules)
    base = copy.deepcopy(modules[0])
    losses = spiky(3, 5) * 3

    def total(losses: Tensor, state: dict[str, Tensor]) -> Tensor:
        return (losses * functional_call(base, state, (losses,))).sum()

    gradients = vmap(grad(total))(losses, state)
    for i, module in enumerate(modules):
        leaf = losses[i].clone().requires_grad_()
        (leaf * module(leaf)).sum().backward()
        assert leaf.grad is not None
        torch.testing.assert_close(gradients[i], leaf.grad)
        torch.testing.assert_close(unstacked(state, i), module.state_dict())


def test_the_module_tells_what_it_saw_last_outside_of_a_transform() -> None:
    """Under vmap the last losses are many; afterwards the telemetry must not be a tensor that escaped from it."""
    modules = replicas()
    base = modules[0]
    base(torch.tensor([1.0, 16.0]))
    _, state = stack_module_state(modules)
    vmap(lambda state, losses: functional_call(base, state, (losses,)))(state, torch.rand(3, 5))
    last = base.last
    assert last is None or float(last.limit) > 0


def as_written(losses: Tensor, limit: Tensor) -> Tensor:
    """Write the rule as the paper does, with a constant factor."""
    return torch.where(losses > limit, losses * (limit / losses).detach(), losses)


def test_grad_and_its_grad_are_those_of_a_constant_factor() -> None:
    module = ALRC(start=START).double()
    limit = module.limit
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    weights = torch.tensor([0.5, 1.1, 1.7, 30.0], dtype=torch.float64)

    def ours(weights: Tensor, buffers: dict[str, Tensor]) -> Tensor:
        return functional_call(module, buffers, (weights.square(),)).square().sum()

    def theirs(weights: Tensor) -> Tensor:
        return as_written(weights.square(), limit).square().sum()

    def copies() -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in buffers.items()}

    torch.testing.assert_close(grad(ours)(weights, copies()), grad(theirs)(weights), rtol=1e-12, atol=0)
    second = grad(lambda weights, buffers: grad(ours)(weights, buffers).sum())
    want = grad(lambda weights: grad(theirs)(weights).sum())(weights)
    torch.testing.assert_close(second(weights, copies()), want, rtol=1e-12, atol=0)


def test_per_example_gradients_of_a_network_are_scaled_one_by_one() -> None:
    network = nn.Linear(3, 1).double()
    module = ALRC(start=START).double()
    images, wanted = torch.randn(8, 3).double(), torch.randn(8).double() * 2
    weights: dict[str, Tensor] = dict(network.named_parameters())

    def loss(weights: dict[str, Tensor], image: Tensor, target: Tensor) -> Tensor:
        return (functional_call(network, weights, (image,)).squeeze() - target).square()

    each = vmap(grad(loss), in_dims=(None, 0, 0))(weights, images, wanted)
    losses = vmap(loss, in_dims=(None, 0, 0))(weights, images, wanted)
    factors = (module.limit / losses.detach()).clamp(max=1)
    module(losses).sum().backward()
    for name, weight in weights.items():
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, torch.einsum("i,i...->...", factors, each[name]))
    assert 0 < (factors < 1).sum() < 8


def test_huber_transforms_and_compiles(fresh_compiler: None) -> None:
    huber = Huber(h=1.0)
    losses = torch.tensor([0.5, 4.0, 9.0])
    torch.testing.assert_close(vmap(grad(huber))(losses), torch.tensor([1, 0.25, 1 / 6]))
    compiled: Any = torch.compile(huber, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(losses), torch.tensor([0.5, 2.0, 3.0]))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # the compiler, of itself
@pytest.mark.parametrize("losses_of", [torch.exp, torch.square, torch.cosh], ids=["exp", "square", "cosh"])
def test_the_backward_pass_of_compiled_code_knows_the_state_as_it_was(losses_of: Any) -> None:
    """A compiler may compute factors again in the backward pass, when the buffers have been overwritten."""
    torch.compiler.reset()
    rng = np.random.default_rng(0)
    stream = rng.normal(0, 0.3, (12, 16)).astype(np.float32)
    stream[[5, 6], 3], stream[9, :5] = 4, 3
    modules = ALRC(observe=4), ALRC(observe=4)
    weights = [torch.ones(16, requires_grad=True) for _ in modules]

    def mean(module: ALRC, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return module(losses_of(weight * x)).mean()

    calls = mean, torch.compile(mean, fullgraph=True, dynamic=False, backend="aot_eager_decomp_partition")
    limited = 0
    for x in torch.from_numpy(stream):
        for call, module, weight in zip(calls, modules, weights, strict=True):
            weight.grad = None
            call(module, weight, x).backward()
        torch.testing.assert_close(weights[1].grad, weights[0].grad, rtol=1e-5, atol=1e-7)
        limited += int((modules[0].last.scale < 1).any())
    assert limited >= 2
