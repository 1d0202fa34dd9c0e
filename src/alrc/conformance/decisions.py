"""The tests of single decisions: gradient truth (T1), sign and scale (T4), and whether anything is done at all (T8)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alrc.conformance.criteria import Criteria, ordinary
from alrc.conformance.protocol import Make, Stabiliser, Traits, feed
from alrc.conformance.verdict import Findings

__all__ = ["free_and_effective", "gradient_truth", "sign_and_scale"]

NORM_ERROR = 0.05
"""Relative error of a clipped norm: some published clippers move their threshold a little with the norm at hand."""


def settled(make: Make, criteria: Criteria, size: int = 1) -> Stabiliser:
    """Return a stabiliser that has seen ordinary steps."""
    stabiliser = make("float32")
    feed(stabiliser, ordinary(np.random.default_rng(criteria.seed), criteria.warm_up, size))
    return stabiliser


def gradient_truth(make: Make, criteria: Criteria, found: Findings) -> None:
    """T1: what is limited has the value of the limit and a gradient scaled to match; the rest is untouched."""
    kind = make("float32").traits.kind
    stabiliser = settled(make, criteria, 4 if kind == "loss" else 1)
    limit = stabiliser.limit()
    if not found.expect(0 < limit < np.inf, f"no limit after {criteria.warm_up} ordinary steps: it is {limit:g}"):
        return
    if kind == "loss":
        for multiples in ([0.5, 2.0, 1.0, 10.0, 0.9], [2.0, 3.0, 100.0], [4.0]):
            parts = [[one] for one in multiples]
            for part in [multiples] if stabiliser.traits.is_elementwise else parts:
                _true_losses(stabiliser, np.array(part), criteria, found)
    elif kind == "gradient":
        _true_gradients(stabiliser, criteria, found)
    else:
        _true_steps(stabiliser, found)


def _true_losses(stabiliser: Stabiliser, multiples: NDArray[Any], criteria: Criteria, found: Findings) -> None:
    """Compare values and gradient factors of losses that are multiples of the limit with what they must be."""
    limit = stabiliser.limit()
    losses = (multiples * limit).astype(np.float32).astype(np.float64)
    [(value, factor, _)] = stabiliser.step([losses])
    over, under = multiples > 1, multiples < 1
    touched = under & ((value != losses) | (factor != 1))
    found.expect(not touched.any(), f"losses below the limit were touched: factors {_show(factor[under])}")
    at = ~over & ~under
    is_kept = np.allclose(value[at], limit, rtol=criteria.exact) and np.allclose(factor[at], 1, rtol=criteria.exact)
    found.expect(
        is_kept, f"a loss equal to the limit {limit:g} gets value {_show(value[at])}, factor {_show(factor[at])}"
    )
    wrong = over & ~(np.abs(value / limit - 1) <= criteria.exact)
    found.expect(not wrong.any(), f"limited losses have the value {_show(value[wrong])}, not the limit {limit:.5g}")
    want = limit / losses
    if stabiliser.traits.is_signed:  # (limit - c) / (loss - c) with one c below the limit for all
        want = factor
        pivot = (limit - factor[over] * losses[over]) / (1 - factor[over])
        is_one = np.ptp(pivot) <= 1e3 * criteria.exact * limit and np.all(pivot < limit)
        found.expect(bool(is_one), f"factors {_show(factor[over])} do not come from one reference level")
    wrong = over & ~(np.abs(factor / want - 1) <= criteria.exact)
    told = f"limited losses have gradient factors {_show(factor[wrong])}, not limit / loss = {_show(want[wrong])}"
    found.expect(not wrong.any(), told)


def _true_gradients(stabiliser: Stabiliser, criteria: Criteria, found: Findings) -> None:
    """Check that a large gradient keeps its direction and comes out with the norm of the limit."""
    for multiple in (10.0, 1000.0):
        limit = stabiliser.limit()
        [(_, factor, cosine)] = stabiliser.step([np.array([multiple * limit])])
        norm = float(factor[0]) * multiple * limit
        is_limit = abs(norm / limit - 1) <= NORM_ERROR
        found.expect(
            is_limit, f"a gradient of norm {multiple * limit:.3g} comes out with {norm:.3g}, limit {limit:.3g}"
        )
        found.expect(cosine >= 1 - criteria.exact, f"a limited gradient turns: cosine {cosine:.6f}")
    limit = stabiliser.limit()
    [(_, factor, _)] = stabiliser.step([np.array([0.5 * limit])])
    found.expect(factor[0] == 1, f"a gradient of half the limit is scaled by {factor[0]:.6g}")
    [(_, factor, _)] = stabiliser.step([np.array([0.0])])
    found.expect(not np.isnan(factor[0]), "a gradient of zero becomes NaN")


def _true_steps(stabiliser: Stabiliser, found: Findings) -> None:
    """Check that a step is either made in full or not at all."""
    for multiple, want in ((0.5, 1.0), (100.0, 0.0), (0.5, 1.0)):
        [(_, factor, cosine)] = stabiliser.step([np.array([multiple * stabiliser.limit()])])
        is_right = factor[0] == want if want == 0 else abs(factor[0] - want) < 1e-3 and cosine > 0.999
        found.expect(is_right, f"a step at {multiple:g} of the limit is made with factor {factor[0]:g}, not {want:g}")


def sign_and_scale(make: Make, criteria: Criteria, found: Findings) -> None:
    """T4: the multiplier is in [0, 1] for every sign, scale and precision; decisions do not depend on the unit."""
    traits = make("float32").traits
    for dtype in traits.dtypes:
        for name, stream in _hard_streams(traits, dtype, criteria):
            stabiliser = make(dtype)
            outcomes = [stabiliser.step([row])[0] for row in stream]
            factors = np.array([outcome.factor for outcome in outcomes], dtype=np.float64)
            wild = factors[~((factors >= 0) & (factors <= 1 + criteria.exact))]
            found.expect(not wild.size, f"{dtype}, {name}: multiplier {wild[0] if wild.size else 0:.3g}")
            values = np.array([outcome.value for outcome in outcomes], dtype=np.float64)
            is_number = traits.kind != "loss" or bool(np.isfinite(values).all())
            found.expect(is_number, f"{dtype}, {name}: values are not finite")
    _invariant(make, criteria, found)
    _knows_a_small_spread(make, criteria, found)
    if traits.is_signed:
        for level in (-5.0, 100.0):
            _unmoved(make, lambda stream, level=level: stream + level, f"{level:+g}", criteria, found)
    elif traits.kind == "loss":
        found.note("losses below zero are not claimed")


def _hard_streams(traits: Traits, dtype: str, criteria: Criteria) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield streams of 80 steps that end with a spike, representable in the precision."""
    rng = np.random.default_rng(criteria.seed)
    tiny, huge, spike = (1e-3, 1e3, 30.0) if dtype == "float16" else (1e-8, 1e8, 100.0)
    size = 4 if traits.is_elementwise else 1
    noise = ordinary(rng, 80, size)
    streams = {"constant": 0 * noise + 1, "zero": 0 * noise}
    streams |= {f"around {tiny:g}": tiny * noise, f"around {huge:g}": huge * noise}
    streams["mean 1e3, std 1e-2"] = 1e3 + 0.01 * rng.normal(size=noise.shape)
    if traits.kind == "loss":
        streams["constant -1"] = 0 * noise - 1
        streams["sign-crossing"] = rng.normal(0.2, 1.0, noise.shape)
        streams["negative"] = -noise
    for name, stream in streams.items():
        level = float(np.abs(stream).max()) or 1.0
        last = stream[:1].copy()
        last[0, 0] = spike * level
        yield name, np.concatenate([stream, last, stream[:5]])


def _spiky(traits: Traits, criteria: Criteria) -> NDArray[Any]:
    """Make an ordinary stream with some spikes after its start."""
    stream = ordinary(np.random.default_rng(criteria.seed), 200, 4 if traits.is_elementwise else 1)
    stream[110::30, 0] *= 10
    return stream


def _unmoved(make: Make, change: Any, how: str, criteria: Criteria, found: Findings) -> None:
    """Compare the decisions about a stream with those about the stream after a change that must not matter."""
    stabiliser = make("float32")
    stream = _spiky(stabiliser.traits, criteria)
    before, after = feed(stabiliser, stream), feed(make("float32"), change(stream))
    difference = np.nan_to_num(np.abs(after - before), nan=1.0)
    worst = int(difference.argmax())
    told = f"magnitudes {how} change a factor from {before.flat[worst]:.3g} to {after.flat[worst]:.3g}"
    found.expect(float(difference.max()) <= criteria.same, told)


def _invariant(make: Make, criteria: Criteria, found: Findings) -> None:
    """Multiply all magnitudes by powers of two and other numbers."""
    stabiliser = make("float32")
    spikes = feed(stabiliser, _spiky(stabiliser.traits, criteria))[110::30, 0]
    if found.expect(float(np.nan_to_num(spikes, nan=1.0).min()) < 0.9, "no 10x spike is limited"):
        for scale in (2.0**-20, 2.0**20, 1e-8, 1e8):
            _unmoved(make, lambda stream, scale=scale: scale * stream, f"times {scale:.2g}", criteria, found)


def _knows_a_small_spread(make: Make, criteria: Criteria, found: Findings) -> None:
    """Check that float32 can tell a spike from magnitudes of mean 1000 and standard deviation 0.01.

    For losses 1001 is one. Gradient norms never lie that close, so clippers and skippers are asked about 1020.
    """
    rng = np.random.default_rng(criteria.seed)
    stabiliser = make("float32")
    size = 4 if stabiliser.traits.is_elementwise else 1
    factors = feed(stabiliser, 1e3 + 0.01 * rng.normal(size=(criteria.warm_up, size)))
    passing = np.nan_to_num(factors).mean()
    found.expect(passing >= criteria.passing, f"mean 1e3, std 1e-2: ordinary elements keep {passing:.2f}")
    limit = stabiliser.limit()
    large = 1001.0 if stabiliser.traits.kind == "loss" else 1020.0
    [(_, factor, _)] = stabiliser.step([np.concatenate([[large], np.full(size - 1, 1e3)])])
    told = f"mean 1e3, std 1e-2: {large:g} is not limited (limit {limit:.6g})"
    found.expect(bool(factor[0] < 1), told)


def free_and_effective(make: Make, criteria: Criteria, found: Findings) -> None:
    """T8: a spike is limited at all, no step reads a tensor, and the whole is one graph to a compiler."""
    stabiliser = settled(make, criteria)
    passing = np.nan_to_num(feed(stabiliser, ordinary(np.random.default_rng(criteria.seed + 1), 50))).mean()
    found.expect(passing >= criteria.passing, f"ordinary elements keep {passing:.2f} of their gradient")
    [(_, factor, _)] = stabiliser.step([np.array([criteria.second_spike])])
    told = f"a {criteria.second_spike:g}x spike keeps {factor[0]:.2g} of its gradient"
    found.expect(bool(factor[0] <= criteria.caught), told)
    optional: Any = make("float32")
    if hasattr(optional, "reads"):
        names = optional.reads()
        found.expect(not names, f"a step reads tensors: {', '.join(names)}")
    else:
        found.note("not looked at whether a step reads tensors")
    if hasattr(optional, "traces"):
        why = optional.traces()
        found.expect(not why, f"is not one graph: {why}")
    else:
        found.note("not looked at whether a compiler can trace it")


def _show(numbers: NDArray[Any]) -> str:
    """Print a few numbers."""
    return ", ".join(f"{number:.4g}" for number in np.ravel(numbers)[:3])
