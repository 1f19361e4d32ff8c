"""Drift between two models or engines over the same samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploykit import data, preprocess
from deploykit.drift import Drift
from deploykit.errors import DeploykitError, InputError
from deploykit.pipeline.predicting import Runner
from deploykit.pipeline.request import DataRequest, Narrator
from deploykit.preprocess import Preprocess
from deploykit.signature import ShapeRange
from deploykit.stages import accuracy

BATCH = 8


@dataclass(frozen=True)
class Comparison:
    """What the candidate changed."""

    reference: str
    candidate: str
    n: int
    drift: Drift
    layers: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        doc = {"reference": self.reference, "candidate": self.candidate, "n": self.n, "drift": self.drift.to_json()}
        return {**doc, "layers": [dict(layer) for layer in self.layers]}

    def lines(self) -> list[str]:
        """The comparison in words."""
        return [f"{self.candidate} against {self.reference}, {self.n} samples", *self.drift.lines()]

    def layer_rows(self) -> list[list[str]]:
        """tensor, SQNR, max abs, operator; worst first."""
        return [[str(x["tensor"]), f"{x['sqnr_db']:.1f}", f"{x['max_abs']:.3g}", str(x["op"])] for x in self.layers]


def compare(
    reference: Path,
    candidate: Path,
    request: DataRequest,
    shapes: Mapping[str, ShapeRange],
    narrator: Narrator,
    *,
    per_layer: bool = False,
) -> Comparison:
    """The candidate's drift from the reference, the same samples through both, batch by batch.

    Raises InputError for files and data that do not fit, BackendFailed where an engine fails.
    """
    if per_layer:
        raise InputError("--per-layer is not in this version of deploykit", "leave it out; the outputs are compared")
    assert request.data is not None
    narrator.step(f"compare {candidate.name} with {reference.name}")
    with Runner(reference, BATCH) as base, Runner(candidate, BATCH) as other:
        if base.batch != other.batch:
            raise InputError(
                f"{reference} runs at batch {base.batch} and {candidate} at batch {other.batch}",
                "compare models of the same batch",
            )
        own = Preprocess.from_json(base.facts["preprocess"]) if base.facts.get("preprocess") else None
        if request.preprocess not in (None, "timm"):
            own = preprocess.parse(request.preprocess)
        samples = data.open(request.data, base.signature, preprocess=own, limit=request.limit, shapes=shapes)
        found = accuracy.measure(samples, base.infer, {"candidate": other.infer}, batch=base.batch, progress=narrator.progress)
    drift = found["candidate"]
    if isinstance(drift, DeploykitError):
        raise drift
    return Comparison(str(reference), str(candidate), len(samples), drift)
