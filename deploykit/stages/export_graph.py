"""The exported graph made tidy: stable names, BatchNorm folded, outputs cut."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from deploykit.errors import ModelError, UnknownName
from deploykit.signature import Signature

if TYPE_CHECKING:
    import numpy as np
    import onnx

_SCOPES = "pkg.torch.onnx.name_scopes"


def name_dimensions(model: onnx.ModelProto, signature: Signature) -> None:
    """Gives dynamic axes the signature's symbols instead of the exporter's (s77), in place, wherever they stand, also within an
    expression. Raises ModelError for an axis that ought to be dynamic and is a number in the graph."""
    renamed: dict[str, str] = {}
    for value, spec in zip(model.graph.input, signature.inputs, strict=True):
        for dim, wanted in zip(value.type.tensor_type.shape.dim, spec.shape, strict=True):
            if not isinstance(wanted, str):
                continue
            if not dim.dim_param:
                raise ModelError(
                    f"axis '{wanted}' of input '{spec.name}' was baked in as {dim.dim_value} by the export",
                    "take that size from the input (x.shape[...]) in the model's code",
                )
            renamed[dim.dim_param] = wanted
    if renamed:
        rename_dimensions(model, renamed)


def rename_dimensions(model: onnx.ModelProto, names: Mapping[str, str]) -> None:
    """Gives dynamic axes other symbols, in place, wherever they stand, also within an expression."""
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")
    for graph in _graphs(model.graph):
        for value in [*graph.input, *graph.output, *graph.value_info]:
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param:
                    dim.dim_param = pattern.sub(lambda match: names[match[1]], dim.dim_param)


def _graphs(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    found = [graph]
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else list(attribute.graphs):
                found.extend(_graphs(inner))
    return found


def name_nodes(model: onnx.ModelProto) -> None:
    """Names each node after the module that made it and its operator, 'layer1.0.conv1/Conv' (a second one '.../Conv_1'), in
    place: the exporter's running numbers change with every node added before."""
    import ast

    seen: Counter[str] = Counter()
    for graph in _graphs(model.graph):
        for node in graph.node:
            scope = ""
            for entry in node.metadata_props:
                if entry.key == _SCOPES:
                    scopes = ast.literal_eval(entry.value)
                    scope = scopes[-2] if len(scopes) > 1 else ""
            name = f"{scope}/{node.op_type}" if scope else node.op_type
            count = seen[name]
            seen[name] += 1
            node.name = f"{name}_{count}" if count else name


def fold_batchnorm(model: onnx.ModelProto) -> int:
    """Folds every BatchNormalization whose input is a Conv used by nothing else into that Conv, in place; returns how many.

    W' = W * gamma / sqrt(var + eps), b' = (b - mean) * gamma / sqrt(var + eps) + beta, in float64. torch's exporter folds
    most of them; it leaves those whose Conv shares its weights with another, which get weights of their own here.
    """
    from onnx import numpy_helper

    graph = model.graph
    stored = {t.name: t for t in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    uses = Counter(name for node in graph.node for name in node.input)
    uses.update(value.name for value in graph.output)
    folded = 0
    for norm in [n for n in graph.node if n.op_type == "BatchNormalization"]:
        conv = makers.get(norm.input[0])
        if conv is None or conv.op_type != "Conv" or uses[norm.input[0]] != 1:
            continue
        names = [*norm.input[1:5], *conv.input[1:]]
        if not all(name in stored for name in names if name):
            continue
        gamma, beta, mean, variance = (numpy_helper.to_array(stored[n]).astype("float64") for n in norm.input[1:5])
        epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
        factor = gamma / (variance + epsilon) ** 0.5
        weight = numpy_helper.to_array(stored[conv.input[1]])
        bias = numpy_helper.to_array(stored[conv.input[2]]).astype("float64") if len(conv.input) > 2 else 0.0 * mean
        new = {
            f"{norm.output[0]}.weight": (weight * factor.reshape(-1, *[1] * (weight.ndim - 1))).astype(weight.dtype),
            f"{norm.output[0]}.bias": ((bias - mean) * factor + beta).astype(weight.dtype),
        }
        del conv.input[1:]
        for name, array in new.items():
            graph.initializer.append(numpy_helper.from_array(array, name))
            conv.input.append(name)
        conv.output[0] = norm.output[0]
        graph.node.remove(norm)
        folded += 1
    if folded:
        drop_unused(model)
    return folded


def batchnorm_left(model: onnx.ModelProto) -> list[str]:
    """Names of the BatchNormalization nodes that still follow a Conv."""
    makers = {name: node for node in model.graph.node for name in node.output}
    norms = [n for n in model.graph.node if n.op_type == "BatchNormalization"]
    return [n.name for n in norms if (maker := makers.get(n.input[0])) is not None and maker.op_type == "Conv"]


def drop_unused(model: onnx.ModelProto) -> None:
    """Removes initializers and value infos that nothing refers to, in place."""
    used = {name for graph in _graphs(model.graph) for node in graph.node for name in node.input}
    used |= {value.name for graph in _graphs(model.graph) for value in graph.output}
    made = {name for node in model.graph.node for name in node.output}
    for field, keep in ((model.graph.initializer, used), (model.graph.value_info, made | used)):
        kept = [item for item in field if item.name in keep]
        if len(kept) != len(field):
            del field[:]
            field.extend(kept)


def cut(model: onnx.ModelProto, outputs: Sequence[str]) -> None:
    """Ends the graph at the named outputs, tensors or nodes (a node stands for its first output), in place, in that order;
    what no longer leads to them goes, inputs too. Raises UnknownName, ModelError for a tensor whose type is not known."""
    import onnx

    graph = model.graph
    made = {name: node for node in graph.node for name in node.output if name}
    by_node = {node.name: node.output[0] for node in graph.node if node.name}
    wanted: list[str] = []
    for name in outputs:
        tensor = name if name in made else by_node.get(name)
        if tensor is None:
            raise UnknownName("output or tensor", name, [*(v.name for v in graph.output), *made, *by_node])
        if tensor not in wanted:
            wanted.append(tensor)
    known = {value.name: value for value in [*graph.value_info, *graph.output]}
    if any(name not in known for name in wanted):
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
        known = {value.name: value for value in [*inferred.graph.value_info, *inferred.graph.output]} | known
    lost = [name for name in wanted if name not in known]
    if lost:
        raise ModelError(f"the type of tensor '{lost[0]}' cannot be inferred, so the graph cannot end there", "choose another")
    needed = _upstream(graph, set(wanted), made)
    kept_nodes = [node for node in graph.node if any(name in needed for name in node.output)]
    kept_inputs = [value for value in graph.input if value.name in needed]
    values = [known[name] for name in wanted]
    replaced: Mapping[str, list[onnx.ValueInfoProto]] = {"output": values, "input": kept_inputs}
    del graph.node[:]
    graph.node.extend(kept_nodes)
    for field, new in replaced.items():
        copies = [type(value).FromString(value.SerializeToString()) for value in new]
        del getattr(graph, field)[:]
        getattr(graph, field).extend(copies)
    drop_unused(model)


def _upstream(graph: onnx.GraphProto, wanted: set[str], made: Mapping[str, onnx.NodeProto]) -> set[str]:
    outside = {value.name for value in graph.input} | {t.name for t in graph.initializer} | set(made)
    needed: set[str] = set()
    queue = list(wanted)
    while queue:
        name = queue.pop()
        if name in needed:
            continue
        needed.add(name)
        node = made.get(name)
        if node is None:
            continue
        queue.extend(n for n in node.input if n)
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else list(attribute.graphs):
                for part in _graphs(inner):
                    queue.extend(n for child in part.node for n in child.input if n in outside)
                    queue.extend(v.name for v in part.output if v.name in outside)
    return needed


def count_weights(model: onnx.ModelProto) -> int:
    """How many numbers the floating-point initializers of rank 1 and more hold."""
    import math

    import onnx

    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16)
    return sum(math.prod(t.dims) for t in model.graph.initializer if t.data_type in floats and t.dims)


def difference(reference: np.ndarray, candidate: np.ndarray) -> tuple[float, float]:
    """(largest absolute difference, largest absolute reference) of two arrays of one shape."""
    import numpy as np

    if reference.size == 0:
        return 0.0, 0.0
    gap = np.abs(reference.astype(np.float64) - candidate.astype(np.float64))
    return float(gap.max()), float(np.abs(reference.astype(np.float64)).max())
