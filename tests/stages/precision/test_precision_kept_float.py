"""A layer kept in float runs in float in ONNX Runtime, whatever stands around it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploykit import data, graph
from deploykit.stages import calibration, precision

ort = pytest.importorskip("onnxruntime")


def _chain(path: Path, middle: str) -> Path:
    """Conv, Relu, `middle`, Relu, Conv, GlobalAveragePool: x [batch, 3, 8, 8] -> y [batch, 8, 1, 1]."""
    rng = np.random.default_rng(0)
    shapes = {"w0": (8, 3, 3, 3), "w1": (8, 8, 3, 3), "w2": (8, 8, 3, 3), "b0": (8,), "b1": (8,), "b2": (8,)}
    stored = [numpy_helper.from_array(rng.normal(0, 0.2, s).astype(np.float32), n) for n, s in shapes.items()]
    common = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["c0"], name="first", **common),
        helper.make_node("Relu", ["c0"], ["r0"]),
        helper.make_node(middle, ["r0", "w1", "b1"], ["c1"], name="middle", **common),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], name="last", **common),
        helper.make_node("GlobalAveragePool", ["c2"], ["y"]),
    ]
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 8, 8])]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8, 1, 1])
    made = helper.make_graph(nodes, "chain", given, [out], stored)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(path))
    return path


def _optimized(path: Path, x: np.ndarray) -> tuple[np.ndarray, set[str]]:
    """Outputs, and the operators that ONNX Runtime really runs."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    found = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    return found, {node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node}


@pytest.mark.parametrize(("middle", "keep"), [("Conv", ("middle",)), ("ConvTranspose", ()), ("Conv", ())])
def test_a_layer_left_in_float_is_computed_in_float(middle: str, keep: tuple[str, ...], tmp_path: Path) -> None:
    path = _chain(tmp_path / "chain.onnx", middle)
    x = np.random.default_rng(1).normal(size=(16, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    table = calibration.collect(path, data.open(str(tmp_path / "x.npz"), graph.signature(graph.load(path))))["minmax"]
    made = precision.to_int8(path, table, "cpu", tmp_path / "int8.onnx", precision.Int8Options(keep_float=keep))
    assert made.facts["quantized_layers"] == (3 if middle == "Conv" and not keep else 2)
    found, ran = _optimized(made.path, x)
    literal = precision.literal_session(graph.load(made.path), None).run(None, {"x": x})[0]
    assert np.abs(found - literal).max() <= 1e-5 * np.abs(literal).max()
    assert "QLinearConv" in ran
    assert (middle in ran) is (made.facts["quantized_layers"] == 2)
    assert ("Clip" in ran) is (made.facts["quantized_layers"] == 2)


def test_a_graph_whose_output_has_no_shape_becomes_int8(tmp_path: Path) -> None:
    path = _chain(tmp_path / "chain.onnx", "Conv")
    model = onnx.load(path)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(model, str(path))
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(1).normal(size=(8, 3, 8, 8)).astype(np.float32))
    table = calibration.collect(path, data.open(str(tmp_path / "x.npz"), graph.signature(graph.load(path))))["minmax"]
    made = precision.to_int8(path, table, "cpu", tmp_path / "int8.onnx")
    assert made.signature.outputs[0].shape[1:] == (8, 1, 1)
