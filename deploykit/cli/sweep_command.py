"""`sweep`: the best configuration under limits."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deploykit.cli import options as o
from deploykit.cli import parsing
from deploykit.cli.options import add
from deploykit.cli.printing import say, show_json, show_rows
from deploykit.cli.terminal import Bar

if TYPE_CHECKING:
    from deploykit.pipeline.sweeping import Swept


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""
    add(app, "sweep", sweep, "The fastest configuration that keeps your limits.")


def sweep(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="A SOURCE (resnet18, file.py:factory, a .pt2) or an .onnx file.")
    ],
    data: o.Data = None,
    calib_data: o.CalibData = None,
    weights: o.Weights = None,
    num_classes: o.NumClasses = None,
    inputs: o.Inputs = None,
    backend: o.BackendNames = None,
    precision: o.PrecisionNames = None,
    batch: o.Batch = "1,2,4,8,16,32",
    threads: Annotated[
        str | None, typer.Option(help="Thread counts, separated by commas; default: every CPU this process may use.")
    ] = None,
    streams: Annotated[
        str | None, typer.Option(help="Requests at once, separated by commas; default: 1, 2, 4, ... up to the threads.")
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            help="channels-first, channels-last or both, separated by a comma; default: both, on backends with a choice."
        ),
    ] = None,
    max_latency: Annotated[
        str | None, typer.Option("--max-latency", help="The 90th percentile of a run stays within this, e.g. 5ms.")
    ] = None,
    max_drop: Annotated[str | None, typer.Option("--max-drop", help="The largest drop in top-1, e.g. 0.5pp.")] = None,
    max_memory: Annotated[
        str | None, typer.Option("--max-memory", help="The most memory the engine's process may hold, e.g. 500MB.")
    ] = None,
    objective: Annotated[str, typer.Option(help="throughput or latency.")] = "throughput",
    budget: Annotated[
        str | None, typer.Option(help="After this long nothing new is tried, e.g. 60s; the best so far is still measured.")
    ] = None,
    preprocess: o.Preprocess = None,
    classes: o.Classes = None,
    limit: o.Limit = None,
    calib: o.CalibFile = None,
    calib_n: o.CalibN = 512,
    method: o.Method = o.DEFAULT_METHOD,
    shapes: o.Shapes = None,
    store: o.StoreFolder = Path("engines"),
    json_file: o.JsonFile = None,
) -> int:
    """The best of batch x threads x streams x layout x precision x backend under limits, with the command that measures it again, and
    the Pareto front of latency, throughput, accuracy and size. Exit code 1: nothing keeps the limits; 4: every configuration
    failed; 5: the samples are too few to show that the recommendation keeps --max-drop.

    Example:  deploykit sweep resnet18 --weights none --data digits --max-latency 5ms --max-drop 0.5pp
    """
    from deploykit import loadgen
    from deploykit.configuration import Limits
    from deploykit.errors import UnknownName
    from deploykit.pipeline import sweeping
    from deploykit.pipeline.line import LineRequest
    from deploykit.pipeline.request import (
        DEFAULT_CALIBRATION_N,
        DEFAULT_STORE,
        DataRequest,
        Int8Request,
        RowsRequest,
        SourceRequest,
    )
    from deploykit.stages import gate
    from deploykit.stages.sweep import OBJECTIVES

    if objective not in OBJECTIVES:
        raise UnknownName("objective", objective, OBJECTIVES)
    parsing.positive(limit, "--limit")
    parsing.positive(calib_n, "--calib-n")
    limits = Limits(
        loadgen.latency_s(max_latency, "--max-latency") if max_latency is not None else None,
        gate.parse_drop(max_drop) if max_drop is not None else None,
        parsing.memory_bytes(max_memory, "--max-memory") if max_memory is not None else None,
    )
    line = LineRequest(
        targets=(SourceRequest(target, weights, parsing.positive(num_classes, "--num-classes"), parsing.inputs(inputs)),),
        data=DataRequest(data, calib_data, preprocess, classes, limit, calib_n, method, calib, int8=Int8Request()),
        rows=RowsRequest(parsing.names(backend), parsing.names(precision), parsing.batches(batch), shapes=parsing.shapes(shapes)),
        store=store,
    )
    command = _again(
        target,
        [
            *(("--weights", weights, None), ("--num-classes", num_classes, None)),
            *(("--input", text, None) for text in inputs or ()),
            *(("--data", data, None), ("--calib-data", calib_data, None), ("--preprocess", preprocess, None)),
            *(("--classes", classes, None), ("--limit", limit, None), ("--calib", calib, None)),
            *(("--shapes", text, None) for text in shapes or ()),
            *(("--calib-n", calib_n, DEFAULT_CALIBRATION_N), ("--method", method, o.DEFAULT_METHOD)),
            ("--store", store, DEFAULT_STORE),
        ],
    )
    request = sweeping.SweepRequest(
        line,
        limits,
        parsing.counts(threads, "--threads"),
        parsing.counts(streams, "--streams"),
        parsing.layouts(layout),
        objective,
        parsing.seconds(budget, "--budget") if budget is not None else None,
        command,
    )
    with Bar() as bar:
        swept = sweeping.take(request, bar)
    if json_file is not None:
        show_json(swept.to_json(), json_file)
    if json_file != "-":
        _show(swept)
    return swept.exit_code


def _again(target: str, options: Iterable[tuple[str, object, object]]) -> tuple[str, ...]:
    """The `bench` command that measures the same thing: of (option, value, default) those that are not the default."""
    given = ((name, str(value)) for name, value, default in options if value is not None and value != default)
    return ("deploykit", "bench", target, *(text for pair in given for text in pair))


def _show(swept: Swept) -> None:
    from deploykit.pipeline import sweeping

    rows = []
    for configuration in swept.found.front:
        score, quality = swept.found.trial(configuration).score, swept.qualities[configuration.engine]
        if score is None:
            continue
        lost = f"{quality.drop_pp:.2f}" if quality.drop_pp is not None else ""
        size = f"{quality.size_bytes / 1e6:.3g}" if quality.size_bytes else ""
        mark = "recommended" if configuration == swept.found.best else f"({swept.found.trial(configuration).effort})"
        rows.append([str(configuration), f"{score.images_per_s:,.4g}", f"{score.p50_s * 1e3:.3g}", lost, size, mark])
    show_rows("Pareto front", ["Configuration", "img/s", "p50 ms", "Drop pp", "MB", ""], rows)
    reasons: dict[str, list[str]] = {}
    for trial in swept.found.trials:
        if not trial.scores:
            reasons.setdefault(trial.out, []).append(str(trial.configuration))
    for why, names in reasons.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        say(f"skipped {shown}: {why}")
    for name, why in swept.absent.items():
        say(f"not here: {name}: {why}")
    for text in sweeping.lines(swept):
        say(text)
    sys.stdout.flush()
