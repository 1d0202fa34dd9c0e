"""What a stabiliser must show of itself to be tested: five methods and a few declared facts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Make", "Outcome", "Stabiliser", "Traits", "checked", "feed"]

METHODS = ("step", "evaluate", "limit", "save", "load")
KINDS = ("loss", "gradient", "step")
GRANULARITIES = ("element", "unit", "tensor", "all")
DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Traits:
    """Declare what a stabiliser is and what it claims; nothing is asked that it does not claim.

    Args:
        kind: What it acts on: `"loss"` limits losses, `"gradient"` scales gradients, `"step"` rejects whole updates.
        granularity: What gets a factor of its own: `"element"`, `"unit"` (row or filter), `"tensor"` or `"all"`.
        dtypes: Precisions of its input, names such as `"float32"` and `"bfloat16"`.
        is_signed: Whether it claims losses of any sign, and decisions that do not change when a constant is added.
        is_accumulating: Whether it claims one update per optimiser step however many micro-batches make it.

    Raises:
        ValueError: If a fact is none of those named; the message says which are.

    Example:
        >>> Traits(kind="loss").granularity
        'element'
    """

    kind: Literal["loss", "gradient", "step"]
    granularity: Literal["element", "unit", "tensor", "all"] = "element"
    dtypes: tuple[str, ...] = ("float32",)
    is_signed: bool = False
    is_accumulating: bool = True

    @property
    def is_elementwise(self) -> bool:
        """Whether each element of a batch has a factor of its own."""
        return self.granularity == "element"

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("kind", self.kind, KINDS),
            ("granularity", self.granularity, GRANULARITIES),
            *(("dtypes", dtype, DTYPES) for dtype in self.dtypes),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}.")


class Outcome(NamedTuple):
    """Say what became of one micro-batch, as measured in the real framework and not as the stabiliser reports it."""

    value: NDArray[Any]
    """Forward value of each loss after limiting, shape of the micro-batch; NaN where there is none (gradients)."""
    factor: NDArray[Any]
    """What multiplied the gradient of each element, shape of the micro-batch; NaN if the gradient became NaN."""
    cosine: float = 1.0
    """Cosine between the gradient before and after, in [-1, 1]; 1 for losses, whose direction is autograd's."""


class Stabiliser(Protocol):
    """Show a stabiliser as a stream of magnitudes with factors coming back.

    A magnitude is a loss for a loss limiter, a gradient norm for a clipper, and both for a step skipper. One step has
    one or more micro-batches, arrays of shape (elements,). For gradients and steps the magnitude of the step is the
    mean of all its elements, as with a mean loss. Two more methods are optional: `skip(micro_batches)` goes forward and
    backward without an optimiser step, as a gradient scaler does; `ranks(shards)` runs each shard's stream in a
    process of its own and returns, for each process, a list of (factor, limit after the step). So are `reads()`, the
    names of what read a tensor's value in a step, and `traces()`, why it cannot be compiled into one graph, or "".
    """

    traits: Traits

    def step(self, micro_batches: Sequence[NDArray[Any]], /) -> list[Outcome]:
        """Take one optimiser step and return what became of each micro-batch."""
        ...

    def evaluate(self, batch: NDArray[Any], /) -> None:
        """Look at a batch as in validation: eval mode, no gradient, no step."""
        ...

    def limit(self) -> float:
        """Return the magnitude above which the next one would be reduced; inf if none would."""
        ...

    def save(self) -> Any:
        """Return what a checkpoint would keep; None for nothing."""
        ...

    def load(self, state: Any, /) -> None:
        """Take what `save` of another object returned."""
        ...


Make = Callable[[str], Stabiliser]
"""Make a fresh stabiliser whose input has the named precision: `make("float32")`."""


def checked(make: Make, dtype: str = "float32") -> Stabiliser:
    """Make a stabiliser and say clearly what it lacks, if it lacks something."""
    made: Any = make(dtype)
    missing = [name for name in METHODS if not callable(getattr(made, name, None))]
    if missing:
        raise TypeError(
            f"{type(made).__name__} lacks {', '.join(f'{name}()' for name in missing)}; a stabiliser has the methods "
            f"{', '.join(f'{name}()' for name in METHODS)}, see alrc.conformance.Stabiliser."
        )
    if not isinstance(getattr(made, "traits", None), Traits):
        raise TypeError(
            f"{type(made).__name__}.traits must be an alrc.conformance.Traits that declares what it is, got "
            f"{getattr(made, 'traits', None)!r}."
        )
    batches = [np.array([1.0, 1.1]), np.array([0.9])]
    outcomes = made.step(batches)
    is_list = isinstance(outcomes, list) and all(isinstance(outcome, Outcome) for outcome in outcomes)
    shapes = [(np.shape(outcome.value), np.shape(outcome.factor)) for outcome in outcomes] if is_list else outcomes
    if shapes != [((2,), (2,)), ((1,), (1,))]:
        raise TypeError(
            f"{type(made).__name__}.step must return one Outcome per micro-batch with a value and a factor for each "
            f"element; for micro-batches of 2 and 1 elements it returned {shapes}."
        )
    limit = made.limit()
    if isinstance(limit, bool) or not isinstance(limit, float | int) or math.isnan(limit):
        raise TypeError(f"{type(made).__name__}.limit must return a number, or inf for no limit; got {limit!r}.")
    return make(dtype)


def feed(stabiliser: Stabiliser, stream: NDArray[Any]) -> NDArray[Any]:
    """Give a stabiliser each row of a stream as one step, and return the factors, shape of the stream."""
    return np.array([stabiliser.step([row])[0].factor for row in stream], dtype=np.float64)
