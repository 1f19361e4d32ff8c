"""The report's files and tables: same facts in each, user text escaped, nothing half-written."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from report_rows import a_report, an_ok_row

from deploykit.errors import InputError, OutOfSpace
from deploykit.report_document import load
from deploykit.row import COLUMNS, Row
from deploykit.stages import report as stage
from deploykit.stages.report import cells, csv_table, markdown, terminal
from deploykit.stages.report.schema import schema
from deploykit.verdict import Reason, Verdict

DOCS = Path(__file__).parents[3] / "docs"


def test_written_files_read_back(tmp_path: Path) -> None:
    report = a_report(measurements={"a": {"launches": []}})
    paths = stage.write(report, tmp_path / "new" / "folder")
    assert {p.name for p in paths} >= {"report.json", "report.csv", "report.md", "measurements.json"}
    assert load(paths[0].parent) == report
    assert sorted(p.name for p in paths[0].parent.iterdir()) == sorted(p.name for p in paths)


def test_a_report_without_raw_seconds_leaves_no_older_ones_beside_it(tmp_path: Path) -> None:
    stage.write(a_report(measurements={"a": {"launches": []}}), tmp_path)
    stage.write(a_report(), tmp_path)
    assert load(tmp_path).measurements == {}


def test_a_full_disk_keeps_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.write(a_report(), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutOfSpace, match="no space left"):
        stage.write(a_report(measured_at="later"), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_folder_that_is_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        stage.write(a_report(), tmp_path / "file")


def test_csv_has_the_contracts_columns_and_empty_cells() -> None:
    rows = list(csv.reader(io.StringIO(csv_table.text(a_report()))))
    assert tuple(rows[0]) == COLUMNS
    skipped = dict(zip(rows[0], rows[5], strict=True))
    assert skipped["status"] == "skipped"
    assert skipped["images_per_s"] == skipped["top1"] == skipped["stable"] == ""
    ok = dict(zip(rows[0], rows[2], strict=True))
    assert float(ok["speedup"]) == 5.0
    assert ok["stable"] == "true"


def test_the_published_schema_is_the_codes() -> None:
    assert json.loads((DOCS / "report-schema.json").read_text(encoding="utf-8")) == schema()
    assert set(schema()["properties"]) == set(a_report().to_json())
    assert list(schema()["properties"]["rows"]["items"]["properties"]) == list(COLUMNS)


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_terminal_table_fits_and_loses_nothing(width: int) -> None:
    text = terminal.text(a_report(), width)
    assert max(map(len, text.splitlines())) <= width
    flat = " ".join(text.split())
    for said in (
        "openvino",
        "5.00x",
        "4.90-5.10",
        "97.00%",
        "0.10",
        "-0.20..0.40",
        "500",
        "2.00",
        "UNSTABLE",
        "best",
        "reference",
    ):
        assert said in flat, said
    for said in (
        "built: for sm89; needs an NVIDIA GPU",
        "skipped: no NVIDIA GPU here; pip install deploykit[tensorrt]",
        "failed: killed by SIGSEGV",
    ):
        assert said in flat, said
    assert "judge: 360 of digits, labelled" in flat


def test_the_tail_is_p90_where_a_row_cannot_support_p99() -> None:
    report = a_report()
    assert "p99" in [c.key for c in cells.columns(report)]
    few = replace(report, rows=(*report.rows, an_ok_row(backend="tvm", n_timed=100, p99_s=None)))
    assert "p90" in [c.key for c in cells.columns(few)]
    assert "p99" not in [c.key for c in cells.columns(few)]


def test_without_labels_agreement_stands_in_the_table() -> None:
    rows = tuple(replace(r, top1=None, top1_drop_pp=None, top1_drop_low=None, top1_drop_high=None) for r in a_report().rows)
    keys = [c.key for c in cells.columns(a_report(rows=rows))]
    assert "agreement" in keys
    assert "top1" not in keys
    assert "drop" not in keys


def test_reused_rows_and_random_data_are_said() -> None:
    rows = tuple(replace(r, notes="reused from 2026-01-01") if r.status == "ok" else r for r in a_report().rows)
    text = terminal.text(a_report(rows=rows, samples={"judge": {"n": 8, "random": True}}), 100)
    assert "6 of 12 rows, from 2026-01-01" in text
    assert "RANDOM" in text


def test_a_verdict_is_shown_with_what_did_not_pass() -> None:
    reasons = (Reason("a row", "top-1 drop", "fail", "7.1 pp over 0.5 pp"), Reason("b", "c", "pass", "fine"))
    report = a_report(verdict=Verdict("fail", reasons))
    for text in (terminal.text(report), markdown.text(report)):
        assert "FAIL: 1 of 2 comparisons passed" in text
        assert "7.1 pp over 0.5 pp" in text


def test_markdown_is_one_table_that_user_text_cannot_break() -> None:
    nasty = "a|b\nc`d <img src=x> @someone [x](y) *z* \\"
    report = a_report(rows=(an_ok_row(name=nasty), Row("m", "x|y", "fp32", 1, "failed", reason=nasty)), model={"name": nasty})
    text = markdown.text(report)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    assert "<img" not in text
    assert "@someone" not in text


def test_markdown_fits_a_pull_request_comment() -> None:
    rows = tuple(an_ok_row(backend=f"b{i}", notes=f"{i} " + "long " * 200) for i in range(800))
    text = markdown.text(a_report(rows=rows))
    assert len(text) <= 65_000
    assert "more rows are in report.csv" in text
    assert "more rows" not in markdown.text(a_report())


def test_an_empty_report_renders() -> None:
    empty = a_report(rows=(), reference={}, model={}, samples={}, environment={}, command=())
    assert "none: no row" in terminal.text(empty)
    assert markdown.text(empty).startswith("### deploykit: no model")
    assert csv_table.text(empty).strip() == ",".join(COLUMNS)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (0.0, "0.00"),
        (1.234, "1.23"),
        (9.996, "10.0"),
        (99.96, "100"),
        (1234.5, "1,234"),
        (0.5, "0.50"),
        (0.0113, "0.011"),
    ],
)
def test_numbers_have_three_figures(value: float | None, text: str) -> None:
    assert cells.number(value) == text


def test_tiny_times_do_not_become_zero() -> None:
    assert cells.milliseconds(3.2e-6) == "0.0032"
    assert cells.milliseconds(None) == ""
    assert cells.percent(0.999999) == "99.99%"
    assert cells.percent(1.0) == "100.00%"


@pytest.mark.parametrize(
    ("given", "shown"),
    [("a&lt;b", "a&amp;lt;b"), ("_x_", "\\_x\\_"), ("int8_dynamic", "int8_dynamic"), ("~~x~~", "\\~\\~x\\~\\~"), ("see #12", "see &#35;12"),
     ("__init__", "\\_\\_init\\_\\_"), ("net#2", "net#2"), ("@a", "&#64;a")],
)  # fmt: skip
def test_markdown_shows_text_as_it_is(given: str, shown: str) -> None:
    assert markdown.escape(given) == shown
