"""The form every precision starts from: constants in initializers, batch normalization folded, types known."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deploykit import graph as graphs
from deploykit import observation
from deploykit.errors import ModelError
from deploykit.graph import attribute
from deploykit.stages.precision.view import FloatGraph, bodies, tensor

if TYPE_CHECKING:
    import onnx

MIN_OPSET = 13  # QuantizeLinear and DequantizeLinear take an axis from there on
_UPGRADE_TO = 17
_QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger", "QGemm")
_FOLDABLE = frozenset({"Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Cast", "Flatten"})
_MAX_FOLD_BYTES = 256 << 20


def load(path: Path, opset: int = MIN_OPSET) -> tuple[FloatGraph, str]:
    """The float graph of an .onnx file in normal form, and `graph.digest` of the file's model.

    Raises ModelError for a file that is no model, and for one that is quantized already.
    """
    model = graphs.load(path)
    digest = graphs.digest(model)
    _refuse_quantized(model, path)
    return normalize(model, path, opset), digest


def normalize(model: onnx.ModelProto, path: Path, opset: int) -> FloatGraph:
    """The normal form of a model (which is changed): at least that opset; Constant nodes, and cheap operators on
    constants, are initializers; batch normalization is folded into the convolution before it; a mean over all spatial
    axes is a GlobalAveragePool; an initializer is no input any more (nothing can then override a weight that is quantized).
    """
    import onnx

    graphs.strip_metadata(model)
    stored = {t.name for t in model.graph.initializer}
    kept = [v for v in model.graph.input if v.name not in stored]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    model = observation.inlined(model)  # onnx's version converter (1.23) drops functions, and what is inside can be quantized too
    model = raise_opset(model, path, opset)
    nodes = []
    for node in model.graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        nodes.append(copy)
    graph = FloatGraph(model, nodes, {t.name: t for t in _detached(model.graph.initializer)}, {}, {})
    graph.index()
    _name_nodes(graph)
    _fold_constants(graph)
    _infer(graph)
    _fold_batch_norm(graph)
    _pool_means(graph)
    graph.index()
    return graph


def raise_opset(model: onnx.ModelProto, path: Path, wanted: int) -> onnx.ModelProto:
    """The model at opset `wanted` or above. Raises ModelError where onnx cannot convert it."""
    import onnx
    from onnx import version_converter

    found = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), None)
    if found is None:
        raise ModelError(f"{path.name} does not use ONNX's own operators", "its precision cannot be changed")
    if found >= wanted:
        return model
    # From IR 4 on an initializer needs no graph input of its own, and `normalize` has taken those inputs away.
    model.ir_version = max(model.ir_version, 9)
    problem: Exception | None = None
    for target in dict.fromkeys((max(wanted, _UPGRADE_TO), wanted)):
        try:
            converted = version_converter.convert_version(model, target)
            onnx.checker.check_model(converted)
        except Exception as exc:  # the converter raises RuntimeError, ValueError and its own ConvertError
            problem = problem or exc
        else:
            converted.ir_version = max(converted.ir_version, 9)
            return converted
    assert problem is not None
    reason = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
    raise ModelError(
        f"{path.name} has opset {found}; this precision needs {wanted} or more, and onnx cannot convert it: {reason}",
        f"export the model again with opset {max(wanted, _UPGRADE_TO)}; as it is, its fp32 rows run",
    ) from problem


def _detached(tensors: list[onnx.TensorProto]) -> list[onnx.TensorProto]:
    copies = []
    for found in tensors:
        copy = type(found)()
        copy.CopyFrom(found)
        copies.append(copy)
    return copies


def _refuse_quantized(model: onnx.ModelProto, path: Path) -> None:
    def visit(nodes: list[onnx.NodeProto]) -> None:
        for node in nodes:
            if node.op_type in _QUANTIZED or node.op_type.startswith("QLinear"):
                raise ModelError(
                    f"{path.name} is quantized already: node '{node.name}' is a {node.op_type}",
                    "give the float model it was made from",
                )
            for body in bodies(node):
                visit(list(body.node))

    visit(list(model.graph.node))
    for function in model.functions:
        visit(list(function.node))


def _name_nodes(graph: FloatGraph) -> None:
    seen: set[str] = set()
    for node in graph.nodes:
        if not node.name or node.name in seen:
            node.name = graph.fresh(node.name or f"{node.op_type}_{node.output[0]}")
        seen.add(node.name)


def _fold_constants(graph: FloatGraph) -> None:
    """Constant nodes, and views and casts of constants, become initializers; a constant the caller asks for stays."""
    from onnx.reference import ReferenceEvaluator

    kept = []
    for node in graph.nodes:
        foldable = node.domain in ("", "ai.onnx") and (node.op_type == "Constant" or node.op_type in _FOLDABLE)
        known = all(name in graph.constants for name in node.input if name)
        small = sum(graph.constants[n].ByteSize() for n in node.input if n in graph.constants) < _MAX_FOLD_BYTES
        if not (foldable and known and small) or node.output[0] in graph.outputs:
            kept.append(node)
            continue
        feeds = {name: graph.array(name) for name in node.input if name}
        (value,) = ReferenceEvaluator(_alone(graph, node)).run(None, feeds)
        value = np.asarray(value)
        if value.dtype.kind not in "fiub":  # strings and exotic types stay as they are
            kept.append(node)
            continue
        graph.constants[node.output[0]] = tensor(node.output[0], value)
    graph.nodes = kept
    graph.index()


def _alone(graph: FloatGraph, node: onnx.NodeProto) -> onnx.ModelProto:
    import onnx

    def info(name: str) -> onnx.ValueInfoProto:
        return onnx.helper.make_tensor_value_info(name, graph.constants[name].data_type, None)

    inputs = [info(name) for name in dict.fromkeys(node.input) if name]
    outputs = [onnx.helper.make_empty_tensor_value_info(name) for name in node.output]
    body = onnx.helper.make_graph([node], "constant", inputs, outputs)
    return onnx.helper.make_model(body, opset_imports=list(graph.model.opset_import), ir_version=10)


def _infer(graph: FloatGraph) -> None:
    import onnx

    graph.write_back(graph.nodes)
    found = graph.model
    if graphs.fits_inline(found):
        try:
            found = onnx.shape_inference.infer_shapes(found, data_prop=True)
        except Exception as exc:
            raise ModelError(f"onnx cannot infer the types of this graph: {exc}", "see `deploykit check`") from exc
    for value, known in zip(graph.model.graph.output, found.graph.output, strict=True):
        if value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape"):
            value.CopyFrom(known)  # engines do without; the standard, and onnx's full check, do not
    for value in [*found.graph.input, *found.graph.output, *found.graph.value_info]:
        kind = value.type.tensor_type
        if not kind.elem_type:
            continue
        graph.elem_types[value.name] = kind.elem_type
        if kind.HasField("shape"):
            graph.shapes[value.name] = tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim)
    for name, stored in graph.constants.items():
        graph.elem_types[name] = stored.data_type
        graph.shapes[name] = tuple(stored.dims)


def _fold_batch_norm(graph: FloatGraph) -> None:
    """Conv -> BatchNormalization becomes one Conv where everything is constant: W' = W g / sqrt(v + e), and
    b' = (b - m) g / sqrt(v + e) + beta (Ioffe and Szegedy 2015, inference form)."""
    dropped = set()
    for i, node in enumerate(graph.nodes):
        if node.op_type != "BatchNormalization" or attribute(node, "training_mode", 0) or node.domain:
            continue
        before = graph.producer.get(node.input[0])
        constant = all(n in graph.constants and graph.is_float(n) for n in node.input[1:5])
        if before is None or not constant or len([o for o in node.output if o]) != 1 or before in dropped:
            continue
        conv = graph.nodes[before]
        weights = [n for n in conv.input[1:] if n]
        if conv.op_type != "Conv" or not graph.has_one_reader(node.input[0]):
            continue
        if not all(n in graph.constants and graph.is_float(n) for n in weights):
            continue
        gamma, beta, mean, variance = (graph.array(n).astype(np.float64) for n in node.input[1:5])
        factor = gamma / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
        weight = graph.array(conv.input[1]).astype(np.float64)
        bias = graph.array(weights[1]).astype(np.float64) if len(weights) > 1 else np.zeros(weight.shape[0])
        weight = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
        bias = (bias - mean) * factor + beta
        names = [graph.fresh(f"{conv.name}_folded_weight"), graph.fresh(f"{conv.name}_folded_bias")]
        for name, value in zip(names, (weight, bias), strict=True):
            graph.constants[name] = tensor(name, value.astype(np.float32))
            graph.elem_types[name], graph.shapes[name] = 1, value.shape
        del conv.input[1:]
        conv.input.extend(names)
        conv.output[0] = node.output[0]
        graph.producer[node.output[0]] = before
        dropped.add(i)
    graph.nodes = [node for i, node in enumerate(graph.nodes) if i not in dropped]
    graph.index()


def _pool_means(graph: FloatGraph) -> None:
    """ReduceMean over all spatial axes, axes kept, becomes GlobalAveragePool: the engines have an integer kernel for it."""
    import onnx

    for i, node in enumerate(graph.nodes):
        if node.op_type != "ReduceMean" or node.domain or not attribute(node, "keepdims", 1):
            continue
        shape = graph.shapes.get(node.input[0])
        axes = attribute(node, "axes", None)
        if len(node.input) > 1 and node.input[1] in graph.constants:
            axes = graph.array(node.input[1]).tolist()
        if shape is None or not axes or not graph.is_float(node.input[0]) or len(shape) < 3:
            continue
        if sorted(int(a) % len(shape) for a in axes) == list(range(2, len(shape))):
            graph.nodes[i] = onnx.helper.make_node("GlobalAveragePool", [node.input[0]], list(node.output), name=node.name)
    graph.index()
