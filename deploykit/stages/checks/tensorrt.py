"""TensorRT's rules for Q/DQ, read from the graph: what its parser refuses, and what it takes but silently runs in float.

The rules were seen in TensorRT-RTX 1.7.1's parser; the tests hold them against the parser that is installed. It crashes on
a computed scale, so these rules run before it does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from deploykit.graph import attribute
from deploykit.stages.checks.codes import Hit
from deploykit.stages.checks.context import Array, Graph, label
from deploykit.stages.checks.quantized import DYNAMIC, INTEGER_OPS
from deploykit.stages.checks.weights import WEIGHTED, channel_axis

if TYPE_CHECKING:
    import onnx

FP16_NORMAL = 6.1e-5  # the smallest normal FP16 value is 6.104e-5
# Seen in 1.7.1: a scale or zero point that comes to it through these is folded; a computed one crashes the builder.
_FOLDED = ("Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze")
# Seen in 1.7.1: the layer behind these still runs in Int8 where their input is dequantized. Not through Relu, Resize, AveragePool.
_MOVES = ("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Pad", "MaxPool", "Concat")
ACTIVATIONS = ("Relu", "Clip", "LeakyRelu", "HardSigmoid", "HardSwish", "Sigmoid", "Tanh", "Elu", "Selu")


def find(graph: Graph, target: str) -> Iterator[Hit]:
    """Every rule that the graph breaks, as hits on `target` (tensorrt or tensorrt-rtx). Nodes that lack an input are left to
    onnx.checker."""
    half = _has_half(graph)
    for node in graph.nodes:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", *WEIGHTED) and len(node.input) < 2:
            continue
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            for code, detail in _linear(graph, node, half=half):
                yield Hit(code, label(node), detail, target)
        elif node.op_type in INTEGER_OPS or node.op_type.startswith(("QLinear", "QGemm", "QAttention")):
            yield Hit("DK106", label(node), f"is a {node.op_type}", target)
        elif node.op_type in DYNAMIC:
            yield Hit("DK107", label(node), f"is a {node.op_type}", target)
        elif node.op_type in WEIGHTED:
            for code, detail in [*_operands(graph, node), *_before_activation(graph, node)]:
                yield Hit(code, label(node), detail, target)
            # Seen in the plans of 1.7.1: per-tensor and per-channel on either axis, the deconvolution's inputs are Float.
            if node.op_type == "ConvTranspose" and target == "tensorrt-rtx" and _dequantizer(graph, node.input[1])[0] is not None:
                yield Hit("DK115", label(node), "", target)


def quantized_type(graph: Graph, node: onnx.NodeProto) -> int:
    """The integer type (onnx.TensorProto enum) of a Q/DQ node: its zero point's, else what it stores, else uint8, which is
    ONNX's default; 0 when it cannot be told."""
    import onnx

    if len(node.input) > 2 and node.input[2]:
        zero = graph.tensors.get(node.input[2])
        if zero is not None:
            return zero.data_type
        found = _folded(graph, node.input[2])
        return onnx.helper.np_dtype_to_tensor_dtype(found.dtype) if found is not None else 0
    if node.op_type == "QuantizeLinear":
        return int(attribute(node, "output_dtype", 0)) or onnx.TensorProto.UINT8
    stored = graph.tensors.get(node.input[0])
    if stored is not None:
        return stored.data_type
    above = graph.producer.get(node.input[0])
    if above is not None and above.op_type == "QuantizeLinear":
        return quantized_type(graph, above)
    return next((i.type.tensor_type.elem_type for i in graph.model.graph.input if i.name == node.input[0]), 0)


def _has_half(graph: Graph) -> bool:
    import onnx

    return any(t.data_type == onnx.TensorProto.FLOAT16 for t in graph.tensors.values())


def _linear(graph: Graph, node: onnx.NodeProto, *, half: bool) -> Iterator[tuple[str, str]]:
    """What is against one Q or DQ node by itself."""
    import onnx

    types, number = onnx.TensorProto.DataType, quantized_type(graph, node)
    kind = types.Name(number).lower() if number in types.values() else "unknown"
    stored = graph.is_constant(node.input[0])
    has_zero = len(node.input) > 2 and bool(node.input[2])
    scale = _folded(graph, node.input[1])
    zero = _folded(graph, node.input[2]) if has_zero else np.zeros(1, np.int8)
    if scale is None or zero is None:
        yield "DK108", f"takes its {'scale' if scale is None else 'zero point'} from '{node.input[1 if scale is None else 2]}'"
        return
    if kind == "int32" and node.op_type == "DequantizeLinear":
        yield "DK101", f"dequantizes '{node.input[0]}' from int32"
    elif kind in ("int16", "uint16"):
        yield "DK104", f"is {kind}"
    elif kind == "uint8" and stored:
        yield "DK114", f"holds '{node.input[0]}' in uint8"
    elif kind in ("int8", "uint8") and np.any(zero):
        yield "DK102", f"has {kind} zero point {int(zero.reshape(-1)[np.flatnonzero(zero)[0]])}"
    elif kind == "uint8":
        yield "DK103", "is uint8" + ("" if has_zero else ", ONNX's default without a zero point")
    yield from _scales(node, np.asarray(scale, np.float64), stored=stored, half=half)


def _folded(graph: Graph, name: str) -> Array | None:
    """The values (their shape aside) of a tensor that is stored, or comes from a stored one through what the parser folds; None
    for a computed one."""
    import onnx

    casts = []
    while (found := graph.array(name)) is None:
        node = graph.producer.get(name)
        if node is None or node.op_type not in _FOLDED or not all(graph.is_constant(i) for i in node.input):
            return None
        if node.op_type == "Cast":
            casts.append(int(attribute(node, "to", 0)))
        name = node.input[0]
    for to in reversed(casts):
        found = found.astype(onnx.helper.tensor_dtype_to_np_dtype(to))
    return found


def _scales(node: onnx.NodeProto, scale: np.ndarray, *, stored: bool, half: bool) -> Iterator[tuple[str, str]]:
    bad = int((~np.isfinite(scale) | (scale <= 0)).sum())
    if bad:
        yield "DK105", f"has {bad} of {scale.size} scales not positive"
    small = int(((scale > 0) & (scale < FP16_NORMAL)).sum())
    if small and half:
        yield "DK112", f"has {small} of {scale.size} scales under 6.1e-5, the least {scale[scale > 0].min():.3g}"
    if scale.size > 1 and not stored:
        yield "DK109", f"has {scale.size} scales for the activation '{node.input[0]}'"


def _dequantizer(graph: Graph, name: str) -> tuple[onnx.NodeProto | None, list[int] | None]:
    """The DequantizeLinear that makes a tensor, perhaps through a Cast, and the permutation of a Transpose between them (None when
    there is none)."""
    node = graph.producer.get(name)
    perm = None
    while node is not None and node.op_type in ("Transpose", "Cast") and perm is None:
        perm = attribute(node, "perm") if node.op_type == "Transpose" else None
        node = graph.producer.get(node.input[0])
    return (node, perm) if node is not None and node.op_type == "DequantizeLinear" else (None, None)


def _behind_cast(graph: Graph, name: str) -> str | None:
    """The tensor that a Cast of a dequantized one reads; None for any other."""
    node = graph.producer.get(name)
    is_cast = node is not None and node.op_type == "Cast" and _is_dequantized(graph, node.input[0])
    return node.input[0] if node is not None and is_cast else None


def _is_dequantized(graph: Graph, name: str) -> bool:
    """Whether a tensor comes from DequantizeLinear alone, perhaps through nodes that only move values."""
    waiting, seen = [name], set()
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        node = graph.producer.get(current)
        if node is None or not node.input:
            return False
        if node.op_type in _MOVES:
            waiting += node.input if node.op_type == "Concat" else node.input[:1]
        elif node.op_type != "DequantizeLinear":
            return False
    return True


def _operands(graph: Graph, node: onnx.NodeProto) -> Iterator[tuple[str, str]]:
    """The axis of the weight's scales, and whether both operands are quantized."""
    weight, perm = _dequantizer(graph, node.input[1])
    casts = [name for name in node.input[:2] if _behind_cast(graph, name) is not None]
    activation_is, weight_is = (name in casts or _is_dequantized(graph, name) for name in node.input[:2])
    # Seen in 1.7.1: fused away where the result is cast back at once.
    if (casts and any(user.op_type != "Cast" for user, _ in graph.consumers.get(node.output[0], []))) or (
        casts and node.output[0] in graph.outputs
    ):
        yield "DK116", f"({node.op_type}) reads '{casts[0]}', a Cast of what was dequantized"
    if activation_is != weight_is:
        which = "weight" if weight_is else "activation"
        yield "DK111", f"({node.op_type}) has only its {which} quantized"
    if weight is None or not graph.is_constant(weight.input[0]):
        return
    scale = _folded(graph, weight.input[1]) if len(weight.input) > 1 else None
    rank = len(graph.shapes().get(weight.input[0], ()))
    if scale is None or scale.size <= 1 or not rank or attribute(weight, "block_size", 0):
        return
    axis = int(attribute(weight, "axis", 1)) % rank
    axis = perm.index(axis) if perm is not None and axis in perm else axis
    expected = channel_axis(node.op_type, rank, transposed=bool(attribute(node, "transB", 0)))
    if axis != expected:
        yield "DK110", f"({node.op_type}) has its weight's scales along axis {axis}, not {expected}"


def _before_activation(graph: Graph, node: onnx.NodeProto) -> Iterator[tuple[str, str]]:
    for quantize, _ in graph.consumers.get(node.output[0], []):
        if quantize.op_type != "QuantizeLinear":
            continue
        for dequantize, _ in graph.consumers.get(quantize.output[0], []):
            for user, _ in graph.consumers.get(dequantize.output[0], []) if dequantize.op_type == "DequantizeLinear" else []:
                if user.op_type in ACTIVATIONS:
                    yield "DK113", f"and {user.op_type} '{label(user)}' have '{label(quantize)}' between them"
