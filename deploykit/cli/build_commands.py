"""`build`: one backend's engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deploykit.cli import options as o
from deploykit.cli import parsing
from deploykit.cli.options import add
from deploykit.cli.printing import say
from deploykit.cli.terminal import Bar
from deploykit.errors import EXIT_PASSED, InputError

if TYPE_CHECKING:
    from deploykit.artifact import Artifact


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""
    add(app, "build", build, "One backend's engine.")


def build(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="An .onnx file, or a SOURCE: resnet18, timm:NAME, path/to/file.py:factory, a .pt2 or .keras file.",
        ),
    ],
    backend: Annotated[str, typer.Option("--backend", help="onnxruntime, openvino, ...: see `deploykit doctor`.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the engine.")],
    precision: Annotated[str, typer.Option(help="fp32, fp16, bf16, int8 or int8-dynamic.")] = "fp32",
    batch: o.Batch = "1,8",
    target: Annotated[str | None, typer.Option(help="Hardware target, where the backend has several.")] = None,
    calib: o.CalibFile = None,
    data: o.Data = None,
    n: o.CalibN = 512,
    method: o.Method = o.DEFAULT_METHOD,
    preprocess: o.Preprocess = None,
    shapes: o.Shapes = None,
    inputs: o.Inputs = None,
    weights: o.Weights = None,
    num_classes: o.NumClasses = None,
    io: Annotated[
        str, typer.Option("--io", help="litert, static int8: what the file takes and gives, float or int8 values.")
    ] = "float",
    tune: Annotated[
        str | None,
        typer.Option(help="tvm: search for faster schedules for so long (90s, 10m, 1h); goes on where a search stopped."),
    ] = None,
    time_limit: Annotated[
        float | None,
        typer.Option("--time-limit", help="Stop the build after this many seconds; default: 1800, and the time of --tune."),
    ] = None,
    memory_limit: Annotated[
        float | None,
        typer.Option(
            "--memory-limit", help="Stop a build that holds more memory than this, in GiB; default: 90 % of the machine's."
        ),
    ] = None,
) -> int:
    """One backend's engine, with its manifest. executorch, litert and torch make theirs of a PyTorch or Keras SOURCE.

    Example:  deploykit build model.onnx --backend openvino --precision fp32 -o engines-ov
              deploykit build resnet18 --backend litert --precision int8 --io int8 --data images/ -o engines-litert
    """
    from deploykit import backends
    from deploykit.errors import UnknownName
    from deploykit.pipeline import single, source_builds
    from deploykit.pipeline.limited import Limits
    from deploykit.pipeline.request import DataRequest, SourceRequest
    from deploykit.session import PRECISIONS, BuildRequest

    if precision not in PRECISIONS:
        raise UnknownName("precision", precision, PRECISIONS)
    chosen = backends.get(backend)
    where = target or chosen.targets()[0]
    if where not in chosen.all_targets():
        raise UnknownName("target", where, chosen.all_targets())
    if tune is not None and backend != "tvm":
        raise InputError(f"--tune is for --backend tvm; {backend} has no search", "leave --tune out")
    parsing.positive(n, "-n")
    parsing.io(io, backend, precision)
    search_s = 0.0 if tune is None else parsing.seconds(tune, "--tune")
    options = ({"tune": search_s} if search_s else {}) | ({"io": io} if io != "float" else {})
    wanted = BuildRequest(precision, where, parsing.batches(batch), parsing.shapes(shapes), options)
    seconds = 1800.0 + search_s if time_limit is None else time_limit
    limits = Limits(seconds, parsing.gib(memory_limit, "--memory-limit"))
    with Bar() as bar:
        request = DataRequest(data, None, preprocess, None, None, n, method, calib)
        wanted_of = SourceRequest(source, weights, parsing.positive(num_classes, "--num-classes"), parsing.inputs(inputs))
        made = source_builds.build(wanted_of, backend, wanted, out, request, bar, limits)
    say(engine_line(made))
    for line in single.fact_lines(made):
        say(line)
    return EXIT_PASSED


def engine_line(engine: Artifact) -> str:
    """An engine in one line."""
    return f"{engine.path}: {engine.options['backend']} {engine.precision} {engine.device}, {engine.size_bytes / 1e6:.1f} MB"
