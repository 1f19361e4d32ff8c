"""The gate: a run, or its report, held against a baseline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from deploykit import artifact as artifacts
from deploykit import report_document
from deploykit.drift import Drift
from deploykit.errors import InputError
from deploykit.measurement import Measurement
from deploykit.pipeline.assemble import measured_id
from deploykit.pipeline.line import LineResult
from deploykit.pipeline.measuring import engine_id
from deploykit.report_document import Report
from deploykit.stages import gate as gates
from deploykit.verdict import Verdict

DEFAULT_LIMITS = gates.Limits(max_drop_pp=0.5, max_slowdown=0.05)  # where `gate` is given a baseline and no limit
OUTCOMES = "outcomes"


def open_baseline(path: Path | None, limits: gates.Limits) -> tuple[Report, Mapping[str, Drift]] | None:
    """The baseline's report and per-sample outcomes; None when none was given. Raises InputError for an unreadable one."""
    if limits.max_slowdown is not None and path is None:
        raise InputError("--max-slowdown needs something to be slower than", "add --baseline BASE, a run's folder or report.json")
    if path is None:
        return None
    return report_document.load(path), outcomes_of(path)


def outcomes_of(path: Path) -> dict[str, Drift]:
    """Per-sample outcomes kept beside a report, by row id; empty for a lone report.json."""
    folder = path if path.is_dir() else path.parent
    if not (folder / OUTCOMES).is_dir():
        return {}
    report = report_document.load(path)
    found: dict[str, Drift] = {}
    for key, doc in report.drifts.items():
        name = doc.get("outcomes")
        if isinstance(name, str) and Path(name).name == name and (folder / OUTCOMES / name).is_file():
            found[key] = Drift.from_json(doc).with_outcomes(folder / OUTCOMES / name)
    return found


def judge(
    result: LineResult, baseline: tuple[Report, Mapping[str, Drift]] | None, limits: gates.Limits
) -> tuple[Report, Verdict | None]:
    """The report with its verdict, where --baseline or --max-drop asked for one."""
    if baseline is None and limits.max_drop_pp is None and limits.max_slowdown is None:
        return result.report, None
    verdict = gates.judge(
        result.report,
        baseline[0] if baseline else None,
        limits,
        outcomes=gates.outcomes_of(measured_outcomes(result)),
        baseline_outcomes=gates.outcomes_of(baseline[1]) if baseline else None,
    )
    return result.report.with_verdict(verdict), verdict


def measured_outcomes(result: LineResult) -> dict[str, Drift]:
    """Per-sample outcomes of every measured row, by row id."""
    if result.results is None:
        return {}
    found: dict[str, Drift] = {}
    for entry in result.entries:
        drift, measured = result.results.drifts.get(engine_id(entry.row)), result.results.measured.get(entry.row.id)
        if isinstance(drift, Drift) and isinstance(measured, Measurement):
            found[measured_id(entry.row, measured)] = drift
    return found


def gate(report_file: Path, baseline: Path | None, limits: gates.Limits, junit: Path | None) -> Verdict:
    """The verdict on a finished run. Raises InputError for files that cannot be read and for limits that make no sense."""
    if limits.max_drop_pp is None and limits.max_slowdown is None:
        limits = DEFAULT_LIMITS
        if baseline is None:
            raise InputError("nothing to judge by", "add --baseline BASE, and --max-drop 0.5pp or --max-slowdown 5%")
    known = open_baseline(baseline, limits)
    report = report_document.load(report_file)
    verdict = gates.judge(
        report,
        known[0] if known else None,
        limits,
        outcomes=gates.outcomes_of(outcomes_of(report_file)),
        baseline_outcomes=gates.outcomes_of(known[1]) if known else None,
    )
    if junit is not None:
        from deploykit.stages.report import junit as junit_xml

        artifacts.write_atomically(junit, junit_xml.text(verdict).encode())
    return verdict
