"""The article's claims beside our rows."""

from __future__ import annotations

from dataclasses import replace

from report_rows import a_report, an_ok_row

from deploykit.stages.report import seeds_table


def test_each_claim_stands_beside_the_row_it_means() -> None:
    rows = (
        *a_report().rows,
        an_ok_row(backend="openvino", precision="bf16", images_per_s=400.0),
        an_ok_row(backend="onnxruntime", precision="fp32", images_per_s=150.0),
        an_ok_row(backend="openvino", precision="bf16", images_per_s=9000.0, batch=8),
        an_ok_row(backend="onnxruntime", precision="int8-dynamic", images_per_s=9000.0),
    )
    found = [(c.strategy, (r.backend, r.precision, r.batch)) for c, r, _ in seeds_table.beside(a_report(rows=rows)) if r]
    assert found == [
        ("original FP32 model", ("torch", "fp32", 1)),
        ("TensorRT", ("openvino", "bf16", 1)),
        ("INT8 quantized", ("openvino", "int8", 1)),
    ]


def test_a_claim_without_a_row_of_ours_says_so() -> None:
    skipped = tuple(replace(r, status="skipped", images_per_s=None) for r in a_report().rows)
    for text in (seeds_table.markdown(a_report(rows=skipped)), seeds_table.text(a_report(rows=skipped))):
        assert text.count("no row here") == 3


def test_the_claims_are_labelled_as_claims() -> None:
    report = a_report()
    for text in (seeds_table.markdown(report), " ".join(seeds_table.text(report).split())):
        assert "claims of an article" in text
        assert "5.63x" in text
        assert "5.00x" in text
    narrow = seeds_table.text(report, 80)
    assert max(map(len, narrow.splitlines())) <= 80
    assert "97.10%" in narrow
