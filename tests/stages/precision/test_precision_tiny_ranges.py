"""Activations and weights far below one: INT8 keeps them; FP16, which cannot, leaves them in float32 and says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny_models
from onnx import numpy_helper

from deploykit import data, graph
from deploykit.calibration_table import CalibrationTable
from deploykit.errors import InputError
from deploykit.stages import calibration, precision
from deploykit.stages.precision import scales

pytest.importorskip("onnxruntime")


def _scaled(path: Path, by: float, *, back: bool = True) -> Path:
    """The small convolutional network with every inner activation `by` times as large, and logits as they were."""
    tiny_models.conv_net(path)
    model = onnx.load(path)
    factors = {"w1": by, "b1": by, "b2": by, **({"w3": 1 / by} if back else {"b3": by})}
    for stored in model.graph.initializer:
        if stored.name in factors:
            values = numpy_helper.to_array(stored) * np.float32(factors[stored.name])
            stored.CopyFrom(numpy_helper.from_array(values, stored.name))
    onnx.save(model, path)
    return path


def _table(path: Path) -> tuple[CalibrationTable, np.ndarray[Any, Any]]:
    x = np.random.default_rng(0).normal(size=(24, 3, 8, 8)).astype(np.float32)
    np.savez(path.with_suffix(".npz"), x=x)
    samples = data.open(str(path.with_suffix(".npz")), graph.signature(graph.load(path)))
    return calibration.collect(path, samples)["minmax"], x


def _run(path: Path, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    import onnxruntime

    return np.asarray(onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0])


def _sqnr_db(reference: np.ndarray[Any, Any], found: np.ndarray[Any, Any]) -> float:
    r = reference.astype(np.float64)
    return float(10 * np.log10(np.square(r).sum() / np.square(r - found).sum()))


@pytest.mark.parametrize("layout", ["cpu", "tensorrt"])
@pytest.mark.parametrize("exponent", [-6, -10])
def test_tiny_activations_keep_their_eight_bits(layout: str, exponent: int, tmp_path: Path) -> None:
    path = _scaled(tmp_path / "tiny.onnx", 10.0**exponent)
    table, x = _table(path)
    made = precision.to_int8(path, table, layout, tmp_path / "int8.onnx")
    assert made.facts["quantized_layers"] == 3
    assert _sqnr_db(_run(path, x), _run(made.path, x)) > 38


def test_openvino_keeps_tiny_activations_too(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    path = _scaled(tmp_path / "tiny.onnx", 1e-9)
    table, x = _table(path)
    made = precision.to_int8(path, table, "cpu", tmp_path / "int8.onnx")
    model = openvino.Core().read_model(str(made.path))
    model.reshape(list(x.shape))
    found = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x)[0]
    assert _sqnr_db(_run(path, x), found) > 38


def test_fp16_around_int8_leaves_what_it_cannot_hold_in_float(tmp_path: Path) -> None:
    path = _scaled(tmp_path / "small.onnx", 1e-4)
    table, x = _table(path)
    made = precision.to_int8_fp16(path, table, tmp_path / "int8.onnx")
    assert made.facts["quantized_layers"] >= 1
    assert _sqnr_db(_run(path, x), _run(made.path, x)) > 30


def test_fp16_around_int8_is_refused_with_the_reason_where_everything_is_too_small(tmp_path: Path) -> None:
    path = _scaled(tmp_path / "tiny.onnx", 1e-6)
    table, _ = _table(path)
    with pytest.raises(InputError, match="FP16 holds no scale that fine"):
        precision.to_int8_fp16(path, table, tmp_path / "int8.onnx")


def test_fp16_is_refused_where_weights_and_activations_are_beyond_its_digits(tmp_path: Path) -> None:
    path = _scaled(tmp_path / "tiny.onnx", 1e-9, back=False)
    table, _ = _table(path)
    with pytest.raises(InputError, match="can compute in FP16"):
        precision.to_fp16(path, tmp_path / "half.onnx", table)


def test_a_tensor_of_nothing_but_zeros_has_a_scale_whose_products_stay_normal() -> None:
    for found in (scales.asymmetric(0.0, 0.0), scales.symmetric(0.0), scales.symmetric(0.0, half=True)):
        assert found.scale == 1.0
        assert found.zero_point == 0
    least = np.float32(scales.TINY_SCALE)
    assert least * least >= np.finfo(np.float32).smallest_normal
    assert np.isfinite(np.float32(1) / least)
