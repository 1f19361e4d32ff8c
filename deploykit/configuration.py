"""Configuration: one way to run a model, what was measured of it, and which of several none of the others beats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

EFFORTS = ("glimpse", "look", "final")
FAILED = "failed: "  # how `Trial.out` begins where the engine could not be opened or run


@dataclass(frozen=True, order=True)
class Configuration:
    """One way to run the model. `streams`: requests at once, sharing the threads; `layout`: of images and filters in memory, ''
    where the backend's usual one is meant."""

    backend: str
    precision: str
    batch: int
    threads: int
    streams: int = 1
    layout: str = ""

    @property
    def engine(self) -> tuple[str, str]:
        """What it shares its engine, and so its accuracy and size, with."""
        return (self.backend, self.precision)

    @property
    def ladder(self) -> tuple[str, str, int, int, str]:
        """What it differs from in the batch alone."""
        return (self.backend, self.precision, self.threads, self.streams, self.layout)

    def __str__(self) -> str:
        streams = f" streams {self.streams}" if self.streams > 1 else ""
        layout = f" {self.layout}" if self.layout else ""
        return f"{self.backend} {self.precision} batch {self.batch} threads {self.threads}{streams}{layout}"


@dataclass(frozen=True)
class Limits:
    """What a recommendation must keep; None where it does not matter. max_latency_s bounds the 90th percentile of a run."""

    max_latency_s: float | None = None
    max_drop_pp: float | None = None
    max_memory_bytes: int | None = None


@dataclass(frozen=True)
class Score:
    """What was measured of a configuration: p90_s is None with too few runs, peak_rss_bytes where it was not its own process.
    ran: the precision that really ran, '' where it is the one asked for."""

    images_per_s: float
    p50_s: float
    p90_s: float | None = None
    n: int = 0
    peak_rss_bytes: int | None = None
    ran: str = ""


@dataclass(frozen=True)
class Quality:
    """Of an engine: the drop in percentage points with its interval (None without labels), and its size; `unmeasured`: the
    error that its accuracy ended with, '' where there was none."""

    drop_pp: float | None = None
    drop_high: float | None = None
    agreement: float | None = None
    size_bytes: int | None = None
    unmeasured: str = ""

    def refuses(self, limits: Limits) -> str:
        """Why this engine cannot be recommended; '' when it can."""
        if limits.max_drop_pp is None:
            return ""
        if self.drop_pp is None:
            return "its drop in top-1 was not measured" + (f": {self.unmeasured}" if self.unmeasured else "")
        return f"loses {self.drop_pp:.2f} pp of top-1" if self.drop_pp > limits.max_drop_pp else ""

    def shown(self, limits: Limits) -> bool:
        """Whether the samples show that it keeps the limit, with the whole interval."""
        return limits.max_drop_pp is None or (self.drop_high is not None and self.drop_high <= limits.max_drop_pp)


@dataclass
class Trial:
    """A configuration's way through the sweep: its scores by effort, and why it went no further ('' for the last ones)."""

    configuration: Configuration
    scores: dict[str, Score] = field(default_factory=dict)
    out: str = ""

    @property
    def failed(self) -> bool:
        """Whether its engine could not be opened or run."""
        return self.out.startswith(FAILED)

    @property
    def effort(self) -> str | None:
        """The most careful effort it was measured with; None where it was not."""
        return next((e for e in reversed(EFFORTS) if e in self.scores), None)

    @property
    def score(self) -> Score | None:
        """The score of that effort."""
        return None if self.effort is None else self.scores[self.effort]

    def to_json(self) -> dict[str, Any]:
        """The trial as JSON values."""
        scores = {effort: asdict(score) for effort, score in self.scores.items()}
        return {"configuration": asdict(self.configuration), "scores": scores, "out": self.out}


def front_of(
    trials: Sequence[Trial],
    qualities: Mapping[tuple[str, str], Quality],
    best: Configuration | None,
    *,
    least: str = "look",
) -> tuple[Configuration, ...]:
    """The configurations, measured with at least that effort, that no other beats in throughput, latency, accuracy and size at
    once, by rising latency; the recommendation is always one. With no recommendation glimpses count too: they are all there is."""
    points: list[tuple[Configuration, tuple[float, ...]]] = []
    for trial in trials:
        score, effort = trial.score, trial.effort
        if score is None or effort is None or trial.failed:
            continue
        if best is not None and EFFORTS.index(effort) < EFFORTS.index(least):
            continue
        quality = qualities.get(trial.configuration.engine, Quality())
        lost = quality.drop_pp if quality.drop_pp is not None else 100 * (1 - (quality.agreement or 0.0))
        points.append((trial.configuration, (-score.images_per_s, score.p50_s, lost, float(quality.size_bytes or 0))))

    def beaten(mine: tuple[float, ...]) -> bool:
        return any(other != mine and all(o <= m for o, m in zip(other, mine, strict=True)) for _, other in points)

    front = [(configuration, point) for configuration, point in points if configuration == best or not beaten(point)]
    return tuple(configuration for configuration, _ in sorted(front, key=lambda item: item[1][1]))
