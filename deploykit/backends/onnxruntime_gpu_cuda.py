"""The backend 'onnxruntime-cuda': ONNX Runtime's CUDA provider."""

from __future__ import annotations

from deploykit.backends.onnxruntime_gpu import CUDA, OnnxRuntimeGpu, Provider
from deploykit.session import Missing

BACKEND = OnnxRuntimeGpu(
    Provider(
        row="onnxruntime-cuda",
        title="ONNX Runtime's CUDA provider",
        name=CUDA,
        graphs={"fp32": "fp32", "fp16": "fp16"},
        offered=("fp32", "fp16"),
        refused={
            "int8": Missing(
                "ONNX Runtime's CUDA provider has no INT8 convolutions: a Q/DQ graph runs in float",
                "use --backend onnxruntime-tensorrt or tensorrt for INT8",
            )
        },
        oldest="sm75",
    )
)
