"""ALRC in a plain `compile` and `fit`: a model around a model, whose losses are limited before Keras averages them.

A loss object alone cannot do it. What a compiled step updates must be a variable of the model, and so must what a
`.keras` file restores; and a loss is not told whether it trains. A model has all three.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import keras

from alrc.keras.limited import Limited, Limiters
from alrc.keras.loss import ALRC

__all__ = ["LimitedModel"]

SINGLE = "alrc"
"""Name of the limiter where there is one loss; that of the output `age` of several is `age_alrc`."""


@keras.saving.register_keras_serializable(package="alrc")
class LimitedModel(keras.Model):
    """Train a model with limited losses, in Keras' own `compile` and `fit`.

    `model = LimitedModel(model)` is the one changed line. In `fit`, each loss given to `compile` is limited by an ALRC
    of its own before sample weights, masks and averaging; padding and samples of weight 0 are not learned from.
    `evaluate` and `predict` are those of the model. The logs of `fit` also tell the shares of limited and of non-finite
    losses. Settings and state are part of `.keras` and weight files.

    Args:
        model: Any Keras model. It is wrapped, not copied: `limited.model` is it, trained, to deploy without ALRC.
        limit: An `ALRC` for the only loss; a dictionary by output, or a list, for several, in which what is left out or
            None is not limited. None gives each loss an `ALRC()`.
        **keywords: `name` and `dtype` of the outer model; its dtype is else that of `model`.

    Raises:
        TypeError: If `model` is no Keras model, or `limit` holds something else than ALRC layers.

    Example:
        >>> import numpy as np
        >>> net = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        >>> model = LimitedModel(net)
        >>> model.compile(optimizer="sgd", loss="mse")
        >>> history = model.fit(np.ones((8, 2)), np.ones((8, 1)), batch_size=2, verbose=0)
        >>> sorted(history.history), int(model.limit.count)
        (['alrc_limited', 'alrc_nonfinite', 'loss'], 4)
    """

    def __init__(self, model: keras.Model, limit: Any = None, **keywords: Any) -> None:
        if not isinstance(model, keras.Model):
            raise TypeError(f"model must be a keras.Model, got {type(model).__name__}; wrap the model, then compile.")
        super().__init__(**{"dtype": model.dtype_policy, **keywords})
        self.model = model
        self._limiters = Limiters(name="limiters")
        self._is_named = keras.tree.is_nested(limit)
        for name, layer in self._named(limit) if limit is not None else ():
            if layer is not None and not isinstance(layer, ALRC):
                raise TypeError(f"limit must be an alrc.keras.ALRC or hold some, got {layer!r}.")
            if layer is not None:
                self._limiters.place(_key(name) if self._is_named else SINGLE, layer)
        self._has_default = limit is None
        self.built = model.built

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Call the model.

        Args:
            inputs: Inputs of the model.
            training: Whether the call is part of training.

        Returns:
            Outputs of the model.
        """
        return self.model(inputs, training=training)

    def compute_mask(self, inputs: Any, previous_mask: Any) -> None:
        """Return no mask: those of the model are on its outputs."""

    def compile(self, optimizer: Any = "rmsprop", loss: Any = None, loss_weights: Any = None, **others: Any) -> None:
        """Configure training as `keras.Model.compile` does; each loss is limited.

        Args:
            optimizer: As in `keras.Model.compile`.
            loss: As in `keras.Model.compile`. A model with several outputs needs a list or dictionary, unless it knows
                its outputs (`Functional` models do).
            loss_weights: As in `keras.Model.compile`.
            **others: As in `keras.Model.compile`.

        Raises:
            ValueError: If one `ALRC` was given for several losses, or one by a name that no loss has.
        """
        names = getattr(self, "output_names", [])
        if loss is not None and not keras.tree.is_nested(loss) and len(names) > 1:
            loss = [loss] * len(names)
            if loss_weights is not None and not keras.tree.is_nested(loss_weights):
                loss_weights = [loss_weights] * len(names)
        super().compile(optimizer, self._limited(loss), loss_weights, **others)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        """Return the total loss, limited while training.

        Args:
            x: Inputs.
            y: Targets.
            y_pred: Outputs of the model.
            sample_weight: Weights of the samples, or None.
            training: Whether to limit and learn.

        Returns:
            The loss, 0-d.
        """
        if len(keras.tree.flatten(y_pred)) > 1 and not keras.tree.is_nested(self.loss):
            raise ValueError("one loss for several outputs: give compile() a list or dictionary with a loss for each.")
        self._limiters.is_training = bool(training)
        return super().compute_loss(x, y, y_pred, sample_weight, training)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        """Return the metrics, those of the limiters only while training.

        Args:
            x: Inputs.
            y: Targets.
            y_pred: Outputs of the model.
            sample_weight: Weights of the samples, or None.

        Returns:
            Values by name.
        """
        results = super().compute_metrics(x, y, y_pred, sample_weight)
        hidden = {metric.name for metric in self._limiters.metrics} if not self._limiters.is_training else set()
        return {name: value for name, value in results.items() if name not in hidden}

    @property
    def limits(self) -> Mapping[str, ALRC]:
        """The limiters by output; that of the only loss is called "alrc"."""
        # No dictionary: Keras would save what is in one by its place instead of its name.
        layers = {key.removesuffix(f"_{SINGLE}"): getattr(self._limiters, key) for key in self._limiters.keys}
        return MappingProxyType(layers)

    @property
    def limit(self) -> ALRC:
        """The limiter of the only loss."""
        if len(self._limiters.keys) != 1:
            raise ValueError(
                f"this model has {len(self._limiters.keys)} limiters, not one: compile it first, or read limits[output]"
            )
        return next(iter(self.limits.values()))

    @property
    def output_names(self) -> list[str]:
        """Names of the model's outputs, where it knows them."""
        return self.model.output_names

    def get_config(self) -> dict[str, Any]:
        """Return the configuration: that of the model, and of all limiters there are."""
        layers = dict(self.limits)
        limit = layers[SINGLE] if [*layers] == [SINGLE] else layers
        if not layers and self._has_default:
            limit = None
        return {
            "name": self.name,
            "model": keras.saving.serialize_keras_object(self.model),
            "limit": keras.saving.serialize_keras_object(limit),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> LimitedModel:
        """Make the model that a configuration describes.

        Args:
            config: What `get_config` returned.
            custom_objects: Classes and functions that are not registered, by name.

        Returns:
            A model with fresh weights.
        """
        parts = {
            name: keras.saving.deserialize_keras_object(part, custom_objects=custom_objects)
            for name, part in config.items()
            if name in ("model", "limit") and part is not None
        }
        return cls(**{**config, **parts})

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile as a saved model was compiled.

        Args:
            config: What `get_compile_config` returned.
        """
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None and self.built:
            self.optimizer.build(self.trainable_variables)

    def _named(self, structure: Any) -> Iterator[tuple[str, Any]]:
        """Yield the leaves of what was given for the outputs, each with the name of its output."""
        names = getattr(self, "output_names", [])
        for path, leaf in keras.tree.flatten_with_path(structure):
            is_place = len(path) == 1 and isinstance(path[0], int) and path[0] < len(names)
            yield names[path[0]] if is_place else "_".join(map(str, path)), leaf

    def _limited(self, loss: Any) -> Any:
        """Return what was given as `loss` with every loss limited by its limiter."""
        leaves = {name: leaf.loss if isinstance(leaf, Limited) else leaf for name, leaf in self._named(loss)}
        wanted = [name for name, leaf in leaves.items() if leaf is not None]
        is_single = len(wanted) == 1 and not self._is_named
        if not self._has_default:
            given = {SINGLE} if not self._is_named else {*self._limiters.keys}
            unknown = given - {SINGLE if is_single else _key(name) for name in wanted}
            if unknown:
                raise ValueError(
                    f"limit was given for {', '.join(sorted(key.removesuffix(f'_{SINGLE}') for key in unknown))}, but "
                    f"the losses are those of {', '.join(wanted) or 'nothing'}; one loss, one ALRC: give a dictionary."
                )
        limited: list[Any] = []
        for name, leaf in leaves.items():
            key = SINGLE if is_single else _key(name)
            if leaf is not None and self._has_default and key not in self._limiters.keys:
                self._limiters.place(key, ALRC(name=key))
            is_limited = leaf is not None and key in self._limiters.keys
            limited.append(Limited(leaf, partial(self._limiters.limit, key)) if is_limited else leaf)
        return keras.tree.pack_sequence_as(loss, limited)


def _key(name: str) -> str:
    """Return the name of the limiter of an output."""
    return f"{name}_{SINGLE}".replace("/", "_")
