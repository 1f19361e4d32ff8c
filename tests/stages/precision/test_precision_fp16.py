"""FP16: float32 at the edges, what would overflow kept in float32 and named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from quantizable_models import ZOO, const, conv, feeds_for, model, node, residual, run, sqnr_db, table_for

from deploykit import graph as graphs
from deploykit.calibration_table import Range
from deploykit.errors import InputError, ModelError, StaleCalibration
from deploykit.stages import checks
from deploykit.stages.precision import to_fp16, to_int8, to_int8_fp16


def saved(made: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "float.onnx"
    onnx.save(made, str(path))
    return path


def left(facts: dict[str, object]) -> dict[str, str]:
    return {row["node"]: row["reason"] for row in facts["left_in_float"]}  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ZOO)
def test_awkward_graphs_keep_their_edges_and_their_values(tmp_path: Path, name: str) -> None:
    made = ZOO[name]()
    path, out = saved(made, tmp_path), tmp_path / "half.onnx"
    artifact = to_fp16(path, out)
    assert artifact.precision == "fp16"
    assert artifact.signature == graphs.signature(made)
    assert artifact.facts["half_nodes"] > 0
    for batch in (1, 7):
        feeds = feeds_for(made, batch, seed=99)
        for wanted, found in zip(run(made, feeds), run(out, feeds), strict=True):
            assert found.dtype == wanted.dtype
            assert sqnr_db(wanted, found) > 50


def test_every_weight_is_stored_in_half(tmp_path: Path) -> None:
    path, out = saved(residual(), tmp_path), tmp_path / "half.onnx"
    to_fp16(path, out)
    stored = {t.data_type for t in onnx.load(str(out)).graph.initializer}
    assert stored <= {TensorProto.FLOAT16, TensorProto.INT64}


def test_a_constant_beyond_half_stays_in_float_and_is_named(tmp_path: Path) -> None:
    weights = [const("w", 4, 3, 3, 3), numpy_helper.from_array(np.array(1e6, np.float32), "million")]
    made = model([conv("x", "c", "w"), node("Mul", ["c", "million"], ["y"], name="times")], weights)
    path, out = saved(made, tmp_path), tmp_path / "half.onnx"
    facts = to_fp16(path, out).facts
    assert "1e+06" in left(facts)["times"]
    assert "conv_c" not in left(facts)
    feeds = feeds_for(made, 2)
    assert sqnr_db(run(made, feeds)[0], run(out, feeds)[0]) > 50


def test_an_epsilon_that_would_vanish_keeps_its_chain_in_float(tmp_path: Path) -> None:
    """A hand-written normalization: mean of squares, plus 1e-12, root, division."""
    weights = [
        const("w", 6, 6),
        numpy_helper.from_array(np.array(2.0, np.float32), "two"),
        numpy_helper.from_array(np.array(1e-12, np.float32), "eps"),
        numpy_helper.from_array(np.array([1], np.int64), "axes"),
    ]
    nodes = [
        node("MatMul", ["x", "w"], ["m"]),
        node("Pow", ["m", "two"], ["q"], name="square"),
        node("ReduceMean", ["q", "axes"], ["v"], name="mean"),
        node("Add", ["v", "eps"], ["e"], name="add"),
        node("Sqrt", ["e"], ["s"], name="root"),
        node("Div", ["m", "s"], ["y"], name="divide"),
    ]
    made = model(nodes, weights, {"x": ["batch", 6]})
    path, out = saved(made, tmp_path), tmp_path / "half.onnx"
    assert {"square", "mean", "add", "root"} <= set(left(to_fp16(path, out).facts))
    feeds = {"x": np.full((2, 6), 300.0, np.float32)}  # its squares are beyond FP16
    assert np.isfinite(run(out, feeds)[0]).all()
    assert sqnr_db(run(made, feeds)[0], run(out, feeds)[0]) > 50


def test_weights_that_vanish_are_counted_and_named(tmp_path: Path) -> None:
    weight = numpy_helper.to_array(const("w", 4, 3, 3, 3)).copy()
    weight[0, 0, 0, :2] = 1e-9
    path = saved(model([conv("x", "y", "w")], [numpy_helper.from_array(weight, "w")]), tmp_path)
    assert to_fp16(path, tmp_path / "half.onnx").facts["vanished"] == [{"constant": "w", "values": 2, "of": 108}]


def test_calibrated_activations_near_the_limit_stay_in_float(tmp_path: Path) -> None:
    path, out = saved(residual(), tmp_path), tmp_path / "half.onnx"
    table = table_for(path)
    large = replace(table, observed={**table.observed, "c2": Range(-1.0, 50_000.0)})
    assert "conv_c2" in left(to_fp16(path, out, large).facts)
    assert not left(to_fp16(path, out, table).facts)


def test_wrong_input_is_refused(tmp_path: Path) -> None:
    path, out = saved(residual(), tmp_path), tmp_path / "half.onnx"
    table = table_for(path)
    with pytest.raises(StaleCalibration):
        to_fp16(path, out, replace(table, model_sha256="f" * 64))
    to_int8(path, table, "cpu", tmp_path / "int8.onnx")
    with pytest.raises(ModelError, match="quantized already"):
        to_fp16(tmp_path / "int8.onnx", out)
    integers = tmp_path / "integers.onnx"
    graph = onnx.helper.make_graph(
        [node("Abs", ["x"], ["y"])],
        "g",
        [onnx.helper.make_tensor_value_info("x", TensorProto.INT64, ["batch"])],
        [onnx.helper.make_tensor_value_info("y", TensorProto.INT64, ["batch"])],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), str(integers))
    with pytest.raises(InputError, match="no operator"):
        to_fp16(integers, out)
    assert not out.exists()


def test_scales_of_int8_with_fp16_are_fp16_and_positive(tmp_path: Path) -> None:
    path, out = saved(ZOO["dead_channel"](), tmp_path), tmp_path / "int8.onnx"
    artifact = to_int8_fp16(path, table_for(path), out)
    made = onnx.load(str(out))
    assert artifact.precision == "int8"
    assert artifact.options["rest"] == "fp16"
    stored = {t.name: numpy_helper.to_array(t) for t in made.graph.initializer}
    for n in made.graph.node:
        if n.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert stored[n.input[1]].dtype == np.float16
            assert (stored[n.input[1]] > 0).all()
    assert {v.type.tensor_type.elem_type for v in [*made.graph.input, *made.graph.output]} == {TensorProto.FLOAT}


def test_a_model_in_half_stays_as_it_is(tmp_path: Path) -> None:
    made = model([conv("x", "y", "w")], [const("w", 4, 3, 3, 3)])
    for value in [*made.graph.input, *made.graph.output]:
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    made.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(numpy_helper.to_array(made.graph.initializer[0]).astype(np.float16), "w")
    )
    artifact = to_fp16(saved(made, tmp_path), tmp_path / "half.onnx")
    assert artifact.signature == graphs.signature(made)
    assert {t.data_type for t in onnx.load(str(tmp_path / "half.onnx")).graph.initializer} == {TensorProto.FLOAT16}


@pytest.mark.parametrize(("small", "kept"), [("b", []), ("w", ["conv0"])])
def test_a_small_bias_keeps_no_layer_in_float(tmp_path: Path, small: str, kept: list[str]) -> None:
    """Its rounding shifts the result by no more than rounding the result does; small weights are another matter."""
    weights = [
        const(name, *shape, scale=1e-8 if name == small else 0.3) for name, shape in {"w": (4, 3, 3, 3), "b": (4,)}.items()
    ]
    nodes = [node("Conv", ["x", "w", "b"], ["c"], name="conv0", pads=[1] * 4), node("Relu", ["c"], ["y"], name="relu")]
    made = model(nodes, weights)
    assert list(left(to_fp16(saved(made, tmp_path), tmp_path / "half.onnx").facts)) == kept


def test_no_cast_stands_between_q_dq_and_a_layer_that_stays_in_float32(tmp_path: Path) -> None:
    """A table that saw 50,000 behind the first convolution: its Q/DQ give float32 at once, or TensorRT-RTX runs it in float."""
    weights = [const("w1", 4, 3, 3, 3), const("w2", 4, 4, 3, 3)]
    made = model([conv("x", "c", "w1"), node("Relu", ["c"], ["r"], name="relu"), conv("r", "y", "w2")], weights)
    path = saved(made, tmp_path)
    table = table_for(path)
    wide = replace(table, observed={**table.observed, "c": Range(-50000.0, 50000.0)})
    found = to_int8_fp16(path, wide, tmp_path / "q.onnx")
    assert [row["node"] for row in found.facts["kept_in_fp32"]] == ["conv_c", "relu"]
    written = onnx.load(tmp_path / "q.onnx")
    maker = {name: n for n in written.graph.node for name in n.output}
    (kept,) = (n for n in written.graph.node if n.name == "conv_c")
    assert [maker[name].op_type for name in kept.input] == ["DequantizeLinear", "DequantizeLinear"]
    assert [f.code for f in checks.lint(tmp_path / "q.onnx", "tensorrt-rtx")] == []
    feeds = feeds_for(made, 2)
    assert sqnr_db(run(made, feeds)[0], run(tmp_path / "q.onnx", feeds, literal=True)[0]) > 25
