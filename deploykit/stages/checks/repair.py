"""Repairs that leave what the model computes as it is.

| finding | repair | why it is the same |
|---|---|---|
| DK101 | int32 DequantizeLinear of a stored tensor -> float tensor | the same product, computed once |
| DK102, DK103, DK114 | stored uint8 or int8 values with a zero point -> int8 without, where they fit | (q - z) * s |
| DK102 | uint8 activations with zero point 128 -> int8 with 0 | both ends of the range move by 128 |
| DK105 | zero scale of a channel whose values are zero -> a positive scale | 0 * s = 0 |
| DK034, DK035 | unused and duplicate initializers go | no node can tell |
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deploykit.graph import attribute
from deploykit.stages.checks import weights
from deploykit.stages.checks.context import Array, Graph, label
from deploykit.stages.checks.tensorrt import quantized_type

if TYPE_CHECKING:
    import onnx

_SPARE_SCALE = 2.0**-7  # exact in FP16, and a normal value there


def repair(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """A repaired copy of the model, and a line for each repair made (empty when there was nothing to repair).

    Outputs stay equal to the original's where Q/DQ nodes are computed literally; an engine that fuses them into integer
    kernels may round differently.
    """
    copy = type(model)()
    copy.CopyFrom(model)
    done: list[str] = []
    for step in (_float_biases, _shift_stored, _shift_activations, _zero_scales, _share_duplicates, _drop_unused):
        done += step(Graph(copy, Path()))
    return copy, done


def _main(graph: Graph, op_type: str) -> list[onnx.NodeProto]:
    return [node for node in graph.model.graph.node if node.op_type == op_type]


def _add(graph: Graph, wanted: str, values: Array, data_type: int) -> str:
    """Stores a tensor under a name that nothing has yet."""
    import onnx

    taken = set(graph.tensors) | set(graph.producer) | {i.name for i in graph.model.graph.input}
    name, number = wanted, 1
    while name in taken:
        name, number = f"{wanted}_{number}", number + 1
    tensor = onnx.numpy_helper.from_array(
        np.ascontiguousarray(values.astype(onnx.helper.tensor_dtype_to_np_dtype(data_type))), name
    )
    graph.model.graph.initializer.append(tensor)
    graph.tensors[name] = tensor
    return name


def _forget_shapes(graph: Graph, names: set[str]) -> None:
    """Drops recorded types that are no longer true."""
    kept = [v for v in graph.model.graph.value_info if v.name not in names]
    del graph.model.graph.value_info[:]
    graph.model.graph.value_info.extend(kept)


def _float_biases(graph: Graph) -> list[str]:
    import onnx

    done = []
    for node in _main(graph, "DequantizeLinear"):
        stored = graph.tensors.get(node.input[0])
        if stored is None or stored.data_type != onnx.TensorProto.INT32:
            continue
        values, scale = graph.constant(node.output[0]), graph.tensors.get(node.input[1])
        if values is None or scale is None:
            continue
        name = node.output[0]
        tensor = _add(graph, f"{name}_float", values, scale.data_type)
        _replace_input(graph, name, tensor)
        if name in graph.outputs:
            continue
        graph.model.graph.node.remove(node)
        _forget_shapes(graph, {name})
        done.append(f"DK101: '{label(node)}' became the float tensor '{tensor}'")
    return done


def _replace_input(graph: Graph, old: str, new: str) -> None:
    for node, index in graph.consumers.get(old, []):
        node.input[index] = new


def _zero_like(graph: Graph, node: onnx.NodeProto, name: str) -> str:
    """An int8 zero point of the shape of a node's scale."""
    import onnx

    scale = graph.tensors[node.input[1]]
    return _add(graph, name, np.zeros(tuple(scale.dims)), onnx.TensorProto.INT8)


def _shift_stored(graph: Graph) -> list[str]:
    """Stored int8/uint8 values lose their zero point where they fit into int8 without it."""
    import onnx

    done = []
    for node in _main(graph, "DequantizeLinear"):
        values = graph.array(node.input[0])
        if values is None or len(node.input) < 3 or graph.array(node.input[2]) is None or node.input[1] not in graph.tensors:
            continue
        zero = np.asarray(graph.array(node.input[2]))
        if values.dtype.name not in ("int8", "uint8") or (values.dtype.name == "int8" and not np.any(zero)):
            continue
        shifted = _without_zero(node, values, zero)
        if shifted is None or shifted.min(initial=0) < -128 or shifted.max(initial=0) > 127:
            continue
        node.input[0], node.input[2] = (
            _add(graph, f"{node.input[0]}_int8", shifted, onnx.TensorProto.INT8),
            _zero_like(graph, node, f"{node.input[0]}_zero"),
        )
        done.append(f"DK102: '{label(node)}' holds int8 values without a zero point")
    return done


def _without_zero(node: onnx.NodeProto, values: Array, zero: Array) -> Array | None:
    if zero.size > 1:
        axis = attribute(node, "axis", 1)
        if zero.ndim != 1 or not -values.ndim <= axis < values.ndim or values.shape[axis] != zero.size:
            return None
        zero = zero.reshape([-1 if i == axis % values.ndim else 1 for i in range(values.ndim)])
    shifted: Array = values.astype(np.int32) - zero.astype(np.int32)
    return shifted


def _shift_activations(graph: Graph) -> list[str]:
    """uint8 activations with zero point 128 become int8 with 0, in the Q node and all of its DQ nodes together."""
    import onnx

    done = []
    for node in _main(graph, "QuantizeLinear"):
        users = [user for user, _ in graph.consumers.get(node.output[0], [])]
        pair = [node, *users]
        if node.output[0] in graph.outputs or not users or any(u.op_type != "DequantizeLinear" for u in users):
            continue
        if not all(_is_offset_uint8(graph, n) for n in pair):
            continue
        for member in pair:
            member.input[2] = _zero_like(graph, member, f"{node.output[0]}_zero")
            for index in reversed([i for i, a in enumerate(member.attribute) if a.name == "output_dtype"]):
                if quantized_type(graph, member) == onnx.TensorProto.INT8 and member.op_type == "QuantizeLinear":
                    del member.attribute[index]
        _forget_shapes(graph, {node.output[0]})
        done.append(f"DK102: '{label(node)}' and its DequantizeLinear are int8 with zero point 0")
    return done


def _is_offset_uint8(graph: Graph, node: onnx.NodeProto) -> bool:
    zero = graph.array(node.input[2]) if len(node.input) > 2 else None
    return zero is not None and zero.dtype == np.uint8 and bool(np.all(zero == 128)) and node.input[1] in graph.tensors


def _zero_scales(graph: Graph) -> list[str]:
    """A zero scale over a channel of zeros becomes positive."""
    import onnx

    done = []
    for node in _main(graph, "DequantizeLinear"):
        values, scale = graph.array(node.input[0]), graph.array(node.input[1])
        if values is None or scale is None or np.all(scale > 0) or attribute(node, "block_size", 0):
            continue
        zero = graph.array(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(scale.shape, np.int32)
        shifted = None if zero is None else _without_zero(node, values, zero)
        axis = attribute(node, "axis", 1)
        fits = scale.size == 1 or (-values.ndim <= axis < values.ndim and values.shape[axis] == scale.size)
        if shifted is None or not fits:
            continue
        rows = shifted.reshape(1, -1) if scale.size == 1 else np.moveaxis(shifted, axis, 0).reshape(scale.size, -1)
        empty = (scale.reshape(-1) == 0) & ~np.any(rows, axis=1)
        if not empty.any():
            continue
        positive = np.where(empty.reshape(scale.shape), np.asarray(_SPARE_SCALE, scale.dtype), scale)
        kind = onnx.helper.np_dtype_to_tensor_dtype(scale.dtype)
        node.input[1] = _add(graph, f"{node.input[1]}_positive", positive, kind)
        done.append(f"DK105: '{label(node)}' has a positive scale on {int(empty.sum())} channels of zeros")
    return done


def _share_duplicates(graph: Graph) -> list[str]:
    done = []
    for name, first in weights.duplicates(graph).items():
        _replace_input(graph, name, first)
        done.append(f"DK035: '{name}' is '{first}'")
    return done


def _drop_unused(graph: Graph) -> list[str]:
    fed = {i.name for i in graph.model.graph.input}
    names = {name for name in weights.unused(graph) if name not in fed}
    kept = [t for t in graph.model.graph.initializer if t.name not in names]
    if len(kept) == len(graph.model.graph.initializer):
        return []
    gone = [t.name for t in graph.model.graph.initializer if t.name in names]
    del graph.model.graph.initializer[:]
    graph.model.graph.initializer.extend(kept)
    return [f"DK034: '{name}' is removed" for name in gone]
