"""Which tensors get a Quantize/Dequantize pair, and who reads the dequantized value: one Plan, two layouts that make it.

`tensorrt` follows NVIDIA's guidance for explicit quantization (TensorRT documentation, "Working with Quantized Types"):
pairs on the inputs of convolutions and matrix products, none between a convolution and what fuses into it, and the skip
branch only of a residual addition. `cpu` surrounds every operator that ONNX Runtime has an integer kernel for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Protocol

from deploykit.graph import attribute
from deploykit.stages.precision.view import Edge, FloatGraph, bodies

WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


class Ranges(Protocol):
    """What a plan asks of a calibration table: which tensors it knows."""

    def __contains__(self, name: object) -> bool: ...


@dataclass
class Plan:
    """What to quantize. All nodes are indices into the graph's list.

    weighted: nodes whose weights (and, on the CPU, biases) become integers; edges: tensor -> the node inputs that read its
    dequantized value; through: tensors that nobody reads as float any more; shared: tensor -> the tensor whose scale it
    has too; left: node -> why it stays in float.
    """

    weighted: list[int] = field(default_factory=list)
    edges: dict[str, list[Edge]] = field(default_factory=dict)
    through: set[str] = field(default_factory=set)
    shared: dict[str, str] = field(default_factory=dict)
    left: dict[int, str] = field(default_factory=dict)

    def root(self, name: str) -> str:
        """The tensor whose range gives `name` its scale."""
        while name in self.shared:
            name = self.shared[name]
        return name

    def read(self, name: str, edge: Edge) -> None:
        """Has a node input read the dequantized value."""
        edges = self.edges.setdefault(name, [])
        if edge not in edges:
            edges.append(edge)


def why_float(graph: FloatGraph, ranges: Ranges, i: int, keep_float: Collection[str]) -> str | None:
    """Why a Conv, ConvTranspose, Gemm or MatMul cannot be quantized; None when it can."""
    node = graph.nodes[i]
    if node.name in keep_float:
        return "asked to stay in float"
    data, weight = node.input[0], node.input[1]
    if data in graph.constants:
        return "its first operand is a constant; only the second is quantized as a weight"
    if weight not in graph.constants:
        return "its weights are computed at run time"
    if not graph.is_float(data) or not graph.is_float(weight):
        return "it does not compute in float32"
    if data not in ranges:
        return f"the calibration table has no range for its input '{data}'"
    rank = len(graph.constants[weight].dims)
    if rank < 2 or 0 in graph.constants[weight].dims:
        return f"its weight has shape {list(graph.constants[weight].dims)}"
    return None


def left_in_bodies(graph: FloatGraph) -> Counter[str]:
    """How many weighted nodes lie in the bodies of control-flow nodes: those stay in float."""
    found: Counter[str] = Counter()

    def visit(nodes: Collection[object]) -> None:
        for node in nodes:
            for body in bodies(node):  # type: ignore[arg-type]
                found.update(inner.op_type for inner in body.node if inner.op_type in WEIGHTED)
                visit(body.node)

    visit(graph.nodes)
    return found


def fused_tail(graph: FloatGraph, name: str) -> str:
    """The output of the Relu or Clip that alone reads `name` and can vanish into the quantization after it, else `name`.

    Relu, and Clip from zero: with zero at the lowest level saturation does the same (ONNX Runtime's ReluQuantFusion and
    ClipQuantFusion, OpenVINO's fake-quantize fusion).
    """
    if not graph.has_one_reader(name):
        return name
    i, k = graph.consumers[name][0]
    node = graph.nodes[i]
    if node.op_type == "Relu" or (node.op_type == "Clip" and k == 0 and _clips_at_zero(graph, i)):
        return str(node.output[0])
    return name


def _clips_at_zero(graph: FloatGraph, i: int) -> bool:
    low = graph.nodes[i].input[1] if len(graph.nodes[i].input) > 1 else ""
    return low in graph.constants and float(graph.array(low)) == 0.0


def gemm_bias_fits(graph: FloatGraph, i: int) -> bool:
    """Whether a Gemm's third operand is a constant that holds one value for each column, [N], [1, N], [1] or a scalar."""
    node = graph.nodes[i]
    if len(node.input) < 3 or not node.input[2]:
        return True
    if node.input[2] not in graph.constants:
        return False
    dims = list(graph.constants[node.input[2]].dims)
    return all(d == 1 for d in dims[:-1])


def spatially_nearest(graph: FloatGraph, i: int) -> bool:
    """Whether a node is a Resize that only copies values."""
    return graph.nodes[i].op_type == "Resize" and attribute(graph.nodes[i], "mode", b"nearest") == b"nearest"
