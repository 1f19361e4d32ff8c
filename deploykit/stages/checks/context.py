"""Graph: one model read once, with the maps that the checks need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deploykit import graph as onnx_graph
from deploykit.errors import ModelError
from deploykit.graph import attribute
from deploykit.signature import ShapeRange, Signature

if TYPE_CHECKING:
    import onnx

Shape = tuple[int | str, ...]
Array = NDArray[Any]
SMALL = 1024  # elements; shape inference needs the values of shape tensors only, which are smaller


def label(node: onnx.NodeProto) -> str:
    """What to call a node: its name, else its operator and first output."""
    if node.name:
        return node.name
    return f"{node.op_type} -> {next((o for o in node.output if o), '?')}"


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The bodies of a control-flow node."""
    for found in node.attribute:
        if found.HasField("g"):
            yield found.g
        yield from found.graphs


def _require_text(*names: object) -> None:
    """Raises ModelError for a name that is no UTF-8: protobuf hands it over as bytes."""
    for name in names:
        if not isinstance(name, str):
            raise ModelError(f"the model holds a name that is no text ({name!r}): the file is damaged", "export or copy it again")


def _tensor_bytes(tensor: onnx.TensorProto) -> int:
    import onnx

    if tensor.data_type not in onnx.TensorProto.DataType.values() or tensor.data_type in (
        onnx.TensorProto.STRING,
        onnx.TensorProto.UNDEFINED,
    ):
        return 0
    if tensor.raw_data:
        return len(tensor.raw_data)
    return int(np.prod(tensor.dims)) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


class Graph:
    """A model and its maps: nodes of every sub-graph, stored tensors by name, producers, consumers, shapes.

    Names are unique over a graph and its sub-graphs in ONNX, so one flat map of each kind serves.
    """

    def __init__(self, model: onnx.ModelProto, path: Path) -> None:
        self.path = path
        self.model = model
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: dict[str, onnx.TensorProto] = {}  # initializers and Constant nodes
        self.initializers: list[onnx.TensorProto] = []
        self.producer: dict[str, onnx.NodeProto] = {}
        self.consumers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
        self.outputs: set[str] = set()  # of the graph and of every body
        self._arrays: dict[str, Array | None] = {}
        self._shapes: dict[tuple[int | None, str], dict[str, Shape]] = {}
        self._types: dict[str, int] = {}
        self._visit(model.graph)
        for function in model.functions:
            for node in function.node:
                self._visit_node(node)

    @classmethod
    def load(cls, path: Path) -> Graph:
        """The graph of an .onnx file. Raises ModelError for a file that is none."""
        model = onnx_graph.load(path)
        try:
            return cls(model, path)
        except UnicodeDecodeError as exc:
            raise ModelError(f"{path} holds a name that is no text: the file is damaged", "export or copy it again") from exc

    def _visit(self, graph: onnx.GraphProto) -> None:
        for value in [*graph.input, *graph.output]:
            _require_text(value.name, *(d.dim_param for d in value.type.tensor_type.shape.dim))
        for tensor in graph.initializer:
            _require_text(tensor.name)
            self.tensors[tensor.name] = tensor
            self.initializers.append(tensor)
        self.outputs.update(o.name for o in graph.output)
        for node in graph.node:
            self._visit_node(node)

    def _visit_node(self, node: onnx.NodeProto) -> None:
        _require_text(node.name, node.op_type, node.domain, *node.input, *node.output, *(a.name for a in node.attribute))
        self.nodes.append(node)
        for index, name in enumerate(node.input):
            if name:
                self.consumers.setdefault(name, []).append((node, index))
        for name in node.output:
            self.producer[name] = node
        if node.op_type == "Constant":
            for found in node.attribute:
                if found.HasField("t"):
                    self.tensors[node.output[0]] = found.t
        for body in subgraphs(node):
            self._visit(body)

    @cached_property
    def signature(self) -> Signature:
        """Inputs and outputs. Raises ModelError for inputs that are no tensors."""
        return onnx_graph.signature(self.model)

    @cached_property
    def opset(self) -> int:
        """The version of ONNX's own operator set; 0 when the model imports none."""
        return max((o.version for o in self.model.opset_import if o.domain in ("", "ai.onnx")), default=0)

    @cached_property
    def input_names(self) -> set[str]:
        """The graph's inputs that have to be fed."""
        return {spec.name for spec in self.signature.inputs}

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of all stored tensors (strings left out)."""
        return sum(_tensor_bytes(t) for t in self.tensors.values())

    def external_files(self) -> Counter[str]:
        """The external data files that the .onnx names, with the number of tensors in each."""
        import onnx

        files: Counter[str] = Counter()
        if self.path.stat().st_size < self.weight_bytes:  # loading drops the references: read the bare file again
            bare = onnx.load(str(self.path), load_external_data=False)
            for tensor in onnx_graph.all_tensors(bare):
                files.update(e.value for e in tensor.external_data if e.key == "location")
        return files

    def array(self, name: str) -> Array | None:
        """The values of an initializer or Constant; None for a tensor that is computed or no array."""
        if name not in self._arrays:
            self._arrays[name] = self._read(name)
        return self._arrays[name]

    def _read(self, name: str) -> Array | None:
        import onnx

        tensor = self.tensors.get(name)
        if tensor is not None:
            try:
                return onnx.numpy_helper.to_array(tensor)
            except (ValueError, TypeError, KeyError) as exc:
                raise ModelError(
                    f"tensor '{name}' does not hold what its type and shape {list(tensor.dims)} ask for: {exc}",
                    "export the model again",
                ) from exc
        node = self.producer.get(name)
        if node is None or node.op_type != "Constant":
            return None
        for kind, dtype in (
            ("value_ints", np.int64),
            ("value_int", np.int64),
            ("value_floats", np.float32),
            ("value_float", np.float32),
        ):
            value = attribute(node, kind)
            if value is not None:
                return np.asarray(value, dtype)
        return None

    def constant(self, name: str) -> Array | None:
        """Like `array`, and through Identity, Cast, Transpose and DequantizeLinear of constants too."""
        found = self.array(name)
        node = self.producer.get(name)
        if found is not None or node is None or not node.input:
            return found
        if node.op_type not in ("Identity", "Cast", "Transpose", "DequantizeLinear"):
            return None
        source = self.constant(node.input[0])
        if source is None or node.op_type in ("Identity", "Cast"):
            return source
        if node.op_type == "Transpose":
            return np.transpose(source, attribute(node, "perm"))
        return self._dequantized(node, source)

    def _dequantized(self, node: onnx.NodeProto, source: Array) -> Array | None:
        scale = self.constant(node.input[1])
        if scale is None:
            return None
        has_zero = len(node.input) > 2 and node.input[2]
        zero = self.constant(node.input[2]) if has_zero else np.zeros((), np.int32)
        if zero is None:
            return None
        axis = attribute(node, "axis", 1)
        if scale.ndim == 1 and scale.size > 1:
            if not -source.ndim <= axis < source.ndim or source.shape[axis] != scale.size:
                return None
            shape = [1] * source.ndim
            shape[axis] = -1
            scale, zero = scale.reshape(shape), zero.reshape(shape) if zero.size > 1 else zero
        elif scale.size > 1:
            return None  # blocked quantization
        result: Array = (source.astype(np.float32) - zero.astype(np.float32)) * scale.astype(np.float32)
        return result

    def is_constant(self, name: str) -> bool:
        """Whether a tensor is stored, or computed from stored tensors alone."""
        return not name or name in self._constants or name in self.tensors

    @cached_property
    def _constants(self) -> set[str]:
        """The tensors computed from stored ones alone. Pass by pass: a recursion from a deep graph's end up to its input would
        be deeper than Python allows."""
        found = set(self.tensors)
        waiting = [node for node in self.nodes if not any(subgraphs(node))]
        while True:
            left = []
            for node in waiting:
                if all(not name or name in found for name in node.input):
                    found.update(name for name in node.output if name)
                else:
                    left.append(node)
            if len(left) == len(waiting):
                return found
            waiting = left

    def shapes(self, batch: int | None = None, ranges: Mapping[str, ShapeRange] | None = None) -> dict[str, Shape]:
        """Inferred shape of each tensor, with the batch's symbol set to `batch` and the axes in `ranges` to their `opt`.

        What stays unknown is a str in a shape, or missing.
        """
        key = (batch, repr(sorted((ranges or {}).items())))
        if key not in self._shapes:
            self._shapes[key] = self._infer(batch, ranges)
        return self._shapes[key]

    def item_bytes(self, name: str) -> int:
        """Bytes of one value of a computed tensor; 4 where inference didn't tell its type."""
        import onnx

        kind = self._types.get(name, 0)
        unsized = (onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING)
        known = kind in onnx.TensorProto.DataType.values() and kind not in unsized
        return 4 if not known else onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize

    def _infer(self, batch: int | None, ranges: Mapping[str, ShapeRange] | None) -> dict[str, Shape]:
        import onnx

        skeleton = self.skeleton(batch, ranges)
        try:
            inferred = onnx.shape_inference.infer_shapes(skeleton, data_prop=True)
        except (onnx.shape_inference.InferenceError, ValueError, RuntimeError):
            inferred = skeleton  # DK003 says so; here its shapes are just unknown
        try:
            return self._collect(inferred)
        except UnicodeDecodeError as exc:
            raise ModelError(f"{self.path} holds a name that is no text: the file is damaged", "export or copy it again") from exc

    def _collect(self, inferred: onnx.ModelProto) -> dict[str, Shape]:
        found: dict[str, Shape] = {name: tuple(t.dims) for name, t in self.tensors.items()}
        for value in [*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output]:
            self._types[value.name] = value.type.tensor_type.elem_type
            if value.type.tensor_type.HasField("shape"):
                found[value.name] = tuple(
                    d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in value.type.tensor_type.shape.dim
                )
        return found

    def skeleton(self, batch: int | None = None, ranges: Mapping[str, ShapeRange] | None = None) -> onnx.ModelProto:
        """The model without its large weights (they become inputs) and without recorded shapes: cheap to infer over."""
        import onnx

        known = ranges or {}
        model = onnx.ModelProto()
        model.ir_version = max(self.model.ir_version, 4)
        model.opset_import.extend(self.model.opset_import)
        model.functions.extend(self.model.functions)
        graph = model.graph
        graph.name = "skeleton"
        graph.node.extend(self.model.graph.node)
        stored = {t.name for t in self.model.graph.initializer}
        for value, spec in zip((v for v in self.model.graph.input if v.name not in stored), self.signature.inputs, strict=True):
            dims: list[int | str | None] = []
            for axis, dim in enumerate(spec.shape):
                if dim == self.signature.batch_symbol and batch is not None:
                    dims.append(batch)
                elif isinstance(dim, str) and spec.name in known and axis < len(known[spec.name].opt):
                    dims.append(known[spec.name].opt[axis])
                else:
                    dims.append(dim)
            graph.input.append(onnx.helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, dims))
        for tensor in self.model.graph.initializer:
            if int(np.prod(tensor.dims)) <= SMALL:
                graph.initializer.append(tensor)
            else:
                graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
        for value in self.model.graph.output:
            kept = graph.output.add()
            kept.name = value.name
            kept.type.tensor_type.elem_type = value.type.tensor_type.elem_type
        return model
