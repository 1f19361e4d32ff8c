"""Layer: what a plan really runs, read from the builder's own listing, and held against what the graph asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

# The builders' own words for what people know by another name (TensorRT-RTX 1.7's Myelin; full TensorRT's inspector).
_KINDS = {
    "correlation": "convolution",
    "conv": "convolution",
    "convolution": "convolution",
    "caskconvolution": "convolution",
    "cudnnconvolution": "convolution",
    "caskgroupconvolution": "convolution",
    "deconvolution": "deconvolution",
    "caskdeconvolution": "deconvolution",
    "gemm": "gemm",
    "matrixmultiply": "gemm",
    "caskgemmconvolution": "gemm",
    "fully_connected": "gemm",
    "kgen": "pointwise",
    "pointwise": "pointwise",
    "pointwisev2": "pointwise",
    "maxpool": "pooling",
    "avgpool": "pooling",
    "pooling": "pooling",
    "caskpooling": "pooling",
    "runtime_fusion": "fusion",
    "reformat": "reformat",
    "noop": "reformat",
}
# Bookkeeping of streams and shapes: no arithmetic, so they have no precision to report.
_HOUSEKEEPING = frozenset({"shape_call", "signal", "wait", "reformat", "constant", "shape_to_host", "shape_h2d", "jmp"})
_HEAVY = ("convolution", "deconvolution", "gemm")
_DTYPE = re.compile(r"Datatype: (\w+)")
_ONNX = re.compile(r"\[ONNX Layer: (.*?)\](?=[\[\x1e\s]|$)")
_LINE = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), Inputs: \[(?P<inputs>.*)\], Constants: \[(?P<constants>.*)\], "
    r"Outputs: \[(?P<outputs>.*)\], TacticName: (?P<rest>.*)$"
)
UNKNOWN = "unknown"
# Between a DequantizeLinear and the layer that it asks INT8 of.
_PASSED = ("Transpose", "Reshape", "Flatten", "Identity", "Squeeze", "Unsqueeze", "Cast")
QUANTIZED_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class Layer:
    """One layer of a plan: its kind in the field's words, tensor types as the builder names them (Int8, Half, Float),
    and the ONNX nodes it stands for."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    onnx_nodes: tuple[str, ...] = ()

    @property
    def precision(self) -> str:
        """The type the layer computes in: its first input's, since an INT8 convolution of TensorRT-RTX writes Float."""
        return (self.inputs or self.outputs or (UNKNOWN,))[0]


def from_listing(text: str) -> tuple[Layer, ...]:
    """The layers in a DETAILED builder log (TensorRT-RTX 1.7 prints them after 'Layers:', one a line)."""
    found = []
    for line in text.splitlines():
        match = _LINE.match(line.strip())
        if match:
            kind = match["kind"].strip()
            found.append(
                Layer(
                    match["name"],
                    _KINDS.get(kind.lower(), kind.lower()),
                    tuple(_DTYPE.findall(match["inputs"])),
                    tuple(_DTYPE.findall(match["outputs"])),
                    tuple(_ONNX.findall(match["rest"])),
                )
            )
    return tuple(found)


def from_inspector(text: str) -> tuple[Layer, ...]:
    """The layers in the JSON of `IEngineInspector.get_engine_information` (needs a deserialized engine, so a GPU).

    The inspector writes 'Format/Datatype' beside each tensor ('Row major linear FP16 format'), or 'N/A due to dynamic
    shapes': then the type of the layer's weights tells what it computes in, else it is 'unknown'. Without DETAILED
    verbosity there are only names: those layers are left out, since nothing is known of them.
    """
    found = []
    for row in json.loads(text).get("Layers", []):
        if not isinstance(row, dict):
            continue
        kind = str(row.get("LayerType", "unknown"))
        weights = row.get("Weights")
        held = _inspected({"Datatype": weights.get("Type", "")}) if isinstance(weights, dict) else UNKNOWN
        inputs = [_inspected(t) for t in row.get("Inputs", [])]
        found.append(
            Layer(
                str(row.get("Name", "")),
                _KINDS.get(kind.lower(), kind.lower()),
                tuple(held if name == UNKNOWN else name for name in inputs),
                tuple(_inspected(t) for t in row.get("Outputs", [])),
                tuple(_ONNX.findall(str(row.get("Metadata", "")))),
            )
        )
    return tuple(found)


def _inspected(tensor: Mapping[str, Any]) -> str:
    said = str(tensor.get("Format/Datatype", tensor.get("Datatype", ""))).upper()
    for word, name in (
        ("INT8", "Int8"),
        ("FP16", "Half"),
        ("HALF", "Half"),
        ("BF16", "BFloat16"),
        ("BFLOAT16", "BFloat16"),
        ("FP8", "FP8"),
    ):
        if word in said:
            return name
    if not said or said.startswith("N/A"):
        return UNKNOWN
    return "Float" if "FP32" in said or "FLOAT" in said else said.title()


def by_kind(layers: Iterable[Layer]) -> dict[str, dict[str, int]]:
    """How many layers of each kind run in each precision: {'convolution': {'Int8': 20}, 'pointwise': {'Half': 3}}."""
    table: dict[str, dict[str, int]] = {}
    for layer in layers:
        if layer.kind not in _HOUSEKEEPING:
            row = table.setdefault(layer.kind, {})
            row[layer.precision] = row.get(layer.precision, 0) + 1
    return {kind: dict(sorted(row.items())) for kind, row in sorted(table.items())}


@dataclass(frozen=True)
class Asked:
    """A convolution or matrix product of the graph: the precision its Q/DQ nodes or weights ask for."""

    node: str
    op: str
    precision: str


def asked(model: onnx.ModelProto) -> tuple[Asked, ...]:
    """What each convolution and matrix product of an ONNX graph asks for.

    Int8 when a DequantizeLinear feeds its data or its weight; else Half where its weight is float16, else Float.
    """
    maker = {output: node for node in model.graph.node for output in node.output if output}
    half = _Half(model, maker)

    def source(name: str) -> onnx.NodeProto | None:
        node = maker.get(name)
        while node is not None and node.op_type in _PASSED:
            name = node.input[0]
            node = maker.get(name)
        return node

    found = []
    for node in model.graph.node:
        if node.op_type not in QUANTIZED_OPS:
            continue
        feeders = [source(name) for name in node.input[:2]]
        quantized = any(f is not None and f.op_type == "DequantizeLinear" for f in feeders)
        precision = "Int8" if quantized else "Half" if any(half.holds(name) for name in node.input[:2]) else "Float"
        found.append(Asked(node.name, node.op_type, precision))
    return tuple(found)


class _Half:
    """Which tensors are float16: by their recorded type, else by what their makers say, else by what those read."""

    def __init__(self, model: onnx.ModelProto, maker: Mapping[str, onnx.NodeProto]) -> None:
        import onnx

        self._float16 = onnx.TensorProto.FLOAT16
        self._maker = maker
        types = {t.name: t.data_type for t in model.graph.initializer}
        types.update({v.name: v.type.tensor_type.elem_type for v in [*model.graph.value_info, *model.graph.input]})
        self._known: dict[str, bool] = {name: kind == self._float16 for name, kind in types.items()}

    def holds(self, name: str) -> bool:
        """Whether the tensor is float16. A walk, not a recursion: graphs without recorded types are thousands of nodes deep."""
        trail = []
        while name not in self._known:
            trail.append(name)
            node = self._maker.get(name)
            told = self._told(node)
            if told is not None:
                self._known[name] = told
            else:
                assert node is not None
                name = node.input[1 if node.op_type in ("DequantizeLinear", "Where") and len(node.input) > 1 else 0]
        for passed in trail:
            self._known[passed] = self._known[name]
        return self._known[name]

    def _told(self, node: onnx.NodeProto | None) -> bool | None:
        """What the maker itself says of its output's type; None where it has its input's."""
        if node is None or (not node.input and node.op_type != "Constant"):
            return False
        if node.op_type == "Cast":
            return any(a.name == "to" and a.i == self._float16 for a in node.attribute)
        if node.op_type == "Constant":
            return any(a.HasField("t") and a.t.data_type == self._float16 for a in node.attribute)
        return None


@dataclass(frozen=True)
class Shortfall:
    """A node that asked for INT8 and runs in something else."""

    node: str
    op: str
    actual: str


def shortfalls(wanted: Iterable[Asked], layers: Iterable[Layer]) -> tuple[Shortfall, ...]:
    """The nodes that asked for Int8 and whose layer computes in another type, in graph order.

    A node of which the listing tells nothing is not among them: see `unseen`.
    """
    actual = _computing(layers)
    return tuple(
        Shortfall(want.node, want.op, actual[want.node])
        for want in wanted
        if want.precision == "Int8" and actual.get(want.node, "Int8") != "Int8"
    )


def unseen(wanted: Iterable[Asked], layers: Iterable[Layer]) -> tuple[Asked, ...]:
    """The nodes that asked for Int8 and of which the listing does not tell what they run in: folded, fused into a layer that
    names no nodes or does other work too, or of unknown type."""
    actual = _computing(layers)
    return tuple(want for want in wanted if want.precision == "Int8" and want.node not in actual)


def _computing(layers: Iterable[Layer]) -> dict[str, str]:
    """Node -> the type that the first layer computes in which does the node's own work and says its type."""
    actual: dict[str, str] = {}
    for layer in layers:
        if (layer.kind in _HEAVY or layer.kind == "fusion") and layer.precision != UNKNOWN:
            for node in layer.onnx_nodes:
                actual.setdefault(node, layer.precision)
    return actual


def requested(wanted: Iterable[Asked]) -> dict[str, dict[str, int]]:
    """How many nodes of each operator ask for each precision: {'Conv': {'Int8': 20}, 'Gemm': {'Half': 1}}."""
    table: dict[str, dict[str, int]] = {}
    for want in wanted:
        row = table.setdefault(want.op, {})
        row[want.precision] = row.get(want.precision, 0) + 1
    return {op: dict(sorted(row.items())) for op, row in sorted(table.items())}
