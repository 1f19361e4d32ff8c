"""digits, IDX files and random inputs, made ready for models of several shapes."""

from __future__ import annotations

import gzip
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploykit import data
from deploykit.data import digits, greys, idx
from deploykit.errors import DataError, InputError, MissingBackend
from deploykit.preprocess import Preprocess
from deploykit.signature import ShapeRange, Signature, TensorSpec

Shape = tuple[int | str, ...]


def signature(shape: Shape = ("batch", 1, 8, 8), dtype: str = "float32") -> Signature:
    return Signature((TensorSpec("x", dtype, shape),), (TensorSpec("y", "float32", ("batch", 10)),))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def test_digits_are_scikit_learns_without_importing_it() -> None:
    digits.load.cache_clear()
    before = "sklearn" in sys.modules
    pictures, labels = digits.load()
    assert ("sklearn" in sys.modules) == before
    from sklearn.datasets import load_digits

    theirs = load_digits()
    np.testing.assert_array_equal(pictures, theirs.images)
    np.testing.assert_array_equal(labels, theirs.target)


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    digits.load.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingBackend, match="scikit-learn"):
        data.open("digits", signature())


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (("batch", 64), (3, 64)),
        (("batch", 8, 8), (3, 8, 8)),
        (("batch", 1, 8, 8), (3, 1, 8, 8)),
        (("batch", 3, 32, 24), (3, 3, 32, 24)),
        (("batch", 32, 24, 3), (3, 32, 24, 3)),
        (("batch", 3, "h", "w"), (3, 3, 8, 8)),
        ((5, 1, 16, 16), (3, 1, 16, 16)),
    ],
)
def test_digits_take_the_shape_of_the_input(shape: Shape, expected: tuple[int, ...]) -> None:
    samples = data.open("digits", signature(shape))
    feeds = samples.reader.read([0, 5, 1796])
    assert feeds["x"].shape == expected
    assert feeds["x"].dtype == np.float32
    assert 0 <= feeds["x"].min() < 0.05
    assert 0.8 < feeds["x"].max() <= 1.0001
    if 64 in (expected[-1], int(np.prod(expected[1:]))):
        np.testing.assert_allclose(feeds["x"].reshape(3, 8, 8), digits.load()[0][[0, 5, 1796]] / 16.0, atol=1e-6)


def test_digits_take_mean_std_scale_and_integer_pixels() -> None:
    plain = data.open("digits", signature()).reader.read([7])["x"]
    normed = data.open("digits", signature(), preprocess=Preprocess(resize=256, crop=224, mean=(0.5,), std=(0.25,)))
    np.testing.assert_allclose(normed.reader.read([7])["x"], (plain - 0.5) / 0.25, atol=1e-5)
    wide = data.open("digits", signature(), preprocess=Preprocess(scale=1.0)).reader.read([7])["x"]
    np.testing.assert_allclose(wide, plain * 255, atol=1e-3)
    whole = data.open("digits", signature(dtype="uint8")).reader.read([7])["x"]
    assert whole.dtype == np.uint8
    np.testing.assert_array_equal(whole, np.rint(plain * 255))


@pytest.mark.parametrize("shape", [("batch", 10), ("batch", 5, 8, 8), ("batch",), ("batch", 1, 1, 8, 8)])
def test_a_model_that_takes_no_pictures_is_refused(shape: Shape) -> None:
    with pytest.raises(DataError):
        data.open("digits", signature(shape))


@settings(max_examples=25, deadline=None)
@given(h=st.integers(1, 20), w=st.integers(1, 20), to_h=st.integers(1, 40), to_w=st.integers(1, 40), seed=st.integers(0, 99))
def test_stretching_is_pillows_bilinear(h: int, w: int, to_h: int, to_w: int, seed: int) -> None:
    from PIL import Image

    picture = np.random.default_rng(seed).random((1, h, w), dtype=np.float32) * 255
    expected = np.asarray(Image.fromarray(picture[0]).resize((to_w, to_h), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(greys.resize(picture, to_h, to_w)[0], expected, atol=0.02)


def write_idx(path: Path, array: np.ndarray) -> None:
    content = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def idx_folder(root: Path, train: int = 20, test: int = 10) -> Path:
    rng = np.random.default_rng(0)
    for part, n, end in (("train", train, ".gz"), ("t10k", test, "")):
        if n:
            write_idx(root / f"{part}-images-idx3-ubyte{end}", rng.integers(0, 256, (n, 6, 5)))
            write_idx(root / f"{part}-labels-idx1-ubyte{end}", np.arange(n) % 5)
    return root


def test_idx_pictures_share_one_index_space_train_first(tmp_path: Path) -> None:
    root = idx_folder(tmp_path)
    samples = pickle.loads(pickle.dumps(data.open(str(root), signature(("batch", 1, 6, 5)))))
    assert len(samples) == 30
    assert samples.reader.train_n == 20
    got = samples.reader.read([19, 20, 0])["x"][:, 0] * 255
    train, test = idx.load(str(root / "train-images-idx3-ubyte.gz")), idx.load(str(root / "t10k-images-idx3-ubyte"))
    np.testing.assert_allclose(got, np.stack([train[19], test[0], train[0]]), atol=1e-3)
    assert samples.labels == tuple(np.r_[np.arange(20) % 5, np.arange(10) % 5].tolist())


def test_half_an_idx_folder_is_enough_and_missing_labels_are_noted(tmp_path: Path) -> None:
    root = idx_folder(tmp_path, train=0)
    assert len(data.open(str(root), signature())) == 10
    (root / "t10k-labels-idx1-ubyte").unlink()
    assert data.open(str(root), signature()).labels is None
    write_idx(root / "train-images-idx3-ubyte", np.zeros((4, 6, 5)))
    write_idx(root / "train-labels-idx1-ubyte", np.zeros(4))
    samples = data.open(str(root), signature())
    assert samples.labels is None
    assert any("labels are missing" in note for note in samples.notes)


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_damaged_idx_files_are_named(tmp_path: Path, name: str) -> None:
    root = idx_folder(tmp_path)
    whole = (root / name).read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"\0\0\x0d\x03" + whole[4:], b"hello world, hello world"):
        (root / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            data.open(str(root), signature()).reader.read([0, 25])


def test_counts_that_differ_are_refused(tmp_path: Path) -> None:
    root = idx_folder(tmp_path)
    write_idx(root / "t10k-labels-idx1-ubyte", np.zeros(9))
    with pytest.raises(DataError, match="9 labels for the 10"):
        data.open(str(root), signature())


def test_random_inputs_are_seeded_safe_and_say_so() -> None:
    mixed = Signature(
        (
            TensorSpec("x", "float32", ("batch", 3, "h", 4)),
            TensorSpec("h", "float16", (2, "batch", 5)),
            TensorSpec("ids", "int64", ("batch", 7)),
            TensorSpec("mask", "bool", ("batch",)),
            TensorSpec("c", "float64", (2, 2)),
        ),
        (),
    )
    ranges = {"x": ShapeRange((1, 3, 4, 4), (2, 3, 9, 4), (2, 3, 32, 4))}
    samples = data.open("random:6", mixed, shapes=ranges)
    assert samples.random
    assert samples.labels is None
    feeds = samples.reader.read([4, 1, 4])
    mixed.check(feeds)
    assert feeds["x"].shape == (3, 3, 9, 4)
    assert feeds["h"].shape == (2, 3, 5)
    assert set(np.unique(feeds["ids"])) <= {0, 1}
    np.testing.assert_array_equal(feeds["x"][0], feeds["x"][2])
    assert not np.array_equal(feeds["x"][0], feeds["x"][1])
    np.testing.assert_array_equal(samples.reader.read([1])["h"][:, 0], feeds["h"][:, 1])
    with pytest.raises(InputError, match="dynamic axis"):
        data.open("random:6", mixed)


def test_random_text_is_refused() -> None:
    with pytest.raises(DataError):
        data.open("random:2", Signature((TensorSpec("s", "str", ("batch",)),), ()))
