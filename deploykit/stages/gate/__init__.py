"""gate: pass, fail or inconclusive, each with its reason, never open when something is missing.

One rule for every figure (Limits): fail if the 95 % interval's lower end is over the limit, pass if its upper end is
within it, else inconclusive. NaN fails. Rows of the baseline that are gone, or that ran and no longer do, fail.
"""

from __future__ import annotations

import math
from dataclasses import astuple

from deploykit.errors import InputError
from deploykit.report_document import Report
from deploykit.stages.gate.against import Fresh, Outcomes, RowOutcomes, Side, against, outcomes_of
from deploykit.stages.gate.comparable import EVERYTHING, edited, pairs_of
from deploykit.stages.gate.drops import disagreement, own_drop
from deploykit.stages.gate.limits import Limits, LimitSet, Rule, parse_disagreement, parse_drop, parse_growth, parse_slowdown
from deploykit.stages.gate.resources import Settled, timed, undecided
from deploykit.stages.gate.turns import MIN_LAUNCHES, Turns
from deploykit.verdict import Reason, Verdict, combine

__all__ = [
    "MIN_LAUNCHES",
    "Fresh",
    "LimitSet",
    "Limits",
    "Outcomes",
    "RowOutcomes",
    "Rule",
    "Settled",
    "Turns",
    "judge",
    "outcomes_of",
    "pairs_of",
    "parse_disagreement",
    "parse_drop",
    "parse_growth",
    "parse_slowdown",
    "timed",
    "undecided",
]


def judge(
    report: Report,
    baseline: Report | None,
    limits: Limits | LimitSet,
    *,
    outcomes: Outcomes | None = None,
    baseline_outcomes: Outcomes | None = None,
    fresh: Fresh | None = None,
) -> Verdict:
    """The verdict on a report.

    Without a baseline every ok row's drop is held against the report's own reference; so is how often it disagrees with it, with
    a baseline too. With one, each row is held against the baseline's row: accuracy on paired outcomes (by `row_id`) where both sides have them for the same samples, else
    from the two drops; speed as the ratio of the two engines measured in turns (`fresh`), else of the two speed-ups, each
    over its own run's reference.
    """
    asked = LimitSet(limits) if isinstance(limits, Limits) else limits
    for one in asked.all():
        for value in astuple(one):
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise InputError(f"a limit of {value} is no limit", "give a number that is not negative")
    if baseline is None:
        found = _alone(report, asked)
    else:
        found = against(Side(report, outcomes or {}), Side(baseline, baseline_outcomes or {}), asked, fresh)
    said = [text for rule in asked.rules if (text := _idle(rule, report))]
    return combine((*found.reasons, *(Reason(EVERYTHING, "limits", "inconclusive", text) for text in said)), found.skipped)


def _idle(rule: Rule, report: Report) -> str:
    """That a rule's limits were held against nothing; empty where a row of it ran or was built."""
    covered = [row for row in report.rows if rule.covers(row)]
    if any(row.status in ("ok", "built") for row in covered):
        return ""
    who = ", ".join(f"{key} {value}" for key, value in rule.where.items()) or "any name"
    return f"a limit is on rows with {who}, and " + ("none of them ran" if covered else "there is none")


def _alone(report: Report, limits: LimitSet) -> Verdict:
    reasons, skipped = edited(report, "the report"), []
    for name, check in _NEEDS_BASELINE.items():
        if limits.asks(name):
            said = f"a limit on {check} needs a baseline to be held against (--baseline)"
            reasons.append(Reason(EVERYTHING, check, "inconclusive", said))
    if not any(one != Limits() for one in limits.all()):
        skipped.append("no limit was asked for")
    for row in report.rows:
        most, other = limits.of(row).max_drop_pp, limits.of(row).max_disagreement_pp
        if row.status != "ok":
            skipped.append(f"{row.label}: {row.status}: {row.reason or 'no reason was recorded'}")
        elif report.is_reference(row) or row.is_copy:
            skipped.append(f"{row.label}: the reference itself")
        else:
            reasons += [own_drop(report, row, most)] if most is not None else []
            reasons += [disagreement(report, row, other)] if other is not None else []
    return combine(reasons, skipped)


_NEEDS_BASELINE = {
    "max_slowdown": "speed",
    "max_size_growth": "size",
    "max_memory_growth": "memory",
    "max_startup_growth": "start-up",
}
