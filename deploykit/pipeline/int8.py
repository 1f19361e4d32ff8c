"""INT8 as it was asked for: from a table, and from samples where it is corrected; `quantize`, `build`, `run` and `bench` make it here."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deploykit.artifact import Artifact, Json
from deploykit.calibration_table import CalibrationTable
from deploykit.errors import InputError, MissingBackend
from deploykit.pipeline.request import Int8Request
from deploykit.samples import Samples


@dataclass(frozen=True)
class Int8Recipe:
    """The switches, and the samples to correct with (calibration samples, never those that judge); None where there are none."""

    request: Int8Request = field(default_factory=Int8Request)
    samples: Samples | None = None

    def __post_init__(self) -> None:
        """Raises InputError for switches that contradict each other or need samples where there are none."""
        learns = self.request.rounding != "nearest"
        if learns and self.request.bias_correct is False:
            raise InputError(
                "--rounding gptq with --no-bias-correct: what rounding shifts is given back through the biases",
                "leave one of the two out",
            )
        if self.request.scale_correct and self.request.bias_correct is False:
            raise InputError(
                "--scale-correct with --no-bias-correct: what a gain shifts is given back through the biases",
                "leave one of the two out",
            )
        if self.samples is None and (self.request.bias_correct or self.request.scale_correct or learns):
            what = "--rounding gptq" if learns else "--bias-correct" if self.request.bias_correct else "--scale-correct"
            raise InputError(f"{what} needs calibration samples, and there are none", "add --data DATA")

    @property
    def corrects(self) -> bool:
        """Whether biases (and scales) are to be corrected: by default wherever there are samples."""
        return self.samples is not None and self.request.bias_correct is not False

    def to_json(self) -> dict[str, Json]:
        """What an INT8 graph depends on beside its table (part of the store's key)."""
        chosen = self.samples if self.corrects else None
        return {
            "bias_correct": self.request.bias_correct if self.corrects else False,
            "corrected_on": None if chosen is None else chosen.digest,
            "weight_scales": self.request.weight_scales,
            "reduce_range": self.request.reduce_range,
            "rounding": self.request.rounding,
            "scale_correct": self.request.scale_correct if self.corrects else False,
        }


def graph_of_kind(path: Path, kind: str, table: CalibrationTable | None, recipe: Int8Recipe, out: Path) -> Artifact:
    """The graph that a backend asks for ('fp16' | 'int8-dynamic' | 'int8-cpu' | 'int8-tensorrt'), made of a float model, at `out`,
    unsaved; runs in a child process. `table` is for the last two."""
    from deploykit.stages import precision

    if kind == "fp16":
        return precision.to_fp16(path, out)
    if kind == "int8-dynamic":
        return precision.to_int8_dynamic(path, out)
    assert table is not None
    layout, rest = ("cpu", "fp32") if kind == "int8-cpu" else ("tensorrt", "fp16")
    return write(path, table, layout, rest, recipe, (), out)


def write(
    path: Path, table: CalibrationTable, layout: str, rest: str, recipe: Int8Recipe, keep_float: tuple[str, ...], out: Path
) -> Artifact:
    """The INT8 graph of a float model at `out`, unsaved; runs in a child process.

    layout 'cpu' | 'tensorrt'; rest 'fp32' | 'fp16'. Where correction was not asked for by name and has nothing to correct, or
    no ONNX Runtime to measure with, the graph is written without it, and a note says so. The table's own notes go along.
    """
    made = _written(path, table, layout, rest, recipe, keep_float, out)
    for note in table.notes:
        made = noted(made, note)
    return made


def _written(
    path: Path, table: CalibrationTable, layout: str, rest: str, recipe: Int8Recipe, keep_float: tuple[str, ...], out: Path
) -> Artifact:
    from deploykit.stages import precision

    request = recipe.request
    scale_correct = request.scale_correct is not False
    options = precision.Int8Options(request.reduce_range, request.weight_scales, keep_float, request.rounding, scale_correct)
    reason = ""
    if recipe.corrects:
        assert recipe.samples is not None
        try:
            return precision.bias_correct(path, table, layout, recipe.samples, out, options, rest)
        except (precision.NothingToCorrect, MissingBackend) as exc:
            if request.bias_correct or request.scale_correct or request.rounding != "nearest":
                raise
            reason = exc.message
    if rest == "fp16":
        made = precision.to_int8_fp16(path, table, out, options)
    else:
        made = precision.to_int8(path, table, layout, out, options)
    return noted(made, f"biases are not corrected: {reason}") if reason else made


def noted(made: Artifact, note: str) -> Artifact:
    """The artifact with one more note."""
    facts: dict[str, Any] = dict(made.facts)
    facts["notes"] = [*facts.get("notes", []), note]
    return replace(made, facts=facts)
