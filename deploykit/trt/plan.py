"""What a build will give and what to warn of, in plain words, before anything is built."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from deploykit.trt.layers import Asked, Shortfall

# Compute capability -> what people call it (NVIDIA's CUDA GPUs page).
GENERATIONS = {
    "sm75": "Turing (T4, RTX 20)",
    "sm80": "Ampere (A100, A30)",
    "sm86": "Ampere (A10, RTX 30)",
    "sm89": "Ada (L4, L40, RTX 40)",
    "sm90": "Hopper (H100)",
    "sm120": "Blackwell (RTX 50, RTX PRO 6000)",
    "sm121": "Blackwell (DGX Spark)",
}
UNVALIDATED = "built without a GPU: what this engine does on one is unverified until a GPU has run it (validated_on_gpu: false)"
RTX_TURING_INT8 = (
    "TensorRT-RTX runs the convolutions of an INT8 Q/DQ graph in Half on sm75 (T4): the engine is smaller, not faster than "
    "FP16; real INT8 on a T4 needs full TensorRT"
)
PREDICTED = (
    "accuracy: that of the same graph on the CPU, Q/DQ run as written, is told as predicted; on the GPU it is not measured here"
)
NOT_PREDICTED = "accuracy: neither measured nor predicted; with --data DATA the same graph is run on the CPU, on samples that do not calibrate"
RTX_TURING_FP32 = "TensorRT-RTX has no FP32 matrix products for sm75 (T4)"
RTX_INT8_POINTWISE = (
    "on sm80 and later TensorRT-RTX runs the convolutions in Int8, but they write Float and a pointwise kernel follows each: "
    "INT8 need not be faster than FP16; measure both"
)


def expectations(precision: str, target: str, backend: str = "tensorrt-rtx") -> list[str]:
    """What will be built for a precision and a target ('sm75', ...), then what to expect of it, one sentence an item.

    Facts about TensorRT-RTX 1.7.1 as its own builder listed them; they say what runs, never how fast.
    """
    where = GENERATIONS.get(target, "a GPU generation that deploykit knows nothing of")
    rtx = backend == "tensorrt-rtx"
    lines = [f"{precision.upper()} engine for {target}, {where}, by {backend}" + (", ahead of time" if rtx else "")]
    if rtx and target == "sm75":
        if precision in ("int8", "mixed"):
            lines.append(RTX_TURING_INT8)
        if precision == "fp32":
            lines.append(RTX_TURING_FP32 + ": the build will be refused")
    elif rtx and precision in ("int8", "mixed"):
        lines.append(RTX_INT8_POINTWISE)
    if not rtx:
        lines += tf32(precision, target)
    if rtx:
        lines.append(f"this plan runs on {target} only: each GPU generation gets a plan of its own")
        lines.append(UNVALIDATED)
    else:
        lines.append("this plan runs on the GPU model and with the TensorRT version it was built with, and no other")
    return lines


def tf32(precision: str, target: str) -> list[str]:
    """What to know of FP32 on a GPU that has TF32 (NVIDIA's and ONNX Runtime's documentation: both have it on by default)."""
    if precision != "fp32" or target == "sm75":
        return []
    return [
        "FP32 on sm80 and later: convolutions and matrix products may run in TF32 (10 bits of mantissa), the default of TensorRT and of "
        "ONNX Runtime's CUDA provider"
    ]


def shortfall_lines(missed: Iterable[Shortfall], wanted: Mapping[str, Mapping[str, int]]) -> list[str]:
    """What asked for INT8 and runs in something else, per operator: '20 of 20 Conv asked for Int8 run in Half: a, b, ...'."""
    groups: dict[tuple[str, str], list[str]] = {}
    for miss in missed:
        groups.setdefault((miss.op, miss.actual), []).append(miss.node)
    lines = []
    for (op, actual), nodes in sorted(groups.items()):
        total = wanted.get(op, {}).get("Int8", len(nodes))
        shown = ", ".join(nodes[:3]) + (", ..." if len(nodes) > 3 else "")
        lines.append(f"{len(nodes)} of {total} {op} that asked for Int8 run in {actual}: {shown}")
    return lines


def unseen_line(unseen: Iterable[Asked]) -> list[str]:
    """One warning for what asked for INT8 and of which the builder does not tell what it runs in; none where it tells of all."""
    nodes = [want.node for want in unseen]
    if not nodes:
        return []
    shown = ", ".join(nodes[:3]) + (", ..." if len(nodes) > 3 else "")
    return [f"{len(nodes)} that asked for Int8 have no layer of their own in the builder's listing, so what they run in is not known: {shown}"]  # fmt: skip


def layers_line(wanted: Mapping[str, Mapping[str, int]], running: Mapping[str, Mapping[str, int]]) -> str:
    """Asked against actual in one line: 'asked: Conv 20 Int8; runs: convolution 20 Int8, pointwise 13 Float 5 Int8'."""

    def said(table: Mapping[str, Mapping[str, int]]) -> str:
        return ", ".join(f"{kind} {' '.join(f'{n} {p}' for p, n in row.items())}" for kind, row in table.items()) or "not listed"

    return f"asked: {said(wanted)}; runs: {said(running)}"
