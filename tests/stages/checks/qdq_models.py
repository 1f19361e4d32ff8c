"""A quantized convolution with one thing changed at a time: for the tests of TensorRT's rules."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CHANNELS, WIDTH, SIZE = 3, 4, 8


@dataclass
class Qdq:
    """x -> Q -> DQ -> Conv (or another operator) -> Relu; weights and, where asked, the bias through DQ."""

    activation_dtype: type = np.int8
    activation_zero: int | None = 0
    activation_scale: object = 0.02
    weight_dtype: type = np.int8
    weight_zero: int = 0
    weight_axis: int = 0
    weight_scale: list[float] = field(default_factory=lambda: [0.01] * WIDTH)
    weight_values: np.ndarray | None = None
    quantize_activation: bool = True
    quantize_weight: bool = True
    int32_bias: bool = False
    computed_scale: bool = False
    between: bool = False
    op: str = "Conv"
    half: bool = False
    opset: int = 19

    def save(self, path: Path) -> Path:
        """Writes the model, checked."""
        nodes: list[onnx.NodeProto] = []
        stored: dict[str, np.ndarray] = {}
        dtype = np.float16 if self.half else np.float32
        data = self._activation(nodes, stored, dtype)
        weight = self._weight(nodes, stored, dtype)
        if self.int32_bias:
            stored |= {"b_q": np.arange(WIDTH, dtype=np.int32), "b_s": np.full(WIDTH, 0.0002, dtype)}
            nodes.append(helper.make_node("DequantizeLinear", ["b_q", "b_s"], ["b"], name="b_dq", axis=0))
        else:
            stored["b"] = np.linspace(-0.1, 0.1, WIDTH).astype(dtype)
        if self.op in ("Conv", "ConvTranspose"):
            nodes.append(
                helper.make_node(self.op, [data, weight, "b"], ["c"], name="layer", kernel_shape=[3, 3], pads=[1, 1, 1, 1])
            )
            x_shape, y_shape = ["batch", CHANNELS, SIZE, SIZE], ["batch", WIDTH, SIZE, SIZE]
        else:
            nodes.append(helper.make_node("MatMul", [data, weight], ["c"], name="layer"))
            x_shape, y_shape = ["batch", CHANNELS], ["batch", WIDTH]
        result = "c"
        if self.between:
            stored |= {"c_s": np.asarray(0.05, dtype), "c_z": np.zeros((), np.int8)}
            nodes.append(helper.make_node("QuantizeLinear", ["c", "c_s", "c_z"], ["c_q"], name="c_q"))
            nodes.append(helper.make_node("DequantizeLinear", ["c_q", "c_s", "c_z"], ["c_dq"], name="c_dq"))
            result = "c_dq"
        nodes.append(helper.make_node("Relu", [result], ["y"], name="relu"))
        kind = TensorProto.FLOAT16 if self.half else TensorProto.FLOAT
        used = {i for n in nodes for i in n.input}
        graph = helper.make_graph(
            nodes,
            "qdq",
            [helper.make_tensor_value_info("x", kind, x_shape)],
            [helper.make_tensor_value_info("y", kind, y_shape)],
            [numpy_helper.from_array(a, n) for n, a in stored.items() if n in used],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, str(path))
        return path

    def _activation(self, nodes: list[onnx.NodeProto], stored: dict[str, np.ndarray], dtype: type) -> str:
        if not self.quantize_activation:
            return "x"
        scale = np.asarray(self.activation_scale, dtype)
        stored["x_s"] = scale
        names = ["x_s"]
        if self.computed_scale:
            nodes.append(helper.make_node("ReduceMax", ["x"], ["x_computed"], name="x_max", keepdims=0))
            names = ["x_computed"]
        if self.activation_zero is not None:
            stored["x_z"] = np.full(scale.shape, self.activation_zero, self.activation_dtype)
            names.append("x_z")
        axis = {"axis": 1} if scale.ndim else {}
        nodes.append(helper.make_node("QuantizeLinear", ["x", *names], ["x_q"], name="x_q", **axis))
        nodes.append(helper.make_node("DequantizeLinear", ["x_q", *names], ["x_dq"], name="x_dq", **axis))
        return "x_dq"

    def _weight(self, nodes: list[onnx.NodeProto], stored: dict[str, np.ndarray], dtype: type) -> str:
        if self.op == "Conv":
            shape: tuple[int, ...] = (WIDTH, CHANNELS, 3, 3)
        elif self.op == "ConvTranspose":
            shape = (CHANNELS, WIDTH, 3, 3)
        else:
            shape = (CHANNELS, WIDTH)
        rng = np.random.default_rng(0)
        low = 0 if self.weight_dtype in (np.uint8, np.uint16) else -100
        values = self.weight_values if self.weight_values is not None else rng.integers(low, 101, shape)
        if not self.quantize_weight:
            stored["w"] = (values * 0.01).astype(dtype)
            return "w"
        stored |= {
            "w_q": values.astype(self.weight_dtype),
            "w_s": np.asarray(self.weight_scale, dtype),
            "w_z": np.full(len(self.weight_scale), self.weight_zero, self.weight_dtype),
        }
        nodes.append(helper.make_node("DequantizeLinear", ["w_q", "w_s", "w_z"], ["w"], name="w_dq", axis=self.weight_axis))
        return "w"
