"""Which layer of one graph is which of the other: by tensor name, then by node name, then by place in the graph."""

from __future__ import annotations

import difflib
from collections.abc import Hashable
from dataclasses import dataclass

from deploykit.layer import BARE, Layer, Point
from deploykit.quantized_layers import View


@dataclass(frozen=True)
class Match:
    """A layer of the reference and where its result is read in both graphs; `other` is the candidate's layer, None where
    its result is there but no Conv, Gemm or MatMul makes it (an integer operator, a fused one)."""

    layer: Layer
    other: Layer | None
    point: Point
    reference_tensor: str
    candidate_tensor: str
    by: str  # name | node | position


def matches(reference: View, candidate: View) -> tuple[list[Match], list[Layer]]:
    """Every layer of the reference that the candidate has too, in graph order, and those it has not."""
    known = candidate.tensors()
    owner = {name: layer for layer in candidate.layers for point in layer.points for name in point.names}
    found: dict[int, Match] = {}
    taken: set[int] = set()
    for i, layer in enumerate(reference.layers):
        match = _by_name(layer, candidate, known, owner)
        if match is not None:
            found[i] = match
            if match.other is not None:
                taken.add(match.other.index)
    names = {layer.name: layer for layer in candidate.layers if layer.index not in taken}
    for i, layer in enumerate(reference.layers):
        other = names.get(layer.name)
        if i not in found and other is not None and other.op == layer.op and _key(other) == _key(layer):
            found[i] = _joined(layer, other, "node")
            taken.add(other.index)
    for i, other in _by_position(reference, candidate, found, taken):
        found[i] = _joined(reference.layers[i], other, "position")
    missing = [layer for i, layer in enumerate(reference.layers) if i not in found]
    return [found[i] for i in sorted(found)], missing


def _by_name(layer: Layer, candidate: View, known: set[str], owner: dict[str, Layer]) -> Match | None:
    for point in reversed(layer.points):
        for name in point.names:
            other = owner.get(name)
            if name in known and (other is None or _key(other) == _key(layer)):  # else a number that both exporters gave
                mine = point
                if other is not None and point.kind == BARE and other.points[-1].kind == BARE and _saturates(other.points[-1]):
                    mine = layer.points[-1]
                return Match(layer, other, mine, mine.read, candidate.stand_in(name)[0], "name")
    return None


def _joined(layer: Layer, other: Layer, by: str) -> Match:
    """The two results read at the same place: after the same activation, else before any.

    A Relu that saturation does instead (zero is the lowest level) is in the candidate's dequantized tensor.
    """
    mine, its = layer.points[-1], other.points[-1]
    if mine.kind != its.kind and not (its.kind == BARE and _saturates(its)):
        mine, its = layer.bare, other.bare
    return Match(layer, other, mine, mine.read, its.read, by)


def _saturates(point: Point) -> bool:
    """Whether zero is the lowest level of its pair: what comes out has gone through a Relu."""
    return point.pair is not None and point.pair.per_tensor and point.pair.reach[0] == 0.0


def _by_position(reference: View, candidate: View, found: dict[int, Match], taken: set[int]) -> list[tuple[int, Layer]]:
    """Layers of one kind and weight shape at the same place between those that are matched already."""
    anchors = {match.other.index: i for i, match in found.items() if match.other is not None}
    mine: list[Hashable] = [("at", i) if i in found else _key(layer) for i, layer in enumerate(reference.layers)]
    its: list[Hashable] = [("at", anchors[x.index]) if x.index in taken else _key(x) for x in candidate.layers]
    pairs = []
    for a, b, size in difflib.SequenceMatcher(None, mine, its, autojunk=False).get_matching_blocks():
        pairs += [(a + k, candidate.layers[b + k]) for k in range(size) if a + k not in found]
    return pairs


def _key(layer: Layer) -> Hashable:
    """What a layer keeps when it is quantized: its kind and its weight's shape (a Gemm may turn it)."""
    matrix = layer.op in ("Gemm", "MatMul")
    shape = () if layer.weight is None else layer.weight.shape
    return ("matrix", tuple(sorted(shape))) if matrix else (layer.op, tuple(shape))
