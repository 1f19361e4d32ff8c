"""Tiny real models for the tests, written as ONNX files with onnx.helper."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def _tensor(name: str, array: np.ndarray) -> onnx.TensorProto:
    return numpy_helper.from_array(array.astype(np.float32), name)


def conv_net(
    path: Path, *, batch: int | str = "batch", classes: int = 4, channels: int = 3, size: int = 8, seed: int = 0
) -> Path:
    """Conv-Relu-Conv-Add-Relu-GlobalAveragePool-Flatten-Gemm: input x [batch, channels, size, size], output logits [batch, classes]."""
    rng = np.random.default_rng(seed)
    width = 8
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], name="conv1", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], name="conv2", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c2", "r1"], ["a1"], name="add1"),
        helper.make_node("Relu", ["a1"], ["r2"], name="relu2"),
        helper.make_node("GlobalAveragePool", ["r2"], ["g1"], name="pool"),
        helper.make_node("Flatten", ["g1"], ["f1"], name="flatten"),
        helper.make_node("Gemm", ["f1", "w3", "b3"], ["logits"], name="fc", transB=1),
    ]
    weights = [
        _tensor("w1", rng.normal(0, 0.4, (width, channels, 3, 3))),
        _tensor("b1", rng.normal(0, 0.1, width)),
        _tensor("w2", rng.normal(0, 0.2, (width, width, 3, 3))),
        _tensor("b2", rng.normal(0, 0.1, width)),
        _tensor("w3", rng.normal(0, 1.0, (classes, width))),
        _tensor("b3", rng.normal(0, 0.1, classes)),
    ]
    graph = helper.make_graph(
        nodes,
        "conv_net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, channels, size, size])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, classes])],
        weights,
    )
    return _save(graph, path)


def two_inputs(path: Path) -> Path:
    """Add of a MatMul and an integer embedding: inputs a float32 [batch, 6], ids int64 [batch, 3]; outputs y [batch, 5], z [batch]."""
    rng = np.random.default_rng(1)
    nodes = [
        helper.make_node("MatMul", ["a", "w"], ["m"], name="matmul"),
        helper.make_node("Gather", ["table", "ids"], ["e"], name="embed", axis=0),
        helper.make_node("ReduceMean", ["e", "axes"], ["em"], name="mean", keepdims=0),
        helper.make_node("Add", ["m", "em"], ["y"], name="add"),
        helper.make_node("ReduceSum", ["y", "axes"], ["z"], name="sum", keepdims=0),
    ]
    weights = [
        _tensor("w", rng.normal(0, 1, (6, 5))),
        _tensor("table", rng.normal(0, 1, (10, 5))),
        numpy_helper.from_array(np.array([1], dtype=np.int64), "axes"),
    ]
    graph = helper.make_graph(
        nodes,
        "two_inputs",
        [
            helper.make_tensor_value_info("a", TensorProto.FLOAT, ["batch", 6]),
            helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", 3]),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 5]),
            helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch"]),
        ],
        weights,
    )
    return _save(graph, path)


def _save(graph: onnx.GraphProto, path: Path) -> Path:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))
    return path
