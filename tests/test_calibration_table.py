from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploykit import calibration_table
from deploykit.calibration_table import CalibrationTable, Range
from deploykit.errors import InputError, StaleCalibration, UnknownName
from deploykit.preprocess import IMAGENET, NONE


def table(**changes: object) -> CalibrationTable:
    made = CalibrationTable(
        ranges={"x": Range(-1.0, 2.0), "y:0": Range(0.0, 0.0)},
        observed={"x": Range(-3.0, 4.0), "y:0": Range(0.0, 0.0)},
        method="entropy",
        model_sha256="a" * 64,
        samples_digest="b" * 64,
        preprocess=IMAGENET.to_json(),
        n=16,
        versions={"onnxruntime": "1.31"},
        notes=("few",),
        symmetric={"x": 1.5},
        options={"percentile": 99.9},
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def test_amax_is_the_methods_own_choice_and_else_the_larger_end() -> None:
    assert table().amax("x") == 1.5
    assert table(symmetric={}).amax("x") == 2.0
    assert table().amax("y:0") == 0.0
    with pytest.raises(UnknownName, match="'z'"):
        table().amax("z")


def test_what_was_saved_is_loaded_with_the_same_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "calib.json"
    table().save(path)
    loaded = calibration_table.load(path)
    assert loaded.fingerprint == table().fingerprint
    assert loaded.to_json() == table().to_json()
    assert loaded.amax("x") == 1.5
    assert [p.name for p in path.parent.iterdir()] == ["calib.json"]


finite = st.floats(allow_nan=False, allow_infinity=False)


@given(st.dictionaries(st.text(), st.tuples(finite, finite, st.floats(min_value=0, allow_infinity=False, allow_nan=False))))
def test_any_ranges_survive_json_exactly(rows: dict[str, tuple[float, float, float]]) -> None:
    ranges = {name: Range(min(a, b), max(a, b)) for name, (a, b, _) in rows.items()}
    made = table(ranges=ranges, observed=ranges, symmetric={name: amax for name, (_, _, amax) in rows.items()})
    back = CalibrationTable.from_json(json.loads(json.dumps(made.to_json())))
    assert back.ranges == ranges
    assert all(back.amax(name) == amax for name, (_, _, amax) in rows.items())


@pytest.mark.parametrize(
    "change",
    [
        {"n": 17},
        {"method": "mse"},
        {"model_sha256": "c" * 64},
        {"samples_digest": "c" * 64},
        {"preprocess": None},
        {"versions": {}},
        {"symmetric": {}},
        {"ranges": {"x": Range(-1.0, 2.5), "y:0": Range(0.0, 0.0)}},
        {"options": {}},
    ],
)
def test_the_fingerprint_changes_with_everything_in_the_table(change: dict[str, object]) -> None:
    assert table(**change).fingerprint != table().fingerprint


def test_a_table_is_taken_for_what_it_was_made_for() -> None:
    table().require_match()
    table().require_match(model_sha256="a" * 64, samples_digest="b" * 64, preprocess=IMAGENET, method="entropy")
    table().require_match(preprocess=json.loads(json.dumps(IMAGENET.to_json())))


@pytest.mark.parametrize(
    ("expected", "says"),
    [
        ({"model_sha256": "c" * 64}, "made for model aaaaaaaaaaaa..., not cccccccccccc..."),
        ({"samples_digest": "c" * 64}, "made for samples bbbbbbbbbbbb..., not cccccccccccc..."),
        ({"preprocess": NONE}, "made for preprocessing"),
        ({"method": "minmax"}, "made for method entropy, not minmax"),
    ],
)
def test_a_stale_table_is_refused_saying_what_it_was_made_for(expected: dict[str, object], says: str) -> None:
    with pytest.raises(StaleCalibration) as caught:
        table().require_match(**expected)  # type: ignore[arg-type]
    assert says in caught.value.message
    assert "--recalibrate" in (caught.value.remedy or "")


def _without(doc: dict[str, object], key: str) -> dict[str, object]:
    return {k: v for k, v in doc.items() if k != key}


DOC = table().to_json()
ROW = {"low": -1.0, "high": 1.0, "min": -1.0, "max": 1.0, "amax": 1.0}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        b"TRT-8601-EntropyCalibration2\nx: 3c010204\n",
        b"[]",
        b"{}",
        json.dumps(table().to_json())[:-40].encode(),
        json.dumps({**DOC, "calibration_version": 99}).encode(),
        json.dumps({**DOC, "method": "magic"}).encode(),
        json.dumps({**DOC, "tensors": {"x": {**ROW, "low": 2.0}}}).encode(),
        json.dumps({**DOC, "tensors": {"x": {**ROW, "low": "2"}}}).encode(),
        json.dumps({**DOC, "tensors": {"x": _without(ROW, "amax")}}).encode(),
        json.dumps({**DOC, "tensors": {"x": {**ROW, "amax": float("nan")}}}).encode(),
        json.dumps({**DOC, "tensors": ["x"]}).encode(),
        json.dumps(_without(DOC, "n")).encode(),
    ],
)
def test_a_file_that_is_no_table_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "calib.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        calibration_table.load(path)
    assert "calib.json" in caught.value.message
    assert caught.value.remedy


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no calibration table .*none\.json"):
        calibration_table.load(tmp_path / "none.json")
    with pytest.raises(InputError, match="is a folder"):
        calibration_table.load(tmp_path)


def test_ranges_are_finite_and_ordered() -> None:
    for low, high in [(1.0, 0.0), (float("nan"), 1.0), (0.0, float("inf"))]:
        with pytest.raises(InputError, match="finite"):
            Range(low, high)
    with pytest.raises(InputError, match="only one of"):
        table(observed={})
