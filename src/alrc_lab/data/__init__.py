"""Find, check, fetch or make the images that experiments train on.

Imports the standard library, numpy and platformdirs, and what reads, draws or simulates images only when that is
done; never a deep-learning framework, nor the runner, the report or an experiment. The user's pages are docs/data.md,
docs/stem-data.md and docs/simulated-data.md.
"""

from alrc_lab.data.cifar10 import data_status, fetch_cifar10, load_cifar10
from alrc_lab.data.image_set import DataError, ImageSet
from alrc_lab.data.stem import MicrographSet, load_micrographs, micrograph_status

__all__ = [
    "DataError",
    "ImageSet",
    "MicrographSet",
    "data_status",
    "fetch_cifar10",
    "load_cifar10",
    "load_micrographs",
    "micrograph_status",
]
