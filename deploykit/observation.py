"""Which tensors of an ONNX graph a quantizer needs ranges of, and which of them follow from others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit.errors import ModelError, UnknownName

if TYPE_CHECKING:
    import onnx

# Operators that a runtime may compute in int8, or that pass int8 on: their inputs and outputs get ranges.
_QUANTIZABLE = """Conv ConvTranspose Gemm MatMul Einsum Add Sub Mul Div Sum Min Max Pow Sqrt Neg Abs Concat Split Slice Gather
    Pad Where MaxPool AveragePool LpPool GlobalAveragePool GlobalMaxPool ReduceMean ReduceSum ReduceMax ReduceMin Resize
    Upsample GridSample Relu LeakyRelu PRelu Clip Elu Selu Celu Sigmoid Tanh HardSigmoid HardSwish Gelu Swish Mish Erf Softplus
    Softmax LogSoftmax BatchNormalization InstanceNormalization LayerNormalization GroupNormalization RMSNormalization
    LpNormalization LRN LSTM GRU RNN Expand Tile Attention"""
# Operators whose output holds just the values of their first input.
_MOVING = "Reshape Flatten Transpose Squeeze Unsqueeze Identity Dropout DepthToSpace SpaceToDepth"
_INTEGER = """QuantizeLinear DequantizeLinear DynamicQuantizeLinear QLinearConv QLinearMatMul QLinearAdd QLinearMul
    QLinearConcat QLinearGlobalAveragePool QLinearAveragePool QLinearSigmoid QLinearLeakyRelu QLinearSoftmax QGemm
    QAttention ConvInteger MatMulInteger MatMulNBits DynamicQuantizeMatMul DynamicQuantizeLSTM MatMulIntegerToFloat"""
QUANTIZABLE = frozenset(_QUANTIZABLE.split())
MOVING = frozenset(_MOVING.split())
INTEGER = frozenset(_INTEGER.split())


@dataclass(frozen=True)
class Derived:
    """A tensor whose values are clip(x, low, high) of an observed one, moved about at most."""

    root: str
    low: float = -math.inf
    high: float = math.inf

    @property
    def clips(self) -> bool:
        """Whether the bounds are any."""
        return (self.low, self.high) != (-math.inf, math.inf)


@dataclass(frozen=True)
class Plan:
    """wanted: every tensor to be given a range and what it follows from (itself, where it is observed);
    roots: the tensors to observe, in graph order; masked: whether the graph stores an infinite constant."""

    wanted: Mapping[str, Derived]
    roots: tuple[str, ...]
    masked: bool


def require_float(model: onnx.ModelProto, path: Path) -> None:
    """Raises ModelError for a graph that already holds integer operators, in its own functions too."""
    for node in [*_all_nodes(model.graph), *(node for function in model.functions for node in function.node)]:
        if node.op_type in INTEGER:
            raise ModelError(
                f"{path.name} is already quantized: it holds {node.op_type} ('{node.name or node.output[0]}')",
                "calibrate the float model that it was made from",
            )


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the functions that it defines itself written out, as the quantizer has it: their tensors get ranges too."""
    import onnx.inliner

    return onnx.inliner.inline_local_functions(model) if model.functions else model


def plan(model: onnx.ModelProto, tensors: Sequence[str] | None = None) -> Plan:
    """What to observe so that every float tensor which quantization needs has a range (or those in `tensors`).

    A tensor inside a sub-graph (If, Loop, Scan) is not observed, nor one that does not depend on the model's inputs. Values
    of Relu and of Clip with constant bounds follow from their input's, those of Reshape and the like are their input's:
    observing the input alone spares a third of the values of a ResNet. Raises UnknownName for a name in `tensors` that
    the graph does not compute.
    """
    data = _data_tensors(model.graph)
    sources = _sources(model.graph, data)
    found: dict[str, Derived] = {}
    if tensors is not None:
        for name in tensors:
            if name not in data:
                raise UnknownName("tensor", name, data)
            found[name] = sources[name]
    else:
        for node in model.graph.node:
            if node.op_type in QUANTIZABLE or node.op_type in MOVING:
                for name in [*node.input, *node.output]:
                    if name in data:
                        found[name] = sources[name]
        for value in model.graph.input:
            if value.name in data:
                found[value.name] = sources[value.name]
    needed = {source.root for source in found.values()}
    return Plan(found, tuple(name for name in data if name in needed), _stores_infinity(model))


def computed(model: onnx.ModelProto) -> tuple[str, ...]:
    """Names of the float tensors that follow from the model's inputs, those among them, in graph order."""
    return tuple(_data_tensors(model.graph))


def _data_tensors(graph: onnx.GraphProto) -> dict[str, None]:
    """Names of tensors that depend on an input's values, in graph order; int shapes and constants are left out."""
    stored = {t.name for t in graph.initializer}
    data = {value.name: None for value in graph.input if value.name not in stored}
    for node in graph.node:
        if node.op_type in ("Shape", "Size"):
            continue
        if any(name in data for name in node.input) or _captures(node, data):
            data.update({name: None for name in node.output if name})
    floats = _known_types(graph)
    return {name: None for name in data if floats.get(name, True)}


def _known_types(graph: onnx.GraphProto) -> dict[str, bool]:
    """Whether each tensor of a stated type is a float."""
    from onnx import TensorProto

    floats = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16, 0}
    known: dict[str, bool] = {}
    for value in [*graph.input, *graph.output, *graph.value_info]:
        kind = value.type
        known[value.name] = kind.HasField("tensor_type") and kind.tensor_type.elem_type in floats
    return known


def _captures(node: onnx.NodeProto, data: Mapping[str, None]) -> bool:
    for attribute in node.attribute:
        for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            if any(name in data for child in _all_nodes(inner) for name in child.input):
                return True
            if any(value.name in data for value in inner.output):
                return True
    return False


def _all_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                nodes += _all_nodes(inner)
    return nodes


def _sources(graph: onnx.GraphProto, data: Mapping[str, None]) -> dict[str, Derived]:
    constants = _scalars(graph)
    sources = {name: Derived(name) for name in data}
    for node in graph.node:
        name, source = (node.output[0] if node.output else ""), (node.input[0] if node.input else "")
        if name not in data or source not in data or node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type in MOVING:
            bounds: tuple[float, float] | None = (-math.inf, math.inf)
        elif node.op_type == "Relu":
            bounds = (0.0, math.inf)
        elif node.op_type == "Clip":
            bounds = _clip_bounds(node, constants)
        else:
            continue
        if bounds is None or bounds[0] > bounds[1]:
            continue
        before, (low, high) = sources[source], bounds
        sources[name] = Derived(before.root, min(max(before.low, low), high), min(max(before.high, low), high))
    return sources


def _clip_bounds(node: onnx.NodeProto, constants: Mapping[str, float]) -> tuple[float, float] | None:
    bounds = {"min": -math.inf, "max": math.inf}
    for attribute in node.attribute:  # before opset 11
        bounds[attribute.name] = attribute.f
    for key, name in zip(("min", "max"), node.input[1:], strict=False):
        if name:
            if name not in constants:
                return None
            bounds[key] = constants[name]
    return bounds["min"], bounds["max"]


def _scalars(graph: onnx.GraphProto) -> dict[str, float]:
    """Stored constants of one element."""
    found: dict[str, float] = {}
    for name, tensor in _constants(graph).items():
        if not list(tensor.dims) or list(tensor.dims) == [1]:
            found[name] = float(_array(tensor).reshape(-1)[0])
    return found


def _constants(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    found = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type != tensor.STRING}
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value" and attribute.t.data_type != attribute.t.STRING:
                found[node.output[0]] = attribute.t
    return found


def _array(tensor: onnx.TensorProto) -> Any:
    from onnx import numpy_helper

    return numpy_helper.to_array(tensor)


def _stores_infinity(model: onnx.ModelProto) -> bool:
    import numpy as np
    from onnx import TensorProto

    floats = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
    return any(
        tensor.data_type in floats and math.prod(tensor.dims) < 1 << 22 and bool(np.isinf(_array(tensor)).any())
        for tensor in _constants(model.graph).values()
    )
