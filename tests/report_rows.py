"""Rows and reports for the tests of the report and the gate; the figures are made up."""

from __future__ import annotations

from typing import Any

from deploykit.report_document import Report
from deploykit.row import Row

REFERENCE = {"name": "tiny", "backend": "torch", "precision": "fp32"}


def an_ok_row(**given: Any) -> Row:
    """A measured row; an interval that is not given is 2 % (speed) or 0.3 pp (drop) either way around its value."""
    doc: dict[str, Any] = {
        "name": "tiny", "backend": "openvino", "precision": "int8", "batch": 1, "status": "ok", "device": "cpu", "threads": 2,
        "images_per_s": 500.0, "p50_s": 0.002, "p90_s": 0.0022, "p95_s": 0.0023, "p99_s": 0.0025, "cov": 0.01, "stable": True,
        "n_timed": 700, "speedup": 5.0, "top1": 0.97, "top5": 0.99, "top1_drop_pp": 0.1, "agreement": 0.99, "sqnr_db": 30.0,
        "size_bytes": 12_000_000, "peak_rss_bytes": 200_000_000, "build_s": 1.5,
        "clock": "perf_counter", "boundary": "host in, host out",
    } | given  # fmt: skip
    if doc["speedup"] is not None:
        doc = {"speedup_low": doc["speedup"] * 0.98, "speedup_high": doc["speedup"] * 1.02} | doc
    if doc["top1_drop_pp"] is not None:
        doc = {"top1_drop_low": doc["top1_drop_pp"] - 0.3, "top1_drop_high": doc["top1_drop_pp"] + 0.3} | doc
    return Row.from_json(doc)


def a_report(**given: Any) -> Report:
    """A report of one model: reference, a good row, a bad one, and a built, a skipped and a failed one, at batch 1 and 8."""
    rows: list[Row] = []
    for batch in (1, 8):
        one = {"speedup": 1.0, "speedup_low": 1.0, "speedup_high": 1.0, "top1_drop_low": 0.0, "top1_drop_high": 0.0}
        rows += [
            an_ok_row(backend="torch", precision="fp32", batch=batch, images_per_s=100.0, top1=0.971, top1_drop_pp=0.0, **one),
            an_ok_row(batch=batch),
            an_ok_row(
                batch=batch,
                backend="onnxruntime",
                stable=False,
                cov=0.06,
                speedup=3.0,
                images_per_s=300.0,
                top1=0.9,
                top1_drop_pp=7.1,
            ),
            Row(
                "tiny", "tensorrt-rtx", "int8", batch, "built", reason="needs an NVIDIA GPU", device="sm89", size_bytes=9_000_000
            ),
            Row("tiny", "tensorrt", "fp16", batch, "skipped", reason="no NVIDIA GPU here; pip install deploykit[tensorrt]"),
            Row("tiny", "litert", "int8", batch, "failed", reason="killed by SIGSEGV"),
        ]
    doc: dict[str, Any] = {
        "rows": tuple(rows),
        "reference": REFERENCE,
        "model": {"name": "tiny", "digest": "ab" * 32, "parameters": 1000},
        "environment": {"cpu": "a CPU", "cores": 2, "memory_bytes": 8 << 30},
        "samples": {
            "judge": {"data": "digits", "role": "judge", "n": 360, "labelled": True, "random": False, "digest": "cd" * 32}
        },
        "measured_at": "2026-01-02T03:04:05+00:00",
        "command": ("deploykit", "run", "tiny", "--data", "digits"),
        "versions": {"torch": "2.14.1"},
    } | given
    return Report(**doc)
