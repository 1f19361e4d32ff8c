"""`build-trt`: TensorRT engines of an .onnx file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploykit.cli import options as o
from deploykit.cli import parsing
from deploykit.cli.build_commands import engine_line
from deploykit.cli.options import add
from deploykit.cli.printing import say
from deploykit.cli.terminal import Bar

if TYPE_CHECKING:
    from deploykit.artifact import Artifact
    from deploykit.pipeline.request import DataRequest
    from deploykit.pipeline.trt import TrtRequest


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""
    add(app, "build-trt", build_trt, "TensorRT engines, for GPUs that are not here.")


@dataclass(frozen=True)
class TrtOptions:
    """The options in the order in which `--help` lists them."""

    fp16: Annotated[bool, typer.Option("--fp16", help="FP16 engines (the default when no precision is named).")] = False
    int8: Annotated[bool, typer.Option("--int8", help="INT8 engines: Q/DQ from --calib or --data, the rest in FP16.")] = False
    fp32: Annotated[bool, typer.Option("--fp32", help="FP32 engines.")] = False
    calib: o.CalibFile = None
    data: o.Data = None
    n: o.CalibN = 512
    method: o.Method = o.DEFAULT_METHOD
    preprocess: o.Preprocess = None
    classes: o.Classes = None
    predict: Annotated[
        int,
        typer.Option(
            "--predict",
            help="With --data: run the graph on the CPU on so many samples that do not calibrate, at most, and tell its accuracy as "
            "predicted; 0: do not.",
        ),
    ] = 256  # pipeline.prediction.DEFAULT_N, not imported: --help answers at once
    target: o.TargetNames = None
    batch: o.Batch = "1,8,32"
    backend: Annotated[str, typer.Option("--backend", help="auto, tensorrt (needs a GPU) or rtx (built ahead of time).")] = "auto"
    allow_fallback: Annotated[
        bool, typer.Option("--allow-fallback", help="Accept an engine whose convolutions run in another precision.")
    ] = False
    shapes: o.Shapes = None
    int8_mode: Annotated[
        str,
        typer.Option(
            "--int8-mode",
            help="explicit (Q/DQ in the graph), or implicit (TensorRT up to 10 only: a calibrator reading --calib).",
        ),
    ] = "explicit"
    time_limit: Annotated[float, typer.Option("--time-limit", help="Stop a build after this many seconds.")] = 1800.0
    memory_limit: Annotated[
        float | None,
        typer.Option(
            "--memory-limit", help="Stop a build that holds more memory than this, in GiB; default: 90 % of the machine's."
        ),
    ] = None
    explain: Annotated[
        bool, typer.Option("--explain", help="When a build fails: find and write the smallest part of the graph that still does.")
    ] = False
    profile_each_batch: Annotated[
        bool,
        typer.Option("--profile-each-batch", help="One optimization profile a batch, in place of one from 1 to the largest."),
    ] = False
    timing_cache: Annotated[
        Path | None,
        typer.Option(
            "--timing-cache", help="tensorrt: read and keep the timings of kernels here; the next build is faster and alike."
        ),
    ] = None
    workspace: Annotated[
        float | None, typer.Option("--workspace", help="Scratch memory on the GPU, in GiB, at most; default: no limit.")
    ] = None

    def request(self, model: Path) -> tuple[TrtRequest, DataRequest]:
        """What they ask for, of this model. Raises InputError for values that make no sense."""
        from deploykit.pipeline.limited import Limits
        from deploykit.pipeline.request import DataRequest
        from deploykit.pipeline.trt import TrtRequest

        parsing.positive(self.n, "-n")
        if self.predict:
            parsing.positive(self.predict, "--predict")
        named = (("fp32", self.fp32), ("fp16", self.fp16), ("int8", self.int8))
        wanted = TrtRequest(
            model=model,
            precisions=tuple(name for name, on in named if on) or ("fp16",),
            targets=parsing.names(self.target),
            batches=parsing.batches(self.batch),
            backend=self.backend,
            allow_fallback=self.allow_fallback,
            shapes=parsing.shapes(self.shapes),
            explain=self.explain,
            int8_mode=self.int8_mode,
            limits=Limits(self.time_limit, parsing.gib(self.memory_limit, "--memory-limit")),
            profile_each_batch=self.profile_each_batch,
            timing_cache=self.timing_cache,
            workspace_bytes=parsing.gib(self.workspace, "--workspace"),
            judge_n=self.predict,
        )
        samples = DataRequest(
            data=self.data,
            preprocess=self.preprocess,
            classes=self.classes,
            calib_n=self.n,
            method=self.method,
            calib_table=self.calib,
        )
        return wanted, samples


def build_trt(
    model: o.Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the engines.")],
    options: TrtOptions,
) -> int:
    """TensorRT engines with their manifests, one per target and precision, for batch 1 to the largest named.

    Example:  deploykit build-trt model.onnx --fp16 --int8 --data images/ --target sm75,sm89 -o engines-trt
    """
    from deploykit.pipeline import trt

    request, samples = options.request(model)
    expected: list[str] = []

    def tell(line: str) -> None:
        expected.append(f"note: {line}")
        say(f"expected: {line}")

    with Bar() as bar:
        made = trt.build(request, samples, out, bar, tell)
    _show(made.engines, expected)
    for line in made.warnings:
        say(line)
    return made.exit_code


def _show(engines: Sequence[Artifact], expected: Sequence[str]) -> None:
    """The engines with what to know of them; where there are several, a table too."""
    from deploykit.pipeline import prediction, single

    for engine in engines:
        say(engine_line(engine))
        if "predicted" in engine.facts:
            say(f"  {prediction.line(engine.facts['predicted'], engine.device)}")
        for line in single.fact_lines(engine):
            if line not in expected:
                say(f"  {line}")
    if len(engines) > 1:
        from deploykit.cli.printing import show_rows

        header = ["engine", "MB", "build s", "convolutions", "predicted on the CPU"]
        show_rows("", header, [_row(engine) for engine in engines], wrap=(4,))


def _row(engine: Artifact) -> list[str]:
    facts: dict[str, Any] = dict(engine.facts)
    runs = facts.get("layers", {}).get("convolution", {})
    predicted = facts.get("predicted", {})
    return [
        f"{engine.precision} {engine.device}",
        f"{engine.size_bytes / 1e6:.1f}",
        f"{facts['build_s']:.1f}",
        ", ".join(f"{count} {name}" for name, count in runs.items()),
        predicted.get("in_words", ""),
    ]
