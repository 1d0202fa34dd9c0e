"""Examples of partial-STEM: one depends on the seed and its place in the run, never on what was trained before it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alrc_lab.data.scan import blur, simulate_scan, spiral_mask
from alrc_lab.data.stem import MicrographSet
from alrc_lab.experiments.partial_stem_policy import Targets, targets_of

SHOWN = 6
"""Held-out crops of which pictures are kept, spread evenly over all."""


class Pair(NamedTuple):
    """Hold what a network is given and what was there."""

    inputs: NDArray[np.float32]
    """Scan and mask, both in [0, 1], shape (2, side, side)."""
    truth: NDArray[np.float32]
    """The crop in [-1, 1], not blurred, shape (1, side, side)."""


class Examples(NamedTuple):
    """Hold scans, and what completions of them are compared with."""

    inputs: Tensor
    """Scan and mask, both in [0, 1], shape (batch, 2, side, side)."""
    targets: Targets


class HeldOutExample(NamedTuple):
    """Hold one held-out crop."""

    name: str
    """The image, and where in it."""
    is_shown: bool
    """Whether pictures of it are kept."""
    examples: Examples
    """Its scan, a batch of one."""


class Settings(Protocol):
    """Name what a stream needs to know of a configuration."""

    @property
    def crop_size(self) -> int:
        """Side of a crop in pixels."""
        ...

    @property
    def coverage(self) -> float:
        """Nominal share of pixels on the spiral."""
        ...

    @property
    def iterations(self) -> int:
        """Number of updates, one crop each."""
        ...

    @property
    def held_out_crops(self) -> int:
        """Largest number of test crops."""
        ...

    @property
    def seed(self) -> int:
        """Seed of crops, orientations and noise."""
        ...

    @property
    def device(self) -> str:
        """Device that trains."""
        ...


class Stream:
    """Serve partial scans of training crops in an order that depends on nothing but seed and position.

    A thread makes the next block while the current one is trained on.

    Args:
        config: Settings of the run.
        micrographs: Micrographs with crops of `crop_size`.
    """

    updates_per_block = 16

    def __init__(self, config: Settings, micrographs: MicrographSet) -> None:
        self.config, self.micrographs = config, micrographs
        self.mask = spiral_mask(config.crop_size, config.coverage)
        self._worker = ThreadPoolExecutor(1)
        self._made: dict[int, Future[list[Pair]]] = {}

    def block(self, index: int) -> Examples:
        """Return the examples of `updates_per_block` updates, in order, on the device that trains."""
        stop = min(index + 2, -(-self.config.iterations // self.updates_per_block))
        self._made = {i: self._made.get(i) or self._worker.submit(self._pairs, i) for i in range(index, stop)}
        return join(self._made[index].result(), self.config.device)

    def held_out(self) -> Iterator[HeldOutExample]:
        """Yield the scans of `held_out_examples`."""
        wait(self._made.values())  # one thread at a time reads micrographs
        return held_out_examples(self.micrographs, self.mask, self.config.held_out_crops, self.config.device)

    def _pairs(self, index: int) -> list[Pair]:
        """Make the examples of a block."""
        first, pairs = index * self.updates_per_block, list[Pair]()
        for position in range(first, first + self.updates_per_block):
            rng = np.random.default_rng([1, position, self.config.seed])
            pairs.append(make_pair(self.micrographs.sample(rng), self.mask, rng))
        return pairs


def held_out_examples(
    micrographs: MicrographSet, mask: NDArray[np.float32], most: int, device: str = "cpu"
) -> Iterator[HeldOutExample]:
    """Yield one scan of each held-out crop; the same noise for everybody who completes it.

    Args:
        micrographs: Micrographs with crops of the mask's size.
        mask: Dwell times in [0, 1], shape (side, side).
        most: Largest number of crops, spread evenly over all.
        device: Where tensors go.
    """
    indices = micrographs.held_out_indices("test", most)
    shown = {i * len(indices) // SHOWN for i in range(SHOWN)}
    for i, index in enumerate(indices):
        pair = make_pair(micrographs.crop("test", index), mask, np.random.default_rng([2, i]))
        yield HeldOutExample(micrographs.name_of("test", index), i in shown, join([pair], device))


def join(pairs: list[Pair], device: str) -> Examples:
    """Make a batch on a device."""
    inputs, truths = (torch.from_numpy(np.stack(part)) for part in zip(*pairs, strict=True))
    return Examples(inputs.to(device), targets_of(truths.to(device)))


def make_pair(truth: NDArray[np.float32], mask: NDArray[np.float32], rng: np.random.Generator) -> Pair:
    """Scan a crop as the authors did.

    Args:
        truth: The crop in [-1, 1], shape (side, side).
        mask: Dwell times in [0, 1], same shape.
        rng: Source of one uniform number for each pixel.

    Returns:
        Scan with mask, and truth.
    """
    scan = simulate_scan(truth, blur(truth, renormalise=True), mask, rng.random(mask.shape))
    return Pair(np.stack([scan, mask]), truth[None])
