"""Which channels of a float graph can be scaled without changing what it computes: tensors tied together, who makes them, who
reads them.

A positive factor for each channel passes through Relu, pooling, and an addition of two tensors that have the same factors; a
convolution takes it up in its weights. So the graph falls apart into groups of tensors with one vector of factors each.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from deploykit.graph import attribute
from deploykit.stages.precision.view import FloatGraph

_PASSES = frozenset({"Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "Identity", "Dropout", "Add", "Clip"})
_FLATTENING = frozenset({"Flatten", "Reshape", "Squeeze"})


@dataclass
class Group:
    """Tensors [N, C, ...] whose channels can be scaled by one vector of factors [C].

    makers: nodes (Conv) whose outputs are in the group; readers: nodes (Conv, Gemm) that take a tensor of it as their data;
    clips: tensor -> upper bound, of the Clips from zero inside the group; tensors in graph order.
    """

    channels: int
    tensors: list[str] = field(default_factory=list)
    makers: list[int] = field(default_factory=list)
    readers: list[int] = field(default_factory=list)
    clips: dict[str, float] = field(default_factory=dict)


def find(graph: FloatGraph) -> list[Group]:
    """The groups of a graph in normal form that have a maker and a reader, and that nothing else sees."""
    ties = _Ties()
    for i, node in enumerate(graph.nodes):
        if _passes(graph, i):
            for name in (n for n in node.input if n and n not in graph.constants):
                ties.tie(name, node.output[0])
    groups: dict[str, Group] = {}
    blocked = {ties.root(name) for name in {v.name for v in graph.model.graph.input} | graph.outputs | graph.captured}
    for i in range(len(graph.nodes)):
        _place(graph, ties, groups, blocked, i)
    return [g for root, g in groups.items() if root not in blocked and g.makers and g.readers]


class _Ties:
    """Tensors tied together (union-find)."""

    def __init__(self) -> None:
        self.parent: dict[str, str] = {}

    def root(self, name: str) -> str:
        while self.parent.get(name, name) != name:
            name = self.parent[name]
        return name

    def tie(self, first: str, second: str) -> None:
        self.parent[self.root(second)] = self.root(first)


def _passes(graph: FloatGraph, i: int) -> bool:
    """Whether node i commutes with scaling the channels of all its tensors alike."""
    node = graph.nodes[i]
    if node.domain or len([o for o in node.output if o]) != 1:
        return False
    if node.op_type in _FLATTENING:
        return _flattens(graph, i)
    if node.op_type not in _PASSES:
        return False
    shapes = [graph.shapes.get(n) for n in node.input if n and n not in graph.constants]
    if any(s is None or len(s) < 2 or s[1] is None for s in shapes):
        return False
    if node.op_type == "Add":
        return len(shapes) == 2 and shapes[0] == shapes[1] and node.input[0] != node.input[1]
    if node.op_type == "Clip":
        return clip_from_zero(graph, i) is not None
    return len(shapes) == 1


def clip_from_zero(graph: FloatGraph, i: int) -> float | None:
    """The constant upper bound of a Clip whose lower bound is zero."""
    inputs = list(graph.nodes[i].input)
    if len(inputs) != 3 or not all(n in graph.constants for n in inputs[1:]):
        return None
    low, high = (float(graph.array(n).reshape(-1)[0]) for n in inputs[1:])
    return high if low == 0.0 < high else None


def _flattens(graph: FloatGraph, i: int) -> bool:
    """Whether a node only takes the spatial axes of size 1 away."""
    before, after = graph.shapes.get(graph.nodes[i].input[0]), graph.shapes.get(graph.nodes[i].output[0])
    if before is None or after is None or len(before) < 3 or len(after) != 2:
        return False
    return before[1] is not None and before[1] == after[1] and all(d == 1 for d in before[2:])


def _place(graph: FloatGraph, ties: _Ties, groups: dict[str, Group], blocked: set[str], i: int) -> None:
    """Enters node i into the groups of the tensors it makes and reads; blocks those it keeps from being scaled."""
    node = graph.nodes[i]

    def group(name: str) -> Group | None:
        shape = graph.shapes.get(name)
        root = ties.root(name)
        if shape is None or len(shape) < 2 or shape[1] is None or not graph.is_float(name):
            blocked.add(root)
            return None
        found = groups.setdefault(root, Group(shape[1]))
        if found.channels != shape[1]:
            blocked.add(root)
        if name not in found.tensors:
            found.tensors.append(name)
        return found

    passing = _passes(graph, i)
    for name in (n for n in node.input if n and n not in graph.constants):
        found = group(name)
        if passing:
            continue
        if found is None or not _reads(graph, i, name, found.channels):
            blocked.add(ties.root(name))
        else:
            found.readers.append(i)
    for name in (o for o in node.output if o):
        found = group(name)
        if passing and found is not None and node.op_type == "Clip":
            found.clips[node.input[0]] = clip_from_zero(graph, i) or 0.0
        elif found is not None and not passing:
            if _makes(graph, i, found.channels):
                found.makers.append(i)
            else:
                blocked.add(ties.root(name))


def _reads(graph: FloatGraph, i: int, name: str, channels: int) -> bool:
    """Whether node i can take factors of the channels of its data up in its weights."""
    node = graph.nodes[i]
    if list(node.input).count(name) != 1 or node.input[0] != name or len(node.input) < 2 or not _weighted(graph, i):
        return False
    dims = list(graph.constants[node.input[1]].dims)
    if node.op_type == "Conv":
        groups = attribute(node, "group", 1)
        return bool((groups == 1 and dims[1] == channels) or (groups == channels and dims[1] == 1))
    return node.op_type == "Gemm" and not attribute(node, "transA", 0) and int(dims[attribute(node, "transB", 0)]) == channels


def _makes(graph: FloatGraph, i: int, channels: int) -> bool:
    node = graph.nodes[i]
    bias = node.input[2] if len(node.input) > 2 else ""
    if node.op_type != "Conv" or not _weighted(graph, i) or (bias and bias not in graph.constants):
        return False
    return int(graph.constants[node.input[1]].dims[0]) == channels


def _weighted(graph: FloatGraph, i: int) -> bool:
    node = graph.nodes[i]
    return not node.domain and node.input[1] in graph.constants and graph.is_float(node.input[1])
