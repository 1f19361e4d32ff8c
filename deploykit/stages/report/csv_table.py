"""The table as CSV."""

from __future__ import annotations

import csv
import io

from deploykit.report_document import Report
from deploykit.row import COLUMNS


def text(report: Report) -> str:
    """One line a row, the columns of `deploykit.row.COLUMNS` in that order; empty where it was not measured."""
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=COLUMNS, lineterminator="\n")
    writer.writeheader()
    for doc in report.to_json()["rows"]:
        writer.writerow({k: str(v).lower() if isinstance(v, bool) else v for k, v in doc.items()})
    return out.getvalue()
