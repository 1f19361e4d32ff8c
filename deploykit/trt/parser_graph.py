"""The ONNX graph as a TensorRT parser gets it: checked, sorted, every node named once, without metadata."""

from __future__ import annotations

import heapq
from pathlib import Path
from typing import TYPE_CHECKING

from deploykit import graph
from deploykit.errors import BackendFailed, ModelError

if TYPE_CHECKING:
    import onnx


def load(path: Path, *, guard: bool = True) -> onnx.ModelProto:
    """The model, ready for the parser. Metadata goes because torch's exporter writes absolute paths there, and the same
    model must give the same plan wherever it was exported. `guard`: refuse what is known to crash the builder.

    Raises ModelError for a graph that ONNX's checker refuses, BackendFailed for one known to crash the builder.
    """
    import onnx

    model = graph.load(path)
    _sort_nodes(model)
    try:
        onnx.checker.check_model(model if graph.fits_inline(model) else str(path))
    except (onnx.checker.ValidationError, ValueError) as exc:
        reason = str(exc).strip().splitlines()[0]
        raise ModelError(f"{path.name} is no valid ONNX graph: {reason}", "export it again") from exc
    graph.strip_metadata(model)
    taken: set[str] = set()
    for index, node in enumerate(model.graph.node):
        name = node.name or f"{node.op_type}_{index}"
        node.name = name if name not in taken else f"{name}_{index}"
        taken.add(node.name)
    if guard:
        _refuse_computed_scales(model)
        _refuse_uint8(model)
    return model


def _sort_nodes(model: onnx.ModelProto) -> None:
    """Puts each node after those it reads from: ONNX asks for it, and ONNX Runtime's own FP16 converter does not keep it."""
    made = {output: i for i, node in enumerate(model.graph.node) for output in node.output if output}
    readers: dict[int, list[int]] = {}
    waits = []
    for index, node in enumerate(model.graph.node):
        sources = {made[name] for name in reads(node) if name in made}
        waits.append(len(sources))
        for source in sources:
            readers.setdefault(source, []).append(index)
    ready = [i for i, left in enumerate(waits) if left == 0]
    heapq.heapify(ready)
    order: list[int] = []
    while ready:
        index = heapq.heappop(ready)
        order.append(index)
        for reader in readers.get(index, []):
            waits[reader] -= 1
            if waits[reader] == 0:
                heapq.heappush(ready, reader)
    if len(order) == len(waits) and order != sorted(order):  # a cycle is left for the checker to name
        nodes = [model.graph.node[i] for i in order]
        copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
        model.graph.ClearField("node")
        model.graph.node.extend(copies)


def reads(node: onnx.NodeProto) -> list[str]:
    """The names a node reads, those its sub-graphs take from outside among them."""
    names = list(node.input)
    for attribute in node.attribute:
        for body in [attribute.g] if attribute.HasField("g") else list(attribute.graphs):
            for inner in body.node:
                names.extend(reads(inner))
            names.extend(output.name for output in body.output)
    return names


def _refuse_computed_scales(model: onnx.ModelProto) -> None:
    """Seen with TensorRT-RTX 1.7.1: a scale that another node computes ends the process with SIGSEGV."""
    constant = {t.name for t in model.graph.initializer}
    for node in model.graph.node:  # in topological order, as the checker requires
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 1 and node.input[1] not in constant:
            raise BackendFailed(
                f"node '{node.name}' ({node.op_type}): its scale '{node.input[1]}' is computed in the graph; TensorRT takes "
                "constant scales only (TensorRT-RTX crashes on it)",
                "quantize with static calibration: `deploykit calibrate`, then `deploykit quantize --mode static`",
            )
        if node.op_type == "Constant" or (
            node.op_type in ("Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze") and all(i in constant for i in node.input)
        ):
            constant.update(node.output)


def _refuse_uint8(model: onnx.ModelProto) -> None:
    """Seen with TensorRT-RTX 1.7.1: uint8 with zero point 0 is taken as int8 with a warning, so half the range is lost."""
    import onnx

    unsigned = {t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.UINT8}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 2 and node.input[2] in unsigned:
            raise BackendFailed(
                f"node '{node.name}' ({node.op_type}) quantizes to uint8; TensorRT would take it as int8 and clip half the range",
                "quantize symmetrically: `deploykit quantize --mode static --layout tensorrt`",
            )
