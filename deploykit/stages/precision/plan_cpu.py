"""The plan for ONNX Runtime's CPU provider and OpenVINO: every operator with an integer kernel, Q/DQ all around it."""

from __future__ import annotations

from collections.abc import Collection

from deploykit.graph import attribute
from deploykit.stages.precision.plan import WEIGHTED, Plan, Ranges, fused_tail, gemm_bias_fits, spatially_nearest, why_float
from deploykit.stages.precision.view import FloatGraph

# Operators of ONNX Runtime's QDQ selectors (core/optimizer/qdq_transformer) with a CPU kernel of their own scales.
_OWN_SCALE = frozenset({"Add", "Mul", "AveragePool", "GlobalAveragePool", "Concat", "LeakyRelu", "Sigmoid"})
# Operators that move values and keep them: both sides have one scale, and the pair around them drops out.
_SAME_SCALE = frozenset(
    {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "DepthToSpace", "SpaceToDepth", "Split", "Slice"}
)


def plan(graph: FloatGraph, ranges: Ranges, keep_float: Collection[str] = ()) -> Plan:
    """Weighted nodes, then whatever follows them and can go on in integers.

    A Conv must write integers to run in them; a Gemm or MatMul may write float, and does unless an integer operator reads
    its result. Softmax, normalizations and the like stay in float, between a dequantize and a quantize.
    """
    result = Plan()
    integer: set[int] = set()
    for i, node in enumerate(graph.nodes):
        if node.domain:
            continue
        if node.op_type in WEIGHTED:
            reason = why_float(graph, ranges, i, keep_float) or _why_not_here(graph, ranges, i)
            if reason is not None:
                result.left[i] = reason
                continue
            result.weighted.append(i)
            _add(graph, result, integer, i)
        elif node.name not in keep_float and _follows(graph, ranges, result, i):
            _add(graph, result, integer, i)
    _matrix_results(graph, ranges, result, integer)
    _leave_joins_read_as_float(graph, result, integer)
    return result


def _why_not_here(graph: FloatGraph, ranges: Ranges, i: int) -> str | None:
    node = graph.nodes[i]
    if node.op_type == "ConvTranspose":
        return "ONNX Runtime's CPU provider has no integer ConvTranspose"
    if node.op_type == "Gemm" and not gemm_bias_fits(graph, i):
        return "its third operand is no constant row"
    if node.op_type == "Conv" and len(node.input) > 2 and node.input[2] and node.input[2] not in graph.constants:
        return "its bias is computed at run time"
    if node.op_type == "Conv" and fused_tail(graph, node.output[0]) not in ranges:
        return f"the calibration table has no range for its output '{fused_tail(graph, node.output[0])}'"
    return None


def _add(graph: FloatGraph, result: Plan, integer: set[int], i: int) -> None:
    """Takes node i into the integer part: its float inputs are read dequantized, its results quantized."""
    node = graph.nodes[i]
    integer.add(i)
    for k, name in enumerate(node.input):
        data = k == 0 or (node.op_type in ("Add", "Mul", "Concat") and name)
        if data and name not in graph.constants:
            result.read(name, (i, k))
    if node.op_type in ("Gemm", "MatMul"):
        return
    for name in node.output:
        if not name:
            continue
        if node.op_type in _SAME_SCALE or node.op_type == "Resize":
            result.shared[name] = node.input[0]
            _go_through(graph, result, name)
        else:
            _go_through(graph, result, fused_tail(graph, name))


def _go_through(graph: FloatGraph, result: Plan, name: str) -> None:
    result.through.add(name)
    for edge in graph.consumers.get(name, ()):
        result.read(name, edge)


def _follows(graph: FloatGraph, ranges: Ranges, result: Plan, i: int) -> bool:
    """Whether an operator can join the integer part: an input is quantized already, and all its tensors have ranges."""
    node = graph.nodes[i]
    same = node.op_type in _SAME_SCALE or spatially_nearest(graph, i)
    if not same and node.op_type not in _OWN_SCALE:
        return False
    if node.op_type == "MaxPool" and len([o for o in node.output if o]) > 1:
        return False  # the indices would be those of another tensor
    if node.op_type == "AveragePool" and attribute(node, "ceil_mode", 0):
        return False  # the last window counts differently in the integer kernel
    data = [n for n in node.input if n] if node.op_type in ("Add", "Mul", "Concat") else [node.input[0]]
    if any(name in graph.constants or not graph.is_float(name) for name in data):
        return False
    if not any(name in result.through for name in data) or not all(_has_range(ranges, result, n) for n in data):
        return False
    return same or all(fused_tail(graph, name) in ranges for name in node.output if name)


def _has_range(ranges: Ranges, result: Plan, name: str) -> bool:
    return result.root(name) in ranges


def _matrix_results(graph: FloatGraph, ranges: Ranges, result: Plan, integer: Collection[int]) -> None:
    """A Gemm or MatMul whose result an integer operator reads writes integers; other readers get them dequantized."""
    for i in result.weighted:
        if graph.nodes[i].op_type not in ("Gemm", "MatMul"):
            continue
        name = fused_tail(graph, graph.nodes[i].output[0])
        readers = {edge[0] for edge in graph.consumers.get(name, ())}
        if name in result.edges and readers & set(integer) and _has_range(ranges, result, name):
            _go_through(graph, result, name)


def _leave_joins_read_as_float(graph: FloatGraph, result: Plan, integer: set[int]) -> None:
    """A Concat that only float operators read stays in float: a second rounding of values that no integer kernel reads.

    It also keeps OpenVINO alive: 2026.4 dies of a segmentation fault (MoveFakeQuantize) on Concat, Q, DQ, BatchNormalization with
    a zero point other than zero, as every DenseNet has it.
    """
    for i in sorted(integer, reverse=True):
        node = graph.nodes[i]
        if node.op_type != "Concat":
            continue
        name = fused_tail(graph, node.output[0])
        if any(reader in integer for reader, _ in graph.consumers.get(name, ())):
            continue
        integer.discard(i)
        result.through.discard(name)
        result.edges.pop(name, None)
        for source in node.input:
            if source not in result.through and source in result.edges:
                result.edges[source] = [edge for edge in result.edges[source] if edge[0] != i]
                if not result.edges[source]:
                    del result.edges[source]
