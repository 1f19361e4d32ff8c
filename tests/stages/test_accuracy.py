"""accuracy: lock-step through real sessions; one candidate's failure is its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import tiny_models

from deploykit import data
from deploykit.drift import Drift
from deploykit.errors import BackendFailed, DataError, ModelError
from deploykit.samples import Samples
from deploykit.signature import Feeds, Outputs, Signature, TensorSpec
from deploykit.stages import accuracy

SIGNATURE = Signature((TensorSpec("x", "float32", ("batch", 1, 8, 8)),), (TensorSpec("logits", "float32", ("batch", 10)),))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> accuracy.InferFn:
    path = tiny_models.conv_net(tmp_path_factory.mktemp("m") / "m.onnx", classes=10, channels=1)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda feeds: {"logits": session.run(None, dict(feeds))[0]}


@pytest.fixture(scope="module")
def samples() -> Samples:
    return data.open("digits", SIGNATURE, limit=101)


def changed(infer: accuracy.InferFn, change: Callable[[np.ndarray], np.ndarray]) -> accuracy.InferFn:
    return lambda feeds: {"logits": change(infer(feeds)["logits"])}


def test_every_candidate_sees_the_references_batches(samples: Samples, reference: accuracy.InferFn) -> None:
    seen: dict[str, list[Feeds]] = {"r": [], "a": [], "b": []}

    def spy(name: str) -> accuracy.InferFn:
        def infer(feeds: Feeds) -> Outputs:
            seen[name].append(feeds)
            return reference(feeds)

        return infer

    progress: list[float] = []
    drifts = accuracy.measure(
        samples, spy("r"), {"a": spy("a"), "b": spy("b")}, batch=16, progress=lambda what, share: progress.append(share)
    )
    assert [len(f["x"]) for f in seen["r"]] == [16] * 7
    assert all(x is y is z for x, y, z in zip(*seen.values(), strict=True))
    assert progress[-1] == 1.0
    assert progress == sorted(progress)
    for drift in drifts.values():
        assert isinstance(drift, Drift)
        assert drift.identical
        assert drift.agreement == 1.0
        assert drift.n == 101
        assert drift.samples == samples.digest


def test_the_figures_are_those_of_all_samples_at_once(samples: Samples, reference: accuracy.InferFn) -> None:
    candidate = changed(reference, lambda x: np.round(x, 1))
    drifts = accuracy.measure(samples, reference, {"rounded": candidate}, batch=7)
    feeds, _ = next(samples.batches(101))
    expected, got = reference(feeds)["logits"].argmax(1), candidate(feeds)["logits"].argmax(1)
    own, drift = drifts[accuracy.REFERENCE], drifts["rounded"]
    assert isinstance(own, Drift)
    assert isinstance(drift, Drift)
    assert own.own
    assert own.top1 == pytest.approx(np.mean(expected == samples.labels))
    assert own.row_figures()["top1_drop_pp"] is None
    assert drift.top1 == pytest.approx(np.mean(got == samples.labels))
    assert drift.agreement == pytest.approx(np.mean(got == expected))
    assert drift.sqnr_db is not None
    assert drift.sqnr_db > 20


def test_a_candidate_that_fails_leaves_the_others_going(samples: Samples, reference: accuracy.InferFn) -> None:
    calls = 0

    def breaks(feeds: Feeds) -> Outputs:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise BackendFailed("out of memory")
        return reference(feeds)

    candidates = {"breaks": breaks, "short": changed(reference, lambda x: x[:, :4]), "good": reference}
    drifts = accuracy.measure(samples, reference, candidates, batch=16)
    assert list(drifts) == [accuracy.REFERENCE, "breaks", "short", "good"]
    assert str(drifts["breaks"]) == "out of memory"
    assert calls == 3
    assert isinstance(drifts["short"], BackendFailed)
    assert isinstance(drifts["good"], Drift)


def test_a_reference_that_fails_is_raised(samples: Samples, reference: accuracy.InferFn) -> None:
    def breaks(feeds: Feeds) -> Outputs:
        raise BackendFailed("gone")

    with pytest.raises(BackendFailed, match="gone"):
        accuracy.measure(samples, breaks, {"good": reference}, batch=16)
    with pytest.raises(ModelError, match="reference itself gives NaN"):
        accuracy.measure(samples, changed(reference, lambda x: x * np.nan), {"good": reference}, batch=16)


def test_nothing_to_judge_with_is_an_error(samples: Samples, reference: accuracy.InferFn) -> None:
    with pytest.raises(DataError, match="no samples"):
        accuracy.measure(samples.take([], "judge"), reference, {}, batch=16)


def test_labels_the_model_has_no_class_for_are_refused(samples: Samples, reference: accuracy.InferFn) -> None:
    with pytest.raises(DataError, match="outside the model's 4 classes"):
        accuracy.measure(samples, changed(reference, lambda x: x[:, :4]), {}, batch=16)


def test_doubts_about_the_judging_are_noted(samples: Samples, reference: accuracy.InferFn) -> None:
    fewer = replace(samples, classes=("zero", "one"))
    own = accuracy.measure(fewer, reference, {}, batch=16)[accuracy.REFERENCE]
    assert isinstance(own, Drift)
    assert any("the data names 2 classes, the model has 10" in note for note in own.notes)
    random = data.open("random:5", SIGNATURE)
    own = accuracy.measure(random, reference, {}, batch=2)[accuracy.REFERENCE]
    assert isinstance(own, Drift)
    assert any("random" in note for note in own.notes)
