"""The walk through a quantized graph: cut after each node to correct, the tensors still needed held from cut to cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deploykit.errors import MissingBackend
from deploykit.stages.precision.view import bodies, tensor

if TYPE_CHECKING:
    import onnx

HELD_BYTES = 768 << 20  # activations of all samples at one cut
LEAST_SAMPLES = 8
Arrays = dict[str, NDArray[Any]]


@dataclass
class Cut:
    """One node to correct. before: the nodes since the last one, None where there are none; part: the node alone, reading
    what `before` made; keep, needed: tensors read after the node, and after `before`."""

    before: onnx.ModelProto | None
    part: onnx.ModelProto
    node: onnx.NodeProto
    keep: frozenset[str]
    needed: frozenset[str]

    @property
    def result(self) -> str:
        """The node's output."""
        return str(self.node.output[0])

    def weights(self) -> tuple[str, NDArray[Any], NDArray[np.float32]]:
        """Name and value of the node's integer weights, and their scale of each output channel."""
        from onnx import numpy_helper

        reader = next(n for n in self.part.graph.node if n.output[0] == self.node.input[1])
        stored = {t.name: t for t in self.part.graph.initializer}
        integers, scale = (numpy_helper.to_array(stored[name]) for name in reader.input[:2])
        return str(reader.input[0]), integers, np.asarray(scale, np.float32)

    def replace(self, name: str, value: NDArray[Any]) -> None:
        """Gives one of the constants of `part` another value."""
        kept = [t for t in self.part.graph.initializer if t.name != name]
        del self.part.graph.initializer[:]
        self.part.graph.initializer.extend([*kept, tensor(name, value)])


def cuts(model: onnx.ModelProto, wanted: frozenset[str]) -> Iterator[Cut]:
    """The graph as one Cut for each node in `wanted` (names), in order; what follows the last is left out."""
    stored = {t.name: t for t in model.graph.initializer}
    constants = {
        n.output[0]: n for n in model.graph.node if n.op_type == "DequantizeLinear" and all(name in stored for name in n.input)
    }
    nodes = [n for n in model.graph.node if n.output[0] not in constants]
    reads = [frozenset(_reads(n)) for n in nodes]
    after: list[frozenset[str]] = [frozenset()] * (len(nodes) + 1)
    for i in range(len(nodes) - 1, -1, -1):
        after[i] = after[i + 1] | reads[i]
    start = 0
    for end, node in enumerate(nodes):
        if node.name not in wanted:
            continue
        inside = nodes[start:end]
        makes = {name for n in inside for name in n.output} & after[end]
        before = _part(model, inside, after[end], constants, stored) if makes else None
        part = _part(model, [node], after[end + 1] | {node.output[0]}, constants, stored)
        yield Cut(before, part, node, after[end + 1] | {node.output[0]}, after[end])
        start = end + 1


def _part(
    model: onnx.ModelProto,
    inside: list[onnx.NodeProto],
    later: frozenset[str],
    constants: dict[str, onnx.NodeProto],
    stored: dict[str, onnx.TensorProto],
) -> onnx.ModelProto:
    """Some nodes as a model of their own; its inputs get their types when it runs."""
    import onnx

    read = {name for node in inside for name in _reads(node) if name}
    known = [constants[name] for name in sorted(read & set(constants))]
    read |= {name for node in known for name in node.input}
    made = {name for node in [*known, *inside] for name in node.output if name}
    graph = onnx.helper.make_graph(
        [*known, *inside],
        "part",
        [onnx.helper.make_empty_tensor_value_info(n) for n in sorted(read - made - set(stored))],
        [onnx.helper.make_empty_tensor_value_info(n) for n in sorted(made & later - set(constants))],
        [stored[n] for n in sorted(read & set(stored))],
    )
    return onnx.helper.make_model(graph, opset_imports=list(model.opset_import), ir_version=model.ir_version)


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    yield from node.input
    for body in bodies(node):
        for inner in body.node:
            yield from _reads(inner)


def affordable(path_model: onnx.ModelProto, most: int) -> int:
    """How many samples' activations fit into HELD_BYTES at the widest cut, at least LEAST_SAMPLES and at most `most`: judged by
    the sizes that shape inference knows, twice the largest tensor (a node's input and its output)."""
    import onnx

    from deploykit import graph as graphs

    one = onnx.ModelProto()
    one.CopyFrom(path_model)
    for value in one.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if not dim.HasField("dim_value"):
                dim.dim_value = 1
    for value in one.graph.output:
        value.type.tensor_type.ClearField("shape")
    if one.ByteSize() >= graphs.MAX_INLINE_BYTES:
        return min(most, LEAST_SAMPLES)
    inferred = onnx.shape_inference.infer_shapes(one, data_prop=True)
    largest = max((_elements(v) for v in [*inferred.graph.input, *inferred.graph.value_info]), default=1)
    return max(min(most, HELD_BYTES // (2 * 4 * max(largest, 1))), min(most, LEAST_SAMPLES))


def _elements(value: onnx.ValueInfoProto) -> int:
    sizes = [d.dim_value for d in value.type.tensor_type.shape.dim]
    return int(np.prod(sizes)) if sizes else 1


def advance(part: onnx.ModelProto, live: list[Arrays], keep: frozenset[str], threads: int | None) -> None:
    """Brings the live tensors of every batch past a part of the graph, in place; those nobody needs any more are dropped."""
    import onnx

    names = {value.name for value in part.graph.input}
    captured = {n for n in names if not live or n not in live[0]}
    kept = [v for v in part.graph.input if v.name not in captured]
    del part.graph.input[:]
    for value in kept:
        array = live[0][value.name]
        kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        part.graph.input.append(onnx.helper.make_tensor_value_info(value.name, kind, [None] * array.ndim))
    session = open_session(part, threads)
    outputs = [value.name for value in session.get_outputs()]
    inputs = [value.name for value in session.get_inputs()]
    for i, values in enumerate(live):  # in place: what is not needed any more is freed batch by batch
        made = dict(zip(outputs, session.run(outputs, {name: values[name] for name in inputs}), strict=True))
        live[i] = {name: value for name, value in {**values, **made}.items() if name in keep}


def open_session(model: onnx.ModelProto, threads: int | None) -> Any:
    """ONNX Runtime on a graph, Q/DQ computed as written. Raises MissingBackend without it."""
    try:
        import onnxruntime
    except ImportError as exc:
        raise MissingBackend(
            "bias correction needs ONNX Runtime, which is not installed", "pip install 'deploykit[cpu]'"
        ) from exc
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
