from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from trt_graphs import qdq_conv

from deploykit.signature import ShapeRange
from deploykit.trt import builder, layers, plan

LISTING = """Layers:
Name: __mye0_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, Metadata:
Name: __myl_Cast_1, LayerType: kgen, Inputs: [ { Name: x, Dimensions: [-1,3], Strides: [3,1], StrideOrder: [1,0], Datatype: Float, Format: (Linear) f }], Constants: [], Outputs: [ { Name: q, Dimensions: [-1,3], Datatype: Int8, Format: f }], TacticName: t, StreamId: 0, Metadata: [ONNX Layer: q0][ONNX Layer: conv0]
Name: conv0_2, LayerType: correlation, Inputs: [ { Name: q, Dimensions: [-1,3], Datatype: Int8, Format: f }], Constants: [ { Name: w, Dimensions: [3], Datatype: Int8, Format: f }], Outputs: [ { Name: c, Dimensions: [-1,3], Datatype: Float, Format: f }], TacticName: , StreamId: 0, Metadata: [ONNX Layer: conv0][ONNX Layer: dq[0]]
"""


def test_listing_gives_kind_types_and_onnx_nodes() -> None:
    found = layers.from_listing(LISTING)
    assert [(f.kind, f.precision) for f in found] == [("shape_call", "unknown"), ("pointwise", "Float"), ("convolution", "Int8")]
    assert found[2].outputs == ("Float",)
    assert found[2].onnx_nodes == ("conv0", "dq[0]")
    assert layers.by_kind(found) == {"convolution": {"Int8": 1}, "pointwise": {"Float": 1}}


def test_a_line_that_is_no_layer_is_passed_over() -> None:
    assert layers.from_listing("Name: x LayerType: none of it\n\nLayers:\n") == ()


def test_inspector_json_of_full_tensorrt() -> None:
    text = (
        '{"Layers": [{"Name": "conv1 + relu1", "LayerType": "CaskConvolution", "Inputs": [{"Name": "x", "Format/Datatype": '
        '"Thirty-two wide channel vectorized row major Int8 format"}], "Outputs": [{"Name": "y", "Format/Datatype": '
        '"Channel major FP16 format"}], "Metadata": "[ONNX Layer: conv1]\\u001e[ONNX Layer: relu1]"}, "only a name"]}'
    )
    (layer,) = layers.from_inspector(text)
    assert (layer.kind, layer.precision, layer.outputs) == ("convolution", "Int8", ("Half",))
    assert layer.onnx_nodes == ("conv1", "relu1")


def _row(name: str, datatype: str, weights: str) -> str:
    return (
        f'{{"Name": "{name}", "LayerType": "CaskConvolution", "Inputs": [{{"Name": "x", "Format/Datatype": "{datatype}"}}], '
        f'"Outputs": [], "Weights": {weights}, "Metadata": "[ONNX Layer: {name}]"}}'
    )


def test_a_dynamic_plans_layers_are_told_by_their_weights_else_unseen() -> None:
    """Without shapes the inspector says 'N/A due to dynamic shapes' for every tensor: no reason to call INT8 a fallback."""
    rows = [
        _row("a", "N/A due to dynamic shapes", '{"Type": "Int8", "Count": 9}'),
        _row("b", "N/A due to dynamic shapes", '{"Type": "Half", "Count": 9}'),
        _row("c", "N/A due to dynamic shapes", "{}"),
    ]
    found = layers.from_inspector(f'{{"Layers": [{", ".join(rows)}]}}')
    assert [layer.precision for layer in found] == ["Int8", "Half", "unknown"]
    wanted = tuple(layers.Asked(name, "Conv", "Int8") for name in "abcd")
    assert [short.node for short in layers.shortfalls(wanted, found)] == ["b"]
    assert [want.node for want in layers.unseen(wanted, found)] == ["c", "d"]
    (line,) = plan.unseen_line(layers.unseen(wanted, found))
    assert "not known: c, d" in line
    assert plan.unseen_line(()) == []


class _Inspected:
    """A TensorRT module with one plan, whose inspector tells types only where it has a context with shapes."""

    __name__ = "double"
    ILogger = type("ILogger", (), {"__init__": lambda self: None})
    LayerInformationFormat = SimpleNamespace(JSON="json")

    def Runtime(self, _: object) -> _Inspected:
        return self

    def deserialize_cuda_engine(self, _: bytes) -> _Inspected:
        return self

    def create_engine_inspector(self) -> _Inspected:
        self.execution_context: SimpleNamespace | None = None
        return self

    def create_execution_context(self) -> SimpleNamespace:
        made = SimpleNamespace(shapes={})
        made.set_input_shape = lambda name, shape: made.shapes.update({name: shape}) or True
        return made

    def get_engine_information(self, _: str) -> str:
        told = self.execution_context is not None and self.execution_context.shapes == {"x": (8, 3)}
        return f'{{"Layers": [{_row("a", "Row major Int8 format" if told else "N/A due to dynamic shapes", "{}")}]}}'


def test_the_inspector_gets_a_context_at_the_plans_best_shapes() -> None:
    wanted = {"x": ShapeRange((1, 3), (8, 3), (32, 3))}
    assert [layer.precision for layer in builder.inspect(_Inspected(), b"plan", wanted)] == ["Int8"]
    assert [layer.precision for layer in builder.inspect(_Inspected(), b"plan")] == ["unknown"]


def test_graphs_deeper_than_pythons_recursion_are_read(tmp_path: Path) -> None:
    """As the FP16 writer leaves them: no types recorded between the nodes."""
    h, depth = onnx.helper, 3000
    nodes = [h.make_node("Cast", ["x"], ["t0"], to=onnx.TensorProto.FLOAT16)]
    nodes += [h.make_node("Relu", [f"t{i}"], [f"t{i + 1}"]) for i in range(depth)]
    nodes.append(h.make_node("MatMul", [f"t{depth}", f"t{depth}"], ["y"], name="last"))
    model = h.make_model(h.make_graph(nodes, "deep", [h.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 2])], []))
    assert layers.asked(model) == (layers.Asked("last", "MatMul", "Half"),)


def test_asked_reads_int8_from_the_graph(tmp_path: Path) -> None:
    quantized = onnx.load(str(qdq_conv(tmp_path / "q.onnx")))
    assert layers.requested(layers.asked(quantized)) == {"Conv": {"Int8": 1}}
    for dtype, name in ((np.float16, "Half"), (np.float32, "Float")):
        model = onnx.load(str(qdq_conv(tmp_path / "f.onnx", weight_dq=False, float_type=dtype)))
        for node in model.graph.node:
            if node.name == "conv0":
                node.input[0] = "xh"
        assert layers.requested(layers.asked(model)) == {"Conv": {name: 1}}


@pytest.mark.parametrize(("actual", "missed"), [("Int8", 0), ("Half", 1)])
def test_shortfall_is_a_node_that_asked_for_int8_and_runs_otherwise(actual: str, missed: int) -> None:
    wanted = (layers.Asked("conv0", "Conv", "Int8"), layers.Asked("fc", "Gemm", "Half"))
    found = (
        layers.Layer("k", "pointwise", ("Half",), ("Int8",), ("conv0",)),
        layers.Layer("c", "convolution", (actual,), ("Half",), ("conv0",)),
        layers.Layer("g", "gemm", ("Half",), ("Half",), ("fc",)),
    )
    short = layers.shortfalls(wanted, found)
    assert len(short) == missed
    said = plan.shortfall_lines(short, layers.requested(wanted))
    assert said == (["1 of 1 Conv that asked for Int8 run in Half: conv0"] if missed else [])


def test_a_node_without_a_layer_is_not_reported() -> None:
    assert layers.shortfalls((layers.Asked("gone", "Conv", "Int8"),), ()) == ()


def test_expectations_say_what_a_t4_gets() -> None:
    assert plan.RTX_TURING_INT8 in plan.expectations("int8", "sm75")
    assert plan.RTX_TURING_INT8 not in plan.expectations("fp16", "sm75")
    assert any("refused" in line for line in plan.expectations("fp32", "sm75"))
    assert plan.RTX_INT8_POINTWISE in plan.expectations("int8", "sm89")
    assert plan.UNVALIDATED in plan.expectations("fp16", "sm89")
    assert plan.UNVALIDATED not in plan.expectations("fp16", "sm89", "tensorrt")
    assert any("TF32" in line for line in plan.expectations("fp32", "sm89", "tensorrt"))
    assert not any("TF32" in line for line in plan.expectations("fp32", "sm75", "tensorrt"))
    assert not any("TF32" in line for line in plan.expectations("fp16", "sm89", "tensorrt"))
