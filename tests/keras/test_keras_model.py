"""Train with one changed line: equal to Keras alone where nothing is limited, to limited steps by hand elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="these are the tests of alrc.keras")

from alrc import rules  # noqa: E402 - what cannot be imported is skipped first
from alrc.keras import ALRC, LimitedModel  # noqa: E402

BACKEND = keras.backend.backend()
RNG = np.random.default_rng(7)
X = RNG.normal(size=(64, 4)).astype(np.float32)
Y = (X @ np.ones((4, 1)) + 0.1 * RNG.normal(size=(64, 1))).astype(np.float32)
SPIKY = Y.copy()
SPIKY[20:60:7] += 30
FIT: dict[str, Any] = {"batch_size": 16, "epochs": 2, "shuffle": False, "verbose": 0}

pytestmark = [
    # An output without loss has no gradients, with and without limits.
    pytest.mark.filterwarnings("ignore:Gradients do not exist for variables"),
]


def net(dropout: float = 0.0) -> Any:
    keras.utils.set_random_seed(3)
    layers = [keras.Input((4,)), keras.layers.Dense(8, activation="tanh")]
    layers += [keras.layers.Dropout(dropout, seed=1)] if dropout else []
    return keras.Sequential([*layers, keras.layers.Dense(1)])


def two_heads() -> Any:
    keras.utils.set_random_seed(3)
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(8)(inputs)
    a, b = keras.layers.Dense(1, name="a")(hidden), keras.layers.Dense(3, activation="softmax", name="b")(hidden)
    return keras.Model(inputs, [a, b])


def reader() -> Any:
    """Return a network with padding and a loss for each position."""
    keras.utils.set_random_seed(3)
    layers = [keras.layers.Embedding(7, 4, mask_zero=True), keras.layers.LSTM(4, return_sequences=True)]
    return keras.Sequential([keras.Input((5,), dtype="int32"), *layers, keras.layers.Dense(7)])


@keras.saving.register_keras_serializable(package="test")
class Subclassed(keras.Model):
    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.first, self.second = keras.layers.Dense(8), keras.layers.Dense(1)

    def call(self, inputs: Any) -> Any:
        return self.second(self.first(inputs))


def subclassed() -> Any:
    keras.utils.set_random_seed(3)
    return Subclassed()


LABELS = RNG.integers(0, 3, (64, 1))
TOKENS = RNG.integers(1, 7, (64, 5)) * np.concatenate([np.ones((64, 3), int), RNG.integers(0, 2, (64, 2))], axis=1)
WEIGHTS = RNG.choice([0.0, 1.0, 2.0], (64,)).astype(np.float32)
PER_TOKEN = keras.losses.SparseCategoricalCrossentropy

PLAIN: dict[str, tuple[Callable[[], Any], dict[str, Any], tuple[Any, Any], dict[str, Any]]] = {
    "name": (net, {"loss": "mse", "metrics": ["mae"]}, (X, Y), {}),
    "object": (net, {"loss": keras.losses.Huber(delta=0.5)}, (X, Y), {}),
    "function": (net, {"loss": lambda y, p: keras.ops.abs(y - p)}, (X, Y), {}),
    "rank": (net, {"loss": "mae"}, (X, Y[:, 0]), {}),
    "sum": (net, {"loss": keras.losses.MeanSquaredError(reduction="sum"), "optimizer": "adam"}, (X, Y), {}),
    "dropout": (lambda: net(0.5), {"loss": "mse"}, (X, Y), {}),
    "subclassed": (subclassed, {"loss": "mse"}, (X, Y), {}),
    "sample weights": (net, {"loss": "mse"}, (X, Y), {"sample_weight": WEIGHTS}),
    "class weights": (
        lambda: keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation="softmax")]),
        {"loss": "ce"},
        (X, LABELS),
        {"class_weight": {0: 1.0, 1: 0.0, 2: 3.0}},
    ),
    "validation": (net, {"loss": "mse"}, (X, Y), {"validation_split": 0.2}),
    "eager": (net, {"loss": "mse", "run_eagerly": True}, (X, Y), {}),
    "padding": (reader, {"loss": PER_TOKEN(from_logits=True)}, (TOKENS, TOKENS), {}),
    "two losses": (two_heads, {"loss": ["mse", "ce"], "loss_weights": [2.0, 0.5]}, (X, [Y, LABELS]), {}),
    "by name": (
        two_heads,
        {"loss": {"a": "mse", "b": "sparse_categorical_crossentropy"}, "metrics": {"b": "acc"}},
        (X, {"a": Y, "b": LABELS}),
        {},
    ),
    "none": (two_heads, {"loss": ["mse", None]}, (X, [Y, LABELS]), {}),
    "one for both": (two_heads, {"loss": "mse", "loss_weights": 0.5}, (X, [Y, np.repeat(Y, 3, 1)]), {}),
}
if BACKEND != "torch":
    PLAIN["uncompiled"] = (net, {"loss": "mse", "jit_compile": False}, (X, Y), {})
    PLAIN["compiled"] = (net, {"loss": "mse", "jit_compile": True}, (X, Y), {})
    PLAIN["many steps"] = (net, {"loss": "mse", "steps_per_execution": 3}, (X, Y), {})
PLAIN["short last batch"] = (net, {"loss": "mse"}, (X[:50], Y[:50]), {})

DEFAULT = ("name", "rank", "dropout", "sample weights", "padding", "two losses", "many steps", "short last batch")
"""Cases of the default tier: each is one or two compilations."""
CASES = [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in PLAIN]


@pytest.mark.parametrize("name", CASES)
def test_equals_the_plain_model_where_nothing_is_limited(name: str) -> None:
    make, how, (x, y), others = PLAIN[name]
    runs = []
    for wrap in (lambda model: model, LimitedModel):
        keras.utils.set_random_seed(3)
        inner = make()
        model = wrap(inner)
        model.compile(**{"optimizer": "sgd", **how})
        history = model.fit(x, y, **FIT, **others).history
        keras.utils.set_random_seed(3)
        runs.append((history, inner.get_weights(), model.evaluate(x, y, verbose=0), model))
    (plain, weights, score, _), (limited, limited_weights, limited_score, model) = runs
    extra = {name for name in limited if name not in plain}
    assert extra == {f"{metric}" for metric in extra if metric.endswith(("alrc_limited", "alrc_nonfinite"))}
    assert len(extra) == 2 * len(model.limits)
    for key, values in plain.items():
        np.testing.assert_allclose(limited[key], values, rtol=1e-5, err_msg=key)
    np.testing.assert_allclose(limited_score, score, rtol=1e-5)
    assert all(np.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(weights, limited_weights, strict=True))
    for layer in model.limits.values():
        assert int(layer.count) == 2 * -(-(51 if name == "validation" else len(x)) // 16)


def by_hand(rule: rules.ALRC, targets: Any, weights: Any = None) -> tuple[list[Any], Any, list[float]]:
    """Train with the pure rule between forward and optimiser, in numpy gradients of a linear model."""
    kernel, bias, state = np.zeros((4, 1)), np.zeros(1), rule.init()
    shares = []
    for _ in range(FIT["epochs"]):
        hits = 0.0
        for start in range(0, len(X), FIT["batch_size"]):
            rows = slice(start, start + FIT["batch_size"])
            x, y = X[rows].astype(np.float64), targets[rows].astype(np.float64)
            error = (x @ kernel + bias - y)[:, 0]
            losses = error**2
            weight = None if weights is None else weights[rows].astype(np.float64)
            decision = rule.decide(losses, state)
            state = rule.update(losses, decision, state, weight=weight)
            hits += np.sum(decision.scale < 1)
            slope = 2 * error * decision.scale * (1 if weight is None else weight) / len(x)
            kernel -= 0.05 * (x.T @ slope)[:, None]
            bias -= 0.05 * slope.sum()
        shares.append(hits / len(X))
    return [kernel, bias], state, shares


RULES = {"start": {"start": (1.0, 1.5)}, "auto": {"observe": 4}}


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["alike", "weighted"])
@pytest.mark.parametrize("name", RULES)
def test_equals_limited_steps_by_hand(name: str, weights: Any, numbers: Any) -> None:
    model = linear(RULES[name])
    history = model.fit(X, SPIKY, sample_weight=weights, **FIT).history
    want, state, shares = by_hand(rules.ALRC(**RULES[name]), SPIKY, weights)
    assert shares[-1] > 0, "nothing was limited"
    for ours, theirs in zip(model.model.get_weights(), want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(numbers(model.limit.mu1), state.mu1, rtol=1e-4)
    np.testing.assert_allclose(numbers(model.limit.mu2), state.mu2, rtol=1e-3)
    np.testing.assert_allclose(history["alrc_limited"], shares, atol=1e-6)


def linear(settings: dict[str, Any], kind: type[ALRC] = ALRC) -> Any:
    """Return a compiled linear model that starts from zero."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, kernel_initializer="zeros")])
    limited = LimitedModel(model, kind(**settings))
    limited.compile(keras.optimizers.SGD(0.05), "mse")
    return limited


class PassesThrough(ALRC):
    """Limit nothing, ever."""

    def call(
        self, losses: Any, mask: Any = None, weight: Any = None, training: Any = None, return_scale: bool = False
    ) -> Any:
        return super().call(losses, mask, weight, False, return_scale)


def test_the_comparison_by_hand_can_fail() -> None:
    model = linear(RULES["start"], PassesThrough)
    model.fit(X, SPIKY, **FIT)
    want, *_ = by_hand(rules.ALRC(**RULES["start"]), SPIKY)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(model.model.get_weights()[0], want[0], rtol=1e-3)


def test_evaluation_neither_limits_nor_learns(numbers: Any) -> None:
    model = linear(RULES["start"])
    model.fit(X, SPIKY, **FIT)
    before = model.limit.state_dict()
    score = model.evaluate(X, SPIKY, verbose=0)
    error = model.predict(X, verbose=0) - SPIKY
    np.testing.assert_allclose(score, np.mean(error**2), rtol=1e-5)
    assert isinstance(score, float)
    after = model.limit.state_dict()
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.skipif(BACKEND == "jax", reason="Keras itself loses masks between a compiled jax step's call and its loss")
def test_padding_is_not_learned_from(numbers: Any) -> None:
    model = LimitedModel(reader(), ALRC(observe=4))
    model.compile(keras.optimizers.SGD(0.0), PER_TOKEN(from_logits=True))
    logits = model.predict(TOKENS[:8], verbose=0)
    model.train_on_batch(TOKENS[:8], TOKENS[:8])
    losses = keras.losses.sparse_categorical_crossentropy(TOKENS[:8], logits, from_logits=True)
    np.testing.assert_allclose(numbers(model.limit.mu1), numbers(losses)[TOKENS[:8] > 0].mean(), rtol=1e-5)
    assert (TOKENS[:8] == 0).any()


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(policy: str) -> None:
    weights = []
    for wrap in (lambda model: model, LimitedModel):
        keras.utils.set_random_seed(3)
        layers = [keras.Input((4,), dtype="float32"), keras.layers.Dense(8, dtype=policy)]
        inner = keras.Sequential([*layers, keras.layers.Dense(1, dtype=policy)])
        inner.dtype_policy = policy
        model = wrap(inner)
        model.compile("sgd", "mse")
        model.fit(X, Y, **FIT)
        is_scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        assert is_scaled == (policy == "mixed_float16")
        weights.append(inner.get_weights())
    assert all(np.allclose(a, b, rtol=1e-2, atol=1e-3) for a, b in zip(*weights, strict=True))
    assert model.limit.mean.dtype == "float32"
    # the true loss, not the one that is scaled by 2^15
    assert 0 < float(keras.ops.convert_to_numpy(model.limit.mu1)) < 20


def test_limiters_are_named_and_chosen() -> None:
    model = LimitedModel(two_heads(), {"a": ALRC(start=(1.0, 1.5)), "b": None})
    model.compile("sgd", ["mse", "ce"])
    model.fit(X, [Y, LABELS], **FIT)
    assert [*model.limits] == ["a"]
    assert model.limit is model.limits["a"]
    with pytest.raises(ValueError, match="one loss, one ALRC"):
        LimitedModel(two_heads(), ALRC()).compile("sgd", ["mse", "ce"])
    with pytest.raises(ValueError, match="limit was given for c"):
        LimitedModel(two_heads(), {"c": ALRC()}).compile("sgd", ["mse", "ce"])
    with pytest.raises(TypeError, match=r"keras\.Model"):
        LimitedModel(ALRC())
    with pytest.raises(TypeError, match="ALRC"):
        LimitedModel(net(), rules.ALRC())
    with pytest.raises(ValueError, match="0 limiters"):
        _ = LimitedModel(net()).limit


def test_one_loss_for_unknown_outputs_is_refused() -> None:
    class Two(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.dense = keras.layers.Dense(1)

        def call(self, inputs: Any) -> Any:
            return [self.dense(inputs), self.dense(2 * inputs)]

    model = LimitedModel(Two())
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="list or dictionary"):
        model.fit(X, [Y, Y], **FIT)


def test_compiles_again_and_clones() -> None:
    model = linear(RULES["start"])
    model.fit(X, Y, **FIT)
    limit, count = model.limit, int(model.limit.count)
    model.compile("adam", "mae")
    model.fit(X, Y, **FIT)
    assert model.limit is limit
    assert int(limit.count) == 2 * count
    clone = keras.models.clone_model(model)
    assert isinstance(clone, LimitedModel)
    assert clone.limit is not limit
    assert (clone.limit.rule, int(clone.limit.count)) == (limit.rule, 0)


def test_nonfinite_losses_are_told() -> None:
    target = Y.copy()
    target[3] = np.inf
    model = LimitedModel(net())
    model.compile(keras.optimizers.SGD(0.0), "mse")
    history = model.fit(X[:8], target[:8], epochs=1, batch_size=8, verbose=0).history
    assert history["alrc_nonfinite"] == [0.125]
    assert np.isfinite(history["loss"][0])


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "torch", reason="the others compile in the default tests")
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch compiles with a C++ compiler")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler, of itself
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_torch_compiles() -> None:
    """Takes a minute: inductor compiles the whole step with a C++ compiler."""
    runs = []
    for compiled in (False, True):
        model = LimitedModel(net(), ALRC(observe=4))
        model.compile("sgd", "mse", jit_compile=compiled)
        model.fit(X, SPIKY, **FIT)
        runs.append(model.model.get_weights())
    assert all(np.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(*runs, strict=True))


def compiled_gradients() -> tuple[list[Any], list[Any]]:
    """Return the gradients of some batches, eager and by torch's compiler with its division of the graph."""
    import torch

    torch.compiler.reset()
    found: tuple[list[Any], list[Any]] = ([], [])
    for gradients, is_compiled in zip(found, (False, True), strict=True):
        model, limit = net(), ALRC(observe=4)

        def mean(x: Any, y: Any, model: Any = model, limit: Any = limit) -> Any:
            return limit(keras.losses.mean_squared_error(y, model(x, training=True)), training=True).mean()

        call = torch.compile(mean, dynamic=False, backend="aot_eager_decomp_partition") if is_compiled else mean
        for i in range(8):
            rows = slice(i % 4 * 16, i % 4 * 16 + 16)
            model.zero_grad()
            call(torch.from_numpy(X[rows]), torch.from_numpy(SPIKY[rows])).backward()
            gradients.append([weight.value.grad.numpy().copy() for weight in model.trainable_variables])
        assert float(limit.rate.numpy()) > 0, "nothing was limited"
    return found


@pytest.mark.skipif(BACKEND != "torch", reason="other compilers keep what is overwritten")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler, of itself
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_the_backward_pass_of_compiled_torch_knows_the_state_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler may compute factors again in the backward pass, when the weights have been overwritten."""
    eager, compiled = compiled_gradients()
    for want, got in zip(eager, compiled, strict=True):
        for one, other in zip(want, got, strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-6)
    monkeypatch.setattr("alrc.keras.loss.ops.stack", list)  # the copies are the weights themselves
    with pytest.raises((RuntimeError, AssertionError), match=r"modified by an inplace operation|Not equal"):
        compiled_gradients()
