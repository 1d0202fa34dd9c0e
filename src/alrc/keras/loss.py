"""ALRC for Keras 3: a layer that limits losses, on every backend.

Measures losses, lets `alrc.rules` decide, scales their gradients. The state is non-trainable weights of the layer, so
that Keras saves it, restores it and carries it through compiled steps. `model.py` puts it into `fit`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

import keras
import numpy as np
from numpy.typing import NDArray

from alrc import rules
from alrc.keras.ops import KERAS, KerasOps
from alrc.rules.presets import Presets

__all__ = ["ALRC"]

ops: Any = keras.ops  # Keras declares no types

DOUBLE = KerasOps("float64")


@keras.saving.register_keras_serializable(package="alrc")
class ALRC(Presets, keras.layers.Layer):
    """Limit losses to a number of running standard deviations above their running mean.

    Call it on the losses before they are averaged: `limit(losses, training=True)`. A loss above L_max = mean +
    num_stddev · std gets the value L_max and the gradient (L_max / L) · ∇L; every other loss passes unchanged
    (SPEC S5, S6). While training, each call updates the moments once; else losses pass through.

    Args:
        num_stddev: Standard deviations n above the mean, > 0.
        betas: Decay rates of the running first and second moment, each in [0, 1).
        start: `"auto"` learns the loss scale and its shifts; or raw moments `(mu1, mu2)`, followed as published.
        feed: Which losses the moments see, `"limited"` or `"unlimited"`.
        second_moment: `"elements"` averages squared elements of a batch, `"mean"` squares their mean.
        eps: Added to the variance under the root.
        gain: Factor on both raw moments when the limit is made; 1 except in `ALRC.cifar_scripts`.
        observe: Updates before the first limit when `start="auto"`, 4 to 256.
        signed: Whether losses may be of either sign.
        num_stddev_below: Standard deviations below the mean under which losses are limited too; None for none.
        **keywords: `name` and `dtype` of the layer; its state is float32 unless the dtype is float64.

    Raises:
        ValueError: If a setting is outside its range; the message names the value.

    Example:
        >>> limit = ALRC(start=(1.0, 1.04))
        >>> limited = limit(np.array([0.5, 2.0, 4.0], dtype="float32"), training=True)
        >>> [round(float(loss), 4) for loss in limited]
        [0.5, 1.6, 1.6]

    References:
        Ede & Beanland 2020, "Adaptive learning rate clipping stabilizes learning", Algorithm 1.
    """

    def __init__(
        self,
        num_stddev: float = 3.0,
        *,
        betas: tuple[float, float] = (0.999, 0.999),
        start: Literal["auto"] | tuple[float, float] = "auto",
        feed: Literal["limited", "unlimited"] = "limited",
        second_moment: Literal["elements", "mean"] = "elements",
        eps: float = 0.0,
        gain: float = 1.0,
        observe: int = 32,
        signed: bool = False,
        num_stddev_below: float | None = None,
        **keywords: Any,
    ) -> None:
        others: dict[str, Any] = {"second_moment": second_moment, "eps": eps, "gain": gain, "observe": observe}
        others |= {"signed": signed, "num_stddev_below": num_stddev_below}
        # A configuration that was a file has lists for tuples.
        pairs: dict[str, Any] = {"betas": betas, "start": start}
        pairs = {name: tuple(pair) if isinstance(pair, list) else pair for name, pair in pairs.items()}
        rule = rules.ALRC(num_stddev, feed=feed, **pairs, **others)
        # Losses are not activations: a half precision policy must not touch them.
        super().__init__(autocast=False, **keywords)
        self.rule = rule
        self.supports_masking = True
        initial = rule.init()
        self._kind: Any = type(initial)
        precision = "float64" if self.variable_dtype == "float64" else "float32"
        for name, value in zip(initial._fields, initial, strict=True):
            weight = self.add_weight(
                shape=np.shape(value),
                initializer="zeros" if np.ndim(value) else keras.initializers.Constant(value),
                dtype="int32" if name == "count" else precision,
                trainable=False,
                autocast=False,
                aggregation="only_first_replica",  # every replica commits the same joined batch (S24)
                name=name,
            )
            setattr(self, name, weight)
        self.build()

    @classmethod
    def from_rule(cls, rule: rules.ALRC, **keywords: Any) -> Self:
        """Make the layer that applies a pure rule.

        Args:
            rule: Any `alrc.rules.ALRC`.
            **keywords: `name` and `dtype` of the layer.

        Returns:
            A layer with the rule's initial state.
        """
        layer = cls(**vars(rule), **keywords)
        layer.rule = rule
        return layer

    def build(self, input_shape: Any = None) -> None:
        """Do nothing: the state has no shape of the losses, and is there from the start."""

    def call(
        self,
        losses: Any,
        mask: Any = None,
        weight: Any = None,
        training: bool | None = None,
        return_scale: bool = False,
    ) -> Any:
        """Limit `losses` and, while training, learn from them.

        Args:
            losses: Floating-point losses of any shape and dtype: one loss, a batch, or summands such as pixels.
            mask: Boolean, broadcasts to `losses`; false where there is no loss (padding). Such elements get value and
                gradient 0, whatever they hold, and are not learned from; if nothing is left the state stays.
            weight: How much each loss counts in the moments, ≥ 0, broadcasts to `losses`. The result is not multiplied.
            training: Whether to limit and learn; if not, losses pass through. Must be said, here or in the call of the
                model that holds this layer: forgetting it would mean no limits, or learning from validation.
            return_scale: Whether to return the gradient factors too.

        Returns:
            Limited losses, same shape and dtype; with `return_scale` also the factor of the gradient of each, in
            [0, 1]: 1 where untouched, 0 where masked or not finite.

        Raises:
            TypeError: If `losses` or `weight` is not floating point, or `mask` not boolean.
            ValueError: If `training` is not said, or `mask` or `weight` does not broadcast to `losses`.
        """
        self._check(losses, mask, weight, training)
        dtype = keras.backend.standardize_dtype(losses.dtype)
        wide = "float64" if "float64" in (dtype, self.mean.dtype) else "float32"
        losses = ops.convert_to_tensor(losses)
        if not training:
            return (losses, ops.ones_like(losses, dtype=wide)) if return_scale else losses
        primitives = DOUBLE if wide == "float64" else KERAS
        losses = ops.cast(losses, wide)
        is_loss = ops.isfinite(losses) if mask is None else ops.isfinite(losses) & ops.cast(mask, "bool")
        # A select also keeps XLA from making one rounding of the last operation of the losses and the first of the
        # rule: L - min(L, c) would then not be 0 where nothing is limited.
        fixed = ops.stop_gradient(ops.where(is_loss, losses, np.nan))
        if weight is not None:
            weight = ops.stop_gradient(ops.broadcast_to(ops.cast(weight, wide), ops.shape(losses)))
        state = self._state(wide)
        # torch.compile may compute the factors again in the backward pass, from weights that have been overwritten
        # meanwhile. What a stack returns it does not compute again.
        held = ops.stack([state.mean, state.var, ops.cast(state.count, wide)])
        decision = self.rule.decide(fixed, state._replace(mean=held[0], var=held[1], count=held[2]), primitives)
        batch = self.rule.measure(fixed, decision, state, primitives, weight)
        add_up = _sum_over_replicas()
        if add_up is not None:
            batch = batch.joined(add_up, state.mean, primitives)
        for name, value in zip(state._fields, self.rule.commit(batch, state, primitives), strict=True):
            getattr(self, name).assign(value)
        # Zero, with the slope of the losses where they are finite: where the gradient is to be 0 nothing must be NaN.
        slope = ops.where(is_loss, losses, 0.0)
        slope = slope - ops.stop_gradient(slope)
        limited = ops.cast(decision.limited + decision.scale * slope, dtype)
        return (limited, decision.scale) if return_scale else limited

    def compute_output_spec(
        self, losses: Any, mask: Any = None, weight: Any = None, training: Any = None, return_scale: bool = False
    ) -> Any:
        """Return the shape and dtype of the result, those of the losses."""
        limited = keras.KerasTensor(losses.shape, losses.dtype)
        wide = "float64" if "float64" in (losses.dtype, self.mean.dtype) else "float32"
        return (limited, keras.KerasTensor(losses.shape, wide)) if return_scale else limited

    @property
    def limit(self) -> Any:
        """L_max for the next losses, 0-d; inf while nothing can be limited."""
        dtype = self.mean.dtype
        return self.rule.limit(self._state(dtype), DOUBLE if dtype == "float64" else KERAS)

    @property
    def mu1(self) -> Any:
        """Running mean of the losses, 0-d."""
        return self._state(self.mean.dtype).mu1

    @property
    def mu2(self) -> Any:
        """Running mean of the squared losses, 0-d."""
        return self._state(self.mean.dtype).mu2

    def state_dict(self, *others: Any, **keywords: Any) -> dict[str, NDArray[Any]]:
        """Return the state as every framework reads it: a versioned dictionary of numpy arrays (SPEC S16).

        Args:
            *others: Nothing; torch passes its own arguments when the module above is asked for its tensors.
            **keywords: The same.

        Returns:
            Arrays by name.
        """
        if others or keywords:
            return super().state_dict(*others, **keywords)
        numbers = [ops.convert_to_numpy(ops.convert_to_tensor(getattr(self, name))) for name in self._kind._fields]
        return self.rule.state_dict(self._kind(*numbers))

    def load_state_dict(self, stored: Mapping[str, Any]) -> None:
        """Go on from a state, whichever framework wrote it.

        Args:
            stored: What `state_dict` returned, here or in another framework.

        Raises:
            KeyError: If an entry is missing.
            ValueError: If the version or a shape is not that of this rule, or an entry is unknown.
        """
        state: Any = self.rule.load_state_dict(stored)
        for name, value in zip(state._fields, state, strict=True):
            getattr(self, name).assign(value)

    def get_config(self) -> dict[str, Any]:
        """Return the settings, from which `from_config` makes the same layer in its initial state."""
        return {**super().get_config(), **vars(self.rule)}

    def _state(self, dtype: str) -> Any:
        """Return the state as tensors, its real numbers in a precision."""
        values = {name: ops.convert_to_tensor(getattr(self, name)) for name in self._kind._fields}
        return self._kind(**{n: value if n == "count" else ops.cast(value, dtype) for n, value in values.items()})

    def _check(self, losses: Any, mask: Any, weight: Any, training: Any) -> None:
        """Refuse what is not meant."""
        if training is None:
            raise ValueError(
                f"{self.name} was not told whether it trains: call it with training=True to limit and learn, or "
                "training=False to let losses pass; compute_loss() has the argument to hand on."
            )
        for name, part in (("losses", losses), ("weight", weight)):
            if part is not None and not keras.backend.is_float_dtype(part.dtype):
                raise TypeError(f"{name} must be floating point, got {part.dtype}; cast it to float32 first.")
        if mask is not None and keras.backend.standardize_dtype(mask.dtype) != "bool":
            raise TypeError(f"mask must be boolean, got {mask.dtype}; use mask != 0, or weight= for weights.")
        for name, part in (("mask", mask), ("weight", weight)):
            if part is not None and not _broadcasts(tuple(part.shape), tuple(losses.shape)):
                raise ValueError(
                    f"{name} of shape {tuple(part.shape)} does not broadcast to losses of shape {tuple(losses.shape)}; "
                    "give it their shape, or axes of length 1."
                )


def _broadcasts(shape: tuple[Any, ...], to: tuple[Any, ...]) -> bool:
    """Return whether a shape broadcasts to another; a length that is not known yet fits any."""
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(a in (1, b) or a is None or b is None for a, b in pairs)


def _sum_over_replicas() -> Callable[[Any], Any] | None:
    """Return what adds up over the replicas of `tf.distribute`; None where there is one or none."""
    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf  # pyright: ignore[reportMissingModuleSource]

    context: Any = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return None
    return lambda x: context.all_reduce(tf.distribute.ReduceOp.SUM, x)
