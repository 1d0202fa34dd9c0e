"""Check that batches merge, by pairs and by sums, into what numpy says of the joined losses."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from alrc.rules import Batch

LIMIT = 3.0
"""Losses above it are limited; those count half, as an arbitrary example of S17."""

losses = st.floats(-1e3, 1e3, allow_subnormal=False)
shards = st.lists(st.lists(losses, max_size=6), min_size=1, max_size=5)
Merge = Callable[[Sequence[Batch]], Batch]


class Wanted(NamedTuple):
    """What a batch should hold, computed from the losses at once."""

    number: float
    kept: float
    mean: float
    var: float
    hits: float
    raw_mean: float
    raw_var: float


def weighted(values: NDArray[Any], weights: NDArray[Any]) -> tuple[float, float]:
    """Return mean and variance by numpy, 0 where nothing has weight."""
    if not np.sum(weights):
        return 0.0, 0.0
    mean = np.average(values, weights=weights)
    return float(mean), float(np.average((values - mean) ** 2, weights=weights))


def describe(values: Sequence[float], dtype: Any = np.float64) -> Batch:
    """Make the batch of some losses, every number in the precision under test."""
    return Batch(*(dtype(number) for number in wanted_of(values)))


def wanted_of(values: Sequence[float]) -> Wanted:
    """Describe losses in float64."""
    raw = np.array(values, dtype=np.float64)
    is_hit = raw > LIMIT
    weights = np.where(is_hit, 0.5, 1.0)
    fed = weighted(np.minimum(raw, LIMIT), weights)
    return Wanted(len(raw), float(weights.sum()), *fed, float(is_hit.sum()), *weighted(raw, np.ones(len(raw))))


def by_pairs(batches: Sequence[Batch]) -> Batch:
    """Merge as the micro-batches of one update are merged."""
    return Batch.merged(batches)


def by_sums(batches: Sequence[Batch], center: float = 1.7) -> Batch:
    """Merge as processes merge: each adds its sums."""
    return Batch.from_sums(np.sum([batch.sums(np.float64(center)) for batch in batches], axis=0), np.float64(center))


def by_joining(batches: Sequence[Batch], center: float = 1.7) -> Batch:
    """Join as devices join: every one runs the same program and meets the others in each sum."""
    meeting, told = threading.Barrier(len(batches)), dict[int, Any]()

    def member(rank: int) -> Batch:
        def add_up(array: Any) -> Any:
            told[rank] = array
            meeting.wait(10)
            total = sum(told[other] for other in range(len(batches)))
            meeting.wait(10)
            return total

        return batches[rank].joined(add_up, type(batches[rank].mean)(center))

    with ThreadPoolExecutor(len(batches)) as pool:
        joined = list(pool.map(member, range(len(batches))))
    assert all(batch == joined[0] for batch in joined), "the members disagree"
    return joined[0]


def by_unweighted_means(batches: Sequence[Batch]) -> Batch:
    """Merge wrongly: average what the shards say, whatever their sizes, as an all-reduce of means would."""
    return Batch(*(np.mean([batch[i] for batch in batches]) for i in range(7)))


def by_mean_variance(batches: Sequence[Batch]) -> Batch:
    """Merge wrongly: forget that the means of the shards differ."""
    right = Batch.merged(batches)
    number = max(float(right.number), 1.0)
    within = sum(batch.number * batch.raw_var for batch in batches) / number
    return right._replace(raw_var=within, var=within)


def check(merge: Merge, parts: Sequence[Sequence[float]]) -> None:
    """Compare the merged batch with the joined losses."""
    got, wanted = merge([describe(part) for part in parts]), wanted_of([loss for part in parts for loss in part])
    tolerance = 1e-9 * max(1.0, max((abs(loss) for part in parts for loss in part), default=0.0))
    for name in ("number", "kept", "hits"):
        assert getattr(got, name) == getattr(wanted, name), name
    if wanted.number:
        assert got.raw_mean == pytest.approx(wanted.raw_mean, rel=1e-9, abs=tolerance)
        assert got.raw_var == pytest.approx(wanted.raw_var, rel=1e-9, abs=tolerance**2 + 1e-9 * wanted.raw_var + 1e-9)
        assert got.mean == pytest.approx(wanted.mean, rel=1e-9, abs=tolerance)
        assert got.var == pytest.approx(wanted.var, rel=1e-9, abs=1e-9)
    assert np.all(np.isfinite([float(part) for part in got])), got
    assert got.var >= 0
    assert got.raw_var >= 0


@pytest.mark.parametrize("merge", [by_pairs, by_sums, by_joining])
@given(parts=shards)
@example(parts=[[], []])
@example(parts=[[], [1.0], []])
@example(parts=[[5.0, 6.0], [7.0], [0.0]])
def test_merged_shards_are_the_joined_batch(merge: Merge, parts: list[list[float]]) -> None:
    check(merge, parts)


@pytest.mark.parametrize("wrong", [by_unweighted_means, by_mean_variance])
def test_a_wrong_merger_is_caught(wrong: Merge) -> None:
    with pytest.raises(AssertionError):
        check(wrong, [[1.0, 2.0, 4.0], [9.0]])


@given(parts=st.lists(st.lists(losses, min_size=1, max_size=6), min_size=1, max_size=4), data=st.data())
def test_the_order_of_shards_is_of_no_account(parts: list[list[float]], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(parts))
    one, other = (np.array(Batch.merged([describe(part) for part in order])) for order in (parts, shuffled))
    np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-7)


@given(values=st.lists(losses, min_size=1, max_size=6), center=st.floats(-10, 10))
def test_sums_lead_back_to_the_batch(values: list[float], center: float) -> None:
    batch = describe(values)
    back = Batch.from_sums(batch.sums(np.float64(center)), np.float64(center))
    np.testing.assert_allclose(np.array(back), np.array(batch), rtol=1e-9, atol=1e-7)


def test_one_batch_merges_to_itself() -> None:
    batch = describe([1.0, 2.0])
    assert Batch.merged([batch]) is batch


@pytest.mark.parametrize("merge", [by_pairs, by_sums, by_joining])
def test_a_batch_without_a_spread_has_none(merge: Merge) -> None:
    """Single losses and means of batches come with var=None (S11)."""
    got = merge([Batch(1.0, 1.0, 2.0), Batch(3.0, 3.0, 6.0)])
    assert got[:3] == (4.0, 4.0, 5.0)
    assert got.var == pytest.approx(np.var([2.0, 6.0, 6.0, 6.0]))
    assert got.hits is got.raw_mean is got.raw_var is None


@pytest.mark.parametrize("merge", [by_pairs, by_sums, by_joining])
def test_what_an_empty_batch_holds_is_of_no_account(merge: Merge) -> None:
    full = describe([1.0, 5.0])
    strange = Batch(*map(np.float64, (0.0, 0.0, 77.0, 8.0, 0.0, -55.0, 9.0)))
    for order in ([strange, full], [full, strange], [strange, full, strange]):
        np.testing.assert_allclose(np.array(merge(order)), np.array(full), rtol=1e-12)


SPREAD = np.random.default_rng(11).normal(1000.0, 0.1, (8, 64))
"""Losses whose spread is 10⁻⁴ of their mean: raw second moments in float32 have no correct digit of it."""


def by_float32_sums(batches: Sequence[Batch]) -> Batch:
    """Merge as processes do: float32 statistics, sums in float64 about the shared running mean."""
    wide = [Batch(*map(np.float64, batch)) for batch in batches]
    return by_sums(wide, 999.5)


def by_raw_moments(batches: Sequence[Batch]) -> Batch:
    """Merge wrongly: add up L and L² in float32."""
    zero = np.float32(0)
    sums = np.sum([batch.sums(zero) for batch in batches], axis=0, dtype=np.float32)
    return Batch.from_sums(sums, zero)


def check_small_spread(merge: Merge) -> None:
    """Know the spread to a thousandth."""
    got = merge([describe(part, np.float32) for part in SPREAD])
    assert float(got.raw_mean) == pytest.approx(SPREAD.mean(), rel=1e-6)
    assert float(got.raw_var) == pytest.approx(SPREAD.var(), rel=3e-3)


@pytest.mark.parametrize("merge", [by_pairs, by_float32_sums])
def test_float32_keeps_a_small_spread(merge: Merge) -> None:
    check_small_spread(merge)


def test_raw_moments_in_float32_lose_it() -> None:
    with pytest.raises(AssertionError):
        check_small_spread(by_raw_moments)


def test_joining_is_exact_in_float32_where_sums_are_not() -> None:
    values = np.random.default_rng(5).normal(1000, 0.1, (4, 50))
    batches = [describe(part, np.float32) for part in (values - 999)]  # the limit of these tests is 3
    far = [
        batch._replace(mean=batch.mean + np.float32(999), raw_mean=batch.raw_mean + np.float32(999))
        for batch in batches
    ]
    want = np.var(values)
    assert float(by_joining(far, 0.0).raw_var) == pytest.approx(want, rel=1e-2)
    sums = np.sum([batch.sums(np.float32(0)) for batch in far], axis=0, dtype=np.float32)
    assert float(Batch.from_sums(sums, np.float32(0)).raw_var) != pytest.approx(want, rel=0.1)
