"""Where to clip: a quantization range from a histogram, by extremes, percentile, KL divergence or squared error.

Each method gives two answers, because the two graph layouts differ: the amax of a symmetric quantizer (int8, levels
-127..127 on [-amax, amax]) and the [low, high] of an asymmetric one (uint8, 255 steps).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from deploykit.calibration_table import Range
from deploykit.histogram import BINS, Counts, Observation

Floats = NDArray[np.float64]
PERCENTILE = 99.999  # 99.99 left EfficientNet-Lite0 22.3 dB, 99.999 23.0, 99.9 7.8 (243 crops that tuned)
SYMMETRIC_LEVELS = 128
ASYMMETRIC_LEVELS = 256


def choose(seen: Observation, method: str, *, percentile: float = PERCENTILE) -> tuple[Range, float]:
    """(range of an asymmetric quantizer, amax of a symmetric one), both inside the observed extremes.

    A choice that would leave nothing but zero of a tensor that isn't (99.995 % zeros, say) gives way to the extremes.
    """
    whole = Range(seen.low, seen.high)
    if method == "minmax" or seen.low == seen.high or seen.histogram.exponent is None:
        return whole, whole.amax
    low, high, amax = {"percentile": _percentile, "entropy": _entropy, "mse": _mse}[method](seen, percentile)
    chosen = Range(min(max(low, whole.low), whole.high), max(min(high, whole.high), whole.low))
    amax = min(amax, whole.amax)
    width = seen.histogram.width
    return (chosen if chosen.amax > width else whole), (amax if amax > width else whole.amax)


def _percentile(seen: Observation, percentile: float) -> tuple[float, float, float]:
    histogram = seen.histogram
    cut = 1.0 - percentile / 100.0
    amax = quantile(histogram.magnitudes(), 1.0 - cut) * histogram.width
    if seen.low >= 0.0 or seen.high <= 0.0:  # one-sided: the end at zero stays, the other bears the whole cut
        return (seen.low, amax, amax) if seen.low >= 0.0 else (-amax, seen.high, amax)
    high = (quantile(histogram.counts, 1.0 - cut / 2.0) - BINS) * histogram.width
    low = (BINS - quantile(histogram.counts[::-1], 1.0 - cut / 2.0)) * histogram.width
    return min(low, 0.0), max(high, 0.0), amax


def quantile(counts: Counts, share: float) -> float:
    """The place, in bins from the start of bin 0, below which `share` of the counts lie; linear inside a bin."""
    total = np.cumsum(counts)
    target = share * float(total[-1])
    index = int(np.searchsorted(total, target))
    before = float(total[index - 1]) if index else 0.0
    return index + (target - before) / max(float(counts[index]), 1.0)


def _entropy(seen: Observation, _: float) -> tuple[float, float, float]:
    histogram = seen.histogram
    pairs = histogram.magnitudes().reshape(-1, 2).sum(axis=1)  # TensorRT's resolution: 2048 bins of |x|
    width = 2.0 * histogram.width
    used = min(int(max(abs(seen.low), abs(seen.high)) / width) + 1, pairs.size)
    amax = kl_bins(pairs[:used], SYMMETRIC_LEVELS) * width
    wide = amax
    if seen.low >= 0.0 or seen.high <= 0.0:  # an asymmetric quantizer has all its levels on the one side: it clips no more
        wide = max(wide, kl_bins(pairs[:used], ASYMMETRIC_LEVELS) * width)
    return -wide, wide, amax


def kl_bins(counts: Counts, levels: int) -> int:
    """How many of the first bins of |x| to keep so that KL(P || Q) is least; all of them where there are too few.

    P is the histogram clipped after i bins, the rest added to its last bin; Q the same bins merged into `levels` equal
    levels and spread out again over the bins that are not empty. S. Migacz, 8-bit Inference with TensorRT, GTC 2017
    (S7310), slides 32 to 39. Bin 0 counts as much as bin 1: zeros after a Relu cost nothing to represent, and would hide
    the rest (as in NVIDIA's pytorch-quantization, calib/histogram.py).

    All candidates at once: within a level Q is constant, so the sums over bins become differences of running sums,
    O(levels) a candidate instead of O(bins).
    """
    size = counts.size
    if size <= levels:
        return int(size)
    bins = counts.astype(np.float64)
    bins[0] = bins[1]
    if not bins.any():
        return int(size)
    mass = np.concatenate([[0.0], np.cumsum(bins)])
    filled = np.concatenate([[0.0], np.cumsum(bins > 0)])
    p_log_p = np.concatenate([[0.0], np.cumsum(_x_log_x(bins))])
    kept = np.arange(levels, size + 1)
    edges = kept[:, None] * np.arange(levels + 1)[None, :] // levels
    level_mass = np.diff(mass[edges], axis=1)
    level_filled = np.maximum(np.diff(filled[edges], axis=1), 1.0)
    last = bins[kept - 1]
    outliers = mass[-1] - mass[kept]
    cross = (level_mass * _log(level_mass / level_filled)).sum(axis=1)
    cross += outliers * _log(level_mass[:, -1] / level_filled[:, -1])
    entropy = p_log_p[kept - 1] + _x_log_x(last + outliers)
    divergence = (entropy - cross) / mass[-1] + _log(mass[kept]) - np.log(mass[-1])
    divergence[(mass[kept] == 0.0) | ((last == 0.0) & (outliers > 0.0))] = np.inf  # P > 0 where Q = 0
    return int(kept[np.argmin(divergence)])


def _log(x: Floats) -> Floats:
    return np.log(np.where(x > 0.0, x, 1.0))


def _x_log_x(x: Floats) -> Floats:
    return x * _log(x)


def _mse(seen: Observation, _: float) -> tuple[float, float, float]:
    histogram = seen.histogram
    counts = histogram.counts.reshape(-1, 2).sum(axis=1)  # the step is at least 8 such bins: fine enough
    filled = np.flatnonzero(counts)
    centres = (filled - BINS // 2 + 0.5) * (2.0 * histogram.width)
    centres[filled == BINS // 2] = 0.0  # the bin of exact zeros, which every quantizer keeps
    centres = np.clip(centres, seen.low, seen.high)
    weights = counts[filled].astype(np.float64)

    def error(low: Floats, high: Floats, steps: int) -> Floats:
        return squared_error(centres, weights, low, high, steps)

    amax = _least(lambda t: error(-t, t, 2 * SYMMETRIC_LEVELS - 2), max(abs(seen.low), abs(seen.high)))
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    steps = ASYMMETRIC_LEVELS - 1
    if low < 0.0 < high:
        share = _least(lambda t: error(low * t, high * t, steps), 1.0)
        low, high = low * share, high * share
    for _round in range(2):  # one end, then the other, each with the other end as it is
        if high > 0.0:
            high = _least(partial(_with_high, error, low), max(seen.high, 0.0))
        if low < 0.0:
            low = -_least(partial(_with_low, error, high), -min(seen.low, 0.0))
    return low, high, amax


def squared_error(values: Floats, weights: Floats, low: Floats, high: Floats, steps: int) -> Floats:
    """Mean squared error of quantizing `values` [bins] over each range [low, high] [candidates] in `steps` steps.

    Zero is a level, as every runtime wants it: the zero point is rounded, and the range moves with it.
    """
    step = ((high - low) / steps)[:, None]
    step = np.where(step > 0.0, step, 1.0)
    zero = np.rint(-low[:, None] / step)
    level = np.clip(np.rint(values[None, :] / step) + zero, 0.0, steps) - zero
    return np.asarray(np.square(level * step - values[None, :]) @ weights / weights.sum())


def _with_high(error: Callable[[Floats, Floats, int], Floats], low: float, high: Floats) -> Floats:
    return error(np.full_like(high, low), high, ASYMMETRIC_LEVELS - 1)


def _with_low(error: Callable[[Floats, Floats, int], Floats], high: float, low: Floats) -> Floats:
    return error(-low, np.full_like(low, high), ASYMMETRIC_LEVELS - 1)


def _least(error: Callable[[Floats], Floats], most: float) -> float:
    """The clipping point in (0, most] with the least error: 8 points an octave down to most / 256, then 17 around the best."""
    coarse = most * 2.0 ** (-np.arange(65) / 8.0)
    best = float(coarse[np.argmin(error(coarse))])
    fine = np.minimum(best * 2.0 ** (np.arange(-8, 9) / 64.0), most)
    return float(fine[np.argmin(error(fine))])
