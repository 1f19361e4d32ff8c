"""Drift: figures against float64 references, NaN never passes, files that belong elsewhere are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import spatial, special, stats
from sklearn import metrics

from deploykit.drift import Drift
from deploykit.drift_accumulator import DriftAccumulator, in_top, kl_divergence
from deploykit.errors import BackendFailed, DataError, ModelError
from deploykit.signature import Signature, TensorSpec

SIGNATURE = Signature(
    (TensorSpec("x", "float32", ("batch", 3)),),
    (TensorSpec("features", "float32", ("batch", 4, 5)), TensorSpec("logits", "float32", ("batch", 10))),
)


def outputs(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "features": rng.normal(0, 3, (n, 4, 5)).astype(np.float32),
        "logits": rng.normal(0, 2, (n, 10)).astype(np.float32),
    }


def noisy(reference: dict[str, np.ndarray], size: float = 0.3, seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {k: (v + size * rng.normal(size=v.shape)).astype(np.float32) for k, v in reference.items()}


def drift_of(
    reference: dict[str, np.ndarray],
    candidate: dict[str, np.ndarray],
    labels: np.ndarray | None = None,
    batch: int = 8,
    signature: Signature = SIGNATURE,
) -> Drift:
    n = len(next(iter(reference.values())))
    accumulator = DriftAccumulator(signature, n, labels, samples="s")
    for start in range(0, n, batch):
        count = min(batch, n - start)
        # the last batch is filled up with something that must not count
        rows = np.r_[np.arange(start, start + count), np.zeros(batch - count, dtype=int)]
        accumulator.add({k: v[rows] for k, v in reference.items()}, {k: v[rows] for k, v in candidate.items()}, count, batch)
    return accumulator.drift()


@pytest.mark.parametrize("batch", [1, 7, 8, 64])
def test_figures_match_float64_references(batch: int) -> None:
    reference = outputs(50)
    candidate = noisy(reference)
    labels = np.random.default_rng(2).integers(0, 10, 50)
    drift = drift_of(reference, candidate, labels, batch)
    r, c = (x["logits"].astype(np.float64) for x in (reference, candidate))
    assert drift.judged == "logits"
    assert drift.n == 50
    assert drift.sqnr_db == pytest.approx(10 * np.log10((r**2).sum() / ((r - c) ** 2).sum()))
    assert drift.cosine == pytest.approx(np.mean([1 - spatial.distance.cosine(a, b) for a, b in zip(r, c, strict=True)]))
    assert drift.max_abs == pytest.approx(np.abs(r - c).max())
    p, q = special.softmax(r, axis=1), special.softmax(c, axis=1)
    assert drift.kl == pytest.approx(np.mean(stats.entropy(p, q, axis=1)))
    assert drift.agreement == pytest.approx(np.mean(r.argmax(1) == c.argmax(1)))
    assert drift.top1 == pytest.approx(metrics.accuracy_score(labels, c.argmax(1)))
    assert drift.top5 == pytest.approx(metrics.top_k_accuracy_score(labels, c, k=5, labels=range(10)))
    expected_drop = 100 * (metrics.accuracy_score(labels, r.argmax(1)) - metrics.accuracy_score(labels, c.argmax(1)))
    assert drift.top1_drop_pp == pytest.approx(expected_drop)
    features = next(o for o in drift.outputs if o.name == "features")
    error = (reference["features"].astype(np.float64) - candidate["features"]) ** 2
    assert features.noise == pytest.approx(error.sum())
    assert features.elements == 50 * 20
    assert features.worst_sample == int(error.sum(axis=(1, 2)).argmax())
    np.testing.assert_array_equal(drift.correct, c.argmax(1) == labels)


def test_the_reference_against_itself_is_identical() -> None:
    drift = drift_of(outputs(9), outputs(9), np.zeros(9, dtype=np.int64))
    assert drift.identical
    assert drift.sqnr_db is None
    assert (drift.agreement, drift.kl, drift.max_abs) == (1.0, 0.0, 0.0)
    assert drift.top1_drop_pp == 0
    low, high = drift.top1_drop_interval_pp or (0, 0)
    assert low < 0 < high  # 9 samples show little


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["logits", "features"])
def test_nan_and_inf_are_counted_and_never_right(bad: float, where: str) -> None:
    reference = outputs(20)
    labels = reference["logits"].argmax(axis=1)
    candidate = {k: v.copy() for k, v in reference.items()}
    candidate[where].reshape(20, -1)[[3, 11], 2] = bad
    drift = drift_of(reference, candidate, labels)
    assert drift.nonfinite == 2
    assert any("NaN or Inf in the outputs of 2 of 20" in note for note in drift.notes)
    assert not drift.identical
    broken = next(o for o in drift.outputs if o.name == where)
    assert broken.nonfinite == 2
    assert broken.sqnr_db is None
    assert broken.worst_sample == 3
    json.dumps(drift.to_json(), allow_nan=False)
    if where == "logits":
        assert drift.top1 == pytest.approx(0.9)
        assert drift.agreement == pytest.approx(0.9)
        assert not drift.correct[3]  # type: ignore[index]


def test_the_same_infinity_on_both_sides_is_no_difference() -> None:
    reference = outputs(6)
    reference["logits"][:, 9] = -np.inf  # a masked class
    same = drift_of(reference, {k: v.copy() for k, v in reference.items()})
    assert same.identical
    assert same.kl == 0
    clipped = {k: v.copy() for k, v in reference.items()}
    clipped["logits"][:, 9] = -65504
    assert drift_of(reference, clipped).nonfinite == 6


def test_nan_in_the_reference_is_an_error_naming_the_sample() -> None:
    reference = outputs(20)
    reference["features"][13, 0, 0] = np.nan
    with pytest.raises(ModelError, match=r"'features', first for sample 13"):
        drift_of(reference, noisy(reference))


def test_labels_outside_the_classes_are_refused_naming_the_first() -> None:
    labels = np.zeros(20, dtype=np.int64)
    labels[[7, 9]] = 10
    with pytest.raises(DataError, match="label 10 of sample 7 is outside the model's 10 classes"):
        drift_of(outputs(20), outputs(20), labels)


def test_outputs_that_cannot_be_compared_are_an_error() -> None:
    reference = outputs(4)
    with pytest.raises(BackendFailed, match="missing"):
        drift_of(reference, {"features": reference["features"]})
    with pytest.raises(BackendFailed, match="shape"):
        drift_of(reference, {**reference, "logits": reference["logits"][:, :9]})


def test_every_sample_must_be_added_once() -> None:
    accumulator = DriftAccumulator(SIGNATURE, 5)
    accumulator.add(outputs(4), outputs(4), 4)
    with pytest.raises(DataError, match="only 4 of 5"):
        accumulator.drift()
    with pytest.raises(DataError, match="8 outputs for 5"):
        accumulator.add(outputs(4), outputs(4), 4)
    with pytest.raises(DataError, match="no samples"):
        DriftAccumulator(SIGNATURE, 0)


def test_without_classes_the_worst_output_speaks() -> None:
    signature = Signature(
        (TensorSpec("x", "float32", ("batch", 3)),),
        (TensorSpec("boxes", "float32", ("batch", 7, 4)), TensorSpec("n", "int64", ("batch",)), TensorSpec("s", "float32", ())),
    )
    rng = np.random.default_rng(0)
    reference = {"boxes": rng.normal(size=(8, 7, 4)).astype(np.float32), "n": np.arange(8)}
    candidate = {"boxes": reference["boxes"] * np.float32(1.001), "n": np.r_[0:7, 9]}
    accumulator = DriftAccumulator(signature, 8, np.zeros(8, dtype=np.int64))
    for start in (0, 4):
        part = slice(start, start + 4)
        scalar = {"s": np.float32(2)}
        accumulator.add(
            {**{k: v[part] for k, v in reference.items()}, **scalar}, {**{k: v[part] for k, v in candidate.items()}, **scalar}, 4
        )
    drift = accumulator.drift()
    assert drift.judged is None
    assert drift.agreement is None
    assert drift.top1 is None
    assert any("labels were not used" in note for note in drift.notes)
    assert drift.main is not None
    assert drift.main.name == "boxes"  # an error of indices or counts in dB says little
    assert next(o for o in drift.outputs if o.name == "n").max_abs == 2
    assert next(o for o in drift.outputs if o.name == "s").identical
    assert drift.main.sqnr_db == pytest.approx(60, abs=0.01)


def test_an_output_whose_size_depends_on_the_values_is_left_out_and_the_others_count() -> None:
    signature = Signature(
        (TensorSpec("x", "float32", ("batch", 3)),),
        (TensorSpec("boxes", "float32", ("batch", 4)), TensorSpec("chosen", "int64", ("found", 3))),
    )
    boxes = np.ones((2, 4), dtype=np.float32)
    accumulator = DriftAccumulator(signature, 4)
    for found in (6, 2):
        accumulator.add(
            {"boxes": boxes, "chosen": np.zeros((6, 3), dtype=np.int64)},
            {"boxes": boxes, "chosen": np.zeros((found, 3), dtype=np.int64)},
            2,
        )
    drift = accumulator.drift()
    assert [o.name for o in drift.outputs] == ["boxes"]
    assert any("'chosen' was not compared" in note for note in drift.notes)
    with pytest.raises(BackendFailed, match="shape"):  # the batch is no such size
        DriftAccumulator(signature, 2).add(
            {"boxes": boxes, "chosen": np.zeros((1, 3))}, {"boxes": boxes[:1], "chosen": np.zeros((1, 3))}, 2
        )


def test_a_batch_axis_that_is_second_is_followed() -> None:
    signature = Signature((TensorSpec("x", "float32", ("batch", 3)),), (TensorSpec("h", "float32", (2, "batch", 5)),))
    reference = np.random.default_rng(0).normal(size=(2, 3, 5))
    candidate = reference.copy()
    candidate[:, 2] += 1  # the filled-up sample
    accumulator = DriftAccumulator(signature, 2)
    accumulator.add({"h": reference}, {"h": candidate}, 2, 3)
    assert accumulator.drift().identical


def test_probabilities_are_not_softmaxed_again() -> None:
    rng = np.random.default_rng(0)
    p, q = (special.softmax(rng.normal(0, 2, (12, 10)), axis=1) for _ in range(2))
    drift = drift_of({"logits": p}, {"logits": q})
    assert drift.kl == pytest.approx(np.mean(stats.entropy(p, q, axis=1)))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 20), c=st.integers(2, 12), scale=st.floats(0.01, 60), seed=st.integers(0, 999))
def test_kl_is_scipys_and_never_negative(n: int, c: int, scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    r, q = rng.normal(0, scale, (n, c)), rng.normal(0, scale, (n, c))
    ours = kl_divergence(r, q)
    theirs = special.rel_entr(special.softmax(r, axis=1), special.softmax(q, axis=1)).sum(axis=1)
    assert (ours >= 0).all()
    finite = np.isfinite(theirs)  # softmax underflows to 0 where log-softmax does not
    np.testing.assert_allclose(ours[finite], np.maximum(theirs[finite], 0), rtol=1e-6, atol=1e-9)


def test_ties_go_to_the_lower_class_in_top1_and_top5_alike() -> None:
    scores = np.zeros((1, 8))
    assert [bool(in_top(scores, np.array([k]), 5)[0]) for k in range(8)] == [True] * 5 + [False] * 3


def test_five_classes_or_fewer_have_no_top5() -> None:
    logits = outputs(6)["logits"][:, :5]
    drift = drift_of({"logits": logits}, {"logits": logits}, np.zeros(6, dtype=np.int64))
    assert drift.top1 is not None
    assert drift.top5 is None


def test_json_and_outcomes_come_back_as_they_went(tmp_path: Path) -> None:
    reference = outputs(30)
    drift = drift_of(reference, noisy(reference, 2.0), np.random.default_rng(0).integers(0, 10, 30))
    doc = json.loads(json.dumps(drift.to_json(), allow_nan=False))
    drift.save_outcomes(tmp_path / "o.npz")
    again = Drift.from_json(doc).with_outcomes(tmp_path / "o.npz")
    assert again == drift
    assert again.row_figures() == drift.row_figures()
    for name in ("reference_correct", "candidate_correct", "reference_top5", "candidate_top5", "agree", "nonfinite_samples"):
        np.testing.assert_array_equal(getattr(again, name), getattr(drift, name))
    assert [p.name for p in tmp_path.iterdir()] == ["o.npz"]


def test_outcomes_of_another_measurement_or_damaged_ones_are_refused(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 10, 30)
    reference = outputs(30)
    drift = drift_of(reference, noisy(reference, 2.0), labels)
    other = drift_of(reference, noisy(reference, 9.0, seed=5), labels)
    other.save_outcomes(tmp_path / "o.npz")
    with pytest.raises(DataError, match="another measurement"):
        drift.with_outcomes(tmp_path / "o.npz")
    drift_of(outputs(20), outputs(20)).save_outcomes(tmp_path / "short.npz")
    with pytest.raises(DataError, match="another measurement"):
        drift.with_outcomes(tmp_path / "short.npz")
    (tmp_path / "o.npz").write_bytes(b"PK broken")
    with pytest.raises(DataError, match="cannot be read"):
        drift.with_outcomes(tmp_path / "o.npz")
    for doc in ({}, {**drift.to_json(), "outputs": [{"name": "x"}]}, {**drift.to_json(), "n": "many"}):
        with pytest.raises(DataError, match="no drift document"):
            Drift.from_json(doc)
