"""Hold the Keras layer against the slow oracle: values, gradients and state, on the backend of this process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="these are the tests of alrc.keras")

from alrc import rules  # noqa: E402 - what cannot be imported is skipped first
from alrc.keras import ALRC  # noqa: E402
from alrc.ops import Ops  # noqa: E402
from alrc.reference import alrc_trace  # noqa: E402

SETTINGS: dict[str, dict[str, Any]] = {
    "auto": {"observe": 8, "betas": (0.95, 0.95)},
    "start": {"start": (1.0, 1.04)},
    "paper": vars(rules.ALRC.paper(2.0, (0.95, 0.98), 1.5, 4.0)),
    "scripts": vars(rules.ALRC.cifar_scripts()),
    "signed, below": {"observe": 8, "signed": True, "num_stddev_below": 2.0},
}
HAS_DOUBLE = keras.backend.backend() != "jax"


def spiky(seed: int, *shape: int) -> np.ndarray:
    """Make positive losses around 1 of which every 12th or so is far out."""
    rng = np.random.default_rng(seed)
    return np.exp(rng.normal(0, 0.3, shape)) * np.where(rng.random(shape) < 0.08, rng.uniform(5, 50, shape), 1)


def check_stream(limit: Any, step: Any, numbers: Any, dtype: str = "float32", settings: Any = None) -> None:
    """Compare values, gradients, moments and limits of every step with the oracle."""
    stream = spiky(1, 50, 6) * (30 if settings == SETTINGS["scripts"] else 1)
    stream = numbers(keras.ops.cast(keras.ops.convert_to_tensor(stream.astype(np.float32)), dtype))
    want = alrc_trace(stream, **(settings or vars(limit.rule)))
    assert sum(int(np.sum(scale < 1)) for scale in want.scale) >= 5, "the stream limits too little to test"
    close = {"float64": 1e-10, "float32": 2e-5}.get(dtype, 1e-2)
    state_close = 2e-5 if dtype != "float64" else 1e-10
    for i, losses in enumerate(stream):
        limited, gradient = step(limit, losses, dtype)
        np.testing.assert_allclose(limited, want.limited[i], rtol=close, err_msg=f"values of step {i}")
        np.testing.assert_allclose(gradient, want.scale[i], rtol=close, err_msg=f"gradients of step {i}")
        for name in ("mu1", "mu2"):
            told = f"{name} after step {i}"
            np.testing.assert_allclose(
                numbers(getattr(limit, name)), getattr(want, name)[i], rtol=state_close, err_msg=told
            )
    np.testing.assert_allclose(numbers(limit.limit), alrc_limit(want, limit), rtol=1e-3)


def alrc_limit(want: Any, limit: Any) -> float:
    """Return the limit after a trace."""
    var = want.mu2[-1] - want.mu1[-1] ** 2
    gain, rule = limit.rule.gain, limit.rule
    spread = np.sqrt(gain * want.mu2[-1] - (gain * want.mu1[-1]) ** 2 + rule.eps) if gain != 1 else np.sqrt(var)
    return gain * want.mu1[-1] + rule.num_stddev * spread


@pytest.mark.parametrize("name", SETTINGS)
def test_follows_the_oracle(name: str, step: Any, numbers: Any) -> None:
    check_stream(ALRC(**SETTINGS[name]), step, numbers, settings=SETTINGS[name])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("policy", [None, "mixed_bfloat16", "mixed_float16", "float16"])
def test_state_is_float32_whatever_the_losses(dtype: str, policy: str | None, step: Any, numbers: Any) -> None:
    limit = ALRC(observe=8, dtype=policy)
    check_stream(limit, step, numbers, dtype)
    assert {limit.mean.dtype, limit.var.dtype, limit.rate.dtype, limit.recent.dtype} == {"float32"}
    assert limit.count.dtype == "int32"
    out = limit(keras.ops.ones((3,), dtype=dtype), training=True)
    assert keras.backend.standardize_dtype(out.dtype) == dtype


@pytest.mark.skipif(not HAS_DOUBLE, reason="jax has no float64 unless the whole process is told so")
def test_float64(step: Any, numbers: Any) -> None:
    check_stream(ALRC(observe=8, dtype="float64"), step, numbers, "float64")


@pytest.mark.skipif(not HAS_DOUBLE, reason="jax has no float64 unless the whole process is told so")
def test_float64_losses_and_float32_state(step: Any) -> None:
    limited, gradient = step(ALRC(start=(1.0, 1.04)), [0.5, 3.2], "float64")
    assert limited.dtype == np.float64
    np.testing.assert_allclose(limited, [0.5, 1.6], rtol=1e-6)
    np.testing.assert_allclose(gradient, [1.0, 0.5], rtol=1e-6)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (2, 3, 4)])
def test_any_shape(shape: tuple[int, ...], step: Any, numbers: Any) -> None:
    limit = ALRC(start=(1.0, 1.04))
    for losses in spiky(3, 12, *shape):
        trace = alrc_trace([losses.astype(np.float32)], start=(float(numbers(limit.mu1)), float(numbers(limit.mu2))))
        limited, gradient = step(limit, losses.astype(np.float32))
        assert limited.shape == shape
        np.testing.assert_allclose(limited, trace.limited[0], rtol=1e-5)
        np.testing.assert_allclose(gradient, trace.scale[0], rtol=1e-5)


def test_poison_leaves_no_trace(step: Any, numbers: Any) -> None:
    limit, twin = ALRC(observe=4), ALRC(observe=4)
    for losses in spiky(4, 30, 4).astype(np.float32):
        limited, gradient = step(limit, np.array([np.nan, np.inf, -np.inf, np.nan], dtype=np.float32))
        assert limited.tolist() == [0, 0, 0, 0]
        assert gradient.tolist() == [0, 0, 0, 0]
        poisoned = np.concatenate([losses, [np.nan]]).astype(np.float32)
        limited, gradient = step(limit, poisoned)
        want, want_gradient = step(twin, losses)
        np.testing.assert_allclose(limited[:4], want, rtol=1e-5)
        np.testing.assert_allclose(gradient, [*want_gradient, 0], rtol=1e-5)
    np.testing.assert_allclose(numbers(limit.limit), numbers(twin.limit), rtol=1e-5)
    assert int(limit.count) == int(twin.count)


def test_mask_and_weight(step: Any, numbers: Any) -> None:
    losses, mask = spiky(5, 20, 6).astype(np.float32), np.array([1, 1, 0, 1, 0, 1], dtype=bool)
    masked, plain, weighted = ALRC(observe=4), ALRC(observe=4), ALRC(observe=4)
    for row in losses:
        limited, gradient = step(masked, np.where(mask, row, np.nan).astype(np.float32), mask=mask)
        want, want_gradient = step(plain, row[mask])
        np.testing.assert_allclose(limited[mask], want, rtol=1e-5)
        np.testing.assert_allclose(gradient[mask], want_gradient, rtol=1e-5)
        assert not limited[~mask].any()
        assert not gradient[~mask].any()
        step(weighted, row, weight=mask.astype(np.float32))
    for other in (masked, weighted):
        np.testing.assert_allclose(numbers(other.limit), numbers(plain.limit), rtol=1e-5)
    before = masked.state_dict()
    step(masked, losses[0], mask=np.zeros(6, dtype=bool))
    assert all(np.array_equal(before[name], value) for name, value in masked.state_dict().items())


def test_weights_weigh(numbers: Any) -> None:
    heavy, twice = ALRC(start=(1.0, 2.0)), ALRC(start=(1.0, 2.0))
    heavy(np.array([0.5, 1.5], dtype=np.float32), weight=np.array([2, 1], dtype=np.float32), training=True)
    twice(np.array([0.5, 0.5, 1.5], dtype=np.float32), training=True)
    np.testing.assert_allclose(numbers(heavy.mu2), numbers(twice.mu2), rtol=1e-6)


def test_training_has_to_be_said(step: Any) -> None:
    limit = ALRC(start=(1.0, 1.04))
    losses = np.array([0.5, 3.2], dtype=np.float32)
    with pytest.raises(ValueError, match="training=True"):
        limit(losses)
    before = limit.state_dict()
    assert keras.ops.convert_to_numpy(limit(losses, training=False)).tolist() == losses.tolist()
    assert before["mean"] == limit.state_dict()["mean"]
    limited, scale = limit(losses, training=True, return_scale=True)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(limited), [0.5, 1.6], rtol=1e-6)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(scale), [1.0, 0.5], rtol=1e-6)
    assert before["count"] + 1 == limit.state_dict()["count"]
    _, scale = limit(losses, training=False, return_scale=True)
    assert keras.ops.convert_to_numpy(scale).tolist() == [1, 1]


def test_a_model_that_holds_the_layer_tells_it() -> None:
    losses = keras.Input((3,))
    model = keras.Model(losses, ALRC(start=(1.0, 1.04))(losses, training=None))
    rows = np.full((2, 3), 3.2, dtype=np.float32)
    assert keras.ops.convert_to_numpy(model(rows, training=False)).max() == np.float32(3.2)
    assert keras.ops.convert_to_numpy(model(rows, training=True)).max() < 1.7


@pytest.mark.parametrize(
    ("others", "error", "told"),
    [
        ({"losses": np.array([1, 2])}, TypeError, "floating point"),
        ({"mask": np.array([1, 0])}, TypeError, "boolean"),
        ({"weight": np.array([1, 0])}, TypeError, "weight must be floating point"),
        ({"mask": np.ones(3, dtype=bool)}, ValueError, r"mask of shape \(3,\)"),
        ({"weight": np.ones((2, 2), dtype=np.float32)}, ValueError, "does not broadcast"),
    ],
)
def test_refuses_what_is_not_meant(others: dict[str, Any], error: type[Exception], told: str) -> None:
    losses = others.pop("losses", np.array([1.0, 2.0], dtype=np.float32))
    with pytest.raises(error, match=told):
        ALRC()(losses, training=True, **others)


def test_settings_go_round() -> None:
    for limit in (ALRC(2.0, observe=8, name="own"), ALRC.paper(), ALRC.reference(), ALRC.cifar_scripts()):
        again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(limit))
        assert isinstance(again, ALRC)
        assert again.rule == limit.rule
        assert again.name == limit.name
    assert ALRC.paper().rule == rules.ALRC.paper()
    assert ALRC.reference().rule == rules.ALRC.reference()
    assert ALRC.cifar_scripts().rule == rules.ALRC.cifar_scripts()
    with pytest.raises(ValueError, match="num_stddev"):
        ALRC(-1.0)


@pytest.mark.parametrize("settings", [{"observe": 8}, {"start": (1.0, 1.04)}])
def test_state_is_portable(settings: dict[str, Any], numbers: Any) -> None:
    """Go on with the pure rule in numpy where the layer stopped, and back."""
    limit, rule = ALRC(**settings), rules.ALRC(**settings)
    stream = spiky(6, 40, 5).astype(np.float32)
    for losses in stream[:20]:
        limit(losses, training=True)
    state: Any = rule.load_state_dict(limit.state_dict())
    for losses in stream[20:]:
        decision = rule.decide(losses, state)
        state = rule.update(losses, decision, state)
        np.testing.assert_allclose(numbers(limit(losses, training=True)), decision.limited, rtol=1e-5)
    other = ALRC(**settings)
    other.load_state_dict(rule.state_dict(state))
    np.testing.assert_allclose(numbers(other.limit), numbers(limit.limit), rtol=1e-5)
    with pytest.raises(ValueError, match="version"):
        ALRC(**({"observe": 8} if "start" in settings else {"start": (1.0, 2.0)})).load_state_dict(limit.state_dict())


class LimitingDisabled(ALRC):
    """Learn and limit nothing."""

    def call(self, losses: Any, training: Any = None) -> Any:
        super().call(losses, training=training)
        return losses


class GradientZeroed(ALRC):
    """Select the limit: right values, no gradient."""

    def call(self, losses: Any, training: Any = None) -> Any:
        limit = keras.ops.cast(self.limit, losses.dtype)
        super().call(losses, training=training)
        return keras.ops.where(losses < limit, losses, limit)


class _LateRule(rules.ALRC):
    """Limit after the update instead of before it."""

    def decide(self, losses: Any, state: Any, ops: Ops) -> Any:
        # What decides is a copy of the state in real numbers.
        state = state._replace(count=keras.ops.cast(state.count, "int32"))
        first = super().decide(losses, state, ops)
        return super().decide(losses, super().update(losses, first, state, ops), ops)


class _OtherFeed(rules.ALRC):
    """Feed the moments with unlimited losses."""

    def measure(self, losses: Any, decision: Any, *others: Any) -> Any:
        return super().measure(losses, decision._replace(limited=losses), *others)


@pytest.mark.parametrize("wrong", [LimitingDisabled, GradientZeroed, _LateRule, _OtherFeed])
def test_goes_red_on_a_mutant(wrong: Any, step: Any, numbers: Any) -> None:
    settings = SETTINGS["auto"]
    limit = wrong(**settings) if issubclass(wrong, ALRC) else ALRC.from_rule(wrong(**settings))
    with pytest.raises(AssertionError, match="step"):
        check_stream(limit, step, numbers, settings=settings)
