"""What a limiter remembers, and when: its state as buffers, and the three moments at which a batch may enter it.

A batch enters at once, or when the optimiser steps (`attachment.py`), or when the other processes have told theirs
(`processes.py`). `loss.py` says what becomes of the losses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from alrc import rules
from alrc.rules import Batch
from alrc.rules.stored import STATE_VERSIONS, check_version
from alrc.torch.attachment import Attachment
from alrc.torch.host import HOST, is_on_host, number_of
from alrc.torch.ops import EAGER
from alrc.torch.processes import Joining, group_of

__all__ = ["Learner", "quiet"]


def quiet() -> Any:
    """Keep numpy quiet about overflow, which the rule deals with (S8)."""
    return np.errstate(all="ignore")


class Learner(nn.Module):
    """Hold the state of a rule and take batches into it.

    Args:
        rule: The rule.
        sync: True, or a process group, to learn from the batches of all processes.
    """

    mean: Tensor
    var: Tensor
    count: Tensor
    version: Tensor

    def __init__(self, rule: rules.ALRC, sync: Any) -> None:
        super().__init__()
        self.rule, self._sync = rule, sync
        self._attachment: Attachment | None = None
        self._joining: Joining | None = None
        self._seen: list[Any] = [None]
        self._places: list[int] = []
        self._views: list[Any] = []
        start = rule.init()
        self._kind: Any = type(start)
        for name, value in zip(start._fields, start, strict=True):
            dtype = torch.int64 if name == "count" else torch.float32
            self.register_buffer(name, torch.tensor(value, dtype=dtype))
        # A buffer, not module metadata: it survives every checkpoint format that stores tensors.
        self.register_buffer("version", torch.tensor(STATE_VERSIONS[self._kind], dtype=torch.int64))
        self.register_state_dict_pre_hook(Learner._settle)

    def attach(self, optimizer: torch.optim.Optimizer) -> Self:
        """Update the moments once for each step of an optimiser, instead of once for each call (S23).

        A loss is observed when its gradient has been computed, and enters the moments when the optimiser steps: k
        micro-batches equal one batch; what activation checkpointing computes again, evaluations without a backward
        pass, and the later evaluations of a closure count once or not at all; skipped steps commit nothing. Whether
        a step was skipped is read from `optimizer.found_inf`, where loss scalers and `StepGuard` leave it. One that
        was not made at all is known by its gradients, which are None; call `discard()` if you zero them in place, and
        in compiled code, where losses are observed as soon as they are limited.

        Attach it for exact gradients under reentrant checkpointing, which else holds what it computes again against
        moments that have moved on.

        Args:
            optimizer: The optimiser that steps on these losses.

        Returns:
            This module.
        """
        self.detach()
        self._attachment = Attachment(optimizer, self._commit_step)
        return self

    def detach(self) -> None:
        """Undo `attach`: each call updates the moments again."""
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None

    def discard(self) -> None:
        """Forget what was observed since the last step; done for you where gradients have been set to None."""
        if self._attachment is not None:
            self._attachment.discard()

    def idle(self) -> None:
        """Tell the other processes that this one has no losses for this call; they wait for each other.

        Only needed with `sync` while not attached, where a process leaves out a call that others make.
        """
        # As in a call: what a backward pass repeats has been told already.
        if self._group is None or self._attachment is not None or torch._C._current_graph_task_id() != -1:
            return
        self._settle()
        on_host = self._is_on_host
        with torch.no_grad():
            state = self._state(on_host)
            self._take(self._nothing(state), state, on_host, None)

    @property
    def limit(self) -> Tensor:
        """L_max for the next losses, 0-d; inf while nothing can be limited."""
        self._settle()
        with torch.no_grad():
            return self.rule.limit(self._state(False), EAGER)

    @property
    def mu1(self) -> Tensor:
        """Running mean of the losses, 0-d."""
        return self.mean.clone()

    @property
    def mu2(self) -> Tensor:
        """Running mean of the squared losses, 0-d."""
        return self.var + self.mean * self.mean

    def __getattr__(self, name: str) -> Any:
        """Finish an update that still waits for other processes before somebody reads the state."""
        if name in ("mean", "var", "count", "rate", "recent"):
            self._settle()
        return super().__getattr__(name)

    @property
    def _group(self) -> Any:
        """Process group to learn with, None where this process is alone."""
        return None if self._sync is False else group_of(self._sync)

    def _state(self, on_host: bool) -> Any:
        """Return the state, as tensors, or as numpy numbers that share no memory with it."""
        if on_host:
            return self._kind(*[view[()] for view in self._host_views()])
        buffers: Any = self._buffers
        return self._kind(*(buffers[name] for name in self._kind._fields))

    def _write(self, state: Any, on_host: bool) -> None:
        """Write a new state in place: graphs, replicas and views of it see the update."""
        if on_host:
            for view, value in zip(self._host_views(), state, strict=True):
                view[...] = value
            return
        buffers: Any = self._buffers
        for name, value in zip(self._kind._fields, state, strict=True):
            buffers[name].copy_(value)

    def _host_views(self) -> list[Any]:
        """Return the state's buffers as numpy sees them; kept, since making them costs as much as using them."""
        buffers: Any = self._buffers
        # A view keeps its memory, so no other tensor can come to lie at the same place.
        places = [buffers[name].data_ptr() for name in self._kind._fields]
        if self._places != places:
            self._places, self._views = places, [buffers[name].numpy() for name in self._kind._fields]
        return self._views

    @property
    def _is_on_host(self) -> bool:
        """Whether the state lies in memory that numpy can see."""
        return is_on_host(self._buffers["mean"])

    def _take(self, batch: Batch, state: Any, on_host: bool, when: Any) -> None:
        """Take a batch into the state, now or when the other processes have told theirs."""
        ops = HOST if on_host else EAGER
        group = self._group
        if group is None:
            if when is not None:
                when = when.numpy() == 0 if on_host else when == 0
            with quiet():
                self._write(self.rule.commit(batch, state, ops, when), on_host)
            return
        center = np.float64(state.mean) if on_host else state.mean.double()
        wide = Batch(*(None if part is None else (np.float64(part) if on_host else part.double()) for part in batch))
        with quiet():
            sums = wide.sums(center, ops)
        self._joining = Joining(torch.as_tensor(sums), group, when)

    def _commit_step(self, pending: list[Batch], found_inf: Any) -> None:
        """Take in what was observed during a step of the optimiser."""
        self._settle()
        on_host = self._is_on_host
        if not pending and self._group is None:
            return
        with torch.no_grad():
            state = self._state(on_host)
            ops = HOST if on_host else EAGER
            if on_host:  # compiled code observes tensors everywhere
                pending = [Batch(*(number_of(x) if isinstance(x, Tensor) else x for x in batch)) for batch in pending]
            when = None
            if found_inf is not None:
                when = torch.as_tensor(found_inf).detach().reshape(()).clone().to(self.version.device)
            with quiet():
                batch = Batch.merged(pending or [self._nothing(state)], ops)
            self._take(batch, state, on_host, when)

    def _nothing(self, state: Any) -> Batch:
        """Return the batch of no losses."""
        return Batch(*[0 * state.mean] * (7 if self.rule.is_auto else 4))

    def _settle(self, *_: Any) -> None:
        """Wait for the other processes and take in what all have measured."""
        joining = self.__dict__.get("_joining")
        if joining is None:
            return
        self._joining = None
        on_host = self._is_on_host
        state = self._state(on_host)
        sums: Any = joining.wait()
        when = joining.when
        if on_host:
            sums = sums.numpy()
            when = None if when is None else when.numpy()
        with torch.no_grad(), quiet():
            ops = HOST if on_host else EAGER
            batch = Batch.from_sums(sums, np.float64(state.mean) if on_host else state.mean.double(), ops)
            self._write(self.rule.commit(batch, state, ops, None if when is None else when == 0), on_host)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the state as asked, but never into less than float32: `model.half()` must not ruin the variance."""
        self._settle()
        names = [name for name in self._kind._fields if name != "count"]
        before = [getattr(self, name) for name in names]
        super()._apply(fn, recurse)
        for name, buffer in zip(names, before, strict=True):
            if getattr(self, name).dtype.itemsize < torch.float32.itemsize:
                setattr(self, name, buffer.to(getattr(self, name).device))
        self._seen[0] = None
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any, **others: Any) -> None:
        """Take what any framework wrote (S16), and refuse what another version of the rule did."""
        self._joining = None
        for name in (*self._kind._fields, "version"):
            value = state_dict.get(f"{prefix}{name}")
            if value is not None and not isinstance(value, Tensor):
                state_dict[f"{prefix}{name}"] = torch.as_tensor(np.asarray(value))
        version = state_dict.get(f"{prefix}version")
        if version is not None:
            try:
                check_version(version, self._kind, f"the ALRC state under '{prefix}'")
            except ValueError as error:
                raise RuntimeError(str(error)) from None  # what torch raises when a state does not fit
        super()._load_from_state_dict(state_dict, prefix, *rest, **others)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the last losses and the optimiser out of copies and pickles."""
        self._settle()
        return {**super().__getstate__(), "_seen": [None], "_attachment": None, "_places": [], "_views": []}
