"""Calibration of real tiny models in ONNX Runtime; the reference observes every value at once, with numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tiny_models
from onnx import TensorProto, helper, numpy_helper

from deploykit import children, graph, histogram, observation
from deploykit.calibration_table import METHODS, CalibrationTable
from deploykit.errors import BackendFailed, DataError, InputError, ModelError, UnknownName
from deploykit.preprocess import IMAGENET
from deploykit.samples import Samples
from deploykit.stages import calibration, precision


@dataclass(frozen=True)
class InMemory:
    """A Reader over arrays by input name; samples along axis 0, or along `axes[name]`; None: constant."""

    arrays: dict[str, np.ndarray]
    axes: dict[str, int | None]

    def read(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        return {
            name: array if (axis := self.axes.get(name, 0)) is None else np.take(array, list(indices), axis=axis)
            for name, array in self.arrays.items()
        }


def samples_of(path: Path, arrays: dict[str, np.ndarray], n: int, axes: dict[str, int | None] | None = None) -> Samples:
    signature = graph.signature(graph.load(path))
    return Samples("memory", "c0ffee", InMemory(arrays, axes or {}), signature, None, tuple(range(n)))


def images(n: int, *, channels: int = 3, size: int = 8, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(0, 1, (n, channels, size, size)) * rng.uniform(0.5, 3, (n, 1, 1, 1))).astype(np.float32)


def everything(path: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every node output of a model, unoptimized, all samples at once."""
    model = onnx.load(path)
    names = [name for node in model.graph.node for name in node.output if name]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return {**feeds, **dict(zip(names, session.run(names, feeds), strict=True))}


def save(path: Path, nodes: list, inputs: list, outputs: list, weights: Sequence[onnx.TensorProto] = (), opset: int = 18) -> Path:
    made = helper.make_graph(nodes, "g", inputs, outputs, list(weights))
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), str(path))
    return path


def value(name: str, shape: Sequence[int | str], kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def close(a: CalibrationTable, b: CalibrationTable, slack: float) -> None:
    assert set(a.ranges) == set(b.ranges)
    for name, found in a.ranges.items():
        near = {"abs": slack * max(a.observed[name].amax, 1e-6)}
        assert (found.low, found.high) == pytest.approx((b.ranges[name].low, b.ranges[name].high), **near)
        assert a.amax(name) == pytest.approx(b.amax(name), **near)


# --- what comes out


def test_extremes_are_exact_for_every_tensor_that_quantization_needs(tmp_path: Path) -> None:
    path = tiny_models.conv_net(tmp_path / "m.onnx")
    x = images(20)
    tables = calibration.collect(path, samples_of(path, {"x": x}, 20), methods=METHODS)
    truth = everything(path, {"x": x})
    assert set(tables) == set(METHODS)
    for table in tables.values():
        assert set(table.ranges) == {"x", "c1", "r1", "c2", "a1", "r2", "g1", "f1", "logits"}
        for name, found in table.observed.items():
            assert (found.low, found.high) == pytest.approx((truth[name].min(), truth[name].max()), rel=1e-5, abs=1e-6)
    assert tables["minmax"].ranges == tables["minmax"].observed
    assert tables["minmax"].ranges["r1"].low == 0.0


def test_the_table_says_what_it_was_made_for(tmp_path: Path) -> None:
    path = tiny_models.conv_net(tmp_path / "m.onnx")
    samples = replace(samples_of(path, {"x": images(4)}, 4), preprocess=IMAGENET)
    table = calibration.collect(path, samples, methods=("percentile",), percentile=99.5)["percentile"]
    assert table.model_sha256 == graph.digest(graph.load(path))
    assert (table.samples_digest, table.n, table.method) == (samples.digest, 4, "percentile")
    assert table.options["percentile"] == 99.5
    assert table.versions["onnxruntime"] == ort.__version__
    table.require_match(preprocess=IMAGENET, samples_digest=samples.digest)


def test_percentile_is_that_of_all_values_where_all_fit(tmp_path: Path) -> None:
    path = tiny_models.conv_net(tmp_path / "m.onnx")
    x = images(40)
    table = calibration.collect(path, samples_of(path, {"x": x}, 40), methods=("percentile",), percentile=99.0)["percentile"]
    truth = everything(path, {"x": x})
    for name in ("x", "c1", "r1", "a1"):
        expected = np.quantile(np.abs(truth[name]), 0.99)
        assert table.amax(name) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("batch", [1, 3, 7, 64])
def test_the_batch_size_does_not_change_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    monkeypatch.setattr(calibration, "VALUES_PER_TENSOR", 2048)  # so that images are really sub-sampled
    monkeypatch.setattr(calibration, "LEAST_PER_SAMPLE", 50)
    path = tiny_models.conv_net(tmp_path / "m.onnx")
    samples = samples_of(path, {"x": images(23)}, 23)
    reference = calibration.collect(path, samples, methods=METHODS, batch=8)
    found = calibration.collect(path, samples, methods=METHODS, batch=batch)
    for method in METHODS:
        # Kernels round differently at another batch; entropy's minimum may then jump to a neighbour as good.
        close(found[method], reference[method], 0.03 if method == "entropy" else 1e-3)
        assert found[method].notes == reference[method].notes


def test_what_is_sampled_of_an_input_is_bit_for_bit_the_same_at_any_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "VALUES_PER_TENSOR", 2048)
    monkeypatch.setattr(calibration, "LEAST_PER_SAMPLE", 50)
    path = tiny_models.conv_net(tmp_path / "m.onnx")
    samples = samples_of(path, {"x": images(23)}, 23)
    one, many = (calibration.collect(path, samples, methods=("mse",), batch=b, tensors=["x"])["mse"] for b in (1, 9))
    assert one.fingerprint == many.fingerprint


def test_memory_held_per_tensor_does_not_depend_on_the_number_of_values() -> None:
    seen = histogram.Observation()
    for i in range(50):
        values = np.random.default_rng(i).normal(0, i + 1, 10_000).astype(np.float32)
        seen.see(float(values.min()), float(values.max()), values)
    assert seen.histogram.counts.size == 2 * histogram.BINS


def test_only_the_tensors_asked_for(tmp_path: Path) -> None:
    path = tiny_models.conv_net(tmp_path / "m.onnx")
    samples = samples_of(path, {"x": images(4)}, 4)
    assert set(calibration.collect(path, samples, tensors=["r1", "x"])["minmax"].ranges) == {"r1", "x"}
    with pytest.raises(UnknownName, match="'r11'") as caught:
        calibration.collect(path, samples, tensors=["r11"])
    assert "did you mean 'r1'" in str(caught.value)


def test_clip_bounds_and_reshapes_follow_from_their_input(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], kernel_shape=[1, 1]),
        helper.make_node("Clip", ["c", "zero", "six"], ["k"]),
        helper.make_node("Transpose", ["k"], ["t"], perm=[0, 2, 3, 1]),
        helper.make_node("Relu", ["t"], ["y"]),
    ]
    weights = [
        numpy_helper.from_array(np.random.default_rng(0).normal(0, 3, (5, 3, 1, 1)).astype(np.float32), "w"),
        numpy_helper.from_array(np.float32(0), "zero"),
        numpy_helper.from_array(np.float32(6), "six"),
    ]
    path = save(tmp_path / "m.onnx", nodes, [value("x", ["n", 3, 8, 8])], [value("y", ["n", 8, 8, 5])], weights)
    x = images(10)
    tables = calibration.collect(path, samples_of(path, {"x": x}, 10), methods=METHODS)
    truth = everything(path, {"x": x})
    for name in ("c", "k", "t", "y"):
        found = tables["minmax"].ranges[name]
        assert (found.low, found.high) == pytest.approx((truth[name].min(), truth[name].max()), rel=1e-5)
    assert tables["mse"].ranges["y"].high <= 6.0
    assert tables["percentile"].ranges["k"] == tables["percentile"].ranges["t"]


# --- any model


def test_several_inputs_one_of_integers(tmp_path: Path) -> None:
    path = tiny_models.two_inputs(tmp_path / "m.onnx")
    rng = np.random.default_rng(0)
    feeds = {"a": rng.normal(0, 1, (9, 6)).astype(np.float32), "ids": rng.integers(0, 10, (9, 3))}
    table = calibration.collect(path, samples_of(path, feeds, 9), batch=4)["minmax"]
    truth = everything(path, feeds)
    assert "ids" not in table.ranges
    for name in ("a", "m", "e", "em", "y", "z"):
        found = table.ranges[name]
        assert (found.low, found.high) == pytest.approx((truth[name].min(), truth[name].max()), rel=1e-5)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_fixed_batch_is_fed_as_it_is_and_padding_counts_for_nothing(tmp_path: Path, batch: int) -> None:
    path = tiny_models.conv_net(tmp_path / "m.onnx", batch=batch)
    free = tiny_models.conv_net(tmp_path / "free.onnx")
    x = images(6)  # 6 = 4 + 2, and two more of padding
    fixed = calibration.collect(path, samples_of(path, {"x": x}, 6), methods=METHODS)
    wanted = calibration.collect(free, samples_of(free, {"x": x}, 6), methods=METHODS)
    assert set(wanted) == set(fixed) == set(METHODS)
    for method, table in wanted.items():
        close(fixed[method], table, 0.03 if method == "entropy" else 1e-3)


def test_dynamic_height_and_width(tmp_path: Path) -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"], kernel_shape=[3, 3]), helper.make_node("Sigmoid", ["c"], ["y"])]
    weights = [numpy_helper.from_array(np.ones((2, 3, 3, 3), np.float32), "w")]
    path = save(tmp_path / "m.onnx", nodes, [value("x", ["batch", 3, "h", "w_"])], [value("y", ["batch", 2, "a", "b"])], weights)
    x = images(5, size=11)
    table = calibration.collect(path, samples_of(path, {"x": x}, 5))["minmax"]
    assert table.ranges["c"].high == pytest.approx(everything(path, {"x": x})["c"].max(), rel=1e-5)


def test_batch_axis_second_and_a_constant_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "VALUES_PER_TENSOR", 64)
    monkeypatch.setattr(calibration, "LEAST_PER_SAMPLE", 10)
    nodes = [helper.make_node("Mul", ["state", "gain"], ["scaled"]), helper.make_node("Tanh", ["scaled"], ["y"])]
    inputs = [value("state", [7, "batch", 5]), value("gain", [5])]
    path = save(tmp_path / "m.onnx", nodes, inputs, [value("y", [7, "batch", 5])])
    state = np.random.default_rng(0).normal(0, 2, (7, 12, 5)).astype(np.float32)
    gain = np.float32([1, 2, 3, 4, 5])
    samples = samples_of(path, {"state": state, "gain": gain}, 12, {"state": 1, "gain": None})
    one, many = (calibration.collect(path, samples, methods=("mse",), batch=b)["mse"] for b in (1, 5))
    assert one.ranges["scaled"] == many.ranges["scaled"]
    assert one.observed["gain"].high == 5.0
    assert one.observed["scaled"].high == (state * gain).max()


def test_control_flow_is_run_and_its_insides_are_left_alone(tmp_path: Path) -> None:
    def branch(name: str, factor: str) -> onnx.GraphProto:
        return helper.make_graph(
            [helper.make_node("Mul", ["r", factor], [f"{name}_out"])], name, [], [value(f"{name}_out", ["batch", 4])]
        )

    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("ReduceSum", ["r"], ["s"], keepdims=0),
        helper.make_node("Greater", ["s", "ten"], ["big"]),
        helper.make_node("If", ["big"], ["picked"], then_branch=branch("then", "half"), else_branch=branch("else", "two")),
        helper.make_node("Add", ["picked", "two"], ["y"]),
    ]
    weights = [numpy_helper.from_array(np.float32(v), n) for n, v in (("ten", 10), ("half", 0.5), ("two", 2))]
    path = save(tmp_path / "m.onnx", nodes, [value("x", ["batch", 4])], [value("y", ["batch", 4])], weights)
    x = np.random.default_rng(0).normal(0, 1, (6, 4)).astype(np.float32)
    table = calibration.collect(path, samples_of(path, {"x": x}, 6), batch=1)["minmax"]
    assert {"x", "r", "picked", "y"} <= set(table.ranges)
    assert "then_out" not in table.ranges
    assert table.ranges["y"].high == pytest.approx(table.ranges["picked"].high + 2)


def test_a_model_that_runs_at_batch_1_alone_is_run_there(tmp_path: Path) -> None:
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["r"]), helper.make_node("Sigmoid", ["r"], ["y"])]
    weights = [numpy_helper.from_array(np.array([1, 12]), "shape")]
    path = save(tmp_path / "m.onnx", nodes, [value("x", ["batch", 3, 4])], [value("y", [1, 12])], weights)
    x = np.random.default_rng(0).normal(0, 1, (5, 3, 4)).astype(np.float32)
    table = calibration.collect(path, samples_of(path, {"x": x}, 5))["minmax"]
    assert table.ranges["r"].high == x.max()
    assert any("one sample at a time" in note for note in table.notes)


def test_tells_how_far_it_is(tmp_path: Path) -> None:
    path = tiny_models.conv_net(tmp_path / "m.onnx")
    shares: list[float] = []
    with children.reporting(lambda _what, share: shares.append(share)):
        calibration.collect(path, samples_of(path, {"x": images(10)}, 10), batch=4)
    assert shares == [0.4, 0.8, 1.0]


# --- resuming


class Killed(Exception):
    pass


@dataclass(frozen=True)
class Dying(InMemory):
    """Dies at the first sample from `at` on."""

    at: int = 0

    def read(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        if max(indices) >= self.at:
            raise Killed
        return super().read(indices)


def test_a_killed_pass_goes_on_where_it_was_with_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "CHECKPOINT_S", 0.0)
    path, kept = tiny_models.conv_net(tmp_path / "m.onnx"), tmp_path / "progress"
    samples = samples_of(path, {"x": images(12)}, 12)
    whole = calibration.collect(path, samples, methods=METHODS, batch=2)
    dying = replace(samples, reader=Dying({"x": images(12)}, {}, at=7))
    with pytest.raises(Killed):
        calibration.collect(path, dying, methods=METHODS, batch=2, resume=kept)
    assert kept.exists()

    read: list[int] = []

    class Counting(InMemory):
        def read(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
            read.extend(indices)
            return super().read(indices)

    resumed = calibration.collect(
        path, replace(samples, reader=Counting({"x": images(12)}, {})), methods=METHODS, batch=2, resume=kept
    )
    assert {m: t.fingerprint for m, t in resumed.items()} == {m: t.fingerprint for m, t in whole.items()}
    assert [i for i in read if i] == list(range(6, 12))  # sample 0 is read again to learn the shapes
    assert not kept.exists()


@pytest.mark.parametrize("content", [b"", b"rubbish", None])
def test_progress_of_something_else_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> None:
    monkeypatch.setattr(calibration, "CHECKPOINT_S", 0.0)
    path, kept = tiny_models.conv_net(tmp_path / "m.onnx"), tmp_path / "progress"
    samples = samples_of(path, {"x": images(12)}, 12)
    if content is None:
        other = replace(samples, content="other", reader=Dying({"x": 100 * images(12)}, {}, at=7))
        with pytest.raises(Killed):
            calibration.collect(path, other, batch=2, resume=kept)
    else:
        kept.write_bytes(content)
    assert calibration.collect(path, samples, resume=kept)["minmax"].fingerprint == (
        calibration.collect(path, samples)["minmax"].fingerprint
    )


# --- bad input


def test_no_samples_no_method_and_unknown_ones(tmp_path: Path) -> None:
    path = tiny_models.conv_net(tmp_path / "m.onnx")
    samples = samples_of(path, {"x": images(2)}, 2)
    with pytest.raises(DataError, match="no samples"):
        calibration.collect(path, samples.take([], "calibrate"))
    with pytest.raises(UnknownName, match="'entrpy'"):
        calibration.collect(path, samples, methods=("entrpy",))
    for bad in ({"methods": ()}, {"batch": 0}, {"percentile": 0.0}, {"percentile": 101.0}):
        with pytest.raises(InputError):
            calibration.collect(path, samples, **bad)  # type: ignore[arg-type]


def test_samples_of_another_models_inputs(tmp_path: Path) -> None:
    path = tiny_models.conv_net(tmp_path / "m.onnx")
    other = tiny_models.two_inputs(tmp_path / "o.onnx")
    with pytest.raises(DataError, match=r"\['x'\].*\['a', 'ids'\]"):
        calibration.collect(other, samples_of(path, {"x": images(2)}, 2))
    with pytest.raises(InputError, match="shape"):
        calibration.collect(path, samples_of(path, {"x": images(2, size=9)}, 2))


def test_a_quantized_model_is_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="quantize_x"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    weights = [numpy_helper.from_array(np.float32(0.1), "s"), numpy_helper.from_array(np.int8(0), "z")]
    path = save(tmp_path / "m.onnx", nodes, [value("x", ["batch", 4])], [value("y", ["batch", 4])], weights)
    with pytest.raises(ModelError, match=r"already quantized.*quantize_x"):
        calibration.collect(path, samples_of(path, {"x": np.ones((2, 4), np.float32)}, 2))


def test_nan_in_an_input_is_named_with_its_sample(tmp_path: Path) -> None:
    path = tiny_models.conv_net(tmp_path / "m.onnx")
    x = images(12)
    x[9, 1, 2, 3] = np.nan
    with pytest.raises(DataError, match="input 'x' holds NaN in sample 9"):
        calibration.collect(path, samples_of(path, {"x": x}, 12), batch=4)


def overflowing(path: Path, weights: Sequence[onnx.TensorProto] = ()) -> Path:
    nodes = [
        helper.make_node("Log", ["x"], ["l"]),
        helper.make_node("Relu", ["l"], ["r"]),
        helper.make_node("Add", ["r", "r"], ["y"]),
    ]
    return save(path, nodes, [value("x", ["batch", 4])], [value("y", ["batch", 4])], weights)


@pytest.mark.parametrize(
    ("bad", "where"),
    [
        (-1.0, "tensor 'l' holds NaN on sample 7"),  # Relu would hide it: ONNX Runtime's max(NaN, 0) is 0
        (0.0, "tensor 'l' holds Inf on sample 7"),
        (np.inf, "input 'x' holds Inf in sample 7"),
    ],
)
def test_the_first_tensor_and_sample_that_are_not_finite_are_named(tmp_path: Path, bad: float, where: str) -> None:
    path = overflowing(tmp_path / "m.onnx")
    x = np.ones((11, 4), np.float32)
    x[7, 2] = x[9, 1] = bad
    with pytest.raises((DataError, ModelError), match=where):
        calibration.collect(path, samples_of(path, {"x": x}, 11), batch=4)


def test_an_attention_mask_is_left_out_and_said(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Where", ["keep", "x", "low"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["p"]),
        helper.make_node("Mul", ["p", "x"], ["y"]),
    ]
    inputs = [value("x", ["batch", 4]), value("keep", ["batch", 4], TensorProto.BOOL)]
    feeds = {"x": np.random.default_rng(0).normal(0, 1, (6, 4)).astype(np.float32), "keep": np.eye(6, 4) == 0}
    for low in (-np.inf, np.finfo(np.float32).min):
        weights = [numpy_helper.from_array(np.float32(low), "low")]
        path = save(tmp_path / "m.onnx", nodes, inputs, [value("y", ["batch", 4])], weights)
        table = calibration.collect(path, samples_of(path, feeds, 6))["minmax"]
        assert set(table.ranges) == {"x", "p", "y"}
        assert any("mask" in note and "'masked'" in note for note in table.notes)


def test_few_or_equal_samples_and_still_tensors_are_noted(tmp_path: Path) -> None:
    path = tiny_models.conv_net(tmp_path / "m.onnx")
    few = calibration.collect(path, samples_of(path, {"x": images(8)}, 8))["minmax"]
    assert any("8 samples are few" in note and "one unseen sample in 9" in note for note in few.notes)
    many = calibration.collect(path, samples_of(path, {"x": images(120)}, 120))["minmax"]
    assert many.notes == ()
    alike = calibration.collect(path, samples_of(path, {"x": np.repeat(images(1), 120, axis=0)}, 120))["minmax"]
    assert alike.notes == ("all 120 samples are alike: the ranges are those of one input",)
    still = calibration.collect(path, samples_of(path, {"x": np.zeros((120, 3, 8, 8), np.float32)}, 120))["minmax"]
    assert any("never varies: " in note and "'x'" in note for note in still.notes)
    guess = calibration.collect(path, replace(samples_of(path, {"x": images(8)}, 8), random=True))["minmax"]
    assert any("random numbers" in note for note in guess.notes)


def test_a_model_that_fails_on_the_samples_is_the_backends_failure(tmp_path: Path) -> None:
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["r"]), helper.make_node("Sigmoid", ["r"], ["y"])]
    weights = [numpy_helper.from_array(np.array([3, 5]), "shape")]
    path = save(tmp_path / "m.onnx", nodes, [value("x", ["batch", 4])], [value("y", [3, 5])], weights)
    with pytest.raises(BackendFailed, match=r"failed on inputs x \(1, 4\)"):
        calibration.collect(path, samples_of(path, {"x": np.ones((2, 4), np.float32)}, 2))


def test_a_model_of_integers_only_has_nothing_to_calibrate(tmp_path: Path) -> None:
    path = save(
        tmp_path / "m.onnx",
        [helper.make_node("Add", ["x", "x"], ["y"])],
        [value("x", ["batch"], TensorProto.INT64)],
        [value("y", ["batch"], TensorProto.INT64)],
    )
    with pytest.raises(ModelError, match="no float tensor"):
        calibration.collect(path, samples_of(path, {"x": np.arange(4)}, 4))


def test_layers_inside_the_models_own_functions_get_ranges(tmp_path: Path) -> None:
    body = [helper.make_node("Conv", ["a", "k"], ["c"]), helper.make_node("Relu", ["c"], ["b"])]
    weights = [
        numpy_helper.from_array(images(2)[:, :, :3, :3] * 0.3, "w1"),
        numpy_helper.from_array(images(2)[:, :2, :1, :1], "w2"),
    ]
    path = save(
        tmp_path / "m.onnx",
        [
            helper.make_node("Block", ["x", "w1"], ["h"], domain="mine"),
            helper.make_node("Block", ["h", "w2"], ["y"], domain="mine"),
        ],
        [value("x", ["n", 3, 8, 8])],
        [value("y", ["n", 2, 6, 6])],
        weights,
    )
    model = onnx.load(str(path))
    model.functions.append(helper.make_function("mine", "Block", ["a", "k"], ["b"], body, [helper.make_opsetid("", 18)]))
    model.opset_import.append(helper.make_opsetid("mine", 1))
    onnx.save(model, str(path))
    table = calibration.collect(path, samples_of(path, {"x": images(8)}, 8))["minmax"]
    made = precision.to_int8(path, table, "cpu", tmp_path / "int8.onnx")
    assert made.facts["quantized_layers"] == 2
    inside = helper.make_node("QuantizeLinear", ["a", "k"], ["b"])
    del model.functions[:]
    model.functions.append(helper.make_function("mine", "Block", ["a", "k"], ["b"], [inside], [helper.make_opsetid("", 18)]))
    with pytest.raises(ModelError, match="already quantized"):
        observation.require_float(model, path)
