"""What is gathered while the samples pass: errors between the graphs, spreads and roundings of float tensors; memory that
does not grow with the samples."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.histogram import BINS, Observation
from deploykit.layer import Pair


def decibels(signal: float, noise: float) -> float | None:
    """10 log10(signal / noise): the signal-to-quantization-noise ratio in dB. None where there is no noise, or no signal."""
    if not (math.isfinite(signal) and math.isfinite(noise)) or signal <= 0.0 or noise <= 0.0:
        return None
    return 10.0 * math.log10(signal / noise)


@dataclass
class Error:
    """Sums over all values of a tensor: squares of the reference, squares of the difference, the largest difference."""

    signal: float = 0.0
    noise: float = 0.0
    max_abs: float = 0.0
    finite: bool = True

    def see(self, reference: NDArray[Any], candidate: NDArray[Any]) -> None:
        """Takes in the same values of both graphs."""
        wanted = reference.astype(np.float32, copy=False).reshape(-1)
        difference = candidate.astype(np.float32, copy=False).reshape(-1) - wanted
        noise = float(np.dot(difference, difference))
        if not math.isfinite(noise):
            self.finite = False
            return
        self.signal += float(np.dot(wanted, wanted))
        self.noise += noise
        self.max_abs = max(self.max_abs, float(np.abs(difference).max(initial=0.0)))

    @property
    def sqnr_db(self) -> float | None:
        """decibels(signal, noise)."""
        return decibels(self.signal, self.noise) if self.finite else None


@dataclass
class Rounding:
    """What one per-tensor pair does to the reference's own values: squares of the values, of the error, of the part of it
    that values out of range make, and how many those are."""

    pair: Pair
    signal: float = 0.0
    noise: float = 0.0
    clipped: float = 0.0
    outside: int = 0
    count: int = 0

    def see(self, values: NDArray[Any]) -> None:
        """Takes in a sample of the values."""
        flat = values.reshape(-1).astype(np.float32, copy=False)
        scale, zero = float(self.pair.scale.reshape(-1)[0]), float(self.pair.zero.reshape(-1)[0])
        low, high = self.pair.levels
        wanted = np.rint(flat / np.float32(scale)) + np.float32(zero)
        kept = np.clip(wanted, low, high)
        error = (kept - np.float32(zero)) * np.float32(scale) - flat
        out = kept != wanted
        self.signal += float(np.dot(flat, flat))
        self.noise += float(np.dot(error, error))
        self.clipped += float(np.square(error[out]).sum())
        self.outside += int(out.sum())
        self.count += flat.size

    @property
    def sqnr_db(self) -> float | None:
        """decibels(signal, noise)."""
        return decibels(self.signal, self.noise)


@dataclass
class Spread:
    """The distribution of a float tensor of the reference, and the extremes of each of its channels along `axis`."""

    axis: int
    seen: Observation = field(default_factory=Observation)
    low: NDArray[np.float32] | None = None
    high: NDArray[np.float32] | None = None

    def see(self, tensor: NDArray[Any], sampled: NDArray[Any]) -> None:
        """Takes in a tensor [batch, ...] and a sample of its values."""
        low, high = float(tensor.min()), float(tensor.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            return
        self.seen.see(low, high, sampled)
        if tensor.ndim < 2:
            return
        axis = self.axis % tensor.ndim
        others = tuple(a for a in range(tensor.ndim) if a != axis)
        lows, highs = tensor.min(axis=others).astype(np.float32), tensor.max(axis=others).astype(np.float32)
        if self.low is None or self.high is None or self.low.shape != lows.shape:
            self.low, self.high = lows, highs
        else:
            self.low, self.high = np.minimum(self.low, lows), np.maximum(self.high, highs)

    @property
    def amax(self) -> float:
        """The largest magnitude."""
        return max(abs(self.seen.low), abs(self.seen.high)) if self.seen.seen else 0.0

    @property
    def channel_amax(self) -> NDArray[np.float32] | None:
        """The largest magnitude of each channel."""
        return None if self.low is None or self.high is None else np.maximum(np.abs(self.low), np.abs(self.high))

    def magnitude(self, share: float) -> float:
        """The magnitude that this share of all values (zeros left out) does not exceed, to within a histogram bin."""
        counts = self.seen.histogram.magnitudes().copy()
        counts[0] = 0
        whole = int(counts.sum())
        if not whole:
            return self.amax
        k = int(np.searchsorted(np.cumsum(counts), share * whole))
        return float(min((min(k, BINS - 1) + 1) * self.seen.histogram.width, self.amax))

    def reach(self, share: float) -> tuple[float, float]:
        """The values between which that share of all lies, the rest split evenly."""
        counts = np.cumsum(self.seen.histogram.counts)
        if not counts[-1]:
            return 0.0, 0.0
        cut = (1.0 - share) / 2 * counts[-1]
        first = int(np.searchsorted(counts, cut, side="right"))
        last = int(np.searchsorted(counts, counts[-1] - cut))
        width = self.seen.histogram.width
        return max((first - BINS) * width, self.seen.low), min((last - BINS + 1) * width, self.seen.high)
