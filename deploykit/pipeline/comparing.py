"""Drift between two models or engines over the same samples."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from deploykit import children, data, preprocess
from deploykit.artifact import write_atomically
from deploykit.data.images import ImageReader
from deploykit.drift import Drift
from deploykit.errors import DeploykitError, InputError
from deploykit.pipeline.predicting import Runner, opened_as
from deploykit.pipeline.request import DataRequest, Narrator
from deploykit.pipeline.shares import class_names
from deploykit.signature import Feeds, Outputs, ShapeRange
from deploykit.stages import accuracy, layers
from deploykit.stages.layers import LayerDrift
from deploykit.stages.report import layers_page

BATCH = 8
LAYERS_TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class Comparison:
    """What the candidate changed."""

    reference: str
    candidate: str
    n: int
    drift: Drift
    layers: tuple[LayerDrift, ...] = ()
    layer_notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        doc = {"reference": self.reference, "candidate": self.candidate, "n": self.n, "drift": self.drift.to_json()}
        return {**doc, "layers": [layer.to_json() for layer in self.layers], "layer_notes": list(self.layer_notes)}

    def lines(self) -> list[str]:
        """The comparison in words."""
        return [f"{self.candidate} against {self.reference}, {self.n} samples", *self.drift.lines()]

    def layer_lines(self) -> list[str]:
        """Which layers cost most by themselves, and what else to know of the layers."""
        known = sorted((x for x in self.layers if x.own_sqnr_db is not None), key=lambda x: x.own_sqnr_db or 0.0)[:5]
        most = ", ".join(f"{x.layer} {x.own_sqnr_db:.1f} dB" for x in known)
        notes = [f"note: {note}" for note in self.layer_notes]
        return [f"quantized alone, these cost the output most: {most}", *notes] if known else notes

    def layer_rows(self) -> list[list[str]]:
        """layer, operator, SQNR of its result, SQNR of the model's output with it alone quantized, why; worst first."""
        return [
            [x.layer, x.op, _db(x.sqnr_db, x.identical), _db(x.own_sqnr_db, False), "; ".join(r.text for r in x.reasons)]
            for x in self.layers
        ]


def _db(value: float | None, identical: bool) -> str:
    return "same" if identical else "-" if value is None else f"{value:.1f}"


def compare(
    reference: Path,
    candidate: Path,
    request: DataRequest,
    shapes: Mapping[str, ShapeRange],
    narrator: Narrator,
    *,
    per_layer: bool = False,
    most_alone: int | None = layers.ALONE,
    page: Path | None = None,
) -> Comparison:
    """The candidate's drift from the reference, the same samples through both, batch by batch; with `per_layer` (both are
    .onnx graphs then) layer by layer too, `most_alone` of them quantized alone, plotted in the HTML file `page`.

    A model with a free batch runs at the other's fixed one; two with unlike fixed batches each take the samples in their own portions.
    Raises InputError for files and data that do not fit, BackendFailed where an engine fails.
    """
    graphs = [_graph(path) for path in (reference, candidate)] if per_layer else []
    if page is not None and not per_layer:
        raise InputError("--html plots the layers", "add --per-layer")
    assert request.data is not None
    narrator.step(f"compare {candidate.name} with {reference.name}")
    with contextlib.ExitStack() as stack:
        base, other = (stack.enter_context(runner) for runner in _runners(reference, candidate))
        own = preprocess.chosen(request.preprocess, base.facts.get("preprocess"))
        classes = class_names(request.classes) or base.facts.get("classes")
        samples = data.open(
            request.data,
            base.signature,
            preprocess=own,
            classes=tuple(classes) if classes else None,
            limit=request.limit,
            shapes=shapes,
        )
        notes: tuple[str, ...] = ()
        if not classes and samples.labels is not None and isinstance(samples.reader, ImageReader):
            notes = ("labels were not used: the order of the model's classes is not known (--classes gives it)",)
            samples = replace(samples, labels=None)
        batch = math.lcm(base.batch, other.batch)
        calls = [_in_portions(runner, batch) for runner in (base, other)]
        found = accuracy.measure(samples, calls[0], {"candidate": calls[1]}, batch=batch, notes=notes, progress=narrator.progress)
    drift = found["candidate"]
    if isinstance(drift, DeploykitError):
        raise drift
    if not per_layer:
        return Comparison(str(reference), str(candidate), len(samples), drift)
    narrator.step("layer by layer")
    where = children.run(
        "layers", layers.find, *graphs, samples, BATCH, None, most_alone, progress=narrator.progress, timeout_s=LAYERS_TIMEOUT_S
    )
    made = Comparison(str(reference), str(candidate), len(samples), drift, where.layers, where.notes)
    if page is not None:
        write_atomically(page, layers_page.text(made.to_json(), made.lines()).encode())
    return made


def _runners(reference: Path, candidate: Path) -> tuple[Runner, Runner]:
    """Both opened: at BATCH, or where one has a fixed batch and the other is free, at that."""
    base = Runner(reference, BATCH)
    try:
        other = Runner(candidate, base.batch)
    except BaseException:
        base.close()
        raise
    if base.batch != other.batch and base.signature.fixed_batch is None:
        base.close()
        try:
            base = Runner(reference, other.batch)
        except BaseException:
            other.close()
            raise
    return base, other


def _in_portions(runner: Runner, batch: int) -> accuracy.InferFn:
    """The runner's `infer` for `batch` samples at a time, a multiple of its own batch."""
    if runner.batch == batch:
        return runner.infer
    signature = runner.signature
    for spec in signature.outputs:
        if not spec.shape or spec.shape[0] != runner.batch:
            raise InputError(
                f"output {spec} of {runner.engine.path.name} does not start with its batch of {runner.batch}: its results cannot be put "
                "together",
                "compare models of the same batch",
            )

    def infer(feeds: Feeds) -> Outputs:
        parts = []
        for start in range(0, batch, runner.batch):
            piece = {}
            for spec in signature.inputs:
                axis, whole = signature.batch_axis(spec), feeds[spec.name]
                piece[spec.name] = whole if axis is None else whole.take(range(start, start + runner.batch), axis=axis)
            parts.append(runner.infer(piece))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    return infer


def _graph(path: Path) -> Path:
    """The .onnx file at `path`, or that of the engine there. Raises InputError for an engine of another format."""
    found = opened_as(path)[1].path
    if found.suffix != ".onnx":
        raise InputError(
            f"{path} is no .onnx graph, and layers are compared in graphs only",
            "give the .onnx file that the engine was built from",
        )
    return found
