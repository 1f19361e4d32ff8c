"""Each method against a slow, literal reference, and against what the choice must do to the quantized values."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from deploykit.calibration_table import METHODS, Range
from deploykit.clipping import choose, kl_bins
from deploykit.histogram import Observation


def seen_of(values: np.ndarray) -> Observation:
    seen = Observation()
    values = values.astype(np.float32)
    seen.see(float(values.min()), float(values.max()), values)
    return seen


def symmetric_error(values: np.ndarray, amax: float) -> float:
    step = amax / 127
    return float(np.mean((np.clip(np.rint(values / step), -127, 127) * step - values) ** 2))


def asymmetric_error(values: np.ndarray, chosen: Range) -> float:
    low, high = min(chosen.low, 0.0), max(chosen.high, 0.0)
    step = (high - low) / 255
    zero = np.rint(-low / step)
    return float(np.mean(((np.clip(np.rint(values / step) + zero, 0, 255) - zero) * step - values) ** 2))


RNG = np.random.default_rng(7)
SHAPES = {
    "normal": RNG.normal(0, 1, 200_000),
    "laplace": RNG.laplace(0, 1, 200_000),
    "relu": np.maximum(RNG.normal(-1, 1, 200_000), 0),
    "outlier": np.concatenate([RNG.normal(0, 1, 200_000), [400.0]]),
    "shifted": RNG.normal(0, 1, 200_000) + 8,
    "negative": -np.abs(RNG.normal(0, 3, 200_000)),
    "silu": (lambda x: x / (1 + np.exp(-x)))(RNG.normal(0, 2, 200_000)),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_every_choice_lies_inside_the_extremes(shape: str, method: str) -> None:
    seen = seen_of(SHAPES[shape])
    chosen, amax = choose(seen, method)
    assert seen.low <= chosen.low <= chosen.high <= seen.high
    assert 0 < amax <= max(abs(seen.low), abs(seen.high))
    if method == "minmax":
        assert (chosen.low, chosen.high) == (seen.low, seen.high)
    if shape == "relu":
        assert chosen.low == 0.0


@pytest.mark.parametrize("shape", SHAPES)
def test_mse_is_within_two_percent_of_the_best_of_a_fine_search(shape: str) -> None:
    values = SHAPES[shape][-50_000:].astype(np.float32).astype(np.float64)
    chosen, amax = choose(seen_of(values), "mse")
    top = np.abs(values).max()
    best = min(symmetric_error(values, top * share) for share in np.geomspace(1 / 256, 1, 200))
    assert symmetric_error(values, amax) <= 1.02 * best
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    shares = np.geomspace(1 / 256, 1, 60)
    best = min(asymmetric_error(values, Range(low * share, high * share)) for share in shares)
    assert asymmetric_error(values, chosen) <= 1.02 * best


@pytest.mark.parametrize("shape", ["normal", "laplace", "outlier", "silu"])
def test_mse_beats_the_extremes(shape: str) -> None:
    values = SHAPES[shape].astype(np.float32)
    seen = seen_of(values)
    assert symmetric_error(values, choose(seen, "mse")[1]) <= symmetric_error(values, choose(seen, "minmax")[1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.99])
def test_percentile_is_numpys_to_within_a_bin(shape: str, percentile: float) -> None:
    values = SHAPES[shape].astype(np.float32)
    seen = seen_of(values)
    chosen, amax = choose(seen, "percentile", percentile=percentile)
    width = seen.histogram.width
    if width > 0.05:  # the outlier: one bin holds a tenth of the values
        return
    near = {"abs": 2 * width + 0.02 * abs(amax)}
    assert amax == pytest.approx(np.quantile(np.abs(values), percentile / 100), **near)
    cut = 1 - percentile / 100
    if values.min() >= 0:
        assert chosen.low == values.min()
        assert chosen.high == pytest.approx(np.quantile(values, 1 - cut), **near)
    elif values.max() <= 0:
        assert chosen.high == values.max()
        assert chosen.low == pytest.approx(np.quantile(values, cut), **near)
    else:
        assert chosen.low == pytest.approx(min(np.quantile(values, cut / 2), 0), **near)
        assert chosen.high == pytest.approx(np.quantile(values, 1 - cut / 2), **near)


def test_a_percentile_of_100_keeps_everything() -> None:
    seen = seen_of(SHAPES["laplace"])
    chosen, amax = choose(seen, "percentile", percentile=100.0)
    assert (chosen.low, chosen.high) == pytest.approx((seen.low, seen.high), abs=seen.histogram.width)
    assert amax == pytest.approx(max(-seen.low, seen.high), abs=seen.histogram.width)


def literal_kl(counts: np.ndarray, levels: int) -> np.ndarray:
    """Divergence of every candidate by S7310's loop over bins, with the levels' edges spread evenly."""
    bins = counts.astype(np.float64)
    bins[0] = bins[1]
    result = []
    for kept in range(levels, bins.size + 1):
        p = bins[:kept].copy()
        p[-1] += bins[kept:].sum()
        q = np.zeros(kept)
        edges = [kept * j // levels for j in range(levels + 1)]
        for start, end in pairwise(edges):
            filled = bins[start:end] > 0
            if filled.any():
                q[start:end][filled] = bins[start:end].sum() / filled.sum()
        if q.sum() == 0 or (q[p > 0] == 0).any():
            result.append(np.inf)
            continue
        p, q = p / p.sum(), q / q.sum()
        keep = p > 0
        result.append(float(np.sum(p[keep] * np.log(p[keep] / q[keep]))))
    return np.array(result)


@pytest.mark.parametrize("seed", range(6))
def test_the_fast_kl_finds_the_literal_ones_minimum(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = np.abs(rng.standard_t(2 + seed, 20_000))
    counts, _ = np.histogram(values, bins=300)
    divergence = literal_kl(counts, 16)
    found = divergence[kl_bins(counts, 16) - 16]
    assert found == pytest.approx(divergence.min(), abs=1e-9)


def test_kl_with_too_few_bins_or_nothing_in_them_keeps_all() -> None:
    assert kl_bins(np.array([5, 1, 1]), 128) == 3
    assert kl_bins(np.zeros(200, dtype=np.int64), 128) == 200


def test_entropy_clips_an_outlier_that_minmax_keeps() -> None:
    seen = seen_of(np.concatenate([RNG.normal(0, 1, 200_000), [40.0]]))
    assert choose(seen, "minmax")[1] == 40.0
    assert choose(seen, "entropy")[1] < 10.0


@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_that_never_varies_keeps_its_value(method: str) -> None:
    for value in (0.0, 3.0, -2.0):
        chosen, amax = choose(seen_of(np.full(100, value)), method)
        assert (chosen.low, chosen.high, amax) == (value, value, abs(value))


@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_of_almost_only_zeros_is_not_clipped_to_nothing(method: str) -> None:
    values = np.zeros(300_000)
    values[17] = 2.0
    chosen, amax = choose(seen_of(values), method)
    assert chosen.high > 0.0
    assert amax > 0.0


@pytest.mark.parametrize("method", METHODS)
def test_extremes_beyond_the_sampled_values_do_no_harm(method: str) -> None:
    seen = Observation()
    seen.see(-50.0, 80.0, RNG.normal(0, 1, 1000).astype(np.float32))
    chosen, amax = choose(seen, method)
    assert -50.0 <= chosen.low < chosen.high <= 80.0
    assert 1.0 < amax <= 80.0
