"""Write the reports of a `Monitor`: to TensorBoard, to Python's logging. Any other function of a dictionary will do.

Imports no torch, and nothing of what it writes to.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, Protocol

__all__ = ["Report", "ScalarWriter", "Writer", "logging_writer", "tensorboard"]

Report = dict[str, float]
"""Python numbers by name; `docs/monitoring.md` defines each."""
Writer = Callable[[Report], Any]
"""Takes every report."""


class ScalarWriter(Protocol):
    """Name what `tensorboard` needs of a summary writer."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Write one number."""
        ...


def tensorboard(summary_writer: ScalarWriter, prefix: str = "alrc/") -> Writer:
    """Write reports to TensorBoard, or to whatever has `add_scalar`.

    Args:
        summary_writer: `torch.utils.tensorboard.SummaryWriter`, or another one with its `add_scalar`.
        prefix: Put before every name.

    Returns:
        A writer for `Monitor`. It leaves out numbers that are not finite: there is no point to draw.

    Example:
        >>> class Printer:
        ...     def add_scalar(self, tag, scalar_value, global_step):
        ...         print(tag, scalar_value, global_step)
        >>> tensorboard(Printer())({"step": 100, "limit/limit": 3.5, "limit/largest": math.nan})
        alrc/limit/limit 3.5 100
    """

    def write(report: Report) -> None:
        for name, value in report.items():
            if name != "step" and math.isfinite(value):
                summary_writer.add_scalar(f"{prefix}{name}", value, int(report["step"]))

    return write


def logging_writer(logger: logging.Logger, level: int = logging.INFO) -> Writer:
    """Write one readable line for each report.

    Args:
        logger: Where to.
        level: Level of the lines.

    Returns:
        A writer for `Monitor`.

    Example:
        >>> write = logging_writer(logging.getLogger("training"), logging.DEBUG)
    """

    def write(report: Report) -> None:
        if logger.isEnabledFor(level):
            logger.log(level, "%s", _line(report))

    return write


def _line(report: Report) -> str:
    """Write the numbers of a report that people look for."""
    parts = [f"step {report['step']}: learning rate x {report['lr_factor']:.3g}"]
    for key in report:
        if not key.endswith("limit/limit"):
            continue
        prefix = key.removesuffix("limit")
        at: dict[str, float] = {name.removeprefix(prefix): value for name, value in report.items()}
        name = prefix.removesuffix("limit/").rstrip("/")
        part = (
            f"{name + ' ' if name else ''}limit {at['limit']:.4g} (mean {at['mean']:.4g}, std {at['std']:.3g}), "
            f"{at['fraction_limited']:.2%} limited, {at['lost_gradient']:.2%} of the gradient lost, "
            f"largest {at['largest']:.4g} (z {at['largest_z']:.3g})"
        )
        for count, word in (("nonfinite", "not finite"), ("nonpositive", "≤ 0"), ("relearned", "relearned")):
            part += f", {at[count]} {word}" if at[count] else ""
        parts.append(part)
    if "gradient/norm_mean" in report:
        part = f"gradient norm {report['gradient/norm_mean']:.4g}, at most {report['gradient/norm_max']:.4g}"
        if "gradient/threshold" in report:
            part += f", {report['gradient/fraction_clipped']:.2%} clipped at {report['gradient/threshold']:.4g}"
        parts.append(part + (f", {report['gradient/nonfinite']} not finite" if report["gradient/nonfinite"] else ""))
    if "guard/skipped" in report:
        parts.append(f"{report['guard/skipped']} skipped ({report['guard/total_skipped']} in all)")
    return "; ".join(parts)
