"""Shares that never meet: training, calibration, judging."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deploykit import data
from deploykit.data.idx import IdxReader
from deploykit.data.image_input import ImageInput
from deploykit.data.random_inputs import RandomReader
from deploykit.errors import DataError
from deploykit.preprocess import NONE
from deploykit.samples import Samples
from deploykit.signature import Signature, TensorSpec

SIGNATURE = Signature((TensorSpec("x", "float32", ("batch", 3, 8, 8)),), (TensorSpec("y", "float32", ("batch", 3)),))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def samples_of(n: int, classes: int | None = 3, content: str = "ab" * 32) -> Samples:
    labels = None if classes is None else tuple(i % classes for i in range(n))
    return Samples("some", content, RandomReader(SIGNATURE), SIGNATURE, None, tuple(range(n)), labels)


def idx_samples(train: int, test: int) -> Samples:
    reader = IdxReader("nowhere", ("a", "b"), (train, test), train, ImageInput("x", "float32", "nchw", 3, 8, 8), None)
    n = train + test
    return Samples("idx", "cd" * 32, reader, SIGNATURE, None, tuple(range(n)), tuple(i % 3 for i in range(n)))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(2, 300),
    classes=st.sampled_from([None, 1, 3, 7]),
    calib_n=st.one_of(st.none(), st.integers(1, 400)),
    seed=st.integers(0, 2**32),
    excluded=st.integers(0, 200),
)
def test_shares_are_disjoint_complete_and_repeatable(
    n: int, classes: int | None, calib_n: int | None, seed: int, excluded: int
) -> None:
    samples = samples_of(n, classes, f"{seed:064x}")
    exclude = set(np.random.default_rng(seed).permutation(n)[: min(excluded, n - 2)].tolist())
    calibrate, judge = data.split(samples, calib_n=calib_n, exclude=exclude)
    assert (calibrate.role, judge.role) == ("calibrate", "judge")
    assert not set(calibrate.indices) & set(judge.indices)
    assert set(calibrate.indices) | set(judge.indices) == set(range(n)) - exclude
    assert len(calibrate) == min(512 if calib_n is None else calib_n, (n - len(exclude)) // 2)
    for share in (calibrate, judge):
        assert share.labels == (None if classes is None else tuple(i % classes for i in share.indices))
    assert data.split(samples, calib_n=calib_n, exclude=exclude) == (calibrate, judge)


def test_eight_give_four_and_one_is_refused() -> None:
    calibrate, judge = data.split(samples_of(8))
    assert (len(calibrate), len(judge)) == (4, 4)
    assert any("only 4 samples calibrate" in note for note in calibrate.notes)
    assert any("one sample is 25" in note for note in judge.notes)
    with pytest.raises(DataError, match="at least 2"):
        data.split(samples_of(1))
    with pytest.raises(DataError, match="trained on"):
        data.split(samples_of(8), exclude=range(7))
    with pytest.raises(DataError, match="at least one"):
        data.split(samples_of(8), calib_n=0)


def test_more_than_half_is_not_given_and_that_is_said() -> None:
    calibrate, _ = data.split(samples_of(200), calib_n=150)
    assert len(calibrate) == 100
    assert any("100 of the 150" in note for note in calibrate.notes)


def test_every_stretch_of_a_share_holds_the_classes_in_proportion() -> None:
    rng = np.random.default_rng(0)
    labels = np.sort(rng.choice(4, 1000, p=[0.5, 0.3, 0.15, 0.05]))
    base = samples_of(1000)
    samples = Samples("s", base.content, base.reader, SIGNATURE, None, base.indices, tuple(labels.tolist()))
    calibrate, judge = data.split(samples, calib_n=200)
    shares = np.bincount(labels) / 1000
    for part in (calibrate.labels, judge.labels, calibrate.labels[:40], judge.labels[100:180]):  # type: ignore[index]
        assert np.abs(np.bincount(part, minlength=4) - shares * len(part)).max() <= 1.5


def test_training_calibration_and_judging_never_meet() -> None:
    for samples in (samples_of(500), idx_samples(400, 100)):
        trained = data.train_share(samples)
        calibrate, judge = data.split(samples, exclude=trained.indices)
        shares = [set(s.indices) for s in (trained, calibrate, judge, data.held_out(samples, exclude=trained.indices))]
        assert not shares[0] & shares[1]
        assert not shares[0] & shares[2]
        assert not shares[1] & shares[2]
        assert not shares[0] & shares[3]
        assert data.train_share(samples) == trained
    assert len(data.train_share(samples_of(500))) == 300


def test_of_an_idx_folder_the_test_file_judges() -> None:
    samples = idx_samples(1000, 100)
    calibrate, judge = data.split(samples)
    assert len(calibrate) == 512
    assert set(judge.indices) == set(range(1000, 1100))
    assert max(data.train_share(samples).indices) < 1000
    assert set(data.held_out(samples).indices) == set(range(1000, 1100))
    with pytest.raises(DataError, match="no training picture"):
        data.split(samples, exclude=range(1000))
    _, few = data.split(samples, judge_n=10)
    assert len(few) == 10


def test_other_calibration_data_lets_all_samples_judge() -> None:
    calibrate, judge = data.split(samples_of(50), calib=samples_of(40, content="ef" * 32), calib_n=30)
    assert len(calibrate) == 30
    assert sorted(judge.indices) == list(range(50))
    calibrate, judge = data.split(samples_of(50), calib=samples_of(50))
    assert not set(calibrate.indices) & set(judge.indices)
    assert any("same data" in note for note in judge.notes)


def folder(root: Path, greys: list[int]) -> Samples:
    root.mkdir()
    for k, grey in enumerate(greys):
        Image.new("RGB", (8, 8), (grey, 0, 0)).save(root / f"{k}.png")
    return data.open(str(root), SIGNATURE, preprocess=NONE)


def test_images_that_both_folders_hold_only_judge(tmp_path: Path) -> None:
    judges, calib = folder(tmp_path / "judge", [1, 2, 3, 4]), folder(tmp_path / "calib", [9, 3, 8])
    calibrate, judge = data.split(judges, calib=calib)
    assert sorted(calibrate.indices) == [0, 2]
    assert len(judge) == 4
    assert any("in common" in note for note in calibrate.notes)
    with pytest.raises(DataError, match="byte for byte"):
        data.split(judges, calib=folder(tmp_path / "same", [4, 2]))


def test_copies_within_one_folder_do_not_judge_what_they_calibrate(tmp_path: Path) -> None:
    samples = folder(tmp_path / "set", [1, 1, 1, 1, 2, 2, 3, 4, 5, 6])
    calibrate, judge = data.split(samples)
    seen = {samples.reader.digests[i] for i in calibrate.indices}  # type: ignore[attr-defined]
    assert not seen & {samples.reader.digests[i] for i in judge.indices}  # type: ignore[attr-defined]


def test_a_model_trained_on_everything_has_nothing_to_judge_it() -> None:
    with pytest.raises(DataError, match="no sample is left to judge"):
        data.held_out(samples_of(5), exclude=range(5))
    with pytest.raises(DataError, match="no sample to train on"):
        data.train_share(samples_of(1))


def test_a_limit_keeps_the_classes_and_of_idx_both_files() -> None:
    limited = data.open("digits", SIGNATURE, limit=100)
    assert len(limited) == 100
    assert list(limited.indices) == sorted(limited.indices)
    assert np.bincount(limited.labels).min() >= 9  # type: ignore[arg-type]
    assert any("100 of 1797" in note for note in limited.notes)
    assert len(data.open("digits", SIGNATURE, limit=9999)) == 1797
    with pytest.raises(DataError):
        data.open("digits", SIGNATURE, limit=0)


def test_a_calibration_share_takes_from_every_class() -> None:
    chosen = data.calibration_share(samples_of(90), 9)
    assert chosen.role == "calibrate"
    assert np.bincount(chosen.labels).tolist() == [3, 3, 3]  # type: ignore[arg-type]
    assert len(data.calibration_share(samples_of(5), 9)) == 5
