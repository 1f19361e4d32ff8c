"""Equalization: the float model computes what it did, channels reach alike, and INT8 loses less where they were unequal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from deploykit import graph as graphs
from deploykit.errors import InputError
from deploykit.pipeline import quantizing, single
from deploykit.pipeline.request import DataRequest, Int8Request, Silent
from deploykit.samples import Samples
from deploykit.stages import calibration, precision
from deploykit.stages.precision import channel_groups, normal_form
from deploykit.stages.precision.equalization import ROOM

CHANNELS = 8


class Images:
    """A Reader over one array."""

    def __init__(self, array: NDArray[np.float32]) -> None:
        self.array = array

    def read(self, indices: list[int]) -> dict[str, NDArray[np.float32]]:
        return {"x": self.array[list(indices)]}


def bottleneck(path: Path, activation: str = "Clip", *, also: str = "") -> Path:
    """Conv, activation, depthwise Conv, activation, Conv, added to its own input, then Conv, pooling and Gemm. The first two
    layers' channels differ by a factor of up to 200. `also`: an operator that reads the first activation too."""
    rng = np.random.default_rng(1)
    uneven = np.geomspace(1.0, 200.0, CHANNELS).reshape(-1, 1, 1, 1)
    weights = {
        "stem_w": rng.normal(size=(4, 3, 3, 3)) * 0.3,
        "expand_w": rng.normal(size=(CHANNELS, 4, 1, 1)) / uneven,
        "expand_b": rng.normal(size=CHANNELS) * 0.1 / uneven.reshape(-1),
        "depth_w": rng.normal(size=(CHANNELS, 1, 3, 3)) * uneven * 0.5,
        "project_w": rng.normal(size=(4, CHANNELS, 1, 1)) * 0.4,
        "last_w": rng.normal(size=(6, 4, 1, 1)),
        "head_w": rng.normal(size=(6, 5)),
        "zero": np.array(0.0),
        "six": np.array(6.0),
    }

    def activated(name: str) -> onnx.NodeProto:
        inputs = [name, "zero", "six"] if activation == "Clip" else [name]
        return helper.make_node(activation, inputs, [f"{name}_a"], name=f"{name}_act")

    make = helper.make_node
    nodes = [
        make("Conv", ["x", "stem_w"], ["stem"], name="stem", pads=[1] * 4),
        make("Conv", ["stem", "expand_w", "expand_b"], ["expand"], name="expand"),
        activated("expand"),
        make("Conv", ["expand_a", "depth_w"], ["depth"], name="depth", group=CHANNELS, pads=[1] * 4),
        activated("depth"),
        make("Conv", ["depth_a", "project_w"], ["project"], name="project"),
        make("Add", ["project", "stem"], ["sum"], name="sum"),
        make("Conv", ["sum", "last_w"], ["last"], name="last"),
        make("GlobalAveragePool", ["last"], ["pooled"], name="pool"),
        make("Flatten", ["pooled"], ["flat"], name="flatten"),
        make("Gemm", ["flat", "head_w"], ["y"], name="head"),
    ]
    outputs = [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 5])]
    if also:
        nodes.append(make(also, ["expand_a"], ["seen"], name="also"))
        outputs.append(helper.make_tensor_value_info("seen", onnx.TensorProto.FLOAT, None))
    graph = helper.make_graph(
        nodes,
        "bottleneck",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 3, 8, 8])],
        outputs,
        [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    return path


def samples_of(path: Path, n: int = 32, seed: int = 0) -> Samples:
    array = np.random.default_rng(seed).normal(size=(n, 3, 8, 8)).astype(np.float32)
    signature = graphs.signature(graphs.load(path))
    return Samples("test", "0" * 64, Images(array), signature, None, tuple(range(n)), role="calibrate")


def outputs(path: Path, samples: Samples) -> list[NDArray[np.float64]]:
    session = precision.literal_session(graphs.load(path), 1)
    found = session.run(None, samples.reader.read(list(samples.indices)))
    return [np.asarray(value, np.float64) for value in found]


def sqnr(wanted: NDArray[np.float64], found: NDArray[np.float64]) -> float:
    return float(10 * np.log10(np.square(wanted).sum() / np.square(wanted - found).sum()))


def spread(path: Path, tensor: str, samples: Samples) -> float:
    """The largest channel's range over the smallest one's."""
    model = graphs.load(path)
    del model.graph.output[:]
    model.graph.output.append(helper.make_empty_tensor_value_info(tensor))
    (value,) = precision.literal_session(model, 1).run(None, samples.reader.read(list(samples.indices)))
    reach = np.abs(np.moveaxis(value, 1, 0).reshape(value.shape[1], -1)).max(axis=1)
    return float(reach.max() / reach.min())


@pytest.mark.parametrize("activation", ["Clip", "Relu", "LeakyRelu"])
def test_the_float_model_computes_what_it_did(tmp_path: Path, activation: str) -> None:
    path = bottleneck(tmp_path / "net.onnx", activation)
    samples = samples_of(path)
    made = precision.equalize(path, samples, tmp_path / "level.onnx")
    assert made.facts["equalized_groups"] > 0
    for unseen in (samples, samples_of(path, seed=9)):
        assert sqnr(outputs(path, unseen)[0], outputs(made.path, unseen)[0]) > 60.0


def test_channels_reach_alike_and_int8_loses_less(tmp_path: Path) -> None:
    path = bottleneck(tmp_path / "net.onnx", "Relu")
    samples, judge = samples_of(path), samples_of(path, seed=5)
    level = precision.equalize(path, samples, tmp_path / "level.onnx").path
    assert spread(level, "expand_a", samples) < 0.1 * spread(path, "expand_a", samples)
    found = {}
    for name, source in (("as it is", path), ("equalized", level)):
        table = calibration.collect(source, samples, methods=("minmax",))["minmax"]
        int8 = precision.to_int8(source, table, "cpu", tmp_path / f"{name}.int8.onnx")
        found[name] = sqnr(outputs(path, judge)[0], outputs(int8.path, judge)[0])
    assert found["equalized"] > found["as it is"] + 3.0


def test_under_a_clip_an_enlarged_channel_stays_below_its_bound(tmp_path: Path) -> None:
    path = bottleneck(tmp_path / "net.onnx", "Clip")
    samples = samples_of(path)
    level = precision.equalize(path, samples, tmp_path / "level.onnx").path
    before, after = (normal_form.load(p)[0] for p in (path, level))
    old, new = (g.array(next(n for n in g.nodes if n.name == "expand").input[1]) for g in (before, after))
    factors = np.abs(new).max(axis=(1, 2, 3)) / np.abs(old).max(axis=(1, 2, 3))
    model = graphs.load(path)
    del model.graph.output[:]
    model.graph.output.append(helper.make_empty_tensor_value_info("expand"))
    (value,) = precision.literal_session(model, 1).run(None, samples.reader.read(list(samples.indices)))
    high = value.max(axis=(0, 2, 3))
    enlarged = factors > 1.001
    assert enlarged.any()
    assert (high * factors)[enlarged].max() <= 6.0 / ROOM * 1.001


def test_a_tensor_that_something_else_reads_is_left_alone(tmp_path: Path) -> None:
    path = bottleneck(tmp_path / "net.onnx", "Relu", also="Sigmoid")
    groups = channel_groups.find(normal_form.load(path)[0])
    assert all("expand_a" not in group.tensors for group in groups)
    made = precision.equalize(path, samples_of(path), tmp_path / "level.onnx")
    for wanted, found in zip(outputs(path, samples_of(path)), outputs(made.path, samples_of(path)), strict=True):
        assert sqnr(wanted, found) > 60.0


def test_layers_joined_by_an_addition_share_their_factors(tmp_path: Path) -> None:
    groups = channel_groups.find(normal_form.load(bottleneck(tmp_path / "net.onnx"))[0])
    joined = next(group for group in groups if "sum" in group.tensors)
    assert {"stem", "project", "sum"} <= set(joined.tensors)
    assert len(joined.makers) == 2
    assert len(joined.readers) == 2


def test_without_two_layers_in_a_row_it_says_so(tmp_path: Path) -> None:
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 3, 8, 8]) for name in "xy")
    weight = numpy_helper.from_array(np.ones((3, 3, 1, 1), np.float32), "w")
    graph = helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"])], "one", [x], [y], [weight])
    path = tmp_path / "one.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    with pytest.raises(InputError, match="no two layers"):
        precision.equalize(path, samples_of(path), tmp_path / "level.onnx")


def quantized(folder: Path, mode: str = "static", **more: object) -> single.Artifact:
    path = bottleneck(folder / "net.onnx")
    samples = samples_of(path)
    np.savez(folder / "data.npz", x=samples.reader.read(list(samples.indices))["x"])
    request = DataRequest(str(folder / "data.npz"), int8=Int8Request(equalize=True), **more)  # type: ignore[arg-type]
    return quantizing.quantize_file(path, mode, "cpu", folder / "out.onnx", request, Silent(), {})


def test_quantize_equalizes_first_and_says_so(tmp_path: Path) -> None:
    made = quantized(tmp_path)
    assert made.options["equalize"] is True
    assert made.facts["equalized"]["equalized_groups"] > 0  # type: ignore[index,call-overload]
    assert any(line.startswith("equalized:") for line in single.fact_lines(made))
    assert sqnr(outputs(tmp_path / "net.onnx", samples_of(made.path))[0], outputs(made.path, samples_of(made.path))[0]) > 15.0
    assert not [p for p in tmp_path.iterdir() if p.name not in ("net.onnx", "data.npz", "out.onnx", "out.onnx.manifest.json")]


def test_equalize_is_refused_where_it_makes_no_sense(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--mode fp16"):
        quantized(tmp_path, "fp16")
    with pytest.raises(InputError, match="--calib"):
        quantized(tmp_path, calib_table=tmp_path / "calib.json")
