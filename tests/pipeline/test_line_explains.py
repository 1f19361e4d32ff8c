"""`run` says of each INT8 row why it is not faster, from the runtime's own profile; the report keeps and shows it."""

from __future__ import annotations

import html
import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models

from deploykit import children
from deploykit.errors import InputError
from deploykit.pipeline import bottlenecks, layer_drifts, line
from deploykit.pipeline.line import LineRequest
from deploykit.pipeline.request import DataRequest, RowsRequest, Silent, SourceRequest
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


def test_the_layers_of_the_int8_graph_are_compared_once_and_drawn(tmp_path: Path) -> None:
    model = tiny_models.conv_net(tmp_path / "net.onnx")
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", x=rng.normal(size=(24, 3, 8, 8)).astype(np.float32))
    rows = RowsRequest(("onnxruntime",), ("fp32", "int8"), (1,))
    request = LineRequest((SourceRequest(str(model)),), DataRequest(str(tmp_path / "data.npz")), rows, tmp_path / "store")
    made = line.ready(request, Silent())
    found = layer_drifts.of_targets(made.models, made.samples.judge)
    ((name, drift),) = found.items()
    assert name == "net int8-cpu"
    assert drift["rows"] == ["onnxruntime int8"]
    assert [x["op"] for x in drift["layers"]]
    assert all(x["sqnr_db"] is None or x["sqnr_db"] > 10 for x in drift["layers"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(children, "run", lambda *_, **__: pytest.fail("something ran again"))
        assert layer_drifts.of_targets(made.models, made.samples.judge) == found
    report = Report.from_json(Report((), {}, layer_drifts=found).to_json())
    page = html_page.text(report)
    assert "Layer by layer" in page
    assert all(html.escape(x["layer"]) in page for x in drift["layers"][:10])
    assert not layer_drifts.of_targets(made.models, None)
    with pytest.raises(InputError, match="position"):
        Report.from_json(Report((), {}, layer_drifts={name: {"layers": [{**drift["layers"][0], "position": "x"}]}}).to_json())


def test_layers_that_cannot_be_compared_cost_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.conv_net(tmp_path / "net.onnx")
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).normal(size=(24, 3, 8, 8)).astype(np.float32))
    rows = RowsRequest(("onnxruntime",), ("int8",), (1,))
    request = LineRequest((SourceRequest(str(model)),), DataRequest(str(tmp_path / "data.npz")), rows, tmp_path / "store")
    made = line.ready(request, Silent())
    monkeypatch.setattr(layer_drifts.layers, "find", json.loads)  # which does not take these arguments
    (found,) = layer_drifts.of_targets(made.models, made.samples.judge).values()
    assert found["notes"][0].startswith("not compared layer by layer: TypeError")
