"""`run` and `bench`: the whole line, and its table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deploykit.cli import options as o
from deploykit.cli import parsing
from deploykit.cli.options import add
from deploykit.cli.printing import show_report
from deploykit.cli.terminal import Bar

if TYPE_CHECKING:
    from deploykit.pipeline.line import LineRequest
    from deploykit.pipeline.request import Int8Request
    from deploykit.stages.mixed import Budget


def register(app: typer.Typer) -> None:
    """Adds the commands to the application."""
    add(app, "run", run, "The whole line, from a model to a report.")
    add(app, "bench", bench, "The table of throughput, latency and accuracy.")


def run(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="resnet18, timm:NAME, path/to/file.py:factory, an .onnx file or a .pt2.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the report and the engines.")],
    data: o.Data = None,
    calib_data: o.CalibData = None,
    weights: o.Weights = None,
    num_classes: o.NumClasses = None,
    inputs: o.Inputs = None,
    opset: o.Opset = None,
    outputs: o.OutputsCut = None,
    backend: o.BackendNames = None,
    precision: o.PrecisionNames = None,
    batch: o.Batch = "1,8",
    target: o.TargetNames = None,
    threads: o.Threads = None,
    duration: o.DurationName = "quick",
    preprocess: o.Preprocess = None,
    classes: o.Classes = None,
    limit: o.Limit = None,
    calib: o.CalibFile = None,
    calib_n: o.CalibN = 512,
    method: o.Method = o.DEFAULT_METHOD,
    min_sqnr: o.MinSqnr = None,
    min_agreement: o.MinAgreement = None,
    bias_correct: o.BiasCorrect = None,
    weight_scales: o.WeightScales = "max",
    reduce_range: o.ReduceRange = False,
    rounding: o.Rounding = "nearest",
    recalibrate: o.Recalibrate = False,
    shapes: o.Shapes = None,
    store: o.StoreFolder = Path("engines"),
    baseline: o.Baseline = None,
    max_drop: o.MaxDrop = None,
    max_slowdown: o.MaxSlowdown = None,
    max_size_growth: o.MaxSizeGrowth = None,
    max_memory_growth: o.MaxMemoryGrowth = None,
    max_startup_growth: o.MaxStartupGrowth = None,
    limits: o.LimitsFile = None,
    remeasure: o.Remeasure = False,
    aa: o.AA = False,
    streams: o.Streams = 1,
    scenario: o.Scenario = None,
    server_latency: o.ServerLatency = "15ms",
    json_file: o.JsonFile = None,
) -> int:
    """The whole line: export, checks, calibration, precision, engines, accuracy, bench, gate, report.

    Example:  deploykit run resnet18 --weights none --num-classes 10 --data digits -o out
    """
    from dataclasses import replace

    from deploykit.pipeline import delivery, gating, line
    from deploykit.pipeline.request import SourceRequest

    held = parsing.limits(max_drop, max_slowdown, max_size_growth, max_memory_growth, max_startup_growth, limits)
    asked = gating.GateRequest(baseline, held, again=gating.Again(duration, data, preprocess))
    origin = SourceRequest(
        source, weights, parsing.positive(num_classes, "--num-classes"), parsing.inputs(inputs), opset, parsing.names(outputs)
    )
    request = _request(
        (origin,),
        data,
        calib_data,
        preprocess,
        classes,
        limit,
        calib_n,
        method,
        calib,
        recalibrate,
        parsing.int8(bias_correct, weight_scales, reduce_range, rounding),
        parsing.budget(max_drop if _asks_mixed(precision) else None, min_sqnr, min_agreement),
        backend,
        precision,
        batch,
        target,
        threads,
        duration,
        shapes,
        aa,
        remeasure,
        store,
        parsing.load(streams, scenario, server_latency),
    )
    gating.check(asked)
    with delivery.held(out, store), Bar() as bar:
        result = line.run(replace(request, explain=True), bar)
        report, verdict = gating.judge(result, asked, bar)
        delivery.deliver(report, result, out, bar)
    show_report(report, json_file, [f"the report: {out / 'report.html'} (also .md, .csv, .json); engines in {out / 'engines'}"])
    return verdict.exit_code if verdict is not None and verdict.exit_code else result.exit_code


def bench(
    targets: Annotated[
        list[str], typer.Argument(metavar="TARGET...", help=".onnx files, engines, folders of engines, or SOURCEs.")
    ],
    data: o.Data = None,
    calib_data: o.CalibData = None,
    weights: o.Weights = None,
    num_classes: o.NumClasses = None,
    inputs: o.Inputs = None,
    backend: o.BackendNames = None,
    precision: o.PrecisionNames = None,
    batch: o.Batch = "1,8",
    target: o.TargetNames = None,
    threads: o.Threads = None,
    duration: o.DurationName = "quick",
    preprocess: o.Preprocess = None,
    classes: o.Classes = None,
    limit: o.Limit = None,
    calib: o.CalibFile = None,
    calib_n: o.CalibN = 512,
    method: o.Method = o.DEFAULT_METHOD,
    min_sqnr: o.MinSqnr = None,
    min_agreement: o.MinAgreement = None,
    bias_correct: o.BiasCorrect = None,
    weight_scales: o.WeightScales = "max",
    reduce_range: o.ReduceRange = False,
    rounding: o.Rounding = "nearest",
    shapes: o.Shapes = None,
    store: o.StoreFolder = Path("engines"),
    aa: o.AA = False,
    streams: o.Streams = 1,
    scenario: o.Scenario = None,
    server_latency: o.ServerLatency = "15ms",
    seeds: Annotated[bool, typer.Option("--reference-table", help="Show the seeds' T4 claims beside the measured rows.")] = False,
    logs: Annotated[Path | None, typer.Option(help="Keep LoadGen's own logs in this folder, a folder a row.")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write the rows as CSV.")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Write the table as Markdown.")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="Write the report page.")] = None,
    json_file: o.JsonFile = None,
) -> int:
    """The table: throughput, latency and, with --data, accuracy of every backend and precision.

    Example:  deploykit bench model.onnx --backend onnxruntime,openvino --precision fp32,int8 --data images/
    """
    from deploykit.pipeline import delivery, line
    from deploykit.pipeline.request import SourceRequest

    specs = parsing.inputs(inputs)
    origins = tuple(SourceRequest(t, weights, num_classes, specs) for t in targets)
    request = _request(
        origins,
        data,
        calib_data,
        preprocess,
        classes,
        limit,
        calib_n,
        method,
        calib,
        False,
        parsing.int8(bias_correct, weight_scales, reduce_range, rounding),
        parsing.budget(None, min_sqnr, min_agreement),
        backend,
        precision,
        batch,
        target,
        threads,
        duration,
        shapes,
        aa,
        True,
        store,
        parsing.load(streams, scenario, server_latency),
    )
    with Bar() as bar:
        result = line.run(request, bar)
    written = delivery.write_files(result.report, csv_file, markdown_file, html_file)
    if logs is not None:
        delivery.write_logs(result, logs)
    show_report(result.report, json_file, [f"wrote {path}" for path in written], seeds=seeds)
    return result.exit_code


def _asks_mixed(precision: str | None) -> bool:
    return "mixed" in (parsing.names(precision) or ())


def _request(
    origins: tuple[object, ...],
    data: str | None,
    calib_data: str | None,
    preprocess: str | None,
    classes: Path | None,
    limit: int | None,
    calib_n: int,
    method: str,
    calib: Path | None,
    recalibrate: bool,
    int8: Int8Request,
    budget: Budget | None,
    backend: str | None,
    precision: str | None,
    batch: str,
    target: str | None,
    threads: int | None,
    duration: str,
    shapes: list[str] | None,
    aa: bool,
    remeasure: bool,
    store: Path,
    load: parsing.Load,
) -> LineRequest:
    from deploykit.pipeline.line import LineRequest
    from deploykit.pipeline.request import DataRequest, RowsRequest, SourceRequest

    parsing.positive(limit, "--limit")
    parsing.positive(calib_n, "--calib-n")
    parsing.positive(threads, "--threads")
    return LineRequest(
        targets=tuple(origin for origin in origins if isinstance(origin, SourceRequest)),
        data=DataRequest(data, calib_data, preprocess, classes, limit, calib_n, method, calib, recalibrate, int8, budget),
        rows=RowsRequest(
            parsing.names(backend),
            parsing.names(precision),
            parsing.batches(batch),
            parsing.names(target),
            threads,
            duration,
            parsing.shapes(shapes),
            aa,
            remeasure,
            streams=load.streams,
            scenario=load.scenario,
            server_latency_s=load.server_latency_s,
        ),
        store=store,
        command=("deploykit", *sys.argv[1:]),
    )
