"""Commands that look: doctor, compare, explain, gate, report, predict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploykit.cli import options as o
from deploykit.cli import parsing
from deploykit.cli.options import add
from deploykit.cli.printing import say, show_comparison, show_json, show_report, show_rows
from deploykit.cli.terminal import Bar
from deploykit.errors import EXIT_FAILED, EXIT_PASSED, InputError


def register(app: typer.Typer) -> None:
    """Adds the commands to the application."""
    add(app, "doctor", doctor, "What this machine can do.", bare=True)
    add(app, "compare", compare, "Drift between two models or engines.")
    add(app, "explain", explain, "Why an engine isn't faster.")
    add(app, "report", report, "Render a finished run again.")
    add(app, "predict", predict, "What an engine says of an image.")


def doctor(json_file: o.JsonFile = None) -> int:
    """What this machine can do: CPU features, memory, GPU, and every backend, or why it is missing.

    Example:  deploykit doctor
    """
    from deploykit.pipeline import examination

    found = examination.examine()
    if json_file is not None:
        show_json(found.to_json(), json_file)
    if json_file != "-":
        for line in found.machine_lines:
            say(line)
        show_rows("", ["backend", "version", "precisions", "here"], found.backend_rows, wrap=(1, 3))
        for warning in found.warnings:
            say(f"warning: {warning}")
    return EXIT_FAILED if found.warnings else EXIT_PASSED


def compare(
    reference: Annotated[Path, typer.Argument(metavar="REF", help="The reference: an .onnx file or an engine.")],
    candidate: Annotated[Path, typer.Argument(metavar="CANDIDATE", help="What is held against it.")],
    data: o.Data = None,
    preprocess: o.Preprocess = None,
    classes: o.Classes = None,
    limit: o.Limit = None,
    shapes: o.Shapes = None,
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="Rank the layers of two .onnx graphs by what they lost, and say why.")
    ] = False,
    alone: Annotated[
        str, typer.Option("--alone", help="How many layers to measure with no other quantized: a number, or 'all'.")
    ] = "64",
    html: Annotated[Path | None, typer.Option("--html", help="Plot the layers in this HTML file.")] = None,
    json_file: o.JsonFile = None,
) -> int:
    """Drift between two models or engines, per output and per sample; with --per-layer, where it was lost.

    own_db is the SQNR of the model's output with that layer alone quantized.

    Example:  deploykit compare model.onnx model-int8.onnx --data images/ --per-layer
    """
    from deploykit.errors import InputError
    from deploykit.pipeline import comparing
    from deploykit.pipeline.request import DataRequest

    if data is None:
        raise InputError("a comparison needs samples", "add --data DATA")
    if not per_layer and alone != "64":
        raise InputError("--alone counts layers to measure", "add --per-layer")
    with Bar() as bar:
        found = comparing.compare(
            reference,
            candidate,
            DataRequest(data, preprocess=preprocess, classes=classes, limit=limit),
            parsing.shapes(shapes),
            bar,
            per_layer=per_layer,
            most_alone=parsing.count_or_all(alone, "--alone"),
            page=html,
        )
    if json_file is not None:
        show_json(found.to_json(), json_file)
    if json_file != "-":
        for line in found.lines():
            say(line)
        if per_layer:
            show_rows("", ["layer", "operator", "sqnr_db", "own_db", "why"], found.layer_rows(), wrap=(4,))
            for line in found.layer_lines():
                say(line)
    return EXIT_PASSED


def explain(
    engine: Annotated[Path, typer.Argument(metavar="ENGINE", help="An engine, or an .onnx file with --backend.")],
    backend: Annotated[str | None, typer.Option("--backend", help="onnxruntime or openvino; an engine has its own.")] = None,
    data: o.Data = None,
    preprocess: o.Preprocess = None,
    batch: Annotated[int, typer.Option("--batch", help="The batch to profile at.")] = 1,
    threads: o.Threads = None,
    shapes: o.Shapes = None,
    top: Annotated[int, typer.Option("--top", help="How many kernels to list.")] = 10,
    json_file: o.JsonFile = None,
) -> int:
    """Why INT8 isn't faster: where the time goes by the runtime's own profile, what ran in float, what stands in between,
    which CPU feature is missing, and the remedy.

    Example:  deploykit explain model-int8.onnx --backend onnxruntime
    """
    from deploykit.pipeline import bottlenecks
    from deploykit.pipeline.request import DataRequest

    for number, option in ((batch, "--batch"), (threads, "--threads"), (top, "--top")):
        parsing.positive(number, option)
    with Bar() as bar:
        found = bottlenecks.explain(
            engine,
            backend,
            DataRequest(data, preprocess=preprocess),
            parsing.shapes(shapes),
            bar,
            batch=batch,
            threads=threads,
        )
    if json_file is not None:
        show_json(found.to_json(), json_file)
    if json_file != "-":
        say(found.verdict)
        p = found.profile
        say(f"{p.backend}, batch {p.batch}, {p.threads} threads: {p.seconds * 1e3:.2f} ms in kernels, median of {p.runs} runs")
        show_rows("", ["where the time goes", "kernels", "ms", "share"], bottlenecks.kind_rows(found), wrap=(0,))
        show_rows("", ["share", "what was found -> what to do"], bottlenecks.finding_rows(found), wrap=(1,))
        heads = ["slowest kernels", "operator", "computes in", "ms", "share", "implementation"]
        show_rows("", heads, bottlenecks.kernel_rows(found, top), wrap=(0,))
    return EXIT_PASSED


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A finished run's folder.")],
    against: Annotated[Path | None, typer.Option("--compare", help="Another run, to show beside this one.")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Write the comparison as Markdown.")] = None,
    json_file: o.JsonFile = None,
) -> int:
    """Renders a finished run again: the table here, and its .md, .csv and .html files anew. With --compare: the two runs' figures
    beside each other, and what makes the runs unlike.

    Example:  deploykit report out    Example:  deploykit report before --compare after
    """
    from deploykit.pipeline import delivery

    if against is not None:
        before, after = delivery.two_reports(folder, against)
        if markdown_file is not None:
            delivery.write_comparison(before, after, markdown_file)
        if json_file is not None:
            show_json({"before": before.to_json(), "after": after.to_json()}, json_file)
        if json_file != "-":
            show_comparison(before, after)
        return EXIT_PASSED
    if markdown_file is not None:
        raise InputError("--markdown writes a comparison, and there is none", "add --compare RUN; a run's own is its report.md")
    found, written = delivery.render_again(folder)
    show_report(found, json_file, [f"wrote {path}" for path in written])
    return EXIT_PASSED


def predict(
    engine: Annotated[Path, typer.Argument(metavar="ENGINE", help="An engine or an .onnx file.")],
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="An image, or any DATA.")],
    preprocess: o.Preprocess = None,
    classes: o.Classes = None,
    top: Annotated[int, typer.Option(help="How many classes to show.")] = 5,
    json_file: o.JsonFile = None,
) -> int:
    """What an engine says of an image: its most likely classes.

    Example:  deploykit predict out/engines/resnet18-openvino-int8/model.xml cat.jpg
    """
    from deploykit.pipeline import predicting

    parsing.positive(top, "--top")
    found = predicting.predict(engine, image, preprocess, classes, top)
    if json_file is not None:
        show_json(found, json_file)
    if json_file != "-":
        for item in found:
            say(f"{item['sample']}:")
            for guess in item["top"]:
                say(f"  {guess['share'] * 100:5.1f} %  {guess['class']}")
    return EXIT_PASSED
