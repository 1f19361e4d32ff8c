"""The accuracy of a graph run on the CPU: for an engine that cannot run here a prediction, never a measurement of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from deploykit import backends, children, data, preprocess
from deploykit.artifact import Artifact
from deploykit.calibration_table import CalibrationTable
from deploykit.data.images import ImageReader
from deploykit.drift import Drift
from deploykit.errors import BackendFailed, DataError, DeploykitError
from deploykit.pipeline.request import DataRequest, Narrator
from deploykit.pipeline.shares import class_names, trained_on
from deploykit.pipeline.single import ModelFile
from deploykit.pipeline.workshop import STAGE_TIMEOUT_S
from deploykit.samples import Samples
from deploykit.session import OpenRequest
from deploykit.signature import ShapeRange
from deploykit.stages import accuracy

DEFAULT_N = 256
_BATCH = 8
_RUNNER = "onnxruntime"


@dataclass(frozen=True)
class Shares:
    """What calibrates and corrects, and what judges; they share no sample. Where nothing judges, `why` says so. `notes`: what is
    doubtful about the judging."""

    calibrate: Samples | None = None
    judge: Samples | None = None
    why: str = ""
    notes: tuple[str, ...] = ()


def shares(
    model: ModelFile,
    request: DataRequest,
    shapes: Mapping[str, ShapeRange],
    table: CalibrationTable | None,
    judge_n: int,
) -> Shares:
    """The shares of DATA, at most `judge_n` samples judging (0: none). Where a `table` was given, samples that it is known to
    be calibrated on do not judge. Raises DataError for data that cannot be read."""
    if request.data is None:
        return Shares(why="no samples were given")
    classes = class_names(request.classes) or model.classes
    own = preprocess.chosen(request.preprocess, model.artifact.facts.get("preprocess"))
    everything = data.open(
        request.data, model.artifact.signature, preprocess=own, classes=classes, limit=request.limit, shapes=shapes
    )
    if judge_n == 0:
        return Shares(data.calibration_share(everything, request.calib_n), why="it was not asked for (--predict 0)")
    notes: tuple[str, ...] = ()
    if classes is None and everything.labels is not None and isinstance(everything.reader, ImageReader):
        everything = replace(everything, labels=None)
        notes = ("no top-1: nothing says in which order the model's classes are; --classes FILE does",)
    spec = model.artifact.options.get("spec") or {}
    trained = trained_on(str(spec.get("weights") or "none"), everything)
    try:
        calibrate, judge, more = _shared(everything, request, table, trained)
    except DataError as exc:
        return Shares(data.calibration_share(everything, request.calib_n), why=exc.message)
    return Shares(calibrate, judge.take(range(min(judge_n, len(judge))), "judge"), notes=(*notes, *more))


def _shared(
    everything: Samples, request: DataRequest, table: CalibrationTable | None, trained: tuple[int, ...]
) -> tuple[Samples, Samples, tuple[str, ...]]:
    """(what calibrates, what judges, notes). Raises DataError where nothing is left to judge."""
    calibrate, judge = data.split(everything, calib_n=request.calib_n, exclude=trained)
    if table is None:
        return calibrate, judge, ()
    if table.n:
        for seen in (data.calibration_share(everything, table.n), data.split(everything, calib_n=table.n, exclude=trained)[0]):
            if seen.digest == table.samples_digest:
                return seen, data.held_out(everything, exclude={*seen.indices, *trained}), ()
    return calibrate, judge, ("the ranges were found elsewhere: whether on samples that judge here is not known",)


def of(
    graph: Artifact,
    reference: Artifact | None,
    samples: Shares,
    shapes: Mapping[str, ShapeRange],
    narrator: Narrator,
) -> dict[str, Any]:
    """The prediction for engines of a graph, as their manifests hold it.

    'in_words', the row's figures (top1, top1_drop_pp, agreement, sqnr_db, ...; None where there is nothing to say), 'samples', 'on'
    and 'notes'; or 'why_not' with the 'remedy'. `reference`: the float model, None where the graph was quantized elsewhere: then
    there is top-1 alone, and that only with labels.
    """
    remedy = "add --data DATA: labelled samples give top-1, others agreement and SQNR"
    if samples.judge is None:
        return none(samples.why, remedy if not samples.calibrate else "give more data")
    absent = backends.get(_RUNNER).missing()
    if absent is not None:
        return none(absent.why, absent.remedy)
    if reference is None and samples.judge.labels is None:
        why = "the model was quantized already, so its float form is not known, and the samples have no labels"
        return none(why, f"give labelled samples, or: deploykit compare FLOAT.onnx {graph.path.name} --data DATA")
    narrator.step(f"predict on the CPU: the {graph.precision} graph on {len(samples.judge)} samples")
    try:
        drift = children.run(
            "prediction",
            judged,
            graph,
            reference,
            samples.judge,
            dict(shapes),
            timeout_s=STAGE_TIMEOUT_S,
            progress=narrator.progress,
        )
    except DeploykitError as exc:  # an engine that builds is not given up because its graph does not run here
        return none(exc.message, exc.remedy)
    return _told(drift, samples)


def _told(drift: Drift, samples: Shares) -> dict[str, Any]:
    assert samples.judge is not None
    version = ", ".join(f"{name} {number}" for name, number in backends.get(_RUNNER).versions().items())
    figures, words = drift.row_figures(), drift.in_words()
    if drift.own:  # against itself it agrees with everything
        figures = {name: value if name in ("top1", "top5") else None for name, value in figures.items()}
        words = f"top-1 {100 * (drift.top1 or 0.0):.2f} %, no float model to compare with"
    return {
        **figures,
        "in_words": words,
        "n": drift.n,
        "on": f"cpu: {version}, Q/DQ run as written",
        "samples": samples.judge.describe(),
        "notes": [*samples.notes, *drift.notes],
    }


def none(why: str, remedy: str | None) -> dict[str, Any]:
    """No prediction, and why, as a manifest holds it."""
    return {"why_not": why, "remedy": remedy}


def line(found: Mapping[str, Any], target: str) -> str:
    """A prediction in one line."""
    if "why_not" in found:
        return f"accuracy not predicted: {found['why_not']}" + (f"; {found['remedy']}" if found.get("remedy") else "")
    share = found["samples"]
    notes = "".join(f"; {note}" for note in found["notes"])
    return (
        f"predicted on the CPU, not measured on {target}: {found['in_words']}; {found['n']} samples of {share['data']} that did not "
        f"calibrate{notes}"
    )


def judged(graph: Artifact, reference: Artifact | None, judge: Samples, shapes: Mapping[str, ShapeRange]) -> Drift:
    """The drift of a graph from the float model (or, without one, from itself), Q/DQ run as written; runs in a child process.

    A graph that fails at a batch of 8 is judged one sample at a time.
    """
    batch = graph.signature.fixed_batch or _BATCH
    try:
        return _judged_at(batch, graph, reference, judge, shapes)
    except BackendFailed:
        if batch == 1 or graph.signature.fixed_batch is not None:
            raise
        return _judged_at(1, graph, reference, judge, shapes)


def _judged_at(
    batch: int, graph: Artifact, reference: Artifact | None, judge: Samples, shapes: Mapping[str, ShapeRange]
) -> Drift:
    backend = backends.get(_RUNNER)
    threads = children.available_threads()

    def opened(which: Artifact) -> accuracy.InferFn:
        return backend.open(which, OpenRequest("fp32", batch, threads, shapes, {"literal_qdq": True})).infer

    if reference is None:
        found = accuracy.measure(judge, opened(graph), {}, batch=batch)[accuracy.REFERENCE]
    else:
        found = accuracy.measure(judge, opened(reference), {"graph": opened(graph)}, batch=batch)["graph"]
    if isinstance(found, DeploykitError):
        raise found
    return found
