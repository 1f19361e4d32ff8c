"""Precision written into the graph: FP16, INT8 as Q/DQ in two layouts, dynamic INT8. Every function returns an unsaved Artifact."""

from __future__ import annotations

from deploykit.stages.precision.bias import NothingToCorrect, bias_correct
from deploykit.stages.precision.choice import noise as method_noise
from deploykit.stages.precision.contributions import Contributions, contributions
from deploykit.stages.precision.dynamic import to_int8_dynamic
from deploykit.stages.precision.equalization import equalize
from deploykit.stages.precision.fp16 import to_fp16, to_int8_fp16
from deploykit.stages.precision.int8 import planned, to_int8
from deploykit.stages.precision.options import LAYOUTS, ROUNDINGS, WEIGHT_SCALES, Int8Options
from deploykit.stages.precision.walk import open_session as literal_session

__all__ = [
    "LAYOUTS",
    "ROUNDINGS",
    "WEIGHT_SCALES",
    "Contributions",
    "Int8Options",
    "NothingToCorrect",
    "bias_correct",
    "contributions",
    "equalize",
    "literal_session",
    "method_noise",
    "planned",
    "predict_session_options",
    "to_fp16",
    "to_int8",
    "to_int8_dynamic",
    "to_int8_fp16",
]


def predict_session_options() -> dict[str, str]:
    """ONNX Runtime session entries that make it compute Q/DQ literally: what the graph says, not what fused integer
    kernels make of it. Predicts an engine's accuracy on hardware that is not here, and never saturates (no U8S8 sums)."""
    return {"session.disable_quant_qdq": "1"}
