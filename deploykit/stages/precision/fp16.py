"""FP16, alone and around INT8."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from deploykit.artifact import Artifact, Json
from deploykit.errors import InputError
from deploykit.stages.precision import normal_form
from deploykit.stages.precision.half import HalfWriter
from deploykit.stages.precision.int8 import quantized, told, write
from deploykit.stages.precision.options import Int8Options

if TYPE_CHECKING:
    import onnx

    from deploykit.calibration_table import CalibrationTable
    from deploykit.stages.precision.correction import Corrections

HALF_SCALES_OPSET = 19  # QuantizeLinear and DequantizeLinear take FP16 from there on
_DEFAULT = Int8Options()


def to_fp16(path: Path, out: Path, table: CalibrationTable | None = None) -> Artifact:
    """The FP16 form of a float model, unsaved; its inputs and outputs stay in float32. A model that is in FP16 already
    stays as it is.

    What would overflow stays in float32, named in `facts`: constants beyond 65504, sums of squares and, with the model's
    calibration `table`, tensors that came within a factor of two of the limit. Weights that become zero are named too.
    Raises ModelError for a quantized model, StaleCalibration for the table of another model, InputError where no operator
    could be converted.
    """
    graph, digest = normal_form.load(path)
    if table is not None:
        table.require_match(model_sha256=digest)
    facts = HalfWriter(graph, None if table is None else table.observed).write()
    if not facts["half_nodes"] and not _is_half(graph.model):
        raise InputError(f"no operator of {path.name} can compute in FP16", "use fp32 for this model")
    options: dict[str, Json] = {"keep_io": True, "calibration": None if table is None else table.fingerprint}
    return write(graph.model, out, precision="fp16", parent=path, options=options, facts=facts)


def _is_half(model: onnx.ModelProto) -> bool:
    return any(tensor.data_type == tensor.FLOAT16 for tensor in model.graph.initializer)


def to_int8_fp16(
    path: Path, table: CalibrationTable, out: Path, options: Int8Options = _DEFAULT, corrections: Corrections | None = None
) -> Artifact:
    """INT8 in TensorRT's layout with the rest of the graph in FP16, unsaved: what TensorRT and TensorRT-RTX build.

    Q/DQ first, then FP16 around it, so that the scales are FP16 too (opset 19 or more); they are chosen to be exact in
    FP16. Inputs and outputs stay in float32. Raises as `to_int8` and `to_fp16` do.
    """
    model, facts = quantized(path, table, "tensorrt", options, corrections, opset=HALF_SCALES_OPSET, half=True)
    graph = normal_form.normalize(model, path, HALF_SCALES_OPSET)
    observed = {name: seen for name, seen in table.observed.items() if name in graph.names}
    rest = HalfWriter(graph, observed).write()
    merged = {**facts, "half_nodes": rest["half_nodes"], "vanished": rest["vanished"], "kept_in_fp32": rest["left_in_float"]}
    return write(
        graph.model,
        out,
        precision="int8",
        parent=path,
        options={**told(table, "tensorrt", options, corrections), "rest": "fp16"},
        facts=merged,
    )
