"""Fit under `tf.distribute.MirroredStrategy` on devices that are parts of one CPU, or on JAX devices.

Started by test_keras_replicas.py: `python replica_run.py NUMBER joined|apart ANSWER`; one strategy a process.
"""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

RULES: dict[str, dict[str, Any]] = {
    "start": {"start": (1.0, 1.5)},
    "auto": {"observe": 4},
    "paper": {"start": (1.0, 1.5), "second_moment": "mean", "feed": "unlimited"},
    "both sides": {"observe": 4, "signed": True, "num_stddev_below": 2.0},
}


def devices(number: int) -> tuple[Any, Any]:
    """Return what makes a context of several devices, and Keras, which must be imported after."""
    if os.environ["KERAS_BACKEND"] == "tensorflow":
        import tensorflow as tf

        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * number)
        import keras

        return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(number)]).scope, keras
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={number}"
    import keras

    def context() -> AbstractContextManager[None]:
        mesh = keras.distribution.DeviceMesh((number,), ["batch"], keras.distribution.list_devices())
        keras.distribution.set_distribution(keras.distribution.DataParallel(mesh, auto_shard_dataset=False))
        return nullcontext()

    return context, keras


def main(number: int, how: str, answer: str) -> None:
    """Fit with every rule on one device, then on several, and write both states."""
    context, keras = devices(number)
    from alrc.keras import ALRC, LimitedModel, loss

    if how == "apart":
        loss._sum_over_replicas = lambda: None
    rng = np.random.default_rng(0)
    # The last batch is short: some replicas get fewer losses than others, and with 4 of them one gets none.
    x = rng.normal(size=(103 if number == 2 else 102, 4)).astype(np.float32)
    x = x[:100] if os.environ["KERAS_BACKEND"] == "jax" else x
    y = (x @ np.ones((4, 1)) + 0.1 * rng.normal(size=(len(x), 1))).astype(np.float32)
    y[60:100:7] += 30
    y[-1] += 20
    found: dict[str, Any] = {}

    def fit(where: str) -> None:
        for name, settings in RULES.items():
            keras.utils.set_random_seed(3)
            layers = [keras.Input((4,)), keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(1)]
            model = LimitedModel(keras.Sequential(layers), ALRC(**settings))
            # Keras weighs the losses of a short batch by replica, so weights differ; the losses must not.
            model.compile(keras.optimizers.SGD(0.0), "mse")
            models[where, name] = model

    models: dict[tuple[str, str], Any] = {}
    fit("alone")
    logs = {"batch_size": 8, "epochs": 2, "shuffle": False, "verbose": 0}
    histories = {key: model.fit(x, y, **logs).history for key, model in models.items()}
    with context():
        fit("together")
    for key in models:
        if key not in histories:
            histories[key] = models[key].fit(x, y, **logs).history
    for (where, name), model in models.items():
        found |= {f"{where}/{name}/{part}": value for part, value in model.limit.state_dict().items()}
        found[f"{where}/{name}/limited"] = np.array(histories[where, name]["alrc_limited"])
        values = getattr(model.limit.mean.value, "values", None)
        if where == "together" and values is not None:
            found[f"replicas/{name}"] = np.array([value.numpy() for value in values])
    np.savez(answer, **found)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
