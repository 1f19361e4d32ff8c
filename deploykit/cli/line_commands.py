"""`run` and `bench`: the whole line, and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploykit.cli import options as o
from deploykit.cli import parsing
from deploykit.cli.line_options import LineOptions
from deploykit.cli.options import add
from deploykit.cli.printing import show_report
from deploykit.cli.terminal import Bar
from deploykit.errors import InputError


def register(app: typer.Typer) -> None:
    """Adds the commands to the application."""
    add(app, "run", run, "The whole line, from a model to a report.")
    add(app, "bench", bench, "The table of throughput, latency and accuracy.")


def run(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="resnet18, timm:NAME, path/to/file.py:factory, an .onnx file or a .pt2.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the report and the engines.")],
    options: LineOptions,
    opset: o.Opset = None,
    outputs: o.OutputsCut = None,
    recalibrate: o.Recalibrate = False,
    baseline: o.Baseline = None,
    max_drop: o.MaxDrop = None,
    max_disagreement: o.MaxDisagreement = None,
    max_slowdown: o.MaxSlowdown = None,
    max_size_growth: o.MaxSizeGrowth = None,
    max_memory_growth: o.MaxMemoryGrowth = None,
    max_startup_growth: o.MaxStartupGrowth = None,
    limits: o.LimitsFile = None,
    remeasure: o.Remeasure = False,
    json_file: o.JsonFile = None,
) -> int:
    """The whole line: export, checks, calibration, precision, engines, accuracy, bench, gate, report.

    Example:  deploykit run resnet18 --weights none --num-classes 10 --data digits -o out
    """
    from dataclasses import replace

    from deploykit.pipeline import delivery, gating, line
    from deploykit.pipeline.request import SourceRequest

    lost = (max_drop, max_slowdown, max_size_growth, max_memory_growth, max_startup_growth, max_disagreement)
    held = parsing.limits(*lost, limits)
    asked = gating.GateRequest(baseline, held, again=gating.Again(options.duration))
    origin = SourceRequest(
        source,
        options.weights,
        parsing.positive(options.num_classes, "--num-classes"),
        parsing.inputs(options.inputs),
        opset,
        parsing.names(outputs),
    )
    request = options.request((origin,), max_drop=max_drop, recalibrate=recalibrate, remeasure=remeasure)
    gating.check(asked, out=out)
    with delivery.held(out, options.store), Bar() as bar:
        result = line.run(replace(request, explain=True), bar)
        report, verdict = gating.judge(result, asked, bar)
        delivery.deliver(report, result, out, bar)
    lines = [f"the report: {out / 'report.html'} (also .md, .csv, .json); engines in {out / 'engines'}"]
    if result.reused:
        lines.insert(0, f"reused, nothing they are made of changed: {', '.join(dict.fromkeys(result.reused))}")
        lines.insert(1, f"made now: {', '.join(dict.fromkeys(result.made)) or 'nothing'}")
    show_report(report, json_file, lines)
    return verdict.exit_code if verdict is not None and verdict.exit_code else result.exit_code


def bench(
    targets: Annotated[
        list[str], typer.Argument(metavar="TARGET...", help=".onnx files, engines, folders of engines, or SOURCEs.")
    ],
    options: LineOptions,
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

    if logs is not None and options.scenario is None:
        raise InputError("--logs keeps LoadGen's logs, and nothing runs it", "add --scenario SingleStream")
    specs, classes = parsing.inputs(options.inputs), parsing.positive(options.num_classes, "--num-classes")
    request = options.request([SourceRequest(t, options.weights, classes, specs) for t in targets], remeasure=True)
    with Bar() as bar:
        result = line.run(request, bar)
    written = delivery.write_files(result.report, csv_file, markdown_file, html_file)
    if logs is not None:
        delivery.write_logs(result, logs)
    show_report(result.report, json_file, [f"wrote {path}" for path in written], seeds=seeds)
    return result.exit_code
