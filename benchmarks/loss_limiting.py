"""What ALRC costs: forward and backward over a plain mean, beside clip_grad_norm_ on the 1,042,819-parameter network.

Run with `python benchmarks/loss_limiting.py [THREADS]`.
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from alrc.torch import ALRC
from alrc_lab.experiments.cifar10_supersampling import build_network
from side_by_side import describe_ratio, header, time_rounds

LIMITERS = {"ALRC()": ALRC, "ALRC.reference()": ALRC.reference, "ALRC.paper()": ALRC.paper}
SPIKY = "ALRC(), one limited"


def main(threads: int = 1) -> None:
    torch.set_num_threads(threads)
    print(header("Overhead of limiting losses, eager"))
    parameters = list(build_network(64, 0).parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    norm = "clip_grad_norm_"
    columns = f"{'losses':>9}  {'limiter':<20} {'plain mean':>10} {'limited':>9} {'extra':>9}"
    print(f"\n{columns} {'extra / clip_grad_norm_':>24}")
    for number in (1, 16, 256, 4096):
        losses = torch.rand(number, requires_grad=True)
        calls = {"plain": lambda losses=losses: losses.mean().backward()}
        calls |= {norm: lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0)}
        for name, make in LIMITERS.items():
            calls[name] = lambda losses=losses, limit=make(): limit(losses).mean().backward()
        if number > 1:
            spiky = losses.detach().clone().index_fill_(0, torch.tensor(0), 1000.0).requires_grad_()
            calls[SPIKY] = lambda losses=spiky, limit=learned(number): limit(losses).mean().backward()
        spent = time_rounds(calls)
        for name in [name for name in calls if name not in ("plain", norm)]:
            extra = spent[name] - spent["plain"]
            plain, limited = (float(np.median(spent[key])) for key in ("plain", name))
            middle, ratio = float(np.median(extra)), describe_ratio(extra / spent[norm])
            print(f"{number:>9}  {name:<20} {plain:>7.1f} µs {limited:>6.1f} µs {middle:>6.1f} µs {ratio:>24}")
    print(f"\n{'pixels':>9}  {'limiter':<20} {'forward + backward / plain mean':>33} {'the same from (y - t)²':>26}")
    number = 512 * 512
    losses, targets = torch.rand(number, requires_grad=True), torch.rand(number)
    calls = {
        "plain": lambda: losses.mean().backward(),
        "plain squares": lambda: (losses - targets).square().mean().backward(),
    }
    makes = {**LIMITERS, SPIKY: lambda: learned(number)}
    for name, make in makes.items():
        shift = 30.0 * (torch.arange(number) == 0) if name == SPIKY else torch.zeros(())
        spiky = (losses + shift).detach().requires_grad_()
        calls[name] = lambda limit=make(), losses=spiky: limit(losses).mean().backward()
        calls[name + " squares"] = lambda limit=make(), y=spiky: limit((y - targets).square()).mean().backward()
    spent = time_rounds(calls)
    for name in makes:
        direct = describe_ratio(spent[name] / spent["plain"])
        squares = describe_ratio(spent[name + " squares"] / spent["plain squares"])
        print(f"{number:>9}  {name:<20} {direct:>33} {squares:>26}")


def learned(number: int) -> ALRC:
    """Make a limiter that knows the level of uniform losses."""
    limit = ALRC()
    for _ in range(limit.rule.observe):
        limit(0.1 + torch.rand(number))
    return limit


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:]))
