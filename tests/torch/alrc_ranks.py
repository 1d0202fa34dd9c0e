"""Run ALRC in one of several processes that talk to each other, and write down what it did.

Started by test_processes.py: `python alrc_ranks.py FOLDER SIZE RANK`. It runs the same cases by itself, with size 1 and
no process group at all, on the joined batches: that is what several processes are compared with. Every case has a group
of its own, so that one that fails does not take the others along.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from alrc.torch import ALRC, NamedALRC

START = (1.0, 1.04)
STEPS, WIDTH = 30, 12
MAKES: dict[str, Callable[..., ALRC]] = {
    "default": lambda sync: ALRC(observe=4, sync=sync),
    "both sides": lambda sync: ALRC(observe=4, signed=True, num_stddev_below=2.0, sync=sync),
    "unlimited": lambda sync: ALRC(observe=4, feed="unlimited", sync=sync),
    "start": lambda sync: ALRC(start=START, betas=(0.9, 0.9), sync=sync),
    "paper": lambda sync: ALRC.from_rule(ALRC.paper(2.0, (0.9, 0.9), *START).rule, sync),
    "reference": lambda sync: ALRC.from_rule(ALRC.reference(2.0, 0.9, *START).rule, sync),
}

Told = dict[str, Any]


def stream(seed: int = 0) -> Tensor:
    """Make the joined batches: losses around 1 of which a few are far out, with NaN, inf and a huge spike."""
    generator = torch.Generator().manual_seed(seed)
    losses = torch.randn(STEPS, WIDTH, generator=generator).mul(0.3).exp()
    losses *= torch.where(torch.rand(STEPS, WIDTH, generator=generator) < 0.07, 20, 1)
    losses[8, -1] = torch.nan  # on the last process
    losses[9, 0] = torch.inf
    losses[12, -2] = 3e4  # a spike, on a process that is not the first
    losses[13, -2] = 3e3
    return losses


def shares(size: int, step: int) -> list[int]:
    """Return how many losses each process gets: uneven, and in some steps none at all."""
    if size == 1:
        return [WIDTH]
    some = {2: [7, 5], 4: [5, 1, 4, 2]}[size]
    if step % 5 == 3:
        some = [WIDTH] + [0] * (size - 1)
    return some[:: -1 if step % 2 else 1]


def share(losses: Tensor, size: int, rank: int, step: int) -> Tensor:
    """Return the part of one process."""
    return losses.split(shares(size, step), -1)[rank]


def gradient_of(limit: ALRC, losses: Tensor, **given: Any) -> Tensor:
    """Limit, go backward, return values and gradients, shape (2, losses)."""
    leaf = losses.clone().requires_grad_()
    limited = limit(leaf, **given)
    limited.backward(torch.ones_like(limited))
    assert leaf.grad is not None
    return torch.stack((limited.detach(), leaf.grad))


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


@contextlib.contextmanager
def on_device() -> Iterator[None]:
    """Run what every device but a CPU runs."""
    loss, learner = (mock.patch(f"alrc.torch.{name}.is_on_host", return_value=False) for name in ("loss", "learner"))
    with loss, learner:
        yield


# ---------------------------------------------------------------------------------------------------- one update a call


def immediate(size: int, rank: int, make: Callable[..., ALRC], sync: Any = True) -> Told:
    """Update at each call."""
    limit, did, states = make(sync), [], []
    for step, losses in enumerate(stream()):
        did.append(gradient_of(limit, share(losses, size, rank, step)))
        states.append(state_of(limit))
    return {"did": did, "states": states}


def masked(size: int, rank: int) -> Told:
    """Leave losses out, on one process all of them, and weigh the others."""
    limit, did, states = MAKES["default"](True), [], []
    generator = torch.Generator().manual_seed(1)
    for step, losses in enumerate(stream()):
        mask, weight = torch.rand(WIDTH, generator=generator) < 0.7, torch.rand(WIDTH, generator=generator)
        if step % 4 == 2:
            mask[6:] = False
        if step == 17:
            mask[:] = False
        given = {"mask": mask, "weight": weight}
        given = {name: share(part, size, rank, step) for name, part in given.items()}
        did.append(gradient_of(limit, share(losses, size, rank, step), **given))
        states.append(state_of(limit))
    return {"did": did, "states": states}


def device(size: int, rank: int) -> Told:
    with on_device():
        return immediate(size, rank, MAKES["default"])


def unsynchronised(size: int, rank: int) -> Told:
    """Do not talk: the twin."""
    return immediate(size, rank, MAKES["default"], sync=False)


def unread(size: int, rank: int) -> Told:
    """Let nobody ask for the state before the end: the last sum is still on its way when a copy is made."""
    limit = MAKES["default"](True)
    for step, losses in enumerate(stream()):
        limit(share(losses, size, rank, step))
    return {"states": [state_of(copy.deepcopy(limit))]}


def evaluating(size: int, rank: int) -> Told:
    """Evaluate on one process only, which must not wait for the others."""
    limit, states = MAKES["default"](True), []
    for step, losses in enumerate(stream()):
        if rank == size - 1:
            limit.eval()
            limit(losses)
            limit.train()
        limit(share(losses, size, rank, step))
        states.append(state_of(limit))
    return {"states": states}


def checkpointed(size: int, rank: int, use_reentrant: bool) -> Told:
    """Compute losses again in the backward pass, on one process only, which must not wait for the others."""
    limit, states = MAKES["default"](True), []
    for step, losses in enumerate(stream()):
        leaf = share(losses, size, rank, step).clone().requires_grad_()

        def region(x: Tensor) -> Tensor:
            return limit(x).sum() + x.square().sum()

        result: Any = checkpoint(region, leaf, use_reentrant=use_reentrant) if rank == size - 1 else region(leaf)
        result.backward()
        states.append(state_of(limit))
    return {"states": states}


def idle(size: int, rank: int) -> Told:
    """Leave calls out where a process has no losses, and say so."""
    limit, states = MAKES["default"](True), []
    for step, losses in enumerate(stream()):
        part = share(losses, size, rank, step)
        if part.numel():
            limit(part)
        else:
            limit.idle()
        states.append(state_of(limit))
    return {"states": states}


def named(size: int, rank: int) -> Told:
    """Give names in another order on every process, and leave some out."""
    limits, states = NamedALRC("a", "b", observe=4, sync=True), []
    for step, (one, other) in enumerate(zip(stream(), stream(1), strict=True)):
        given = {"a": share(one, size, rank, step), "b": share(other, size, rank, step + 1)}
        given = {name: losses for name, losses in given.items() if losses.numel()}
        limits(given if rank % 2 else dict(reversed(given.items())))
        states.append(state_of(limits))
    return {"states": states}


# ------------------------------------------------------------------------------------------------------ attached


def accumulating(size: int, rank: int, make: Callable[..., ALRC], sync: Any = True) -> Told:
    """Take two micro-batches a step; in some steps, a process has none. Step 20 is skipped on the device."""
    limit, weight, did, states = make(sync), nn.Parameter(torch.ones(())), [], []
    optimizer = torch.optim.SGD([weight], lr=0.0, fused=True)
    limit.attach(optimizer)
    for step, losses in enumerate(stream()):
        part = share(losses, size, rank, step)
        done = []
        for few in part.tensor_split(2) if part.numel() else ():
            leaf = few.clone().requires_grad_()
            limited = limit(leaf + 0 * weight)  # an infinite loss must not reach the weight
            limited.sum().backward()
            assert leaf.grad is not None
            done.append(torch.stack((limited.detach(), leaf.grad)))
        did.append(torch.cat(done, -1) if done else torch.zeros(2, 0))
        if weight.grad is None:
            weight.grad = torch.zeros(())
        optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(float(step == 20))  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
        optimizer.zero_grad()
        states.append(state_of(limit))
    return {"did": did, "states": states}


# -------------------------------------------------------------------------------------------------- wrapped models


class Model(nn.Module):
    """A network with its limiter inside or outside."""

    def __init__(self, limit: ALRC | None) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
        self.limit = limit

    def forward(self, inputs: Tensor, wanted: Tensor) -> Tensor:
        losses = (self.network(inputs) - torch.nan_to_num(wanted)).square()
        losses = losses.masked_fill(wanted.isnan(), torch.nan)
        return losses if self.limit is None else self.limit(losses)


def wrapped(size: int, rank: int, kind: str, inside: bool, is_attached: bool = False, micro: int = 1) -> Told:
    """Train a model that is wrapped for many processes; the gradient is the mean over the joined batch."""
    torch.manual_seed(0)
    limit = ALRC(observe=4, sync=kind != "ddp without sync")
    model: Any = Model(limit if inside else None)
    network = model
    if size > 1 and kind.startswith("ddp"):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
            model = nn.parallel.DistributedDataParallel(model, **{} if kind == "ddp" else {"broadcast_buffers": False})
    if size > 1 and kind == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (size,))
        fully_shard(model.network[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    if is_attached:
        limit.attach(optimizer)
    generator, limited, states = torch.Generator().manual_seed(1), 0.0, []
    for step in range(16):
        inputs, wanted = (torch.randn(micro, 8, width, generator=generator) for width in (4, 2))
        if step in (10, 13):
            wanted[0, -1] *= 30
        if step == 11:
            wanted[-1, -1, 0] = torch.nan  # poisons one loss, on the last process
        optimizer.zero_grad()
        for i in range(micro):
            if micro > 1 and size > 1:
                is_last = i == micro - 1
                if kind == "fsdp":
                    model.set_requires_gradient_sync(is_last)
                else:
                    model.require_backward_grad_sync = is_last
            mine = slice(rank * 8 // size, (rank + 1) * 8 // size)
            losses = model(inputs[i, mine], wanted[i, mine])
            (losses if inside else limit(losses)).mean().div(micro).backward()
            assert limit.last is not None
            limited += float(limit.last.fraction_limited)
        optimizer.step()
        states.append(state_of(limit))
    weights = [whole(parameter).detach().clone() for parameter in network.parameters()]
    return {"states": states, "weights": weights, "limited": limited}


def whole(parameter: Any) -> Tensor:
    """Return all of a parameter of which this process may hold a shard."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


# ------------------------------------------------------------------------------------------------------- groups, files


def grouped(size: int, rank: int) -> Told:
    """Let two halves of the processes learn apart, each from batches of its own."""
    half = max(size // 2, 1)
    sync: Any = True
    if size > 1:
        groups = [dist.new_group(list(range(start, start + half))) for start in range(0, size, half)]
        sync = groups[rank // half]
    limit, states = MAKES["default"](sync), []
    for step, losses in enumerate(stream(rank // half)):
        limit(share(losses, half, rank % half, step))
        states.append(state_of(limit))
    return {"states": states}


@contextlib.contextmanager
def unconcerned() -> Iterator[None]:
    """Silence what torch says when a single process stores or loads."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def store(folder: Path, size: int, rank: int) -> None:
    """Store what some processes have learned, by torch.save and by torch.distributed.checkpoint."""
    import torch.distributed.checkpoint as dcp

    model = nn.ModuleDict({"limit": MAKES["default"](True)})
    for step, losses in enumerate(stream(4)):
        model["limit"](share(losses, size, rank, step))
    with unconcerned():
        dcp.save(model.state_dict(), checkpoint_id=folder / f"{size}.dcp")
    if rank == 0:
        torch.save(model.state_dict(), folder / f"{size}.pt")


def resume(folder: Path, of: int, size: int, rank: int) -> list[dict[str, Tensor]]:
    """Go on from what `of` processes have stored."""
    import torch.distributed.checkpoint as dcp

    states = []
    for way in ("save", "dcp"):
        model = nn.ModuleDict({"limit": MAKES["default"](True)})
        state = model.state_dict()
        if way == "save":
            state = torch.load(folder / f"{of}.pt", weights_only=True)
        else:
            with unconcerned():
                dcp.load(state, checkpoint_id=folder / f"{of}.dcp")
        model.load_state_dict(state)
        states.append(state_of(model["limit"]))
        for step, losses in enumerate(stream(5)[:6]):
            model["limit"](share(losses, size, rank, step))
        states.append(state_of(model["limit"]))
    return states


def stored(size: int, rank: int, folder: Path) -> Told:
    """Go on from what one process has stored before, and store what several have learned."""
    if size > 1:
        store(folder, size, rank)
    return {"states": resume(folder, 1, size, rank)}


def cases(folder: Path) -> dict[str, Callable[[int, int], Told]]:
    """Return all cases by name."""

    def case(function: Callable[..., Told], *given: Any) -> Callable[[int, int], Told]:
        return lambda size, rank: function(size, rank, *given)

    found = {function.__name__: function for function in (masked, device, unsynchronised, unread, evaluating, idle)}
    found |= {function.__name__: function for function in (named, grouped)}
    for name, make in MAKES.items():
        found[f"immediate {name}"] = case(immediate, make)
        found[f"attached {name}"] = case(accumulating, make)
    for use_reentrant in (True, False):
        found[f"checkpointed {use_reentrant}"] = case(checkpointed, use_reentrant)
    for kind in ("ddp", "ddp own buffers", "ddp without sync", "fsdp"):
        found[f"{kind} inside"] = case(wrapped, kind, True)
        found[f"{kind} outside"] = case(wrapped, kind, False)
        found[f"{kind} attached"] = case(wrapped, kind, True, True)
        found[f"{kind} accumulating"] = case(wrapped, kind, False, True, 3)
    found["stored"] = case(stored, folder)
    return found


def tell(case: Callable[[int, int], Told], size: int, rank: int) -> Told:
    """Run a case; what goes wrong is told, too, and the parent fails with it."""
    try:
        return case(size, rank)
    except Exception:  # whatever it is: the other processes wait for this one to go on
        return {"error": traceback.format_exc()}


def main(folder: Path, size: int, rank: int) -> None:
    """Run all cases and write down what happened."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    told: dict[str, Told] = {}
    for number, (name, case) in enumerate(cases(folder).items()):
        meeting = f"file://{folder}/meeting-{number}"
        limit = datetime.timedelta(seconds=20)  # nobody waits for ever for a process that failed
        dist.init_process_group("gloo", init_method=meeting, world_size=size, rank=rank, timeout=limit)
        told[name] = tell(case, size, rank)
        dist.destroy_process_group()
    torch.save(told, folder / f"told-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
