"""sweep: the best configuration under limits, by successive elimination, without measuring all of them in full.

Every configuration gets a glimpse (a fraction of a second, one after another); those that a glimpse already rules out are
not looked at again, and those that a limit or a smaller batch rules out are not even opened. The survivors are measured in
turns, longer and longer, and fewer in each round; the last ones as `bench` measures its rows. What glimpses alone put on the
Pareto front is looked at again, beside the recommendation. (Karnin, Koren and Somekh,
'Almost optimal exploration in multi-armed bandits', 2013: sequential halving; the slack of each round is of our noise.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from deploykit.configuration import FAILED, Configuration, Limits, Quality, Score, Trial, front_of

OBJECTIVES = ("throughput", "latency")
# What a figure of a round may be off by: a configuration further behind the best than this is given up.
SLACK = {"glimpse": 0.30, "look": 0.10}
MOST = {"glimpse": 8, "look": 3}  # survivors of a round
MOST_ON_FRONT = 4  # of those that only a glimpse has put on the front
_HOPELESS = 3.0  # at the same batch, so many times slower than another ladder: larger batches are not tried
_FALLING = 0.75  # two batches in a row below this share of the ladder's best: throughput has passed its peak
_OVER = 1.3  # a glimpse's median may exceed the latency limit by so much before it rules a configuration out
# Likely fastest first, so that later ladders are held against a good one from the start.
_ORDER = ("int8", "mixed", "bf16", "fp16", "fp32", "int8-dynamic")


@dataclass(frozen=True)
class Found:
    """The end of a sweep: the recommendation (None where nothing keeps the limits), the front and every trial."""

    best: Configuration | None
    front: tuple[Configuration, ...]
    trials: tuple[Trial, ...]
    spent_s: float

    def trial(self, configuration: Configuration) -> Trial:
        """The trial of a configuration of the space."""
        return next(t for t in self.trials if t.configuration == configuration)


Evaluate = Callable[[Sequence[Configuration], str], Mapping[Configuration, Score | str]]


def search(
    space: Sequence[Configuration],
    qualities: Mapping[tuple[str, str], Quality],
    limits: Limits,
    evaluate: Evaluate,
    *,
    objective: str = "throughput",
    budget_s: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Found:
    """The best configuration of the space. `evaluate(configurations, effort)` gives a Score, or why there is none, for each;
    those of one call are measured in turns, except glimpses. After `budget_s` no more glimpses are taken.

    An engine without a Quality has no accuracy to judge by, and is refused where `limits` ask for one.
    """
    start = clock()
    trials = {c: Trial(c) for c in sorted(space, key=_promise)}
    for trial in trials.values():
        trial.out = _refused(trial.configuration, qualities, limits)
    _glimpses([t for t in trials.values() if not t.out], limits, evaluate, objective, start, budget_s, clock)
    best: Configuration | None = None
    while best is None:
        left = [t for t in trials.values() if not t.out and "final" not in t.scores and t.score is not None]
        if not left:
            break
        _narrow(left, "glimpse", objective)
        survivors = [t for t in left if not t.out]
        if len(survivors) > MOST["look"]:
            _measure(survivors, "look", evaluate)
            survivors = [t for t in survivors if not t.out and not _too_slow(t, limits, "look")]
            _narrow(survivors, "look", objective)
            survivors = [t for t in survivors if not t.out]
        _measure(survivors, "final", evaluate)
        able = [t for t in survivors if not t.out and not _misses(t, limits)]
        if able:
            able = _challenged(able, list(trials.values()), limits, evaluate, objective)
            best = max(able, key=lambda t: _merit(t, objective)).configuration
            for trial in able:
                if trial.configuration != best:
                    trial.out = f"behind {best} in the last round"
        else:  # nobody of the last round keeps the limits: those given up before have their turn
            for trial in trials.values():
                if trial.out.startswith(_BEHIND) and "final" not in trial.scores:
                    trial.out = ""
    _look_at_front(list(trials.values()), qualities, best, evaluate)
    return Found(best, front_of(list(trials.values()), qualities, best), tuple(trials.values()), clock() - start)


def _look_at_front(
    trials: Sequence[Trial], qualities: Mapping[tuple[str, str], Quality], best: Configuration | None, evaluate: Evaluate
) -> None:
    """Measures what only a glimpse has put on the front, in turns with the recommendation: a glimpse flatters, and next to full
    measurements it would crowd the front. Those beyond MOST_ON_FRONT, at even distances, stay out of it."""
    front = set(front_of(trials, qualities, best, least="glimpse"))
    fresh = sorted((t for t in trials if t.configuration in front and t.effort == "glimpse"), key=_latency)
    if best is None or not fresh:
        return
    some = min(len(fresh), MOST_ON_FRONT)
    chosen = [fresh[round(i * (len(fresh) - 1) / max(1, some - 1))] for i in range(some)]
    first = next(t for t in trials if t.configuration == best)
    _measure([first, *chosen], "look", evaluate)
    if first.failed:  # it ran in full a moment ago
        first.out = ""


def _latency(trial: Trial) -> float:
    return trial.score.p50_s if trial.score is not None else float("inf")


def _challenged(able: list[Trial], trials: Sequence[Trial], limits: Limits, evaluate: Evaluate, objective: str) -> list[Trial]:
    """`able`, with those that were given up on a short measurement which is better than the best one's full one: one of the two
    was disturbed, so the first few of them are measured in full, in turns with the best. Never empty."""
    first = max(able, key=lambda t: _merit(t, objective))
    given_up = [t for t in trials if t.out.startswith(_BEHIND) and "final" not in t.scores and not _too_slow_at_all(t, limits)]
    better = sorted((t for t in given_up if _merit(t, objective) > _merit(first, objective)), key=lambda t: -_merit(t, objective))
    if not better:
        return able
    again = [first, *better[: MOST["look"] - 1]]
    before = {id(t): t.scores.copy() for t in again}
    for trial in again:
        trial.out = ""
    _measure(again, "final", evaluate)
    if first.out or _misses(first, limits):  # it had kept the limits a moment ago
        first.scores, first.out = before[id(first)], ""
    kept = [t for t in again if not t.out and not _misses(t, limits)]
    return [*kept, *(t for t in able if t is not first)]


def _too_slow_at_all(trial: Trial, limits: Limits) -> bool:
    score = trial.score
    return score is None or (limits.max_latency_s is not None and score.p50_s > limits.max_latency_s)


_BEHIND = "behind the best"


def _promise(configuration: Configuration) -> tuple[int, str, int, int, str, int]:
    rank = _ORDER.index(configuration.precision) if configuration.precision in _ORDER else len(_ORDER)
    return (
        rank,
        configuration.backend,
        -configuration.streams,
        -configuration.threads,
        configuration.layout,
        configuration.batch,
    )


def _refused(configuration: Configuration, qualities: Mapping[tuple[str, str], Quality], limits: Limits) -> str:
    quality = qualities.get(configuration.engine, Quality())
    if limits.max_memory_bytes is not None and (quality.size_bytes or 0) > limits.max_memory_bytes:
        return "its engine alone is larger than the memory limit"
    return quality.refuses(limits)


def _glimpses(
    trials: Sequence[Trial],
    limits: Limits,
    evaluate: Evaluate,
    objective: str,
    start: float,
    budget_s: float | None,
    clock: Callable[[], float],
) -> None:
    """A glimpse of each, ladder by ladder from the smallest batch; the rest of a ladder is skipped as soon as it is hopeless."""
    best_at: dict[int, float] = {}
    ladders: dict[tuple[str, str, int, int, str], list[Trial]] = {}
    for trial in trials:
        ladders.setdefault(trial.configuration.ladder, []).append(trial)
    for ladder in ladders.values():
        why = ""
        rates: list[float] = []
        for trial in sorted(ladder, key=lambda t: t.configuration.batch):
            if not why and budget_s is not None and clock() - start > budget_s and best_at:
                why = "not measured: the time was up"
            if why:
                trial.out = why
                continue
            _measure([trial], "glimpse", evaluate)
            score = trial.scores.get("glimpse")
            if score is None:
                continue
            batch = trial.configuration.batch
            rates.append(score.images_per_s)
            best_at[batch] = max(best_at.get(batch, 0.0), score.images_per_s)
            why = _stops(trial, rates, best_at[batch], limits, objective)
            _too_slow(trial, limits, "glimpse")


def _stops(trial: Trial, rates: Sequence[float], best_here: float, limits: Limits, objective: str) -> str:
    """Why the larger batches of a ladder need not be tried; '' when they should."""
    score, batch = trial.scores["glimpse"], trial.configuration.batch
    if limits.max_latency_s is not None and score.p50_s > _OVER * limits.max_latency_s:
        return f"not measured: batch {batch} takes {score.p50_s * 1e3:.3g} ms already"
    if objective == "latency":
        return f"not measured: batch {batch} has the lower latency"
    if best_here > _HOPELESS * score.images_per_s:
        return f"not measured: at batch {batch} another one is {best_here / score.images_per_s:.1f} times as fast"
    if len(rates) >= 3 and max(rates[-2:]) < _FALLING * max(rates):
        return f"not measured: throughput falls from batch {batch} on"
    return ""


def _measure(trials: Sequence[Trial], effort: str, evaluate: Evaluate) -> None:
    found = evaluate([t.configuration for t in trials], effort)
    for trial in trials:
        result = found.get(trial.configuration, "was not measured")
        if isinstance(result, Score):
            trial.scores[effort] = result
        else:
            trial.out = f"{FAILED}{result}"


def _too_slow(trial: Trial, limits: Limits, effort: str) -> bool:
    """Whether a round rules the trial out by its latency; says so in it."""
    score = trial.scores.get(effort)
    if score is None or limits.max_latency_s is None or score.p50_s <= _OVER * limits.max_latency_s:
        return False
    trial.out = f"takes {score.p50_s * 1e3:.3g} ms"
    return True


def _misses(trial: Trial, limits: Limits) -> bool:
    """Whether the last round shows that the trial misses a limit, or does not show that it keeps it; says so in it."""
    score = trial.scores.get("final")
    if score is None:
        return True
    if limits.max_latency_s is not None:
        tail, name = (score.p90_s, "p90") if score.p90_s is not None else (score.p50_s, "p50")
        if tail > limits.max_latency_s:
            trial.out = f"{name} is {tail * 1e3:.3g} ms"
        elif score.p90_s is None:
            trial.out = f"{score.n} runs are too few for a 90th percentile"
    if limits.max_memory_bytes is not None and not trial.out:
        if score.peak_rss_bytes is None:
            trial.out = "its memory was not measured"
        elif score.peak_rss_bytes > limits.max_memory_bytes:
            trial.out = f"its process holds {score.peak_rss_bytes / 1e6:.0f} MB"
    return bool(trial.out)


def _merit(trial: Trial, objective: str) -> float:
    score = trial.score
    if score is None:
        return float("-inf")
    return score.images_per_s if objective == "throughput" else 1 / score.p50_s


def _narrow(trials: Sequence[Trial], effort: str, objective: str) -> None:
    """Gives up those that are further behind the best than the round's noise, and all but the first few."""
    ranked = sorted(trials, key=lambda t: -_merit(t, objective))
    for place, trial in enumerate(ranked):
        share = _merit(trial, objective) / _merit(ranked[0], objective)
        if share < 1 - SLACK[effort] or place >= MOST[effort]:
            trial.out = f"{_BEHIND} by {1 - share:.0%} ({effort})"
