from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
from tiny_models import conv_net

from deploykit import graph
from deploykit.calibration_table import CalibrationTable, Range
from deploykit.errors import InputError, StaleCalibration
from deploykit.trt import implicit

TRT86 = SimpleNamespace(__version__="8.6.1")


def _table(names: list[str]) -> CalibrationTable:
    ranges = {name: Range(-1.0, 2.0) for name in names}
    return CalibrationTable(ranges, ranges, "minmax", "m" * 64, "s" * 64, None, 4)


def test_our_table_and_a_text_cache_get_the_header_of_this_tensorrt(tmp_path: Path) -> None:
    _table(["x", "c1"]).save(tmp_path / "calib.json")
    ours = implicit.cache_text(TRT86, tmp_path / "calib.json")
    assert ours.splitlines()[0] == "TRT-8601-EntropyCalibration2"
    old = tmp_path / "old.cache"
    old.write_text(ours.replace("8601", "101401"))
    assert implicit.cache_text(TRT86, old) == ours


def test_a_cache_without_scales_and_a_newer_tensorrt_are_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.cache"
    empty.write_text("TRT-8601-EntropyCalibration2\n")
    with pytest.raises(InputError, match="no scales"):
        implicit.cache_text(TRT86, empty)
    full = tmp_path / "full.cache"
    full.write_text("TRT-8601-EntropyCalibration2\nx: 3c010a14\n")
    with pytest.raises(InputError, match="no calibration cache"):
        implicit.cache_text(SimpleNamespace(__version__="11.4.0.106"), full)


def test_our_table_of_another_model_is_refused_and_its_own_serves(tmp_path: Path) -> None:
    path = conv_net(tmp_path / "m.onnx")
    ours = _table(["x"])
    ours.save(tmp_path / "other.json")
    with pytest.raises(StaleCalibration):
        implicit.cache_text(TRT86, tmp_path / "other.json", path)
    replace(ours, model_sha256=graph.digest(graph.load(path))).save(tmp_path / "own.json")
    assert "x: " in implicit.cache_text(TRT86, tmp_path / "own.json", path)


def test_names_are_held_against_the_graph(tmp_path: Path) -> None:
    model = onnx.load(str(conv_net(tmp_path / "m.onnx")))
    every = ["x", *(name for node in model.graph.node for name in node.output)]
    _table(every).save(tmp_path / "all.json")
    assert implicit.check_names(implicit.cache_text(TRT86, tmp_path / "all.json"), model) == ()
    _table([*every[1:], "elsewhere"]).save(tmp_path / "some.json")
    strays, bare = implicit.check_names(implicit.cache_text(TRT86, tmp_path / "some.json"), model)
    assert "elsewhere" in strays
    assert bare.startswith("1 of 3 tensors that convolutions and matrix products read")
    assert bare.endswith(": x")
    _table(["elsewhere"]).save(tmp_path / "none.json")
    with pytest.raises(InputError, match="none is in the graph"):
        implicit.check_names(implicit.cache_text(TRT86, tmp_path / "none.json"), model)
