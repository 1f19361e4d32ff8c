from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploykit import trt_cache
from deploykit.calibration_table import CalibrationTable, Range
from deploykit.errors import InputError, UnknownName


def table(amax: dict[str, float]) -> CalibrationTable:
    ranges = {name: Range(-value, value) for name, value in amax.items()}
    return CalibrationTable(ranges, ranges, "minmax", "a" * 64, "b" * 64, None, 1)


def test_the_text_is_tensorrts_own() -> None:
    # 3c010204 for amax 1.0 is what TensorRT writes for an input in [0, 1]; zero is written short.
    text = trt_cache.to_text(table({"images": 1.0, "zero": 0.0}), version="8.6.1")
    assert text == "TRT-8601-EntropyCalibration2\nimages: 3c010204\nzero: 0\n"
    assert trt_cache.to_text(table({"x": 127.0}), version="10.14.1", algorithm="MinMaxCalibration") == (
        "TRT-101401-MinMaxCalibration\nx: 3f800000\n"
    )


def test_the_symmetric_choice_is_what_goes_out() -> None:
    made = CalibrationTable({"x": Range(-5.0, 1.0)}, {"x": Range(-5.0, 1.0)}, "mse", "", "", None, 1, symmetric={"x": 2.54})
    _, scales = trt_cache.from_text(trt_cache.to_text(made))
    assert scales["x"] == pytest.approx(0.02)


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda s: s.splitlines() == [s])


@given(st.dictionaries(names, st.floats(min_value=0, max_value=1e30)))
def test_what_was_written_is_read_back_to_float32(amax: dict[str, float]) -> None:
    header, scales = trt_cache.from_text(trt_cache.to_text(table(amax)))
    assert str(header) == "TRT-101401-EntropyCalibration2"
    assert scales == {name: float(np.float32(value / 127.0)) for name, value in amax.items()}
    for name, value in trt_cache.amax_of(scales).items():
        assert value == pytest.approx(amax[name], rel=1e-6, abs=1e-42)


def test_names_with_colons_split_at_the_last_one() -> None:
    header, scales = trt_cache.from_text("TRT-8003-MinMaxCalibration\r\nlayer/a:0: 3f800000\r\nb : c:1: 0\r\n\r\n")
    assert (header.version, header.algorithm) == (8003, "MinMaxCalibration")
    assert scales == {"layer/a:0": 1.0, "b : c:1": 0.0}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "line 1"),
        ("x: 3f800000\n", "line 1"),
        ("TRT-8601\nx: 3f800000\n", "line 1"),
        ("TRT-8601-EntropyCalibration2\nx: 3f800000\nno colon\n", "line 3"),
        ("TRT-8601-EntropyCalibration2\nx: 3f80zz00\n", "line 2"),
        ("TRT-8601-EntropyCalibration2\nx: 3f8000001\n", "line 2"),
        ("TRT-8601-EntropyCalibration2\nx:\n", "line 2"),
        ("TRT-8601-EntropyCalibration2\n: 3f800000\n", "line 2"),
        ("TRT-8601-EntropyCalibration2\nx: 7fc00000\n", "'x' is nan"),
        ("TRT-8601-EntropyCalibration2\nx: 7f800000\n", "'x' is inf"),
        ("TRT-8601-EntropyCalibration2\nx: bf800000\n", "'x' is -1.0"),
        ("TRT-8601-EntropyCalibration2\nx: 0\nx: 0\n", "twice"),
    ],
)
def test_a_malformed_cache_is_refused_with_the_line(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        trt_cache.from_text(text)


def test_versions_are_counted_as_tensorrt_does() -> None:
    assert [trt_cache.version_number(v) for v in ("7.1.3", "8.6.1", "8.0.3.4", "10.0.1", "10.14.1")] == [
        7103,
        8601,
        8003,
        100001,
        101401,
    ]
    for bad in ("", "ten", "8", "8.6.1-rc"):
        with pytest.raises(InputError, match="no TensorRT version"):
            trt_cache.version_number(bad)
    with pytest.raises(InputError, match="no calibration cache"):
        trt_cache.version_number("11.4.0")


def test_what_the_format_cannot_hold_is_refused() -> None:
    with pytest.raises(InputError, match="a line a tensor"):
        trt_cache.to_text(table({"a\nb": 1.0}))
    with pytest.raises(InputError, match="beyond float32"):
        trt_cache.to_text(table({"a": 1e300}))
    with pytest.raises(UnknownName, match="EntropyCalibration3"):
        trt_cache.to_text(table({"a": 1.0}), algorithm="EntropyCalibration3")


def test_files_are_read_and_named_in_errors(tmp_path: Path) -> None:
    path = tmp_path / "calib.cache"
    trt_cache.write(table({"x": 1.0}), path, version="8.6.1")
    assert trt_cache.read(path)[0].version == 8601
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"calib\.cache is not a text cache"):
        trt_cache.read(path)
    path.write_text("hello")
    with pytest.raises(InputError, match=r"calib\.cache, line 1"):
        trt_cache.read(path)
    with pytest.raises(InputError, match="none"):
        trt_cache.read(tmp_path / "none")


def test_onnxruntimes_own_reader_finds_amax_and_not_the_larger_end() -> None:
    from onnxruntime.quantization.CalTableFlatBuffers.TrtTable import TrtTable

    ranges = {"b:0": Range(-5.0, 1.0), "a": Range(0.0, 0.25)}
    made = CalibrationTable(ranges, ranges, "minmax", "", "", None, 1)
    root = TrtTable.GetRootAsTrtTable(trt_cache.to_onnxruntime(made), 0)
    rows = [root.Dict(i) for i in range(root.DictLength())]
    assert [(row.Key().decode(), float(row.Value())) for row in rows] == [("a", 0.25), ("b:0", 5.0)]
