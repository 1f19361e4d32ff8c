"""What correction does to each layer that is quantized alone: all layers' corrections from one pass of the float model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from deploykit.stages.precision import bias, channel_moments, normal_form
from deploykit.stages.precision.correction import Corrections
from deploykit.stages.precision.view import FloatGraph
from deploykit.stages.precision.walk import Arrays

if TYPE_CHECKING:
    import onnx


def corrections(
    path: Path, quantized: onnx.ModelProto, layout: str, feeds: list[Arrays], *, scale_correct: bool = True
) -> Corrections:
    """The corrections of each layer on these samples with no other layer quantized (`bias.corrections` has the formulas).

    quantized: what INT8 makes of the float model at `path` with all its layers. Beside each layer of the float model stands a twin
    that reads the same input, rounds it, and has the integer weights; only the moments of both leave the graph.
    """
    graph, digest = normal_form.load(path)
    wanted = bias.correctable(graph, quantized)
    scaled = bias.scaled_by_channel(quantized, wanted) if scale_correct else frozenset()
    tensors = {}
    for node in [node for node in graph.nodes if node.name in wanted]:
        rank = bias.rank_of(graph, node)
        tensors[f"{node.name} float"] = (node.output[0], rank)
        tensors[f"{node.name} twin"] = (_add_twin(graph, quantized, node), rank)
    if not tensors:
        return Corrections(digest, layout, {})
    found = channel_moments.in_graph(graph, tensors, feeds, None)
    made = {name: bias.towards(found[f"{name} float"], found[f"{name} twin"], name in scaled) for name in wanted}
    deltas, gains = {name: delta for name, (_, delta) in made.items()}, {name: made[name][0] for name in scaled}
    return Corrections(digest, layout, deltas, sum(next(iter(batch.values())).shape[0] for batch in feeds), gains=gains)


def _add_twin(graph: FloatGraph, quantized: onnx.ModelProto, node: onnx.NodeProto) -> str:
    """Adds the quantized form of a node, its input's Q/DQ pair and its constants to the float graph; returns its output."""
    import onnx

    stored = {t.name: t for t in quantized.graph.initializer}
    maker = {name: n for n in quantized.graph.node for name in n.output}
    renamed: dict[str, str] = {}

    def brought(name: str) -> str:
        """The tensor's name in the float graph; what makes it is added there."""
        if name in renamed or not name:
            return renamed.get(name, "")
        if name in stored:
            renamed[name] = graph.fresh(f"{name}_twin")
            copy = onnx.TensorProto()
            copy.CopyFrom(stored[name])
            copy.name = renamed[name]
            graph.constants[renamed[name]] = copy
        elif name in maker and maker[name].op_type in ("DequantizeLinear", "QuantizeLinear"):
            renamed[name] = added(maker[name])
        else:
            renamed[name] = node.input[0]  # the one tensor that a layer computes with: what it reads in float
        return renamed[name]

    def added(known: onnx.NodeProto) -> str:
        copy = onnx.NodeProto()
        copy.CopyFrom(known)
        inputs = [brought(name) for name in known.input]
        del copy.input[:], copy.output[:]
        copy.input.extend(inputs)
        copy.output.append(graph.fresh(f"{known.output[0]}_twin"))
        copy.name = graph.fresh(f"{known.name}_twin")
        graph.nodes.append(copy)
        return str(copy.output[0])

    return added(next(n for n in quantized.graph.node if n.name == node.name))
