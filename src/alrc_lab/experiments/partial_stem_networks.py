"""The networks of partial-STEM: an inner and an outer generator, and an auxiliary trainer between them.

The table of layers is the only description: the networks are built from it, their parameters counted and their cost
computed with it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from alrc_lab.experiments.partial_stem_layers import (
    MeanForm,
    NormalisedConvolution,
    WeightNorm,
    initialise_by_data,
)

SIDE_UNIT = 32
"""Sides of crops are multiples of it: the networks halve them five times."""

CONVOLUTIONS_PER_BLOCK = 3

Part = Literal["inner", "trainer", "outer"]
PARTS: dict[str, Part] = {"I": "inner", "T": "trainer", "O": "outer"}
"""Networks by the first letter of their layers' names."""


@dataclass(frozen=True)
class NetworkShape:
    """Say how wide and deep the networks are, and how they normalise; the defaults are the paper's reading.

    Example:
        >>> NetworkShape.quarter(inner_blocks=3, outer_blocks=2).inner
        (16, 32, 64, 128, 192)
    """

    inner: tuple[int, ...] = (64, 128, 256, 512, 768)
    """Channels of the inner generator's layers on the way in; five, for the half size over 16."""
    outer: tuple[int, int] = (32, 64)
    """Channels of the outer generator at full and at half size; the second is added to the inner generator's first."""
    trainer: int = 64
    """Channels between the auxiliary trainer's two layers."""
    inner_blocks: int = 6
    """Residual blocks of the inner generator."""
    outer_blocks: int = 3
    """Residual blocks of the outer generator."""
    slope: float = 0.0
    """Slope of the leaky ReLU; 0 for ReLU."""
    slope_first: float = 0.0
    """The same in I0, O0 and O1."""
    mean_form: MeanForm = "frozen"
    """Which mean is subtracted; `image` trained slightly better in a prototype, `running` diverges."""
    mean_layers: Literal["all", "transposed"] = "all"
    """Layers that subtract means: all but the last of outer generator and trainer, or the transposed ones only."""
    has_biases: bool = False
    """Whether layers have biases; the paper's have none."""
    first_weight_norm: WeightNorm = "output"
    """Weight normalisation of I0."""
    transposed_weight_norm: WeightNorm = "output"
    """Weight normalisation of the transposed layers; the authors' code took each input channel's norm."""

    def __post_init__(self) -> None:
        if len(self.inner) != 5 or len(self.outer) != 2:
            raise ValueError(f"the generators need 5 and 2 widths, got inner {self.inner} and outer {self.outer}.")
        if min(*self.inner, *self.outer, self.trainer) < 1:
            raise ValueError(f"widths must be at least 1, got {self.inner}, {self.outer} and {self.trainer}.")
        if self.inner[0] != self.outer[1]:
            raise ValueError(
                f"the inner generator's first width, {self.inner[0]}, must be the outer one's second, {self.outer[1]}: "
                "its result is added there."
            )
        if min(self.inner_blocks, self.outer_blocks) < 0:
            raise ValueError(f"blocks must be 0 or more, got {self.inner_blocks} and {self.outer_blocks}.")

    @classmethod
    def full(cls) -> Self:
        """Return the published widths and depths: 106 million parameters."""
        return cls()

    @classmethod
    def quarter(cls, inner_blocks: int = 6, outer_blocks: int = 3) -> Self:
        """Return a quarter of the widths; 6.6 million parameters, 3.6 with 3 and 2 blocks."""
        return cls((16, 32, 64, 128, 192), (8, 16), 16, inner_blocks, outer_blocks)

    @classmethod
    def eighth(cls, inner_blocks: int = 1, outer_blocks: int = 1) -> Self:
        """Return an eighth of the widths; 0.4 million parameters."""
        return cls((8, 16, 32, 64, 96), (4, 8), 8, inner_blocks, outer_blocks)

    def as_code43(self) -> Self:
        """Return the same widths and depths, normalised and activated as in the authors' script 43."""
        return replace(
            self,
            slope=0.01,
            slope_first=0.1,
            mean_form="image",
            mean_layers="transposed",
            has_biases=True,
            first_weight_norm="none",
            transposed_weight_norm="input",
        )


class LayerRow(NamedTuple):
    """Describe one layer, or several equal ones, at some size of crops."""

    part: Part
    """Network that the layer belongs to."""
    name: str
    """Name of the layer, or of the first and last block that it stands for."""
    op: Literal["conv", "deconv"]
    """Convolution, or transposed convolution."""
    kernel: int
    """Height and width of the kernel."""
    stride: int
    """Factor by which the layer reduces, or if transposed enlarges."""
    channels_in: int
    """Channels of the input."""
    channels_out: int
    """Channels of the output."""
    side_in: int
    """Height and width of the input in pixels."""
    side_out: int
    """Height and width of the output in pixels."""
    copies: int
    """Number of equal layers that the row stands for."""
    parameters: int
    """Trainable numbers of one of them."""
    mmac: float
    """Millions of multiplications with an addition that one of them does for one crop."""
    weight_norm: WeightNorm
    """Weight normalisation."""
    mean_form: MeanForm
    """Which mean is subtracted."""
    slope: float | None
    """Slope below zero of the activation; none for a linear layer."""


def layer_table(shape: NetworkShape, side: int = 512) -> list[LayerRow]:
    """List the layers from input to output: inner generator, trainer, outer generator.

    Args:
        shape: Shape of the networks.
        side: Height and width of a crop in pixels.

    Returns:
        One row for each layer; one for all convolutions of a generator's residual blocks.

    Raises:
        ValueError: If `side` is no positive multiple of 32.

    Example:
        >>> rows = layer_table(NetworkShape.full().as_code43())
        >>> sum(row.copies * row.parameters for row in rows)
        106180900
    """
    check_side(side)
    s, half, (low, high) = shape, side // 2, shape.outer
    rows: list[LayerRow] = []
    blocks = {"IR": s.inner_blocks, "OR": s.outer_blocks}

    def add(name: str, op: Literal["conv", "deconv"], k: int, stride: int, cin: int, cout: int, at: int) -> None:
        part = PARTS[name[0]]
        is_deconv, is_last = op == "deconv", name in {"T2", "O3"}
        norm: WeightNorm = s.transposed_weight_norm if is_deconv else s.first_weight_norm if name == "I0" else "output"
        mean: MeanForm = s.mean_form if not is_last and (is_deconv or s.mean_layers == "all") else "none"
        slope = None if is_last else s.slope_first if name in {"I0", "O0", "O1"} else s.slope
        copies = CONVOLUTIONS_PER_BLOCK * blocks[name] if name in blocks else 1
        rows.append(
            LayerRow(
                part,
                f"{name}1-{name}{blocks[name]}" if name in blocks else name,
                op,
                k,
                stride,
                cin,
                cout,
                at,
                at * stride if is_deconv else at // stride,
                copies,
                k * k * cin * cout + cout * (norm != "none") + cout * s.has_biases,
                k * k * cin * cout * (at if is_deconv else at // stride) ** 2 / 1e6,
                norm,
                mean,
                slope,
            )
        )

    add("I0", "conv", 5, 1, 2, s.inner[0], half)
    for i in range(1, 5):
        add(f"I{i}", "conv", 3, 2, s.inner[i - 1], s.inner[i], half >> (i - 1))
    add("IR", "conv", 3, 1, s.inner[4], s.inner[4], half >> 4)
    for i in range(1, 5):
        add(f"ID{i}", "deconv", 3, 2, s.inner[5 - i], s.inner[4 - i], half >> (5 - i))
    add("T1", "conv", 3, 1, s.inner[0], s.trainer, half)
    add("T2", "conv", 3, 1, s.trainer, 1, half)
    add("O0", "conv", 5, 1, 2, low, side)
    add("O1", "conv", 3, 2, low, high, side)
    add("OR", "conv", 3, 1, high, high, half)
    add("OD1", "deconv", 3, 2, high, low, half)
    add("O2", "conv", 3, 1, low, low, side)
    add("O3", "conv", 3, 1, low, 1, side)
    return [row for row in rows if row.copies]


def count_parameters(shape: NetworkShape) -> dict[str, int]:
    """Count the trainable numbers of each network, on networks that take no memory.

    Args:
        shape: Shape of the networks.

    Returns:
        Numbers of `inner`, `trainer`, `outer`, and of all as `total`.

    Example:
        >>> count_parameters(NetworkShape.full())["total"]
        106163650
    """
    with torch.device("meta"):
        network = CompletionNetwork(shape)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in network.named_children()}
    return {**parts, "total": sum(parts.values())}


def check_side(*sides: int) -> None:
    """Raise if a side is not one that the networks can halve and double.

    Args:
        sides: Heights and widths in pixels.

    Raises:
        ValueError: If a side is no positive multiple of 32.
    """
    for side in sides:
        if side < SIDE_UNIT or side % SIDE_UNIT:
            near = max(1, round(side / SIDE_UNIT)) * SIDE_UNIT
            raise ValueError(f"sides must be multiples of {SIDE_UNIT} pixels, got {side}; crop or pad, e.g. to {near}.")


class Residual(nn.Module):
    """Add to the input what three layers make of it."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, channels, height, width) to the same shape."""
        return x + self.layers(x)


def _part(rows: list[LayerRow], has_bias: bool, generator: torch.Generator | None) -> dict[str, nn.Module]:
    """Build the layers and blocks of a network, by name."""

    def build(row: LayerRow) -> NormalisedConvolution:
        return NormalisedConvolution(
            row.channels_in,
            row.channels_out,
            row.kernel,
            row.stride,
            transposed=row.op == "deconv",
            weight_norm=row.weight_norm,
            has_bias=has_bias,
            mean_form=row.mean_form,
            slope=row.slope,
            generator=generator,
        )

    modules: dict[str, nn.Module] = {}
    for row in rows:
        if row.name[1] == "R":
            for i in range(row.copies // CONVOLUTIONS_PER_BLOCK):
                modules[f"{row.name[:2]}{i + 1}"] = Residual(*(build(row) for _ in range(CONVOLUTIONS_PER_BLOCK)))
        else:
            modules[row.name] = build(row)
    return modules


class Completion(NamedTuple):
    """Hold what the networks make of a scan."""

    half: Tensor
    """The auxiliary trainer's completion at half size, shape (batch, 1, height / 2, width / 2)."""
    full: Tensor
    """The outer generator's completion, shape (batch, 1, height, width); unbounded, trained towards [-1, 1]."""


class OuterGenerator(nn.Module):
    """Complete at full size, with the inner generator's features added at half size."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.first = nn.Sequential()
        self.rest = nn.Sequential()
        for name, layer in layers.items():
            (self.first if name in {"O0", "O1"} else self.rest).add_module(name, layer)

    def forward(self, inputs: Tensor, features: Tensor) -> Tensor:
        """Complete `inputs`, shape (batch, 2, height, width), helped by features of half their size."""
        return self.rest(self.first(inputs) + features)


class CompletionNetwork(nn.Module):
    """Complete a partial scan: inner generator at half size, auxiliary trainer, outer generator at full size.

    One backward pass of the sum of both losses gives every network its own: the trainer has no part in the full
    completion, the outer generator none in the half one, and the inner generator learns from both.

    Args:
        shape: Shape of the networks.
        generator: Source of the initial weights; none takes torch's own.

    Example:
        >>> network = CompletionNetwork(NetworkShape.eighth())
        >>> half, full = network(torch.zeros(1, 2, 64, 64))
        >>> half.shape[-1], full.shape[-1]
        (32, 64)
    """

    def __init__(self, shape: NetworkShape, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.shape = shape
        table = layer_table(shape)
        inner, trainer, outer = (
            _part([row for row in table if row.part == part], shape.has_biases, generator) for part in PARTS.values()
        )
        self.inner = nn.Sequential()
        self.trainer = nn.Sequential()
        for part, layers in ((self.inner, inner), (self.trainer, trainer)):
            for name, layer in layers.items():
                part.add_module(name, layer)
        self.outer = OuterGenerator(outer)

    def forward(self, inputs: Tensor) -> Completion:
        """Complete scans at half and full size.

        Args:
            inputs: Scan in [0, 1] and mask in [0, 1], shape (batch, 2, height, width), sides multiples of 32.

        Returns:
            Both completions.

        Raises:
            ValueError: If the shape is another.
        """
        features = self._features(inputs)
        return Completion(self.trainer(features), self.outer(inputs, features))

    def complete(self, inputs: Tensor) -> Tensor:
        """Complete scans at full size only: what a trained network is used for.

        Args:
            inputs: As in `forward`.

        Returns:
            Shape (batch, 1, height, width).
        """
        return self.outer(inputs, self._features(inputs))

    def _features(self, inputs: Tensor) -> Tensor:
        """Return the inner generator's features of every second pixel."""
        if inputs.ndim != 4 or inputs.shape[1] != 2:
            raise ValueError(
                f"inputs must have shape (batch, 2, height, width): scan, mask; got {tuple(inputs.shape)}."
            )
        check_side(inputs.shape[2], inputs.shape[3])
        return self.inner(inputs[..., ::2, ::2])


def build_network(
    shape: NetworkShape, seed: int, example: Tensor | None = None, *, channels_last: bool = True
) -> CompletionNetwork:
    """Build networks whose weights depend on nothing but shape, seed and example.

    Args:
        shape: Shape of the networks.
        seed: Seed of the weights.
        example: Input of the data-dependent initialisation, shape (1, 2, height, width); none starts with gains of 1,
            as the authors' code did.
        channels_last: Whether weights lie in channels-last order, which is faster.

    Returns:
        The networks on the CPU.
    """
    network = CompletionNetwork(shape, torch.Generator().manual_seed(seed))
    if channels_last:
        network = network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if example is not None:
        initialise_by_data(network, example)
    return network
