"""What limiting gradients costs: every rule of `GradientClipper` beside clip_grad_norm_ and the peers, at three sizes.

Gradients have the shapes of a transformer. The time of one call between `backward()` and `step()` is compared in
alternating rounds. Most steps of a training have nothing to limit, and on a CPU ours then write nothing; the rows
"limiting" are of steps that scale every gradient, as clip_grad_norm_ does in every step.
Run with `python benchmarks/gradient_clipping.py [THREADS]`; takes a minute.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from autoclip.torch import QuantileClip
from pytorch_optimizer.optimizer.agc import agc
from torch import nn
from zclip import ZClip as TheirZClip

from alrc.ops import NUMPY, Ops
from alrc.rules import AGC, AutoClip, GradientDecision, GradientRule, Measure, Norm, Value, ZClip
from alrc.torch import ALRC, GradientClipper
from side_by_side import describe_ratio, header, time_rounds

SIZES = {"1 M": (128, 4, 1500), "25 M": (512, 7, 6000), "100 M": (1024, 7, 11500)}
"""Width, layers and vocabulary of a transformer of about that many parameters."""
PEERS = {
    "Norm": "clip_grad_norm_",
    "Norm, each parameter": "clip_grad_norm_",
    "Value": "clip_grad_value_",
    "AGC": "AGC of pytorch_optimizer",
    "AutoClip": "QuantileClip of autoclip",
    "ZClip": "ZClip of zclip",
}
REFERENCE = "clip_grad_norm_"


@dataclass(frozen=True)
class Limiting:
    """Limit every magnitude by half a unit in the last place, whatever the rule says."""

    rule: GradientRule

    @property
    def measures(self) -> Measure:
        """What the rule measures."""
        return self.rule.measures

    def init(self, number: int | None = None) -> Any:
        """Return the state of the rule."""
        return self.rule.init(number)

    def decide(self, measured: Any, state: Any, ops: Ops = NUMPY) -> GradientDecision:
        """Decide as the rule does, and limit a little more."""
        decision = self.rule.decide(measured, state, ops)
        return decision._replace(scale=decision.scale * (1 - 2**-24))

    def update(self, measured: Any, decision: GradientDecision, state: Any, ops: Ops = NUMPY) -> Any:
        """Return the next state of the rule."""
        return self.rule.update(measured, decision, state, ops)


def build_model(width: int, layers: int, vocabulary: int) -> nn.ParameterDict:
    """Make the parameters of a transformer, with a gradient each."""
    shapes = {"embedding": (vocabulary, width), "norm_weight": (width,), "norm_bias": (width,)}
    for layer in range(layers):
        block = {"qkv": 3 * width, "out": width, "up": 4 * width}
        for name, rows in block.items():
            shapes |= {f"{layer}_{name}_weight": (rows, width), f"{layer}_{name}_bias": (rows,)}
        shapes |= {f"{layer}_down_weight": (width, 4 * width), f"{layer}_down_bias": (width,)}
        shapes |= {f"{layer}_norm{i}_{kind}": (width,) for i in (1, 2) for kind in ("weight", "bias")}
    model = nn.ParameterDict({name: nn.Parameter(0.02 * torch.randn(shape)) for name, shape in shapes.items()})
    for parameter in model.parameters():
        parameter.grad = 1e-4 * torch.randn_like(parameter)
    return model


def calls_on(model: nn.ParameterDict) -> dict[str, Callable[[], object]]:
    """Return what is timed; the limits are so high that gradients stay what they are, whatever the number of calls."""
    parameters = list(model.parameters())
    their_zclip, their_autoclip = TheirZClip(max_grad_norm=None), QuantileClip(parameters, global_threshold=True)

    def their_agc() -> None:
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad.copy_(agc(parameter.detach(), parameter.grad, agc_clip_val=1e3))

    limit, losses = ALRC(), torch.rand(64, requires_grad=True)
    ours = {
        "Norm": Norm(1e6),
        "Norm, each parameter": Norm(1e6, scope="parameter"),
        "Value": Value(1e6),
        "AGC": AGC(1e3),
        "AutoClip": AutoClip(100.0),
        "ZClip": ZClip(max_norm=None),
    }
    calls: dict[str, Callable[[], object]] = {
        REFERENCE: lambda: torch.nn.utils.clip_grad_norm_(parameters, 1e6),
        "clip_grad_value_": lambda: torch.nn.utils.clip_grad_value_(parameters, 1e6),
        "AGC of pytorch_optimizer": their_agc,
        "QuantileClip of autoclip": their_autoclip.step,
        "ZClip of zclip": lambda: their_zclip.step(model),
        "mean of 64 losses": lambda: losses.mean().backward(),
        "ALRC, 64 losses": lambda: limit(losses).mean().backward(),
    }
    for name, rule in ours.items():
        calls[name] = GradientClipper(model, rule).clip_
        calls[f"{name}, limiting"] = GradientClipper(model, Limiting(rule)).clip_
    return calls


def main(threads: int = 1) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    print(header("Cost of limiting gradients, eager, float32"))
    for title, shape in SIZES.items():
        model = build_model(*shape)
        number, tensors = sum(parameter.numel() for parameter in model.parameters()), len(model)
        spent = time_rounds(calls_on(model), rounds=7 if number > 5e7 else 11)
        print(f"\n{title}: {number:,} parameters in {tensors} tensors")
        print(f"{'':<30} {'time':>12} {'/ clip_grad_norm_':>20}   beside its peer")
        for name, times in spent.items():
            if name == "ALRC, 64 losses":
                times = times - spent["mean of 64 losses"]
                name = "ALRC's overhead, 64 losses"
            elif name == "mean of 64 losses":
                continue
            middle = sorted(times)[len(times) // 2] / 1000
            # zclip writes nothing either in a step that it does not limit, and was not made to limit.
            peer = None if name == "ZClip, limiting" else PEERS.get(name.removesuffix(", limiting"))
            beside = f"{describe_ratio(times / spent[peer])} of {peer}" if peer else ""
            print(f"{name:<30} {middle:>9.3f} ms {describe_ratio(times / spent[REFERENCE]):>20}   {beside}")


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:]))
