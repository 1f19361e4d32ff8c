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
from deploykit.pipeline.int8 import Int8Recipe
from deploykit.pipeline.request import Int8Request
from deploykit.stages.layers import alone
from deploykit.stages.layers.match import matches
from deploykit.stages.precision import Int8Options, bias, bias_correct, channel_moments, to_int8
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
    path, table, samples = saved(made, tmp_path), clipping(table_for(saved(made, tmp_path))), samples_of(made, 64)
    feeds = samples.reader.read(range(64))
    wanted = run(made, feeds)[0].std(axis=0)
    off = {}
    for scaled in (False, True):
        out = tmp_path / f"{scaled}.onnx"
        found = bias_correct(path, table, layout, samples, out, Int8Options(scale_correct=scaled))
        assert found.facts["scale_corrected_layers"] == 5 * scaled
        off[scaled] = float(np.abs(np.log(run(out, feeds, literal=True)[0].std(axis=0) / wanted)).max())
    assert off[True] < 0.25 * off[False]
    plain, corrected = integers(tmp_path / "False.onnx"), integers(tmp_path / "True.onnx")
    assert plain.keys() == corrected.keys()
    assert all(np.array_equal(plain[name], corrected[name]) for name in plain)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_awkward_graphs_compute_the_same_with_gains_of_one(tmp_path: Path, name: str) -> None:
    """A gain of one on every channel changes nothing: gains reach weights, biases and shared weights alike."""
    made = ZOO[name]()
    path, table = saved(made, tmp_path), table_for(saved(made, tmp_path))
    to_int8(path, table, "cpu", tmp_path / "plain.onnx")
    try:
        found = bias.corrections(path, tmp_path / "plain.onnx", samples_of(made), layout="cpu")
    except bias.NothingToCorrect:
        return
    feeds = feeds_for(made, 3)
    still = replace(
        found,
        deltas={n: np.zeros_like(v) for n, v in found.deltas.items()},
        gains={n: np.ones_like(v) for n, v in found.gains.items()},
    )
    to_int8(path, table, "cpu", tmp_path / "still.onnx", corrections=still)
    for mine, its in zip(run(tmp_path / "still.onnx", feeds), run(tmp_path / "plain.onnx", feeds), strict=True):
        np.testing.assert_allclose(mine, its, atol=1e-6 * max(1.0, float(np.abs(its).max())))


@pytest.mark.parametrize("layout", ["cpu", "tensorrt"])
def test_two_layers_of_one_weight_have_gains_of_their_own(tmp_path: Path, layout: str) -> None:
    nodes = [node("Gemm", ["x", "w", "c"], ["a"], name="first"), node("Gemm", ["a", "w", "c"], ["y"], name="second")]
    made = model(nodes, [const("w", 6, 6), const("c", 6)], {"x": ["batch", 6]})
    path, samples = saved(made, tmp_path), samples_of(made, 64)
    out, table = tmp_path / "int8.onnx", clipping(table_for(path))
    to_int8(path, table, layout, out)
    found = bias.corrections(path, out, samples, layout=layout)
    assert found.gains.keys() == {"first", "second"} and not np.allclose(found.gains["first"], found.gains["second"])
    to_int8(path, table, layout, out, corrections=found)
    feeds = samples.reader.read(range(64))
    np.testing.assert_allclose(run(out, feeds, literal=True)[0].std(axis=0), run(made, feeds)[0].std(axis=0), rtol=0.02)


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
    still, lively = Moments(np.array([1.0, 0.0]), np.array([0.0, 1e-9])), Moments(np.array([1.0, 0.0]), np.array([2.0, 0.0]))
    assert still.gain_to(lively).tolist() == [1.0, 1.0] and lively.gain_to(still).tolist() == [1.0, 1.0]
    far = Moments(np.zeros(2), np.array([1.0, 1.0])).gain_to(Moments(np.zeros(2), np.array([9.0, 0.1])))
    np.testing.assert_allclose(far, [1.25, 0.8], rtol=1e-6)


def test_a_layer_with_gains_is_still_known_as_the_reference_s(tmp_path: Path) -> None:
    """`compare --per-layer` measures such layers alone; weights that are others are told apart."""
    made = residual()
    path, out = saved(made, tmp_path), tmp_path / "int8.onnx"
    bias_correct(path, clipping(table_for(path)), "cpu", samples_of(made, 64), out)
    mine = quantized_layers.load(path)
    found, missing = matches(mine, quantized_layers.load(out))
    assert not missing and all(alone.why_not(mine, match) is None for match in found)
    stranger = residual()
    for constant in stranger.graph.initializer:
        if len(constant.dims) > 1:
            values = numpy_helper.to_array(constant)
            constant.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values[::-1]), constant.name))
    path = saved(stranger, tmp_path)
    other = quantized_layers.load(path)
    assert any(alone.why_not(other, match) for match in matches(other, quantized_layers.load(out))[0])


def test_switches_that_contradict_each_other() -> None:
    with pytest.raises(InputError, match="--scale-correct with --no-bias-correct"):
        Int8Recipe(Int8Request(bias_correct=False, scale_correct=True))
    with pytest.raises(InputError, match="--scale-correct needs calibration samples"):
        Int8Recipe(Int8Request(scale_correct=True))
