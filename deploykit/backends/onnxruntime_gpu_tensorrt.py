"""The backend 'onnxruntime-tensorrt': ONNX Runtime's TensorRT provider; what TensorRT refuses goes to CUDA, and is told."""

from __future__ import annotations

from deploykit.backends.onnxruntime_gpu import CUDA, OnnxRuntimeGpu, Provider


def _options(precision: str) -> dict[str, str]:
    """TensorRT's flags; engines are kept, since building one takes minutes and every launch would build it again."""
    return {
        "trt_fp16_enable": "1" if precision in ("fp16", "int8") else "0",
        "trt_int8_enable": "1" if precision == "int8" else "0",
        "trt_engine_cache_enable": "1",
    }


BACKEND = OnnxRuntimeGpu(
    Provider(
        row="onnxruntime-tensorrt",
        title="ONNX Runtime's TensorRT provider",
        name="TensorrtExecutionProvider",
        graphs={"fp16": "fp16", "int8": "int8-tensorrt", "fp32": "fp32"},
        offered=("fp16", "int8"),
        refused={},
        oldest="sm75",
        behind=(CUDA,),
        options=_options,
        places="trt_engine_cache_path",
    )
)
