"""`check --repair` and the forms that `calibrate` writes its table in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny_models
import trt_graphs
from typer.testing import CliRunner

from deploykit import artifact as artifacts
from deploykit import foreign_cache, graph, trt_cache
from deploykit.calibration_table import CalibrationTable, Range
from deploykit.cli import parsing
from deploykit.cli.main import app
from deploykit.errors import EXIT_FAILED, EXIT_PASSED, InputError
from deploykit.pipeline import single
from deploykit.pipeline.request import Silent
from deploykit.stages import checks


def test_check_repair_writes_a_graph_that_passes_the_rules(tmp_path: Path) -> None:
    path = trt_graphs.qdq_conv(tmp_path / "m.onnx", zero_point=128, zero_dtype=np.uint8)
    out = tmp_path / "repaired.onnx"
    assert [f.code for f in checks.lint(path, "tensorrt")] == ["DK102"]
    done = single.repair_file(path, out, Silent())
    assert done[0].startswith("DK102")
    assert checks.lint(out, "tensorrt") == []
    made = artifacts.load(out)
    assert (made.stage, made.facts["repairs"]) == ("repair", list(done))
    assert {p.name for p in tmp_path.iterdir()} == {"m.onnx", "repaired.onnx", "repaired.onnx.manifest.json"}


def test_where_nothing_can_be_repaired_nothing_is_written(tmp_path: Path) -> None:
    path = tiny_models.conv_net(tmp_path / "m.onnx")
    assert single.repair_file(path, tmp_path / "repaired.onnx", Silent()) == ()
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    with pytest.raises(InputError, match="should end in"):
        single.repair_file(path, tmp_path / "repaired", Silent())
    with pytest.raises(InputError, match="would be lost"):
        single.repair_file(path, path, Silent())


def test_the_command_says_what_it_repaired_and_what_is_left(tmp_path: Path) -> None:
    path = trt_graphs.qdq_conv(tmp_path / "m.onnx", zero_point=3)
    words = ["--target", "tensorrt", "--repair", str(tmp_path / "r.onnx")]
    done = CliRunner().invoke(app, ["check", str(path), *words], standalone_mode=False)
    assert "DK102" in done.stdout  # a zero point of 3 cannot be taken out
    assert done.return_value == EXIT_FAILED
    fit = trt_graphs.qdq_conv(tmp_path / "n.onnx", zero_point=128, zero_dtype=np.uint8)
    done = CliRunner().invoke(app, ["check", str(fit), *words], standalone_mode=False)
    assert "repaired: DK102" in done.stdout
    assert done.return_value == EXIT_PASSED


@pytest.mark.parametrize("axis", [1, -5, 7])
def test_an_axis_that_is_none_is_left_alone(axis: int, tmp_path: Path) -> None:
    """A vector has no axis 1: onnx.checker lets it pass, and no repair may stumble over it."""
    h, arrays = onnx.helper, onnx.numpy_helper.from_array
    stored = [
        arrays(np.zeros(4, np.int8), "q"),
        arrays(np.array([1, 1, 0, 1], np.float32), "s"),
        arrays(np.ones(4, np.int8), "z"),
    ]
    nodes = [
        h.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], name="dq", axis=axis),
        h.make_node("Add", ["x", "d"], ["y"], name="add"),
    ]
    tensors = [h.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 4]) for name in "xy"]
    onnx.save(h.make_model(h.make_graph(nodes, "g", tensors[:1], tensors[1:], stored), ir_version=10), str(tmp_path / "m.onnx"))
    model, _ = checks.repair(graph.load(tmp_path / "m.onnx"))
    assert [node.name for node in model.graph.node] == ["dq", "add"]


def test_caches_are_written_for_whoever_reads_them(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    ranges = {"x": Range(-5.0, 1.0)}
    table = CalibrationTable(ranges, ranges, "minmax", "m", "s", None, 1)
    single.CacheFiles(tmp_path / "old.cache", "8.6.1", tmp_path / "calibration.flatbuffers").write(table)
    single.CacheFiles(tmp_path / "new.cache").write(table)
    assert trt_cache.read(tmp_path / "old.cache")[0].version == 8601
    assert trt_cache.read(tmp_path / "new.cache")[0].version == trt_cache.version_number(trt_cache.DEFAULT_VERSION)
    assert foreign_cache.read(tmp_path / "calibration.flatbuffers").amax == {"x": 5.0}


@pytest.mark.parametrize(
    ("caches", "said"),
    [
        (single.CacheFiles(None, "8.6.1"), "none is written"),
        (single.CacheFiles(Path("c"), "eight"), "no TensorRT version"),
        (single.CacheFiles(Path("c"), "11.4.0"), "has no calibration cache"),
    ],
)
def test_a_version_that_reads_no_cache_is_refused_before_anything_is_spent(caches: single.CacheFiles, said: str) -> None:
    with pytest.raises(InputError, match=said):
        caches.check()
    single.CacheFiles(Path("c"), "8.6.1").check()


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 1e300])
def test_a_size_in_gib_is_a_size(value: float) -> None:
    with pytest.raises(InputError, match="no size in GiB"):
        parsing.gib(value, "--workspace")
    assert parsing.gib(0.5, "--workspace") == 1 << 29
    assert parsing.gib(None, "--workspace") is None
