"""The account of a plan for its manifest: what was asked, what the builder's listing says runs, and where they differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from deploykit.errors import BackendFailed
from deploykit.trt import layers, plan, profiles
from deploykit.trt.builder import Plan

if TYPE_CHECKING:
    import onnx


def facts(
    model: onnx.ModelProto,
    made: Plan,
    wanted: Sequence[profiles.Profile],
    *,
    explained: Sequence[str] = (),
    notes: Sequence[str] = (),
    implicit: bool = False,
) -> dict[str, Any]:
    """The manifest's `facts` of a plan: JSON values only.

    'requested' and 'layers' count by kind and precision; 'fallback' names each node that asked for INT8 and runs in
    something else; 'fell_back' says it in words (None where nothing did); 'unseen' names those of which the listing tells
    nothing. 'notes' is what to print: the warnings, asked against actual, and the `notes` given. `explained` is added to the
    warnings where something fell back. `implicit`: every convolution and matrix product is asked for in INT8, though no Q/DQ
    says so.
    """
    asked = layers.asked(model)
    if implicit:
        asked = tuple(layers.Asked(a.node, a.op, "Int8") for a in asked)
    missed = layers.shortfalls(asked, made.layers)
    counts = layers.requested(asked)
    lines = plan.shortfall_lines(missed, counts)
    unseen = layers.unseen(asked, made.layers)
    warnings = [*lines, *(explained if missed else ()), *plan.unseen_line(unseen), *made.warnings]
    return {
        "notes": [*warnings, plan.layers_line(counts, layers.by_kind(made.layers)), *notes],
        "profiles": profiles.to_json(wanted),
        "requested": counts,
        "layers": layers.by_kind(made.layers),
        "fallback": [{"node": m.node, "op": m.op, "actual": m.actual} for m in missed],
        "fell_back": "; ".join(lines) or None,
        "unseen": [want.node for want in unseen],
        "warnings": warnings,
        "network_layers": made.network_layers,
        "plan_layers": len(made.layers),
        "size_bytes": len(made.data),
        "parse_s": made.parse_s,
        "build_s": made.build_s,
        "validated_on_gpu": False,
    }


def require_quantized(model: onnx.ModelProto) -> None:
    """Raises BackendFailed when INT8 was asked for and nothing in the graph asks for it."""
    if not any(want.precision == "Int8" for want in layers.asked(model)):
        raise BackendFailed(
            "asked for INT8, but no convolution or matrix product of the graph has Q/DQ nodes before it",
            "quantize it first: `deploykit quantize --mode static --layout tensorrt`",
        )
