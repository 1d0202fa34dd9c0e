"""Wrap what limits losses, alone or together with other processes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.multiprocessing.spawn import spawn

from alrc.conformance import Make, Outcome, Traits
from alrc.torch.conformance.wrapped import Wrapped

__all__ = ["wrap_loss_limiter"]


def wrap_loss_limiter(
    make: Callable[[], Any],
    *,
    dtypes: Sequence[str] = ("float32", "bfloat16", "float16"),
    is_signed: bool = False,
    is_accumulating: bool = True,
    granularity: Any = "element",
    synced: Callable[[], Any] | None = None,
) -> Make:
    """Wrap what limits losses: a callable from losses to limited losses.

    If it has `attach`, it is attached to an optimiser, which then steps once per step. Its `limit` attribute is read
    if it has one, else the limit is probed on a copy. `state_dict`, `eval` and `train` are used where they exist.

    Args:
        make: Makes a fresh limiter; `ALRC` itself, for example.
        dtypes: Precisions of losses to try.
        is_signed: Whether it claims losses of any sign.
        is_accumulating: Whether it claims one update per optimiser step.
        granularity: What gets a factor of its own.
        synced: Makes a limiter that shares its statistics with the other processes of the default group. Must be
            importable (no lambda): it is called in processes of their own.

    Returns:
        What `alrc.conformance.run` takes.

    Example:
        >>> from alrc.conformance import run
        >>> run(wrap_loss_limiter(torch.nn.Identity), "nothing", tests=["T8"]).failed
        ['T8']
    """
    traits = Traits("loss", granularity, tuple(dtypes), is_signed, is_accumulating)
    if synced is None:
        return lambda dtype: _Losses(make, traits, dtype)
    return lambda dtype: _SyncedLosses(make, synced, traits, dtype)


class _Losses(Wrapped):
    """Drive a loss limiter; the factors are the derivatives that autograd finds."""

    def __init__(self, make: Callable[[], Any], traits: Traits, dtype: str, device: str = "cpu") -> None:
        super().__init__(make(), traits, dtype)
        self.make, self.device = make, device
        # Stands for the network: adds nothing to the losses, and whatever comes back to it is made zero.
        self.weight = torch.nn.Parameter(torch.zeros(1, device=device))
        self.weight.register_hook(torch.zeros_like)
        self.optimizer = torch.optim.SGD([self.weight], lr=0.0)
        if hasattr(self.thing, "attach"):
            self.thing.attach(self.optimizer)

    def act(self, micro_batches: Sequence[NDArray[Any]]) -> list[Outcome]:
        outcomes = self.backward(micro_batches)
        with self.watch():
            self.optimizer.step()
        self.optimizer.zero_grad()
        return outcomes

    def backward(self, micro_batches: Sequence[NDArray[Any]]) -> list[Outcome]:
        """Go forward and backward through each micro-batch."""
        outcomes = []
        for batch in micro_batches:
            losses = torch.tensor(batch, dtype=self.dtype, requires_grad=True)
            with self.watch():
                limited = self.thing(losses + self.weight.to(self.dtype))
                limited.backward(torch.ones_like(limited))
            gradient = torch.zeros_like(losses) if losses.grad is None else losses.grad
            outcomes.append(Outcome(limited.detach().double().numpy(), gradient.double().numpy()))
        return outcomes

    def once(self, call: Callable[..., Any]) -> object:
        losses = torch.tensor([1.0, 2.0, 3.0, 1.0], dtype=self.dtype, device=self.device, requires_grad=True)
        call(losses + self.weight.to(self.dtype)).mean().backward()
        self.optimizer.step()
        return self.optimizer.zero_grad()

    def elsewhere(self) -> Wrapped | None:
        if not isinstance(self.thing, torch.nn.Module):
            return None
        return _Losses(lambda: self.make().to("meta"), self.traits, "float32", "meta")

    def skip(self, micro_batches: Sequence[NDArray[Any]], /) -> None:
        """Go forward and backward; then the scaler finds an infinite gradient and skips the optimiser's step."""
        self.backward(micro_batches)
        self.optimizer.zero_grad()

    def evaluate(self, batch: NDArray[Any], /) -> None:
        """Look at losses in eval mode, where there is one, without gradients."""
        if hasattr(self.thing, "eval"):
            self.thing.eval()
        with torch.no_grad():
            self.thing(torch.tensor(batch, dtype=self.dtype))
        if hasattr(self.thing, "train"):
            self.thing.train()

    def limit(self) -> float:
        """Read the limit, or find it out on a copy."""
        return float(self.thing.limit) if hasattr(self.thing, "limit") else self.probe()


class _SyncedLosses(_Losses):
    """Drive a loss limiter that can share its statistics, in as many processes as there are shards."""

    def __init__(self, make: Callable[[], Any], synced: Callable[[], Any], traits: Traits, dtype: str) -> None:
        super().__init__(make, traits, dtype)
        self.synced, self.name = synced, dtype

    def ranks(self, shards: Sequence[Sequence[NDArray[Any]]], /) -> list[list[tuple[NDArray[Any], float]]]:
        """Run each shard's stream in a process of its own; the processes are one gloo group."""
        with tempfile.TemporaryDirectory() as folder:
            arguments = (len(shards), folder, shards, self.synced, self.traits, self.name)
            spawn(_run_rank, arguments, nprocs=len(shards))
            files = [Path(folder, f"{rank}.pt") for rank in range(len(shards))]
            saved = [torch.load(file, weights_only=True) for file in files]
        return [[(np.array(factor), limit) for factor, limit in steps] for steps in saved]


def _run_rank(
    rank: int,
    number: int,
    folder: str,
    shards: Sequence[Sequence[NDArray[Any]]],
    synced: Callable[[], Any],
    traits: Traits,
    dtype: str,
) -> None:
    """Be one process of a group."""
    torch.set_num_threads(1)
    store = Path(folder, "store").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=number)
    try:
        stabiliser = _Losses(synced, traits, dtype)
        steps = [(stabiliser.step([batch])[0].factor.tolist(), stabiliser.limit()) for batch in shards[rank]]
        torch.save(steps, Path(folder, f"{rank}.pt"))
        dist.barrier()
    finally:
        dist.destroy_process_group()
