"""Measure gradients at the granularity a rule asks for, and scale them by what it decides.

Exists so that the clipper need not know what a tensor is: several dtypes and devices, and shards of DTensors whose
norms lie on many processes. Contains no rule. Factors in the host's memory are looked at, which is free there, so that
a gradient that is not limited is not written; nothing waits for a device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype

from alrc.rules.gradient import GradientDecision, UnitNorms
from alrc.torch.host import is_on_host, number_of

__all__ = ["GRANULARITIES", "Measured", "join", "norms_of", "reason_to_refuse"]

_kernels: Any = torch
"""Where torch keeps its fused kernels: documented, but with underscores that checkers of types refuse."""


class Measured(NamedTuple):
    """Hold what was measured, and the way to scale what it was measured on."""

    magnitudes: Any
    """What the rule is asked about."""
    norm: Tensor
    """Norm of all of it together, 0-d."""
    scale_: Callable[[GradientDecision], None]
    """Scales the gradients in place."""


class _Group(NamedTuple):
    """Hold tensors of one device and dtype, which is what one fused kernel takes."""

    parts: list[Tensor]
    """The memory of this process: tensors, or the local shards of DTensors."""
    places: list[int]
    """Where each stands in the list that was grouped."""


def join(norms: Tensor, norm_type: float) -> Tensor:
    """Return the norm of everything whose parts have these norms, 0-d."""
    return norms.amax() if norm_type == math.inf else torch.linalg.vector_norm(norms, norm_type)


def norms_of(tensors: Sequence[Tensor], norm_type: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the norm of each tensor, over all its shards, in `dtype` on `device`; shape (number,)."""
    return torch.stack(_norms(_group(tensors), tensors, norm_type, dtype, device))


def measure_global(
    gradients: Sequence[Tensor | None], weights: Sequence[Tensor], norm_type: float, dtype: torch.dtype
) -> Measured:
    """Measure one norm over all gradients."""
    present, _ = _present(gradients)
    groups = _group(present)
    norm = join(torch.stack(_norms(groups, present, norm_type, dtype, weights[0].device)), norm_type)

    def scale_(decision: GradientDecision) -> None:
        for parts, _ in groups:
            factor = decision.scale.to(parts[0].device)
            if parts[0].dtype == torch.float16:  # a factor below 6e-8 would be zero in the gradient's dtype
                _kernels._foreach_mul_([_with_axes(part) for part in parts], [factor.reshape(1)] * len(parts))
            else:
                _kernels._foreach_mul_(parts, factor)

    return Measured(norm, norm, scale_)


def measure_parameters(
    gradients: Sequence[Tensor | None], weights: Sequence[Tensor], norm_type: float, dtype: torch.dtype
) -> Measured:
    """Measure the norm of each gradient; NaN, which no rule remembers, where there is none."""
    present, places = _present(gradients)
    groups = _group(present)
    norms = torch.stack(_norms(groups, present, norm_type, dtype, weights[0].device))
    magnitudes = norms
    if len(places) < len(gradients):
        rows = [norms.new_full((), math.nan)] * len(gradients)
        for place, norm in zip(places, norms.unbind(), strict=True):
            rows[place] = norm
        magnitudes = torch.stack(rows)

    def scale_(decision: GradientDecision) -> None:
        factors = decision.scale.split(1)
        is_limited = _limited(decision.scale, [1] * len(factors))
        _multiply_(groups, [factors[place] for place in places], [is_limited[place] for place in places])

    return Measured(magnitudes, join(norms, norm_type), scale_)


def measure_elements(
    gradients: Sequence[Tensor | None], weights: Sequence[Tensor], norm_type: float, dtype: torch.dtype
) -> Measured:
    """Measure the largest element of each gradient, which shares its threshold with all the others."""
    present, places = _present(gradients)
    groups = _group(present)
    taken = measure_parameters(gradients, weights, math.inf, dtype)
    magnitudes: Tensor = taken.magnitudes

    def scale_(decision: GradientDecision) -> None:
        # |g| · threshold / |g|, without the division. Gradients that are not finite stay as they are.
        if is_on_host(decision.scale):
            limits = np.broadcast_to(decision.threshold, len(gradients)).tolist()
            is_limited = _limited(decision.scale, [1] * len(gradients))
            for parts, members in groups:
                for part, place in zip(parts, (places[member] for member in members), strict=True):
                    if is_limited[place]:
                        part.clamp_(-limits[place], limits[place])
            return
        bounds = torch.where(magnitudes < math.inf, decision.threshold, math.inf)
        for parts, members in groups:
            high = bounds.to(parts[0].device, parts[0].dtype)
            highs, lows = high.unbind(), (-high).unbind()
            _kernels._foreach_clamp_max_(parts, [highs[places[member]] for member in members])
            _kernels._foreach_clamp_min_(parts, [lows[places[member]] for member in members])

    return Measured(magnitudes, taken.norm, scale_)


def measure_units(
    gradients: Sequence[Tensor | None], weights: Sequence[Tensor], norm_type: float, dtype: torch.dtype
) -> Measured:
    """Measure the norms of each output unit's gradient and weights; a unit lies along the first dimension."""
    present, places = _present(gradients)
    device = weights[0].device
    units = _unit_norms(present, norm_type, dtype, device)
    reference = _unit_norms([weights[place] for place in places], norm_type, dtype, device)
    if all(type(gradient) is Tensor for gradient in present):
        norm = join(torch.cat(units), norm_type)
    else:
        matrices = [index for index, gradient in enumerate(present) if gradient.ndim > 1]
        parts = [join(units[index], norm_type) for index in matrices]
        parts = _over_shards(parts, [present[index] for index in matrices], norm_type)
        parts += [units[index].reshape(()) for index, gradient in enumerate(present) if gradient.ndim < 2]
        norm = join(torch.stack(parts), norm_type)

    def scale_(decision: GradientDecision) -> None:
        sizes = [norms.shape[0] for norms in units]
        factors = decision.scale.split(sizes)
        shaped = [
            factor if gradient.ndim < 2 else factor.view(-1, *[1] * (gradient.ndim - 1))
            for factor, gradient in zip(factors, present, strict=True)
        ]
        _multiply_(_group(present), shaped, _limited(decision.scale, sizes))

    return Measured(UnitNorms(torch.cat(units), torch.cat(reference)), norm, scale_)


GRANULARITIES = {
    "global": measure_global,
    "parameter": measure_parameters,
    "element": measure_elements,
    "unit": measure_units,
}
"""How to measure, by what `alrc.rules.Measure` says. All take a gradient or None for each weight."""


def reason_to_refuse(gradient: Tensor, granularity: str) -> str | None:
    """Return why a gradient cannot be measured right at a granularity; None if it can."""
    if gradient.layout != torch.strided:
        return "is sparse, and its absent elements have no memory to scale; make the layer with sparse=False"
    for placement in getattr(gradient, "placements", ()):
        if placement.is_partial():
            return f"is a DTensor with placement {placement}, a sum not yet taken; redistribute it first"
        if granularity == "unit" and gradient.ndim > 1 and getattr(placement, "dim", 0) != 0:
            return f"is a DTensor with placement {placement}, so its units lie on several processes; shard dimension 0"
    return None


def _present(gradients: Sequence[Tensor | None]) -> tuple[list[Tensor], list[int]]:
    """Return the gradients there are, and their places."""
    places = [place for place, gradient in enumerate(gradients) if gradient is not None]
    return [gradient for gradient in gradients if gradient is not None], places


def _group(tensors: Sequence[Tensor]) -> list[_Group]:
    """Group tensors by device and dtype."""
    found: Any = _group_tensors_by_device_and_dtype([[_local(tensor) for tensor in tensors]], with_indices=True)
    return [_Group(parts, places) for [parts], places in found.values()]


def _local(tensor: Tensor) -> Tensor:
    """Return the memory of this process: the tensor, or its shard of a DTensor."""
    to_local: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def _with_axes(part: Tensor) -> Tensor:
    """Return a view with at least one axis."""
    return part if part.ndim else part.view(1)


def _multiply_(groups: list[_Group], factors: Sequence[Tensor], is_limited: list[bool]) -> None:
    """Multiply each tensor by a factor with axes, so that half precision is multiplied in the factor's precision."""
    for parts, places in groups:
        device = parts[0].device
        pairs = [(part, factors[place]) for part, place in zip(parts, places, strict=True) if is_limited[place]]
        if pairs:
            _kernels._foreach_mul_([_with_axes(part) for part, _ in pairs], [factor.to(device) for _, factor in pairs])


def _limited(scale: Tensor, sizes: Sequence[int]) -> list[bool]:
    """Tell which runs of factors hold one below 1; all might, where that cannot be known without waiting."""
    if not is_on_host(scale):
        return [True] * len(sizes)
    below = np.concatenate(([0], np.cumsum(number_of(scale) < 1)))
    return (np.diff(below[np.concatenate(([0], np.cumsum(sizes)))]) > 0).tolist()


def _norms(
    groups: list[_Group], tensors: Sequence[Tensor], norm_type: float, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Return the norm of each tensor over all its shards, 0-d each."""
    norms: list[Any] = [None] * len(tensors)
    for parts, places in groups:
        for place, norm in zip(places, _local_norms(parts, norm_type, dtype), strict=True):
            norms[place] = norm
        if parts[0].device != device:
            for place in places:
                norms[place] = norms[place].to(device)
    return _over_shards(norms, tensors, norm_type)


def _local_norms(parts: list[Tensor], norm_type: float, dtype: torch.dtype) -> Sequence[Tensor]:
    """Return the norm of each tensor of one device and dtype."""
    if norm_type != math.inf:
        return _kernels._foreach_norm(parts, norm_type, dtype=dtype)
    parts = [part if part.numel() else part.new_zeros(1) for part in parts]
    if parts[0].device.type != "cpu":
        return _kernels._foreach_norm(parts, norm_type, dtype=dtype)
    # On a CPU that one goes through the elements one by one.
    extremes = torch.stack([extreme for part in parts for extreme in torch.aminmax(part)])
    return extremes.to(dtype).abs().view(-1, 2).amax(1).unbind()


def _unit_norms(tensors: Sequence[Tensor], norm_type: float, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return the norms of the slices along the first dimension, or of a bias as a whole; shape (units,) each."""
    norms: list[Any] = [None] * len(tensors)
    whole = [place for place, tensor in enumerate(tensors) if tensor.ndim < 2]
    if whole:
        biases = norms_of([tensors[place] for place in whole], norm_type, dtype, device).split(1)
        for place, norm in zip(whole, biases, strict=True):
            norms[place] = norm
    for place, tensor in enumerate(tensors):
        if tensor.ndim > 1:
            rows = _local(tensor).flatten(1)
            norms[place] = torch.linalg.vector_norm(rows, norm_type, dim=1, dtype=dtype).to(device)
    return norms


def _over_shards(norms: list[Tensor], tensors: Sequence[Tensor], norm_type: float) -> list[Tensor]:
    """Turn the norms of local shards into norms over all shards, by one collective for each kind of sharding."""
    if all(type(tensor) is Tensor or type(tensor) is Parameter for tensor in tensors):
        return norms
    kinds: dict[Any, list[int]] = {}
    for place, tensor in enumerate(tensors):
        placements = getattr(tensor, "placements", ())
        if dimensions := tuple(i for i, placement in enumerate(placements) if not placement.is_replicate()):
            mesh = tensor.device_mesh  # pyright: ignore[reportAttributeAccessIssue]
            kinds.setdefault((mesh, dimensions), []).append(place)
    for (mesh, dimensions), members in kinds.items():
        parts = torch.stack([norms[place] for place in members])
        is_max = norm_type == math.inf
        # A maximum over processes may lose a NaN, and float32 the square of a large norm.
        parts = torch.nan_to_num(parts, nan=math.inf, posinf=math.inf) if is_max else parts.double().pow(norm_type)
        operation = torch.distributed.ReduceOp.MAX if is_max else torch.distributed.ReduceOp.SUM
        for dimension in dimensions:
            torch.distributed.all_reduce(parts, operation, group=mesh.get_group(dimension))
        parts = (parts if is_max else parts.pow(1 / norm_type)).to(norms[members[0]].dtype)
        for place, norm in zip(members, parts.unbind(), strict=True):
            norms[place] = norm
    return norms
