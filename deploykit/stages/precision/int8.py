"""INT8 written into the graph from a calibration table."""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deploykit import graph as graphs
from deploykit.artifact import Artifact, Json, sha256_of
from deploykit.errors import InputError, ModelError, UnknownName
from deploykit.quantized_layers import SCALE_CORRECTED
from deploykit.stages.precision import normal_form, plan_cpu, plan_tensorrt, scales
from deploykit.stages.precision.half import HALF_MAX, HALF_NORMAL
from deploykit.stages.precision.insert import Inserter, activation_scales
from deploykit.stages.precision.options import LAYOUTS, Int8Options
from deploykit.stages.precision.plan import WEIGHTED, Plan, left_in_bodies
from deploykit.stages.precision.view import FloatGraph

if TYPE_CHECKING:
    import onnx

    from deploykit.calibration_table import CalibrationTable
    from deploykit.stages.precision.correction import Corrections

STAGE = "precision"
_DEFAULT = Int8Options()


def to_int8(
    path: Path,
    table: CalibrationTable,
    layout: str,
    out: Path,
    options: Int8Options = _DEFAULT,
    corrections: Corrections | None = None,
) -> Artifact:
    """The INT8 form of a float model, as Q/DQ nodes; unsaved. Inputs, outputs and the batch axis stay as they are.

    layout 'cpu': uint8 activations with a zero point, int8 weights per channel, int32 biases (ONNX Runtime, OpenVINO);
    'tensorrt': symmetric int8, biases in float. What cannot be quantized stays in float, with the reason in `facts`.
    `corrections`: what `bias.corrections` found for this model and layout, written into biases and weight scales.
    Raises StaleCalibration for the table or corrections of another model, ModelError for a model that is quantized already, InputError
    where nothing could be quantized.
    """
    model, facts = quantized(path, table, layout, options, corrections)
    return write(model, out, precision="int8", parent=path, options=told(table, layout, options, corrections), facts=facts)


def planned(path: Path, table: CalibrationTable, layout: str, options: Int8Options) -> tuple[FloatGraph, list[str]]:
    """The float graph in normal form, and the names of the nodes that `to_int8` quantizes the weights of, in order."""
    graph, digest = normal_form.load(path)
    table.require_match(model_sha256=digest)
    planner = plan_tensorrt if layout == "tensorrt" else plan_cpu
    plan = planner.plan(graph, table.ranges, options.keep_float)
    return graph, [graph.nodes[i].name for i in sorted(plan.weighted)]


def quantized(
    path: Path,
    table: CalibrationTable,
    layout: str,
    options: Int8Options,
    corrections: Corrections | None = None,
    *,
    opset: int = normal_form.MIN_OPSET,
    half: bool = False,
) -> tuple[onnx.ModelProto, dict[str, Json]]:
    """The model that `to_int8` writes, and its facts. `half`: scales that FP16 holds exactly."""
    if layout not in LAYOUTS:
        raise UnknownName("layout", layout, LAYOUTS)
    graph, digest = normal_form.load(path, opset)
    table.require_match(model_sha256=digest)
    if corrections is not None:
        corrections.require_match(digest, layout)
    strangers = set(options.keep_float) - {node.name for node in graph.nodes}
    if strangers:
        raise UnknownName("node to keep in float", min(strangers), [node.name for node in graph.nodes])
    planner = plan_tensorrt if layout == "tensorrt" else plan_cpu
    unfit = _unfit_for_half(graph, table) if half else {}
    plan = planner.plan(graph, table.ranges, {*options.keep_float, *unfit})
    _leave_unfit(plan, graph, table, unfit)
    if not plan.weighted:
        reasons = sorted(set(plan.left.values()))
        raise InputError(
            f"nothing in {path.name} can be quantized: " + ("; ".join(reasons[:3]) or "it has no Conv, Gemm or MatMul"),
            "use fp32 or fp16 for this model",
        )
    counts = Counter(graph.nodes[i].op_type for i in plan.weighted)
    facts = _facts(graph, plan, layout, dict(counts))
    facts["bias_corrected_layers"] = corrections.apply(graph, plan.weighted) if corrections is not None else 0
    inserter = Inserter(
        graph,
        plan,
        activation_scales(plan, table, layout, half=half),
        options,
        integer_bias=layout == "cpu",
        half=half,
        rounded={} if corrections is None else corrections.integers,
        gains={} if corrections is None else corrections.gains,
    )
    inserter.write()
    facts["dead_channels"] = inserter.dead_channels
    facts["rounded_layers"] = inserter.rounded_layers
    facts["scale_corrected_layers"] = inserter.scaled_layers
    return graph.model, facts


def _unfit_for_half(graph: FloatGraph, table: CalibrationTable) -> dict[str, str]:
    """Layer -> why it stays in float: FP16 holds its weights' or its input's scale too coarsely, or not at all."""
    found = {}
    for node in graph.nodes:
        if node.op_type not in WEIGHTED or node.domain:
            continue
        data, weight = node.input[0], node.input[1]
        if data in table.ranges and _is_coarse(table, data):
            found[node.name] = (
                f"its input '{data}' reaches {table.amax(data):.2g} only, and FP16 holds no scale that fine "
                f"(under {scales.COARSE_HALF_SCALE * 127:.1g})"
            )
        elif weight in graph.constants and graph.is_float(weight):
            most = float(np.abs(graph.array(weight)).max(initial=0.0))
            if 0.0 < most < HALF_NORMAL or most > HALF_MAX:
                found[node.name] = f"its weights reach {most:.2g}, and FP16 holds {HALF_NORMAL:.1g} to {HALF_MAX:.0f}"
    return found


def _is_coarse(table: CalibrationTable, name: str) -> bool:
    return bool(0.0 < table.amax(name) / 127.0 < scales.COARSE_HALF_SCALE)


def _leave_unfit(plan: Plan, graph: FloatGraph, table: CalibrationTable, unfit: Mapping[str, str]) -> None:
    """Says in the plan why those layers stay in float, and takes the pairs of tensors that FP16 has no scale for out of it."""
    for i in plan.left:
        plan.left[i] = unfit.get(graph.nodes[i].name, plan.left[i])
    if unfit:
        for name in [edge for edge in plan.edges if _is_coarse(table, plan.root(edge))]:
            del plan.edges[name]


def _facts(graph: FloatGraph, plan: Plan, layout: str, counts: dict[str, int]) -> dict[str, Json]:
    notes = []
    if layout == "cpu":
        notes.append(
            "uint8 x int8 saturates on CPUs without VNNI (16-bit sums); there, quantize with reduced range (7-bit weights)"
        )
    if layout == "tensorrt" and counts.get("ConvTranspose"):
        notes.append("TensorRT-RTX 1.7 runs ConvTranspose in Half or Float even between Q/DQ (seen); full TensorRT has INT8 ones")
    inner = left_in_bodies(graph)
    if inner:
        notes.append(f"left in float inside control-flow bodies: {dict(inner)}")
    shared = len(plan.shared)
    return {
        "layout": layout,
        "quantized_layers": sum(counts.values()),
        "quantized_by_operator": counts,
        "quantized_tensors": len(plan.edges),
        "tensors_that_share_a_scale": shared,
        "left_in_float": [
            {"node": graph.nodes[i].name, "operator": graph.nodes[i].op_type, "reason": reason}
            for i, reason in sorted(plan.left.items())
        ],
        "notes": notes,
    }


def told(table: CalibrationTable, layout: str, options: Int8Options, corrections: Corrections | None = None) -> dict[str, Json]:
    """What an INT8 artifact records as its options."""
    return {
        **options.to_json(),
        "scale_correct": corrections is not None and bool(corrections.gains),
        "layout": layout,
        "method": table.method,
        "calibration": table.fingerprint,
        "calibration_samples": table.n,
        "bias_correction": None if corrections is None else corrections.fingerprint,
    }


def write(
    model: onnx.ModelProto,
    out: Path,
    *,
    precision: str,
    parent: Path,
    options: dict[str, Json],
    facts: dict[str, Json],
    packages: tuple[str, ...] = ("onnx",),
) -> Artifact:
    """The unsaved Artifact of a model, written to `out` after onnx's full check. Raises ModelError when that fails."""
    import onnx

    model.producer_name = "deploykit"
    if facts.get("scale_corrected_layers"):
        entry = model.metadata_props.add()
        entry.key, entry.value = SCALE_CORRECTED, str(facts["scale_corrected_layers"])
    if graphs.fits_inline(model):
        try:
            onnx.checker.check_model(model, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as exc:
            raise ModelError(
                f"{precision} of {parent.name} is no valid ONNX graph: {exc}", "please report this model; use fp32 meanwhile"
            ) from exc
    companions = graphs.save(model, out)
    return Artifact(
        path=out,
        format="onnx",
        precision=precision,
        signature=graphs.signature(model),
        stage=STAGE,
        parent=sha256_of(parent),
        options=options,
        versions={name: importlib.metadata.version(name) for name in packages},
        facts=facts,
        companions=dict.fromkeys(companions, ""),
    )
