"""Writes the published JSON schemas, which are made from the code: docs/report-schema.json and docs/deploykit-schema.json.

python scripts/schemas.py
"""

from __future__ import annotations

import json
from pathlib import Path

from deploykit.cli import config_schema
from deploykit.cli.main import config_keys
from deploykit.stages.report import schema as report_schema

DOCS = Path(__file__).parent.parent / "docs"


def main() -> None:
    """Writes both."""
    for name, doc in (
        ("report-schema.json", report_schema.schema()),
        ("deploykit-schema.json", config_schema.schema(config_keys())),
    ):
        (DOCS / name).write_text(json.dumps(doc, indent=1) + "\n")


if __name__ == "__main__":
    main()
