"""The top-1 drop of one row, or how often it disagrees with the reference, held against a limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from deploykit.paired import wilson
from deploykit.report_document import Report
from deploykit.row import Row
from deploykit.stages.gate.comparable import drop_contradiction
from deploykit.stages.gate.intervals import Change, decide
from deploykit.verdict import Reason


def own_drop(report: Report, row: Row, limit: float) -> Reason:
    """The row's drop from its own report's reference, held against the limit."""
    change = drop_of(row)
    if change is None:
        return reason(row, "top-1 drop", "inconclusive", no_drop(report))
    found = judged_drop(row, change, limit, "the reference", judged_n(report))
    return doubted(found, [drop_contradiction(report, row)])


def disagreement(report: Report, row: Row, limit: float) -> Reason:
    """How often the row's top-1 is another than the report's reference's, held against the limit in percentage points of the
    samples; its interval is Wilson's."""
    check, n = "disagreement", judged_n(report)
    judged = report.samples.get("judge") or {}
    if row.agreement is None or judged.get("random") or n is None:
        asks = "a limit on the disagreement asks for statistics it cannot have"
        if not judged:
            return reason(row, check, "inconclusive", f"{asks}: no data was given (--data)")
        if judged.get("random"):
            return reason(row, check, "inconclusive", f"{asks}: the data is random")
        return reason(row, check, "inconclusive", "how often it agrees with the reference was not measured")
    if not 0 <= row.agreement <= 1:
        return reason(row, check, "fail", f"an agreement of {row.agreement} is no fraction")
    count = round((1 - row.agreement) * n)
    low, high = (100 * end for end in wilson(count, n))
    outcome = decide(Change(100 * count / n, low, high), limit)
    said = (
        f"{count} of {n} samples have another top-1 than the reference ({100 * count / n:.2f} pp; 95 %: {low:.2f} to {high:.2f})"
    )
    said += f", limit {limit:g} pp" + ("; more samples would tell" if outcome == "inconclusive" else "")
    return reason(row, check, outcome, said)


def judged_drop(row: Row, change: Change, limit: float, over: str, n: int | None, extra: str = "") -> Reason:
    """The reason for one drop over `over`; n: how many samples judged."""
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


def doubted(found: Reason, doubts: Sequence[str]) -> Reason:
    """The same reason, which no longer passes where there is a doubt; a failure stays one."""
    said = "; ".join(d for d in doubts if d)
    if not said:
        return found
    return replace(found, outcome="fail" if found.outcome == "fail" else "inconclusive", message=f"{found.message}; {said}")


def drop_of(row: Row) -> Change | None:
    """The row's top-1 drop; None where it or its interval was not measured."""
    if row.top1_drop_pp is None or row.top1_drop_low is None or row.top1_drop_high is None:
        return None
    return Change(row.top1_drop_pp, row.top1_drop_low, row.top1_drop_high)


def no_drop(report: Report) -> str:
    """Why a report's row has no drop."""
    judged = report.samples.get("judge")
    if judged is None:
        return "a limit on the drop asks for statistics it cannot have: no data was given (--data)"
    if judged.get("random"):
        return "a limit on the drop asks for statistics it cannot have: the data is random"
    if not judged.get("labelled"):
        said = "a limit on the drop asks for statistics it cannot have: the data has no labels"
        return f"{said}; --max-disagreement 1pp holds its top-1 against the reference's instead"
    return "its top-1 drop or the interval of it was not measured"


def judged_n(report: Report) -> int | None:
    """How many samples judged; None where it is not recorded."""
    n = report.samples.get("judge", {}).get("n")
    return n if isinstance(n, int) and n > 0 else None


def reason(row: Row, check: str, outcome: str, message: str) -> Reason:
    """A Reason about that row."""
    return Reason(row.label, check, outcome, message)
