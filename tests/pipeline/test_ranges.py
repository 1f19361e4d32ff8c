"""Calibration by a method's name: `best` takes the one whose INT8 graph stays closest to float, and says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny_models
from numpy.typing import NDArray

from deploykit import calibration_table
from deploykit.calibration_table import BEST, CANDIDATES
from deploykit.cli import options
from deploykit.errors import StaleCalibration, UnknownName
from deploykit.pipeline import ranges, single
from deploykit.pipeline.request import DataRequest, Silent
from deploykit.samples import Samples
from deploykit.stages import calibration, precision


def samples_of(folder: Path, x: NDArray[np.float32]) -> tuple[Path, Samples]:
    model = tiny_models.conv_net(folder / "net.onnx")
    np.savez(folder / "data.npz", x=x)
    opened = single.open_model(model)
    return model, single.open_data(opened, str(folder / "data.npz"), DataRequest(), {})


def images(n: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=(n, 3, 8, 8)).astype(np.float32)


def test_best_is_the_method_with_the_least_noise(tmp_path: Path) -> None:
    x = images(64)
    x[20, 0, 0, 0] = 400.0  # one outlier, where nothing is corrected or judged: its range leaves the rest few levels
    model, samples = samples_of(tmp_path, x)
    found = ranges.collect(model, samples, BEST)
    tables = calibration.collect(model, samples, methods=CANDIDATES)
    noise = precision.method_noise(model, tables, "cpu", samples)
    assert noise[found.method] == min(noise.values())
    assert found.method != "minmax"
    assert found.ranges == tables[found.method].ranges
    assert any(all(name in note for name in CANDIDATES) for note in found.notes)


def test_where_nothing_can_be_compared_the_note_says_so(tmp_path: Path) -> None:
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 4]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "x"], ["y"])], "add", [x], [y])
    model = tmp_path / "add.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9), str(model))
    np.savez(tmp_path / "data.npz", x=np.ones((8, 4), np.float32) * np.arange(8, dtype=np.float32)[:, None])
    samples = single.open_data(single.open_model(model), str(tmp_path / "data.npz"), DataRequest(), {})
    found = ranges.collect(model, samples, BEST)
    assert found.method == CANDIDATES[0]
    assert any("could not be compared" in note for note in found.notes)


def test_a_kept_table_is_taken_again_only_for_what_it_was_asked_for(tmp_path: Path) -> None:
    model, samples = samples_of(tmp_path, images(16))
    out, spec = tmp_path / "calib.json", str(tmp_path / "data.npz")
    first = single.calibrate_file(model, DataRequest(spec), out, None, Silent(), {})
    again = single.calibrate_file(model, DataRequest(spec), out, None, Silent(), {})
    assert first.fingerprint == again.fingerprint
    other = next(m for m in calibration_table.METHODS if m != first.method)
    with pytest.raises(StaleCalibration):
        single.calibrate_file(model, DataRequest(spec, method=other), out, None, Silent(), {})
    assert len(samples) == 16


def test_an_unknown_method_is_refused_and_best_is_the_default() -> None:
    with pytest.raises(UnknownName, match="bset"):
        ranges.require_known("bset")
    assert options.DEFAULT_METHOD == DataRequest().method == calibration_table.DEFAULT_METHOD == BEST
