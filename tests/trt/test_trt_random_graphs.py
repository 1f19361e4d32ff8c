"""Random networks through quantization, the checks and a real INT8 build: nothing crashes, what the checks pass the builder
accepts, and what asked for INT8 runs in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from deploykit import backends, children, graph
from deploykit.calibration_table import CalibrationTable, Range
from deploykit.pipeline.prepare import build_engine
from deploykit.session import BuildRequest
from deploykit.stages import precision
from deploykit.stages.checks import api as checks

OPS = ("conv3", "conv1", "depthwise", "stride", "relu", "clip", "sigmoid", "maxpool", "avgpool", "residual", "concat")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(backends.get("tensorrt-rtx").missing() is not None, reason="tensorrt-rtx is not installed"),
]


class _Net:
    """A network grown node by node: x [batch, 8, 16, 16] -> ... -> logits [batch, 5]."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.store: list[onnx.TensorProto] = []
        self.last, self.channels, self.size = "x", 8, 16
        self.earlier: list[tuple[str, int, int]] = [("x", 8, 16)]

    def _weight(self, *shape: int) -> str:
        name = f"w{len(self.store)}"
        values = self.rng.normal(0, 1 / np.sqrt(np.prod(shape[1:]) or 1), shape).astype(np.float32)
        self.store.append(numpy_helper.from_array(values, name))
        return name

    def add(self, op: str, inputs: list[str], **attributes: object) -> None:
        output = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], name=f"{op}_{len(self.nodes)}", **attributes))
        self.last = output

    def conv(self, out: int, kernel: int, stride: int = 1, group: int = 1) -> None:
        weight = self._weight(out, self.channels // group, kernel, kernel)
        pad = kernel // 2
        self.add("Conv", [self.last, weight, self._weight(out)], pads=[pad] * 4, strides=[stride] * 2, group=group)
        self.channels, self.size = out, (self.size + stride - 1) // stride

    def grow(self, kind: str, width: int) -> None:
        same = [e for e in self.earlier if e[1:] == (self.channels, self.size) and e[0] != self.last]
        level = [e for e in self.earlier if e[2] == self.size and e[0] != self.last]
        if kind in ("conv3", "conv1"):
            self.conv(width, 3 if kind == "conv3" else 1)
        elif kind == "depthwise":
            self.conv(self.channels, 3, group=self.channels)
        elif kind == "stride" and self.size > 4:
            self.conv(width, 3, stride=2)
        elif kind == "relu":
            self.add("Relu", [self.last])
        elif kind == "sigmoid":
            self.add("Sigmoid", [self.last])
        elif kind == "clip":
            for value in (0.0, 6.0):
                self.store.append(numpy_helper.from_array(np.array(value, np.float32), f"k{len(self.store)}"))
            self.add("Clip", [self.last, self.store[-2].name, self.store[-1].name])
        elif kind in ("maxpool", "avgpool"):
            self.add("MaxPool" if kind == "maxpool" else "AveragePool", [self.last], kernel_shape=[3, 3], pads=[1] * 4)
        elif kind == "residual" and same:
            self.add("Add", [self.last, same[-1][0]])
        elif kind == "concat" and level and self.channels + level[-1][1] <= 64:
            self.add("Concat", [self.last, level[-1][0]], axis=1)
            self.channels += level[-1][1]
        self.earlier.append((self.last, self.channels, self.size))

    def save(self, path: Path) -> Path:
        self.add("GlobalAveragePool", [self.last])
        self.add("Flatten", [self.last])
        self.add("Gemm", [self.last, self._weight(5, self.channels), self._weight(5)], transB=1)
        made = helper.make_graph(
            self.nodes,
            "random",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8, 16, 16])],
            [helper.make_tensor_value_info(self.last, TensorProto.FLOAT, ["batch", 5])],
            self.store,
        )
        model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, str(path))
        return path


def _table(path: Path) -> CalibrationTable:
    """The extremes of every tensor on 4 random samples, as minmax calibration finds them."""
    import onnxruntime

    model = graph.load(path)
    given_names = {v.name for v in model.graph.output}
    for node in model.graph.node:
        if node.output[0] not in given_names:
            model.graph.output.append(helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).normal(size=(4, 8, 16, 16)).astype(np.float32)
    values = {"x": x, **dict(zip([o.name for o in session.get_outputs()], session.run(None, {"x": x}), strict=True))}
    ranges = {name: Range(float(v.min()), float(v.max())) for name, v in values.items()}
    return CalibrationTable(ranges, ranges, "minmax", graph.digest(graph.load(path)), "s" * 64, None, 4)


@pytest.fixture(scope="module")
def child() -> children.Child:
    with children.Child("random builds") as made:
        yield made  # type: ignore[misc]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    kinds=st.lists(st.tuples(st.sampled_from(OPS), st.sampled_from((8, 16, 24))), min_size=1, max_size=9),
    seed=st.integers(0, 99),
    target=st.sampled_from(("sm86", "sm89")),
)
def test_random_networks_build_in_int8_as_asked(
    child: children.Child, tmp_path_factory: pytest.TempPathFactory, kinds: list[tuple[str, int]], seed: int, target: str
) -> None:
    folder = tmp_path_factory.mktemp("random")
    net = _Net(seed)
    for kind, width in kinds:
        net.grow(kind, width)
    path = net.save(folder / "f.onnx")
    made = precision.to_int8_fp16(path, _table(path), folder / "q.onnx").save()
    assert [f for f in checks.find(made.path, ("tensorrt-rtx",)) if f.severity == "error"] == []
    request = BuildRequest("int8", target, (1, 4), options={"verify_rebuild": False})
    engine = child.call(build_engine, "tensorrt-rtx", made, request, folder, timeout_s=120.0)
    convolutions = sum(node.op_type == "Conv" for node in net.nodes)
    assert sum(engine.facts["requested"].get("Conv", {}).values()) == convolutions
    short = [row for row in engine.facts["fallback"] if row["op"] == "Conv"]
    told = engine.facts["fell_back"]
    assert bool(engine.facts["fallback"]) == (told is not None)
    assert short == [], f"{told}: {kinds}"
