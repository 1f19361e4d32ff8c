"""ONNX's operator form of INT8 (QLinearConv, QLinearMatMul, QGemm) rewritten as Q/DQ around the float operator: the same
arithmetic, in the form that everything else here reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.graph import attribute

if TYPE_CHECKING:
    import onnx

_LEAST_OPSET = 13  # DequantizeLinear takes an axis from there on
_FLOAT = {"QLinearConv": "Conv", "QLinearMatMul": "MatMul", "QGemm": "Gemm"}


def to_qdq(model: onnx.ModelProto) -> int:
    """Rewrites the model in place; returns how many operators were. The float result of `name_quantized` is called `name`
    again where that is free. Left as they are: scales computed at run time, and graphs below opset 13."""
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset < _LEAST_OPSET or not any(node.op_type in _FLOAT for node in model.graph.node):
        return 0
    writer = _Writer(model)
    nodes: list[onnx.NodeProto] = []
    count = 0
    for node in model.graph.node:
        made = writer.rewritten(node) if node.op_type in _FLOAT else None
        count += made is not None
        nodes += [node] if made is None else made
    kept = [type(n).FromString(n.SerializeToString()) for n in nodes]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return count


class _Writer:
    """The constants and names of one model."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._constants = {t.name: t for t in model.graph.initializer}
        self._read_as_float = {node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
        self._names = {n for node in model.graph.node for n in (*node.input, *node.output)} | set(self._constants)

    def rewritten(self, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        """The nodes that stand for one; None where its parameters are not constants."""
        import onnx

        gemm = node.op_type == "QGemm"
        inputs = list(node.input)
        bias = (inputs[6] if gemm else inputs[8]) if len(inputs) > (6 if gemm else 8) else ""
        result = (inputs[7:9] if gemm else inputs[6:8]) if len(inputs) > 7 else []
        if any(name not in self._constants for name in (inputs[1], inputs[4])):
            return None
        label = node.name or node.output[0]
        axis = 0 if node.op_type == "QLinearConv" or (gemm and attribute(node, "transB", 0)) else 1
        made = [
            self._dequantize(inputs[0], inputs[1], inputs[2], f"{label}_data", None),
            self._dequantize(inputs[3], inputs[4], inputs[5], f"{label}_weight", axis),
        ]
        reads = [found.output[0] for found in made]
        if bias:
            scale = (self._array(inputs[1]).reshape(()) * self._array(inputs[4])).astype(np.float32)
            made.append(self._dequantize(bias, self._constant(f"{label}_bias_scale", scale), "", f"{label}_bias", 0))
            reads.append(made[-1].output[0])
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        operator = _FLOAT[node.op_type]
        if len(result) < 2 or not result[0]:
            return [*made, onnx.helper.make_node(operator, reads, list(node.output), name=label, **attributes)]
        name = self._fresh(node.output[0].removesuffix("_quantized"))
        made.append(onnx.helper.make_node(operator, reads, [name], name=label, **attributes))
        made.append(onnx.helper.make_node("QuantizeLinear", [name, *result], list(node.output), name=f"{label}_quantize"))
        if node.output[0] not in self._read_as_float:
            made.append(self._dequantize(node.output[0], result[0], result[1], f"{label}_result", None))
        return made

    def _dequantize(self, source: str, scale: str, zero: str, stem: str, axis: int | None) -> onnx.NodeProto:
        import onnx

        attributes: dict[str, Any] = {} if axis is None or self._array(scale).size == 1 else {"axis": axis}
        inputs = [source, self._plain(scale), self._plain(zero)] if zero else [source, self._plain(scale)]
        return onnx.helper.make_node(
            "DequantizeLinear", inputs, [self._fresh(f"{stem}_dequantized")], name=f"{stem}_dequantize", **attributes
        )

    def _plain(self, name: str) -> str:
        """A constant of one element as a scalar: a [1] would count as a list of channels."""
        if name not in self._constants or list(self._constants[name].dims) != [1]:
            return name
        return self._constant(self._fresh(f"{name}_scalar"), self._array(name).reshape(()))

    def _array(self, name: str) -> np.ndarray[Any, Any]:
        from onnx import numpy_helper

        return numpy_helper.to_array(self._constants[name])

    def _constant(self, name: str, value: Any) -> str:
        from onnx import numpy_helper

        made = numpy_helper.from_array(np.asarray(value), name)
        self._model.graph.initializer.append(made)
        self._constants[name] = made
        return name

    def _fresh(self, wanted: str) -> str:
        name, count = wanted, 1
        while name in self._names:
            count += 1
            name = f"{wanted}_{count}"
        self._names.add(name)
        return name
