"""Quantized graphs for the TensorRT tests: one convolution between Q/DQ nodes, with every way to get it wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper as nh

from deploykit import graph
from deploykit.artifact import Artifact


def qdq_conv(
    path: Path,
    *,
    zero_point: int = 0,
    zero_dtype: Any = np.int8,
    scale: float = 0.05,
    axis: int = 0,
    weight_dq: bool = True,
    computed_scale: bool = False,
    activation: str = "Relu",
    batch: int | str = "batch",
    float_type: Any = np.float16,
    scale_through: str | None = None,
    moved: str | None = None,
) -> Path:
    """x [batch, 8, 16, 16] float32 -> (Cast) -> Q -> DQ -> Conv (int8 weights, DQ) -> Relu -> (Cast) -> y.

    scale_through: an operator (Identity, Cast) between the stored scale and the Q/DQ nodes; moved: one (MaxPool, Relu)
    between DQ and Conv; Cast: to float32, behind the weight's DQ too.
    """
    rng = np.random.default_rng(0)
    half = float_type == np.float16
    store = [
        nh.from_array(np.array(scale, float_type), "xs"),
        nh.from_array(np.array(zero_point, zero_dtype), "xz"),
        nh.from_array(rng.integers(-100, 100, (8, 8, 3, 3)).astype(np.int8), "wq"),
        nh.from_array(np.full(8, 0.01, float_type), "ws"),
        nh.from_array(np.zeros(8, np.int8), "wz"),
        nh.from_array(rng.normal(size=(8, 8, 3, 3)).astype(float_type), "w"),
        nh.from_array(np.zeros(8, float_type), "b"),
    ]
    nodes = [h.make_node("Cast", ["x"], ["xh"], name="cast_in", to=T.FLOAT16 if half else T.FLOAT)]
    if computed_scale:
        nodes.append(h.make_node("ReduceMax", ["xh"], ["dyn"], name="largest", keepdims=0))
    s = "dyn" if computed_scale else "xs"
    if scale_through:
        to = {"to": T.FLOAT16 if half else T.FLOAT} if scale_through == "Cast" else {}
        nodes.append(h.make_node(scale_through, ["xs"], ["folded"], name="fold", **to))
        s = "folded"
    nodes += [
        h.make_node("QuantizeLinear", ["xh", s, "xz"], ["xq"], name="q0"),
        h.make_node("DequantizeLinear", ["xq", s, "xz"], ["xd"], name="dq0"),
    ]
    if weight_dq:
        nodes.append(h.make_node("DequantizeLinear", ["wq", "ws", "wz"], ["wd"], name="dqw", axis=axis))
    weight, bias = "wd" if weight_dq else "w", "b"
    if moved == "Cast":
        nodes.append(h.make_node("Cast", ["xd"], ["xm"], name="move", to=T.FLOAT))
        nodes.append(h.make_node("Cast", [weight], ["wf"], name="move_weight", to=T.FLOAT))
        store.append(nh.from_array(np.zeros(8, np.float32), "bf"))
        weight, bias = "wf", "bf"
    elif moved:
        window = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]} if moved == "MaxPool" else {}
        nodes.append(h.make_node(moved, ["xd"], ["xm"], name="move", **window))
    nodes += [
        h.make_node("Conv", ["xm" if moved else "xd", weight, bias], ["c"], name="conv0", pads=[1, 1, 1, 1]),
        h.make_node(activation, ["c"], ["a"], name="act"),
        h.make_node("Cast", ["a"], ["y"], name="cast_out", to=T.FLOAT),
    ]
    shape = [batch, 8] if activation == "Det" else [batch, 8, 16, 16]
    made = h.make_graph(
        nodes,
        "qdq_conv",
        [h.make_tensor_value_info("x", T.FLOAT, [batch, 8, 16, 16])],
        [h.make_tensor_value_info("y", T.FLOAT, shape)],
        store,
    )
    onnx.save(h.make_model(made, opset_imports=[h.make_opsetid("", 19)], ir_version=9), str(path))
    return path


def to_half(source: Path, path: Path) -> Path:
    """The graph with its insides in float16 and its inputs and outputs in float32 (ONNX Runtime's converter)."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(str(source)), keep_io_types=True), str(path))
    return path


def artifact(path: Path, precision: str) -> Artifact:
    """The .onnx as a stage hands it on."""
    return Artifact(path, "onnx", precision, graph.signature(graph.load(path)), "precision", sha256="0" * 64)


def build_in_child(name: str, made: Artifact, request: Any, folder: Path) -> Artifact:
    """What the pipeline does: the backend's build in a child process."""
    from deploykit import children
    from deploykit.pipeline.prepare import build_engine

    return children.run("build", build_engine, name, made, request, folder, timeout_s=120.0)


def attempt_unguarded(path: Path) -> None:
    """A real build with our own check for known crashes left out; called in a child process."""
    import tensorrt_rtx as trt

    from deploykit.trt import builder, parser_graph, profiles

    model = parser_graph.load(path, guard=False)
    signature = graph.signature(model)
    builder.build(trt, model, path, signature, builder.PlanSpec(profiles.for_batches(signature, (1, 2)), "sm89"))


def quantized_by_onnxruntime(
    source: Path, path: Path, unsigned: tuple[bool, bool], per_channel: bool, extras: dict[str, Any]
) -> Path:
    """The network of `random_networks` at `source` with ONNX Runtime's Q/DQ nodes. unsigned: activations, weights in uint8."""
    import random_networks
    from onnxruntime import quantization as q

    class Reader(q.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter([{"x": random_networks.inputs()}])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.left, None)

    kinds = [q.QuantType.QUInt8 if u else q.QuantType.QInt8 for u in unsigned]
    q.quantize_static(
        str(source),
        str(path),
        Reader(),
        quant_format=q.QuantFormat.QDQ,
        activation_type=kinds[0],
        weight_type=kinds[1],
        per_channel=per_channel,
        extra_options=extras,
    )
    return path
