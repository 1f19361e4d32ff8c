"""`run` says of each INT8 row why it is not faster, from the runtime's own profile; the report keeps and shows it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models

from deploykit import children
from deploykit.pipeline import bottlenecks, line
from deploykit.pipeline.line import LineRequest
from deploykit.pipeline.request import DataRequest, RowsRequest, SourceRequest
from deploykit.report_document import Report
from deploykit.stages.report import html_page


@pytest.mark.parametrize("explain", [True, False])
def test_int8_rows_are_explained_where_asked(tmp_path: Path, explain: bool) -> None:
    model = tiny_models.conv_net(tmp_path / "net.onnx")
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", x=rng.normal(size=(24, 3, 8, 8)).astype(np.float32))
    rows = RowsRequest(("onnxruntime",), ("fp32", "int8"), (1,), duration="smoke")
    request = LineRequest(
        (SourceRequest(str(model)),), DataRequest(str(tmp_path / "data.npz")), rows, tmp_path / "store", explain=explain
    )
    report = line.run(request).report
    if not explain:
        assert not report.explanations
        assert "Why INT8 is not faster" not in html_page.text(report)
        return
    (name,) = report.explanations
    found = report.explanations[name]
    assert name.endswith("onnxruntime int8")
    assert "run in integers" in found["verdict"] or "runs in integers" in found["verdict"] or found["verdict"].startswith("none")
    assert Report.from_json(report.to_json()).explanations == report.to_json()["explanations"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(children, "run", lambda *_, **__: pytest.fail("something ran again"))
        assert line.run(request).report.explanations == report.explanations
    page = html_page.text(report)
    assert "Why INT8 is not faster" in page
    assert all(finding["remedy"].split("'")[0][:20] in page for finding in found["findings"])


def test_a_bug_in_the_profile_costs_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.conv_net(tmp_path / "net.onnx")
    rows = RowsRequest(("onnxruntime",), ("fp32", "int8"), (1,), duration="smoke")
    request = LineRequest((SourceRequest(str(model)),), DataRequest("random:24"), rows, tmp_path / "store", explain=True)
    monkeypatch.setattr(bottlenecks.bottleneck, "explain", json.loads)  # which does not take these arguments
    (found,) = line.run(request).report.explanations.values()
    assert found["verdict"].startswith("not profiled: TypeError")
