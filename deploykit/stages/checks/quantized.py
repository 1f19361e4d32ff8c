"""What a graph is already quantized with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from deploykit.stages.checks.codes import Hit
from deploykit.stages.checks.context import Graph

INTEGER_OPS = ("ConvInteger", "MatMulInteger")
DYNAMIC = ("DynamicQuantizeLinear", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "DynamicQuantizeLSTM")


def find(graph: Graph) -> Iterator[Hit]:
    """One line each for Q/DQ nodes, operators in quantized form, and dynamic quantization."""
    count = Counter(node.op_type for node in graph.nodes)
    if count["QuantizeLinear"] + count["DequantizeLinear"]:
        yield Hit("DK050", detail=f"{count['QuantizeLinear']} QuantizeLinear, {count['DequantizeLinear']} DequantizeLinear")
    operators = {op: n for op, n in count.items() if op.startswith(("QLinear", "QGemm", "QAttention"))}
    if operators:
        yield Hit("DK051", detail=", ".join(f"{n} {op}" for op, n in sorted(operators.items())))
    dynamic = {op: n for op, n in count.items() if op in DYNAMIC + INTEGER_OPS}
    if dynamic:
        yield Hit("DK052", detail=", ".join(f"{n} {op}" for op, n in sorted(dynamic.items())))
