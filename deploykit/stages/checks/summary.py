"""GraphSummary: what a model is made of, and what one sample costs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deploykit.graph import attribute
from deploykit.signature import ShapeRange, Signature
from deploykit.stages.checks.context import Graph, Shape, subgraphs

if TYPE_CHECKING:
    import onnx

_CONV = ("Conv", "ConvInteger", "QLinearConv", "FusedConv")
_MATMUL = ("MatMul", "MatMulInteger", "QLinearMatMul", "FusedMatMul")
_RECURRENT = ("LSTM", "GRU", "RNN")
_UNCOUNTED = ("Einsum", "Attention", "MultiHeadAttention", "DeformConv")  # they multiply; no formula here


@dataclass(frozen=True)
class GraphSummary:
    """Facts of one model.

    ops: nodes by operator, sub-graphs included; parameters: stored floating-point and quantized values (scales and zero
    points left out); size_bytes: the file and its external data; macs: multiply-accumulates of convolutions and matrix
    products a sample, None when a shape is unknown or an operator has no formula here; weight_bytes: bytes of the stored
    tensors; activation_bytes: bytes of every computed tensor a sample, None when a shape is unknown; moved_values: values a
    sample that the layers which multiply read and write (weights left out), None where `macs` is.
    """

    ops: Mapping[str, int]
    parameters: int
    size_bytes: int
    macs: int | None
    weight_bytes: int
    activation_bytes: int | None
    opset: int
    ir_version: int
    signature: Signature
    moved_values: int | None = None


def summary(path: Path, batch: int = 1, *, shapes: Mapping[str, ShapeRange] | None = None) -> GraphSummary:
    """The summary of an .onnx file, costs counted at `batch` and given a sample; `shapes` sizes the other dynamic axes.

    A model with a fixed batch is counted at that. Raises ModelError for a file that is no ONNX model.
    """
    graph = Graph.load(path)
    count = graph.signature.fixed_batch or batch
    inferred = graph.shapes(count, shapes)
    external = sum((path.parent / name).stat().st_size for name in graph.external_files())
    activations = _activation_bytes(graph, inferred)
    total = _macs(graph, inferred)
    moved = None if total is None else sum(_moved_values(node, inferred) for node in graph.nodes)
    return GraphSummary(
        ops=dict(Counter(node.op_type for node in graph.nodes).most_common()),
        parameters=_parameters(graph),
        size_bytes=path.stat().st_size + external,
        macs=None if total is None else total // count,
        weight_bytes=graph.weight_bytes,
        activation_bytes=None if activations is None else activations // count,
        opset=graph.opset,
        ir_version=graph.model.ir_version,
        signature=graph.signature,
        moved_values=None if moved is None else moved // count,
    )


def _parameters(graph: Graph) -> int:
    import onnx

    kinds = onnx.TensorProto
    indices = (kinds.INT64, kinds.INT32, kinds.BOOL, kinds.STRING, kinds.UINT64, kinds.UINT32)
    scales = {n.input[i] for n in graph.nodes if n.op_type.endswith("Linear") for i in (1, 2) if i < len(n.input)} - {
        i for n in graph.nodes if n.op_type.endswith("Conv") for i in n.input
    }
    return sum(math.prod(t.dims) for name, t in graph.tensors.items() if t.data_type not in indices and name not in scales)


def _macs(graph: Graph, shapes: Mapping[str, Shape]) -> int | None:
    total = 0
    for node in graph.nodes:
        if node.op_type in _UNCOUNTED or (
            node.op_type in ("Loop", "Scan") and any(_multiplies(body) for body in subgraphs(node))
        ):
            return None
        counted = node_macs(node, shapes)
        if counted is None:
            return None
        total += counted
    return total


def _multiplies(body: onnx.GraphProto) -> bool:
    return any(n.op_type in (*_CONV, *_MATMUL, *_RECURRENT, *_UNCOUNTED, "Gemm", "ConvTranspose") for n in body.node)


def node_macs(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int | None:
    """Multiply-accumulates of one node: 0 for operators that don't multiply matrices, None when a shape is unknown.

    Conv: output elements x weights of one output channel. ConvTranspose: input elements x weights of one input channel.
    Gemm, MatMul: output elements x the inner dimension. LSTM, GRU, RNN: steps x samples x weights of input and state. An
    operator's bias is not counted.
    """
    if node.op_type in _RECURRENT:
        return _recurrent_macs(node, shapes)
    weight_at = 3 if node.op_type == "QLinearConv" else 1
    multiplies = node.op_type in (*_CONV, *_MATMUL, "ConvTranspose", "Gemm")
    if not multiplies:
        return 0
    if len(node.input) <= weight_at or not node.output:
        return None
    source, weight, result = (_known(shapes, n) for n in (node.input[0], node.input[weight_at], node.output[0]))
    if source is None or weight is None or result is None or not source:
        return None
    if node.op_type in _CONV:
        return math.prod(result) * math.prod(weight[1:])
    if node.op_type == "ConvTranspose":
        return math.prod(source) * math.prod(weight[1:])
    inner = source[0] if node.op_type == "Gemm" and attribute(node, "transA", 0) else source[-1]
    return math.prod(result) * inner


def _moved_values(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int:
    """Values of the input and the output of a layer that multiplies; 0 for all others, which engines fuse into these."""
    if not node_macs(node, shapes):
        return 0
    found = [_known(shapes, name) for name in (node.input[0], node.output[0]) if name]
    return sum(math.prod(shape) for shape in found if shape is not None)


def _recurrent_macs(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int | None:
    """X is [steps, batch, size]; W [directions, gates x hidden, size] and R [directions, gates x hidden, hidden]."""
    if len(node.input) < 3:
        return None
    source, weight, state = (_known(shapes, name) for name in node.input[:3])
    if source is None or weight is None or state is None:
        return None
    return math.prod(source[:2]) * (math.prod(weight) + math.prod(state))


def _known(shapes: Mapping[str, Shape], name: str) -> tuple[int, ...] | None:
    shape = shapes.get(name)
    if shape is None or any(isinstance(d, str) for d in shape):
        return None
    return tuple(int(d) for d in shape)


def _activation_bytes(graph: Graph, shapes: Mapping[str, Shape]) -> int | None:
    """Bytes of the outputs of every node of the main graph; types that inference does not tell are counted as 4 bytes."""
    total = 0
    for node in graph.model.graph.node:
        for name in node.output:
            if not name or name in graph.tensors:
                continue
            shape = _known(shapes, name)
            if shape is None:
                return None
            total += math.prod(shape) * graph.item_bytes(name)
    return total
