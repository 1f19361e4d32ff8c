"""A report held against a baseline, row by row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deploykit.drift import Drift
from deploykit.paired import Paired
from deploykit.report_document import Report, row_id
from deploykit.row import Row
from deploykit.session import LAYOUTS
from deploykit.stages.gate import resources
from deploykit.stages.gate.comparable import (
    changed_versions,
    drop_contradiction,
    edited,
    pairs_of,
    percentile_doubt,
    raw_contradiction,
    speed_contradiction,
    speed_doubts,
    unlike,
)
from deploykit.stages.gate.drops import disagreement, doubted, drop_of, judged_drop, judged_n, no_drop, reason
from deploykit.stages.gate.intervals import Change, decide, difference, paired_drop, slowdown
from deploykit.stages.gate.limits import Limits, LimitSet
from deploykit.stages.gate.resources import Settled
from deploykit.stages.gate.turns import Turns
from deploykit.verdict import Reason, Verdict, combine

# Identical processes differ by about 3 % for as long as they live: one launch a side cannot tell less apart. With L
# launches the mean of them varies by 3 %/sqrt(L); from five on, the bootstrap over launches sees it by itself.
PROCESS_SPREAD = 0.03
ENOUGH_LAUNCHES = 5
# An unstable row never passes, and fails only where the lower end is over this many times the limit. Its own variation
# is not added to the interval: what the machine does to both rows of a ratio is not in the ratio.
CLEARLY = 2


@dataclass(frozen=True)
class RowOutcomes:
    """Whether each judged sample was classified right: bool [n], in the order of the samples of that digest."""

    samples: str
    correct: NDArray[np.bool_]


Outcomes = Mapping[str, RowOutcomes]


def outcomes_of(drifts: Mapping[str, Drift]) -> dict[str, RowOutcomes]:
    """The outcomes of those drifts (by `row_id`) that have labels and their per-sample arrays at hand."""
    return {key: RowOutcomes(d.samples, d.correct) for key, d in drifts.items() if d.correct is not None}


@dataclass(frozen=True)
class Side:
    """One of the two runs."""

    report: Report
    outcomes: Outcomes

    def launches(self, row: Row) -> int:
        """In how many process launches the row was measured; 1 where that is not known."""
        found = self.report.measurements.get(row_id(row), {}).get("launches")
        return max(1, len(found)) if isinstance(found, list) else 1

    def speedup(self, row: Row) -> Change:
        """The row's speed-up, its interval no narrower than its number of launches allows."""
        value, low, high = (x if x is not None else math.nan for x in (row.speedup, row.speedup_low, row.speedup_high))
        launches = self.launches(row)
        if launches < ENOUGH_LAUNCHES and value > 0:
            spread = math.exp(PROCESS_SPREAD / math.sqrt(launches))
            low, high = min(low, value / spread), max(high, value * spread)
        return Change(value, low, high)


Fresh = Mapping[str, Turns | Settled]


def against(new: Side, old: Side, limits: LimitSet, fresh: Fresh | None = None) -> Verdict:
    """The verdict on every row of the baseline; rows that only the report has are listed as skipped.

    `fresh`, by `row_id` of the report's row: both engines measured in turns just now, which then decide on time and memory.
    """
    rows = [r for r in old.report.rows if not r.is_copy]
    reasons = edited(new.report, "the report") + edited(old.report, "the baseline")
    reasons += unlike(new.report, old.report, accuracy=limits.asks("max_drop_pp"))
    if any(r.outcome == "fail" for r in reasons):
        return combine(reasons, [f"{r.label}: not compared" for r in rows])
    skipped = [] if any(one != Limits() for one in limits.all()) else ["no limit was asked for"]
    pairs = list(pairs_of(new.report.rows, rows))
    for was, now, problem in pairs:
        if now is None:
            outcome = "inconclusive" if problem.startswith("several") else "fail"
            reasons.append(reason(was, "row", outcome, problem))
        elif was.status in ("ok", "built") and now.status != was.status and (was.status, now.status) != ("built", "ok"):
            said = f"was {was.status} in the baseline, now {now.status}: {now.reason or 'no reason was recorded'}"
            reasons.append(reason(now, "row", "fail", said))
        elif was.status not in ("ok", "built") or now.status != was.status:
            skipped.append(f"{now.label}: {now.status} ({was.status} in the baseline){': ' + now.reason if now.reason else ''}")
        else:
            reasons += _compare(new, now, old, was, limits.of(now), fresh, skipped)
    matched = {id(now) for _, now, _ in pairs}
    skipped += [f"{r.label}: not in the baseline" for r in new.report.rows if id(r) not in matched and not r.is_copy]
    return combine(reasons, skipped)


def _compare(new: Side, now: Row, old: Side, was: Row, limits: Limits, fresh: Fresh | None, skipped: list[str]) -> list[Reason]:
    reasons = []
    if limits.max_size_growth is not None:
        reasons.append(resources.size(now, was, limits.max_size_growth))
    if now.status != "ok":
        if not reasons:
            skipped.append(f"{now.label}: {now.status}{': ' + now.reason if now.reason else ''}")
        return reasons
    reference = new.report.is_reference(now)
    if limits.max_drop_pp is not None:
        if reference and now.top1 is not None and now.top1 == was.top1 and _same_outcomes(new, now, old, was):
            skipped.append(f"{now.label}: the reference, with the baseline's top-1")
        else:
            found = _accuracy(new, now, old, was, limits.max_drop_pp)
            reasons.append(doubted(found, [drop_contradiction(side.report, row) for side, row in ((new, now), (old, was))]))
    if limits.max_disagreement_pp is not None and not reference and now.status == "ok":
        reasons.append(disagreement(new.report, now, limits.max_disagreement_pp))
    doubts = [percentile_doubt(row) for row in (now, was)]
    doubts += [raw_contradiction(side.report, row) for side, row in ((new, now), (old, was))]
    if fresh is not None:
        if changed := changed_versions(new.report, old.report):
            doubts.append(f"{changed}; both engines were run with the versions here, which cannot show what a version cost")
        if now.threads != was.threads:
            doubts.append(f"another number of threads: {was.threads} -> {now.threads}")
        doubts += _run_otherwise(now, was)
        turns = fresh.get(row_id(now), Settled("inconclusive", "was not measured again"))
        return reasons + [doubted(r, doubts) for r in resources.timed(now, turns, limits)]
    return reasons + _recorded(new, now, old, was, limits, doubts, skipped)


def _recorded(
    new: Side, now: Row, old: Side, was: Row, limits: Limits, doubts: Sequence[str], skipped: list[str]
) -> list[Reason]:
    """Speed, memory and start-up as far as two reports alone can tell."""
    reasons = []
    if limits.max_slowdown is not None:
        if new.report.is_reference(now):
            skipped.append(f"{now.label}: the reference, speed is a ratio to it")
        else:
            found = _speed(new, now, old, was, limits.max_slowdown, speed_doubts(new.report, old.report))
            found = doubted(found, [speed_contradiction(side.report, row) for side, row in ((new, now), (old, was))])
            reasons.append(doubted(found, doubts))
    if limits.max_memory_growth is not None:
        machine = [d for d in speed_doubts(new.report, old.report) if "machine" in d or "versions" in d]
        reasons.append(doubted(resources.memory(now, was, limits.max_memory_growth), machine))
    if limits.max_startup_growth is not None:
        said = "only measuring both engines in one job can tell: give two run folders, without --no-remeasure"
        reasons.append(reason(now, "start-up", "inconclusive", said))
    return reasons


def _accuracy(new: Side, now: Row, old: Side, was: Row, limit: float) -> Reason:
    n = judged_n(new.report)
    if _same_outputs(now, was) and _same_outcomes(new, now, old, was):
        extra = ", the same outputs on the same samples (SQNR equal to the last digit)"
        return judged_drop(now, Change(0.0, 0.0, 0.0), limit, "the baseline", n, extra)
    mine, theirs = new.outcomes.get(row_id(now)), old.outcomes.get(row_id(was))
    if mine is not None and theirs is not None:
        if mine.samples != theirs.samples or mine.correct.shape != theirs.correct.shape or not len(mine.correct):
            return reason(now, "top-1 drop", "fail", "the per-sample outcomes are not of the same samples")
        change, p = paired_drop(mine.correct, theirs.correct)
        extra = f", {len(mine.correct)} samples paired, McNemar p = {p:.2g}{_visible(mine.correct, theirs.correct)}"
        return judged_drop(now, change, limit, "the baseline", len(mine.correct), extra)
    change_now, change_was = drop_of(now), drop_of(was)
    if change_now is None or change_was is None:
        return reason(now, "top-1 drop", "inconclusive", no_drop(new.report if change_now is None else old.report))
    references = [r.reference_row() for r in (new.report, old.report)]
    if dict(new.report.reference) != dict(old.report.reference) or len({r.top1 if r else None for r in references}) > 1:
        said = "the reference's own top-1 changed; only paired outcomes (run folders as report and baseline) can tell"
        return reason(now, "top-1 drop", "inconclusive", said)
    return judged_drop(now, difference(change_now, change_was), limit, "the baseline", n, ", from the two rows' drops, unpaired")


def _visible(mine: NDArray[np.bool_], theirs: NDArray[np.bool_]) -> str:
    least = Paired.of(theirs, mine).smallest_visible_pp
    return ", no drop could have shown" if least is None else f", a drop of {least:.2g} pp or more would have shown"


def _same_outcomes(new: Side, now: Row, old: Side, was: Row) -> bool:
    """Whether no sample is known to have changed sides."""
    mine, theirs = new.outcomes.get(row_id(now)), old.outcomes.get(row_id(was))
    if mine is None or theirs is None:
        return True
    return mine.samples == theirs.samples and np.array_equal(mine.correct, theirs.correct)


def _same_outputs(now: Row, was: Row) -> bool:
    """Whether the figures that every output value goes into are the same to the last digit."""
    return now.sqnr_db is not None and all(
        getattr(now, k) is not None and getattr(now, k) == getattr(was, k)
        for k in ("sqnr_db", "top1", "agreement", "top1_drop_pp")
    )


def _run_otherwise(now: Row, was: Row) -> list[str]:
    """The doubts that the two ran another number of requests at once, or in another layout; a report that does not say ran one
    at a time, in the usual layout."""
    pairs: tuple[tuple[str, object, object], ...] = (
        ("number of requests at once (--streams)", was.streams or 1, now.streams or 1),
        ("layout (--layout)", was.layout or LAYOUTS[0], now.layout or LAYOUTS[0]),
    )
    return [f"another {what}: {theirs} -> {mine}" for what, theirs, mine in pairs if mine != theirs]


def _speed(new: Side, now: Row, old: Side, was: Row, limit: float, doubts: Sequence[str]) -> Reason:
    figures = [x for r in (now, was) for x in (r.speedup, r.speedup_low, r.speedup_high)]
    if any(x is not None and (math.isnan(x) or x < 0 or x == math.inf) for x in figures) or 0.0 in (now.speedup, was.speedup):
        return reason(now, "speed", "fail", f"a speed-up is no positive number ({', '.join(map(str, figures))})")
    differ = [k for k in ("device", "threads", "clock", "boundary") if getattr(now, k) != getattr(was, k)]
    doubts = [*doubts, *(f"another {k}: {getattr(was, k)} -> {getattr(now, k)}" for k in differ), *_run_otherwise(now, was)]
    if None in figures:
        doubts.append("a speed-up or its interval was not measured")
    if doubts:
        return reason(now, "speed", "inconclusive", "; ".join(doubts))
    if all(getattr(now, k) == getattr(was, k) for k in ("images_per_s", "p50_s", "n_timed", "speedup")) and now.images_per_s:
        return reason(now, "speed", "pass", "the same measurement as the baseline's, reused: nothing changed")
    change = slowdown(new.speedup(now), old.speedup(was))
    unstable = now.stable is False or was.stable is False
    outcome = decide(change, limit)
    how = "slower" if change.value >= 0 else "faster"
    said = f"{100 * abs(change.value):.1f} % {how} than the baseline (95 %: {100 * change.low:.1f} to {100 * change.high:.1f} % slower)"
    said += f", limit {100 * limit:g} %; speed-up {was.speedup:.2f}x -> {now.speedup:.2f}x"
    if unstable and not change.low > CLEARLY * limit:
        outcome, said = "inconclusive", said + "; UNSTABLE: its windows vary by more than 2.5 %"
    return reason(now, "speed", outcome, said)
