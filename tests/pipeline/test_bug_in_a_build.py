"""A bug in one backend's build costs that row only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models

from deploykit.artifact import Artifact
from deploykit.children import BugInChild
from deploykit.pipeline import line, prepare
from deploykit.pipeline.request import RowsRequest, SourceRequest


def test_the_other_rows_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = prepare.engine

    def engine(shop: Any, backend: str, *rest: Any) -> Artifact:
        if backend == "openvino":
            raise BugInChild("in build (x:y):\nTraceback\n  File 1\nKeyError: 'lost'")
        return real(shop, backend, *rest)

    monkeypatch.setattr(prepare, "engine", engine)
    rows = RowsRequest(backends=("onnxruntime", "openvino"), precisions=("fp32",), batches=(1,), duration="smoke", threads=1)
    model = tiny_models.conv_net(tmp_path / "m.onnx")
    result = line.run(line.LineRequest((SourceRequest(str(model)),), rows=rows, store=tmp_path / "store"))
    table = {row.backend: row for row in result.report.rows}
    assert table["onnxruntime"].status == "ok"
    assert table["openvino"].status == "failed"
    assert "KeyError: 'lost'" in table["openvino"].reason
