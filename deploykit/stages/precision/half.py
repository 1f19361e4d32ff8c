"""FP16: every operator that ONNX defines for float16 computes in it; inputs and outputs of the model stay in float32."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deploykit.artifact import Json
from deploykit.graph import attribute
from deploykit.stages.precision.view import FloatGraph, bodies, tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx

    from deploykit.calibration_table import Range

HALF_MAX = 65504.0  # largest finite FP16
HALF_MIN = 2.0**-24  # smallest positive FP16 (a subnormal)
HALF_NORMAL = 2.0**-14  # smallest normal FP16; a tensor that stays below has fewer than 10 bits
HEADROOM = 2.0  # an activation seen above HALF_MAX / HEADROOM may overflow on other data
_SHOWN = 50

# Sums of squares, products and exponentials leave FP16's range on ordinary data.
_SENSITIVE = frozenset(
    {"Pow", "ReduceSumSquare", "ReduceL2", "ReduceProd", "ReduceLogSum", "ReduceLogSumExp", "CumSum", "Range", "Exp"}
)
_BIASED = frozenset({"Conv", "ConvTranspose", "Gemm"})  # their third input is added to the result
# What follows a sensitive operator and brings its values back into range (a variance, its root, its reciprocal).
_FOLLOWS = frozenset({"ReduceMean", "ReduceSum", "Add", "Sqrt", "Reciprocal", "Div"})


@dataclass
class HalfWriter:
    """Converts one graph. `observed`: the extremes of its activations, where a calibration table has them.

    left: node -> why it stays in float32. vanished: constants some of whose values become zero.
    """

    graph: FloatGraph
    observed: Mapping[str, Range] | None = None
    left: dict[int, str] = field(default_factory=dict)
    vanished: list[dict[str, Json]] = field(default_factory=list)
    _inputs: dict[int, set[int]] = field(default_factory=dict)
    _outputs: dict[int, set[int]] = field(default_factory=dict)

    def write(self) -> dict[str, Json]:
        """Rewrites the graph's model in place; returns the facts."""
        for i in range(len(self.graph.nodes)):
            self._decide(i)
        self._keep_dequantizers()
        half = sum(1 for slots in self._outputs.values() if slots)
        self._rewrite()
        return {
            "half_nodes": half,
            "left_in_float": [
                {"node": self.graph.nodes[i].name, "operator": self.graph.nodes[i].op_type, "reason": reason}
                for i, reason in sorted(self.left.items())
            ],
            "vanished": self.vanished[:_SHOWN],
            "vanished_constants": len(self.vanished),
        }

    def _decide(self, i: int) -> None:
        """Which inputs and outputs of a node are FP16, by the operator's own type constraints."""
        node = self.graph.nodes[i]
        floats = [n for n in [*node.input, *node.output] if n and self.graph.is_float(n)]
        if not floats:
            return
        reason, inputs, outputs = _slots(self.graph, node)
        reason = reason or self._range_reason(i)
        if reason is not None:
            self.left[i] = reason
        elif inputs:
            self._inputs[i], self._outputs[i] = inputs, outputs

    def _keep_dequantizers(self) -> None:
        """A DequantizeLinear that only nodes in float32 read gives float32 itself: TensorRT-RTX (1.7.1) runs a layer in Float where
        a Cast stands between the two."""
        for i in [i for i in self._inputs if self.graph.nodes[i].op_type == "DequantizeLinear"]:
            name = self.graph.nodes[i].output[0]
            readers = [reader for reader, _ in self.graph.consumers.get(name, ())]
            if readers and all(r in self.left for r in readers) and name not in self.graph.outputs | self.graph.captured:
                del self._inputs[i], self._outputs[i]

    def _range_reason(self, i: int) -> str | None:
        node = self.graph.nodes[i]
        if node.op_type in _SENSITIVE:
            return f"{node.op_type} leaves FP16's range on ordinary values"
        if node.op_type in _FOLLOWS:
            before = self.graph.producer.get(node.input[0], -1)
            if before in self.left and "FP16" in self.left[before]:
                return f"it takes what is beyond FP16 from '{self.graph.nodes[before].name}'"
        for k, name in enumerate(node.input):
            if name in self.graph.constants and self.graph.is_float(name):
                found = self._constant_reason(name, bias=k == 2 and node.op_type in _BIASED)
                if found:
                    return found
        for name in [*node.input, *node.output]:
            seen = (self.observed or {}).get(name)
            if seen is not None and seen.amax > HALF_MAX / HEADROOM:
                return f"its tensor '{name}' reached {seen.amax:.3g}; FP16 ends at {HALF_MAX:.0f}"
            if seen is not None and 0.0 < seen.amax < HALF_NORMAL:
                return f"its tensor '{name}' stays under {seen.amax:.1g}, where FP16 has few digits or none"
        return None

    def _constant_reason(self, name: str, *, bias: bool) -> str | None:
        """What is against a constant in FP16. A small bias loses nothing: what rounding it shifts the result by, 2^-25 at most, is
        no more than rounding the result itself."""
        values = np.abs(self.graph.array(name).astype(np.float64)).reshape(-1)
        if values.size == 0:
            return None
        if values.max() > HALF_MAX:
            return f"its constant '{name}' holds {values.max():.3g}; FP16 ends at {HALF_MAX:.0f}"
        if bias:
            return None
        if values.size == 1 and 0 < values[0] < HALF_MIN:
            return f"its constant '{name}', {values[0]:.3g}, would be zero in FP16"
        if values.size > 1 and 0 < values.max() < HALF_NORMAL:
            return f"its constant '{name}' stays under {values.max():.1g}, where FP16 has few digits or none"
        return None

    def _rewrite(self) -> None:
        """Casts where FP16 and float32 meet: one a tensor and direction."""
        import onnx

        nodes: list[onnx.NodeProto] = []
        as_half: dict[str, str] = {}  # tensor -> name of its FP16 value
        as_float: dict[str, str] = {}  # FP16 tensor -> name of its float32 value
        half_named: dict[str, str] = {}  # tensor made in FP16 -> its name now
        for i, node in enumerate(self.graph.nodes):
            for k, name in enumerate(list(node.input)):
                wants = k in self._inputs.get(i, ())
                if wants and name not in half_named:
                    node.input[k] = self._half_of(name, as_half, nodes)
                elif wants:
                    node.input[k] = half_named[name]
                elif name in half_named:
                    node.input[k] = self._float_of(name, half_named[name], as_float, nodes)
            nodes.append(node)
            for k, name in enumerate(list(node.output)):
                if k not in self._outputs.get(i, ()):
                    continue
                half_named[name] = name
                if name in self.graph.outputs or name in self.graph.captured:
                    half_named[name] = node.output[k] = self.graph.fresh(f"{name}_half")
                    nodes.append(_cast(node.output[k], name, onnx.TensorProto.FLOAT, self.graph))
                    as_float[name] = name
        self.graph.write_back(nodes)

    def _half_of(self, name: str, as_half: dict[str, str], nodes: list[onnx.NodeProto]) -> str:
        import onnx

        if name not in as_half:
            as_half[name] = self.graph.fresh(f"{name}_half")
            if name in self.graph.constants:
                self.graph.constants[as_half[name]] = tensor(as_half[name], self._rounded(name))
            else:
                nodes.append(_cast(name, as_half[name], onnx.TensorProto.FLOAT16, self.graph))
        return as_half[name]

    def _float_of(self, name: str, half: str, as_float: dict[str, str], nodes: list[onnx.NodeProto]) -> str:
        import onnx

        if name not in as_float:
            as_float[name] = self.graph.fresh(f"{name}_float")
            nodes.append(_cast(half, as_float[name], onnx.TensorProto.FLOAT, self.graph))
        return as_float[name]

    def _rounded(self, name: str) -> NDArray[Any]:
        values = self.graph.array(name)
        half = values.astype(np.float16)
        lost = int(np.count_nonzero(values)) - int(np.count_nonzero(half))
        if lost:
            self.vanished.append({"constant": name, "values": lost, "of": int(values.size)})
        return half


def _cast(source: str, result: str, to: int, graph: FloatGraph) -> onnx.NodeProto:
    import onnx

    return onnx.helper.make_node("Cast", [source], [result], name=graph.fresh(f"{result}_Cast"), to=to)


def _slots(graph: FloatGraph, node: onnx.NodeProto) -> tuple[str | None, set[int], set[int]]:
    """(why the node stays in float32 or None, its inputs that may be FP16, its outputs that then are)."""
    import onnx

    if any(True for _ in bodies(node)):
        return "a control-flow node", set(), set()
    unknown = [n for n in [*node.input, *node.output] if n and n not in graph.elem_types]
    if unknown:
        return f"the type of '{unknown[0]}' is not known", set(), set()
    try:
        schema = onnx.defs.get_schema(node.op_type, graph.opset, "")
    except onnx.defs.SchemaError:
        return f"'{node.domain or 'ai.onnx'}' {node.op_type} is not one of ONNX's operators", set(), set()
    if node.domain not in ("", "ai.onnx"):
        return f"operator of domain '{node.domain}'", set(), set()
    allowed = {c.type_param_str: "tensor(float16)" in c.allowed_type_strs for c in schema.type_constraints}
    halves: set[str] = set()
    inputs: set[int] = set()
    for k, name in enumerate(node.input):
        kind = schema.inputs[min(k, len(schema.inputs) - 1)].type_str
        if not name or not graph.is_float(name) or kind not in allowed:
            continue  # no float, or an input that ONNX defines as float32 (Resize's scales)
        if not allowed[kind]:
            return f"ONNX defines no FP16 {node.op_type} at opset {graph.opset}", set(), set()
        halves.add(kind)
        inputs.add(k)
    outputs = set()
    for k, name in enumerate(node.output):
        kind = schema.outputs[min(k, len(schema.outputs) - 1)].type_str
        follows_scale = node.op_type == "DequantizeLinear" and 1 in inputs and not attribute(node, "output_dtype", 0)
        if name and graph.is_float(name) and (kind in halves or follows_scale):
            outputs.add(k)
    return None, inputs, outputs
