"""The report as JSON text."""

from __future__ import annotations

import json

from deploykit.report_document import Report


def text(report: Report) -> str:
    """report.json: the published schema (docs/report-schema.json); unmeasured is null, and there is no NaN."""
    return json.dumps(report.to_json(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def measurements_text(report: Report) -> str:
    """measurements.json: the raw seconds of every run of every row."""
    return json.dumps(report.measurements_json(), allow_nan=False) + "\n"
