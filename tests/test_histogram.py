from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from deploykit.histogram import BINS, Observation, sampled_row, stride_for

# Magnitudes whose share of a bin float32 can hold, and zero.
elements = st.floats(-(2.0**60), 2.0**60, width=32).map(lambda x: x if abs(x) > 1e-15 else 0.0)
floats = hnp.arrays(np.float32, st.integers(1, 40), elements=elements)


def observe(pieces: list[np.ndarray]) -> Observation:
    seen = Observation()
    for piece in pieces:
        seen.see(float(piece.min()), float(piece.max()), piece)
    return seen


def same(a: Observation, b: Observation) -> bool:
    return (a.low, a.high, a.histogram.exponent) == (b.low, b.high, b.histogram.exponent) and bool(
        np.array_equal(a.histogram.counts, b.histogram.counts)
    )


@settings(deadline=None)
@given(st.lists(floats, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_order_and_batches_do_not_change_a_histogram(pieces: list[np.ndarray], random: object) -> None:
    shuffled = list(pieces)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    whole = observe([np.concatenate(pieces)])
    assert same(observe(pieces), whole)
    assert same(observe(shuffled), whole)


@settings(deadline=None)
@given(floats)
def test_every_value_lies_in_the_bin_that_counts_it(values: np.ndarray) -> None:
    histogram = observe([values]).histogram
    assert histogram.counts.sum() == values.size
    if histogram.exponent is None:
        assert not values.any()
        return
    edges = np.arange(-BINS, BINS + 1) * histogram.width
    expected, _ = np.histogram(values.astype(np.float64), bins=edges)
    assert np.array_equal(histogram.counts, expected)
    assert histogram.magnitudes().sum() == values.size


def test_zeros_seen_before_anything_else_are_kept() -> None:
    seen = observe([np.zeros(5, np.float32), np.float32([3.0]), np.zeros(2, np.float32)])
    assert seen.histogram.counts[BINS] == 7
    assert seen.histogram.counts.sum() == 8


def test_a_clipped_histogram_is_that_of_the_clipped_values() -> None:
    values = np.random.default_rng(0).normal(0, 2, 5000).astype(np.float32)
    relu, relu6 = np.maximum(values, 0), np.clip(values, 0, 6)
    seen = observe([values, np.float32([9.0])])
    assert seen.clipped(0.0, np.inf).low == 0.0
    assert same(seen.clipped(0.0, np.inf), observe([relu, np.float32([9.0])]))
    six = seen.clipped(0.0, 6.0)
    assert (six.low, six.high) == (0.0, 6.0)
    assert six.histogram.counts.sum() == 5001
    direct = observe([relu6, np.float32([6.0])])
    assert six.histogram.magnitudes()[: BINS // 8].sum() == pytest.approx(direct.histogram.magnitudes()[: BINS // 4].sum(), abs=0)


@pytest.mark.parametrize(("low", "high"), [(5.0, np.inf), (-np.inf, -5.0), (20.0, 30.0), (-1e30, 1e30)])
def test_clipping_beyond_the_values_loses_no_count(low: float, high: float) -> None:
    seen = observe([np.float32([-2.0, 0.0, 3.0])])
    clipped = seen.clipped(low, high)
    assert clipped.histogram.counts.sum() == 3
    assert clipped.low <= clipped.high


def test_extreme_magnitudes_fit() -> None:
    for value in (1e-45, 1e-38, 1.0, 2.0**127):
        histogram = observe([np.float32([value, -value, 0.0])]).histogram
        assert histogram.counts.sum() == 3


@given(st.integers(1, 10**7), st.integers(1, 10**5))
def test_a_stride_takes_at_most_what_is_asked_and_no_less_than_half(size: int, most: int) -> None:
    step = stride_for(size, most)
    assert 1 <= step <= max(2 * -(-size // most), 1)
    assert size // step <= most
    if size <= most:
        assert step == 1


def test_a_stride_does_not_fall_into_step_with_the_shape() -> None:
    for channels, side in [(64, 112), (512, 7), (128, 28), (2048, 14), (96, 56)]:
        step = stride_for(channels * side * side, 4096)
        assert np.gcd(step, channels * side) == 1


def test_which_values_are_sampled_depends_on_the_position_alone_and_moves_with_it() -> None:
    row = np.arange(1000)
    assert np.array_equal(sampled_row(row, 3, 100), sampled_row(row.copy(), 3, 100))
    taken = set()
    for position in range(40):
        values = sampled_row(row, position, 100)
        assert values.size == sampled_row(row, 0, 100).size
        taken.update(values.tolist())
    assert len(taken) > 980
