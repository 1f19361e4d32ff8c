"""GPUs by their datasheets: the ceilings of hardware that is not here. Bounds, never measurements.

Dense figures (no structured sparsity). FP32 is TF32's where the tensor cores have it, since TensorRT uses it by default.
"""

from __future__ import annotations

import math

from deploykit.roofline import Ceilings


def _card(name: str, source: str, fp32: float, half: float, int8: float, gigabytes: float, cache: float) -> Ceilings:
    """Tera-operations a second by precision, GB/s of memory, MB of L2: what stays in there has no bound here."""
    peaks = {"fp32": fp32 * 1e12, "fp16": half * 1e12, "bf16": half * 1e12, "int8": int8 * 1e12}
    return Ceilings(name, f"datasheet: {source}", peaks, {0: math.inf, int(cache * 1e6): gigabytes * 1e9})


_T4 = _card(
    "NVIDIA T4", "NVIDIA T4 Tensor Core GPU (8.1 TFLOPS FP32, 65 FP16, 130 TOPS INT8, 320 GB/s, 4 MB L2)", 8.1, 65, 130, 320, 4
)
# One card for each generation: the one a data centre has most likely.
CARDS = {
    # Turing has no BF16
    "sm75": Ceilings(_T4.name, _T4.source, {k: v for k, v in _T4.ops_per_s.items() if k != "bf16"}, _T4.bytes_per_s),
    "sm80": _card(
        "NVIDIA A100 40 GB",
        "NVIDIA A100 Tensor Core GPU (TF32 156 TFLOPS, FP16 312, INT8 624 TOPS, 1,555 GB/s, 40 MB L2)",
        *(156, 312, 624, 1555, 40),
    ),
    "sm86": _card(
        "NVIDIA A10", "NVIDIA A10 (TF32 62.5 TFLOPS, FP16 125, INT8 250 TOPS, 600 GB/s, 6 MB L2)", 62.5, 125, 250, 600, 6
    ),
    "sm89": _card("NVIDIA L4", "NVIDIA L4 (TF32 60 TFLOPS, FP16 121, INT8 242 TOPS, 300 GB/s, 48 MB L2)", 60, 121, 242, 300, 48),
    "sm90": _card(
        "NVIDIA H100 SXM",
        "NVIDIA H100 Tensor Core GPU (TF32 494 TFLOPS, FP16 989, INT8 1,979 TOPS, 3,350 GB/s, 50 MB L2)",
        *(494, 989, 1979, 3350, 50),
    ),
}


def ceilings(target: str) -> Ceilings | None:
    """The ceilings of the card that stands for a target ('sm75', ...); None where no datasheet is kept here."""
    return CARDS.get(target)
