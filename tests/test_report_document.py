"""Report: reads what it writes, and refuses what no run wrote."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_rows import a_report, an_ok_row

from deploykit.errors import InputError
from deploykit.report_document import Report, load, row_id
from deploykit.row import Row
from deploykit.verdict import Finding, Reason, Verdict


def test_a_report_reads_back_what_it_wrote() -> None:
    report = a_report(
        verdict=Verdict("fail", (Reason("a", "drop", "fail", "m"),), ("b",)), findings=(Finding("DK001", "info", "m", "r"),)
    )
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_unmeasured_is_null_and_never_zero() -> None:
    doc = Report((Row("m", "tensorrt", "fp16", 1, "skipped", reason="no GPU"),), {}).to_json()["rows"][0]
    assert doc["images_per_s"] is None
    assert doc["top1"] is None
    assert 0 not in doc.values()


def test_nan_is_never_written_and_the_row_says_so() -> None:
    report = Report(
        (an_ok_row(sqnr_db=math.inf, top1_drop_pp=math.nan, notes="x"),), {"backend": "torch"}, drifts={"a": {"kl": [math.nan]}}
    )
    text = json.dumps(report.to_json(), allow_nan=False)
    row = json.loads(text)["rows"][0]
    assert row["sqnr_db"] is None
    assert row["notes"] == "x; top1_drop_pp was nan; top1_drop_low was nan; top1_drop_high was nan; sqnr_db was inf"


def test_only_the_three_keys_of_the_contract_must_be_there() -> None:
    row = {"name": "m", "backend": "torch", "precision": "fp32", "batch": 1, "status": "ok"}
    report = Report.from_json({"schema_version": 1, "reference": {"backend": "torch"}, "rows": [row]})
    assert report.rows[0].images_per_s is None


@pytest.mark.parametrize("key", ["schema_version", "reference", "rows"])
def test_a_missing_key_is_named(key: str) -> None:
    doc = a_report().to_json()
    del doc[key]
    with pytest.raises(InputError, match=key):
        Report.from_json(doc)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch": "1"}, r"rows\[0\]\.batch is \"1\""),
        ({"batch": 0}, "outside"),
        ({"batch": True}, "whole number"),
        ({"status": "fine"}, "not one of"),
        ({"top1": 97.1}, "outside 0 to 1"),
        ({"p50_s": -1.0}, "outside"),
        ({"p50_s": "fast"}, "not a number or null"),
        ({"images_per_s": math.inf}, "finite"),
        ({"speedup": 9.0}, "its own interval"),
        ({"top1_drop_low": 3.0, "top1_drop_high": 1.0}, "its own interval"),
        ({"name": None}, "not a text"),
        ({"stable": 1}, "true or false"),
        ({"threads": 2.0}, "whole number"),
    ],
)
def test_a_row_edited_by_hand_is_refused(change: dict[str, Any], said: str) -> None:
    doc = a_report().to_json()
    doc["rows"][0].update(change)
    with pytest.raises(InputError, match=said):
        Report.from_json(doc)


@pytest.mark.parametrize("version", [0, 2, "1", True, None])
def test_another_schema_version_is_refused(version: Any) -> None:
    with pytest.raises(InputError, match="schema_version"):
        Report.from_json(a_report().to_json() | {"schema_version": version})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "not JSON"),
        (b'{"schema_version": 1,', "line 1"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"[]", "not an object"),
        (b'{"schema_version": 1, "reference": {}, "rows": {}}', "rows is {}, not a list"),
        (b'{"schema_version": 1, "reference": {}, "rows": [NaN]}', "NaN"),
        (b'{"schema_version": 1, "schema_version": 1, "reference": {}, "rows": []}', "twice"),
        (b'{"schema_version": 1, "reference": {}, "rows": [], "verdict": {"outcome": "fine"}}', "not one of"),
        (b'{"schema_version": 1, "reference": {}, "rows": [], "findings": [{"code": 1}]}', "code"),
        (b"[" * 100_000, "not"),
    ],
)
def test_a_file_that_is_no_report_is_refused(tmp_path: Path, text: bytes, said: str) -> None:
    (tmp_path / "report.json").write_bytes(text)
    with pytest.raises(InputError, match=said):
        load(tmp_path)


def test_a_missing_report_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no report at"):
        load(tmp_path)
    with pytest.raises(InputError, match="no report at"):
        load(tmp_path / "none.json")


def test_best_is_the_fastest_row_shown_to_keep_the_accuracy() -> None:
    reference = an_ok_row(backend="torch", precision="fp32", images_per_s=10.0, top1=0.97, top1_drop_pp=0.0)
    good = an_ok_row(backend="a", images_per_s=50.0, top1=0.965, top1_drop_pp=0.5)
    bad = an_ok_row(backend="b", images_per_s=500.0, top1=0.90, top1_drop_pp=7.0)
    unknown = an_ok_row(backend="c", images_per_s=5000.0, top1=None, top1_drop_pp=None, agreement=None)
    report = Report((reference, good, bad, unknown), {"backend": "torch", "precision": "fp32"})
    assert report.best() == good
    failed = report.with_verdict(Verdict("fail", (Reason(good.label, "drop", "fail", ""),)))
    assert failed.best() == reference
    assert Report((unknown,), {}).best() is None


def test_without_labels_agreement_keeps_the_accuracy() -> None:
    rows = [
        an_ok_row(backend=b, images_per_s=r, top1=None, top1_drop_pp=None, agreement=a)
        for b, r, a in [("x", 9.0, 0.98), ("y", 5.0, 0.995)]
    ]
    assert Report(tuple(rows), {"backend": "torch"}).best() == rows[1]
    assert Report(tuple(rows), {"backend": "torch"}, samples={"judge": {"random": True}}).best() is None


def test_a_reference_alone_is_not_the_best_of_anything() -> None:
    reference = an_ok_row(backend="torch", precision="fp32")
    unknown = an_ok_row(backend="c", top1=None, top1_drop_pp=None, agreement=None)
    assert Report((reference, unknown), {"backend": "torch"}).best() is None


def test_an_aa_copy_of_the_reference_is_not_the_best() -> None:
    reference = an_ok_row(backend="torch", precision="fp32", images_per_s=100.0, top1=0.97, top1_drop_pp=None)
    copy = replace(reference, notes="A/A: the reference again, in processes of its own", images_per_s=101.0, agreement=1.0)
    slower = an_ok_row(backend="a", images_per_s=50.0)
    assert Report((reference, copy, slower), {"backend": "torch", "precision": "fp32"}).best() is reference


def test_row_ids_tell_rows_apart() -> None:
    rows = a_report().rows
    assert len({row_id(r) for r in rows}) == len(rows)
