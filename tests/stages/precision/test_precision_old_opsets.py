"""Graphs of 2018: IR 3, where each initializer is a graph input too, and operators that have changed since."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploykit import data, graph
from deploykit.errors import ModelError
from deploykit.stages import calibration, precision
from deploykit.stages.precision import normal_form

ort = pytest.importorskip("onnxruntime")
F = TensorProto.FLOAT


def _old(path: Path, opset: int, *, last: str = "Relu") -> Path:
    """Conv, BatchNormalization, Clip with attributes, Dropout, Flatten, Gemm, and `last`; weights are inputs as well."""
    rng = np.random.default_rng(0)
    arrays = {"w": rng.normal(0, 0.3, (8, 3, 3, 3)), "fc": rng.normal(0, 0.3, (512, 5)), "fb": np.zeros(5)}
    arrays |= {"s": np.ones(8), "b": np.zeros(8), "m": np.zeros(8), "v": np.ones(8)}
    stored = [numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items()]
    old = {"spatial": 1} if opset < 9 else {}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c", "s", "b", "m", "v"], ["n"], name="norm", **old),
        helper.make_node("Clip", ["n"], ["q"], min=0.0, max=6.0),
        helper.make_node("Dropout", ["q"], ["d"], ratio=0.5),
        helper.make_node("Flatten", ["d"], ["f"], axis=1),
        helper.make_node("Gemm", ["f", "fc", "fb"], ["g"], name="dense"),
        helper.make_node(last, ["g"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info("x", F, ["batch", 3, 8, 8])]
    inputs += [helper.make_tensor_value_info(t.name, F, list(t.dims)) for t in stored]
    made = helper.make_graph(nodes, "old", inputs, [helper.make_tensor_value_info("y", F, ["batch", 5])], stored)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=3), str(path))
    return path


@pytest.mark.parametrize("opset", [7, 8, 10])
def test_an_old_graph_becomes_int8(opset: int, tmp_path: Path) -> None:
    path = _old(tmp_path / "old.onnx", opset)
    x = np.random.default_rng(1).normal(size=(16, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    samples = data.open(str(tmp_path / "x.npz"), graph.signature(graph.load(path)))
    table = calibration.collect(path, samples)["minmax"]
    made = precision.to_int8(path, table, "cpu", tmp_path / "int8.onnx")
    assert made.facts["quantized_layers"] == 2
    assert [spec.name for spec in made.signature.inputs] == ["x"]
    wanted, found = (ort.InferenceSession(str(p)).run(None, {"x": x})[0].astype(np.float64) for p in (path, made.path))
    assert 10 * np.log10(np.square(wanted).sum() / np.square(wanted - found).sum()) > 25


def test_what_cannot_be_converted_says_what_to_do(tmp_path: Path) -> None:
    path = _old(tmp_path / "old.onnx", 10, last="Upsample")  # which opset 10 deprecates, and which needs scales
    with pytest.raises(ModelError, match=r"has opset 10; this precision needs 13 or more.*") as caught:
        normal_form.load(path)
    assert "its fp32 rows run" in str(caught.value)
