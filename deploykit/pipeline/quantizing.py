"""Precision written into the graph of an .onnx file: what `quantize` does."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from deploykit import artifact as artifacts
from deploykit import children, data
from deploykit.artifact import Artifact
from deploykit.calibration_table import CalibrationTable
from deploykit.data.images import ImageReader
from deploykit.errors import InputError, UnknownName
from deploykit.pipeline import int8
from deploykit.pipeline.delivered import deliver, scratch_beside
from deploykit.pipeline.int8 import Int8Recipe
from deploykit.pipeline.request import DataRequest, Int8Request, Narrator
from deploykit.pipeline.single import ModelFile, make_table, needs_suffix, open_data, open_model, table_and_recipe
from deploykit.pipeline.workshop import STAGE_TIMEOUT_S
from deploykit.samples import Samples
from deploykit.signature import ShapeRange
from deploykit.stages.mixed import Budget

_FLOAT_PARTS = (
    "what is not INT8 stays in FP32; from the float model, deploykit build-trt MODEL --int8 --calib FILE writes it in FP16, which "
    "TensorRT runs faster"
)
_HALF_PARTS = "what is not INT8 is in FP16, inputs and outputs in FP32: build it with deploykit build-trt GRAPH --int8"
MODES = ("static", "dynamic", "fp16", "mixed")
LAYOUTS = ("cpu", "tensorrt")


def quantize_file(
    path: Path, mode: str, layout: str, out: Path, request: DataRequest, narrator: Narrator, shapes: Mapping[str, ShapeRange]
) -> Artifact:
    """The model with precision written into the graph, at `out`."""
    if mode not in MODES:
        raise UnknownName("mode", mode, MODES)
    if layout not in LAYOUTS:
        raise UnknownName("layout", layout, LAYOUTS)
    needs_suffix(out, ".onnx")
    if out.resolve() == path.resolve():
        raise InputError(f"-o {out} is the model itself, which would be lost", f"example: -o {out.stem}-{mode}.onnx")
    model = open_model(path)
    if not request.int8.equalize:
        return _quantize_file(model, path, mode, layout, out, request, narrator, shapes)
    samples = _to_equalize(model, mode, request, shapes)
    narrator.step(f"equalize {path.name} on {len(samples)} samples")
    with scratch_beside(out) as folder:
        level = folder / "equalized.onnx"
        facts = children.run("equalize", _equalize, path, samples, level, timeout_s=STAGE_TIMEOUT_S, progress=narrator.progress)
        given_facts = {**model.artifact.facts, "equalized": facts}
        levelled = replace(model, digest=open_model(level).digest, artifact=replace(model.artifact, facts=given_facts))
        return _quantize_file(levelled, level, mode, layout, out, request, narrator, shapes)


def _to_equalize(model: ModelFile, mode: str, request: DataRequest, shapes: Mapping[str, ShapeRange]) -> Samples:
    """The samples that --equalize looks at: those that calibrate. Raises InputError where it makes no sense."""
    from deploykit.pipeline import mixed

    if mode not in ("static", "mixed"):
        raise InputError(f"--equalize goes with INT8 from calibration, not with --mode {mode}", "leave --equalize out")
    if request.calib_table is not None:
        raise InputError(
            "--equalize changes the ranges, so a table of the model as it is (--calib) does not fit", "leave one out"
        )
    if request.data is None:
        raise InputError("--equalize needs calibration samples, and there are none", "add --data DATA")
    everything = open_data(model, request.data, request, shapes)
    if mode == "static":
        return data.calibration_share(everything, request.calib_n)
    return mixed.tuning_share(data.split(everything, calib_n=request.calib_n + mixed.TUNE_N)[0])[0]


def _equalize(path: Path, samples: Samples, out: Path) -> dict[str, Any]:
    """What equalizing has done; the model lies at `out`; runs in a child process."""
    from deploykit.stages import precision

    return dict(precision.equalize(path, samples, out).facts)


def _quantize_file(
    model: ModelFile,
    path: Path,
    mode: str,
    layout: str,
    out: Path,
    request: DataRequest,
    narrator: Narrator,
    shapes: Mapping[str, ShapeRange],
) -> Artifact:
    """`quantize_file` of a model that was read: `path` has its graph, the model at hand or that one equalized."""
    if mode == "mixed":
        return _mixed_file(model, path, layout, out, request, narrator, shapes)
    if request.budget is not None:
        raise InputError(f"a budget goes with --mode mixed, not with {mode}", "add --mode mixed")
    table, recipe = _ranges_for(model, path, mode, request, narrator, shapes)
    narrator.step(f"quantize {path.name} {mode}")
    with scratch_beside(out) as folder:
        made: Artifact = children.run(
            "quantize",
            _quantize,
            path,
            mode,
            layout,
            table,
            recipe,
            folder / out.name,
            timeout_s=STAGE_TIMEOUT_S,
            progress=narrator.progress,
        )
        if (mode, layout) == ("static", "tensorrt"):
            made = int8.noted(made, _FLOAT_PARTS)
        kept = {k: v for k, v in model.artifact.facts.items() if k in ("preprocess", "classes", "equalized")}
        made = replace(
            made,
            parent=model.artifact.sha256,
            facts={**kept, **made.facts},
            options={"mode": mode, "layout": layout, **made.options, "equalize": request.int8.equalize},
        )
        return deliver(made, out)


def _ranges_for(
    model: ModelFile, path: Path, mode: str, request: DataRequest, narrator: Narrator, shapes: Mapping[str, ShapeRange]
) -> tuple[CalibrationTable | None, Int8Recipe]:
    """The calibration table, and how INT8 is to be made: for 'static' both; for 'fp16' a table where --calib or --data says how
    large values get, for 'dynamic' none. Raises InputError for options that would not be used."""
    if mode == "static":
        return table_and_recipe(model, path, request, narrator, shapes)
    if request.int8 != Int8Request():
        raise InputError(
            "--bias-correct, --scale-correct, --rounding, --weight-scales and --reduce-range are for INT8 from calibration, "
            f"not for --mode {mode}",
            "leave them out",
        )
    if request.calib_table is None and request.data is None:
        return None, Int8Recipe()
    if mode == "dynamic":
        raise InputError(
            "dynamic INT8 finds its ranges while the model runs: --calib and --data would not be used", "leave them out"
        )
    chosen = None
    if request.calib_table is None and request.data is not None:
        chosen = data.calibration_share(open_data(model, request.data, request, shapes), request.calib_n)
    return make_table(model, path, replace(request, method="minmax"), chosen, narrator), Int8Recipe()  # extremes are all it reads


def _mixed_file(
    model: ModelFile,
    path: Path,
    layout: str,
    out: Path,
    request: DataRequest,
    narrator: Narrator,
    shapes: Mapping[str, ShapeRange],
) -> Artifact:
    """The mixed graph for the budget at `out`; whatever is best so far lies there already while the search goes on."""
    from deploykit.pipeline import mixed
    from deploykit.pipeline.mixed_trials import Task

    budget = request.budget or Budget()  # which raises: there is none
    if request.data is None:
        raise InputError("mixed precision needs samples to calibrate and to tune on", "add --data DATA")
    children.run("read", _require_float, path)
    everything = open_data(model, request.data, request, shapes)
    _require_labels(budget, everything, known=bool(request.classes or model.classes))
    calibration, judge = data.split(everything, calib_n=request.calib_n + mixed.TUNE_N)
    calibrate, tune = mixed.tuning_share(calibration)
    recipe = Int8Recipe(request.int8, calibrate)
    table = make_table(model, path, request, calibrate, narrator)
    task = Task(path, layout, table, recipe, budget, tune, judge)
    kept = {k: v for k, v in model.artifact.facts.items() if k in ("preprocess", "classes", "equalized")}

    def finished(made: Artifact) -> Artifact:
        options = {
            "mode": "mixed",
            "layout": layout,
            "budget": budget.in_words(),
            **made.options,
            "equalize": request.int8.equalize,
        }
        if layout == "tensorrt":
            made = int8.noted(made, _HALF_PARTS)
        return replace(made, parent=model.artifact.sha256, facts={**kept, **made.facts}, options=options)

    with scratch_beside(out) as folder:

        def better(made: Artifact) -> None:
            copy = folder / "best"
            shutil.rmtree(copy, ignore_errors=True)
            copy.mkdir()
            for name in [made.path.name, *made.companions]:
                shutil.copyfile(made.path.parent / name, copy / name)
            deliver(finished(replace(made, path=copy / out.name)), out)

        made = mixed.find(task, folder, out.with_name(out.name + ".search.json"), narrator, better, name=out.name)
        better(made)
        return artifacts.load(out)


def _require_labels(budget: Budget, samples: Samples, *, known: bool) -> None:
    """Raises InputError, before anything is spent, for a drop in top-1 that these samples cannot show: without labels, or with
    labels that are the sub-folders of a data set whose order in the model's output nothing says."""
    if budget.max_drop_pp is None:
        return
    if samples.labels is None:
        raise InputError(
            f"--max-drop needs labels, and {samples.spec} has none",
            "give labelled data, or --min-agreement 0.99, or --min-sqnr 25",
        )
    if not known and isinstance(samples.reader, ImageReader):
        raise InputError(
            f"{samples.spec} has a sub-folder a class, and nothing says in which order the model's outputs are",
            "add --classes FILE, one class name a line in the model's order, or give --min-agreement or --min-sqnr",
        )


def _require_float(path: Path) -> None:
    """Raises ModelError for a model that is quantized already; runs in a child process."""
    from deploykit import graph, observation

    observation.require_float(graph.load(path), path)


def _quantize(path: Path, mode: str, layout: str, table: CalibrationTable | None, recipe: Int8Recipe, out: Path) -> Artifact:
    from deploykit.stages import precision

    if mode == "fp16":
        return precision.to_fp16(path, out, table)
    if mode == "dynamic":
        return precision.to_int8_dynamic(path, out)
    assert table is not None
    return int8.write(path, table, layout, "fp32", recipe, (), out)
