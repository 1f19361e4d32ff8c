"""Which samples judge, calibrate and tune: disjoint shares of the data, made ready for a target."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deploykit import backends, data, preprocess
from deploykit.data.images import ImageReader
from deploykit.errors import InputError
from deploykit.pipeline import mixed
from deploykit.pipeline.request import DataRequest, RowsRequest
from deploykit.pipeline.target import Target
from deploykit.preprocess import Preprocess
from deploykit.samples import Samples
from deploykit.signature import ShapeRange, Signature
from deploykit.stages.mixed import Budget

_CALIBRATED = ("int8-cpu", "int8-tensorrt", "int8-dynamic", "mixed", "source-calibrated")


@dataclass(frozen=True)
class Shares:
    """Which samples judge and which calibrate; None where no data was given."""

    judge: Samples | None = None
    calibrate: Samples | None = None
    tune: Samples | None = None  # of a mixed row's search


def samples_for(model: Target, request: DataRequest, rows: RowsRequest) -> Shares:
    """The two disjoint shares of the data, made ready for the model."""
    if request.data is None and request.calib_data is None:
        return Shares()
    classes, own = _classes(model, request.classes), _preprocess(model, request.preprocess)

    def opened(spec: str, *, judges: bool) -> Samples:
        found = data.open(spec, model.signature, preprocess=own, classes=classes, limit=request.limit, shapes=rows.shapes)
        if judges and classes is None:
            _needs_class_order(model, found)
        return found

    calib = opened(request.calib_data, judges=False) if request.calib_data is not None else None
    if request.data is None:
        return Shares(None, calib)
    everything = opened(request.data, judges=True)
    if calib is None and (not calibrates(model) or len(everything) == 1):
        held_out = data.held_out(everything, exclude=_trained_on(model, everything))
        return Shares(held_out, None)
    searches = _searches(model)
    wanted = request.calib_n + (mixed.TUNE_N if searches else 0)
    calibrate, judge = data.split(everything, calib=calib, calib_n=wanted, exclude=_trained_on(model, everything))
    if not searches:
        return Shares(judge, calibrate)
    return Shares(judge, *mixed.tuning_share(calibrate))


def calibrates(model: Target) -> bool:
    """Whether a row to come needs calibration samples."""
    return any(not row.skip and backends.get(row.backend).graph(row.precision) in _CALIBRATED for row in model.rows)


def _searches(model: Target) -> bool:
    """Whether a row to come is mixed precision on a budget, which samples of its own tune."""
    return any(not row.skip and backends.get(row.backend).graph(row.precision) == "mixed" for row in model.rows)


def aim_of(model: Target, samples: Shares, request: DataRequest) -> mixed.Aim | None:
    """What a mixed row is to keep; None without such a row. Raises InputError where nothing says it, or nothing can tune it."""
    if not _searches(model):
        return None
    budget = request.budget or Budget()  # which raises: there is none
    if samples.tune is None:
        raise InputError("mixed precision needs samples to calibrate and to tune on", "add --data DATA")
    return mixed.Aim(budget, samples.tune)


def _needs_class_order(model: Target, samples: Samples) -> None:
    """Raises InputError for class folders and a graph that names no classes: the order of its outputs is never guessed."""
    bare = model.shop is None or model.shop.spec.kind == "onnx"
    if bare and samples.labels is not None and isinstance(samples.reader, ImageReader):
        names = samples.classes or ()
        shown = ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")
        raise InputError(
            f"{samples.spec} has a sub-folder a class ({shown}), and nothing says in which order the model's outputs are",
            f"add --classes FILE, one class name a line in the model's order; where that is the alphabetical one: "
            f"ls {samples.spec} > classes.txt",
        )


def _preprocess(model: Target, text: str | None) -> Preprocess | None:
    return preprocess.chosen(text, model.shop.model.facts.get("preprocess") if model.shop is not None else None)


def _classes(model: Target, file: Path | None) -> tuple[str, ...] | None:
    if file is not None:
        return class_names(file)
    known = model.shop.model.facts.get("classes") if model.shop is not None else None
    return tuple(known) if known else None


def class_names(file: Path | None) -> tuple[str, ...] | None:
    """The class names in a file, one a line in the model's order; None where no file is named. Raises InputError for one that
    cannot be read."""
    if file is None:
        return None
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise InputError(f"cannot read the class names in {file}: {exc}", "one class name a line, in the model's order") from exc
    return tuple(line.strip() for line in lines if line.strip())


def _trained_on(model: Target, samples: Samples) -> tuple[int, ...]:
    return trained_on(model.shop.spec.weights if model.shop is not None else "none", samples)


def trained_on(weights: str, samples: Samples) -> tuple[int, ...]:
    """Indices of the samples that a checkpoint was trained on, where its manifest says so."""
    side = Path(weights + ".manifest.json")
    if not side.is_file():
        return ()
    try:
        doc = json.loads(side.read_text())["trained_on"]
        return tuple(int(i) for i in doc["indices"]) if doc["content"] == samples.content else ()
    except (ValueError, KeyError, TypeError) as exc:
        raise InputError(
            f"{side} does not say what the weights were trained on ({exc!r})", "train again, or remove the file"
        ) from exc


def shapes_of(signature: Signature, judge: Samples | None, rows: RowsRequest) -> Mapping[str, ShapeRange]:
    """Ranges of the axes beside the batch: the ones given, else the data's own shapes."""
    found = dict(rows.shapes)
    for name in found:
        signature.input(name)
    open_inputs = [s for s in signature.inputs if signature.free_axes(s) and s.name not in found]
    if open_inputs and judge is not None and len(judge):
        feeds = judge.reader.read([judge.indices[0]])
        for spec in open_inputs:
            shape = tuple(feeds[spec.name].shape)
            found[spec.name] = ShapeRange(shape, shape, shape)
    return found
