"""Old, old again and new engine, measured in turns in one job, and what may be said of their difference.

Each launch has three processes: the baseline's engine twice and the new one. The launch is the unit of replication: what
is drawn from a launch is one contrast new : old (over both processes of the old one) and one old : old, the A/A row, which
shows the spread of processes of this machine in this very job.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deploykit.measurement import Measurement
from deploykit.stages.gate.intervals import Change

Floats = NDArray[np.float64]
# Effects below this are never called a change, whatever the interval says: cache and page placement alone reach it.
EFFECT_FLOOR = 0.01
LEVEL = 0.95
# A row is looked at up to three times (blocks of launches) and by two clocks; what keeps false alarms below 1 % all the same
# is the effect's floor, the rank test and the A/A row (benchmarks/gate_false_alarms.py).
RANK_P = 0.01
MIN_LAUNCHES = 5
# new - mean(old, old) of independent processes of variance s^2 has variance 1.5 s^2; old - old has 2 s^2.
_CONTRAST, _COPY = 1.5, 2.0


@dataclass(frozen=True)
class Turns:
    """One row measured in turns: the same launches and rounds for all three."""

    old: Measurement
    again: Measurement
    new: Measurement


@dataclass(frozen=True)
class Contrasts:
    """Natural logarithms, one a launch: new over old (the mean of its two processes), and old again over old."""

    new: Floats
    again: Floats

    @property
    def rank_p(self) -> float:
        """One-sided exact p that the new engine costs more: in each launch it is 1st, 2nd or 3rd of three processes, equally
        likely where nothing changed (a stratified rank test: the sum of ranks, exact by convolution)."""
        ranks = np.where(self.new > np.abs(self.again) / 2, 3, np.where(self.new < -np.abs(self.again) / 2, 1, 2))
        counts = np.ones(1)
        for _ in ranks:
            counts = np.convolve(counts, np.ones(3))
        return float(counts[int(ranks.sum()) - len(ranks) :].sum() / counts.sum())

    def spread(self) -> tuple[float, int]:
        """(standard deviation of one process, degrees of freedom), pooled over both contrasts, which are orthogonal: the A/A
        contrast has a known mean of 0."""
        count = len(self.new)
        own = float(((self.new - self.new.mean()) ** 2).sum()) / _CONTRAST
        copies = float((self.again**2).sum()) / _COPY
        pooled = (own + copies) / (2 * count - 1)
        return math.sqrt(pooled), 2 * count - 1

    def interval(self) -> tuple[float, float, float]:
        """(mean, low, high) of the logarithm of new over old: Student's t over the launches, widened to the percentile
        bootstrap over launches where that is wider."""
        count = len(self.new)
        mean = float(self.new.mean())
        deviation, freedom = self.spread()
        half = _student(LEVEL, freedom) * deviation * math.sqrt(_CONTRAST / count)
        low, high = _bootstrap(self.new)
        return mean, min(mean - half, low), max(mean + half, high)


def contrasts(turns: Turns, cost: Callable[[Measurement], Sequence[Sequence[float]]]) -> Contrasts:
    """The contrasts of a cost: `cost` gives positive figures by launch and round, more being worse.

    The contrast of a launch is the median over its rounds, in which all three were measured one after the other.
    Raises ValueError when the three were not measured in the same launches.
    """
    old, again, new = (cost(m) for m in (turns.old, turns.again, turns.new))
    if not len(old) == len(again) == len(new) > 0:
        raise ValueError("the three were not measured in the same launches")
    mine, copies = [], []
    for a, b, c in zip(old, again, new, strict=True):
        rounds = min(len(a), len(b), len(c))
        first, second, third = (np.log(np.asarray(x[:rounds], dtype=np.float64)) for x in (a, b, c))
        mine.append(float(np.median(third - (first + second) / 2)))
        copies.append(float(np.median(second - first)))
    return Contrasts(np.array(mine), np.array(copies))


def seconds_an_item(m: Measurement) -> list[list[float]]:
    """Wall-clock seconds of a window over its items: the inverse of throughput."""
    return [[w.wall_s / (m.batch * len(w.seconds)) for w in launch] for launch in m.launches]


def undisturbed_seconds(m: Measurement) -> list[list[float]]:
    """The lower quartile of the run times of each window: what a run takes where no other process breaks in. On a machine
    with other work its spread from launch to launch was a quarter of the wall clock's (ARCHITECTURE, the gate)."""
    return [[float(np.quantile(w.seconds, 0.25)) for w in launch] for launch in m.launches]


def load_seconds(m: Measurement) -> list[list[float]]:
    """How long opening the engine took, in seconds: one figure a launch."""
    return [[s] for s in m.loads_s]


def peak_bytes(m: Measurement) -> list[list[float]]:
    """The process's peak memory: one figure a launch."""
    return [[float(b)] for b in m.peaks_rss_bytes]


def lost(found: Contrasts) -> Change:
    """1 - old cost / new cost, with its interval: for seconds, the share of the throughput lost (0.05 = 5 % slower)."""
    mean, low, high = found.interval()
    return Change(-math.expm1(-mean), -math.expm1(-low), -math.expm1(-high))


def grown(found: Contrasts) -> Change:
    """new cost / old cost - 1, with its interval (0.1 = 10 % more)."""
    mean, low, high = found.interval()
    return Change(math.expm1(mean), math.expm1(low), math.expm1(high))


def judged(found: Contrasts, measured: Callable[[Contrasts], Change], limit: float) -> tuple[str, str]:
    """(outcome, why where it is not plain from the interval) of the change that `measured` (`lost` or `grown`) makes of the
    contrasts: 'fail' when the lower end of its 95 % interval is over the limit and the rank test and the A/A row agree that
    something changed; 'pass' when the upper end is within it; else 'inconclusive'.

    A limit below EFFECT_FLOOR is held as EFFECT_FLOOR.
    """
    held = max(limit, EFFECT_FLOOR)
    change = measured(found)
    if not change.is_number:
        return "fail", "not a number"
    if len(found.new) < MIN_LAUNCHES:
        return "inconclusive", f"{len(found.new)} launches a side, {MIN_LAUNCHES} are needed"
    if change.high <= held:
        return "pass", ""
    if change.low <= held:
        return "inconclusive", "more launches would tell"
    p = found.rank_p
    if p > RANK_P:
        return "inconclusive", f"the rank test does not agree (p = {p:.2g})"
    same = abs(math.expm1(float(found.again.mean())))
    if same >= abs(change.value):
        return "inconclusive", f"the baseline's engine differs from itself by {100 * same:.1f} %"
    return "fail", ""


def doubtful(m: Measurement) -> str:
    """What is wrong with the clock of a measurement; empty when nothing is: a run of no or negative time, a window shorter
    than the runs in it."""
    for window in m.windows:
        seconds = np.asarray(window.seconds, dtype=np.float64)
        if not len(seconds) or not np.isfinite(seconds).all() or (seconds <= 0).any():
            return "a run took no time, or a negative one: the clock jumped"
        if not math.isfinite(window.wall_s) or window.wall_s < float(seconds.sum()) * (1 - 1e-6):
            return "a window is shorter than the runs in it: the clock jumped"
    return ""


def _bootstrap(values: Floats) -> tuple[float, float]:
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(_resamples(len(values)) @ values, [tail, 100 - tail])
    return float(low), float(high)


@functools.cache
def _resamples(count: int, draws: int = 2000) -> Floats:
    """Of each resample of `count` launches, the share of each launch in its mean [draws, count]."""
    chosen = np.random.default_rng(0).integers(0, count, (draws, count))
    shares: Floats = (chosen[:, :, None] == np.arange(count)).mean(axis=1)
    return shares


@functools.cache
def _student(level: float, freedom: int) -> float:
    """The two-sided quantile of Student's t: the t whose central probability is `level`, by bisection on the finite series
    of Abramowitz and Stegun 26.7.3 and 26.7.4."""
    low, high = 0.0, 1e4
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _central(middle, freedom) < level else (low, middle)
    return (low + high) / 2


def _central(t: float, freedom: int) -> float:
    angle = math.atan(t / math.sqrt(freedom))
    cosine2 = math.cos(angle) ** 2
    odd = freedom % 2
    term, total = 1.0, 1.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= cosine2 * (k - 1) / k
        total += term
    if not odd:
        return math.sin(angle) * total
    if freedom == 1:
        return 2 * angle / math.pi
    return 2 / math.pi * (angle + math.sin(angle) * math.cos(angle) * total)
