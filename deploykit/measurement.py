"""Measurement: raw seconds of every run, kept by launch and window; every statistic is derived from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Smallest n for a percentile: at 99 % confidence with one over-latency run allowed
# (MLPerf LoadGen, early_stopping.cc; the MLPerf inference rules, 'early stopping').
MIN_RUNS = {50: 1, 90: 64, 95: 130, 99: 662}
UNSTABLE_COV = 0.025  # trtexec warns above 2.5 % (sampleReporting.cpp)


@dataclass(frozen=True)
class Window:
    """One timed stretch of runs back to back: seconds of each run, and the stretch's own wall-clock seconds."""

    seconds: tuple[float, ...]
    wall_s: float


@dataclass(frozen=True)
class Measurement:
    """Windows of one row: `launches[l][r]` is round r in process launch l. Times in seconds, `batch` items a run.

    loads_s, peaks_rss_bytes: of each launch, where they are known; load_s and peak_rss_bytes are the last launch's.
    turns: of each launch, the number of the turns it took part in: rows with the same number ran side by side. Empty where
    all rows of the group did, launch by launch. streams: requests at once, where it is known.
    """

    batch: int
    launches: tuple[tuple[Window, ...], ...]
    warmup_s: float = 0.0
    load_s: float = 0.0
    peak_rss_bytes: int = 0
    device: str = "cpu"
    threads: int = 1
    precision: str = "fp32"
    clock: str = "perf_counter"
    boundary: str = "host in, host out"
    notes: tuple[str, ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    loads_s: tuple[float, ...] = ()
    peaks_rss_bytes: tuple[int, ...] = ()
    turns: tuple[int, ...] = ()
    streams: int | None = None

    @property
    def windows(self) -> tuple[Window, ...]:
        """All windows of all launches."""
        return tuple(w for launch in self.launches for w in launch)

    @property
    def seconds(self) -> NDArray[np.float64]:
        """Seconds of every timed run [n_timed]."""
        return np.concatenate([np.asarray(w.seconds, dtype=np.float64) for w in self.windows])

    @property
    def n_timed(self) -> int:
        """How many runs were timed."""
        return sum(len(w.seconds) for w in self.windows)

    @property
    def images_per_s(self) -> float:
        """Items over the wall clock of the windows, never batch over median latency."""
        return self.batch * self.n_timed / sum(w.wall_s for w in self.windows)

    def percentile_s(self, p: int) -> float | None:
        """The p-th percentile of the runs in seconds; None when there are too few runs to support it (MIN_RUNS)."""
        if self.n_timed < MIN_RUNS[p]:
            return None
        return float(np.percentile(self.seconds, p, method="higher"))

    @property
    def cov(self) -> float | None:
        """Coefficient of variation of the window medians (a fraction); None with fewer than three windows."""
        medians = np.array([np.median(w.seconds) for w in self.windows])
        return float(medians.std(ddof=1) / medians.mean()) if len(medians) >= 3 else None

    @property
    def stable(self) -> bool | None:
        """Whether `cov` is at most 2.5 %; None when it is not known."""
        return None if self.cov is None else self.cov <= UNSTABLE_COV

    def rates(self) -> list[list[float]]:
        """Items per second of each window, by launch and round."""
        return [[self.batch * len(w.seconds) / w.wall_s for w in launch] for launch in self.launches]

    def to_json(self) -> dict[str, Any]:
        """A JSON document with the raw samples that `from_json` reads back."""
        return {
            "batch": self.batch,
            "launches": [[{"seconds": list(w.seconds), "wall_s": w.wall_s} for w in launch] for launch in self.launches],
            "warmup_s": self.warmup_s,
            "load_s": self.load_s,
            "peak_rss_bytes": self.peak_rss_bytes,
            "device": self.device,
            "threads": self.threads,
            "precision": self.precision,
            "clock": self.clock,
            "boundary": self.boundary,
            "notes": list(self.notes),
            "environment": dict(self.environment),
            "loads_s": list(self.loads_s),
            "peaks_rss_bytes": list(self.peaks_rss_bytes),
            "turns": list(self.turns),
            "streams": self.streams,
        }

    @classmethod
    def from_json(cls, doc: Mapping[str, Any]) -> Measurement:
        """The measurement that `to_json` wrote."""
        launches = tuple(tuple(Window(tuple(w["seconds"]), w["wall_s"]) for w in launch) for launch in doc["launches"])
        lists: dict[str, Any] = {k: tuple(doc.get(k, ())) for k in ("notes", "loads_s", "peaks_rss_bytes", "turns")}
        rest = {k: v for k, v in doc.items() if k != "launches" and k not in lists}
        return cls(launches=launches, **lists, **rest)


@dataclass(frozen=True)
class Ratio:
    """A speed ratio with its 95 % interval."""

    value: float
    low: float
    high: float


def speedup(candidate: Measurement, reference: Measurement, *, resamples: int = 2000, seed: int = 0) -> Ratio:
    """How many times the reference's throughput the candidate has: the median of the per-round ratios.

    Rounds of the two are paired (they were measured in turns). The interval is a bootstrap over process launches, the
    unit of replication, then over the rounds within a launch (percentile method, 95 %). A row that stopped earlier than
    the other in a launch is paired over the rounds both have; of a reference that ran beside several parts of its group
    the launches beside the candidate count. Raises ValueError when the two were not measured in the same launches, or at
    different batches.
    """
    if candidate.batch != reference.batch:
        raise ValueError(f"batch {candidate.batch} against batch {reference.batch}")
    ours, theirs = _by_turn(candidate), _by_turn(reference)
    shared = ours.keys() & theirs.keys()
    if len(shared) < min(len(ours), len(theirs)) or (len(ours) != len(theirs) and not (candidate.turns and reference.turns)):
        raise ValueError("the two were not measured in the same launches")
    pairs = [(ours[turn], theirs[turn]) for turn in sorted(shared)]
    ratios = [np.array(a[: len(b)]) / np.array(b[: len(a)]) for a, b in pairs]
    return bootstrap_ratio(ratios, resamples=resamples, seed=seed)


def _by_turn(m: Measurement) -> dict[int, list[float]]:
    """The rates of each launch, by the number of its turns."""
    return dict(zip(m.turns or range(len(m.launches)), m.rates(), strict=True))


def bootstrap_ratio(ratios: Sequence[NDArray[np.float64]], *, resamples: int = 2000, seed: int = 0) -> Ratio:
    """Median of all ratios, with a two-level percentile bootstrap (launches, then rounds within each)."""
    point = float(np.median(np.concatenate(list(ratios))))
    rng = np.random.default_rng(seed)
    sizes = np.array([len(r) for r in ratios])
    padded = np.full((len(ratios), int(sizes.max())), np.nan)
    for row, values in zip(padded, ratios, strict=True):
        row[: len(values)] = values
    chosen = rng.integers(0, len(ratios), (resamples, len(ratios)))
    within = (rng.random((*chosen.shape, padded.shape[1])) * sizes[chosen][..., None]).astype(np.int64)
    drawn = padded[chosen[..., None], within]
    drawn[np.arange(padded.shape[1]) >= sizes[chosen][..., None]] = np.nan
    ordered = np.sort(drawn.reshape(resamples, -1), axis=1)  # NaN sorts last
    count = sizes[chosen].sum(axis=1)
    middle = np.stack([(count - 1) // 2, count // 2], axis=1)
    draws = np.take_along_axis(ordered, middle, axis=1).mean(axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return Ratio(point, float(min(low, point)), float(max(high, point)))
