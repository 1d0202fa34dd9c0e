"""Compare, in one of several processes, the clipper on sharded parameters with the clipper on whole ones.

Started by test_gradient_clipper.py: `python gradient_shards.py MEETING NUMBER RANK`. Exits with 0 if all agree.
"""

from __future__ import annotations

import copy
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from alrc.rules import AGC, AutoClip, GradientRule, Norm, Value, ZClip
from alrc.torch import GradientClipper

RULES: tuple[GradientRule, ...] = (
    Value(0.02),
    Norm(0.1),
    Norm(0.05, scope="parameter"),
    Norm(0.02, norm_type=float("inf")),
    AGC(1e-3),
    AGC(1e-3, exclude=("2.*",)),
    AutoClip(20.0),
    AutoClip(20.0, scope="parameter"),
    ZClip(max_norm=None, warmup=3, z_threshold=0.5),
)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compare(rule: GradientRule, rank: int) -> None:
    """Follow twelve steps of one model, sharded and whole; the last but one holds a NaN on the last process."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))  # neither 7 nor 3 can be halved
    sharded = copy.deepcopy(plain)
    fully_shard(sharded)
    one, two = GradientClipper(plain, rule), GradientClipper(sharded, rule)
    limited = 0.0
    for step in range(12):
        inputs = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
        for model in (plain, sharded):
            model.zero_grad()
            (3.0 ** (step % 4) * model(inputs).square().mean()).backward()
        if step == 10:
            for model in (plain, sharded):
                gradient = model.get_parameter("0.weight").grad
                assert gradient is not None
                if not isinstance(gradient, DTensor):
                    gradient[6, 1] = float("nan")
                elif rank == dist.get_world_size() - 1:
                    gradient.to_local()[-1, 1] = float("nan")
        expected, norm = one.clip_(), two.clip_()
        if step == 10:  # of which kind it is, a maximum over processes does not tell
            assert not torch.isfinite(norm)
        else:
            torch.testing.assert_close(norm, expected)
        for (name, a), b in zip(plain.named_parameters(), sharded.parameters(), strict=True):
            assert a.grad is not None
            assert b.grad is not None
            torch.testing.assert_close(
                whole(b.grad), a.grad, rtol=1e-4, atol=1e-7, equal_nan=True, msg=lambda m, n=name: f"{rule} {n}: {m}"
            )
        assert one.last is not None
        limited += float(one.last.fraction_limited)
    assert limited > 0, f"{rule} has limited nothing"
    for a, b in zip(one.state_dict()["state"].values(), two.state_dict()["state"].values(), strict=True):
        torch.testing.assert_close(a, b)
    fresh = GradientClipper(plain, rule)
    fresh.load_state_dict(two.state_dict())  # what many processes have learned goes on in one


def expect_refusal(clipper: GradientClipper, *words: str) -> None:
    """Require a TypeError that says all the words."""
    complaint = "nothing"
    try:
        clipper.clip_()
    except TypeError as error:
        complaint = str(error)
    assert all(word in complaint for word in words), f"{words} expected, but {complaint} is said"


def refuse() -> None:
    """Name what cannot be measured right: units across processes, and sums that were not taken."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    across = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)]))
    across.grad = distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)])
    torch.testing.assert_close(GradientClipper([("across", across)], Norm(1.0)).clip_(), torch.tensor(4.0))
    expect_refusal(GradientClipper([("across", across)], AGC()), "'across' is a DTensor", "shard dimension 0")
    partial = nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [Partial()]))
    partial.grad = DTensor.from_local(torch.ones(4), mesh, [Partial()])
    clipper = GradientClipper([("partial", partial)], Norm(1.0))
    expect_refusal(clipper, "'partial' is a DTensor", "redistribute it first")


def main(meeting: str, number: int, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", world_size=number, rank=rank)
    for rule in RULES:
        compare(rule, rank)
    refuse()
    dist.destroy_process_group()
    print("all equal")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
