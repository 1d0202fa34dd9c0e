"""The conformance table: alrc and its peers, asked the same eight questions. Run with `make peers`.

Peers are asked in their favour: fixed thresholds are set to what suits the streams (1.6 for magnitudes around 1), AGC
gets weights whose norm makes its threshold 1.6, ZClip does without its fixed cap of 1, the published presets of ALRC
start from an estimate. Give names to ask some of them only: `python benchmarks/peers.py zclip optax`.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import sys
import time
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from autoclip.torch import QuantileClip, StandardClip
from numpy.typing import NDArray
from pytorch_optimizer.optimizer.agc import agc
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from zclip import ZClip

import alrc.jax
import alrc.jax.conformance
from alrc import estimate_start, rules
from alrc.conformance import Make, Outcome, Traits, run, table
from alrc.torch import ALRC, GradientClipper
from alrc.torch.conformance import wrap_gradient_clipper, wrap_loss_limiter, wrap_step_skipper
from alrc.torch.guard import StepGuard

LIMIT = 1.6
"""The threshold of those that want one: mean 1 and three standard deviations of 0.2."""
MU1, MU2 = estimate_start(np.exp(0.2 * np.random.default_rng(0).normal(size=16)))
"""Start of the published presets, from sixteen losses, as their README advises."""


class CommunityPort(nn.Module):
    """Behave as the PyTorch port people find first does: select the limit, keep moments as plain attributes.

    Written from the description of its behaviour.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mu1, self.mu2 = torch.tensor(MU1), torch.tensor(MU2)

    def forward(self, losses: Tensor) -> Tensor:
        """Replace what is above the threshold by the threshold, in train and eval mode alike."""
        threshold = (self.mu1 + 3 * (self.mu2 - self.mu1**2).sqrt()).to(losses.dtype)
        limited = torch.where(losses < threshold, losses, threshold)
        with torch.no_grad():
            self.mu1 = 0.999 * self.mu1 + 0.001 * limited.float().mean()
            self.mu2 = 0.999 * self.mu2 + 0.001 * limited.float().square().mean()
        return limited


class WindowedSkip:
    """Behave as OLMo-core's SkipStep: multiply the update by 0 or 1, judged by windows of losses and norms.

    Written from the description of its behaviour: mean + 6 standard deviations of the previous 128, from 64 on;
    windows are not checkpointed, and the compiler is kept out of the decision.
    """

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters = parameters
        self.windows: tuple[list[Tensor], list[Tensor]] = ([], [])

    def limits(self) -> list[Tensor]:
        """Return the largest loss and norm that are accepted."""
        limits = []
        for window in self.windows:
            std, mean = torch.std_mean(torch.stack(window)) if len(window) >= 64 else (torch.inf, 0.0)
            limits.append(torch.as_tensor(mean + 6 * std))
        return limits

    @torch.compiler.disable
    def factor(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Return 0 or 1, and remember loss and norm."""
        factor = torch.stack([new <= limit for new, limit in zip((loss, norm), self.limits(), strict=True)]).all()
        for window, new in zip(self.windows, (loss, norm), strict=True):
            window.append(new.detach())
            del window[:-128]
        return factor.float()

    def step(self, loss: Tensor) -> None:
        """Make the update times 0 or 1."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        factor = self.factor(loss, torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in gradients])))
        with torch.no_grad():
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter -= factor * gradient


class OptaxClipper:
    """Wrap a transformation of optax, jitted, on one vector whose norm is `weight_norm`."""

    traits = Traits("gradient", "tensor", ("float32",))

    def __init__(self, transform: optax.GradientTransformation, weight_norm: float, dtype: str) -> None:
        direction = np.random.default_rng(1).normal(size=32)
        self.direction = direction / np.linalg.norm(direction)
        self.dtype = jnp.dtype(dtype)
        self.weights = jnp.asarray(weight_norm * self.direction, self.dtype)
        self.update = jax.jit(transform.update)
        self.state = transform.init(self.weights)
        self.level = 1.0

    def step(self, micro_batches: Sequence[NDArray[Any]]) -> list[Outcome]:
        """Clip the gradient of the mean magnitude."""
        magnitude = float(np.mean(np.concatenate(micro_batches)))
        self.level = abs(magnitude) if 0 < abs(magnitude) < 1e30 else self.level
        factor, cosine, self.state = self.clip(magnitude)
        return [Outcome(np.full(len(b), np.nan), np.full(len(b), factor), cosine) for b in micro_batches]

    def clip(self, magnitude: float) -> tuple[float, float, Any]:
        """Return factor, cosine and the next state."""
        gradient = jnp.asarray(magnitude * self.direction, self.dtype)
        clipped, state = self.update(gradient, self.state, self.weights)
        before, after = np.asarray(gradient, np.float64), np.asarray(clipped, np.float64)
        if not np.isfinite(after).all():
            return math.nan, math.nan, state
        size, out = np.linalg.norm(before), np.linalg.norm(after)
        if np.array_equal(before, after):
            return 1.0, 1.0, state
        return float(out / size), float(before @ after / (size * out)) if out else 1.0, state

    def evaluate(self, batch: NDArray[Any]) -> None:
        """Leave gradients alone."""

    def limit(self) -> float:
        """Find out what a large gradient is reduced to, and forget that."""
        factor, _, _ = self.clip(1e6 * self.level)
        return factor * 1e6 * self.level if factor < 1 else math.inf

    def save(self) -> Any:
        """Return the state, which is a tree of arrays."""
        return self.state

    def load(self, state: Any) -> None:
        """Take such a state."""
        self.state = state

    def reads(self) -> list[str]:
        """Name nothing: what `jax.jit` has traced cannot read."""
        return []

    def traces(self) -> str:
        """Say whether more than one graph was made."""
        self.step([np.ones(1)])
        self.step([np.full(1, 9.0)])
        return "" if self.update._cache_size() == 1 else "compiled more than once"


def clip_by_unit(parameters: list[Tensor]) -> None:
    """Replace each gradient by what pytorch_optimizer's `agc` makes of it."""
    for parameter in parameters:
        parameter.grad = agc(parameter.detach(), parameter.grad)


def ours(rule: Any, granularity: str = "all", **others: Any) -> Make:
    """Wrap a rule of alrc behind `GradientClipper`."""
    return wrap_gradient_clipper(
        lambda parameters: GradientClipper(parameters, rule),
        lambda clipper, _: clipper.clip_(),
        granularity=granularity,
        **others,
    )


def guarded(parameters: list[Tensor]) -> StepGuard:
    """Make a step guard with the rule that skips."""
    return StepGuard(torch.optim.SGD(parameters, lr=1.0), rules.SkipStep(), max_consecutive_skips=None, mode="select")


def limit_of_guard(guard: StepGuard) -> float:
    """Return the largest number that a step guard accepts as loss and as gradient norm."""
    state = {name: tensor.numpy() for name, tensor in guard.state_dict()["rule"].items()}
    return float(np.min(rules.SkipStep().limits(rules.StepState(**state))))


def in_keras(dtype: str, signed: bool = False) -> Any:
    """Make the wrapped layer for Keras."""
    return keras_maker(signed)(dtype)


@cache
def keras_maker(signed: bool) -> Make:
    """Wrap the layer for Keras, on the backend of KERAS_BACKEND or on jax."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    from alrc.keras import ALRC
    from alrc.keras.conformance import wrap_loss_limiter

    make = partial(ALRC, signed=signed)
    return wrap_loss_limiter(make, is_signed=signed, synced=make)


def autoclip(kind: Any) -> Make:
    """Wrap a class of PyPI's autoclip, with its defaults but one threshold for all."""
    return wrap_gradient_clipper(
        lambda parameters: kind(iter(parameters), global_threshold=True), lambda clipper, _: clipper.step()
    )


AGC_NORM = LIMIT / 0.01
PEERS: dict[str, Make] = {
    "alrc ALRC()": wrap_loss_limiter(ALRC, synced=partial(ALRC, sync=True)),
    "alrc ALRC(signed=True)": wrap_loss_limiter(
        partial(ALRC, signed=True), is_signed=True, synced=partial(ALRC, signed=True, sync=True)
    ),
    "alrc.jax ALRC()": alrc.jax.conformance.wrap_loss_limiter(
        alrc.jax.ALRC(), synced=lambda axis: alrc.jax.ALRC(axis_name=axis)
    ),
    "alrc.jax ALRC(signed=True)": alrc.jax.conformance.wrap_loss_limiter(
        alrc.jax.ALRC(signed=True), is_signed=True, synced=lambda axis: alrc.jax.ALRC(signed=True, axis_name=axis)
    ),
    "alrc.keras ALRC()": in_keras,
    "alrc.keras ALRC(signed=True)": partial(in_keras, signed=True),
    "alrc ALRC.paper": wrap_loss_limiter(lambda: ALRC.paper(mu1=MU1, mu2=MU2)),
    "alrc ALRC.reference": wrap_loss_limiter(lambda: ALRC.reference(mu1_start=MU1, mu2_start=MU2)),
    "alrc Norm": ours(rules.Norm(LIMIT)),
    "alrc AGC": ours(rules.AGC(), "unit", weight_norm=AGC_NORM),
    "alrc AutoClip": ours(rules.AutoClip()),
    "alrc ZClip": ours(rules.ZClip(max_norm=None)),
    "alrc StepGuard(SkipStep)": wrap_step_skipper(
        guarded, lambda guard, loss: guard.step(loss=loss), limit=limit_of_guard
    ),
    "community port of ALRC (behaviour)": wrap_loss_limiter(CommunityPort),
    "torch clip_grad_norm_": wrap_gradient_clipper(lambda parameters: partial(clip_grad_norm_, parameters, LIMIT)),
    "zclip ZClip": wrap_gradient_clipper(
        lambda parameters: ZClip(max_grad_norm=None),
        lambda clipper, parameters: clipper.step(nn.ParameterList(parameters)),
    ),
    "autoclip QuantileClip": autoclip(QuantileClip),
    "autoclip StandardClip": autoclip(StandardClip),
    "pytorch_optimizer agc": wrap_gradient_clipper(
        lambda parameters: partial(clip_by_unit, parameters), granularity="unit", weight_norm=AGC_NORM
    ),
    "optax adaptive_grad_clip": lambda dtype: OptaxClipper(optax.adaptive_grad_clip(0.01), AGC_NORM, dtype),
    "optax clip_by_global_norm": lambda dtype: OptaxClipper(optax.clip_by_global_norm(LIMIT), 1.0, dtype),
    "OLMo-style skip (behaviour)": wrap_step_skipper(
        WindowedSkip, lambda skipper, loss: skipper.step(loss), limit=lambda skipper: float(min(skipper.limits()))
    ),
}


def main(*words: str) -> None:
    torch.set_num_threads(1)
    jax.config.update("jax_num_cpu_devices", 2)  # T7 asks for two
    chosen = [name for name in PEERS if not words or any(word.lower() in name.lower() for word in words)]
    reports = []
    for name in chosen:
        started = time.perf_counter()
        reports.append(run(PEERS[name], name))
        print(f"{name}: {time.perf_counter() - started:.1f} s", file=sys.stderr)
    packages = ("torch", "zclip", "autoclip", "pytorch_optimizer", "optax", "jax", "numpy")
    print("Measured with", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages), end=".\n\n")
    print(table(reports))


if __name__ == "__main__":
    main(*sys.argv[1:])
