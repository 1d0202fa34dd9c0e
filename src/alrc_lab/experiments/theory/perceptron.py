"""A network of one hidden layer and one output, for many seeds at once, with gradients by hand in float64.

The loss of an example is ½ r², r = output - target. Parameters are called as torch would: `first.weight` (rows, hidden,
inputs), `first.bias` (rows, hidden), `last.weight` (rows, 1, hidden), `last.bias` (rows, 1).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from alrc_lab.experiments.theory.methods import Arrays


class Pass(NamedTuple):
    """Hold what a forward pass leaves for the backward pass; rows × examples first."""

    residual: np.ndarray
    """Output minus target, shape (rows, examples)."""
    hidden: np.ndarray
    """Hidden activations, shape (rows, examples, hidden)."""
    slope: np.ndarray
    """Their derivatives by the pre-activations."""


class Perceptron:
    """Compute outputs and gradients of networks of one shape.

    Args:
        inputs: Number of inputs.
        hidden: Number of hidden units.
        activation: Non-linearity of the hidden layer.
    """

    def __init__(self, inputs: int, hidden: int, activation: Literal["relu", "tanh"]) -> None:
        self.inputs, self.hidden, self.activation = inputs, hidden, activation

    def start(self, rows: int, generator: np.random.Generator) -> Arrays:
        """Draw weights: normal with variance 2 / fan-in (relu) or 1 / fan-in (tanh); biases are zero."""
        gain = 2.0 if self.activation == "relu" else 1.0
        first = generator.standard_normal((rows, self.hidden, self.inputs)) * np.sqrt(gain / self.inputs)
        last = generator.standard_normal((rows, 1, self.hidden)) * np.sqrt(1 / self.hidden)
        return {
            "first.weight": first,
            "first.bias": np.zeros((rows, self.hidden)),
            "last.weight": last,
            "last.bias": np.zeros((rows, 1)),
        }

    def forward(self, weights: Arrays, x: np.ndarray, y: np.ndarray) -> Pass:
        """Compute residuals of examples x, shape (rows, examples, inputs), and targets y, shape (rows, examples)."""
        z = np.einsum("rhd,rbd->rbh", weights["first.weight"], x) + weights["first.bias"][:, None, :]
        if self.activation == "relu":
            slope = (z > 0).astype(np.float64)
            hidden = z * slope
        else:
            hidden = np.tanh(z)
            slope = 1 - hidden * hidden
        output = np.einsum("rbh,rh->rb", hidden, weights["last.weight"][:, 0]) + weights["last.bias"]
        return Pass(output - y, hidden, slope)

    def gradients(self, weights: Arrays, x: np.ndarray, done: Pass) -> Arrays:
        """Compute the gradient of every example's loss; leading axes (rows, examples)."""
        residual = done.residual
        inner = residual[..., None] * weights["last.weight"] * done.slope
        return {
            "first.weight": inner[..., None] * x[:, :, None, :],
            "first.bias": inner,
            "last.weight": (residual[..., None] * done.hidden)[:, :, None, :],
            "last.bias": residual[..., None],
        }

    def mean_gradient(self, weights: Arrays, x: np.ndarray, done: Pass, scale: np.ndarray | float = 1.0) -> Arrays:
        """Compute the gradient of the mean over examples of the losses, each times its factor; leading axis rows."""
        residual = done.residual * scale / done.residual.shape[1]
        inner = residual[..., None] * weights["last.weight"] * done.slope
        return {
            "first.weight": np.einsum("rbh,rbd->rhd", inner, x),
            "first.bias": inner.sum(1),
            "last.weight": np.einsum("rb,rbh->rh", residual, done.hidden)[:, None, :],
            "last.bias": residual.sum(1)[:, None],
        }


def norm_of(arrays: Arrays) -> np.ndarray:
    """Return the Euclidean norm over all parameters of each row."""
    return np.sqrt(sum(np.einsum("ri,ri->r", flat, flat) for flat in _flat(arrays)))


def _flat(arrays: Arrays) -> list[np.ndarray]:
    """Return the arrays with all axes but the first merged."""
    return [array.reshape(len(array), -1) for array in arrays.values()]


def to_vectors(arrays: Arrays) -> np.ndarray:
    """Return all parameters of each row as one vector, shape (rows, number)."""
    return np.concatenate(_flat(arrays), 1)
