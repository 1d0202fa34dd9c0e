"""A layer that is wrong where there are replicas; in a file of its own, since a process of its own must import it."""

from __future__ import annotations

from typing import Any
from unittest import mock

import keras

from alrc.keras import ALRC, loss


class LearnsAlone(ALRC):
    """Learn from the losses of one replica: the others are not asked, or, where all are one batch, masked."""

    def call(self, losses: Any, mask: Any = None, training: Any = None) -> Any:
        if mask is not None:
            mask &= keras.ops.arange(losses.shape[0]) < losses.shape[0] // 2
        with mock.patch.object(loss, "_sum_over_replicas", return_value=None):
            return super().call(losses, mask=mask, training=training)
