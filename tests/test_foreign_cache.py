"""Calibration caches that other tools have made: read in every form, held against the graph, used for Q/DQ."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny_models

from deploykit import calibration_table, foreign_cache, graph, trt_cache
from deploykit.calibration_table import IMPORTED, CalibrationTable, Range
from deploykit.errors import InputError, StaleCalibration, UnknownName
from deploykit.pipeline import given
from deploykit.trt import implicit


def _scales(path: Path, amax: dict[str, float], header: str = "TRT-8601-EntropyCalibration2") -> Path:
    path.write_text(f"{header}\n" + trt_cache.text_of(amax).split("\n", 1)[1])
    return path


@pytest.fixture
def model(tmp_path: Path) -> tuple[Path, str]:
    path = tiny_models.conv_net(tmp_path / "m.onnx")
    return path, graph.digest(graph.load(path))


def _onnxruntime_files(folder: Path, ends: dict[str, tuple[float, float]]) -> None:
    """The three files of ONNX Runtime's own writer."""
    from onnxruntime.quantization.calibrate import TensorData
    from onnxruntime.quantization.quant_utils import write_calibration_table

    rows = {n: TensorData(lowest=np.float32(low), highest=np.float32(high)) for n, (low, high) in ends.items()}
    write_calibration_table(rows, str(folder))


def test_each_form_is_known_by_its_content(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    ends = {"x": (-1.5, 1.0), "a:b": (0.0, 6.0)}
    _onnxruntime_files(tmp_path, ends)
    text = _scales(tmp_path / "trt.cache", {"x": 1.5, "a:b": 6.0})
    assert foreign_cache.read(text).amax == pytest.approx({"x": 1.5, "a:b": 6.0}, rel=1e-6)
    both = foreign_cache.read(tmp_path / "calibration.json")
    assert both.ends == ends
    assert not both.symmetric
    for name in ("calibration.flatbuffers", "calibration.cache"):
        found = foreign_cache.read(tmp_path / name)
        assert found.amax == pytest.approx({"x": 1.0, "a:b": 6.0})  # what ONNX Runtime wrote: max(highest, lowest)
        assert any("further below zero" in note for note in found.notes)
    table = CalibrationTable({"x": Range(-5, 1)}, {"x": Range(-5, 1)}, "minmax", "m", "s", None, 1)
    (tmp_path / "ours.flatbuffers").write_bytes(trt_cache.to_onnxruntime(table))
    assert foreign_cache.read(tmp_path / "ours.flatbuffers").amax == pytest.approx({"x": 5.0})


def test_what_a_calibrator_computes_is_read_as_it_is_written(tmp_path: Path) -> None:
    """`write_calibration_table(calibrator.compute_data())`, as ONNX Runtime's examples have it; per channel, both ends count."""
    pytest.importorskip("onnxruntime")
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData
    from onnxruntime.quantization.quant_utils import write_calibration_table

    computed = TensorsData(
        CalibrationMethod.MinMax, {"x": (np.float32(-1.5), np.float32(1.0)), "a:b": (np.float32(0), np.float32(6))}
    )
    write_calibration_table(computed, str(tmp_path))
    assert foreign_cache.read(tmp_path / "calibration.json").ends == {"x": (-1.5, 1.0), "a:b": (0.0, 6.0)}
    channels = {"lowest": {"data": [-1.0, -3.0]}, "highest": {"data": [[2.0], [5.0]]}}
    (tmp_path / "channels.json").write_text(json.dumps({"x": channels}))
    assert foreign_cache.read(tmp_path / "channels.json").ends == {"x": (-3.0, 5.0)}
    for broken in ({"CLS": "TensorsData"}, {"CLS": "TensorsData", "data": 3}, {"x": {"lowest": [], "highest": 1}}):
        (tmp_path / "broken.json").write_text(json.dumps(broken))
        with pytest.raises(InputError, match=r"broken\.json is no calibration table"):
            foreign_cache.read(tmp_path / "broken.json")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00\x01\x02\x03" * 20,
        b"{}",
        b'{"x": 1}',
        b'{"x": {"lowest": 2, "highest": 1}}',
        b"TRT-8601-EntropyCalibration2\n",
        b"TRT-8601-EntropyCalibration2\nx 3c\n",
        b"x nan\n",
        b"x -1\n",
        b"hello world\n",
        b"\x89PNG\r\n\x1a\n" + b"\xff" * 64,
    ],
)
def test_anything_else_is_the_users_error(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    path.write_bytes(data)
    with pytest.raises(InputError, match="cache"):
        foreign_cache.read(path)
    with pytest.raises(InputError):
        given.require_readable(path)


def test_a_foreign_cache_becomes_a_table_for_the_graph(model: tuple[Path, str], tmp_path: Path) -> None:
    path, digest = model
    nodes = graph.load(path).graph.node
    relu = next(n.output[0] for n in nodes if n.op_type == "Relu")
    names = {"x", *(n.input[0] for n in nodes if n.op_type in ("Conv", "Gemm"))}
    cache = _scales(tmp_path / "trt.cache", {**dict.fromkeys(names, 2.0), "stranger": 1.0})
    made = given.table(cache, path, digest)
    assert (made.method, made.model_sha256) == (IMPORTED, digest)
    assert "stranger" not in made.ranges
    assert made.amax("x") == pytest.approx(2.0)
    assert made.range("x").low == pytest.approx(-2.0)
    assert made.range(relu).low == 0.0
    assert any("stranger" in note for note in made.notes)
    assert not any("stay in float" in note for note in made.notes)
    made.save(tmp_path / "kept.json")
    assert calibration_table.load(tmp_path / "kept.json") == made


def test_layers_without_a_range_are_told_and_a_strangers_cache_is_refused(model: tuple[Path, str], tmp_path: Path) -> None:
    path, digest = model
    made = given.table(_scales(tmp_path / "some.cache", {"x": 2.0}), path, digest)
    assert any("stay in float" in note for note in made.notes)
    with pytest.raises(InputError, match="another model"):
        given.table(_scales(tmp_path / "other.cache", {"a": 2.0, "b": 1.0}), path, digest)


def test_our_own_table_of_another_model_stays_refused(model: tuple[Path, str], tmp_path: Path) -> None:
    ranges = {"x": Range(-1, 1)}
    CalibrationTable(ranges, ranges, "minmax", "0" * 64, "s", None, 1).save(tmp_path / "calib.json")
    with pytest.raises(StaleCalibration):
        given.table(tmp_path / "calib.json", *model)
    with pytest.raises(UnknownName):
        CalibrationTable(ranges, ranges, "guessed", "0" * 64, "s", None, 1)


def test_a_graph_quantized_from_a_foreign_cache_has_its_scales(model: tuple[Path, str], tmp_path: Path) -> None:
    from deploykit.stages import precision

    path, digest = model
    names = {node.input[0] for node in graph.load(path).graph.node if node.op_type in ("Conv", "Gemm")}
    cache = _scales(tmp_path / "trt.cache", {name: 1.0 + i for i, name in enumerate(sorted(names))})
    made = precision.to_int8(path, given.table(cache, path, digest), "tensorrt", tmp_path / "q.onnx")
    quantized = onnx.load(made.path)
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in quantized.graph.initializer}
    found = {
        n.input[0]: float(stored[n.input[1]])
        for n in quantized.graph.node
        if n.op_type == "QuantizeLinear" and n.input[0] in names
    }
    assert found == pytest.approx({name: (1.0 + i) / 127 for i, name in enumerate(sorted(names))}, rel=1e-5)


def test_implicit_int8_takes_them_too(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")

    class Trt:
        __version__ = "8.6.1"

    _onnxruntime_files(tmp_path, {"x": (-1.5, 1.0)})
    text = implicit.cache_text(Trt, tmp_path / "calibration.json")
    header, scales = trt_cache.from_text(text)
    assert header.version == 8601
    assert scales == pytest.approx({"x": 1.5 / 127}, rel=1e-6)
    (tmp_path / "bad").write_text(json.dumps({"x": 1}))
    with pytest.raises(InputError):
        implicit.cache_text(Trt, tmp_path / "bad")


def test_json_nested_too_deep_is_bad_input(tmp_path: Path) -> None:
    deep = tmp_path / "calibration.json"
    deep.write_text('{"x":' * 200_000 + "1" + "}" * 200_000)
    with pytest.raises(InputError, match=r"calibration\.json"):
        foreign_cache.read(deep)
    assert not foreign_cache.is_ours(deep)
