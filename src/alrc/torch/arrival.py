"""Bring numbers from a device to the host without waiting for them.

Exists because both the step guard and the monitor look at a device from afar: they start a copy, go on, and read it
when it has arrived. Knows nothing of what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Arrival"]


class Arrival:
    """Copy tensors of one device into memory of the host, one time after the other.

    From a CUDA device into pinned memory, behind an event. On a CPU there is nothing to copy: the tensors themselves
    are what arrives, so read them before they change. Other devices offer no such copy, and `send` waits for them.

    Args:
        tensors: What is copied at each `send`: always these, changed in place.
        event: Stands for the CUDA event, in tests.
    """

    def __init__(self, tensors: Sequence[Tensor], event: Any = None) -> None:
        device = tensors[0].device
        self._event = torch.cuda.Event() if device.type == "cuda" else event
        self.is_immediate = self._event is None and device.type != "meta"
        """Whether what is sent has arrived at once."""
        self.waits = self.is_immediate and device.type != "cpu"
        """Whether `send` waits for the device."""
        self.is_under_way = False
        """Whether something was sent and has not been read."""
        self._tensors = self._copies = list(tensors)
        if self._event is not None or self.waits:
            self._copies = [torch.zeros_like(tensor, device="cpu") for tensor in tensors]
        if device.type == "cuda":
            self._copies = [copy.pin_memory() for copy in self._copies]
        # The meta device holds nothing, and so nothing ever arrives from it.
        self._views = None if device.type == "meta" else [copy.numpy() for copy in self._copies]

    def send(self) -> None:
        """Start a copy of the tensors as the work that was given to the device so far will leave them."""
        self.is_under_way = True
        if self._copies is not self._tensors:
            for copy, tensor in zip(self._copies, self._tensors, strict=True):
                copy.copy_(tensor, non_blocking=self._event is not None)
        if self._event is not None:
            self._event.record()

    def read(self, *, wait: bool = False) -> list[np.ndarray] | None:
        """Return what has arrived, once.

        Args:
            wait: Whether to wait for what is under way.

        Returns:
            The memory of the copies, valid until the next `send`; None if nothing has arrived.
        """
        if not self.is_under_way:
            return None
        if self._event is not None:
            if wait:
                self._event.synchronize()
            elif not self._event.query():
                return None
        self.is_under_way = False
        return self._views

    def forget(self) -> None:
        """Do not read what is under way."""
        self.is_under_way = False
