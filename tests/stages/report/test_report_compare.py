"""Two reports side by side."""

from __future__ import annotations

from dataclasses import replace

from report_rows import a_report

from deploykit.stages.report import compare


def test_a_report_beside_itself_differs_in_nothing() -> None:
    assert compare.unlike(a_report(), a_report()) == []
    table = compare.lines(a_report(), a_report())
    assert len(table) == len(a_report().rows)
    assert {line[3] for line in table} == {"1.000", ""}
    assert not any("->" in line[-1] for line in table)


def test_what_changed_is_said() -> None:
    rows = a_report().rows
    slower = replace(rows[1], speedup=2.5, speedup_low=2.4, speedup_high=2.6)
    other = a_report(rows=(rows[0], slower, replace(rows[3], status="failed", reason="x")), versions={"torch": "2.15.0"})
    assert compare.unlike(a_report(), other) == ["torch: 2.14.1 in A, 2.15.0 in B"]
    for text in (compare.markdown(a_report(), other), " ".join(compare.text(a_report(), other, 120).split())):
        assert "0.500" in text
        assert "2.14.1 in A" in text
    states = [line[-1] for line in compare.lines(a_report(), other)]
    assert {"built -> failed", "ok -> missing"} <= set(states)


def test_an_aa_copy_does_not_stand_in_for_the_reference() -> None:
    report = a_report()
    copy = replace(report.rows[0], notes="A/A: the reference again, in processes of its own", speedup=0.97, speedup_low=0.95)
    with_copy = replace(report, rows=(report.rows[0], copy, *report.rows[1:]))
    assert compare.lines(with_copy, report) == compare.lines(report, report)
