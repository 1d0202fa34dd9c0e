"""Check that processes agree about a step of which only one of them knows that it is bad.

This file is its own worker: `python test_step_guard_processes.py RANK FOLDER` runs every case on one of two processes
and writes what happened. The last case is the twin: without a group, separate replicas must be seen to disagree.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn, optim

from alrc.rules import SkipStep
from alrc.torch import StepGuard

SIZE = 2
CASES = [
    (wrapping, optimizer)
    for wrapping in ("ddp", "fsdp", "replicas", "alone")
    for optimizer in ("fused", "select", "host")
]
NAN_LOSS, NAN_SHARD, SPIKE, STEPS = 3, 5, 30, 36


def memory(parameter: Any) -> Tensor:
    """Return what this process holds of a parameter."""
    return (parameter.to_local() if hasattr(parameter, "to_local") else parameter).detach()


def train(wrapping: str, kind: Any, rank: int) -> dict[str, list[Any]]:
    """Train, spoil steps on rank 1, and tell which steps were skipped and whether all of them left everything alone."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    if wrapping == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    elif wrapping == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh("cpu", (SIZE,)))
    optimizer = optim.Adam(model.parameters(), lr=1e-3, fused=kind == "fused")
    rule = SkipStep(window=32, min_history=16)
    guard = StepGuard(optimizer, rule, mode=kind, group=None if wrapping == "alone" else dist.group.WORLD)
    told: dict[str, list[Any]] = {"skipped": [], "norms": [], "untouched": []}
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        optimizer.zero_grad()
        inputs = torch.randn(6, 4, generator=generator) + 0.1 * rank
        if rank == 1:
            inputs *= {NAN_LOSS: math.nan, SPIKE: 100}.get(step, 1)
        loss = model(inputs).square().mean()
        loss.backward()
        if step == NAN_SHARD and rank == 1:
            memory(next(model.parameters()).grad).fill_(math.nan)
        kept = [*model.parameters(), *(v for state in optimizer.state.values() for v in state.values())]
        before = [memory(tensor).clone() for tensor in kept]
        guard.step(loss=loss)
        told["norms"].append(float(guard.last.norm))
        if guard.last.is_skipped:
            told["skipped"].append(step)
            told["untouched"].append(all(map(torch.equal, before, map(memory, kept))))
    return told


def work(rank: int, folder: Path) -> None:
    """Run all cases on one process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=SIZE)
    told = {f"{wrapping} {kind}": train(wrapping, kind, rank) for wrapping, kind in CASES}
    (folder / f"{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Run all cases on two processes and return what each of them tells."""
    folder = tmp_path_factory.mktemp("processes")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], env=environment) for rank in range(SIZE)
    ]
    assert [worker.wait(timeout=240) for worker in workers] == [0] * SIZE
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(SIZE)]


@pytest.mark.dist
@pytest.mark.parametrize(("wrapping", "kind"), [case for case in CASES if case[0] != "alone"])
def test_processes_agree(told: list[dict[str, Any]], wrapping: str, kind: str) -> None:
    first, second = (of_rank[f"{wrapping} {kind}"] for of_rank in told)
    assert repr(first) == repr(second)  # NaN included
    assert first["skipped"] == [NAN_LOSS, NAN_SHARD, SPIKE]
    assert first["untouched"] == [True] * 3


@pytest.mark.dist
def test_processes_that_do_not_talk_are_seen_to_disagree(told: list[dict[str, Any]]) -> None:
    first, second = (of_rank["alone select"] for of_rank in told)
    assert first["skipped"] == []
    assert second["skipped"] == [NAN_LOSS, NAN_SHARD, SPIKE]


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
