"""Whether a dynamic batch is really dynamic: read from the graph, and from what running it showed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from deploykit.graph import attribute
from deploykit.stages.checks.codes import MODEL, Hit
from deploykit.stages.checks.context import Graph, Shape, label
from deploykit.stages.checks.runs import Report
from deploykit.stages.checks.structure import inference_error

if TYPE_CHECKING:
    import onnx

PROBES = (5, 7)  # two batches that no graph has baked in by habit
BROADCASTING = (
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Pow",
    "Where",
    "Equal",
    "Greater",
    "Less",
    "And",
    "Or",
    "Max",
    "Min",
    "Sum",
    "PRelu",
    "Mod",
    "MatMul",
)


def find(graph: Graph, ran: Report) -> Iterator[Hit]:
    """DK011 with the node that bakes the batch, and DK012, DK013, DK015, DK017, DK036 from the runs."""
    if graph.signature.batch_symbol is not None:
        baked = list(static(graph))
        yield from baked
        yield from _runtime(ran, known=bool(baked))
    elif ran.failures:
        yield Hit("DK015", ran.failures[0].node, f"at its own batch it fails: {ran.failures[0].message}")
    if ran.not_run:
        yield Hit("DK015", detail=ran.not_run)
    for text in ran.mixed:
        yield Hit("DK012", detail=text)
    for text in ran.constant:
        yield Hit("DK013", detail=text)
    for name in ran.unrepeatable:
        yield Hit("DK017", name)
    for name in ran.not_finite:
        yield Hit("DK036", name)


def _runtime(ran: Report, *, known: bool) -> Iterator[Hit]:
    first = [f for f in ran.failures if f.batch == 1]
    later = [f for f in ran.failures if f.batch != 1]
    if first and not known:
        sizes = ", ".join(f"{name}={size}" for name, size in ran.sizes)
        yield Hit("DK015", first[0].node, f"ONNX Runtime fails at batch 1{f' with {sizes}' if sizes else ''}: {first[0].message}")
    for failure in later[:1]:
        if not known:
            yield Hit(
                "DK011",
                failure.node,
                f"ONNX Runtime runs it at batch 1 and fails at batch {failure.batch}: {failure.message}",
                MODEL,
            )


def static(graph: Graph) -> list[Hit]:
    """The nodes that cannot take two unlike batches, with what to write instead; empty when none is seen."""
    if graph.signature.batch_symbol is None:
        return []
    low, high = (graph.shapes(batch) for batch in PROBES)
    hits: list[Hit] = []
    for node in graph.nodes:
        shapes = [high.get(name) for name in node.input]
        if node.op_type == "Reshape":
            hits += _reshape(graph, node, shapes[0], low)
        elif node.op_type == "Expand":
            hits += _expand(graph, node, shapes[0])
        elif node.op_type == "Concat":
            hits += _concat(graph, node, shapes, low)
        elif node.op_type in BROADCASTING:
            hits += _broadcast(graph, node, shapes, low)
    if hits:
        return list(dict.fromkeys(hits))
    error = inference_error(graph, PROBES[1])
    if error and not inference_error(graph):
        return [_from_inference(graph, error)]
    return []


def _known(shape: Shape | None) -> tuple[int, ...] | None:
    if shape is None or any(isinstance(d, str) for d in shape):
        return None
    return tuple(int(d) for d in shape)


def _reshape(graph: Graph, node: onnx.NodeProto, shape: Shape | None, low: dict[str, Shape]) -> list[Hit]:
    source, target = _known(shape), graph.constant(node.input[1])
    if source is None or target is None:
        return []
    sizes = [int(t) for t in target.reshape(-1)]
    asked = [source[i] if t == 0 and not attribute(node, "allowzero", 0) and i < len(source) else t for i, t in enumerate(sizes)]
    total, known = math.prod(source), math.prod(t for t in asked if t != -1)
    fits = (known and total % known == 0) if -1 in asked else total == known
    if fits:
        return []
    before = low.get(node.input[0], ())
    axis = next((i for i, (a, b) in enumerate(zip(before, source, strict=False)) if a != b), 0)
    better = (
        [-1 if i == axis else s for i, s in enumerate(sizes)]
        if -1 not in sizes
        else [0 if i == axis else s for i, s in enumerate(sizes)]
    )
    return [
        Hit(
            "DK011",
            label(node),
            f"is a Reshape to the constant shape {sizes}, which bakes the batch {sizes[axis] if axis < len(sizes) else '?'}",
            MODEL,
            f"write x.flatten(1) or x.reshape(x.shape[0], ...) in the model, so that the shape reads {better}",
        )
    ]


def _expand(graph: Graph, node: onnx.NodeProto, shape: Shape | None) -> list[Hit]:
    source, target = _known(shape), graph.constant(node.input[1])
    if source is None or target is None:
        return []
    sizes = tuple(int(t) for t in target.reshape(-1))
    try:
        np.broadcast_shapes(source, sizes)
    except ValueError:
        return [
            Hit(
                "DK011",
                label(node),
                f"is an Expand to the constant shape {list(sizes)}",
                MODEL,
                "write x.expand(x.shape[0], ...) with the batch taken from the input, or leave the expansion to broadcasting",
            )
        ]
    return []


def _concat(graph: Graph, node: onnx.NodeProto, shapes: list[Shape | None], low: dict[str, Shape]) -> list[Hit]:
    known = [_known(s) for s in shapes]
    ranks = {len(s) for s in known if s is not None}
    if any(s is None for s in known) or len(ranks) != 1:
        return []
    axis = int(attribute(node, "axis", 0)) % ranks.pop()
    kept = {tuple(d for i, d in enumerate(s) if i != axis) for s in known if s is not None}
    return [] if len(kept) == 1 else [_rigid(graph, node, shapes, low)]


def _broadcast(graph: Graph, node: onnx.NodeProto, shapes: list[Shape | None], low: dict[str, Shape]) -> list[Hit]:
    known = [_known(s) for s in shapes]
    if any(s is None for s in known) or len(known) < 2:
        return []
    full = [s for s in known if s is not None]
    if node.op_type == "MatMul":
        if any(len(s) < 3 for s in full):
            return []
        full = [s[:-2] for s in full]
    if node.op_type == "PRelu":
        return []
    try:
        np.broadcast_shapes(*full)
    except ValueError:
        return [_rigid(graph, node, shapes, low)]
    return []


def _rigid(graph: Graph, node: onnx.NodeProto, shapes: list[Shape | None], low: dict[str, Shape]) -> Hit:
    """The operand that doesn't follow the batch while another does."""
    rigid = next((n for n, s in zip(node.input, shapes, strict=True) if low.get(n) == s), node.input[0])
    made_by = graph.producer.get(rigid)
    origin = f"the constant '{rigid}'" if made_by is None or rigid in graph.tensors else f"'{label(made_by)}' ({made_by.op_type})"
    culprit = label(node) if made_by is None else label(made_by)
    shape = shapes[list(node.input).index(rigid)]
    return Hit(
        "DK011",
        culprit,
        f"{node.op_type} '{label(node)}' meets {origin} of shape {list(shape or ())}, which does not follow the batch",
        MODEL,
        "give that operand a batch axis of 1 and let it broadcast, or expand it to the input's own batch, x.shape[0]",
    )


def _from_inference(graph: Graph, error: str) -> Hit:
    named = re.search(r"node name: ([^)]*)\)", error)
    name = named.group(1) if named else ""
    node = next((n for n in graph.nodes if n.name == name), None)
    reshape = _upstream_reshape(graph, node) if node is not None else None
    if reshape is None:
        return Hit("DK011", name, f"shapes do not fit at batch {PROBES[1]}: {error}", MODEL)
    target = graph.constant(reshape.input[1])
    sizes = [int(t) for t in target.reshape(-1)] if target is not None else []
    return Hit(
        "DK011",
        label(reshape),
        f"is a Reshape to {sizes}, which folds the batch into another axis; '{name}' then does not fit",
        MODEL,
        "write x.flatten(1) or x.reshape(x.shape[0], -1), so that axis 0 stays the batch",
    )


def _upstream_reshape(graph: Graph, node: onnx.NodeProto) -> onnx.NodeProto | None:
    """The nearest Reshape above a node that writes a constant size on axis 0."""
    waiting, seen = list(node.input), set()
    while waiting:
        name = waiting.pop(0)
        above = graph.producer.get(name)
        if above is None or name in seen:
            continue
        seen.add(name)
        if above.op_type == "Reshape":
            target = graph.constant(above.input[1])
            if target is not None and target.size and int(target.reshape(-1)[0]) > 0:
                return above
        waiting.extend(above.input)
    return None
