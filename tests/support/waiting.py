"""Nets that catch whatever waits for a device: methods that read a tensor, and the operators behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["RefuseReading", "WaitedError", "refusing"]

READING = (
    *("item", "cpu", "numpy", "tolist", "nonzero", "__array__", "__contains__"),
    *("__bool__", "__float__", "__int__", "__index__", "__complex__", "__iter__", "__len__"),
)


class WaitedError(Exception):
    """A tensor was read."""


@contextmanager
def refusing(*, is_on_host: bool = False) -> Iterator[None]:
    """Make every method that reads a tensor raise; on the host its memory may be looked at as numpy sees it."""

    def refuse(name: str) -> Callable[..., Any]:
        def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            raise WaitedError(name)

        return method

    with pytest.MonkeyPatch.context() as patch:
        for name in READING:
            if not (is_on_host and name == "numpy"):
                patch.setattr(Tensor, name, refuse(name))
        yield


class RefuseReading(TorchDispatchMode):
    """Refuse the operators whose result depends on the values in memory."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "item")
    INDEXING = ("index", "index_put", "index_put_")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = [i for i in args[1] if i is not None and i.dtype == torch.bool] if name in self.INDEXING else []
        if name in self.NAMES or masks:  # A mask is turned into positions below the dispatcher.
            raise WaitedError(name)
        return func(*args, **(kwargs or {}))
