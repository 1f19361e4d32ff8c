"""At which batch accuracy is measured: an engine that was not built for the others' batch is judged at its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploykit import data
from deploykit.artifact import Artifact
from deploykit.drift import Drift
from deploykit.drift_accumulator import DriftAccumulator
from deploykit.errors import BackendFailed, InputError
from deploykit.pipeline import measuring
from deploykit.pipeline.measuring import Entry
from deploykit.pipeline.plan import PlannedRow
from deploykit.pipeline.request import RowsRequest, Silent
from deploykit.signature import Signature, TensorSpec

SIGNATURE = Signature((TensorSpec("x", "float32", ("N", 3)),), (TensorSpec("y", "float32", ("N", 4)),))


def _entry(backend: str, *, reference: bool = False) -> Entry:
    return Entry(PlannedRow("net", backend, "fp32", "cpu", 1, reference), Artifact(Path(), "x", "fp32", SIGNATURE, "engine"), {})


def _drift() -> Drift:
    found = DriftAccumulator(SIGNATURE, 2, None, samples="")
    outputs = {"y": np.ones((2, 4), np.float32)}
    found.add(outputs, outputs, 2, 2)
    return found.drift(())


@pytest.mark.parametrize("error", [InputError("built for batch 1"), BackendFailed("broken")])
def test_an_engine_that_refuses_the_batch_is_judged_at_its_own(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, list[str], tuple[str, ...]]] = []

    def at(batch: int, reference: Entry, engines: Sequence[Entry], *rest: Any) -> dict[str, Any]:
        asked.append((batch, [e.row.backend for e in engines], rest[-1]))
        return {
            measuring.engine_id(e.row): error if e.row.backend == "fixed" and batch != 1 else _drift()
            for e in (reference, *engines)
        }

    monkeypatch.setattr(measuring, "_accuracy_at", at)
    entries = [_entry("torch", reference=True), _entry("free"), _entry("fixed")]
    judge = data.open("random:70", SIGNATURE)
    found = measuring._accuracy(entries, judge, RowsRequest(), 1, Silent())
    if isinstance(error, BackendFailed):
        assert len(asked) == 1 and found["net fixed fp32"] is error
        return
    assert [a[0] for a in asked] == [8, 1]
    assert asked[1][1:] == (["fixed"], ("judged at batch 1: the engine was not built for batch 8",))
    assert all(isinstance(d, Drift) for d in found.values()) and len(found) == 3


def test_a_reference_that_was_not_built_for_the_batch_is_judged_at_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def at(batch: int, reference: Entry, *rest: Any) -> dict[str, Any]:
        if batch != 1:
            raise InputError("built for batch 1")
        return {measuring.engine_id(reference.row): _drift()}

    monkeypatch.setattr(measuring, "_accuracy_at", at)
    judge = data.open("random:70", SIGNATURE)
    assert list(measuring._accuracy([_entry("tvm", reference=True)], judge, RowsRequest(), 1, Silent())) == ["net tvm fp32"]
