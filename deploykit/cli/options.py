"""The options that several commands share, declared once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer


def add(app: typer.Typer, name: str, function: Callable[..., int], short: str, *, bare: bool = False) -> None:
    """Adds a command to the application; `bare`: it can be called without arguments."""
    app.command(name=name, short_help=short, no_args_is_help=not bare)(spread(function))


def spread(command: Callable[..., int]) -> Callable[..., int]:
    """The command with each dataclass among its parameters replaced by that class's fields, an option each."""
    hints = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        kind = hints[name]
        if is_dataclass(kind):
            groups[name] = kind
            types = get_type_hints(kind, include_extras=True)
            parameters += [
                inspect.Parameter(f.name, parameter.KEYWORD_ONLY, default=f.default, annotation=types[f.name])
                for f in fields(kind)
            ]
        else:
            parameters.append(parameter.replace(annotation=kind, kind=parameter.KEYWORD_ONLY))

    def called(**values: Any) -> int:
        made = {name: kind(**{f.name: values.pop(f.name) for f in fields(kind)}) for name, kind in groups.items()}
        return command(**made, **values)

    called.__name__, called.__doc__ = command.__name__, command.__doc__
    called.__signature__ = inspect.Signature(parameters, return_annotation=int)  # type: ignore[attr-defined]  # what typer reads
    called.__annotations__ = {p.name: p.annotation for p in parameters}
    return called


Batch = Annotated[str, typer.Option("--batch", help="Batch sizes, separated by commas.")]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input", help="An input as NAME:DTYPE:SHAPE, e.g. x:float32:batchx3x224x224; repeat it for several.", metavar="SPEC"
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(help="A checkpoint (.safetensors, or a state dict .pt), 'none' (random, seeded) or 'default' (downloads)."),
]
NumClasses = Annotated[int | None, typer.Option("--num-classes", help="Replace the classifier by one of this many classes.")]
Opset = Annotated[int | None, typer.Option(help="ONNX opset; by default the newest that every engine here takes.")]
OutputsCut = Annotated[
    str | None, typer.Option("--outputs", help="Cut the graph so that it ends at these tensors (cuts a head off).")
]
Model = Annotated[Path, typer.Argument(metavar="MODEL", help="An .onnx file.")]
Data = Annotated[
    str | None,
    typer.Option(
        help="Samples: a folder with one sub-folder a class, a folder of images, an .npz, IDX files, 'digits' or 'random:N'."
    ),
]
CalibData = Annotated[
    str | None, typer.Option("--calib-data", help="Samples to calibrate on; by default a share of --data that never judges.")
]
CalibN = Annotated[int, typer.Option("-n", "--calib-n", help="How many samples calibrate, at most.")]
DEFAULT_METHOD = "best"  # calibration_table.DEFAULT_METHOD, not imported: --help answers at once
Method = Annotated[
    str,
    typer.Option(help="Calibration: minmax, entropy, percentile, mse, or best: whichever keeps the INT8 graph closest to float."),
]
CalibFile = Annotated[
    Path | None,
    typer.Option("--calib", help="A calibration table: `deploykit calibrate`'s, TensorRT's text cache or ONNX Runtime's."),
]
Recalibrate = Annotated[bool, typer.Option("--recalibrate", help="Calibrate anew even where a table is kept.")]
MinSqnr = Annotated[
    float | None, typer.Option("--min-sqnr", help="Mixed: the least SQNR of the output against FP32, in dB, e.g. 25.")
]
MinAgreement = Annotated[
    float | None, typer.Option("--min-agreement", help="Mixed: the least share of samples with FP32's top-1, e.g. 0.99.")
]
BiasCorrect = Annotated[
    bool | None,
    typer.Option(
        "--bias-correct/--no-bias-correct",
        help="INT8: give back through the biases what quantizing shifts, layer by layer, on the calibration samples; default: "
        "wherever there are samples.",
        show_default=False,
    ),
]
ScaleCorrect = Annotated[
    bool | None,
    typer.Option(
        "--scale-correct/--no-scale-correct",
        help="INT8: with the biases, give back through the weights' scales what quantizing does to the spread of each channel; default: "
        "wherever biases are corrected.",
        show_default=False,
    ),
]
WeightScales = Annotated[
    str, typer.Option("--weight-scales", help="INT8 weights: scale by each channel's max, or by its least squared error (mse).")
]
ReduceRange = Annotated[
    bool, typer.Option("--reduce-range", help="INT8 weights in 7 bits, for CPUs without VNNI (see `deploykit doctor`).")
]
Rounding = Annotated[
    str, typer.Option(help="INT8 weights: rounded to the nearest, or learnt on the calibration samples (gptq; takes longer).")
]
Equalize = Annotated[
    bool,
    typer.Option(
        "--equalize",
        help="INT8: first bring the channels between layers to one range, on the calibration samples; the float model stays the same.",
    ),
]
Preprocess = Annotated[
    str | None,
    typer.Option(help="resize=256,crop=224,mean=0.485/0.456/0.406,std=0.229/0.224/0.225[,layout=nhwc] or imagenet, timm, none."),
]
Classes = Annotated[Path | None, typer.Option(help="A file with the class names in the model's order, one a line.")]
Limit = Annotated[int | None, typer.Option(help="Use at most this many samples of the data.")]
Shapes = Annotated[
    list[str] | None,
    typer.Option(
        help="Range of an input with dynamic axes beside the batch: NAME=1x3x320x320:8x3x320x320:32x3x640x640 (min:opt:max)."
    ),
]
BackendNames = Annotated[
    str | None, typer.Option("--backend", help="Backends, separated by commas; default: all this machine has.")
]
PrecisionNames = Annotated[
    str | None, typer.Option("--precision", help="Precisions, separated by commas: fp32, fp16, bf16, int8, int8-dynamic.")
]
TargetNames = Annotated[str | None, typer.Option("--target", help="GPU targets to build for, e.g. sm75,sm89 (T4, L4).")]
Threads = Annotated[int | None, typer.Option(help="Threads of every row; default: every CPU this process may use.")]
DurationName = Annotated[
    str, typer.Option("--duration", help="smoke (0.2 s a row), quick (3 to 6 s), standard (10 to 20 s) or mlperf (600 s).")
]
StoreFolder = Annotated[Path, typer.Option("--store", help="Where built artifacts are kept.")]
Remeasure = Annotated[bool, typer.Option("--remeasure", help="Measure again even when nothing changed.")]
AA = Annotated[bool, typer.Option("--aa", help="Add an A/A row: the reference again, in processes of its own.")]
JsonFile = Annotated[
    str | None, typer.Option("--json", help="Write JSON to this file; '-' is standard output and nothing else there.")
]
MaxDrop = Annotated[str | None, typer.Option("--max-drop", help="Gate: the largest drop in top-1, e.g. 0.5pp.")]
MaxDisagreement = Annotated[
    str | None,
    typer.Option(
        "--max-disagreement",
        help="Gate: the largest share of samples with another top-1 than the reference's, e.g. 1pp; no labels needed.",
    ),
]
MaxSlowdown = Annotated[
    str | None, typer.Option("--max-slowdown", help="Gate: the largest slow-down against the baseline, e.g. 5%.")
]
MaxSizeGrowth = Annotated[
    str | None, typer.Option("--max-size-growth", help="Gate: by how much an engine's bytes may grow, e.g. 10%.")
]
MaxMemoryGrowth = Annotated[
    str | None, typer.Option("--max-memory-growth", help="Gate: by how much a process's peak memory may grow, e.g. 10%.")
]
MaxStartupGrowth = Annotated[
    str | None, typer.Option("--max-startup-growth", help="Gate: by how much the time to open an engine may grow, e.g. 50%.")
]
LimitsFile = Annotated[
    Path | None, typer.Option("--limits", help="Gate: a deploykit.yaml whose 'limits' list holds limits of single rows.")
]
Baseline = Annotated[
    Path | None,
    typer.Option(help="What to hold this run against: a run's folder, a report.json, or a folder of baselines by machine class."),
]
Streams = Annotated[
    int, typer.Option(help="Requests kept running at once, on backends that can (openvino); the others run one at a time.")
]
Layout = Annotated[
    str,
    typer.Option(help="channels-first or channels-last: how torch and torch-compile keep images and filters; others choose."),
]
Scenario = Annotated[
    str | None,
    typer.Option(
        help="Also run each row under MLPerf's LoadGen: SingleStream, MultiStream, Server or Offline.", show_default=False
    ),
]
ServerLatency = Annotated[
    str, typer.Option("--server-latency", help="Server: the bound that 99 % of the queries keep, e.g. 15ms.")
]
