"""The stages as commands: export, check, calibrate, quantize, finetune."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deploykit.cli import options as o
from deploykit.cli import parsing
from deploykit.cli.options import add
from deploykit.cli.printing import say, show_json, show_rows
from deploykit.cli.terminal import Bar
from deploykit.errors import EXIT_FAILED, EXIT_PASSED, InputError

if TYPE_CHECKING:
    pass

OutFile = Annotated[Path, typer.Option("-o", "--out", help="The file to write; its manifest lies beside it.")]


def register(app: typer.Typer) -> None:
    """Adds the commands to the application."""
    add(app, "export", export, "ONNX with a proven dynamic batch axis.")
    add(app, "check", check, "What is wrong with a graph, and the remedy.")
    add(app, "calibrate", calibrate, "Ranges of every tensor, with a fingerprint.")
    add(app, "quantize", quantize, "Precision written into the graph.")
    add(app, "finetune", finetune, "Train a model on a share of the data.")


def export(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="resnet18, timm:NAME, path/to/file.py:factory, an .onnx file or a .pt2.")
    ],
    out: OutFile,
    batch: o.Batch = "1,8,32",
    opset: o.Opset = None,
    inputs: o.Inputs = None,
    weights: o.Weights = None,
    num_classes: o.NumClasses = None,
    outputs: o.OutputsCut = None,
) -> int:
    """ONNX with a dynamic batch axis, proven against the source's own outputs.

    Example:  deploykit export resnet18 --weights none -o resnet18.onnx
    """
    from deploykit.pipeline import single
    from deploykit.pipeline.request import SourceRequest

    request = SourceRequest(
        source, weights, parsing.positive(num_classes, "--num-classes"), parsing.inputs(inputs), opset, parsing.names(outputs)
    )
    with Bar() as bar:
        made = single.export_file(request, out, parsing.batches(batch), bar)
    say(f"{out}: {', '.join(map(str, made.signature.inputs))} -> {', '.join(map(str, made.signature.outputs))}")
    for line in single.proof_lines(made):
        say(line)
    return EXIT_PASSED


def check(
    model: o.Model,
    target: Annotated[
        str | None, typer.Option("--target", help="Backends to check for: tensorrt, tensorrt-rtx, onnxruntime, openvino.")
    ] = None,
    json_file: o.JsonFile = None,
    repair: Annotated[
        Path | None,
        typer.Option("--repair", help="Mend what can be mended without changing what the model computes, into this .onnx file."),
    ] = None,
) -> int:
    """The graph's findings, each with the node and the remedy; exit code 1 on an error-level one. With --repair, the findings
    that are left.

    Example:  deploykit check model.onnx --target tensorrt
              deploykit check quantized-elsewhere.onnx --target tensorrt --repair repaired.onnx
    """
    from deploykit.pipeline import single

    repairs: tuple[str, ...] = ()
    with Bar() as bar:
        if repair is not None:
            repairs = single.repair_file(model, repair, bar)
            model = repair if repairs else model
        found = single.check_file(model, parsing.names(target) or (), bar)
    if json_file is not None:
        told = {"repairs": list(repairs)} if repair is not None else {}
        show_json({"findings": [f.to_json() for f in found.findings], "summary": dict(found.summary), **told}, json_file)
    if json_file != "-":
        for line in repairs:
            say(f"repaired: {line}")
        if repair is not None and not repairs:
            say(f"nothing could be repaired, and {repair} was not written")
        say(single.summary_line(model, found))
        if found.findings:
            rows = [[f.code, f.severity, f.target, f.node, f"{f.message} -> {f.remedy}"] for f in found.findings]
            show_rows("", ["code", "severity", "target", "node", "what was found -> what to do"], rows, wrap=(4,))
        else:
            say("no findings")
    return EXIT_FAILED if any(f.severity == "error" for f in found.findings) else EXIT_PASSED


def calibrate(
    model: o.Model,
    out: OutFile,
    data: o.Data = None,
    n: o.CalibN = 512,
    method: o.Method = o.DEFAULT_METHOD,
    trt_cache: Annotated[Path | None, typer.Option("--trt-cache", help="Write TensorRT's text cache too.")] = None,
    trt_version: Annotated[
        str | None,
        typer.Option(
            "--trt-version",
            help="The TensorRT that will read it, e.g. 8.6.1: it calibrates anew on another version's header. Default: 10.14.1.",
        ),
    ] = None,
    ort_table: Annotated[
        Path | None, typer.Option("--ort-table", help="Write the table of ONNX Runtime's TensorRT provider too (flatbuffers).")
    ] = None,
    preprocess: o.Preprocess = None,
    limit: o.Limit = None,
    shapes: o.Shapes = None,
    recalibrate: o.Recalibrate = False,
) -> int:
    """The calibration cache: ranges per tensor, with the fingerprint of what they were made from.

    Example:  deploykit calibrate model.onnx --data images/ -n 256 --method entropy -o calib.json --trt-cache calib.cache
    """
    from deploykit.pipeline import single
    from deploykit.pipeline.request import DataRequest

    parsing.positive(n, "-n")
    request = DataRequest(data, None, preprocess, None, limit, n, method, None, recalibrate)
    caches = single.CacheFiles(trt_cache, trt_version, ort_table)
    with Bar() as bar:
        table = single.calibrate_file(model, request, out, caches, bar, parsing.shapes(shapes))
    say(f"{out}: {len(table.ranges)} tensors, {table.method}, from {table.n} samples")
    for note in table.notes:
        say(f"note: {note}")
    return EXIT_PASSED


def quantize(
    model: o.Model,
    out: OutFile,
    mode: Annotated[str, typer.Option(help="static (INT8), dynamic (INT8), fp16 or mixed.")] = "static",
    calib: o.CalibFile = None,
    data: o.Data = None,
    n: o.CalibN = 512,
    method: o.Method = o.DEFAULT_METHOD,
    layout: Annotated[
        str, typer.Option(help="Where Q/DQ nodes go in static mode: cpu (ONNX Runtime, OpenVINO) or tensorrt.")
    ] = "cpu",
    max_drop: Annotated[
        str | None, typer.Option("--max-drop", help="Mixed: the largest drop in top-1, e.g. 0.5pp (needs labels).")
    ] = None,
    min_sqnr: o.MinSqnr = None,
    min_agreement: o.MinAgreement = None,
    bias_correct: o.BiasCorrect = None,
    scale_correct: o.ScaleCorrect = None,
    weight_scales: o.WeightScales = "max",
    reduce_range: o.ReduceRange = False,
    rounding: o.Rounding = "nearest",
    equalize: o.Equalize = False,
    preprocess: o.Preprocess = None,
    classes: o.Classes = None,
    limit: o.Limit = None,
    shapes: o.Shapes = None,
) -> int:
    """Precision written into the graph. fp16: with --data or --calib, tensors that came near FP16's limit stay in float32.
    Mixed: the fewest and cheapest layers stay in float that meet a budget; exit code 1, and the best there is, where none
    does.

    Example:  deploykit quantize model.onnx --mode static --data images/ -o model-int8.onnx
              deploykit quantize model.onnx --mode mixed --min-sqnr 25 --data images/ -o model-mixed.onnx
    """
    from deploykit.pipeline import quantizing, single
    from deploykit.pipeline.request import DataRequest

    parsing.positive(n, "-n")
    budget = parsing.budget(max_drop, min_sqnr, min_agreement)
    int8 = parsing.int8(bias_correct, scale_correct, weight_scales, reduce_range, rounding, equalize)
    request = DataRequest(data, None, preprocess, classes, limit, n, method, calib, int8=int8, budget=budget)
    with Bar() as bar:
        made = quantizing.quantize_file(model, mode, layout, out, request, bar, parsing.shapes(shapes))
    say(f"{out}: {made.precision}, {made.size_bytes / 1e6:.1f} MB")
    for line in single.fact_lines(made):
        say(line)
    return EXIT_PASSED if single.budget_met(made) else EXIT_FAILED


def finetune(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="resnet18, timm:NAME or path/to/file.py:factory.")],
    out: OutFile,
    data: o.Data = None,
    weights: o.Weights = None,
    num_classes: o.NumClasses = None,
    inputs: o.Inputs = None,
    preprocess: o.Preprocess = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training share.")] = 10,
    seconds: Annotated[float | None, typer.Option(help="Stop after this many seconds.")] = None,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Samples a step.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
) -> int:
    """Trains (or fine-tunes) a model on a share of the data that neither calibrates nor judges.

    Example:  deploykit finetune resnet18 --weights none --num-classes 10 --data digits -o digits.safetensors
    """
    from deploykit.pipeline import training
    from deploykit.pipeline.request import DataRequest, SourceRequest

    if data is None:
        raise InputError("training needs labelled samples", "add --data DATA, e.g. --data digits")
    request = training.TrainingRequest(
        SourceRequest(source, weights, parsing.positive(num_classes, "--num-classes"), parsing.inputs(inputs)),
        DataRequest(data, preprocess=preprocess),
        out,
        epochs,
        seconds,
        lr,
        batch_size,
        seed,
    )
    with Bar() as bar:
        lines = training.finetune(request, bar)
    for line in lines:
        say(line)
    return EXIT_PASSED
