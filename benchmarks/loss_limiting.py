"""What ALRC costs: forward and backward over a plain mean, beside clip_grad_norm_ on the 1,042,819-parameter network.

Run with `python benchmarks/loss_limiting.py [THREADS]`.
"""

from __future__ import annotations

import sys

import torch

from alrc.torch import ALRC
from alrc_lab.experiments.cifar10_supersampling import build_network
from side_by_side import describe_ratio, header, time_rounds

LIMITERS = {"ALRC()": ALRC, "ALRC.reference()": ALRC.reference, "ALRC.paper()": ALRC.paper}


def main(threads: int = 1) -> None:
    torch.set_num_threads(threads)
    print(header("Overhead of limiting losses, eager"))
    parameters = list(build_network(64, 0).parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    norm = "clip_grad_norm_"
    print(f"\n{'losses':>9}  {'limiter':<18} {'plain mean':>10} {'limited':>9} {'overhead / clip_grad_norm_':>28}")
    for number in (1, 16, 256, 4096):
        losses = torch.rand(number, requires_grad=True)
        calls = {"plain": lambda losses=losses: losses.mean().backward()}
        calls |= {norm: lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0)}
        for name, make in LIMITERS.items():
            calls[name] = lambda losses=losses, limit=make(): limit(losses).mean().backward()
        spent = time_rounds(calls)
        for name in LIMITERS:
            ratio = describe_ratio((spent[name] - spent["plain"]) / spent[norm])
            plain, limited = (sorted(spent[key])[len(spent[key]) // 2] for key in ("plain", name))
            print(f"{number:>9}  {name:<18} {plain:>7.1f} µs {limited:>6.1f} µs {ratio:>28}")
    print(f"\n{'pixels':>9}  {'limiter':<18} {'forward + backward / plain mean':>33} {'the same from (y - t)²':>26}")
    number = 512 * 512
    losses, targets = torch.rand(number, requires_grad=True), torch.rand(number)
    calls = {
        "plain": lambda: losses.mean().backward(),
        "plain squares": lambda: (losses - targets).square().mean().backward(),
    }
    for name, make in LIMITERS.items():
        calls[name] = lambda limit=make(): limit(losses).mean().backward()
        calls[name + " squares"] = lambda limit=make(): limit((losses - targets).square()).mean().backward()
    spent = time_rounds(calls)
    for name in LIMITERS:
        direct = describe_ratio(spent[name] / spent["plain"])
        squares = describe_ratio(spent[name + " squares"] / spent["plain squares"])
        print(f"{number:>9}  {name:<18} {direct:>33} {squares:>26}")


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:]))
