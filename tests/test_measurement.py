"""Statistics of a measurement: what the sample count supports, and ratios that a drifting machine leaves alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploykit.measurement import MIN_RUNS, Measurement, Window, speedup


def _measured(seconds: list[list[list[float]]], batch: int = 1) -> Measurement:
    launches = tuple(tuple(Window(tuple(w), sum(w)) for w in launch) for launch in seconds)
    return Measurement(batch, launches)


def test_throughput_is_items_over_wall_clock() -> None:
    windows = ((Window((0.1, 0.3), 0.5),),)
    assert Measurement(4, windows).images_per_s == pytest.approx(4 * 2 / 0.5)


@pytest.mark.parametrize("p", [90, 95, 99])
def test_a_percentile_needs_its_samples(p: int) -> None:
    n = MIN_RUNS[p]
    assert _measured([[[0.01] * n]]).percentile_s(p) == pytest.approx(0.01)
    assert _measured([[[0.01] * (n - 1)]]).percentile_s(p) is None


def test_an_unstable_row_says_so() -> None:
    steady = _measured([[[0.01] * 5] * 6])
    assert steady.stable is True
    assert _measured([[[0.01] * 5, [0.02] * 5, [0.01] * 5]]).stable is False
    assert _measured([[[0.01] * 5]]).stable is None


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.2, 5.0))
def test_drift_that_hits_both_rows_leaves_the_ratio(seed: int, true: float) -> None:
    rng = np.random.default_rng(seed)
    mood = rng.uniform(0.5, 2.0, (3, 4))
    slow = _measured([[[0.01 * m] * 3 for m in launch] for launch in mood])
    fast = _measured([[[0.01 * m / true] * 3 for m in launch] for launch in mood])
    found = speedup(fast, slow)
    assert found.value == pytest.approx(true)
    assert found.low == pytest.approx(true) and found.high == pytest.approx(true)


def test_the_interval_spans_the_differences_between_launches() -> None:
    base = _measured([[[0.01] * 5] * 4] * 3)
    uneven = _measured([[[0.01] * 5] * 4, [[0.0103] * 5] * 4, [[0.0097] * 5] * 4])
    found = speedup(uneven, base)
    assert found.low < 0.98 and found.high > 1.02


def test_unlike_measurements_are_not_compared() -> None:
    one, other = _measured([[[0.01]]]), _measured([[[0.01]]], batch=2)
    with pytest.raises(ValueError, match="batch"):
        speedup(one, other)
    with pytest.raises(ValueError, match="launches"):
        speedup(one, _measured([[[0.01]], [[0.01]]]))


def test_a_row_that_stopped_earlier_is_paired_over_the_common_rounds() -> None:
    base = _measured([[[0.02]] * 2 + [[0.2]] * 2])
    short = _measured([[[0.01]] * 2])
    assert speedup(short, base).value == pytest.approx(2.0)


def test_json_round_trip() -> None:
    one = _measured([[[0.01, 0.02]], [[0.03]]], batch=8)
    assert Measurement.from_json(one.to_json()) == one
