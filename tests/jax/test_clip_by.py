"""Hold `clip_by` beside optax, where optax has such a rule, and beside the pure rule fed with numpy's norms."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax", reason="needs JAX")
pytest.importorskip("optax", reason="needs optax")
import jax
import jax.numpy as jnp
import optax
from jax import lax

from alrc.jax.transforms import ClipState, clip_by
from alrc.rules import AGC, AutoClip, Norm, UnitNorms, Value, ZClip

tree_get = optax.tree_utils.tree_get
RULES: dict[str, Any] = {
    "value": Value(0.5),
    "norm": Norm(1.0),
    "cubic norm": Norm(1.0, norm_type=3.0),
    "norm of each": Norm(0.5, scope="parameter"),
    "largest": Norm(0.5, norm_type=math.inf),
    "agc": AGC(0.1),
    "agc without some": AGC(0.1, exclude=("layers.1.*", "head")),
    "autoclip": AutoClip(50.0, window=6),
    "autoclip of each": AutoClip(50.0, window=6, scope="parameter"),
    "zclip": ZClip(max_norm=None, warmup=4),
    "zclip as published": ZClip(max_norm=20.0, warmup=4, recover=False),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
SHAPES = {"d0": (), "d1": (7,), "d2": (5, 4), "d3": (3, 2, 4), "d4": (3, 3, 2, 4), "d5": (2, 3, 2, 2, 5)}
TREES: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "dictionary": lambda make: {name: make(*shape) for name, shape in SHAPES.items()},
    "nested": lambda make: {"layers": [(make(4, 3), make(3)), (make(3, 1), make(1, 6))], "none": None, "d": make(1, 1)},
    "one array": lambda make: make(6, 5),
    "half": lambda make: {"a": make(8, 4).astype(jnp.bfloat16), "b": make(4), "c": make().astype(jnp.float16)},
}
every_tree = pytest.mark.parametrize("tree", TREES.values(), ids=TREES)


def make_tree(tree: Callable[[Callable[..., Any]], Any], seed: int, size: float = 1.0) -> Any:
    """Fill a tree with normal numbers."""
    rng = np.random.default_rng(seed)
    return tree(lambda *shape: jnp.asarray(size * rng.normal(size=shape), jnp.float32))


def model(seed: int, size: float = 1.0) -> Any:
    """Make a tree of leaves with names."""
    tree = {"head": (3, 4), "layers": [{"bias": (5,), "kernel": (4, 5)}, {"kernel": (2, 2, 3, 5), "scale": ()}]}
    return make_tree(
        lambda make: jax.tree.map(lambda s: make(*s), tree, is_leaf=lambda x: isinstance(x, tuple)), seed, size
    )


def assert_close(ours: Any, theirs: Any, rtol: float = 2e-6) -> None:
    """Compare leaf by leaf, half precision to its last places: optax sums in it."""
    for one, two in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert one.dtype == two.dtype
        tolerance = max(rtol, 4 * float(jnp.finfo(one.dtype).eps) if one.dtype.itemsize == 2 else 0)
        np.testing.assert_allclose(np.asarray(one, np.float32), np.asarray(two, np.float32), rtol=tolerance)


def same(one: Any, other: Any) -> bool:
    """Compare two pytrees bit for bit."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


# ------------------------------------------------------------------------------------------------- the same as optax


def both(rule: Any, theirs: Any, tree: Any, size: float = 1.0) -> tuple[Any, Any, Any]:
    """Return the gradients, and what ours and theirs make of them."""
    gradients, weights = make_tree(tree, 0, size), make_tree(tree, 1)
    results = [
        jax.jit(transform.update)(gradients, transform.init(weights), weights)[0]
        for transform in (clip_by(rule), optax.with_extra_args_support(theirs))
    ]
    return gradients, *results


@every_tree
@pytest.mark.parametrize("threshold", [0.3, 1e3])
def test_value_equals_optax(tree: Any, threshold: float) -> None:
    gradients, ours, theirs = both(Value(threshold), optax.clip(threshold), tree)
    assert same(ours, theirs)
    assert same(ours, gradients) == (threshold > 1)


@every_tree
@pytest.mark.parametrize("max_norm", [0.5, 1e3])
def test_norm_equals_optax(tree: Any, max_norm: float) -> None:
    gradients, ours, theirs = both(Norm(max_norm), optax.clip_by_global_norm(max_norm), tree)
    assert_close(ours, theirs, 2e-2 if tree is TREES["half"] else 4e-6)  # optax rounds the norm to half precision
    assert same(ours, gradients) == (max_norm > 1)


@every_tree
@pytest.mark.parametrize("clip_factor", [0.01, 0.5, 1e3])
def test_agc_equals_optax(tree: Any, clip_factor: float) -> None:
    gradients, ours, theirs = both(AGC(clip_factor), optax.adaptive_grad_clip(clip_factor), tree)
    assert_close(ours, theirs)
    assert same(ours, gradients) == (clip_factor > 1)


def test_agc_sums_over_all_but_the_last_of_six_axes() -> None:
    weights, gradients = (np.random.default_rng(seed).normal(size=(2, 1, 2, 2, 3, 4)) for seed in (0, 1))
    transform = clip_by(AGC(0.01))
    updates, _ = transform.update(jnp.asarray(gradients), transform.init(jnp.asarray(weights)), jnp.asarray(weights))
    norms, limits = (np.sqrt(np.sum(x**2, axis=(0, 1, 2, 3, 4))) for x in (gradients, weights))
    np.testing.assert_allclose(updates, gradients * (0.01 * limits / norms), rtol=1e-5)


def test_agc_moves_weights_that_are_zero() -> None:
    transform, weights = clip_by(AGC(0.01)), jnp.zeros((3, 2))
    updates, _ = transform.update(jnp.ones((3, 2)), transform.init(weights), weights)
    np.testing.assert_allclose(np.linalg.norm(updates, axis=0), 1e-5, rtol=1e-5)


TRUE = clip_by


class _Mutant:
    """Stand for `clip_by` with a known mistake."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __call__(self, rule: Any) -> Any:
        if self.how == "each element" and isinstance(rule, AGC):
            return optax.adaptive_grad_clip(rule.clip_factor, axis=())
        if self.how == "forgets":
            rule = replace(rule, **{"window": 1} if isinstance(rule, AutoClip) else {})
        true = TRUE(rule)

        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
            limited, after = true.update(updates, state, params)
            if self.how == "disabled":
                limited = updates
            if self.how == "zeroed":
                limited = jax.tree.map(lambda x, y: jnp.where(x == y, x, 0), updates, limited)
            return limited, after

        return optax.GradientTransformationExtraArgs(true.init, update)


@pytest.mark.parametrize("how", ["disabled", "zeroed", "each element"])
def test_the_comparison_with_optax_can_fail(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "clip_by", _Mutant(how))
    with pytest.raises(AssertionError):
        test_agc_equals_optax(TREES["dictionary"], 0.01)


# ---------------------------------------------------------------------------------------------- the same as the rule


def is_left_out(rule: Any, name: str) -> bool:
    return bool(rule.measures.exclude) and (name.startswith("layers.1.") or name == "head")


def expected_magnitudes(rule: Any, gradients: list[Any], weights: list[Any]) -> Any:
    """Measure with numpy, in float64, by the words of `Measure`."""
    order = rule.measures.norm_type
    if rule.measures.granularity == "global":
        return np.linalg.norm(np.concatenate([array.ravel() for array in gradients]), order)
    if rule.measures.granularity == "parameter":
        return np.array([np.linalg.norm(array.ravel(), order) for array in gradients])
    if rule.measures.granularity == "element":
        return np.array([np.max(abs(array)) for array in gradients])

    def units(arrays: list[Any]) -> Any:
        return np.concatenate([np.linalg.norm(x.reshape(-1, x.shape[-1] if x.ndim > 1 else 1), axis=0) for x in arrays])

    return UnitNorms(units(gradients), units(weights))


def expected_updates(rule: Any, decision: Any, gradients: list[Any]) -> list[Any]:
    """Scale with numpy."""
    if rule.measures.granularity == "global":
        return [gradient * decision.scale for gradient in gradients]
    if rule.measures.granularity == "element":
        return [np.clip(gradient, -decision.threshold, decision.threshold) for gradient in gradients]
    if rule.measures.granularity == "parameter":
        return [gradient * scale for gradient, scale in zip(gradients, decision.scale, strict=True)]
    numbers = [gradient.shape[-1] if gradient.ndim > 1 else 1 for gradient in gradients]
    factors = np.split(decision.scale, np.cumsum(numbers)[:-1])
    return [g * (f if g.ndim > 1 else f[0]) for g, f in zip(gradients, factors, strict=True)]


def sizes(number: int = 40) -> list[float]:
    """Make sizes of gradients with some spikes."""
    rng = np.random.default_rng(0)
    return [float(np.exp(rng.normal(0, 0.2))) * (30 if step in (12, 13, 30) else 1) for step in range(number)]


def named(tree: Any) -> tuple[list[str], list[Any]]:
    """Return names, joined by dots, and float64 arrays of a tree's leaves."""
    entries = jax.tree_util.tree_flatten_with_path(tree)[0]
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in entries]
    return names, [np.asarray(leaf, np.float64) for _, leaf in entries]


def check_against_rule(rule: Any, make: Callable[[Any], Any] = clip_by) -> None:
    """Follow a stream beside the pure rule in float64 over numpy's norms."""
    transform, weights = make(rule), model(99)
    names, arrays = named(weights)
    kept = [i for i, name in enumerate(names) if not is_left_out(rule, name)]
    state = transform.init(weights)
    memory = rule.init(len(kept) if rule.measures.granularity == "parameter" else None)
    update, limited = jax.jit(transform.update), 0
    for step, size in enumerate(sizes()):
        gradients = model(step, size)
        whole = named(gradients)[1]
        before = [whole[i] for i in kept]
        magnitudes = expected_magnitudes(rule, before, [arrays[i] for i in kept])
        decision = rule.decide(magnitudes, memory)
        memory = rule.update(magnitudes, decision, memory)
        updates, state = update(gradients, state, weights)
        after = named(updates)[1]
        for i, wanted in zip(kept, expected_updates(rule, decision, before), strict=True):
            np.testing.assert_allclose(after[i], wanted, rtol=1e-4, atol=1e-4 * size)
            limited += int(np.any(np.abs(wanted) < 0.999 * np.abs(whole[i])))
        for i in set(range(len(names))) - set(kept):
            np.testing.assert_array_equal(after[i], whole[i])
        flat = np.concatenate([gradient.ravel() for gradient in whole])
        np.testing.assert_allclose(tree_get(state, "norm"), np.linalg.norm(flat, rule.measures.norm_type), rtol=1e-5)
        np.testing.assert_allclose(
            tree_get(state, "threshold"), np.broadcast_to(decision.threshold, np.shape(decision.scale)), rtol=1e-3
        )
        share = np.mean(decision.scale < 1)
        np.testing.assert_allclose(tree_get(state, "fraction_limited"), share, rtol=1e-6)
        for one, two in zip(jax.tree.leaves(state.memory), jax.tree.leaves(memory), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-5)
    assert limited > 0, "nothing was limited"


@every_rule
def test_it_does_what_the_rule_says(rule: Any) -> None:
    check_against_rule(rule)


@pytest.mark.parametrize("how", ["disabled", "zeroed", "forgets"])
def test_the_comparison_with_the_rule_can_fail(how: str) -> None:
    with pytest.raises(AssertionError):
        check_against_rule(RULES["autoclip"], _Mutant(how))


# ---------------------------------------------------------------------------------------------- what is not finite


@every_rule
def test_a_bad_element_stays_visible_and_leaves_the_others_alone(rule: Any) -> None:
    transform, weights = clip_by(rule), model(99)
    state, update = transform.init(weights), jax.jit(transform.update)
    for step in range(8):
        _, state = update(model(step), state, weights)
    for bad in (np.nan, np.inf, -np.inf):
        gradients = model(50)
        kernel = np.array(gradients["layers"][0]["kernel"])
        kernel[1, 2] = bad
        gradients["layers"][0]["kernel"] = jnp.asarray(kernel)
        updates, after = update(gradients, state, weights)
        np.testing.assert_array_equal(np.asarray(updates["layers"][0]["kernel"])[:, 2], kernel[:, 2])
        assert np.isfinite(updates["head"]).all()
        assert not np.isfinite(tree_get(after, "norm"))
        if rule.measures.granularity == "global":
            assert same(updates, gradients)
            assert same(after.memory, state.memory)


def test_optax_spreads_a_nan_and_hides_an_infinity() -> None:
    gradients = jnp.array([1.0, jnp.nan])
    assert np.isnan(optax.clip_by_global_norm(1.0).update(gradients, optax.EmptyState())[0]).all()
    assert np.isfinite(optax.clip(1.0).update(jnp.array([jnp.inf]), optax.EmptyState())[0]).all()


# ------------------------------------------------------------------------------------------------- names and errors


def test_excluded_names_are_paths_with_dots() -> None:
    weights, gradients = model(0), model(1, 100.0)

    def untouched(*patterns: str) -> list[str]:
        transform = clip_by(AGC(0.01, exclude=patterns))
        updates, _ = jax.jit(transform.update)(gradients, transform.init(weights), weights)
        names, before = named(gradients)
        return [n for n, x, y in zip(names, before, named(updates)[1], strict=True) if np.array_equal(x, y)]

    assert untouched() == []
    assert untouched("head") == ["head"]
    assert untouched("layers.0.*") == ["layers.0.bias", "layers.0.kernel"]
    assert untouched("*.kernel", "*bias") == ["layers.0.bias", "layers.0.kernel", "layers.1.kernel"]
    assert untouched("*") == named(gradients)[0]
    with pytest.raises(ValueError, match=r"'tail\.\*', which fits none of the 5 leaves, such as 'head'"):
        untouched("tail.*")


def test_what_is_no_rule_and_missing_weights_are_refused() -> None:
    with pytest.raises(TypeError, match="rule must be a gradient rule"):
        clip_by(1.0)  # pyright: ignore[reportArgumentType]
    transform = clip_by(AGC())
    with pytest.raises(ValueError, match=r"AGC.* measures the weights too: call update\(updates, state, params\)"):
        transform.update(jnp.ones(2), transform.init(jnp.ones(2)))


# ------------------------------------------------------------------------------- optax's and JAX's transformations


@every_rule
def test_it_is_compiled_once_and_its_state_keeps_its_types(rule: Any) -> None:
    transform, weights, traces = clip_by(rule), model(99), []

    @jax.jit
    def step(gradients: Any, state: Any) -> Any:
        traces.append(1)
        return transform.update(gradients, state, weights)

    state = transform.init(weights)
    avals = jax.tree.map(jax.typeof, state)
    for number in range(3):
        updates, state = step(model(number), state)
        assert jax.tree.map(jax.typeof, state) == avals
        assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, weights)
    assert len(traces) == 1
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("name", ["norm", "agc", "autoclip of each", "zclip"])
def test_it_scans_and_maps(name: str) -> None:
    transform, weights = clip_by(RULES[name]), model(99)
    stream = jax.tree.map(lambda *xs: jnp.stack(xs), *[model(step, size) for step, size in enumerate(sizes(16))])

    def follow(stream: Any) -> Any:
        def step(state: Any, gradients: Any) -> Any:
            return transform.update(gradients, state, weights)[::-1]

        return lax.scan(step, transform.init(weights), stream)

    alone = jax.jit(follow)(stream)
    twice = jax.jit(jax.vmap(follow))(jax.tree.map(lambda x: jnp.stack([x, 2 * x]), stream))
    for one, two in zip(jax.tree.leaves(twice), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(one[0], two, rtol=1e-4, atol=1e-6)


def test_it_composes_with_optax() -> None:
    weights = model(99)
    parts = [optax.masked(clip_by(ZClip(warmup=2)), lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree))]
    optimizer = optax.chain(*parts, clip_by(AGC(0.1)), optax.adam(1e-3))
    state = optimizer.init(weights)
    updates, state = jax.jit(optimizer.update)(model(0), state, weights, value=1.0)
    found = optax.tree_utils.tree_get_all_with_path(state, "norm")
    kernels = [leaf for leaf in jax.tree.leaves(model(0)) if leaf.ndim > 1]
    np.testing.assert_allclose(found[0][1], optax.tree.norm(kernels), rtol=1e-5)
    assert jax.tree.structure(updates) == jax.tree.structure(weights)
    assert isinstance(state[0].inner_state, ClipState)
    kept = optax.tree_utils.tree_map_params(optimizer, lambda x: x, state)
    assert jax.tree.structure(kept) == jax.tree.structure(state)


def test_a_norm_that_does_not_share_its_squares_still_is_one_under_grad_and_vmap() -> None:
    transform = clip_by(Norm(1.0))

    def length(x: Any) -> Any:
        return jnp.sum(transform.update(x, transform.init(x))[0] ** 2)

    gradients = jnp.array([[3.0, 4.0], [0.3, 0.4]])
    np.testing.assert_allclose(jax.jit(jax.vmap(length))(gradients), [1.0, 0.25], rtol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.grad(length))(gradients[1]), [0.6, 0.8], rtol=1e-6)


@pytest.mark.parametrize("rule", [AutoClip(window=6), ZClip(), AGC()])
def test_the_state_is_plain_data(rule: Any) -> None:
    transform, weights = clip_by(rule), model(99)
    state = transform.init(weights)
    update = jax.jit(transform.update)
    for step in range(3):
        _, state = update(model(step), state, weights)
    copy = pickle.loads(pickle.dumps(state))
    one, two = (update(model(9, 30.0), held, weights) for held in (state, copy))
    assert same(one, two)
