"""The top-1 drop of one row, held against a limit."""

from __future__ import annotations

from deploykit.report_document import Report
from deploykit.row import Row
from deploykit.stages.gate.comparable import drop_contradiction
from deploykit.stages.gate.intervals import Change, decide
from deploykit.verdict import Reason


def own_drop(report: Report, row: Row, limit: float) -> Reason:
    change = drop_of(row)
    if change is None:
        return reason(row, "top-1 drop", "inconclusive", no_drop(report))
    doubt = drop_contradiction(report, row)
    if doubt:
        return reason(row, "top-1 drop", "inconclusive", doubt)
    return judged_drop(row, change, limit, "the reference", judged_n(report))


def judged_drop(row: Row, change: Change, limit: float, over: str, n: int | None, extra: str = "") -> Reason:
    outcome = decide(change, limit)
    said = f"{change.value:.2f} pp below {over} (95 %: {change.low:.2f} to {change.high:.2f}), limit {limit:g} pp{extra}"
    if not change.is_number:
        said = f"the drop is not a number ({change.value}, {change.low} to {change.high})"
    elif outcome == "pass" and change.low == change.high and (n is None or 100 / n > limit):
        # an interval of no width: no sample changed sides; that says something only if one sample is within the limit
        outcome = "inconclusive"
        said += "; " + (f"one of {n} samples is {100 / n:.2f} pp" if n else "how many samples judged is not recorded")
    elif outcome == "inconclusive":
        said += "; more samples would tell"
    return reason(row, "top-1 drop", outcome, said)


def drop_of(row: Row) -> Change | None:
    if row.top1_drop_pp is None or row.top1_drop_low is None or row.top1_drop_high is None:
        return None
    return Change(row.top1_drop_pp, row.top1_drop_low, row.top1_drop_high)


def no_drop(report: Report) -> str:
    judged = report.samples.get("judge")
    if judged is None:
        return "a limit on the drop asks for statistics it cannot have: no data was given (--data)"
    if judged.get("random"):
        return "a limit on the drop asks for statistics it cannot have: the data is random"
    if not judged.get("labelled"):
        return "a limit on the drop asks for statistics it cannot have: the data has no labels"
    return "its top-1 drop or the interval of it was not measured"


def judged_n(report: Report) -> int | None:
    n = report.samples.get("judge", {}).get("n")
    return n if isinstance(n, int) and n > 0 else None


def reason(row: Row, check: str, outcome: str, message: str) -> Reason:
    return Reason(row.label, check, outcome, message)
