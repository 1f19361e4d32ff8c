"""Finding and Verdict: what a check says of a graph, and what a gate says of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from deploykit.errors import EXIT_FAILED, EXIT_INCONCLUSIVE, EXIT_PASSED

SEVERITIES = ("info", "warning", "error")


@dataclass(frozen=True)
class Finding:
    """One thing found in a graph. code: 'DK' and three digits; target: the backend it concerns, or 'any'."""

    code: str
    severity: str
    message: str
    remedy: str
    node: str = ""
    target: str = "any"

    def to_json(self) -> dict[str, str]:
        """The finding as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Reason:
    """One comparison a gate made: what of which row, the outcome, and the figures in words."""

    row: str
    check: str
    outcome: str
    message: str


@dataclass(frozen=True)
class Verdict:
    """pass | fail | inconclusive, with every comparison made and everything that was skipped."""

    outcome: str
    reasons: tuple[Reason, ...] = ()
    skipped: tuple[str, ...] = field(default=())

    @property
    def exit_code(self) -> int:
        """The process exit code this verdict ends with."""
        return {"pass": EXIT_PASSED, "fail": EXIT_FAILED, "inconclusive": EXIT_INCONCLUSIVE}[self.outcome]

    def to_json(self) -> dict[str, Any]:
        """The verdict as JSON values."""
        return {"outcome": self.outcome, "reasons": [asdict(r) for r in self.reasons], "skipped": list(self.skipped)}


def combine(reasons: Sequence[Reason], skipped: Sequence[str] = ()) -> Verdict:
    """One verdict of many comparisons: any fail fails; else any inconclusive is inconclusive; no comparison at all is
    inconclusive too, since a check that did not run has not passed."""
    outcomes = {r.outcome for r in reasons}
    if "fail" in outcomes:
        outcome = "fail"
    elif "inconclusive" in outcomes or not outcomes:
        outcome = "inconclusive"
    else:
        outcome = "pass"
    return Verdict(outcome, tuple(reasons), tuple(skipped))
