"""gate: pass, fail or inconclusive, each with its reason, never open when something is missing.

One rule for every figure (Limits): fail if the 95 % interval's lower end is over the limit, pass if its upper end is
within it, else inconclusive. NaN fails. Rows of the baseline that are gone, or that ran and no longer do, fail.
"""

from __future__ import annotations

import math

from deploykit.errors import InputError
from deploykit.report_document import Report
from deploykit.stages.gate.against import Outcomes, RowOutcomes, Side, against, outcomes_of
from deploykit.stages.gate.comparable import EVERYTHING, is_copy
from deploykit.stages.gate.drops import own_drop
from deploykit.stages.gate.limits import Limits, parse_drop, parse_slowdown
from deploykit.verdict import Reason, Verdict, combine

__all__ = ["Limits", "Outcomes", "RowOutcomes", "is_copy", "judge", "outcomes_of", "parse_drop", "parse_slowdown"]


def judge(
    report: Report,
    baseline: Report | None,
    limits: Limits,
    *,
    outcomes: Outcomes | None = None,
    baseline_outcomes: Outcomes | None = None,
) -> Verdict:
    """The verdict on a report.

    Without a baseline every ok row's drop is held against the report's own reference. With one, each row is held against
    the baseline's row: accuracy on paired outcomes (by `row_id`) where both sides have them for the same samples, else
    from the two drops; speed as the ratio of the two speed-ups, each over its own run's reference.
    """
    for value in (limits.max_drop_pp, limits.max_slowdown):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise InputError(f"a limit of {value} is no limit", "give a number that is not negative")
    if baseline is None:
        return _alone(report, limits)
    return against(Side(report, outcomes or {}), Side(baseline, baseline_outcomes or {}), limits)


def _alone(report: Report, limits: Limits) -> Verdict:
    reasons, skipped = [], []
    if limits.max_slowdown is not None:
        said = "a limit on slow-down needs a baseline to be slower than (--baseline)"
        reasons.append(Reason(EVERYTHING, "speed", "inconclusive", said))
    if limits.max_drop_pp is None and limits.max_slowdown is None:
        skipped.append("no limit was asked for")
    for row in report.rows:
        if row.status != "ok":
            skipped.append(f"{row.label}: {row.status}: {row.reason or 'no reason was recorded'}")
        elif report.is_reference(row) or is_copy(row):
            skipped.append(f"{row.label}: the reference itself")
        elif limits.max_drop_pp is not None:
            reasons.append(own_drop(report, row, limits.max_drop_pp))
    return combine(reasons, skipped)
