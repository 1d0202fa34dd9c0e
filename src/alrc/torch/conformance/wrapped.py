"""What the wrapped kinds share: checkpoints, the probed limit, the watch for readings of tensors, the compiler."""

from __future__ import annotations

import copy
import io
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from alrc.conformance import Outcome, Traits

__all__ = ["Wrapped"]

# numpy() exists only where memory is the host's, so there is nothing to wait for.
_READING_METHODS = ("cpu", "tolist")
_READING_OPERATORS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique")
_INDEXING = ("index", "index_put", "index_put_")


class _Watch(TorchDispatchMode):
    """Note the operators whose result depends on values in memory."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        is_mask = name in _INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in _READING_OPERATORS or is_mask:
            self.seen.append({"_local_scalar_dense": "item"}.get(name, name))
        return func(*args, **(kwargs or {}))


@contextmanager
def _watching(seen: list[str]) -> Iterator[None]:
    """Note every reading of a tensor's value."""

    def noting(name: str) -> Callable[..., Any]:
        original = getattr(Tensor, name)

        def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return original(self, *args, **kwargs)

        return method

    with ExitStack() as patches:
        for name in _READING_METHODS:
            patches.enter_context(mock.patch.object(Tensor, name, noting(name)))
        patches.enter_context(_Watch(seen))
        yield


class Wrapped(ABC):
    """What the three kinds share: optional checkpoints, the probed limit, the watch, the compiler."""

    def __init__(self, thing: Any, traits: Traits, dtype: str) -> None:
        self.thing, self.traits = thing, traits
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.level = 1.0
        self.watch: Callable[[], AbstractContextManager[Any]] = nullcontext

    def step(self, micro_batches: Sequence[NDArray[Any]], /) -> list[Outcome]:
        """Take one step; remember the level of the magnitudes for the probe."""
        top = max((float(np.max(np.abs(batch), initial=0.0)) for batch in micro_batches), default=0.0)
        self.level = top if 0 < top < 1e30 else self.level
        return self.act(micro_batches)

    @abstractmethod
    def act(self, micro_batches: Sequence[NDArray[Any]]) -> list[Outcome]:
        """Take one step."""

    @abstractmethod
    def once(self, call: Callable[..., Any]) -> object:
        """Make one step through `call`, which a compiler may have made."""

    def probe(self) -> float:
        """Find out on a copy what a large magnitude is reduced to."""
        large = 1e6 * self.level
        outcome = copy.deepcopy(self).act([np.array([large])])[0]
        reduced = float(outcome.value[0] if self.traits.kind == "loss" else outcome.factor[0] * large)
        return reduced if reduced < large * (1 - 1e-6) else math.inf

    def save(self) -> bytes | None:
        """Return the state dictionary as a file would hold it."""
        if not hasattr(self.thing, "state_dict"):
            return None
        file = io.BytesIO()
        torch.save(self.thing.state_dict(), file)
        return file.getvalue()

    def load(self, state: bytes | None, /) -> None:
        """Read the file."""
        if state is not None:
            self.thing.load_state_dict(torch.load(io.BytesIO(state), weights_only=True))

    def elsewhere(self) -> Wrapped | None:
        """Return a fresh one on the meta device, if it can be there."""
        return None

    def reads(self) -> list[str]:
        """Name what reads a tensor's value in three steps.

        Then look on the meta device, which holds no numbers: the way may be another there than on a CPU.
        """
        seen: list[str] = []
        self.watch = lambda: _watching(seen)
        for _ in range(3):
            self.step([np.array([1.0, 2.0])])
        self.watch = nullcontext
        other = None if seen else self.elsewhere()
        if other is not None:
            try:
                for _ in range(3):
                    other.once(other.thing_to_compile())
            except (RuntimeError, NotImplementedError) as error:
                if "same device" not in str(error):  # a state that does not follow its parameters is another matter
                    seen.append(f"on the meta device ({str(error).splitlines()[0][:60]})")
        return sorted(set(seen))

    def traces(self) -> str:
        """Say why it cannot be compiled into one graph that serves every step; empty if it can."""
        torch.compiler.reset()
        try:
            with warnings.catch_warnings():
                # The tracing compiler warns about its own way of making an autograd context.
                warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
                compiled = torch.compile(self.thing_to_compile(), fullgraph=True, backend="eager", dynamic=False)
                for _ in range(3):
                    self.once(compiled)
                with torch.compiler.set_stance("fail_on_recompile"):
                    for _ in range(10):
                        self.once(compiled)
        except Exception as error:
            if "fail_on_recompile" in str(error):
                return "recompiles while nothing but the numbers changes"
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:80]}"
        finally:
            torch.compiler.reset()
        return ""

    def thing_to_compile(self) -> Callable[..., Any]:
        """Return what is handed to the compiler."""
        return self.thing
