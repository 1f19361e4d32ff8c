"""One layer quantized, all others in float: the reference's graph with that layer's integers from the candidate put in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deploykit.errors import ModelError
from deploykit.layer import Layer, Pair, Point
from deploykit.quantized_layers import View
from deploykit.stages.layers.match import Match

if TYPE_CHECKING:
    import onnx

_LATE_TYPES = frozenset({"int16", "uint16", "int4", "uint4"})  # of Q/DQ: from opset 21 on
_FURTHEST_GAIN = 1.3
_STRAY = 0.01  # share of weights that may differ from the reference's by more than rounding does


def graph(reference: View, match: Match) -> onnx.ModelProto:
    """The reference's model in which that one layer has the candidate's Q/DQ pairs, weight and bias, and no other has any.

    Raises ModelError, with the reason, where that cannot be made.
    """
    import onnx

    layer, other = match.layer, match.other
    reason = why_not(reference, match)
    if reason is not None or other is None:
        raise ModelError(f"'{layer.name}' alone cannot be quantized: {reason}")
    model = onnx.ModelProto()
    model.CopyFrom(reference.model)
    nodes = list(model.graph.node)
    folded = set(layer.norms[: len(layer.norms) - len(other.norms)])
    node = nodes[layer.index]
    _take_weights(model, node, layer, other)
    if folded:
        node.output[0] = nodes[max(folded)].output[0]
    before = _pair(model, layer.data, f"{layer.data}__alone", other.data_pair, 0)
    if before:
        node.input[0] = before[-1].output[0]
    if layer.weight is None and other.second_pair is not None:
        second = _pair(model, node.input[1], f"{node.input[1]}__alone_second", other.second_pair, 1)
        before += second
        node.input[1] = second[-1].output[0]
    after: dict[int, list[onnx.NodeProto]] = {}
    for mine, pair in _output_pairs(match):
        made = next(k for k, n in enumerate(nodes) if mine.names[0] in n.output and k not in folded)
        inner = f"{mine.names[0]}__alone_float"
        nodes[made].output[list(nodes[made].output).index(mine.names[0])] = inner
        after[made] = _pair(model, inner, f"{mine.names[0]}__alone", pair, 2, result=mine.names[0])
    written: list[onnx.NodeProto] = []
    for k, found in enumerate(nodes):
        if k in folded:
            continue
        written += [*(before if k == layer.index else ()), found, *after.get(k, ())]
    kept = [type(n).FromString(n.SerializeToString()) for n in written]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    model.graph.ClearField("value_info")
    return model


def why_not(reference: View, match: Match) -> str | None:
    """Why this layer's own part cannot be measured; None when it can."""
    layer, other = match.layer, match.other
    if other is None:
        return "the candidate has no Conv, Gemm or MatMul of its own there"
    if not other.quantized:
        return "it runs in float"
    if other.op != layer.op:
        return f"it is a {other.op} in the candidate"
    if len(other.norms) > len(layer.norms):
        return "the candidate has a batch normalization that the reference has not"
    if (layer.weight is None) != (other.weight is None):
        return "its weight is constant in one graph only"
    if {p.dtype for p in (other.data_pair, other.second_pair) if p} & _LATE_TYPES and _opset(reference) < 21:
        return "its 16-bit or 4-bit pair needs opset 21"
    if not same_weights(reference, match):
        return "its weights are not the reference's (equalized, or trained on)"
    return None


def same_weights(reference: View, match: Match) -> bool:
    """Whether the candidate's weight is the reference's (normalization folded), rounded up or down to its integers; in a graph whose
    scales were corrected, up to a gain of each output channel."""
    layer, other = match.layer, match.other
    if other is None or layer.weight is None or other.weight is None:
        return True
    weight = _folded_weight(reference, layer, len(layer.norms) - len(other.norms))
    if weight is None or weight.shape != other.weight.shape:
        return False
    if other.weight_pair is None:
        return bool(np.allclose(weight, other.weight, rtol=1e-3, atol=1e-5 * float(np.abs(weight).max(initial=0.0))))
    known = weight * _gains(weight, other)
    scale = _along(other.weight_pair, other)
    low, high = other.weight_pair.levels
    limit = max(abs(low), abs(high)) - 2
    steps = np.abs(other.weight / scale)
    off = np.abs(known - other.weight) > 1.05 * scale  # learnt rounding goes up or down by one whole step at most
    return bool(np.mean(off & (steps < limit) & (steps < 62.5)) <= _STRAY)  # 63 levels: weights of reduced range


def _along(pair: Pair, layer: Layer) -> NDArray[np.float32]:
    scale = np.maximum(np.asarray(pair.scale, np.float32), np.finfo(np.float32).tiny)
    assert layer.weight is not None
    if scale.size == 1:
        return scale.reshape(())
    shape = [1] * layer.weight.ndim
    shape[layer.axis] = -1
    return scale.reshape(shape) if scale.size == layer.weight.shape[layer.axis] else np.asarray(scale.max())


def folded_weight(reference: View, match: Match) -> NDArray[np.float32] | None:
    """The reference's weight as the candidate has it: with the batch normalizations folded in that the candidate lacks, and times the
    gains of its output channels where its scales were corrected."""
    other = match.other
    weight = _folded_weight(reference, match.layer, max(0, len(match.layer.norms) - (len(other.norms) if other else 0)))
    if weight is None or other is None or other.weight_pair is None or other.weight is None or other.weight.shape != weight.shape:
        return weight
    return (weight * _gains(weight, other)).astype(np.float32)


def _gains(weight: NDArray[np.float32], other: Layer) -> NDArray[np.float64]:
    """By output channel what the candidate's scale correction multiplied the weight by, in a shape that broadcasts: the median ratio of
    its larger weights (rounding moves those least, and a clipped one is no median); 1 without."""
    assert other.weight is not None
    if not other.scaled or other.weight_pair is None or other.weight_pair.per_tensor:
        return np.ones((), np.float64)
    others = tuple(a for a in range(weight.ndim) if a != other.axis)
    size = np.abs(weight).astype(np.float64)
    large = size >= 0.5 * size.max(axis=others, keepdims=True, initial=0.0)
    ratio = np.divide(other.weight, weight, out=np.full(weight.shape, np.nan), where=large & (size > 0))
    found = np.nan_to_num(
        np.nanmedian(np.where(np.isnan(ratio).all(axis=others, keepdims=True), 1.0, ratio), axis=others, keepdims=True)
    )
    return np.asarray(np.clip(found, 1 / _FURTHEST_GAIN, _FURTHEST_GAIN), np.float64)


def _folded_weight(reference: View, layer: Layer, count: int) -> NDArray[np.float32] | None:
    """W g / sqrt(v + e) for each of the first `count` normalizations after the layer."""
    if layer.weight is None:
        return None
    weight = layer.weight.astype(np.float64)
    for index in layer.norms[:count]:
        node = reference.nodes[index]
        gamma, variance = reference.value(node.input[1]), reference.value(node.input[4])
        if gamma is None or variance is None or gamma.size != weight.shape[layer.axis]:
            return None
        epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
        shape = [1] * weight.ndim
        shape[layer.axis] = -1
        weight = weight * (gamma.astype(np.float64) / np.sqrt(variance.astype(np.float64) + epsilon)).reshape(shape)
    return weight.astype(np.float32)


def _take_weights(model: onnx.ModelProto, node: onnx.NodeProto, layer: Layer, other: Layer) -> None:
    from onnx import numpy_helper

    if other.weight is not None:
        name = f"{layer.name}__alone_weight"
        model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(other.weight, np.float32), name))
        node.input[1] = name
    if other.bias is not None and layer.op != "MatMul":
        name = f"{layer.name}__alone_bias"
        model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(other.bias, np.float32), name))
        del node.input[2:]
        node.input.append(name)


def _output_pairs(match: Match) -> list[tuple[Point, Pair]]:
    """The candidate's pairs on the layer's result, with the reference's points they belong on."""
    assert match.other is not None
    found: dict[str, tuple[Point, Pair]] = {}
    for its in match.other.points:
        if its.pair is None or not its.pair.per_tensor:
            continue
        named = next((p for p in match.layer.points if set(p.names) & set(its.names)), None)
        same = [p for p in match.layer.points if p.kind == its.kind]
        mine = named or (match.point if its.read == match.candidate_tensor else same[-1] if same else None)
        if mine is not None:
            found[mine.names[0]] = (mine, its.pair)
    return list(found.values())


def _pair(
    model: onnx.ModelProto, source: str, stem: str, pair: Pair | None, number: int, result: str | None = None
) -> list[onnx.NodeProto]:
    import onnx
    from onnx import numpy_helper

    if pair is None:
        return []
    scale, zero, middle = (f"{stem}_{number}_{part}" for part in ("scale", "zero", "quantized"))
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(pair.scale, np.float32), scale))
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(pair.zero), zero))
    axis: dict[str, Any] = {} if pair.axis is None else {"axis": pair.axis}
    make = onnx.helper.make_node
    return [
        make("QuantizeLinear", [source, scale, zero], [middle], name=f"{stem}_{number}_q", **axis),
        make("DequantizeLinear", [middle, scale, zero], [result or f"{stem}_{number}_dq"], name=f"{stem}_{number}_dq", **axis),
    ]


def _opset(view: View) -> int:
    return max((int(o.version) for o in view.model.opset_import if o.domain in ("", "ai.onnx")), default=0)
