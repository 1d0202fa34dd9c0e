"""Wrap what limits losses in JAX for `alrc.conformance`, in one line, and measure what it really does.

Factors are the derivatives that `jax.vjp` finds. Not imported by `alrc.jax`, since training needs none of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.errors import JAXTypeError
from jax.sharding import PartitionSpec
from numpy.typing import NDArray

from alrc.conformance import Make, Outcome, Traits

__all__ = ["wrap_loss_limiter"]

RANKS = "ranks"
"""Name of the axis that stands for processes."""


def wrap_loss_limiter(
    rule: Any,
    *,
    jit: bool = True,
    dtypes: Sequence[str] = ("float32", "bfloat16", "float16"),
    is_signed: bool = False,
    is_accumulating: bool = True,
    granularity: Any = "element",
    synced: Callable[[str], Any] | None = None,
) -> Make:
    """Wrap what limits losses: `rule.init()` makes a state, `rule(losses, state)` returns limited losses and the next.

    Micro-batches go through `observe` and `commit` if it has these, else each is a call. `limit(state)` is used if
    there is one, else the limit is probed; `state_dict` and `load_state_dict` likewise, else the state itself is kept.

    Args:
        rule: The limiter; `ALRC()` itself, for example. It must be pure: one is used for all streams.
        jit: Whether to compile it; False runs it operation by operation, which takes much longer.
        dtypes: Precisions of losses to try.
        is_signed: Whether it claims losses of any sign.
        is_accumulating: Whether it claims one update per optimiser step.
        granularity: What gets a factor of its own.
        synced: Makes, for the name of a mapped axis, a limiter that takes a mask as its third argument and shares its
            statistics along that axis: of `shard_map` where there are as many devices as shards, else of `vmap`.

    Returns:
        What `alrc.conformance.run` takes.

    Example:
        >>> from alrc.conformance import run
        >>> from alrc.jax import ALRC
        >>> print(run(wrap_loss_limiter(ALRC()), "ALRC()", tests=["T1"]))
        ALRC()
        T1 gradient truth       pass
    """
    traits = Traits("loss", granularity, tuple(dtypes), is_signed, is_accumulating)
    steps = _Steps(rule, jit)
    if synced is None:
        return lambda dtype: _Losses(steps, traits, dtype)
    return lambda dtype: _SyncedLosses(steps, traits, dtype, synced(RANKS))


def _judge(rule: Any, losses: Any, state: Any, *others: Any) -> tuple[Any, Any, Any]:
    """Call; return limited losses, the derivative of their sum by each, and what else came back."""
    limited, back, other = jax.vjp(lambda losses: rule(losses, state, *others), losses, has_aux=True)
    return limited, back(jnp.ones_like(limited))[0], other


class _Steps:
    """Hold the functions of a limiter, so that all streams share what has been compiled."""

    def __init__(self, rule: Any, jit: bool) -> None:
        compiled: Callable[..., Any] = jax.jit if jit else lambda function: function
        self.rule = rule
        self.call = compiled(partial(_judge, rule))
        self.is_observing = hasattr(rule, "observe") and hasattr(rule, "commit")
        if self.is_observing:
            self.observe, self.commit = compiled(partial(_judge, rule.observe)), compiled(rule.commit)
        self.limit = compiled(rule.limit) if hasattr(rule, "limit") else None

    def train(self, state: Any, losses: Any) -> tuple[Any, tuple[Any, Any]]:
        """Go through one training step: what a compiler is given."""
        limited, gradient, after = _judge(self.rule, losses, state)
        return after, (limited, gradient)


class _Losses:
    """Drive a loss limiter and carry its state."""

    def __init__(self, steps: _Steps, traits: Traits, dtype: str) -> None:
        self.steps, self.traits, self.dtype = steps, traits, jnp.dtype(dtype)
        self.state = steps.rule.init()
        self.level = 1.0

    def step(self, micro_batches: Sequence[NDArray[Any]], /) -> list[Outcome]:
        """Limit each micro-batch, then update once."""
        top = max((float(np.max(np.abs(batch), initial=0.0)) for batch in micro_batches), default=0.0)
        self.level = top if 0 < top < 1e30 else self.level
        outcomes, self.state = self.judge(micro_batches)
        return outcomes

    def judge(self, micro_batches: Sequence[NDArray[Any]], *when: Any) -> tuple[list[Outcome], Any]:
        """Return what becomes of micro-batches, and the state after them; `when` says whether they are committed."""
        outcomes, seen, state = [], [], self.state
        is_whole = not self.steps.is_observing or (len(micro_batches) == 1 and not when)
        for batch in micro_batches:
            losses = jnp.asarray(np.asarray(batch), self.dtype)
            if is_whole:
                limited, gradient, state = self.steps.call(losses, state)
            else:
                limited, gradient, one = self.steps.observe(losses, state)
                seen.append(one)
            outcomes.append(Outcome(np.asarray(limited, np.float64), np.asarray(gradient, np.float64)))
        return outcomes, state if is_whole else self.steps.commit(seen, state, *when)

    def skip(self, micro_batches: Sequence[NDArray[Any]], /) -> None:
        """Go forward and backward, and tell the limiter, where it can be told, that no step was made."""
        if self.steps.is_observing:
            self.state = self.judge(micro_batches, jnp.array(False))[1]
        else:
            self.judge(micro_batches)

    def evaluate(self, batch: NDArray[Any], /) -> None:
        """Look at a batch and drop the state that comes back."""
        self.judge([batch])

    def limit(self) -> float:
        """Read the limit, or find out what a large loss is reduced to."""
        if self.steps.limit is not None:
            return float(self.steps.limit(self.state))
        large = 1e6 * self.level
        reduced = float(self.judge([np.array([large])])[0][0].value[0])
        return reduced if reduced < large * (1 - 1e-6) else math.inf

    def save(self) -> Any:
        """Return the state as it is stored."""
        stored = getattr(self.steps.rule, "state_dict", jax.device_get)
        return stored(self.state)

    def load(self, state: Any, /) -> None:
        """Take a stored state."""
        restored = getattr(self.steps.rule, "load_state_dict", partial(jax.tree.map, jnp.array))
        self.state = restored(state)

    def reads(self) -> list[str]:
        """Name what a compiled step needs the host for: callbacks, values under trace, transfers."""
        losses, state = jnp.ones(2, self.dtype), self.state
        try:
            found = re.findall(r"\b\w*callback\w*\b(?=\[)", str(jax.make_jaxpr(self.steps.train)(state, losses)))
            step = jax.jit(self.steps.train)
            state = step(state, losses)[0]
            with jax.transfer_guard("disallow"):
                for _ in range(3):
                    state = step(state, losses)[0]
        except JAXTypeError as error:
            return [type(error).__name__]
        except Exception as error:
            if "isallowed" not in str(error):
                raise
            return [str(error).splitlines()[0][:60]]
        return sorted(set(found))

    def traces(self) -> str:
        """Say why it is not one program that serves every step, in a loop and in a scan; empty if it is."""
        count = 0

        def counted(state: Any, losses: Any) -> Any:
            nonlocal count
            count += 1
            return self.steps.train(state, losses)

        stream = jnp.asarray([[1.0, 2.0, 3.0, 1.0]] * 10, self.dtype)
        step, state = jax.jit(counted), self.steps.rule.init()
        try:
            for losses in stream:
                state, _ = step(state, losses)
            if count > 1:
                return f"is traced {count} times while nothing but the numbers changes"
            scanned, _ = jax.jit(lambda state: lax.scan(counted, state, stream))(self.steps.rule.init())
        except Exception as error:
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:80]}"
        close = jax.tree.map(lambda one, other: np.allclose(one, other, rtol=1e-4), scanned, state)
        return "" if all(jax.tree.leaves(close)) else "a scan ends in another state than a loop"


class _SyncedLosses(_Losses):
    """Drive a loss limiter that can share its statistics, on as many devices as there are shards."""

    def __init__(self, steps: _Steps, traits: Traits, dtype: str, synced: Any) -> None:
        super().__init__(steps, traits, dtype)
        self.synced = synced

    def ranks(self, shards: Sequence[Sequence[NDArray[Any]]], /) -> list[list[tuple[NDArray[Any], float]]]:
        """Run each shard's stream on a device of its own; what is shorter than the others is padded and masked."""
        number = len(shards)
        widths = [[len(batch) for batch in steps] for steps in zip(*shards, strict=True)]
        losses = np.full((len(widths), number, max(map(max, widths))), np.nan)
        masks = np.zeros(losses.shape, bool)
        for rank, stream in enumerate(shards):
            for i, batch in enumerate(stream):
                losses[i, rank, : len(batch)], masks[i, rank, : len(batch)] = batch, True

        def step(state: Any, given: Any) -> Any:
            _, gradient, after = _judge(self.synced, given[0], state, given[1])
            return after, (gradient, self.synced.limit(after))

        def follow(losses: Any, masks: Any) -> Any:
            return lax.scan(step, self.synced.init(), (losses, masks))[1]

        run = jax.vmap(follow, 1, 1, axis_name=RANKS)
        if jax.device_count() >= number:
            mesh = jax.sharding.Mesh(np.array(jax.devices()[:number]), (RANKS,))
            part = PartitionSpec(None, RANKS)
            member = partial(jax.tree.map, lambda value: value[:, 0])

            def on_device(*given: Any) -> Any:
                return jax.tree.map(lambda value: value[:, None], follow(*member(given)))

            run = jax.shard_map(on_device, mesh=mesh, in_specs=part, out_specs=part, check_vma=False)
        factors, limits = map(np.asarray, jax.jit(run)(jnp.asarray(losses, self.dtype), masks))
        return [
            [(factors[i, rank, : each[rank]].astype(float), float(limits[i, rank])) for i, each in enumerate(widths)]
            for rank in range(number)
        ]
