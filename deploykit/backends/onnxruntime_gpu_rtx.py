"""The backend 'onnxruntime-rtx': NVIDIA's TensorRT-RTX provider, a plugin beside the plain onnxruntime wheel (1.24 and later)."""

from __future__ import annotations

from deploykit.backends.onnxruntime_gpu import OnnxRuntimeGpu, Provider

BACKEND = OnnxRuntimeGpu(
    Provider(
        row="onnxruntime-rtx",
        title="the TensorRT-RTX provider",
        name="NvTensorRTRTXExecutionProvider",
        graphs={"fp16": "fp16", "int8": "int8-tensorrt", "fp32": "fp32"},
        offered=("fp16", "int8"),
        refused={},
        oldest="sm80",  # NVIDIA's installation page of the plugin: Ampere and later
        plugin="onnxruntime_ep_nv_tensorrt_rtx",
        options=lambda _: {"enable_cuda_graph": "1"},
        places="nv_runtime_cache_path",
    )
)
