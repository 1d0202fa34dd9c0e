"""Find, check, fetch or make the images that experiments train on.

Imports the standard library, numpy and platformdirs, and scikit-image only when the embedded patches are made;
never a deep-learning framework, nor the runner, the report or an experiment. The user's page is docs/data.md.
"""

from alrc_lab.data.cifar10 import data_status, fetch_cifar10, load_cifar10
from alrc_lab.data.image_set import DataError, ImageSet

__all__ = ["DataError", "ImageSet", "data_status", "fetch_cifar10", "load_cifar10"]
