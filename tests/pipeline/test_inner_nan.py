"""A float model that gives NaN: INT8 rows say which node, the others go on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploykit import data, graph, nonfinite
from deploykit.errors import DataError
from deploykit.pipeline import line
from deploykit.pipeline.line import LineRequest, LineResult
from deploykit.pipeline.request import DataRequest, RowsRequest, SourceRequest

pytest.importorskip("onnxruntime")
F = TensorProto.FLOAT


def _net(path: Path, *, hidden: bool) -> Path:
    """x [batch, 4] -> y [batch, 3], through a Log that gives NaN below zero; `hidden`: a Relu takes the NaN away again."""
    weights = [numpy_helper.from_array(np.ones(s, np.float32), n) for n, s in {"w": (4, 3), "v": (3, 3)}.items()]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="first"),
        helper.make_node("Log", ["m"], ["l"], name="logarithm"),
        helper.make_node("Relu" if hidden else "Identity", ["l"], ["r"], name="then"),
        helper.make_node("MatMul", ["r", "v"], ["y"], name="last"),
    ]
    given = [helper.make_tensor_value_info("x", F, ["batch", 4])]
    made = helper.make_graph(nodes, "n", given, [helper.make_tensor_value_info("y", F, ["batch", 3])], weights)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def _data(path: Path, bad: int | None) -> Path:
    x = np.random.default_rng(0).uniform(1, 2, (24, 4)).astype(np.float32)
    if bad is not None:
        x[bad:] = -1
    np.savez(path, x=x)
    return path


def _ran(folder: Path, *, hidden: bool) -> LineResult:
    path = _net(folder / "net.onnx", hidden=hidden)
    rows = RowsRequest(("onnxruntime",), ("fp32", "int8"), (1,), threads=1, duration="smoke")
    request = DataRequest(str(_data(folder / "x.npz", 1)))
    return line.run(LineRequest((SourceRequest(str(path)),), request, rows, folder / "store"))


def test_nan_inside_costs_the_int8_rows_only(tmp_path: Path) -> None:
    rows = {row.precision: row for row in _ran(tmp_path, hidden=True).report.rows}
    assert rows["fp32"].status == "ok"
    assert rows["fp32"].images_per_s
    assert rows["int8"].status == "skipped"
    assert "node 'logarithm' (Log) is the first to give NaN" in (rows["int8"].reason or "")


def test_nan_in_the_outputs_leaves_the_speed_and_names_the_node(tmp_path: Path) -> None:
    report = _ran(tmp_path, hidden=False).report
    fp32 = next(row for row in report.rows if row.precision == "fp32")
    assert fp32.status == "ok"
    assert fp32.top1 is None
    assert "accuracy was not measured" in fp32.notes
    assert any("the float model itself: node 'logarithm' (Log) is the first to give NaN" in note for note in report.notes)


def test_finite_outputs_have_no_origin(tmp_path: Path) -> None:
    path = _net(tmp_path / "net.onnx", hidden=False)
    signature = graph.signature(graph.load(path))
    good = data.open(str(_data(tmp_path / "good.npz", None)), signature)
    assert nonfinite.in_outputs(path, good) is None
    bad = data.open(str(_data(tmp_path / "bad.npz", 20)), signature)
    found = nonfinite.in_outputs(path, bad)
    assert found is not None
    assert (found.node, found.tensor, found.sample) == ("logarithm", "l", 20)


def test_nan_in_the_data_stays_an_error(tmp_path: Path) -> None:
    path = _net(tmp_path / "net.onnx", hidden=True)
    x = np.ones((8, 4), np.float32)
    x[3, 0] = np.nan
    np.savez(tmp_path / "nan.npz", x=x)
    rows = RowsRequest(("onnxruntime",), ("fp32", "int8"), (1,), threads=1, duration="smoke")
    with pytest.raises(DataError, match="NaN"):
        line.run(LineRequest((SourceRequest(str(path)),), DataRequest(str(tmp_path / "nan.npz")), rows, tmp_path / "store"))
