"""ONNX files: read safely, signature, digest, written atomically. The one place that reads and writes them.

`onnx` is imported inside the functions, so that importing this module costs nothing.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit.artifact import write_atomically
from deploykit.errors import ModelError
from deploykit.signature import Dim, Signature, TensorSpec, with_one_batch

if TYPE_CHECKING:
    import onnx

MAX_INLINE_BYTES = 1_900_000_000  # protobuf refuses 2 GiB


def load(path: Path) -> onnx.ModelProto:
    """The model in an .onnx file, external data included.

    Raises ModelError for a file that is missing, empty, truncated or not ONNX, and for external data that is missing,
    too short, or outside the model's folder.
    """
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise ModelError(f"there is no file {path}", "check the path")
    data = path.read_bytes()
    if not data:
        raise ModelError(f"{path} is empty", "export the model again")
    try:
        model: onnx.ModelProto = onnx.ModelProto.FromString(data)
    except DecodeError as exc:
        raise ModelError(f"{path} is not an ONNX file, or it is truncated", "export the model again, or copy it again") from exc
    if not model.graph.node or not model.opset_import or not model.graph.output:
        raise ModelError(f"{path} holds no ONNX graph", "a model needs nodes, outputs and an opset; export it again")
    _check_external(model, path)
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as exc:
        raise ModelError(
            f"external data of {path.name}: {exc}", "keep the data file beside the .onnx, as it was exported"
        ) from exc
    return model


def _check_external(model: onnx.ModelProto, path: Path) -> None:
    folder = path.parent.resolve()
    for tensor in all_tensors(model):
        if tensor.data_location != tensor.EXTERNAL:
            continue
        entries = {e.key: e.value for e in tensor.external_data}
        location = entries.get("location", "")
        file = (folder / location).resolve()
        if not location or not file.is_relative_to(folder):
            raise ModelError(
                f"{path.name}: tensor '{tensor.name}' has its data outside the model's folder ({location!r})",
                "refused: put it beside the .onnx",
            )
        if not file.is_file():
            raise ModelError(f"{path.name}: the external data file '{location}' is missing", f"put it beside {path.name}")
        try:
            end = int(entries.get("offset", "0")) + int(entries.get("length", "0"))
        except ValueError as exc:
            raise ModelError(f"{path.name}: tensor '{tensor.name}' has a malformed external data entry") from exc
        if end > file.stat().st_size:
            raise ModelError(f"{path.name}: the external data file '{location}' is truncated", "copy it again")


def all_tensors(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Every tensor stored in the model: initializers and constants, those of sub-graphs and functions too."""
    found: list[onnx.TensorProto] = []

    def visit_nodes(nodes: list[onnx.NodeProto]) -> None:
        for node in nodes:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    found.append(attribute.t)
                found.extend(attribute.tensors)
                for graph in [attribute.g] if attribute.HasField("g") else list(attribute.graphs):
                    visit(graph)

    def visit(graph: onnx.GraphProto) -> None:
        found.extend(graph.initializer)
        for sparse in graph.sparse_initializer:
            found.extend([sparse.values, sparse.indices])
        visit_nodes(list(graph.node))

    visit(model.graph)
    for function in model.functions:
        visit_nodes(list(function.node))
    return found


def fits_inline(model: onnx.ModelProto) -> bool:
    """Whether protobuf can hold the model in one piece, its weights inside. Counted by the tensors' shapes: `ByteSize` writes the
    whole model to count it (protobuf's upb), a quarter of the time that INT8 of a ResNet-18 takes."""
    import onnx

    sized = set(onnx.TensorProto.DataType.values()) - {onnx.TensorProto.STRING, onnx.TensorProto.UNDEFINED}
    total = 0
    for tensor in all_tensors(model):
        if tensor.data_type in sized:
            total += math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        if total >= MAX_INLINE_BYTES:
            return False
    return True


def signature(model: onnx.ModelProto) -> Signature:
    """Inputs (initializers left out) and outputs of a model. A dynamic axis without a name is called 'batch' where it is
    axis 0, else '<tensor>.<axis>'. Raises ModelError for an input that is not a tensor or has no rank."""
    import onnx

    def spec(value: onnx.ValueInfoProto, *, is_input: bool) -> TensorSpec:
        if not value.type.HasField("tensor_type"):
            raise ModelError(
                f"'{value.name}' is no tensor (a sequence, map or optional)",
                "deploykit takes models whose inputs and outputs are tensors",
            )
        tensor = value.type.tensor_type
        if tensor.elem_type in (0, onnx.TensorProto.STRING):
            dtype = "str" if tensor.elem_type else "float32"
        elif tensor.elem_type not in onnx.TensorProto.DataType.values():
            raise ModelError(f"'{value.name}' has the unknown type {tensor.elem_type}", "export the model again")
        else:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        if is_input and not tensor.HasField("shape"):
            raise ModelError(f"input '{value.name}' has no rank", "export the model with input shapes")
        dims: list[Dim] = []
        for axis, dim in enumerate(tensor.shape.dim):
            if dim.HasField("dim_value") and dim.dim_value >= 0:
                dims.append(dim.dim_value)
            elif dim.dim_param:
                dims.append(dim.dim_param)
            else:
                dims.append("batch" if axis == 0 else f"{value.name}.{axis}")
        return TensorSpec(value.name, dtype, tuple(dims))

    stored = {t.name for t in model.graph.initializer}
    inputs = tuple(spec(v, is_input=True) for v in model.graph.input if v.name not in stored)
    outputs = tuple(spec(v, is_input=False) for v in model.graph.output)
    return Signature(*with_one_batch(inputs, outputs))


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """The value of a node's attribute, or `default` where the node does not have it."""
    import onnx

    return next((onnx.helper.get_attribute_value(found) for found in node.attribute if found.name == name), default)


def digest(model: onnx.ModelProto) -> str:
    """sha256 of graph and weights, without metadata: doc strings, producer, metadata properties (torch's exporter writes
    absolute paths there). The same model exported in two folders has one digest."""
    copy = type(model)()
    copy.CopyFrom(model)
    strip_metadata(copy)
    copy.ClearField("producer_name")
    copy.ClearField("producer_version")
    for tensor in all_tensors(copy):
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
    if fits_inline(copy):
        return hashlib.sha256(copy.SerializeToString(deterministic=True)).hexdigest()
    sha = hashlib.sha256()
    for tensor in all_tensors(copy):
        sha.update(tensor.name.encode() + b"\0" + tensor.raw_data)
        tensor.ClearField("raw_data")
    sha.update(copy.SerializeToString(deterministic=True))
    return sha.hexdigest()


def strip_metadata(model: onnx.ModelProto) -> None:
    """Removes doc strings and metadata properties, in place, sub-graphs and functions included."""

    def strip(graph: onnx.GraphProto) -> None:
        graph.ClearField("doc_string")
        graph.ClearField("metadata_props")
        for value in [*graph.input, *graph.output, *graph.value_info]:
            value.ClearField("doc_string")
            value.ClearField("metadata_props")
        for tensor in graph.initializer:
            tensor.ClearField("doc_string")
            tensor.ClearField("metadata_props")
        strip_nodes(list(graph.node))

    def strip_nodes(nodes: list[onnx.NodeProto]) -> None:
        for node in nodes:
            node.ClearField("doc_string")
            node.ClearField("metadata_props")
            for attribute in node.attribute:
                attribute.ClearField("doc_string")
                for graph in [attribute.g] if attribute.HasField("g") else list(attribute.graphs):
                    strip(graph)

    model.ClearField("doc_string")
    model.ClearField("metadata_props")
    strip(model.graph)
    for function in model.functions:
        function.ClearField("doc_string")
        function.ClearField("metadata_props")
        strip_nodes(list(function.node))


def save(model: onnx.ModelProto, path: Path) -> tuple[str, ...]:
    """Writes the model whole or not at all; returns the names of companion files (external data of models near 2 GiB)."""
    import onnx

    if fits_inline(model):
        write_atomically(path, model.SerializeToString(deterministic=True))
        return ()
    data = path.name + ".data"
    onnx.save_model(model, str(path), save_as_external_data=True, all_tensors_to_one_file=True, location=data)
    return (data,)
