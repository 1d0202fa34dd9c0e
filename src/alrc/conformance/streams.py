"""The tests of long streams: poison (T2), masking and shift (T3), one update (T5), resume (T6), ranks (T7)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from alrc.conformance.criteria import Criteria, ordinary
from alrc.conformance.protocol import Make, Stabiliser, feed
from alrc.conformance.verdict import Findings, NotApplicableError

__all__ = ["masking_and_shift", "one_update", "poison", "ranks", "resume"]

LATE = 100
"""Steps before a late poison: past every warm-up of the peers."""


def _width(stabiliser: Stabiliser, most: int) -> int:
    """Return the batch size of a stream: one where the whole step has one factor."""
    return most if stabiliser.traits.is_elementwise else 1


def _spike(size: int, height: float) -> NDArray[Any]:
    """Make a batch of ones whose first element is a spike."""
    return np.concatenate([[height], np.ones(size - 1)])


def _caught(stabiliser: Stabiliser, level: float, size: int, criteria: Criteria, found: Findings, when: str) -> bool:
    """Expect that a spike is caught now."""
    height = criteria.second_spike
    factor = stabiliser.step([level * _spike(size, height)])[0].factor[0]
    return found.expect(bool(factor <= criteria.caught), f"{when}: a {height:g}x spike keeps {factor:.2g}")


def _apart(limit: float, other: float) -> float:
    """Return the relative difference of two limits; 0 if both are the same or none, inf if one is none or no number."""
    if limit == other:
        return 0.0
    ratio = limit / other if other else np.inf
    return float(np.nan_to_num(abs(ratio - 1), nan=np.inf))


def _mean(factors: NDArray[Any]) -> float:
    """Return the mean factor; what became NaN got nothing."""
    return float(np.nan_to_num(factors).mean())


# --------------------------------------------------------------------------------------------------------- T2, poison


def poison(make: Make, criteria: Criteria, found: Findings) -> None:
    """T2: whatever comes by once, the stabiliser goes on as if it had not."""
    traits = make("float32").traits
    poisons = {"NaN": np.nan, "inf": np.inf, "float32 max": 3.4028234e38}
    if traits.kind == "loss":
        poisons["-inf"] = -np.inf
    for when in (0, 5, LATE):
        _poisoned(make, "float32", poisons, when, criteria, found)
    if "float16" in traits.dtypes:
        for when in (0, LATE):
            _poisoned(make, "float16", {"float16 max": 65504.0}, when, criteria, found)
    if traits.is_accumulating:
        _poisoned(make, "float32", {"NaN in one micro-batch": np.nan}, LATE, criteria, found, is_micro=True)
    for value in (value for value in poisons.values() if not np.isfinite(value)):
        _leaves_no_trace(make, value, criteria, found)


def _poisoned(
    make: Make,
    dtype: str,
    poisons: dict[str, float],
    when: int,
    criteria: Criteria,
    found: Findings,
    is_micro: bool = False,
) -> None:
    """Poison one element of one step, in a run for each poison, and compare what follows with a clean run."""
    clean_one = make(dtype)
    size = _width(clean_one, 4)
    stream = ordinary(np.random.default_rng(criteria.seed), when + 1 + 10 + criteria.good, size)
    clean = _mean(feed(clean_one, stream)[when + 1 :])
    found.expect(clean >= criteria.passing, f"ordinary steps keep {clean:.2f} of their gradient")
    for name, value in poisons.items():
        stabiliser = make(dtype)
        feed(stabiliser, stream[:when])
        bad = stream[when].copy()
        bad[0] = value
        outcomes = stabiliser.step([stream[when], bad, stream[when]] if is_micro else [bad])
        where = f"{name} at step {when}"
        _answer(stabiliser, outcomes[len(outcomes) // 2], value, where, found)
        first = feed(stabiliser, stream[when + 1 : when + 11])
        if when == LATE:
            _caught(stabiliser, 1.0, size, criteria, found, f"ten steps after {where}")
        after = _mean(np.concatenate([first, feed(stabiliser, stream[when + 11 :])]))
        told = f"{where}: {criteria.good} good steps keep {after:.2f} of their gradient, {clean:.2f} without"
        found.expect(after >= criteria.accepted * clean, told)
        _caught(stabiliser, 1.0, size, criteria, found, f"{criteria.good} steps after {where}")
        found.expect(not np.isnan(stabiliser.limit()), f"{where}: the limit became NaN")


def _answer(stabiliser: Stabiliser, outcome: Any, value: float, where: str, found: Findings) -> None:
    """Check what the poison itself was turned into."""
    factor = outcome.factor
    if stabiliser.traits.kind == "gradient":
        if np.isnan(factor[0]):
            found.note("a NaN gradient comes out as NaN: needs a step guard")
        return
    found.expect(bool(np.all((factor >= 0) & (factor <= 1 + 1e-5))), f"{where}: factor {factor.min():.3g}")
    if not np.isfinite(value):
        found.expect(factor[0] == 0, f"{where}: its gradient factor is {factor[0]:.3g}, not 0")
    if stabiliser.traits.kind == "loss":
        found.expect(bool(np.isfinite(outcome.value).all()), f"{where}: values {outcome.value.round(3).tolist()}")


def _leaves_no_trace(make: Make, value: float, criteria: Criteria, found: Findings) -> None:
    """Check that a non-finite element neither enters the state nor counts as an element."""
    stabiliser = make("float32")
    size = _width(stabiliser, 4)
    stream = ordinary(np.random.default_rng(criteria.seed), LATE, size)
    feed(stabiliser, stream)
    before = stabiliser.limit()
    stabiliser.step([np.full(size, value)])
    after = stabiliser.limit()
    found.expect(before == after, f"a step of nothing but {value} moves the limit from {before:.5g} to {after:.5g}")
    if size > 1:
        twin = make("float32")
        feed(twin, stream)
        twin.step([np.full(size, value)])
        twin.step([stream[0][1:]])
        stabiliser.step([np.concatenate([[value], stream[0][1:]])])
        with_it, without = stabiliser.limit(), twin.limit()
        told = f"{value} in a batch of {size} counts as an element: limit {with_it:.5g}, {without:.5g} without it"
        found.expect(_apart(with_it, without) <= criteria.exact, told)


# ---------------------------------------------------------------------------------------------- T3, masking and shift


def masking_and_shift(make: Make, criteria: Criteria, found: Findings) -> None:
    """T3: in one stream, a spike hides no later spike, a shift is soon accepted, a decay is followed."""
    stabiliser = make("float32")
    sizes = (1, 16) if _width(stabiliser, 16) > 1 else (1,)
    for size in sizes:
        _one_stream(make, "lognormal", size, criteria.decay_steps, criteria, found)
    _one_stream(make, "normal", 1, 0, criteria, found)


def _one_stream(make: Make, noise: str, size: int, decay_steps: int, criteria: Criteria, found: Findings) -> None:
    """Go through one stream: ordinary, spike, spike, shift, then a decay and a last spike if it is to have one."""
    rng = np.random.default_rng(criteria.seed)
    which = f"{noise}, batch {size}"
    stabiliser, twin = make("float32"), make("float32")
    stream = ordinary(rng, criteria.warm_up, size, noise)
    usual = _mean(feed(stabiliser, stream)[-100:])
    feed(twin, stream)
    found.expect(usual >= criteria.passing, f"{which}: ordinary elements keep {usual:.2f} of their gradient")

    row = ordinary(rng, 1, size, noise)[0]
    twin.step([row])
    stabiliser.step([row * _spike(size, criteria.spike)])
    moved = 0.0
    found.expect(bool(np.isfinite(twin.limit())), f"{which}: there is no limit after {criteria.warm_up} steps")
    for row in ordinary(rng, 10, size, noise):
        moved = max(moved, _apart(stabiliser.limit(), twin.limit()))
        stabiliser.step([row])
        twin.step([row])
    told = f"{which}: a {criteria.spike:g}x spike moves the limit by {100 * moved:.2g} %"
    found.expect(moved < criteria.moved, told)
    _caught(stabiliser, 1.0, size, criteria, found, f"{which}, ten steps later")

    feed(stabiliser, ordinary(rng, 100, size, noise))
    shifted = criteria.shift * ordinary(rng, criteria.shift_steps, size, noise)
    kept = _mean(feed(stabiliser, shifted)[-10:])
    told = (
        f"{which}: {criteria.shift_steps} steps after a rise by {criteria.shift:g}x {kept:.2f} of the gradient is kept"
    )
    found.expect(kept >= criteria.accepted * usual, told)

    if not decay_steps:
        return
    feed(stabiliser, criteria.shift * ordinary(rng, 100, size, noise))
    levels = criteria.shift ** np.linspace(1, 0, decay_steps)
    falling = ordinary(rng, decay_steps, size, noise) * levels[:, None]
    loosest, kept = 0.0, []
    for start in range(0, decay_steps, 100):
        kept.append(_mean(feed(stabiliser, falling[start : start + 100])))
        level = levels[min(start + 100, decay_steps) - 1]
        loosest = max(loosest, float(np.nan_to_num(stabiliser.limit() / level, nan=np.inf, posinf=np.inf)))
    told = f"{which}: while the level falls by {criteria.shift:g}x, the limit is up to {loosest:.3g} times the level"
    found.expect(loosest <= criteria.loose, told)
    mean = float(np.mean(kept))
    found.expect(
        mean >= criteria.accepted * usual, f"{which}: while the level falls {mean:.2f} of the gradient is kept"
    )
    _caught(stabiliser, 1.0, size, criteria, found, f"{which}, after the fall")


# ------------------------------------------------------------------------------------------------- T5, one update


def one_update(make: Make, criteria: Criteria, found: Findings) -> None:
    """T5: micro-batches, evaluations and skipped steps leave the state of one update per optimiser step."""
    stabiliser: Any = make("float32")
    if stabiliser.traits.is_accumulating:
        stream = ordinary(np.random.default_rng(criteria.seed), 100, 8)
        stream[50::10, 3] *= 30
        want, limit = _in_parts(make, stream, 1)
        for parts in range(2, 9):
            factors, other = _in_parts(make, stream, parts)
            worst = np.nan_to_num(np.abs(factors - want), nan=1.0).max()
            told = f"{parts} micro-batches: limit {other:.4g} instead of {limit:.4g}, a factor differs by {worst:.2g}"
            is_same = worst <= criteria.added and _apart(other, limit) <= criteria.added
            if not found.expect(is_same, told):
                break
    else:
        found.note("accumulation is not claimed")
    _unchanged(make, "an evaluation", lambda one, batch: one.evaluate(batch), criteria, found)
    if hasattr(stabiliser, "skip"):
        _unchanged(make, "a skipped step", lambda one, batch: one.skip([batch]), criteria, found)
    elif stabiliser.traits.kind == "loss":
        found.note("skipped steps not looked at")


def _in_parts(make: Make, stream: NDArray[Any], parts: int) -> tuple[NDArray[Any], float]:
    """Give each row as so many micro-batches; return all factors and the last limit."""
    stabiliser = make("float32")
    outcomes = [stabiliser.step(np.array_split(row, parts)) for row in stream]
    factors = [np.concatenate([outcome.factor for outcome in step]) for step in outcomes]
    return np.array(factors, dtype=np.float64), stabiliser.limit()


def _unchanged(make: Make, what: str, act: Any, criteria: Criteria, found: Findings) -> None:
    """Compare a run in which something happened that must not matter with one in which it did not."""
    stabiliser, twin = make("float32"), make("float32")
    stream = ordinary(np.random.default_rng(criteria.seed), 150)
    stream[120] *= 10
    feed(stabiliser, stream[:100])
    feed(twin, stream[:100])
    for level in (0.8, 1.2, 5.0):
        act(stabiliser, level * np.ones(4))
    before, after = twin.limit(), stabiliser.limit()
    is_same = before == after and np.array_equal(feed(stabiliser, stream[100:]), feed(twin, stream[100:]), True)
    found.expect(is_same, f"{what} changes later steps: the limit is {after:.5g} instead of {before:.5g}")


# ------------------------------------------------------------------------------------------------- T6 and T7


def resume(make: Make, criteria: Criteria, found: Findings) -> None:
    """T6: a run with a checkpoint in the middle is the same, bit for bit, with a spike right after the load."""
    rng = np.random.default_rng(criteria.seed)
    stream = np.concatenate([ordinary(rng, 100), [[criteria.second_spike]], ordinary(rng, 99)])
    whole = feed(make("float32"), stream)
    first, second = make("float32"), make("float32")
    feed(first, stream[:100])
    second.load(first.save())
    before, after = first.limit(), second.limit()
    told = f"the limit is {before:.5g} when saved and {after:.5g} when loaded"
    found.expect(_apart(before, after) <= criteria.same, told)  # a probed limit depends a little on the last step
    resumed = feed(second, stream[100:])
    found.expect(whole[100, 0] <= criteria.caught, f"the spike keeps {whole[100, 0]:.2g} even without a checkpoint")
    spike = resumed[0, 0]
    told = f"right after the load the spike keeps {spike:.2g} of its gradient, {whole[100, 0]:.2g} without a checkpoint"
    if found.expect(np.array_equal(spike, whole[100, 0], True), told):
        differing = int(np.sum(resumed != whole[100:]) - np.sum(np.isnan(resumed) & np.isnan(whole[100:])))
        found.expect(differing == 0, f"{differing} of 100 factors after the load differ")


def ranks(make: Make, criteria: Criteria, found: Findings) -> None:
    """T7: processes that see shards decide as one process that sees all, a spike, a NaN or a short batch included."""
    stabiliser: Any = make("float32")
    if stabiliser.traits.kind != "loss":
        raise NotApplicableError("acts on gradients, which the processes average before it sees them")
    rng = np.random.default_rng(criteria.seed)
    stream = ordinary(rng, 80, 16) * np.repeat([1.0, 1.5], 8)
    stream[60, 12], stream[70, 13] = 100.0, np.nan
    shards = [[row[:8] for row in stream], [row[8:] for row in stream]]
    shards[1][-1] = shards[1][-1][:5]
    joined = make("float32")
    want = [(joined.step([np.concatenate(step)])[0].factor, joined.limit()) for step in zip(*shards, strict=True)]
    if hasattr(stabiliser, "ranks"):
        each = stabiliser.ranks(shards)
    else:
        found.note("shards in one process: no way to run it in several was given")
        each = []
        for shard in shards:
            alone = make("float32")
            each.append([(alone.step([batch])[0].factor, alone.limit()) for batch in shard])
    last = [steps[-1][1] for steps in each]
    told = f"processes have the limits {' and '.join(f'{limit:.4g}' for limit in last)}, one process {want[-1][1]:.4g}"
    is_same = all(steps[i][1] == each[0][i][1] for steps in each for i in range(len(stream)))
    is_true = all(_apart(a[1], b[1]) <= criteria.same for a, b in zip(each[0], want, strict=True))
    if found.expect(is_same and is_true, told):
        factors = [np.concatenate([steps[i][0] for steps in each]) for i in range(len(stream))]
        worst = max(np.abs(got - one[0]).max() for got, one in zip(factors, want, strict=True))
        found.expect(worst <= criteria.same, f"a factor differs by {worst:.2g} from that of one process")
