"""What StepGuard costs: guard.step() over optimizer.step(), in every mode, with and without a norm and a rule.

Run with `python benchmarks/step_guard.py [THREADS]`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn, optim

from alrc.rules import SkipStep
from alrc.torch import StepGuard
from side_by_side import describe_ratio, header, time_rounds

SHAPES = {"1 M": [(128, 128)] * 64, "25 M": [(1024, 1024)] * 24}
OPTIMIZERS: dict[str, tuple[str, Callable[[list[Tensor]], optim.Optimizer]]] = {
    "AdamW fused": ("fused", lambda p: optim.AdamW(p, lr=1e-6, fused=True)),
    "AdamW": ("select", lambda p: optim.AdamW(p, lr=1e-6)),
    "SGD momentum": ("select", lambda p: optim.SGD(p, lr=1e-6, momentum=0.9)),
    "AdamW ": ("host", lambda p: optim.AdamW(p, lr=1e-6)),
}


def make_call(name: str, shapes: list[tuple[int, int]], is_guarded: bool, **given: bool) -> Callable[[], None]:
    """Return a step, guarded or not, on weights of its own."""
    mode, make = OPTIMIZERS[name]
    weights: list[Tensor] = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer = make(weights)
    if not is_guarded:
        return lambda: optimizer.step() and None
    guard = StepGuard(optimizer, SkipStep() if given.get("rule") else None, mode=mode)  # pyright: ignore[reportArgumentType]
    arguments = {"norm": torch.ones(())} if given.get("norm") else {}
    return lambda: guard.step(**arguments)


def main(threads: int = 1) -> None:
    torch.set_num_threads(threads)
    print(header("A guarded step over an optimiser's step"))
    columns = " ".join(f"{name:>19}" for name in ("norm given", "measured", "and rule"))
    print(f"\n{'weights':>7}  {'optimiser':<13} {'mode':<7} {'step':>10} {columns}")
    for size, shapes in SHAPES.items():
        for name, (mode, _) in OPTIMIZERS.items():
            calls = {
                "plain": make_call(name, shapes, False),
                "norm given": make_call(name, shapes, True, norm=True),
                "measured": make_call(name, shapes, True),
                "and rule": make_call(name, shapes, True, rule=True),
            }
            spent = time_rounds(calls, rounds=9)
            ratios = [describe_ratio(spent[key] / spent["plain"]) for key in list(calls)[1:]]
            plain = sorted(spent["plain"])[len(spent["plain"]) // 2]
            print(f"{size:>7}  {name:<13} {mode:<7} {plain / 1000:>7.2f} ms " + " ".join(f"{r:>19}" for r in ratios))


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:]))
