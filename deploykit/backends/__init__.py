"""The backends by name. Importing this package, or any backend's module, imports no engine."""

from __future__ import annotations

import importlib

from deploykit.artifact import Json
from deploykit.errors import UnknownName
from deploykit.session import LAYOUTS, Backend

# name -> module; each module exposes BACKEND
MODULES = {
    "torch": "torch_eager",
    "torch-compile": "torch_compile",
    "onnxruntime": "onnx_runtime",
    "openvino": "openvino_cpu",
    "executorch": "executorch",
    "litert": "litert",
    "tvm": "apache_tvm",
    "tensorrt-rtx": "tensorrt_rtx",
    "tensorrt": "tensorrt_full",
    "onnxruntime-cuda": "onnxruntime_gpu_cuda",
    "onnxruntime-tensorrt": "onnxruntime_gpu_tensorrt",
    "onnxruntime-rtx": "onnxruntime_gpu_rtx",
}
# Other ways to an engine that has a row of its own: without what they need, they have a row only when asked for by name.
ONLY_WHERE_READY = ("onnxruntime-cuda", "onnxruntime-tensorrt", "onnxruntime-rtx")


def get(name: str) -> Backend:
    """The backend of that name. Raises UnknownName."""
    if name not in MODULES:
        raise UnknownName("backend", name, list(MODULES))
    backend: Backend = importlib.import_module(f"deploykit.backends.{MODULES[name]}").BACKEND
    return backend


def names() -> tuple[str, ...]:
    """Every backend that this version has, in the order of the table's rows."""
    return tuple(MODULES)


def default_names() -> tuple[str, ...]:
    """The backends that have rows when none is asked for by name."""
    return tuple(name for name in names() if name not in ONLY_WHERE_READY or get(name).missing() is None)


OPENING_S = 1.5  # 0.7 to 2 s for ResNet-18 on 2 cores


def opening_s(name: str) -> float:
    """About how many seconds a process of that backend takes to start, open an engine and warm it up (`opening_s`, where it says
    so): what an estimate is made of."""
    return float(getattr(get(name), "opening_s", OPENING_S))


def concurrent(name: str) -> bool:
    """Whether a session of that backend can run several requests at once (`Session.streams`)."""
    return bool(getattr(get(name), "concurrent", False))


def from_fp32(name: str, precision: str) -> bool:
    """Whether that backend makes its engine of this precision of its FP32 engine (`from_fp32`)."""
    return precision in getattr(get(name), "from_fp32", ())


def layouts(name: str) -> tuple[str, ...]:
    """The memory layouts that a session of that backend can be asked for; one where the engine chooses by itself."""
    return tuple(getattr(get(name), "layouts", LAYOUTS[:1]))


def opening_options(name: str, streams: int | None, layout: str | None) -> dict[str, Json]:
    """`OpenRequest.options` for so many requests at once and a layout, as far as that backend has them."""
    options: dict[str, Json] = {}
    if streams is not None and streams > 1 and concurrent(name):
        options["streams"] = streams
    if layout is not None and layout in layouts(name)[1:]:
        options["layout"] = layout
    return options
