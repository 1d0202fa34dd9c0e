"""What Keras calls for a loss that is limited, and what it counts meanwhile.

Exists apart from `model.py` so that the one file knows of models and the other of losses.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import keras

from alrc.keras.loss import ALRC

__all__ = ["Limited", "Limiters"]

ops: Any = keras.ops  # Keras declares no types

CHOSEN_BY_SHAPE = ("crossentropy", "ce")
"""Names for which Keras takes one of three cross entropies, by the shapes of targets and outputs."""


class Limiters(keras.layers.Layer):
    """Hold the limiters of a model, and count what they do.

    A layer of its own because Keras lets nothing be added to a model that is built, and losses come with `compile`.

    Args:
        name: Name of the layer.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name=name, autocast=False)
        self.keys: list[str] = []
        self.is_training = False
        self.built = True

    def place(self, key: str, layer: ALRC) -> None:
        """Add a limiter.

        Args:
            key: Its name here, in the logs, and in files.
            layer: The limiter.
        """
        setattr(self, key, layer)
        for what in ("limited", "nonfinite"):
            setattr(self, f"{key}_{what}", keras.metrics.Mean(name=f"{key}_{what}"))
        self.keys.append(key)

    def limit(self, key: str, losses: Any, mask: Any, weight: Any) -> Any:
        """Limit losses while training, and count them.

        Args:
            key: Name of the limiter.
            losses: Losses of any shape.
            mask: Boolean, or None.
            weight: How much each loss counts, or None.

        Returns:
            Limited losses.
        """
        if not self.is_training:
            return losses
        limited, scale = getattr(self, key)(losses, mask=mask, weight=weight, training=True, return_scale=True)
        is_finite = scale > 0
        is_there = ops.ones_like(scale) if mask is None else ops.broadcast_to(mask, ops.shape(scale))
        there = ops.sum(ops.cast(is_there, scale.dtype))
        number = ops.sum(ops.cast(is_finite, scale.dtype))
        hits = ops.sum(ops.cast(is_finite & (scale < 1), scale.dtype))
        for what, part, whole in (("limited", hits, number), ("nonfinite", there - number, there)):
            getattr(self, f"{key}_{what}").update_state(part / ops.maximum(whole, 1.0), sample_weight=whole)
        return limited


@keras.saving.register_keras_serializable(package="alrc")
class Limited(keras.losses.Loss):
    """Limit the losses of a Keras loss before they are weighted and reduced.

    Args:
        loss: What `compile` takes for one output: a loss, a function, or a name.
        limiter: Limits losses, given a mask and weights; None lets them pass.
    """

    def __init__(self, loss: Any, limiter: Callable[[Any, Any, Any], Any] | None = None) -> None:
        self.loss, self._limiter = loss, limiter
        is_by_shape = isinstance(loss, str) and loss.lower() in CHOSEN_BY_SHAPE
        self._resolved: Any = None if is_by_shape else keras.losses.get(loss)
        if isinstance(self._resolved, keras.losses.Loss):
            as_it = {name: getattr(self._resolved, name) for name in ("name", "reduction", "dtype")}
        else:
            as_it = {"name": loss if isinstance(loss, str) else _named(loss)}
        super().__init__(**as_it)

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Return the reduced loss of some outputs.

        Args:
            y_true: Targets.
            y_pred: Outputs.
            sample_weight: Weights, or None.

        Returns:
            The loss, reduced as that of the wrapped loss.
        """
        mask = getattr(y_pred, "_keras_mask", None)
        return _Call(self, mask, sample_weight)(y_true, y_pred, sample_weight)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Return the losses as they are.

        Args:
            y_true: Targets.
            y_pred: Outputs.

        Returns:
            Losses, neither limited nor reduced.
        """
        if isinstance(self._resolved, keras.losses.Loss):
            return self._resolved.call(y_true, y_pred)
        if not keras.tree.is_nested(y_pred) and not keras.tree.is_nested(y_true):
            y_true, y_pred = _of_one_rank(y_true, y_pred)
        return (self._resolved or _cross_entropy(y_true, y_pred))(y_true, y_pred)

    def limited(self, losses: Any, mask: Any, weight: Any) -> Any:
        """Return losses after limiting.

        Args:
            losses: Losses of any shape.
            mask: Boolean, or None.
            weight: Weights of the losses, or None.

        Returns:
            Limited losses.
        """
        return losses if self._limiter is None else self._limiter(losses, mask, weight)

    def get_config(self) -> dict[str, Any]:
        """Return the configuration of the wrapped loss; the model gives it its limiter again."""
        return {"loss": keras.saving.serialize_keras_object(self.loss)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Limited:
        """Make the loss that a configuration describes, without limiter.

        Args:
            config: What `get_config` returned.

        Returns:
            The loss.
        """
        return cls(keras.saving.deserialize_keras_object(config["loss"]))


class _Call(keras.losses.Loss):
    """Be one call of a limited loss: it knows the mask and the weights, which Keras does not tell `Loss.call`."""

    def __init__(self, of: Limited, mask: Any, weight: Any) -> None:
        super().__init__(of.name, of.reduction, of.dtype)
        self.of, self.mask, self.weight = of, mask, weight

    def call(self, y_true: Any, y_pred: Any) -> Any:
        losses = ops.convert_to_tensor(self.of.call(y_true, y_pred))
        own = getattr(losses, "_keras_mask", None)
        masks = [ops.cast(mask, "bool") for mask in (self.mask, own) if mask is not None]
        mask = None if not masks else masks[0] if len(masks) == 1 else masks[0] & masks[1]
        weight = None if self.weight is None else ops.cast(ops.convert_to_tensor(self.weight), losses.dtype)
        limited = self.of.limited(losses, _fitted(mask, losses), _fitted(weight, losses))
        if own is not None:
            limited._keras_mask = own
        return limited


def _named(function: Any) -> str:
    """Return the name Keras gives the loss of a function: its own, in snake case, letters and digits only."""
    name = re.sub(r"\W+", "", getattr(function, "__name__", type(function).__name__))
    return re.sub(r"(?<=[a-z0-9])([A-Z])", r"_\1", name).lower()


def _fitted(part: Any, losses: Any) -> Any:
    """Return a mask or weights with as many axes as the losses; None where Keras would reduce the losses first."""
    if part is None or len(part.shape) > len(losses.shape) + 1:
        return None
    part = _of_one_rank(part, losses, is_second_kept=True)[0]
    return part if len(part.shape) <= len(losses.shape) else None


def _of_one_rank(x: Any, y: Any, is_second_kept: bool = False) -> tuple[Any, Any]:
    """Give two arrays whose ranks differ by one, the longer ending with an axis of length 1, the same rank."""
    ranks = len(x.shape), len(y.shape)
    if ranks[0] == ranks[1] + 1 and x.shape[-1] == 1:
        is_expanded = ranks[1] == 1 and not is_second_kept
        return (x, ops.expand_dims(y, -1)) if is_expanded else (ops.squeeze(x, -1), y)
    if ranks[1] == ranks[0] + 1 and y.shape[-1] == 1:
        is_expanded = ranks[0] == 1 or is_second_kept
        return (ops.expand_dims(x, -1), y) if is_expanded else (x, ops.squeeze(y, -1))
    return x, y


def _cross_entropy(y_true: Any, y_pred: Any) -> Callable[[Any, Any], Any]:
    """Return the cross entropy that Keras means by "crossentropy"."""
    if y_pred.shape[-1] == 1:
        return keras.losses.binary_crossentropy
    is_sparse = len(y_true.shape) < len(y_pred.shape) or y_true.shape[-1] == 1
    return keras.losses.sparse_categorical_crossentropy if is_sparse else keras.losses.categorical_crossentropy
