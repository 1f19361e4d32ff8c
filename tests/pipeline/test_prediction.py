"""What is predicted on the CPU for an engine that cannot run here: on samples that do not calibrate, and called predicted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from PIL import Image
from typer.testing import CliRunner

from deploykit import artifact as artifacts
from deploykit import backends, data, graph
from deploykit.artifact import Artifact
from deploykit.calibration_table import CalibrationTable, Range
from deploykit.cli.main import app
from deploykit.errors import EXIT_PASSED
from deploykit.pipeline import prediction, single
from deploykit.pipeline.request import DataRequest, Silent
from deploykit.stages import precision

RTX = pytest.mark.skipif(backends.get("tensorrt-rtx").missing() is not None, reason="tensorrt-rtx is not installed")
pytestmark = pytest.mark.skipif(backends.get("onnxruntime").missing() is not None, reason="onnxruntime is not installed")


@pytest.fixture
def model(tmp_path: Path) -> single.ModelFile:
    return single.open_model(tiny_models.conv_net(tmp_path / "m.onnx"), lambda _, function, *args: function(*args))


def _npz(folder: Path, count: int, *, labels: bool = True) -> str:
    rng = np.random.default_rng(0)
    arrays = {"x": rng.normal(size=(count, 3, 8, 8)).astype(np.float32)}
    if labels:
        arrays["labels"] = rng.integers(0, 4, count)
    np.savez(folder / "data.npz", **arrays)
    return str(folder / "data.npz")


def _table(model: single.ModelFile, samples_digest: str, n: int) -> CalibrationTable:
    names = {"x", *(name for node in graph.load(model.artifact.path).graph.node for name in node.output)}
    ranges = dict.fromkeys(names, Range(-4.0, 4.0))
    return CalibrationTable(ranges, ranges, "minmax", model.digest, samples_digest, None, n)


def _int8(model: single.ModelFile, folder: Path) -> Artifact:
    return precision.to_int8_fp16(model.artifact.path, _table(model, "s", 4), folder / "q.onnx").save()


def test_what_judges_does_not_calibrate_and_is_bounded(model: single.ModelFile, tmp_path: Path) -> None:
    request = DataRequest(_npz(tmp_path, 100), calib_n=64)
    found = prediction.shares(model, request, {}, None, 30)
    assert found.calibrate is not None
    assert found.judge is not None
    assert (len(found.calibrate), len(found.judge)) == (50, 30)
    assert not set(found.calibrate.indices) & set(found.judge.indices)
    everything = prediction.shares(model, request, {}, None, 0)
    assert everything.calibrate is not None
    assert (len(everything.calibrate), everything.judge) == (64, None)
    assert "--predict 0" in everything.why


def test_what_a_given_table_was_calibrated_on_does_not_judge(model: single.ModelFile, tmp_path: Path) -> None:
    request = DataRequest(_npz(tmp_path, 100))
    everything = single.open_data(model, str(request.data), request, {})
    seen = data.calibration_share(everything, 70)
    found = prediction.shares(model, request, {}, _table(model, seen.digest, 70), 256)
    assert found.calibrate is not None
    assert found.judge is not None
    assert set(found.calibrate.indices) == set(seen.indices)
    assert set(found.judge.indices) == set(range(100)) - set(seen.indices)
    assert found.notes == ()
    strange = prediction.shares(model, request, {}, _table(model, "elsewhere", 70), 256)
    assert "whether on samples that judge here is not known" in strange.notes[0]
    whole = data.calibration_share(everything, 100)
    spent = prediction.shares(model, request, {}, _table(model, whole.digest, 100), 256)
    assert spent.judge is None
    assert "no sample is left to judge" in spent.why


def test_without_a_second_sample_nothing_judges_and_calibration_goes_on(model: single.ModelFile, tmp_path: Path) -> None:
    found = prediction.shares(model, DataRequest(_npz(tmp_path, 1)), {}, None, 256)
    assert found.calibrate is not None
    assert (len(found.calibrate), found.judge) == (1, None)
    assert "samples that calibrate never judge" in found.why


def test_labels_give_top1_and_a_drop_and_without_there_is_agreement(model: single.ModelFile, tmp_path: Path) -> None:
    made = _int8(model, tmp_path)
    for labels in (True, False):
        shares = prediction.shares(model, DataRequest(_npz(tmp_path, 60, labels=labels)), {}, None, 256)
        found = prediction.of(made, model.artifact, shares, {}, Silent())
        assert (found["top1"] is not None, found["top1_drop_pp"] is not None) == (labels, labels)
        assert found["agreement"] > 0.5
        assert found["sqnr_db"] > 10
        assert found["n"] == 30
        line = prediction.line(found, "sm89")
        assert line.startswith("predicted on the CPU, not measured on sm89: ")
        assert "30 samples of" in line
        assert "that did not calibrate" in line


def test_the_prediction_is_of_the_graph_as_it_is_written(model: single.ModelFile, tmp_path: Path) -> None:
    """Its scales too coarse, and INT8 loses everything: a runtime that ignored the Q/DQ pairs would not show it."""
    table = _table(model, "s", 4)
    coarse = replace(table, ranges=dict.fromkeys(table.ranges, Range(-4000.0, 4000.0)))
    made = precision.to_int8_fp16(model.artifact.path, coarse, tmp_path / "q.onnx").save()
    shares = prediction.shares(model, DataRequest(_npz(tmp_path, 60, labels=False)), {}, None, 256)
    assert prediction.of(made, model.artifact, shares, {}, Silent())["sqnr_db"] < 6


def test_a_graph_quantized_elsewhere_has_top1_alone(model: single.ModelFile, tmp_path: Path) -> None:
    made = _int8(model, tmp_path)
    shares = prediction.shares(model, DataRequest(_npz(tmp_path, 60)), {}, None, 256)
    found = prediction.of(made, None, shares, {}, Silent())
    assert 0 <= found["top1"] <= 1
    assert (found["agreement"], found["top1_drop_pp"]) == (None, None)
    assert "no float model to compare with" in found["in_words"]
    bare = prediction.shares(model, DataRequest(_npz(tmp_path, 60, labels=False)), {}, None, 256)
    told = prediction.of(made, None, bare, {}, Silent())
    assert "its float form is not known" in told["why_not"]
    assert "compare" in told["remedy"]


def test_a_graph_that_does_not_run_here_is_not_predicted_and_says_why(model: single.ModelFile, tmp_path: Path) -> None:
    made = _int8(model, tmp_path)
    broken = graph.load(made.path)
    broken.graph.node[0].domain = "nobody.knows"
    broken.opset_import.add(domain="nobody.knows", version=1)
    graph.save(broken, tmp_path / "b.onnx")
    shares = prediction.shares(model, DataRequest(_npz(tmp_path, 60)), {}, None, 256)
    found = prediction.of(replace(made, path=tmp_path / "b.onnx"), model.artifact, shares, {}, Silent())
    assert "cannot open b.onnx" in found["why_not"]
    assert prediction.line(found, "sm89").startswith("accuracy not predicted: ")


def test_class_folders_without_the_models_class_order_give_no_top1(model: single.ModelFile, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            pixels = np.random.default_rng(i).integers(0, 255, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{name}{i}.png")
    request = DataRequest(str(tmp_path / "images"), preprocess="none")
    found = prediction.shares(model, request, {}, None, 256)
    assert found.judge is not None
    assert found.judge.labels is None
    assert "--classes FILE" in found.notes[0]
    (tmp_path / "classes.txt").write_text("b\na\nc\nd\n")
    named = prediction.shares(model, replace(request, classes=tmp_path / "classes.txt"), {}, None, 256)
    assert named.judge is not None
    assert named.judge.labels is not None
    assert named.notes == ()


@RTX
def test_the_command_tells_it_beside_the_engine_and_in_the_manifest(tmp_path: Path) -> None:
    path = tiny_models.conv_net(tmp_path / "m.onnx")
    words = ["build-trt", str(path), "--fp16", "--int8", "--target", "sm89", "-o", str(tmp_path / "out"), "--data"]
    done = CliRunner().invoke(app, [*words, _npz(tmp_path, 60)], standalone_mode=False)
    assert done.return_value == EXIT_PASSED, done.exception
    assert done.stdout.count("predicted on the CPU, not measured on sm89: top-1") == 2
    assert "expected: accuracy: that of the same graph on the CPU" in done.stdout
    engines = [artifacts.load(file) for file in (tmp_path / "out").glob("*/*.manifest.json")]
    assert {e.precision for e in engines} == {"fp16", "int8"}
    for engine in engines:
        assert engine.facts["predicted"]["n"] == 30
        assert engine.facts["predicted"]["samples"]["role"] == "judge"
        assert engine.facts["validated_on_gpu"] is False


@RTX
def test_with_a_table_alone_the_command_says_what_is_missing(tmp_path: Path) -> None:
    path = tiny_models.conv_net(tmp_path / "m.onnx")
    table = tmp_path / "calib.json"
    model = single.open_model(path, lambda _, function, *args: function(*args))
    _table(model, "s", 4).save(table)
    words = ["build-trt", str(path), "--int8", "--calib", str(table), "--target", "sm89", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, words, standalone_mode=False)
    assert done.return_value == EXIT_PASSED, done.exception
    assert "accuracy not predicted: no samples were given; add --data DATA" in done.stdout
    (engine,) = (artifacts.load(file) for file in (tmp_path / "out").glob("*/*.manifest.json"))
    assert engine.facts["predicted"]["why_not"] == "no samples were given"
