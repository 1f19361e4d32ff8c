"""Histogram: the distribution of one tensor's values in bounded memory, the same whatever order they come in."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 4096  # on each side of zero
_LEAST_EXPONENT = -100  # below 2**-100 the bin width's reciprocal leaves float32

Counts = NDArray[np.int64]


@dataclass
class Histogram:
    """Counts over [-2**exponent, 2**exponent) in 2 * BINS bins of equal width; bin BINS starts at zero.

    The range is the power of two above the largest magnitude seen. When it grows, bins merge in pairs, which loses
    nothing that the wider histogram could have held: bin edges at every range are edges at all smaller ones. So the
    counts depend on the values alone, not on their order or on how they were divided into batches.
    """

    exponent: int | None = None
    counts: Counts = field(default_factory=lambda: np.zeros(2 * BINS, dtype=np.int64))

    def cover(self, amax: float) -> None:
        """Makes room for magnitudes up to `amax`, which must be finite."""
        if amax == 0.0:
            return
        needed = max(math.frexp(amax)[1], _LEAST_EXPONENT)
        if self.exponent is None:
            zeros = self.counts[BINS]
            self.counts[:] = 0
            self.counts[BINS] = zeros
            self.exponent = needed
        elif needed > self.exponent:
            self.counts = widened(self.counts, needed - self.exponent)
            self.exponent = needed

    def add(self, values: NDArray[Any]) -> None:
        """Counts finite float values, none of them larger in magnitude than `cover` was told."""
        flat = values.reshape(-1)
        if self.exponent is None:
            self.counts[BINS] += flat.size
            return
        # A power of two times a float is exact, and so is its floor: no value lands in a neighbouring bin by rounding
        # (but a negative one of less than 1e-38 of a bin becomes zero).
        scale = flat.dtype.type(BINS * 2.0**-self.exponent)
        index = np.floor(flat * scale).astype(np.int32)
        index += BINS
        self.counts += np.bincount(index, minlength=2 * BINS)

    @property
    def width(self) -> float:
        """The width of one bin, in the tensor's unit; 0.0 while only zeros were seen."""
        return 0.0 if self.exponent is None else 2.0**self.exponent / BINS

    def clipped(self, low: float, high: float) -> Histogram:
        """The histogram of clip(x, low, high), to within a bin: what Relu or Clip makes of the same values."""
        if self.exponent is None:
            return Histogram(None, self.counts.copy())
        counts = self.counts.copy()
        first = BINS if low == 0.0 else max(0, BINS + math.floor(max(low / self.width, -BINS)))
        last = min(2 * BINS - 1, BINS + math.floor(min(high / self.width, BINS - 1)))
        if 0 < first < 2 * BINS:
            counts[first] += counts[:first].sum()
            counts[:first] = 0
        if first <= last < 2 * BINS - 1:
            counts[last] += counts[last + 1 :].sum()
            counts[last + 1 :] = 0
        return Histogram(self.exponent, counts)

    def magnitudes(self) -> Counts:
        """Counts of |x|, int64 [BINS]; bin k holds magnitudes from k * width to (k + 1) * width."""
        return self.counts[BINS:] + self.counts[BINS - 1 :: -1]


def widened(counts: Counts, doublings: int) -> Counts:
    """The same values' counts over a range 2**doublings as wide. int64 [2 * BINS] both ways."""
    for _ in range(min(doublings, 2 * BINS.bit_length())):
        wide = np.zeros_like(counts)
        wide[BINS // 2 : BINS // 2 + BINS] = counts.reshape(-1, 2).sum(axis=1)
        counts = wide
    return counts


@dataclass
class Observation:
    """What has been seen of one tensor: exact extremes of all its values, and the histogram of the sampled ones."""

    low: float = math.inf
    high: float = -math.inf
    histogram: Histogram = field(default_factory=Histogram)

    def see(self, low: float, high: float, sampled: NDArray[Any]) -> None:
        """Takes in the extremes of some values and a sample of them."""
        self.low = min(self.low, low)
        self.high = max(self.high, high)
        self.histogram.cover(max(abs(low), abs(high)))
        self.histogram.add(sampled)

    @property
    def seen(self) -> bool:
        """Whether any value was seen."""
        return self.low <= self.high

    def clipped(self, low: float, high: float) -> Observation:
        """What would have been seen of clip(x, low, high)."""
        return Observation(min(max(self.low, low), high), min(max(self.high, low), high), self.histogram.clipped(low, high))


def stride_for(size: int, most: int) -> int:
    """The step at which to sample `size` values so that at most `most` are taken, and, about, at least half of that.

    A prime that does not divide `size` where one is near: it does not fall into step with rows, planes or channels, whose
    sizes are products of small numbers.
    """
    least = -(-size // most)
    if least <= 1:
        return 1
    for step in range(least, 2 * least + 1):
        if size % step and all(step % d for d in range(2, math.isqrt(step) + 1)):
            return step
    return least


def sampled_row(row: NDArray[Any], position: int, most: int) -> NDArray[Any]:
    """About `most` values of one sample's tensor [size], chosen by the sample's position in the data set alone.

    The start moves with the position (by a prime, so that the starts spread), hence every element gets its turn.
    """
    step = stride_for(row.size, most)
    if step == 1:
        return row
    return row[position * 7919 % step :: step][: row.size // step]
