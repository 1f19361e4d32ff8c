"""FloatGraph: an ONNX graph made ready for rewriting, and who makes and reads each of its tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx

Edge = tuple[int, int]  # (node, which of its inputs)


@dataclass
class FloatGraph:
    """The main graph of `model` as lists that can be rewritten.

    nodes: copies, in topological order, each with a name of its own. constants: every initializer by name. elem_types and
    shapes: what type inference knows (a dynamic axis is None, an unknown shape is missing).
    """

    model: onnx.ModelProto
    nodes: list[onnx.NodeProto]
    constants: dict[str, onnx.TensorProto]
    elem_types: dict[str, int]
    shapes: dict[str, tuple[int | None, ...]]
    producer: dict[str, int] = field(default_factory=dict)
    consumers: dict[str, list[Edge]] = field(default_factory=dict)
    outputs: frozenset[str] = frozenset()
    captured: frozenset[str] = frozenset()  # read by the body of a control-flow node
    names: set[str] = field(default_factory=set)

    @property
    def opset(self) -> int:
        """The version of the default operator set."""
        return int(next(o.version for o in self.model.opset_import if o.domain in ("", "ai.onnx")))

    def array(self, name: str) -> NDArray[Any]:
        """The value of a constant."""
        from onnx import numpy_helper

        return numpy_helper.to_array(self.constants[name])

    def is_float(self, name: str) -> bool:
        """Whether a tensor is float32; one that type inference knows nothing of is not."""
        import onnx

        return self.elem_types.get(name) == onnx.TensorProto.FLOAT

    def fresh(self, wanted: str) -> str:
        """`wanted`, or `wanted` with a number, whichever is no name of the graph yet; it is taken from then on."""
        name, count = wanted, 1
        while name in self.names:
            count += 1
            name = f"{wanted}_{count}"
        self.names.add(name)
        return name

    def has_one_reader(self, name: str) -> bool:
        """Whether just one node input reads the tensor, and neither the caller nor a control-flow body sees it."""
        return len(self.consumers.get(name, ())) == 1 and name not in self.outputs and name not in self.captured

    def index(self) -> None:
        """Brings `producer`, `consumers`, `outputs`, `captured` and `names` up to date after nodes were changed."""
        producer: dict[str, int] = {}
        consumers: dict[str, list[Edge]] = defaultdict(list)
        captured: set[str] = set()
        names = set(self.constants) | {v.name for v in self.model.graph.input}
        for i, node in enumerate(self.nodes):
            names.update([node.name, *node.input, *node.output])
            for k, name in enumerate(node.input):
                if name:
                    consumers[name].append((i, k))
            producer.update({name: i for name in node.output if name})
            for body in bodies(node):
                inner = set(_all_names(body))
                captured |= inner
                names |= inner
        self.producer, self.consumers, self.names = producer, dict(consumers), names - {""}
        self.outputs = frozenset(v.name for v in self.model.graph.output)
        self.captured = frozenset(captured)

    def write_back(self, nodes: list[onnx.NodeProto]) -> None:
        """Puts `nodes` and the constants that are still read into the model, in place."""
        read = {name for node in nodes for name in node.input} | self.outputs
        for node in nodes:
            for body in bodies(node):
                read.update(_all_names(body))
        kept = [tensor for name, tensor in self.constants.items() if name in read]
        graph = self.model.graph
        del graph.node[:]
        graph.node.extend(nodes)
        del graph.initializer[:]
        graph.initializer.extend(kept)
        graph.ClearField("value_info")


def bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The sub-graphs of a control-flow node."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _all_names(graph: onnx.GraphProto) -> Iterator[str]:
    yield from (v.name for v in graph.input)
    yield from (v.name for v in graph.output)
    for node in graph.node:
        yield from node.input
        yield from node.output
        for body in bodies(node):
            yield from _all_names(body)


def set_attribute(node: onnx.NodeProto, name: str, value: Any) -> None:
    """Gives an attribute another value, in place."""
    import onnx

    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])


def tensor(name: str, array: NDArray[Any]) -> onnx.TensorProto:
    """An initializer of that name."""
    from onnx import numpy_helper

    return numpy_helper.from_array(np.asarray(array, order="C"), name)
