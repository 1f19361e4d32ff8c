"""The plan for TensorRT and TensorRT-RTX."""

from __future__ import annotations

from collections.abc import Collection

from deploykit.stages.precision.plan import WEIGHTED, Plan, Ranges, why_float
from deploykit.stages.precision.view import FloatGraph


def plan(graph: FloatGraph, ranges: Ranges, keep_float: Collection[str] = ()) -> Plan:
    """Pairs on the inputs of weighted nodes, and on the skip branch of a residual Add; biases stay in float.

    A tensor has one pair, whoever reads it; float readers read it as it was, so that none stands between a convolution and
    the activation that the builder fuses into it.
    """
    result = Plan()
    for i, node in enumerate(graph.nodes):
        if node.op_type not in WEIGHTED or node.domain:
            continue
        reason = why_float(graph, ranges, i, keep_float)
        if reason is None and node.op_type in ("Gemm", "MatMul") and len(graph.constants[node.input[1]].dims) != 2:
            reason = "its weight is a batch of matrices"
        if reason is not None:
            result.left[i] = reason
            continue
        result.weighted.append(i)
        result.read(node.input[0], (i, 0))
    integer = set(result.weighted)
    for i, node in enumerate(graph.nodes):
        if node.op_type == "Add" and not node.domain:
            skip = _skip_branch(graph, integer, i)
            if skip is not None and node.input[skip] in ranges:
                result.read(node.input[skip], (i, skip))
    return result


def _skip_branch(graph: FloatGraph, integer: Collection[int], i: int) -> int | None:
    """Which input of an Add is the skip branch of a residual: the other is a quantized convolution's own output, read by
    the Add alone, so that the addition fuses into it. Of two such, the later convolution is the main branch."""
    a, b = graph.nodes[i].input[0], graph.nodes[i].input[1]
    if a == b or a in graph.constants or b in graph.constants or not (graph.is_float(a) and graph.is_float(b)):
        return None
    shapes = graph.shapes.get(a), graph.shapes.get(b)
    if None not in shapes and shapes[0] != shapes[1]:
        return None

    def maker(name: str) -> int:
        made = graph.producer.get(name, -1)
        is_conv = made in integer and graph.nodes[made].op_type in ("Conv", "ConvTranspose")
        return made if is_conv and graph.has_one_reader(name) else -1

    first, second = maker(a), maker(b)
    if first < 0 and second < 0:
        return None
    return 1 if first > second else 0
