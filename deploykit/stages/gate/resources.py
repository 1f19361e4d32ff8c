"""What one row costs beside accuracy: time measured in turns, size, peak memory, the time to open the engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deploykit.measurement import Measurement
from deploykit.row import Row
from deploykit.stages.gate.drops import reason
from deploykit.stages.gate.intervals import Change, decide
from deploykit.stages.gate.limits import Limits
from deploykit.stages.gate.turns import (
    EFFECT_FLOOR,
    Contrasts,
    Turns,
    contrasts,
    doubtful,
    grown,
    judged,
    load_seconds,
    lost,
    peak_bytes,
    seconds_an_item,
    undisturbed_seconds,
)
from deploykit.verdict import Reason

# Peak memory of two processes of one engine was never seen to differ by more (ARCHITECTURE, the gate).
MEMORY_SPREAD = 0.02


@dataclass(frozen=True)
class Settled:
    """A row that was not measured in turns, since the outcome stands without it: what it is, and why."""

    outcome: str
    message: str


def timed(row: Row, found: Turns | Settled, limits: Limits) -> list[Reason]:
    """Speed, throughput, peak memory and start-up of one row, as far as there are limits on them."""
    asked = {"speed": limits.max_slowdown, "memory": limits.max_memory_growth, "start-up": limits.max_startup_growth}
    checks = {check: limit for check, limit in asked.items() if limit is not None}
    if isinstance(found, Settled):
        return [reason(row, check, found.outcome, found.message) for check in checks]
    doubt = next((said for m in (found.old, found.again, found.new) if (said := doubtful(m))), "")
    if doubt:
        return [reason(row, check, "inconclusive", doubt) for check in checks]
    reasons: list[Reason] = []
    if limits.max_slowdown is not None:
        run, wall = contrasts(found, undisturbed_seconds), contrasts(found, seconds_an_item)
        reasons += speed(row, run, wall, limits.max_slowdown)
    if limits.max_memory_growth is not None:
        reasons.append(_growth(row, "memory", found, peak_bytes, limits.max_memory_growth, "peak memory"))
    if limits.max_startup_growth is not None:
        reasons.append(_growth(row, "start-up", found, load_seconds, limits.max_startup_growth, "time to open it"))
    return reasons


def speed(row: Row, run: Contrasts, wall: Contrasts, limit: float) -> list[Reason]:
    """Two checks: what an undisturbed run takes (`run`), and the wall clock.

    The wall clock holds what other processes took as well, so on a busy machine it seldom shows that nothing changed. Where it
    does not, and its own estimate lies within the limit, the undisturbed run decides alone.
    """
    typical = _slowdown(row, "speed", run, limit, "an undisturbed run")
    rate = _slowdown(row, "throughput", wall, limit, "by the wall clock")
    if rate.outcome == "inconclusive" and typical.outcome == "pass" and lost(wall).value <= limit:
        said = f"{rate.message}; within the limit as far as it can tell, and the undisturbed run decides"
        rate = reason(row, "throughput", "pass", said)
    return [typical, rate]


def _slowdown(row: Row, check: str, found: Contrasts, limit: float, what: str) -> Reason:
    change = lost(found)
    how = "slower" if change.value >= 0 else "faster"
    said = f"{100 * abs(change.value):.1f} % {how} than the baseline's engine, {what}{_shown(found, change, 'slower', limit)}"
    return _reason(row, check, judged(found, lost, limit), said)


_Cost = Callable[[Measurement], Sequence[Sequence[float]]]


def _growth(row: Row, check: str, turns: Turns, cost: _Cost, limit: float, what: str) -> Reason:
    figures = [[x for launch in cost(m) for x in launch] for m in (turns.old, turns.again, turns.new)]
    if not all(found and min(found) > 0 for found in figures):  # a system without VmHWM says 0
        return reason(row, check, "inconclusive", f"the {what} was not measured in every launch")
    found = contrasts(turns, cost)
    change = grown(found)
    how = "more" if change.value >= 0 else "less"
    said = f"{100 * abs(change.value):.1f} % {how} {what} than the baseline's engine{_shown(found, change, 'more', limit)}"
    return _reason(row, check, judged(found, grown, limit), said)


def _shown(found: Contrasts, change: Change, way: str, limit: float) -> str:
    same = 100 * abs(math.expm1(float(found.again.mean())))
    held = f", held as {100 * EFFECT_FLOOR:g} %: less is never called a change" if limit < EFFECT_FLOOR else ""
    return (
        f" (95 %: {100 * change.low:.1f} to {100 * change.high:.1f} % {way}), limit {100 * limit:g} %{held}; in turns over "
        f"{len(found.new)} launches, A/A {same:.1f} %, rank test p = {found.rank_p:.2g}"
    )


def _reason(row: Row, check: str, verdict: tuple[str, str], said: str) -> Reason:
    outcome, why = verdict
    return reason(row, check, outcome, f"{said}; {why}" if why else said)


def undecided(turns: Turns, limits: Limits) -> bool:
    """Whether more launches could tell more: the undisturbed run's interval still holds the limit."""
    if limits.max_slowdown is None or any(doubtful(m) for m in (turns.old, turns.again, turns.new)):
        return False
    found = contrasts(turns, undisturbed_seconds)
    return judged(found, lost, limits.max_slowdown)[0] == "inconclusive"


def size(now: Row, was: Row, limit: float) -> Reason:
    """The engine's bytes on disk, held against the baseline's."""
    if not now.size_bytes or not was.size_bytes:
        return reason(now, "size", "inconclusive", "the size of the engine is not recorded")
    growth = now.size_bytes / was.size_bytes - 1
    said = f"{was.size_bytes:,} -> {now.size_bytes:,} bytes ({100 * growth:+.1f} %), limit {100 * limit:g} %"
    return reason(now, "size", "fail" if growth > limit else "pass", said)


def memory(now: Row, was: Row, limit: float) -> Reason:
    """The two runs' peak memory, each one process's: known to MEMORY_SPREAD."""
    if not now.peak_rss_bytes or not was.peak_rss_bytes:
        return reason(now, "memory", "inconclusive", "the peak memory is not recorded")
    ratio = now.peak_rss_bytes / was.peak_rss_bytes
    change = Change(ratio - 1, ratio / (1 + MEMORY_SPREAD) - 1, ratio * (1 + MEMORY_SPREAD) - 1)
    said = f"{was.peak_rss_bytes:,} -> {now.peak_rss_bytes:,} bytes ({100 * change.value:+.1f} %), limit {100 * limit:g} %"
    if was.threads != now.threads:
        return reason(now, "memory", "inconclusive", f"{said}; another number of threads")
    return reason(now, "memory", decide(change, limit), said)
