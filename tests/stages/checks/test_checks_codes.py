"""The table of codes: whole, documented, and folded as it says."""

from __future__ import annotations

import re
from pathlib import Path

from deploykit.stages.checks.codes import RULES, Hit, fold
from deploykit.verdict import SEVERITIES

ROOT = Path(__file__).parents[3]


def test_the_document_lists_just_the_codes_there_are() -> None:
    rows = re.findall(r"^\| (DK\d{3}) \| (\w+) \| (.*?) \| (.*?) \|$", (ROOT / "docs" / "findings.md").read_text(), re.MULTILINE)
    assert rows == [(r.code, r.severity, r.title, r.remedy) for r in RULES.values()]


def test_every_rule_is_whole_and_used() -> None:
    source = "".join(p.read_text() for p in (ROOT / "deploykit" / "stages" / "checks").glob("*.py") if p.name != "codes.py")
    for code, rule in RULES.items():
        assert rule.severity in SEVERITIES
        assert rule.title
        assert rule.remedy
        assert f'"{code}"' in source, f"{code} is never found"


def test_errors_come_first_and_equal_hits_count_once() -> None:
    findings = fold([Hit("DK004", "a"), Hit("DK030", "w"), Hit("DK004", "a"), Hit("DK004", "b")])
    assert [f.code for f in findings] == ["DK030", "DK004"]
    assert "(2 places): 'a'; 'b'" in findings[1].message


def test_targets_are_kept_apart() -> None:
    findings = fold([Hit("DK101", "a", target="tensorrt"), Hit("DK101", "a", target="tensorrt-rtx")])
    assert {f.target for f in findings} == {"tensorrt", "tensorrt-rtx"}
