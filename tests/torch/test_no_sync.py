"""Check that no step waits for the device: nothing turns a tensor into a number, a truth value or an array.

Three nets, each with a twin that must be caught: Python methods that read a tensor are made to raise; the operators
behind them are refused by the dispatcher, whoever calls them; and the step runs on the meta device, where there is
nothing to read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alrc.torch import ALRC, Huber
from waiting import RefuseReading, WaitedError, refusing


@pytest.fixture(params=["device", "host"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run what a device would run, then what a CPU runs."""
    if request.param == "device":
        monkeypatch.setattr("alrc.torch.loss.is_on_host", lambda x: False)
    return request.param


@pytest.fixture
def no_reading(path: str) -> Iterator[None]:
    """Make every method that reads a tensor raise."""
    with refusing(is_on_host=path == "host"):
        yield


class Itemising(ALRC):
    """Read the limit, as many published implementations do."""

    def forward(self, losses: Tensor) -> Tensor:
        return super().forward(losses) + 0 * self.limit.item()


class Branching(ALRC):
    """Ask whether anything is to be limited."""

    def forward(self, losses: Tensor) -> Tensor:
        return super().forward(losses) if (losses > self.limit).any() else losses * 1


class Indexing(ALRC):
    """Pick the large losses by a mask, whose number decides the shape of the result."""

    def forward(self, losses: Tensor) -> Tensor:
        large = losses[losses > self.limit]
        return super().forward(losses) + 0 * large.sum()


def learned(limiter: ALRC) -> ALRC:
    """Bring a limiter to where it limits."""
    for loss in (1.0, 1.1, 0.9, 1.0):
        limiter(torch.tensor(loss))
    return limiter


LIMITERS: dict[str, Callable[[], nn.Module]] = {
    "default": ALRC,
    "limiting": lambda: learned(ALRC(observe=4)),
    "signed": lambda: learned(ALRC(observe=4, signed=True, num_stddev_below=2)),
    "start": lambda: ALRC(start=(1.0, 1.04)),
    "paper": lambda: ALRC.paper(betas=(0.9, 0.99)),
    "reference": ALRC.reference,
    "cifar_scripts": ALRC.cifar_scripts,
}
WAITING: dict[str, Callable[[], nn.Module]] = {
    "itemising": lambda: Itemising(start=(1.0, 1.04)),
    "branching": lambda: Branching(start=(1.0, 1.04)),
    "indexing": lambda: Indexing(start=(1.0, 1.04)),
}
SHAPES = [(), (1,), (8,), (2, 3, 4)]


def step(limiter: Any, shape: tuple[int, ...], device: str = "cpu") -> None:
    """Go forward and backward twice in train mode, once in eval mode, and read everything there is to read."""
    losses = torch.full(shape, 3.0, device=device)
    for _ in range(2):
        losses = torch.full(shape, 3.0, device=device, requires_grad=True)
        limiter(losses).mean().backward()
        _ = limiter.mu1, limiter.mu2, limiter.limit, limiter.last
    limiter.eval()
    limiter(losses)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("limiter", LIMITERS.values(), ids=LIMITERS)
def test_reads_no_tensor(limiter: Callable[[], nn.Module], shape: tuple[int, ...], no_reading: None) -> None:
    step(limiter(), shape)


@pytest.mark.parametrize("limiter", ["itemising", "branching"])
def test_a_limiter_that_reads_is_caught(limiter: str, no_reading: None) -> None:
    with pytest.raises(WaitedError):
        step(WAITING[limiter](), (8,))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("limiter", LIMITERS.values(), ids=LIMITERS)
def test_calls_no_operator_that_reads(limiter: Callable[[], nn.Module], shape: tuple[int, ...], path: str) -> None:
    module = limiter()
    with RefuseReading():
        step(module, shape)


@pytest.mark.parametrize("limiter", WAITING)
def test_an_operator_that_reads_is_caught(limiter: str) -> None:
    module = WAITING[limiter]()
    with RefuseReading(), pytest.raises(WaitedError):
        step(module, (8,))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("limiter", LIMITERS.values(), ids=LIMITERS)
def test_runs_where_there_is_nothing_to_read(limiter: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    step(limiter().to("meta"), shape, "meta")


@pytest.mark.parametrize("limiter", WAITING)
def test_the_meta_device_catches_a_limiter_that_reads(limiter: str) -> None:
    module = WAITING[limiter]().to("meta")
    with pytest.raises((RuntimeError, NotImplementedError), match=r"[Mm]eta"):
        step(module, (8,), "meta")


def test_huber_reads_no_tensor(no_reading: None) -> None:
    losses = torch.full((8,), 3.0, requires_grad=True)
    Huber()(losses).mean().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("limiter", LIMITERS.values(), ids=LIMITERS)
def test_the_driver_sees_no_wait(limiter: Callable[[], nn.Module]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")

    def watched(module: nn.Module) -> None:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(module, (8,), "cuda")
        finally:
            torch.cuda.set_sync_debug_mode("default")

    watched(limiter().to("cuda"))
    with pytest.raises(RuntimeError, match="synchronizing"):
        watched(WAITING["itemising"]().to("cuda"))
