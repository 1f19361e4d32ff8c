"""Each repair leaves the outputs as they were, with Q/DQ computed literally (ONNX Runtime without its rewrites)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny_models
from qdq_models import CHANNELS, SIZE, WIDTH, Qdq
from written import by_code, write

from deploykit.stages.checks import repair, tensorrt
from deploykit.stages.checks.context import Graph

# A repaired graph computes the same float32 products in the same order: the outputs are equal, bit for bit.
EXACT = 0.0


def outputs(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def repaired(path: Path, tolerance: float = EXACT) -> tuple[Path, list[str]]:
    """The repaired model's file and the repairs; the outputs of both are compared on the way."""
    model = onnx.load(path)
    before = model.SerializeToString()
    fixed, done = repair(model)
    assert model.SerializeToString() == before  # the caller's model is left alone
    onnx.checker.check_model(fixed, full_check=True)
    rng = np.random.default_rng(3)
    feeds = {}
    for value in model.graph.input:
        shape = [d.dim_value or 2 for d in value.type.tensor_type.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        feeds[value.name] = (rng.standard_normal(shape) * 2).astype(dtype)
    for old, new in zip(outputs(model, feeds), outputs(fixed, feeds), strict=True):
        np.testing.assert_allclose(new, old, rtol=tolerance, atol=tolerance)
    out = path.with_name("repaired.onnx")
    onnx.save(fixed, out)
    return out, done


def codes(path: Path) -> set[str]:
    return {hit.code for hit in tensorrt.find(Graph.load(path), "tensorrt")}


@pytest.mark.parametrize("half", [False, True])
def test_an_int32_bias_becomes_float(half: bool, tmp_path: Path) -> None:
    path = Qdq(int32_bias=True, half=half).save(tmp_path / "m.onnx")
    assert codes(path) == {"DK101"}
    out, done = repaired(path)
    assert codes(out) == set()
    assert any(line.startswith("DK101: 'b_dq'") for line in done)


def test_uint8_activations_around_128_become_int8(tmp_path: Path) -> None:
    path = Qdq(activation_dtype=np.uint8, activation_zero=128, activation_scale=0.01).save(tmp_path / "m.onnx")
    assert codes(path) == {"DK102"}
    out, _ = repaired(path)  # inputs beyond the range are among the samples: both ends saturate alike
    assert codes(out) == set()


def test_uint8_activations_with_another_offset_are_left(tmp_path: Path) -> None:
    path = Qdq(activation_dtype=np.uint8, activation_zero=100).save(tmp_path / "m.onnx")
    out, done = repaired(path)
    assert codes(out) == {"DK102"}
    assert done == []


@pytest.mark.parametrize("zero", [128, 100])
def test_uint8_weights_become_int8_where_they_fit(zero: int, tmp_path: Path) -> None:
    path = Qdq(weight_dtype=np.uint8, weight_zero=zero).save(tmp_path / "m.onnx")
    out, _ = repaired(path)
    assert codes(out) == set()


def test_uint8_weights_that_do_not_fit_are_left(tmp_path: Path) -> None:
    values = np.full((WIDTH, CHANNELS, 3, 3), 200)
    path = Qdq(weight_dtype=np.uint8, weight_zero=0, weight_values=values).save(tmp_path / "m.onnx")
    out, done = repaired(path)
    assert codes(out) == {"DK114"}
    assert done == []


@pytest.mark.parametrize("half", [False, True])
def test_a_dead_channels_zero_scale_becomes_positive(half: bool, tmp_path: Path) -> None:
    values = np.ones((WIDTH, CHANNELS, 3, 3))
    values[1] = 0
    path = Qdq(weight_scale=[0.01, 0.0, 0.01, 0.01], weight_values=values, half=half).save(tmp_path / "m.onnx")
    out, done = repaired(path)
    assert codes(out) == set()
    assert "1 channels of zeros" in done[0]


def test_a_zero_scale_over_values_is_left(tmp_path: Path) -> None:
    path = Qdq(weight_scale=[0.01, 0.0, 0.01, 0.01]).save(tmp_path / "m.onnx")
    out, done = repaired(path)
    assert codes(out) == {"DK105"}
    assert done == []


def test_duplicate_and_unused_initializers_go(tmp_path: Path) -> None:
    text = "g (float[batch,4] x) => (float[batch,4] y) { t = Add(x, a)\n y = Mul(t, b) }"
    same = np.arange(4, dtype=np.float32)
    out, done = repaired(write(tmp_path / "m.onnx", text, a=same, b=same, c=np.ones(7, np.float32)))
    assert not {"DK034", "DK035"} & set(by_code(out))
    assert [t.name for t in onnx.load(out).graph.initializer] == ["a"]
    assert "DK035: 'b' is 'a'" in done


def test_a_clean_model_is_left_as_it_is(tmp_path: Path) -> None:
    _, done = repaired(tiny_models.conv_net(tmp_path / "m.onnx"))
    assert done == []


@pytest.mark.parametrize("uint8", [False, True])
def test_what_onnxruntime_quantizes_keeps_its_outputs(uint8: bool, tmp_path: Path) -> None:
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            rng = np.random.default_rng(0)
            self.feeds = iter([{"x": rng.standard_normal((1, 3, SIZE, SIZE)).astype(np.float32)} for _ in range(4)])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    source, path = tiny_models.conv_net(tmp_path / "m.onnx"), tmp_path / "q.onnx"
    kind = quantization.QuantType.QUInt8 if uint8 else quantization.QuantType.QInt8
    symmetric = {"ActivationSymmetric": True}
    quantization.quantize_static(
        str(source), str(path), Reader(), activation_type=kind, per_channel=True, extra_options=symmetric
    )
    assert "DK101" in codes(path)
    out, done = repaired(path)
    assert len([line for line in done if line.startswith("DK101")]) == 3
    assert codes(out) <= {"DK113"}
