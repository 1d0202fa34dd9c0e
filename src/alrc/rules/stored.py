"""The state as a dictionary of numpy arrays, which every framework reads and writes (SPEC S16).

Exists so that a run can be begun in one framework and continued in another. Must import no framework.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alrc.moments import Moments
from alrc.rules.shift import Watched

__all__ = ["STATE_VERSIONS", "check_version", "read_state", "write_state"]

STATE_VERSIONS: dict[type, int] = {Moments: 1, Watched: 2}
"""Version of the state dictionary of each kind of state."""


def check_version(version: Any, kind: type, where: str = "the state") -> None:
    """Refuse a state that another version of the rule wrote.

    Args:
        version: Version that was found, a whole number.
        kind: Kind of state that is to be filled.
        where: What is being read, for the message.

    Raises:
        ValueError: If the version is not that of the kind.
    """
    ours = STATE_VERSIONS[kind]
    if int(version) != ours:
        raise ValueError(
            f"{where} has version {int(version)}, but this ALRC reads version {ours}: 1 is written by a start "
            '(mu1, mu2), 2 by start="auto". Load it into an ALRC with the settings that wrote it, or start afresh.'
        )


def write_state(state: Any) -> dict[str, NDArray[Any]]:
    """Return a state as a dictionary.

    Args:
        state: State of numbers, or of arrays that numpy can read.

    Returns:
        The fields and `version`; `count` and `version` are int64, the others keep their precision.
    """
    stored = {name: np.array(value) for name, value in zip(state._fields, state, strict=True)}
    stored["count"] = stored["count"].astype(np.int64)
    return {**stored, "version": np.array(STATE_VERSIONS[type(state)], dtype=np.int64)}


def read_state(stored: Mapping[str, Any], like: Any) -> Any:
    """Return the state that a dictionary holds.

    Args:
        stored: What `write_state` returned, or a dictionary of another framework's arrays that numpy can read.
        like: State of the rule that is to go on, whose shapes are asked for.

    Returns:
        A state of numpy arrays, `count` int64.

    Raises:
        KeyError: If an entry is missing.
        ValueError: If the version or a shape is not that of the rule, or there are entries that belong to none.
    """
    kind: Any = like.__class__
    names: tuple[str, ...] = kind._fields
    if "version" not in stored:
        raise KeyError(f"the state has no entry 'version'; its entries are {', '.join(map(repr, stored)) or 'none'}.")
    check_version(np.asarray(stored["version"]), kind)
    missing = [name for name in names if name not in stored]
    if missing:
        raise KeyError(f"the state lacks {', '.join(missing)}; its entries are {', '.join(map(repr, stored))}.")
    unknown = [name for name in stored if name not in (*names, "version")]
    if unknown:
        raise ValueError(f"the state has entries that belong to no ALRC: {', '.join(unknown)}.")
    values = {name: np.asarray(stored[name]) for name in names}
    for name, value in zip(names, like, strict=True):
        if values[name].shape != np.shape(value):
            raise ValueError(
                f"{name} has shape {values[name].shape}, but this ALRC needs {np.shape(value)}; the last axis of "
                "'recent' is the setting observe."
            )
    return kind(**{**values, "count": values["count"].astype(np.int64)})
