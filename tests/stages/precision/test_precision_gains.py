"""Scale correction: the spread of each channel comes back through the scales of the weights; the integers stay as they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from quantizable_models import ZOO, const, feeds_for, model, node, residual, run, table_for
from test_precision_bias import samples_of, saved

from deploykit import graph as graphs
from deploykit import quantized_layers
from deploykit.calibration_table import Range
from deploykit.errors import InputError
from deploykit.pipeline import int8
from deploykit.pipeline.int8 import Int8Recipe
from deploykit.pipeline.request import Int8Request
from deploykit.stages.layers import alone
from deploykit.stages.layers.match import matches
from deploykit.stages.precision import Int8Options, bias, bias_correct, channel_moments, scales, to_int8
from deploykit.stages.precision.channel_moments import Moments


def clipping(table, share: float = 0.8):  # type: ignore[no-untyped-def]
    """The table with its ranges cut: what clips loses spread."""
    return replace(table, ranges={name: Range(r.low * share, r.high * share) for name, r in table.ranges.items()})


def integers(path: Path) -> dict[str, np.ndarray]:
    stored = graphs.load(path).graph.initializer
    return {t.name: numpy_helper.to_array(t) for t in stored if t.data_type == onnx.TensorProto.INT8 and t.dims}


@pytest.mark.parametrize("layout", ["cpu", "tensorrt"])
def test_the_spread_comes_back_and_integers_stay(tmp_path: Path, layout: str) -> None:
    made = residual()
    path, table, samples = saved(made, tmp_path), clipping(table_for(saved(made, tmp_path))), samples_of(made, 512)
    feeds = samples.reader.read(range(512))
    wanted = run(made, feeds)[0].std(axis=0)
    off = {}
    for scaled in (False, True):
        out = tmp_path / f"{scaled}.onnx"
        found = bias_correct(path, table, layout, samples, out, Int8Options(scale_correct=scaled), limit=512)
        assert found.facts["scale_corrected_layers"] == 5 * scaled
        off[scaled] = float(np.abs(np.log(run(out, feeds, literal=True)[0].std(axis=0) / wanted)).max())
    assert off[True] < 0.4 * off[False]
    plain, corrected = integers(tmp_path / "False.onnx"), integers(tmp_path / "True.onnx")
    assert plain.keys() == corrected.keys()
    assert all(np.array_equal(plain[name], corrected[name]) for name in plain)


@pytest.mark.parametrize("layout", ["cpu", "tensorrt"])
@pytest.mark.parametrize("name", sorted(ZOO))
def test_gains_reach_weights_and_biases_of_awkward_graphs(tmp_path: Path, name: str, layout: str) -> None:
    """Any gains: each layer's dequantized weight and bias are the uncorrected ones times its gain, the bias plus its delta."""
    made = ZOO[name]()
    path, table, rng = saved(made, tmp_path), table_for(saved(made, tmp_path)), np.random.default_rng(0)
    to_int8(path, table, layout, tmp_path / "plain.onnx")
    try:
        found = bias.corrections(path, tmp_path / "plain.onnx", samples_of(made), layout=layout)
    except bias.NothingToCorrect:
        return
    given = replace(
        found,
        deltas={n: (0.1 * rng.normal(size=v.shape)).astype(np.float32) for n, v in found.deltas.items()},
        gains={n: rng.uniform(0.8, 1.25, v.shape).astype(np.float32) for n, v in found.gains.items()},
    )
    assert given.fingerprint not in (found.fingerprint, replace(given, gains=found.gains).fingerprint)
    to_int8(path, table, layout, tmp_path / "given.onnx", corrections=given)
    plain, corrected = (
        {layer.name: layer for layer in quantized_layers.load(tmp_path / f"{kind}.onnx").layers} for kind in ("plain", "given")
    )
    for layer_name, gain in given.gains.items():
        before, after = plain[layer_name], corrected[layer_name]
        along = gain.reshape([-1 if a == before.axis else 1 for a in range(before.weight.ndim)])
        np.testing.assert_allclose(after.weight, before.weight * along, rtol=1e-5, atol=1e-12)
        bias_before = 0.0 if before.bias is None else before.bias.reshape(-1)
        wanted = bias_before * gain + given.deltas[layer_name]
        np.testing.assert_allclose(after.bias.reshape(-1), wanted, atol=0.02 * float(np.abs(wanted).max()))
    run(tmp_path / "given.onnx", feeds_for(made, 3))
    if layout == "cpu":
        assert_biases_are_in_the_scale_of_their_products(graphs.load(tmp_path / "given.onnx"))


def assert_biases_are_in_the_scale_of_their_products(made: onnx.ModelProto) -> None:
    """As integer kernels want them: scale of the bias = scale of the input * scale of the weight."""
    stored = {t.name: numpy_helper.to_array(t) for t in made.graph.initializer}
    maker = {n.output[0]: n for n in made.graph.node if n.op_type == "DequantizeLinear"}
    for found in made.graph.node:
        if found.op_type in ("Conv", "ConvTranspose", "Gemm") and len(found.input) > 2 and found.input[2] in maker:
            data, weight, integers = (stored[maker[name].input[1]] for name in found.input[:3])
            np.testing.assert_allclose(integers, np.broadcast_to(data * weight, integers.shape), rtol=1e-6)


@pytest.mark.parametrize("n", [2, 4, 7])
def test_a_handful_of_samples_gives_no_gains(tmp_path: Path, n: int) -> None:
    made = residual()
    path, out = saved(made, tmp_path), tmp_path / "int8.onnx"
    table = clipping(table_for(path))
    to_int8(path, table, "cpu", out)
    found = bias.corrections(path, out, samples_of(made, n), layout="cpu")
    assert all((gain == 1.0).all() for gain in found.gains.values()) and found.deltas


def test_fp16_scales_have_the_gain_that_the_delta_was_made_for(tmp_path: Path) -> None:
    """FP16 holds small scales coarsely: those keep theirs, and others take the nearest that it holds."""
    made = residual()
    for constant in made.graph.initializer:
        if len(constant.dims) == 4:
            values = numpy_helper.to_array(constant).copy()
            values[0] *= 1e-3
            constant.CopyFrom(numpy_helper.from_array(values, constant.name))
    path, samples = saved(made, tmp_path), samples_of(made, 64)
    table, out = clipping(table_for(path)), tmp_path / "int8.onnx"
    bias_correct(path, table, "tensorrt", samples, out, rest="fp16")
    feeds = samples.reader.read(range(64))
    mine, exact = run(out, feeds, literal=True)[0].astype(np.float64), run(made, feeds)[0].astype(np.float64)
    assert np.abs(mine.mean(axis=0) - exact.mean(axis=0)).max() < 0.01 * exact.std()
    found = scales.gained(np.float32([1e-6, 2**-10]), np.float32([1.1, 1.1]), half=True)
    assert found[0] == np.float32(1e-6) and found[1] == np.float32(np.float16(1.1 * 2**-10))


@pytest.mark.parametrize("layout", ["cpu", "tensorrt"])
def test_two_layers_of_one_weight_have_gains_of_their_own(tmp_path: Path, layout: str) -> None:
    nodes = [node("Gemm", ["x", "w", "c"], ["a"], name="first"), node("Gemm", ["a", "w", "c"], ["y"], name="second")]
    made = model(nodes, [const("w", 6, 6), const("c", 6)], {"x": ["batch", 6]})
    path, samples = saved(made, tmp_path), samples_of(made, 512)
    out, table = tmp_path / "int8.onnx", clipping(table_for(path))
    to_int8(path, table, layout, out)
    found = bias.corrections(path, out, samples, layout=layout, limit=512)
    assert found.gains.keys() == {"first", "second"} and not np.allclose(found.gains["first"], found.gains["second"])
    to_int8(path, table, layout, out, corrections=found)
    feeds = samples.reader.read(range(512))
    np.testing.assert_allclose(run(out, feeds, literal=True)[0].std(axis=0), run(made, feeds)[0].std(axis=0), rtol=0.05)


def test_one_scale_for_a_grouped_transposed_convolution_takes_no_gain(tmp_path: Path) -> None:
    nodes = [node("ConvTranspose", ["x", "w", "c"], ["y"], name="up", group=2)]
    made = model(nodes, [const("w", 4, 3, 2, 2), const("c", 6)], {"x": ["batch", 4, 5, 5]})
    path, out = saved(made, tmp_path), tmp_path / "int8.onnx"
    facts = bias_correct(path, clipping(table_for(path)), "tensorrt", samples_of(made), out).facts
    assert facts["bias_corrected_layers"] == 1 and facts["scale_corrected_layers"] == 0


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.floats(-50, 50), st.floats(0.01, 10), st.integers(0, 2**32 - 1))
def test_moments_of_batches_are_those_of_all(sizes: list[int], mean: float, spread: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    batches = [(mean + spread * rng.normal(size=(n, 3, 4, 5))).astype(np.float32) for n in sizes]
    found, whole = channel_moments.of_arrays(batches), np.concatenate(batches).astype(np.float64)
    np.testing.assert_allclose(found.mean, whole.mean(axis=(0, 2, 3)), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.std, whole.std(axis=(0, 2, 3)), rtol=1e-3, atol=1e-5)


def test_moments_inside_the_graph_are_those_of_its_outputs(tmp_path: Path) -> None:
    made = residual()
    graph, _ = bias.normal_form.load(saved(made, tmp_path))
    feeds = [dict(batch) for batch, _ in samples_of(made, 20).batches(8)]
    name = graph.nodes[-1].output[0]
    wanted = np.concatenate([run(made, feed)[0] for feed in feeds]).astype(np.float64)
    found = channel_moments.in_graph(graph, {"last": (name, wanted.ndim)}, feeds, 1)["last"]
    np.testing.assert_allclose(found.mean, wanted.mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.std, wanted.std(axis=0), rtol=1e-5)


def test_a_channel_that_does_not_vary_keeps_its_scale() -> None:
    def moments(mean: list[float], std: list[float]) -> Moments:
        return Moments(np.array(mean), np.array(std), 64, 10**9)

    still, lively = moments([1.0, 0.0], [0.0, 1e-9]), moments([1.0, 0.0], [2.0, 0.0])
    assert still.gain_to(lively).tolist() == [1.0, 1.0] and lively.gain_to(still).tolist() == [1.0, 1.0]
    assert moments([0.0], [np.inf]).gain_to(moments([0.0], [np.inf])).tolist() == [1.0]
    far = moments([0.0, 0.0], [1.0, 1.0]).gain_to(moments([0.0, 0.0], [9.0, 0.1]))
    np.testing.assert_allclose(far, [1.25, 0.8], rtol=1e-6)


def test_a_layer_with_gains_is_still_known_as_the_reference_s(tmp_path: Path) -> None:
    """`compare --per-layer` measures such layers alone; weights that are others are told apart."""
    made = residual()
    path, out = saved(made, tmp_path), tmp_path / "int8.onnx"
    bias_correct(path, clipping(table_for(path)), "cpu", samples_of(made, 64), out)
    mine = quantized_layers.load(path)
    found, missing = matches(mine, quantized_layers.load(out))
    assert not missing and all(alone.why_not(mine, match) is None for match in found)
    plain = tmp_path / "plain.onnx"
    to_int8(path, table_for(path), "cpu", plain)
    scaled = graphs.load(plain)
    for constant in scaled.graph.initializer:
        if constant.name.endswith("_scale") and constant.dims:
            constant.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(constant) * np.float32(1.15), constant.name))
    onnx.save(scaled, str(plain))  # weights 15 % off, and nothing says that it was meant
    assert any(alone.why_not(mine, match) for match in matches(mine, quantized_layers.load(plain))[0])
    stranger = residual()
    for constant in stranger.graph.initializer:
        if len(constant.dims) > 1:
            values = numpy_helper.to_array(constant)
            constant.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values[::-1]), constant.name))
    path = saved(stranger, tmp_path)
    other = quantized_layers.load(path)
    assert any(alone.why_not(other, match) for match in matches(other, quantized_layers.load(out))[0])


def test_the_store_tells_a_switch_by_name_from_the_default() -> None:
    """By name it is an error where nothing can be corrected; by default a note: their graphs are not each other's."""
    samples = samples_of(residual())
    keys = [Int8Recipe(Int8Request(scale_correct=asked), samples).to_json() for asked in (None, True, False)]
    assert all(a != b for i, a in enumerate(keys) for b in keys[:i])


@pytest.mark.parametrize("asked", [None, False])
def test_the_switch_reaches_the_graph(tmp_path: Path, asked: bool | None) -> None:
    made = residual()
    path, recipe = saved(made, tmp_path), Int8Recipe(Int8Request(scale_correct=asked), samples_of(made, 64))
    found = int8.write(path, table_for(path), "cpu", "fp32", recipe, (), tmp_path / "int8.onnx")
    assert found.facts["scale_corrected_layers"] == (5 if asked is None else 0)
    assert found.options["scale_correct"] is (asked is None)
    uncorrected = int8.write(path, table_for(path), "cpu", "fp32", Int8Recipe(), (), tmp_path / "plain.onnx")
    assert uncorrected.options["scale_correct"] is False


def test_a_switch_by_name_with_nothing_to_correct_is_an_error(tmp_path: Path) -> None:
    made = ZOO["attention"]()
    path = saved(made, tmp_path)
    recipe = Int8Recipe(Int8Request(scale_correct=True), samples_of(made, 16))
    with pytest.raises(InputError, match="could be corrected") as caught:
        int8.write(path, table_for(path), "tensorrt", "fp32", recipe, (), tmp_path / "int8.onnx")
    assert "--scale-correct" in (caught.value.remedy or "")


def test_switches_that_contradict_each_other() -> None:
    with pytest.raises(InputError, match="--scale-correct with --no-bias-correct"):
        Int8Recipe(Int8Request(bias_correct=False, scale_correct=True))
    with pytest.raises(InputError, match="--scale-correct needs calibration samples"):
        Int8Recipe(Int8Request(scale_correct=True))
