"""Precision written into the graph: FP16, INT8 as Q/DQ in two layouts, dynamic INT8. Every function returns an unsaved Artifact."""

from __future__ import annotations

from deploykit.stages.precision.int8 import to_int8
from deploykit.stages.precision.options import LAYOUTS, WEIGHT_SCALES, Int8Options

__all__ = ["LAYOUTS", "WEIGHT_SCALES", "Int8Options", "to_int8"]
