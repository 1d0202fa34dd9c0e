"""What every data set of the laboratory looks like to an experiment: images, and where they came from."""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Source = Literal["path", "ALRC_DATA", "cache", "embedded"]
Split = Literal["train", "test"]


class DataError(ValueError):
    """Say in one line what is wrong with a data set, which file, and what to do."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Hold images together with their provenance, so that no number is ever printed without its data.

    Attributes:
        name: Words for tables and figures, such as "CIFAR-10".
        slug: The same for file names, with the image count, such as "cifar10-8068".
        source: The place in the search order that held the images.
        path: The folder they were read from; "embedded" for the embedded default.
        images: uint8, shape (N, 3, 32, 32), RGB, C-contiguous; the caller may write to it.
        labels: uint8, shape (N,), or None where there are none.
        sha256: Of the file bytes read, in file order; for the embedded default, of the image bytes.
        split: "train" or "test".
        note: One plain sentence: how many images, of what.
        searched: What was looked for first and not found, one sentence a place.
    """

    name: str
    slug: str
    source: Source
    path: str
    images: NDArray[np.uint8] = field(repr=False)
    labels: NDArray[np.uint8] | None = field(repr=False)
    sha256: str
    split: Split
    note: str
    searched: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        """Return everything but the pixels, ready for JSON: what a run records as its `inputs`."""
        return {
            "name": self.name,
            "slug": self.slug,
            "source": self.source,
            "path": self.path,
            "images": len(self.images),
            "sha256": self.sha256,
            "split": self.split,
            "note": self.note,
            "searched": list(self.searched),
        }

    def summary(self) -> str:
        """Return one line to print: name, image count, split, source, path, start of the checksum."""
        place = self.source if self.path == self.source else f"{self.source}: {self.path}"
        return f"{self.name}, {len(self.images):,} {self.split} images ({place}), sha256 {self.sha256[:12]}"

    def __str__(self) -> str:
        return self.summary()
