"""Folders of images: labels, order, what is refused and what is left aside."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deploykit import data
from deploykit.errors import DataError
from deploykit.preprocess import NONE, Preprocess
from deploykit.signature import ShapeRange, Signature, TensorSpec

Shape = tuple[int | str, ...]


def signature(shape: Shape = ("batch", 3, 8, 8), dtype: str = "float32") -> Signature:
    return Signature((TensorSpec("x", dtype, shape),), (TensorSpec("y", "float32", ("batch", 4)),))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def write(path: Path, grey: int, size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey, grey, grey)).save(path)
    return path


def classes_folder(root: Path) -> Path:
    for label, name in enumerate(("cat", "ant", "bee")):
        for k in range(3):
            write(root / name / f"{k}.png", 10 * label + k)
    return root


def greys(samples: data.Samples) -> list[int]:
    feeds, count = next(samples.batches(len(samples)))
    return [round(float(v) * 255) for v in feeds["x"][:count, 0, 0, 0]]


def test_sub_folders_are_labels_in_sorted_order(tmp_path: Path) -> None:
    samples = data.open(str(classes_folder(tmp_path)), signature(), preprocess=NONE)
    assert samples.classes == ("ant", "bee", "cat")
    assert samples.labels == (0, 0, 0, 1, 1, 1, 2, 2, 2)
    assert greys(samples) == [10, 11, 12, 20, 21, 22, 0, 1, 2]


def test_the_models_classes_give_the_labels_their_order(tmp_path: Path) -> None:
    root = str(classes_folder(tmp_path))
    samples = data.open(root, signature(), preprocess=NONE, classes=("cat", "dog", "bee", "ant"))
    assert samples.labels == (3, 3, 3, 2, 2, 2, 0, 0, 0)
    with pytest.raises(DataError, match="sub-folder 'cat'") as error:
        data.open(root, signature(), preprocess=NONE, classes=("ant", "bee", "cart"))
    assert "did you mean 'cart'" in str(error.value)


def test_a_flat_folder_has_no_labels_and_ignores_other_files(tmp_path: Path) -> None:
    write(tmp_path / "b.PNG", 2)
    write(tmp_path / "a.Jpg", 1)
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / ".DS_Store").write_text("x")
    samples = data.open(str(tmp_path), signature(), preprocess=NONE)
    assert samples.labels is None
    assert samples.reader.files == ("a.Jpg", "b.PNG")  # type: ignore[attr-defined]
    assert any("notes.txt" in note for note in samples.notes)
    assert not any(".DS_Store" in note for note in samples.notes)


def test_links_are_followed_and_a_loop_ends(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "a.png", 5)
    root = tmp_path / "set"
    write(root / "one" / "deep" / "b.png", 6)
    (root / "two").symlink_to(tmp_path / "elsewhere")
    (root / "one" / "loop").symlink_to(root / "one")
    samples = data.open(str(root), signature(), preprocess=NONE)
    assert samples.reader.files == ("one/deep/b.png", "two/a.png")  # type: ignore[attr-defined]
    assert samples.labels == (0, 1)


def test_a_broken_link_is_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path / "a.png", 1)
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(DataError, match=r"b\.png"):
        data.open(str(tmp_path), signature(), preprocess=NONE)


def test_a_broken_link_among_classes_is_left_out_on_request(tmp_path: Path) -> None:
    write(tmp_path / "one" / "a.png", 1)
    (tmp_path / "one" / "b.png").symlink_to(tmp_path / "gone.png")
    samples = data.open(str(tmp_path), signature(), preprocess=NONE, skip_unreadable=True)
    assert len(samples) == 1


def test_one_image_is_one_sample(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", 7)
    samples = data.open(str(path), signature(), preprocess=NONE)
    assert len(samples) == 1
    assert greys(samples) == [7]


def test_images_without_preprocessing_are_refused_with_an_example(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing says how") as error:
        data.open(str(classes_folder(tmp_path)), signature())
    assert "resize=256,crop=224" in str(error.value)


def test_a_corrupt_image_among_good_ones_is_one_error_or_left_out_on_request(tmp_path: Path) -> None:
    root = classes_folder(tmp_path)
    bad = root / "bee" / "1.png"
    bad.write_bytes(bad.read_bytes()[:40])
    os.utime(bad, (1, 1))
    for _ in range(2):  # the second time from the cache
        with pytest.raises(DataError, match=r"bee/1\.png cannot be decoded"):
            data.open(str(root), signature(), preprocess=NONE)
    samples = data.open(str(root), signature(), preprocess=NONE, skip_unreadable=True)
    assert len(samples) == 8
    assert any("bee/1.png" in note for note in samples.notes)
    for path in root.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="cannot be decoded"):
        data.open(str(root), signature(), preprocess=NONE, skip_unreadable=True)


@pytest.mark.parametrize("names", [[], ["a.txt"], ["cat/notes.txt"], ["cat/"]])
def test_a_folder_without_images_is_an_error(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if name.endswith("/"):
            path.mkdir(exist_ok=True)
        else:
            path.write_text("x")
    with pytest.raises(DataError, match="holds no images"):
        data.open(str(tmp_path), signature(), preprocess=NONE)


def test_the_shares_of_a_data_set_are_not_taken_for_classes(tmp_path: Path) -> None:
    write(tmp_path / "train" / "cat" / "a.png", 1)
    write(tmp_path / "val" / "cat" / "a.png", 1)
    with pytest.raises(DataError, match="shares of a data set"):
        data.open(str(tmp_path), signature(), preprocess=NONE)


def test_an_empty_class_and_numeric_names_are_noted(tmp_path: Path) -> None:
    for name in ("1", "2", "10"):
        write(tmp_path / name / "a.png", 1)
    (tmp_path / "3").mkdir()
    samples = data.open(str(tmp_path), signature(), preprocess=NONE)
    assert samples.classes == ("1", "10", "2")
    assert any("sorted as text" in note for note in samples.notes)
    assert any("without images: 3" in note for note in samples.notes)


@pytest.mark.parametrize(
    ("shape", "dtype", "preprocess", "message"),
    [
        (("batch", 3, 8, 8), "float32", Preprocess(resize=12, crop=10), "crops to 10x10"),
        (("batch", 8, 8, 3), "float32", NONE, "8 channels when read as NCHW"),
        (("batch", 3, "h", "w"), "float32", NONE, "free height or width"),
        (("batch", 3, 8, 8), "uint8", Preprocess(mean=(0.5,), std=(0.5,)), "takes pixels 0..255"),
        (("batch", 1, 8, 8), "float32", Preprocess(mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0)), "3 means"),
        (("batch", 5, 8, 8), "float32", NONE, "5 channels"),
        (("batch", 64), "float32", NONE, "rank 2"),
        (("batch", 3, 8, 8), "int64", NONE, "is no picture"),
        ((3, "batch", 8, 8), "float32", NONE, "axis 0"),
    ],
)
def test_a_model_that_the_images_do_not_fit_is_refused(
    tmp_path: Path, shape: Shape, dtype: str, preprocess: Preprocess, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        data.open(str(classes_folder(tmp_path)), signature(shape, dtype), preprocess=preprocess)


def test_free_height_and_width_come_from_the_crop_or_the_shapes(tmp_path: Path) -> None:
    root, free = str(classes_folder(tmp_path)), signature(("batch", 3, "h", "w"))
    cropped = data.open(root, free, preprocess=Preprocess(resize=7, crop=6))
    assert next(cropped.batches(2))[0]["x"].shape == (2, 3, 6, 6)
    ranges = {"x": ShapeRange((1, 3, 4, 4), (2, 3, 12, 10), (2, 3, 32, 32))}
    assert next(data.open(root, free, preprocess=NONE, shapes=ranges).batches(2))[0]["x"].shape == (2, 3, 12, 10)


def test_images_of_different_sizes_cannot_share_a_batch(tmp_path: Path) -> None:
    write(tmp_path / "a.png", 1, (8, 8))
    write(tmp_path / "b.png", 1, (16, 8))
    samples = data.open(str(tmp_path), signature(("batch", 3, "h", "w")), preprocess=Preprocess(resize=8))
    with pytest.raises(DataError, match="different sizes"):
        next(samples.batches(2))


def test_the_reader_crosses_to_another_process_and_pads_with_its_last_sample(tmp_path: Path) -> None:
    samples = pickle.loads(pickle.dumps(data.open(str(classes_folder(tmp_path)), signature(), preprocess=NONE)))
    *_, (feeds, count) = samples.batches(4, pad=True)
    assert count == 1
    assert feeds["x"].shape == (4, 3, 8, 8)
    assert np.ptp(feeds["x"]) == 0


def test_one_input_is_what_images_fill(tmp_path: Path) -> None:
    two = Signature((TensorSpec("x", "float32", ("batch", 3, 8, 8)), TensorSpec("s", "float32", ("batch", 2))), ())
    with pytest.raises(DataError, match="pictures fill one input"):
        data.open(str(classes_folder(tmp_path)), two, preprocess=NONE)


@pytest.mark.parametrize("spec", ["nowhere/at/all", "digit", "x\0y", "random:", "random:0", "random:x", "random:-3"])
def test_what_is_no_data_says_what_data_is(spec: str) -> None:
    with pytest.raises(DataError) as error:
        data.open(spec, signature())
    assert error.value.remedy


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("1,2")
    with pytest.raises(DataError, match="file of another kind"):
        data.open(str(tmp_path / "a.csv"), signature())
