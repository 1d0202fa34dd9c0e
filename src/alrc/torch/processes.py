"""Add up over processes what each has measured: one fused all-reduce of counts, sums and centred square sums.

Exists so that every process holds the state of the joined batch and takes the same decisions (SPEC S24). The sum is
started when a batch is known and waited for when the next losses come; backward runs meanwhile.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

__all__ = ["Joining", "group_of"]


def group_of(sync: Any) -> Any:
    """Return the process group that `sync` means, or None where this process is alone.

    Args:
        sync: False, True for all processes, or a `torch.distributed.ProcessGroup`.

    Returns:
        The group, or None.
    """
    if sync is False or not (dist.is_available() and dist.is_initialized()):
        return None
    return dist.group.WORLD if sync is True else sync


class Joining:
    """Hold a sum over processes that has been started.

    Args:
        sums: What this process adds, in float64; overwritten.
        group: The process group.
        when: What else is to be known when the sum is there.
    """

    def __init__(self, sums: Tensor, group: Any, when: Any) -> None:
        self.when = when
        self._sums = sums
        self._work = dist.all_reduce(sums, op=dist.ReduceOp.SUM, group=group, async_op=True)

    def wait(self) -> Tensor:
        """Return the sums over all processes; on a GPU this makes the stream wait, not the host."""
        if self._work is not None:
            self._work.wait()
        return self._sums
