"""The page's roofline: there where a report has ceilings, silent where it has none or broken ones; the T4's bounds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from deploykit.report_document import Report
from deploykit.roofline import Ceilings
from deploykit.row import Row
from deploykit.stages.report import cells, html_page, roofline_plot, t4_bounds, terminal

CEILINGS = Ceilings("this machine on 2 threads", "measured", {"fp32": 2e11, "int8": 8e11}, {1 << 18: 1.5e11, 1 << 27: 5e10})
SUMMARY = {"macs": 1_000_000_000, "parameters": 5_000_000, "moved_values": 2_000_000}


def _report(**environment: Any) -> Report:
    rows = (
        Row("net", "torch", "fp32", 1, "ok", images_per_s=20.0, p50_s=0.05, roofline_share=0.2, bound_by="overhead"),
        Row("net", "openvino", "int8", 1, "ok", images_per_s=250.0, p50_s=0.004, roofline_share=0.625, bound_by="compute"),
        Row("net", "tensorrt", "fp16", 1, "built", "no GPU", device="sm75"),
    )
    reference = {"name": "net", "backend": "torch", "precision": "fp32"}
    return Report(rows, reference, model={"name": "net", "summary": SUMMARY}, environment=environment)


def test_each_measured_row_stands_under_its_ceiling() -> None:
    report = _report(ceilings=CEILINGS.to_json())
    assert roofline_plot.words(report) == [
        ("torch fp32 batch 1", "20% of the compute ceiling (40 of 200 Gop/s in fp32): bound by overhead"),
        ("openvino int8 batch 1", "62% of the compute ceiling (500 of 800 Gop/s in int8): bound by compute"),
    ]
    svg = roofline_plot.svg(report)
    assert svg.count("<circle") == 2
    assert "int8 800 Gop/s" in svg
    page = html_page.text(report)
    assert "<h2>Roofline</h2>" in page and "GB/s at" in page
    assert "<script" not in page


@pytest.mark.parametrize(
    "broken",
    [
        None,
        [],
        {"name": "x"},
        *({**CEILINGS.to_json(), "bytes_per_s": rates} for rates in ({"a": 1}, {}, {"1": 0}, {"1": -5.0}, {"1": None})),
        *({**CEILINGS.to_json(), "ops_per_s": rates} for rates in (5, {"fp32": "fast"}, {"fp32": 0}, {"fp32": -1.0})),
        {**CEILINGS.to_json(), "how": "by hand"},
    ],
)
def test_a_report_without_ceilings_has_no_roofline(broken: Any) -> None:
    report = _report(ceilings=broken) if broken is not None else _report()
    assert roofline_plot.svg(report) == ""
    assert roofline_plot.words(report) == []
    assert "<h2>Roofline</h2>" not in html_page.text(report)


def test_the_table_has_a_roofline_column_only_where_a_row_has_a_share() -> None:
    report = _report()
    assert "roofline" in [c.key for c in cells.columns(report)]
    assert cells.cell(report, report.rows[1], "roofline") == "62% compute"
    assert "compute" in terminal.text(report, 120)
    bare = replace(report, rows=tuple(replace(r, roofline_share=None, bound_by=None) for r in report.rows))
    assert "roofline" not in [c.key for c in cells.columns(bare)]


def test_every_published_figure_for_a_t4_is_possible_and_each_claim_is_held_against_a_measurement() -> None:
    found = t4_bounds.judged()
    assert all(j.possible for j in found)
    claims = [j for j in found if j.figure.claim]
    assert len(claims) == 4
    assert all(j.over is not None for j in claims)
    assert "bound, not a measurement" in t4_bounds.markdown()


def test_a_figure_above_the_bound_is_called_impossible(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = t4_bounds.Figure("somebody", "ResNet-18", "fp32", 1, 5000, claim=True)
    monkeypatch.setattr(t4_bounds, "FIGURES", (fast,))
    (found,) = t4_bounds.judged()
    assert not found.possible
    assert found.words == "impossible"


@pytest.mark.parametrize("counts", [{"macs": -1}, {"parameters": -1}, {"parameters": 0, "moved_values": 0}, {"macs": "many"}])
def test_a_model_without_counts_that_can_be_has_no_roofline(counts: dict[str, Any]) -> None:
    report = _report(ceilings=CEILINGS.to_json())
    report = replace(report, model={"name": "net", "summary": SUMMARY | counts})
    assert roofline_plot.svg(report) == ""
    assert "<h2>Roofline</h2>" not in html_page.text(report)
