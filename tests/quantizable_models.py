"""Small float graphs that are awkward to quantize, and a min/max calibration table for any of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from deploykit import graph as graphs
from deploykit.calibration_table import CalibrationTable, Range

Feeds = dict[str, np.ndarray]
IMAGE = ["batch", 3, 8, 8]
node = helper.make_node


def const(name: str, *shape: int, scale: float = 0.3, seed: int = 0) -> onnx.TensorProto:
    values = np.random.default_rng([seed, *map(ord, name)]).normal(0, scale, shape)
    return numpy_helper.from_array(values.astype(np.float32), name)


def ints(name: str, *values: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def model(
    nodes: Sequence[onnx.NodeProto],
    weights: Sequence[onnx.TensorProto],
    inputs: dict[str, list[int | str]] | None = None,
    outputs: Sequence[str] = ("y",),
    *,
    opset: int = 18,
    ir: int = 10,
    weights_are_inputs: bool = False,
) -> onnx.ModelProto:
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (inputs or {"x": IMAGE}).items()]
    if weights_are_inputs:
        info += [helper.make_tensor_value_info(w.name, w.data_type, list(w.dims)) for w in weights]
    graph = helper.make_graph(
        list(nodes), "g", info, [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs], list(weights)
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
    inferred = onnx.shape_inference.infer_shapes(made, data_prop=True)
    for mine, found in zip(made.graph.output, inferred.graph.output, strict=True):
        mine.CopyFrom(found)
    onnx.checker.check_model(made, full_check=True)
    return made


def feeds_for(made: onnx.ModelProto, batch: int, seed: int = 0) -> Feeds:
    rng = np.random.default_rng(seed)
    stored = {t.name for t in made.graph.initializer}
    result = {}
    for value in made.graph.input:
        if value.name in stored:
            continue
        shape = [d.dim_value or batch for d in value.type.tensor_type.shape.dim]
        if value.type.tensor_type.elem_type == TensorProto.BOOL:
            result[value.name] = np.ones(shape, bool)
        else:
            result[value.name] = rng.normal(0, 1, shape).astype(np.float32)
    return result


def run(source: onnx.ModelProto | Path, feeds: Feeds, *, literal: bool = False) -> list[np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if literal:
        from deploykit.stages.precision import predict_session_options

        for key, value in predict_session_options().items():
            options.add_session_config_entry(key, value)
    data = str(source) if isinstance(source, Path) else source.SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(None, feeds)


def table_for(path: Path, *, batches: int = 4, batch: int = 8, made_for: str | None = None) -> CalibrationTable:
    """Exact extremes of every float tensor of the main graph over random batches."""
    made = graphs.load(path)
    digest = graphs.digest(made)
    probe = onnx.ModelProto()
    probe.CopyFrom(made)
    inferred = onnx.shape_inference.infer_shapes(made)
    known = {v.name: v for v in [*inferred.graph.value_info, *inferred.graph.output]}
    shown = {v.name for v in made.graph.output}
    names = [n for n, v in known.items() if v.type.tensor_type.elem_type == TensorProto.FLOAT]
    del probe.graph.output[:]
    probe.graph.output.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names)
    assert shown
    low: dict[str, float] = {}
    high: dict[str, float] = {}
    for seed in range(batches):
        feeds = feeds_for(made, batch, seed)
        values = dict(zip(names, run(probe, feeds), strict=True)) | {k: v for k, v in feeds.items() if v.dtype == np.float32}
        for name, value in values.items():
            if value.size:
                low[name] = min(low.get(name, np.inf), float(value.min()))
                high[name] = max(high.get(name, -np.inf), float(value.max()))
    ranges = {name: Range(low[name], high[name]) for name in low}
    return CalibrationTable(ranges, ranges, "minmax", made_for or digest, "0" * 64, None, batches * batch)


def sqnr_db(reference: np.ndarray, found: np.ndarray) -> float:
    """10 log10 of signal power over noise power."""
    noise = float(np.square(reference.astype(np.float64) - found).sum())
    return float(10 * np.log10(float(np.square(reference.astype(np.float64)).sum()) / max(noise, 1e-30)))


def conv(source: str, result: str, weight: str, *bias: str, kernel: int = 3, **attributes: object) -> onnx.NodeProto:
    pads = [kernel // 2] * 4
    return node("Conv", [source, weight, *bias], [result], name=f"conv_{result}", **{"pads": pads, **attributes})


def batch_norm() -> onnx.ModelProto:
    stats = [const("g", 4, scale=1), const("be", 4), const("m", 4), numpy_helper.from_array(np.full(4, 0.7, np.float32), "v")]
    nodes = [conv("x", "c", "w"), node("BatchNormalization", ["c", "g", "be", "m", "v"], ["n"]), node("Relu", ["n"], ["y"])]
    return model(nodes, [const("w", 4, 3, 3, 3), *stats])


def leading_batch_norm() -> onnx.ModelProto:
    stats = [const("g", 3, scale=1), const("be", 3), const("m", 3), numpy_helper.from_array(np.full(3, 0.7, np.float32), "v")]
    return model(
        [node("BatchNormalization", ["x", "g", "be", "m", "v"], ["n"]), conv("n", "y", "w")], [const("w", 4, 3, 3, 3), *stats]
    )


def several_inputs() -> onnx.ModelProto:
    nodes = [
        conv("x", "a", "w", "b"),
        conv("z", "c", "w"),
        node("Concat", ["a", "c"], ["d"], axis=1),
        conv("d", "y", "v", kernel=1),
    ]
    return model(nodes, [const("w", 4, 3, 3, 3), const("b", 4), const("v", 5, 8, 1, 1)], {"x": IMAGE, "z": IMAGE}, ("y", "d"))


def control_flow() -> onnx.ModelProto:
    def branch(name: str, op: str) -> onnx.GraphProto:
        body = [conv("c", f"{name}_k", "w2"), node(op, [f"{name}_k"], [f"{name}_o"])]
        out = [helper.make_tensor_value_info(f"{name}_o", TensorProto.FLOAT, ["batch", 4, 8, 8])]
        return helper.make_graph(body, name, [], out)

    nodes = [
        conv("x", "c", "w"),
        node("If", ["flag"], ["i"], then_branch=branch("then", "Relu"), else_branch=branch("else", "Neg")),
        conv("i", "y", "w2"),
    ]
    weights = [const("w", 4, 3, 3, 3), const("w2", 4, 4, 3, 3)]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, IMAGE),
            helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4, 8, 8])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def shared_weights() -> onnx.ModelProto:
    """One square matrix read along both axes, and a kernel read by two convolutions, whose biases differ."""
    nodes = [
        node("Gemm", ["x", "w"], ["a"], transB=0),
        node("Gemm", ["a", "w"], ["b"], transB=1),
        node("MatMul", ["b", "w"], ["y"]),
        node("Add", ["w", "w"], ["y2"]),
    ]
    return model(nodes, [const("w", 6, 6)], {"x": ["batch", 6]}, ("y", "y2"))


def grouped() -> onnx.ModelProto:
    nodes = [
        conv("x", "a", "w", "b", group=3),
        node("Clip", ["a", "zero", "six"], ["r"]),
        conv("r", "c", "v", group=2),
        node("HardSwish", ["c"], ["y"]),
    ]
    limits = [numpy_helper.from_array(np.array(v, np.float32), n) for n, v in (("zero", 0.0), ("six", 6.0))]
    return model(nodes, [const("w", 6, 1, 3, 3), const("b", 6), const("v", 4, 3, 3, 3), *limits])


def transposed() -> onnx.ModelProto:
    nodes = [
        node("ConvTranspose", ["x", "w", "b"], ["a"], strides=[2, 2]),
        node("Relu", ["a"], ["r"]),
        node("ConvTranspose", ["r", "v"], ["c"], group=2),
        conv("c", "y", "u", kernel=1),
    ]
    return model(nodes, [const("w", 3, 4, 2, 2), const("b", 4), const("v", 4, 2, 3, 3), const("u", 2, 4, 1, 1)])


def one_dimension() -> onnx.ModelProto:
    nodes = [node("Conv", ["x", "w", "b"], ["a"], pads=[1, 1]), node("Relu", ["a"], ["r"]), node("Conv", ["r", "v"], ["y"])]
    return model(nodes, [const("w", 5, 3, 3), const("b", 5), const("v", 2, 5, 1)], {"x": ["batch", 3, 12]})


def three_dimensions() -> onnx.ModelProto:
    nodes = [node("Conv", ["x", "w"], ["a"]), node("GlobalAveragePool", ["a"], ["p"]), node("Flatten", ["p"], ["y"])]
    return model(nodes, [const("w", 5, 2, 3, 3, 3)], {"x": ["batch", 2, 5, 5, 5]})


def odd_gemms() -> onnx.ModelProto:
    nodes = [
        node("Gemm", ["x", "w", "c"], ["a"], alpha=0.5, beta=2.0),
        node("Relu", ["a"], ["r"]),
        node("Gemm", ["r", "v", "s"], ["b"], transB=1, beta=0.3),
        node("Gemm", ["k", "u"], ["d"], transA=1),
        node("Gemm", ["b", "z"], ["e"]),
        node("Add", ["e", "d"], ["y"]),
    ]
    weights = [const("w", 6, 5), const("c", 1, 5), const("v", 4, 5), const("s"), const("u", 6, 3)]
    return model(nodes, weights, {"x": ["batch", 6], "k": [6, 1], "z": [4, 3]})


def weights_as_inputs() -> onnx.ModelProto:
    return model(
        [conv("x", "c", "w", "b"), node("Relu", ["c"], ["y"])], [const("w", 4, 3, 3, 3), const("b", 4)], weights_are_inputs=True
    )


def hidden_weights() -> onnx.ModelProto:
    """Weights behind Identity, Constant, Transpose and Cast nodes."""
    nodes = [
        node("Constant", [], ["w0"], value=const("", 4, 3, 3, 3)),
        node("Identity", ["w0"], ["w"]),
        conv("x", "c", "w"),
        node("GlobalAveragePool", ["c"], ["p"]),
        node("Flatten", ["p"], ["f"]),
        node("Transpose", ["l0"], ["l1"], perm=[1, 0]),
        node("Cast", ["l1"], ["l"], to=TensorProto.FLOAT),
        node("MatMul", ["f", "l"], ["m"]),
        node("Add", ["m", "bias"], ["y"]),
    ]
    stored = numpy_helper.from_array(np.random.default_rng(3).normal(0, 1, (5, 4)), "l0")
    return model(nodes, [stored, const("bias", 5)])


def run_time_weights() -> onnx.ModelProto:
    nodes = [node("Softmax", ["z"], ["s"]), node("MatMul", ["x", "s"], ["a"]), node("MatMul", ["a", "w"], ["y"])]
    return model(nodes, [const("w", 6, 3)], {"x": ["batch", 6], "z": [6, 6]})


def dead_channel() -> onnx.ModelProto:
    weight = numpy_helper.to_array(const("w", 4, 3, 3, 3)).copy()
    weight[1] = 0
    weight[2] *= 1e-9
    bias = np.array([0.1, 5.0, 3.0, 0.0], np.float32)
    nodes = [conv("x", "c", "w", "b"), node("Relu", ["c"], ["r"]), conv("r", "y", "v")]
    return model(nodes, [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b"), const("v", 2, 4, 3, 3)])


def residual() -> onnx.ModelProto:
    """A residual with an identity branch and one with a projection."""
    nodes = [
        conv("x", "c1", "w1", "b1"),
        node("Relu", ["c1"], ["r1"]),
        conv("r1", "c2", "w2"),
        node("Add", ["c2", "r1"], ["a1"]),
        node("Relu", ["a1"], ["r2"]),
        conv("r2", "p", "w3", kernel=1),
        conv("r2", "c3", "w4"),
        node("Add", ["c3", "p"], ["a2"]),
        node("Relu", ["a2"], ["r3"]),
        node("MaxPool", ["r3"], ["m"], kernel_shape=[2, 2], strides=[2, 2]),
        node("ReduceMean", ["m", "axes"], ["g"], keepdims=1),
        node("Flatten", ["g"], ["f"]),
        node("Gemm", ["f", "w5", "b5"], ["y"], transB=1),
    ]
    weights = [const("w1", 4, 3, 3, 3), const("b1", 4), const("w2", 4, 4, 3, 3), const("w3", 6, 4, 1, 1), const("w4", 6, 4, 3, 3)]
    return model(nodes, [*weights, const("w5", 5, 6), const("b5", 5), ints("axes", 2, 3)])


def squeeze_excite() -> onnx.ModelProto:
    """SiLU, a squeeze-and-excite gate, a nearest resize, a concat, a split, and outputs in the middle."""
    nodes = [
        conv("x", "c", "w1", "b1"),
        node("Sigmoid", ["c"], ["s"]),
        node("Mul", ["c", "s"], ["m"]),
        node("GlobalAveragePool", ["m"], ["g"]),
        conv("g", "e", "w2", kernel=1),
        node("HardSigmoid", ["e"], ["h"]),
        node("Mul", ["m", "h"], ["n"]),
        node("Resize", ["n", "", "scales"], ["u"], mode="nearest"),
        node("AveragePool", ["u"], ["d"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Concat", ["d", "c"], ["k"], axis=1),
        node("Split", ["k"], ["k1", "k2"], axis=1, num_outputs=2),
        conv("k1", "y", "w2", kernel=1),
        node("Relu", ["k2"], ["y2"]),
    ]
    scales = numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales")
    return model(nodes, [const("w1", 4, 3, 3, 3), const("b1", 4), const("w2", 4, 4, 1, 1), scales], outputs=("y", "y2", "c"))


def dense_block() -> onnx.ModelProto:
    """DenseNet's: joined features, normalized before the convolution; the second join also feeds a convolution directly."""
    stats = [
        t
        for k, channels in (("1", 8), ("2", 12))
        for t in (
            const(f"g{k}", channels, scale=1),
            const(f"be{k}", channels),
            const(f"m{k}", channels),
            numpy_helper.from_array(np.full(channels, 0.7, np.float32), f"v{k}"),
        )
    ]
    nodes = [
        conv("x", "a", "w1", "b1"),
        conv("a", "c", "w2", "b2"),
        node("Concat", ["a", "c"], ["j1"], axis=1, name="read_as_float"),
        node("BatchNormalization", ["j1", "g1", "be1", "m1", "v1"], ["n1"]),
        node("Relu", ["n1"], ["r1"]),
        conv("r1", "d", "w3", "b3"),
        node("Concat", ["a", "c", "d"], ["j2"], axis=1, name="read_in_integers"),
        node("BatchNormalization", ["j2", "g2", "be2", "m2", "v2"], ["n2"]),
        conv("j2", "e", "w4"),
        node("Add", ["n2", "e"], ["y"]),
    ]
    weights = [const("w1", 4, 3, 3, 3), const("w2", 4, 4, 3, 3), const("w3", 4, 8, 3, 3), const("w4", 12, 12, 3, 3)]
    return model(nodes, [*weights, const("b1", 4), const("b2", 4), const("b3", 4), *stats])


def old_opset() -> onnx.ModelProto:
    return model([conv("x", "c", "w"), node("Relu", ["c"], ["y"])], [const("w", 4, 3, 3, 3)], opset=11, ir=6)


def attention() -> onnx.ModelProto:
    """One head over a sequence, LayerNormalization before it."""
    nodes = [
        node("LayerNormalization", ["x", "lg", "lb"], ["n"]),
        node("MatMul", ["n", "wq"], ["q"]),
        node("MatMul", ["n", "wk"], ["k"]),
        node("Transpose", ["k"], ["kt"], perm=[0, 2, 1]),
        node("MatMul", ["q", "kt"], ["s"]),
        node("Softmax", ["s"], ["p"]),
        node("MatMul", ["p", "n"], ["o"]),
        node("MatMul", ["o", "wo"], ["w"]),
        node("Add", ["w", "x"], ["y"]),
    ]
    return model(nodes, [const("lg", 8), const("lb", 8), *[const(n, 8, 8) for n in ("wq", "wk", "wo")]], {"x": ["batch", 5, 8]})


def local_function() -> onnx.ModelProto:
    """A convolution whose activation is a function that the model itself defines."""
    made = model(
        [conv("x", "c", "w"), node("Relu", ["c"], ["d"]), conv("d", "y", "v")], [const("w", 4, 3, 3, 3), const("v", 4, 4, 3, 3)]
    )
    made.graph.node[1].CopyFrom(node("Act", ["c"], ["d"], domain="mine"))
    made.functions.append(
        helper.make_function("mine", "Act", ["a"], ["b"], [node("Relu", ["a"], ["b"])], [helper.make_opsetid("", 18)])
    )
    made.opset_import.append(helper.make_opsetid("mine", 1))
    onnx.checker.check_model(made, full_check=True)
    return made


ZOO: dict[str, Callable[[], onnx.ModelProto]] = {
    f.__name__: f
    for f in (
        batch_norm, leading_batch_norm, several_inputs, control_flow, shared_weights, grouped, transposed, one_dimension,
        three_dimensions, odd_gemms, weights_as_inputs, hidden_weights, run_time_weights, dead_channel, residual,
        squeeze_excite, dense_block, old_opset, attention, local_function,
    )
}  # fmt: skip
