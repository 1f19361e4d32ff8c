"""A graph's layers as they are quantized, whoever wrote the Q/DQ nodes: found by structure, not by names."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deploykit import constant_folding, qoperator
from deploykit import graph as graphs
from deploykit.graph import attribute
from deploykit.layer import BARE, Layer, Pair, Point

if TYPE_CHECKING:
    import onnx

WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
ACTIVATIONS = frozenset({"Relu", "Clip", "LeakyRelu", "HardSwish"})
_ON_CONSTANTS = frozenset(
    {"Constant", "Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Cast", "Flatten", "Mul", "Div", "Sub", "Add"}
)
SCALE_CORRECTED = "deploykit.scale_corrected"  # metadata of a graph whose weight scales hold gains
_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"


@dataclass
class View:
    """An ONNX model's main graph and its layers, in graph order."""

    model: onnx.ModelProto
    nodes: list[onnx.NodeProto]
    constants: dict[str, onnx.TensorProto]
    producer: dict[str, int] = field(default_factory=dict)
    readers: dict[str, list[int]] = field(default_factory=dict)
    outputs: frozenset[str] = frozenset()
    layers: list[Layer] = field(default_factory=list)
    _values: dict[str, NDArray[Any] | None] = field(default_factory=dict)

    @property
    def quantized(self) -> bool:
        """Whether any node quantizes."""
        return any(node.op_type in (_QUANTIZE, _DEQUANTIZE, "DynamicQuantizeLinear") for node in self.nodes)

    def tensors(self) -> set[str]:
        """Every tensor that a node of the main graph computes, and the inputs."""
        return set(self.producer) | {value.name for value in self.model.graph.input}

    def value(self, name: str) -> NDArray[Any] | None:
        """A tensor's value where it depends on constants alone (through Q/DQ and what moves values); else None."""
        if name not in self._values:
            self._values[name] = self._value(name)
        return self._values[name]

    def _value(self, name: str) -> NDArray[Any] | None:
        from onnx import numpy_helper

        if name in self.constants:
            return numpy_helper.to_array(self.constants[name])
        if name not in self.producer:
            return None
        node = self.nodes[self.producer[name]]
        if node.op_type not in (*_ON_CONSTANTS, _QUANTIZE, _DEQUANTIZE) or len(node.output) != 1:
            return None
        inputs = {i: self.value(i) for i in node.input if i}
        if any(found is None for found in inputs.values()):
            return None
        if node.op_type in (_QUANTIZE, _DEQUANTIZE):
            return constant_folding.rounded(node, [None if not i else inputs[i] for i in node.input])
        return constant_folding.computed(node, inputs, self.model)

    def stand_in(self, name: str) -> tuple[str, Pair | None]:
        """The tensor that readers of `name` really see: the dequantized one where only Quantize nodes read it."""
        readers = self.readers.get(name, [])
        if not readers or any(self.nodes[i].op_type != _QUANTIZE for i in readers):
            return name, None
        quantize = self.nodes[readers[0]]
        after = [self.nodes[i] for i in self.readers.get(quantize.output[0], []) if self.nodes[i].op_type == _DEQUANTIZE]
        return (str(after[0].output[0]), self._pair(quantize)) if after else (name, None)

    def source(self, name: str) -> tuple[str, Pair | None]:
        """The float tensor behind a dequantized one, and the pair between them; the tensor itself where there is none."""
        if name not in self.producer:
            return name, None
        dequantize = self.nodes[self.producer[name]]
        if dequantize.op_type != _DEQUANTIZE or dequantize.input[0] not in self.producer:
            return name, None
        quantize = self.nodes[self.producer[dequantize.input[0]]]
        if quantize.op_type != _QUANTIZE:
            return name, None
        return str(quantize.input[0]), self._pair(quantize)

    def _pair(self, node: onnx.NodeProto) -> Pair | None:
        scale = self.value(node.input[1])
        if scale is None:
            return None
        named = len(node.input) > 2 and node.input[2]
        zero = self.value(node.input[2]) if named else np.zeros(scale.shape, np.uint8)
        if zero is None or zero.dtype.kind not in "iu":
            return None
        axis = int(attribute(node, "axis", 1)) if scale.size > 1 else None
        return Pair(scale, zero, zero.dtype.name, axis)


def load(path: Path) -> View:
    """The layers of an .onnx file, local functions inlined, integer operators rewritten as Q/DQ. Raises ModelError for a file that is no model."""
    import onnx.inliner

    model = graphs.load(path)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    qoperator.to_qdq(model)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    view = View(model, list(model.graph.node), stored, outputs=frozenset(v.name for v in model.graph.output))
    readers: dict[str, list[int]] = defaultdict(list)
    for i, node in enumerate(view.nodes):
        for name in node.input:
            readers[name].append(i)
        view.producer.update({name: i for name in node.output if name})
    view.readers = dict(readers)
    view.layers = [_layer(view, i) for i, node in enumerate(view.nodes) if node.op_type in WEIGHTED and not node.domain]
    return view


def _layer(view: View, i: int) -> Layer:
    node = view.nodes[i]
    data, data_pair = view.source(node.input[0])
    weight = view.value(node.input[1])
    second = view.source(node.input[1])[1] if weight is None else None
    bias = view.value(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    rank = 2 if weight is None else weight.ndim
    points, norms = _points(view, str(node.output[0]))
    return Layer(
        i,
        node.name or f"{node.op_type}({node.output[0]})",
        node.op_type,
        data,
        data_pair,
        weight,
        None if weight is None else _weight_pair(view, node.input[1]),
        second,
        bias,
        _out_axis(node, rank),
        points,
        norms,
        any(entry.key == SCALE_CORRECTED for entry in view.model.metadata_props),
    )


def _out_axis(node: onnx.NodeProto, rank: int) -> int:
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return rank - 1


def _weight_pair(view: View, name: str) -> Pair | None:
    """The pair behind a constant weight; its axis holds where nothing turns the weight on the way."""
    while name in view.producer:
        node = view.nodes[view.producer[name]]
        if node.op_type == _DEQUANTIZE:
            return view._pair(node)
        if node.op_type not in _ON_CONSTANTS or not node.input:
            return None
        name = str(node.input[0])
    return None


def _points(view: View, name: str) -> tuple[tuple[Point, ...], tuple[int, ...]]:
    """Where a layer's result can be read: itself, past a batch normalization or a constant bias, past an activation."""
    found: list[Point] = []
    norms: list[int] = []
    kind = BARE
    while True:
        read, pair = view.stand_in(name)
        found.append(Point(kind, (name,) if read == name else (name, read), read, pair))
        readers = view.readers.get(read, [])
        if kind != BARE or len(readers) != 1 or name in view.outputs or read in view.outputs:
            return tuple(found), tuple(norms)
        node = view.nodes[readers[0]]
        if node.op_type == "BatchNormalization":
            norms.append(readers[0])
        elif node.op_type in ACTIVATIONS and node.input[0] == read:
            kind = str(node.op_type)
        elif node.op_type != "Add" or all(view.value(other) is None for other in node.input if other != read):
            return tuple(found), tuple(norms)
        name = str(node.output[0])
