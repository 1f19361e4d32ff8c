"""Random networks for the TensorRT tests, grown node by node, and their calibration tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from deploykit import graph
from deploykit.calibration_table import CalibrationTable, Range

OPS = ("conv3", "conv1", "grouped", "depthwise", "stride", "relu", "clip", "sigmoid", "hardswish", "leaky", "batchnorm",
       "maxpool", "avgpool", "residual", "gate", "concat", "upsample")  # fmt: skip
HEADS = ("gemm", "matmul", "relu", "tanh", "residual")
KINDS = st.lists(st.tuples(st.sampled_from(OPS), st.sampled_from((8, 16, 24))), min_size=1, max_size=10)
HEAD = st.lists(st.tuples(st.sampled_from(HEADS), st.sampled_from((8, 16, 24))), max_size=4)
CLASSES = 5


class Net:
    """A network: x [batch, 8, 16, 16] -> what `grow` adds -> pooled, flattened -> what `head` adds -> logits [batch, 5]."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.store: list[onnx.TensorProto] = []
        self.last, self.channels, self.size = "x", 8, 16
        self.earlier: list[tuple[str, int, int]] = [("x", 8, 16)]

    @classmethod
    def grown(cls, seed: int, kinds: list[tuple[str, int]], head: list[tuple[str, int]]) -> Net:
        net = cls(seed)
        for kind, width in kinds:
            net.grow(kind, width)
        net.add("GlobalAveragePool", [net.last])
        net.add("Flatten", [net.last])
        net.earlier = [(net.last, net.channels, 1)]
        for kind, width in head:
            net.head(kind, width)
        net.add("Gemm", [net.last, net.weight(CLASSES, net.channels), net.weight(CLASSES)], transB=1)
        return net

    def count(self, *ops: str) -> int:
        return sum(node.op_type in ops for node in self.nodes)

    def stored(self, values: np.ndarray, name: str) -> str:
        self.store.append(numpy_helper.from_array(values.astype(np.float32), f"{name}{len(self.store)}"))
        return self.store[-1].name

    def weight(self, *shape: int) -> str:
        return self.stored(self.rng.normal(0, 1 / np.sqrt(np.prod(shape[1:]) or 1), shape), "w")

    def add(self, op: str, inputs: list[str], **attributes: object) -> None:
        output = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], name=f"{op}_{len(self.nodes)}", **attributes))
        self.last = output

    def conv(self, out: int, kernel: int, stride: int = 1, group: int = 1) -> None:
        weight = self.weight(out, self.channels // group, kernel, kernel)
        self.add("Conv", [self.last, weight, self.weight(out)], pads=[kernel // 2] * 4, strides=[stride] * 2, group=group)
        self.channels, self.size = out, (self.size + stride - 1) // stride

    def grow(self, kind: str, width: int) -> None:
        before, same = self.last, self.alike()
        level = [e for e in self.earlier if e[2] == self.size and e[0] != self.last]
        if kind in ("conv3", "conv1"):
            self.conv(width, 3 if kind == "conv3" else 1)
        elif kind == "grouped":
            self.conv(width, 3, group=4 if self.channels % 4 == 0 else 1)
        elif kind == "depthwise":
            self.conv(self.channels, 3, group=self.channels)
        elif kind == "stride" and self.size > 4:
            self.conv(width, 3, stride=2)
        elif kind in ("relu", "sigmoid", "hardswish", "leaky"):
            self.add({"relu": "Relu", "sigmoid": "Sigmoid", "hardswish": "HardSwish", "leaky": "LeakyRelu"}[kind], [self.last])
        elif kind == "clip":
            self.add("Clip", [self.last, self.stored(np.array(0.0), "k"), self.stored(np.array(6.0), "k")])
        elif kind == "batchnorm":
            c = self.channels
            spread = self.stored(self.rng.uniform(0.5, 2.0, c), "v")
            self.add("BatchNormalization", [self.last, self.weight(c), self.weight(c), self.weight(c), spread])
        elif kind in ("maxpool", "avgpool"):
            self.add("MaxPool" if kind == "maxpool" else "AveragePool", [self.last], kernel_shape=[3, 3], pads=[1] * 4)
        elif kind == "residual" and same:
            self.add("Add", [self.last, same[-1]])
        elif kind == "gate":
            self.add("GlobalAveragePool", [self.last])
            self.add("Conv", [self.last, self.weight(self.channels, self.channels, 1, 1), self.weight(self.channels)])
            self.add("Sigmoid", [self.last])
            self.add("Mul", [before, self.last])
        elif kind == "concat" and level and self.channels + level[-1][1] <= 64:
            self.add("Concat", [self.last, level[-1][0]], axis=1)
            self.channels += level[-1][1]
        elif kind == "upsample" and self.size <= 16:
            scales = self.stored(np.array([1.0, 1.0, 2.0, 2.0]), "s")
            self.add("Resize", [self.last, "", scales], mode="nearest", coordinate_transformation_mode="asymmetric")
            self.size *= 2
        self.earlier.append((self.last, self.channels, self.size))

    def head(self, kind: str, width: int) -> None:
        same = self.alike()
        if kind == "gemm":
            self.add("Gemm", [self.last, self.weight(width, self.channels), self.weight(width)], transB=1)
            self.channels = width
        elif kind == "matmul":
            self.add("MatMul", [self.last, self.weight(self.channels, width)])
            self.add("Add", [self.last, self.weight(width)])
            self.channels = width
        elif kind in ("relu", "tanh"):
            self.add("Relu" if kind == "relu" else "Tanh", [self.last])
        elif kind == "residual" and same:
            self.add("Add", [self.last, same[-1]])
        self.earlier.append((self.last, self.channels, 1))

    def alike(self) -> list[str]:
        """Earlier tensors of the shape at hand."""
        return [name for name, *shape in self.earlier if shape == [self.channels, self.size] and name != self.last]

    def save(self, path: Path) -> Path:
        made = helper.make_graph(
            self.nodes,
            "random",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8, 16, 16])],
            [helper.make_tensor_value_info(self.last, TensorProto.FLOAT, ["batch", CLASSES])],
            self.store,
        )
        model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, str(path))
        return path


def inputs(count: int = 4) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, 8, 16, 16)).astype(np.float32)


def table(path: Path) -> CalibrationTable:
    """The extremes of every tensor on 4 random samples, as minmax calibration finds them."""
    import onnxruntime

    model = graph.load(path)
    given_names = {v.name for v in model.graph.output}
    for node in model.graph.node:
        if node.output[0] not in given_names:
            model.graph.output.append(helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": inputs()})
    values = {"x": inputs(), **dict(zip([o.name for o in session.get_outputs()], found, strict=True))}
    ranges = {name: Range(float(v.min()), float(v.max())) for name, v in values.items()}
    return CalibrationTable(ranges, ranges, "minmax", graph.digest(graph.load(path)), "s" * 64, None, 4)
