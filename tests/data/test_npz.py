"""An .npz named after the model's inputs: what fits, what is converted, what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploykit import data
from deploykit.errors import DataError
from deploykit.signature import Signature, TensorSpec

TWO = Signature(
    (TensorSpec("a", "float32", ("batch", 6)), TensorSpec("ids", "int64", ("batch", 3))),
    (TensorSpec("y", "float32", ("batch", 5)),),
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def arrays(n: int = 5, **other: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    found = {"a": rng.normal(size=(n, 6)).astype(np.float32), "ids": rng.integers(0, 9, (n, 3))}
    return {name: value for name, value in {**found, **other}.items() if value is not None}


def saved(path: Path, **content: Any) -> str:
    np.savez(path / "d.npz", **content)
    return str(path / "d.npz")


def test_samples_and_labels_come_back_as_saved(tmp_path: Path) -> None:
    content = arrays(labels=np.array([0, 4, 2, 2, 1], dtype=np.uint8))
    samples = data.open(saved(tmp_path, **content), TWO)
    assert samples.labels == (0, 4, 2, 2, 1)
    assert samples.notes == ()
    feeds = samples.reader.read([3, 1])
    TWO.check(feeds)
    np.testing.assert_array_equal(feeds["a"], content["a"][[3, 1]])
    np.testing.assert_array_equal(feeds["ids"], content["ids"][[3, 1]])


def test_safe_conversions_are_made_and_noted(tmp_path: Path) -> None:
    content = arrays()
    content["a"], content["ids"] = content["a"].astype(np.float64), content["ids"].astype(np.uint8)
    samples = data.open(saved(tmp_path, **content), TWO)
    TWO.check(samples.reader.read([0]))
    assert samples.notes == ("'a' was converted from float64 to float32", "'ids' was converted from uint8 to int64")


def test_a_state_with_its_batch_second_and_constants_are_fed_as_the_model_wants(tmp_path: Path) -> None:
    signature = Signature(
        (
            TensorSpec("state", "float32", (2, "batch", 4)),
            TensorSpec("scale", "float32", ()),
            TensorSpec("table", "float32", (3, "k")),
        ),
        (),
    )
    state, table = np.arange(24, dtype=np.float32).reshape(2, 3, 4), np.ones((3, 7), dtype=np.float32)
    samples = data.open(saved(tmp_path, state=state, scale=np.float32(2), table=table), signature)
    assert len(samples) == 3
    feeds = samples.reader.read([2, 0])
    np.testing.assert_array_equal(feeds["state"], state[:, [2, 0]])
    assert feeds["scale"].shape == ()
    assert feeds["table"].shape == (3, 7)


def test_a_fixed_batch_model_takes_any_number_of_samples(tmp_path: Path) -> None:
    fixed = Signature((TensorSpec("a", "float32", (4, 6)),), ())
    samples = data.open(saved(tmp_path, a=np.zeros((10, 6), dtype=np.float32)), fixed)
    assert [(f["a"].shape, count) for f, count in samples.batches(4, pad=True)] == [((4, 6), 4), ((4, 6), 4), ((4, 6), 2)]


NAN = np.zeros((5, 6), dtype=np.float32)
NAN[3, 1] = np.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": None}, "no array for the input"),
        ({"image": np.zeros(3)}, "'image' in .* is no input"),
        ({"a": np.zeros((5, 6, 1), dtype=np.float32)}, "rank 3"),
        ({"a": np.zeros((5, 7), dtype=np.float32)}, "axis 1 must be 6"),
        ({"a": np.zeros((4, 6), dtype=np.float32)}, "different numbers of samples: a: 4, ids: 5"),
        ({"a": NAN}, r"1 NaN, the first at \(3, 1\) \(sample 3\)"),
        ({"a": np.zeros((5, 6), dtype=np.int32)}, "is int32, the model takes float32"),
        ({"a": np.full((5, 6), 1e300)}, "too large for float32"),
        ({"ids": np.full((5, 3), 2**63, dtype=np.uint64)}, "outside int64"),
        ({"ids": np.zeros((5, 3))}, "is float64, the model takes int64"),
        ({"a": np.zeros((0, 6), dtype=np.float32), "ids": np.zeros((0, 3), dtype=np.int64)}, "no samples"),
        ({"labels": np.zeros(4, dtype=np.int64)}, "expected 5 integers"),
        ({"labels": np.zeros(5)}, "expected 5 integers"),
        ({"labels": np.array([0, 1, -1, 0, 0])}, "-1 at 2"),
        ({"a": np.array([[None]], dtype=object)}, "pickled objects"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        data.open(saved(tmp_path, **arrays(**change)), TWO)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", b"hello", bytes(500)])
def test_a_damaged_file_is_one_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "d.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"d\.npz"):
        data.open(str(path), TWO)
    np.savez(path, **arrays())
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes(60) + whole[160:])
    with pytest.raises(DataError, match=r"d\.npz"):
        data.open(str(path), TWO)


def test_a_single_array_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "d.npz").open("wb") as stream:
        np.save(stream, np.zeros(3))
    with pytest.raises(DataError, match="one array"):
        data.open(str(tmp_path / "d.npz"), TWO)


def test_a_file_that_changes_after_it_was_opened_is_not_read_on(tmp_path: Path) -> None:
    path = saved(tmp_path, **arrays())
    samples = data.open(path, TWO)
    os.utime(path, (1, 1))
    with pytest.raises(DataError, match="has changed"):
        samples.reader.read([0])
    os.unlink(path)
    with pytest.raises(DataError, match="cannot be read"):
        samples.reader.read([0])
