"""The stored values: NaN, Inf, denormals, dead channels, unused and duplicate tensors, and what FP16 would do to them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from deploykit.graph import attribute
from deploykit.stages.checks.codes import MODEL, Hit
from deploykit.stages.checks.context import Array, Graph, label

FP16_MAX = 65504.0
FP16_TINY = 6e-8  # the smallest subnormal is 5.96e-8
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
VANISH_SHARE = 1e-3  # below it, vanishing weights aren't worth a line
_MASK = 60000.0


@dataclass(frozen=True)
class Weight:
    """The second operand of a Conv, ConvTranspose, Gemm or MatMul, in float, and the axis of its output channels."""

    node: str
    name: str
    values: Array
    axis: int

    @property
    def per_channel(self) -> Array:
        """The values as [output channels, rest]."""
        return np.moveaxis(self.values, self.axis, 0).reshape(self.values.shape[self.axis], -1)


def channel_axis(op_type: str, rank: int, *, transposed: bool = False) -> int:
    """The axis of a weight that counts output channels: Conv [out, in, ...], ConvTranspose [in, out, ...], Gemm [in, out]
    or [out, in] with transB, MatMul [..., in, out]. From the operators' definitions in ONNX."""
    if op_type == "Conv" or (op_type == "Gemm" and transposed):
        return 0
    return rank - 1 if op_type == "MatMul" else 1


def weights(graph: Graph) -> Iterator[Weight]:
    """Every constant weight operand, dequantized where it is stored quantized."""
    for node in graph.nodes:
        if node.op_type not in WEIGHTED or len(node.input) < 2:
            continue
        values = graph.constant(node.input[1])
        if values is None or values.ndim < 2 or 0 in values.shape:
            continue
        axis = channel_axis(node.op_type, values.ndim, transposed=bool(attribute(node, "transB", 0)))
        yield Weight(label(node), node.input[1], values, axis)


def find(graph: Graph) -> Iterator[Hit]:
    """Every finding on stored values."""
    for name in graph.tensors:
        if name in graph.consumers or name in graph.outputs:
            yield from _values(graph, name)
    for weight in weights(graph):
        dead = int((~np.any(weight.per_channel, axis=1)).sum())
        if dead:
            yield Hit("DK033", weight.node, f"has {dead} of {weight.values.shape[weight.axis]} channels dead ('{weight.name}')")
    yield from _stored_twice_or_never(graph)
    yield from _epsilons(graph)


def floats(values: Array) -> Array | None:
    """The values as float32 or float64 where they are of a floating type, else None."""
    if values.dtype.kind == "f":
        return values
    if values.dtype.name in ("bfloat16",) or values.dtype.name.startswith("float8"):
        return values.astype(np.float32)
    return None


def _values(graph: Graph, name: str) -> Iterator[Hit]:
    stored = graph.array(name)
    values = None if stored is None else floats(stored)
    if stored is None or values is None or not values.size:
        return
    users = [node for node, _ in graph.consumers.get(name, [])]
    user = label(users[0]) if users else ""
    of = f" (used by {user})" if user else ""
    magnitude = np.abs(values)
    largest = float(magnitude.max())  # NaN propagates through max, and Inf is the largest: one pass tells both
    if not np.isfinite(largest):
        nan, inf = int(np.isnan(values).sum()), int(np.isinf(values).sum())
        if nan:
            yield Hit("DK030", name, f"has {nan} NaN in {values.size} values{of}", MODEL)
        if inf and values.size > 1 and any(n.op_type in WEIGHTED for n in users):
            yield Hit("DK031", name, f"has {inf} Inf in {values.size} values{of}", MODEL)
        magnitude = magnitude[np.isfinite(magnitude)]
        if not magnitude.size:
            return
    if stored.dtype.name in ("float32", "float64"):
        denormal = int(((magnitude < np.finfo(np.float32).tiny) & (magnitude > 0)).sum())
        if denormal:
            yield Hit("DK032", name, f"has {denormal} denormals in {values.size} values{of}")
        yield from _fp16(name, values.size, magnitude, of)


def _fp16(name: str, size: int, magnitude: Array, of: str) -> Iterator[Hit]:
    largest = float(magnitude.max())
    if largest > FP16_MAX:
        over = int((magnitude > FP16_MAX).sum())
        if size == 1:
            yield Hit("DK042", name, f"is {largest:.4g}{of}")
        else:
            yield Hit(
                "DK040", name, f"has {over} of {size} values ({100 * over / size:.3g} %) above 65504, up to {largest:.4g}{of}"
            )
    vanishing = int(((magnitude < FP16_TINY) & (magnitude > 0)).sum())
    if vanishing and size == 1:
        yield Hit("DK043", name, f"is {float(magnitude.max()):.4g}{of}")
    elif vanishing > VANISH_SHARE * size:
        yield Hit("DK041", name, f"has {vanishing} of {size} values ({100 * vanishing / size:.3g} %) under 6e-8{of}")


def _epsilons(graph: Graph) -> Iterator[Hit]:
    """Attributes that FP16 cannot hold: epsilons, and the values of ConstantOfShape."""
    for node in graph.nodes:
        epsilon = attribute(node, "epsilon")
        if isinstance(epsilon, float) and 0 < epsilon < FP16_TINY:
            yield Hit("DK043", label(node), f"has epsilon {epsilon:.3g}")
        if node.op_type == "ConstantOfShape":
            import onnx

            value = attribute(node, "value")
            fill = 0.0 if value is None else float(onnx.numpy_helper.to_array(value).reshape(-1)[0])
            if np.isfinite(fill) and abs(fill) > FP16_MAX:
                yield Hit("DK042", label(node), f"fills with {fill:.4g}")


def duplicates(graph: Graph) -> dict[str, str]:
    """Initializers of the main graph that hold the same type, shape and values as an earlier one: name -> the earlier's.

    Single values are left out: sharing them saves nothing.
    """
    seen: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    found: dict[str, str] = {}
    fed = {i.name for i in graph.model.graph.input}
    for tensor in graph.model.graph.initializer:
        values = graph.array(tensor.name)
        if values is None or values.size <= 1 or values.dtype.kind == "O" or tensor.name in fed or tensor.name in graph.outputs:
            continue
        digest = hashlib.blake2b(np.ascontiguousarray(values).tobytes(), digest_size=16).digest()
        first = seen.setdefault((tensor.data_type, tuple(tensor.dims), digest), tensor.name)
        if first != tensor.name:
            found[tensor.name] = first
    return found


def unused(graph: Graph) -> list[str]:
    """Initializers that no node and no output reads."""
    return [t.name for t in graph.initializers if t.name not in graph.consumers and t.name not in graph.outputs]


def _stored_twice_or_never(graph: Graph) -> Iterator[Hit]:
    for name in unused(graph):
        size = graph.array(name)
        yield Hit("DK034", name, f"({size.nbytes if size is not None else 0} bytes)")
    scales = {
        n.input[i]
        for n in graph.nodes
        if n.op_type.endswith("quantizeLinear") or n.op_type == "QuantizeLinear"
        for i in (1, 2)
        if len(n.input) > i
    }
    for name, first in duplicates(graph).items():
        values = graph.array(name)
        if name not in scales and values is not None:
            yield Hit("DK035", name, f"repeats '{first}' ({values.nbytes} bytes)")
